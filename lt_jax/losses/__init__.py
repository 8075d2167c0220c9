"""Losses by name, and how weighted per-example losses are added up.

A loss is a function (logits (B, C), labels (B,), *, options) -> (B,). One that needs
the training counts has a keyword `counts`. To add one, write it and its entry in the
`LOSSES` of its file.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.class_weights import check_counts
from lt_jax.errors import check_options, lookup
from lt_jax.losses import classification, margin

LOSSES = classification.LOSSES | margin.LOSSES


def make_loss(
  name: str, counts: np.ndarray, **options: Any
) -> Callable[[Mapping[str, jax.Array], Mapping[str, jax.Array]], jax.Array]:
  """Returns a per-example loss of a network's outputs and a batch.

  Args:
    name: a key of `LOSSES`.
    counts: (C,) training images of each class, for those losses that ask for them.
    **options: of the loss, such as `gamma`.

  Returns:
    (outputs, batch) -> (B,), of outputs['logits'] and batch['label'].

  Raises:
    UserError: an unknown name or option, or an empty class where the loss uses counts.
  """
  per_example = lookup(LOSSES, 'loss', name)
  what = f'loss {name!r}'
  check_options(what, per_example, options, 'logits', 'labels', 'counts')
  if 'counts' in inspect.signature(per_example).parameters:
    options['counts'] = check_counts(counts, what)

  def loss(outputs, batch):
    return per_example(outputs['logits'], batch['label'], **options)

  return loss


def mean(weights: jax.Array) -> jax.Array:
  """Coefficients w / B: the weighted losses over the size of the batch.

  The batch of a long tail has a mean class weight far below one (about 0.17 on
  CIFAR-10-LT with imbalance 100 and beta 0.9999), so steps are that much smaller than
  those of `weight_normalised`.

  Args:
    weights: (B,) weights of the examples.

  Returns:
    (B,) coefficients: the objective is sum_i coefficients_i loss_i.

  The reduction of Cui et al., arXiv 1901.05555 (TensorFlow).
  """
  return weights / weights.size


def weight_normalised(weights: jax.Array) -> jax.Array:
  """Coefficients w / sum(w): a weighted mean. All zero where all weights are zero.

  Args:
    weights: (B,) weights of the examples.

  Returns:
    (B,) coefficients: the objective is sum_i coefficients_i loss_i.

  The reduction of PyTorch's weighted cross-entropy, hence of LDAM-DRW's code.
  """
  total = weights.sum()
  return weights / jnp.where(total == 0, 1, total)


REDUCTIONS = {'mean': mean, 'weight_normalised': weight_normalised}
