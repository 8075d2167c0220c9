"""Heads: from features to logits, in float32 whatever the trunk computes in.

The head owns the scale of its logits, so that softmax(logits) is what the model
believes, in every loss and every metric.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lt_jax.errors import lookup
from lt_jax.models.convolution import INITIALISERS
from lt_jax.models.normalisation import at_least_float32

TINY = 1e-12
"""Least squared norm of a vector that has a direction."""


def _norm(v: jax.Array, axis: int) -> jax.Array:
  """Returns |v|, at least 1e-6, whose gradient is 0 and not NaN where v is 0."""
  return jnp.sqrt(jnp.maximum((v * v).sum(axis, keepdims=True), TINY))


def unit(v: jax.Array, axis: int = -1) -> jax.Array:
  """Returns v / |v| along an axis; 0 where v is 0, with a finite gradient."""
  return v / _norm(v, axis)


def log_prior_bias(num_classes: int) -> float:
  """Returns -log(C - 1), at which a sigmoid gives every class the probability 1 / C.

  Source: Cui et al., arXiv 1901.05555.
  """
  return -math.log(num_classes - 1)


def unit_columns(key: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
  """Draws columns from U(-1, 1), each projected to unit length."""
  return unit(jax.random.uniform(key, shape, dtype, -1, 1), axis=0)


def uniform_by_fan_in(key: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
  """Draws from U(-1 / sqrt(D), 1 / sqrt(D)), shape being (D, C)."""
  bound = 1 / math.sqrt(shape[0])
  return jax.random.uniform(key, shape, dtype, -bound, bound)


class Linear(nn.Module):
  """logits = v W + b.

  Attributes:
    num_classes: C.
    kernel_init: (key, shape, dtype) -> W, one of `INITIALISERS`.
    first_bias: every entry of b in the beginning.
  """

  num_classes: int
  kernel_init: Callable[..., jax.Array] = INITIALISERS['kaiming']
  first_bias: float = 0.0

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps (B, D) to (B, C)."""
    kernel = _kernel(self, features, self.kernel_init)
    constant = nn.initializers.constant(self.first_bias)
    bias = self.param('bias', constant, (self.num_classes,), jnp.float32)
    return _product(features, kernel) + bias[None]


class Cosine(nn.Module):
  r"""Scaled cosines of the angles between features and class weights.

  .. math:: z_c = s \frac{v}{|v|} \cdot \frac{w_c}{|w_c|}

  Attributes:
    num_classes: C.
    scale: s. A margin m on the cosine is thus s m on the logit.

  Source: Cao et al., arXiv 1906.07413, and its code, which also draws
  the first weights so.
  """

  num_classes: int
  scale: float

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps (B, D) to (B, C)."""
    kernel = _kernel(self, features, unit_columns)
    return self.scale * _product(unit(at_least_float32(features)), unit(kernel, axis=0))


class CosineSquash(nn.Module):
  r"""Cosines scaled by a squashed length of the feature.

  .. math::
    z_c = s \frac{|v|}{1 + |v|} \frac{v}{|v|} \cdot \frac{w_c}{|w_c|}

  so that a short feature, which no class is sure of, gives flat logits; none exceeds
  s in size.

  Attributes:
    num_classes: C.
    scale: s.

  Source: the code of Liu et al., arXiv 1904.05160.
  """

  num_classes: int
  scale: float

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps (B, D) to (B, C)."""
    kernel = _kernel(self, features, uniform_by_fan_in)
    v = at_least_float32(features)
    return self.scale * _product(v / (1 + _norm(v, -1)), unit(kernel, axis=0))


def _kernel(head: nn.Module, features: jax.Array, init: Callable) -> jax.Array:
  """Returns the parameter 'kernel' (D, C) of a head."""
  shape = (features.shape[-1], head.num_classes)
  return head.param('kernel', init, shape, jnp.float32)


def _product(features: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns features (B, D) times kernel (D, C) without bfloat16 passes."""
  return jnp.dot(at_least_float32(features), kernel, precision=lax.Precision.HIGHEST)


def linear(
  num_classes: int, *, init: str = 'kaiming', prior_bias: bool = False
) -> Linear:
  """Returns a `Linear` head.

  Args:
    num_classes: C.
    init: a key of `INITIALISERS`.
    prior_bias: the bias begins at `log_prior_bias`, for sigmoid losses; else at 0.
      (PyTorch codes, such as Cao et al.'s, draw it from U(-1 / sqrt(D), 1 / sqrt(D)).)
  """
  kernel_init = lookup(INITIALISERS, 'initialisation', init)
  first_bias = log_prior_bias(num_classes) if prior_bias else 0.0
  return Linear(num_classes, kernel_init, first_bias)


def cosine(num_classes: int, *, scale: float = 30.0) -> Cosine:
  """Returns a `Cosine` head; its attributes are the arguments."""
  return Cosine(num_classes, scale)


def cosine_squash(num_classes: int, *, scale: float = 16.0) -> CosineSquash:
  """Returns a `CosineSquash` head; its attributes are the arguments."""
  return CosineSquash(num_classes, scale)


HEADS: dict[str, Callable[..., nn.Module]] = {
  'linear': linear,
  'cosine': cosine,
  'cosine_squash': cosine_squash,
}
