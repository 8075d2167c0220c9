"""Networks: a trunk from images to features, and a head from features to logits.

A new trunk or head is a Linen module and its entry in `TRUNKS` or `HEADS`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from lt_jax.errors import construct
from lt_jax.models.heads import HEADS
from lt_jax.models.normalisation import BatchNorm, at_least_float32
from lt_jax.models.trunks import TRUNKS


class Classifier(nn.Module):
  """A trunk and a head; its parameters are {'trunk': ..., 'head': ...}.

  Attributes:
    trunk: a module from images (B, H, W, C) to features (B, D).
    head: a module from features to logits (B, number of classes).
  """

  trunk: nn.Module
  head: nn.Module

  def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Returns 'features' (B, D) and 'logits' (B, number of classes), both float32."""
    features = at_least_float32(self.trunk(images, train=train))
    return {'features': features, 'logits': self.head(features)}


def make_classifier(
  trunk: str,
  head: str,
  num_classes: int,
  *,
  dtype: Any = None,
  batch_norm: Mapping[str, Any] | None = None,
  trunk_options: Mapping[str, Any] | None = None,
  head_options: Mapping[str, Any] | None = None,
) -> Classifier:
  """Returns a classifier by the names of its parts.

  Args:
    trunk: a key of `TRUNKS`.
    head: a key of `HEADS`.
    num_classes: number of known classes.
    dtype: of the trunk's convolutions, such as 'bfloat16'; None for float32.
      Parameters, statistics, features and logits are float32 in any case.
    batch_norm: attributes of `BatchNorm`, such as {'groups': 8}.
    trunk_options: attributes of the trunk, such as {'width': 4}.
    head_options: attributes of the head, such as {'scale': 30.0}.

  Raises:
    UserError: an unknown name or option.
  """
  norm = functools.partial(BatchNorm, **(batch_norm or {}))
  return Classifier(
    trunk=construct(
      TRUNKS, 'trunk', trunk, options=trunk_options or {}, dtype=dtype, norm=norm
    ),
    head=construct(HEADS, 'head', head, num_classes, options=head_options or {}),
  )
