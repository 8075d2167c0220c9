"""Losses of additional tasks per image: means over the labels that exist.

A kind of task is a function (outputs (B, K), labels) -> (losses, valid), both (B,) or
(B, K). Missing labels are masked before any logarithm, so they give neither a loss nor
a gradient, whatever value they have.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


def softmax(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy over K classes.

  Args:
    logits: (B, K).
    labels: (B,) int, -1 if missing.

  Examples:
    >>> losses, valid = softmax(jnp.zeros((2, 2)), jnp.array([0, -1]))
    >>> round(losses.tolist()[0], 3), valid.tolist()
    (0.693, [True, False])
  """
  valid = labels >= 0
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, jnp.maximum(labels, 0)
  )
  return losses, valid


def sigmoid(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Binary cross-entropy of each of K labels.

  Args:
    logits: (B, K).
    labels: (B, K) int, 1 or 0, -1 if unknown.

  Examples:
    >>> losses, valid = sigmoid(jnp.zeros((1, 2)), jnp.array([[1, -1]]))
    >>> round(losses.tolist()[0][0], 3), valid.tolist()
    (0.693, [[True, False]])
  """
  labels = labels.reshape(logits.shape)
  valid = labels >= 0
  target = jnp.where(valid, labels, 0).astype(logits.dtype)
  return optax.sigmoid_binary_cross_entropy(logits, target), valid


def regression(outputs: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Squared error of each of K numbers.

  Args:
    outputs: (B, K).
    labels: (B, K) or (B,) float, NaN if unknown.

  Examples:
    >>> losses, valid = regression(jnp.zeros((2, 1)), jnp.array([3.0, jnp.nan]))
    >>> losses.tolist(), valid.tolist()
    ([[9.0], [0.0]], [[True], [False]])
  """
  labels = labels.reshape(outputs.shape).astype(outputs.dtype)
  valid = jnp.isfinite(labels)
  return (outputs - jnp.where(valid, labels, 0)) ** 2, valid


class Kind(NamedTuple):
  """A kind of task.

  Attributes:
    losses: the function, see the module.
    half: whether its loss is halved under uncertainty weighting, as for a Gaussian.
  """

  losses: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
  half: bool = False


KINDS: dict[str, Kind] = {
  'softmax': Kind(softmax),
  'sigmoid': Kind(sigmoid),
  'regression': Kind(regression, half=True),
}


def mean_of_valid(losses: jax.Array, valid: jax.Array) -> jax.Array:
  """Returns the mean over valid entries, () float32; 0 if there are none.

  Examples:
    >>> mean_of_valid(jnp.array([2.0, 4.0, 9.0]), jnp.array([True, True, False])).item()
    3.0
  """
  total = jnp.where(valid, losses, 0).astype(jnp.float32).sum()
  return total / jnp.maximum(valid.sum(), 1)
