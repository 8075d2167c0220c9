"""Networks: a trunk from images to a map of features, and a head from it to logits.

To add a trunk or head, write a Linen module and add it to `TRUNKS` or `HEADS`. Networks
that train beside the main one, such as discriminators, are in `NETWORKS`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lt_jax.errors import UserError, construct
from lt_jax.models import deeplab, described, discriminator, fcn, pixel_memory
from lt_jax.models.attention import ModulatedAttention
from lt_jax.models.decoder import decoder
from lt_jax.models.fusion import fusion
from lt_jax.models.generator import generator
from lt_jax.models.heads import HEADS as PLAIN_HEADS
from lt_jax.models.heads import dense, linear
from lt_jax.models.normalisation import BatchNorm, at_least_float32
from lt_jax.models.segmentation import PIXEL_HEADS, Segmenter
from lt_jax.models.trunks import TRUNKS
from lt_jax.models.weight_net import WeightNet

NETWORKS = {
  'mlp': discriminator.mlp,
  'image_discriminator': discriminator.image_discriminator,
  'patch_discriminator': discriminator.patch_discriminator,
  'decoder': decoder,
  'fusion': fusion,
  'generator': generator,
  'linear': linear,
  'weight_net': WeightNet,
}
"""Networks of other players: name -> function from options to a module."""

HEADS = PLAIN_HEADS | described.HEADS
"""Heads that read the features of an image."""

OF_PIXELS = PIXEL_HEADS | deeplab.HEADS | fcn.HEADS | pixel_memory.HEADS
"""Heads of networks that give logits for every pixel; they read maps."""

DTYPES = {name: jnp.dtype(name) for name in ('float32', 'bfloat16', 'float16')}
"""Types in which a network can compute."""


class Classifier(nn.Module):
  """A trunk and a head, with optional layers in between.

  Its parameters are {'trunk': ..., 'head': ...} and optionally 'attention' and
  'projection'.

  Attributes:
    trunk: a module from images (B, H, W, C) to a map (B, H', W', C'), or to a dict of
      named layers, each (B, D), one of which is called 'features'.
    head: a module from features (B, D) to logits (B, number of classes), or to a dict
      of these and other outputs.
    attention: a module from maps to maps; None for none.
    projection: size D of a linear layer with ReLU after the mean over the pixels, or on
      the trunk's 'features'; -1 keeps the size, 0 leaves the layer out.
  """

  trunk: nn.Module
  head: nn.Module
  attention: nn.Module | None = None
  projection: int = 0

  @nn.compact
  def __call__(
    self, images: jax.Array, *, train: bool, **memory: jax.Array
  ) -> dict[str, jax.Array]:
    """Maps images to outputs.

    Args:
      images: (B, H, W, C).
      train: normalise by batch statistics.
      **memory: what the head reads besides the features.

    Returns:
      'features' (B, D), 'logits' (B, number of classes) and the trunk's other named
      layers, all at least float32.

    Raises:
      UserError: attention over named layers, which are not a map.
    """
    x = self.trunk(images, train=train)
    layers = {}
    if isinstance(x, dict):
      if self.attention is not None:
        raise UserError('model.attention needs a trunk that ends in a map of features')
      layers = {name: at_least_float32(layer) for name, layer in x.items()}
      features = layers['features']
    else:
      if self.attention is not None:
        x = self.attention(x)
      features = at_least_float32(x).mean((1, 2))
    if self.projection:
      inputs = features.shape[-1]
      size = inputs if self.projection < 0 else self.projection
      features = nn.relu(dense(size, inputs=inputs, name='projection')(features))
    return layers | self.apply_head(features, train=train, **memory)

  def apply_head(
    self, features: jax.Array, *, train: bool, **memory: jax.Array
  ) -> dict[str, jax.Array]:
    """Maps features (B, D) to outputs, as the whole network does after its trunk."""
    del train  # no head uses batch statistics
    found = self.head(features, **memory)
    named = found if isinstance(found, dict) else {'logits': found}
    return {'features': features, **named}


def make_classifier(
  trunk: str,
  head: str,
  num_classes: int,
  *,
  attention: bool = False,
  projection: int = 0,
  dtype: Any = None,
  batch_norm: Mapping[str, Any] | None = None,
  trunk_options: Mapping[str, Any] | None = None,
  head_options: Mapping[str, Any] | None = None,
  class_vectors: np.ndarray | None = None,
  examples: int = 0,
  per_pixel: bool = False,
) -> Classifier | Segmenter:
  """Returns a network, given the names of its parts.

  Args:
    trunk: a key of `TRUNKS`.
    head: a key of `HEADS`, or of `OF_PIXELS` if `per_pixel`.
    num_classes: number of known classes.
    attention: apply `ModulatedAttention` to the trunk's map.
    projection: size of the features after a linear layer and ReLU; -1 keeps the trunk's
      size, 0 leaves the layer out.
    dtype: type in which trunk and attention compute, such as 'bfloat16'; None for
      float32. Parameters, statistics, features and logits are always float32.
    batch_norm: attributes of `BatchNorm`, such as {'groups': 8}.
    trunk_options: attributes of the trunk, such as {'width': 4}.
    head_options: attributes of the head, such as {'scale': 30.0}.
    class_vectors: (C, A) descriptions of the classes, for heads that read them.
    examples: number of training images, for heads with parameters for each of them.
    per_pixel: whether it gives logits for every pixel instead of whole images.

  Raises:
    UserError: an unknown name or option, or parts that a network for pixels cannot
      have.
  """
  norm = functools.partial(BatchNorm, **(batch_norm or {}))
  heads = HEADS | (OF_PIXELS if per_pixel else {})

  def make_head(name: str, options: Mapping[str, Any]) -> nn.Module:
    return construct(
      heads,
      'head',
      name,
      num_classes,
      options=options,
      class_vectors=class_vectors,
      examples=examples,
      make_head=make_head,
    )

  parts = {
    'trunk': construct(
      TRUNKS, 'trunk', trunk, options=trunk_options or {}, dtype=dtype, norm=norm
    ),
    'head': make_head(head, head_options or {}),
  }
  if per_pixel:
    if attention or projection:
      raise UserError(
        'model.attention and model.projection need labels of whole images: set them '
        'to False and 0'
      )
    return Segmenter(**parts)
  return Classifier(
    **parts,
    attention=ModulatedAttention(dtype) if attention else None,
    projection=projection,
  )
