"""Heads: from features to logits, in float32 whatever type the trunk computes in.

The head owns the scale of its logits, so that softmax(logits) is the model's
probability in every loss and every metric.
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
"""The smallest squared norm of a vector that counts as having a direction."""


def norm(v: jax.Array, axis: int) -> jax.Array:
  """Returns |v|, at least 1e-6; its gradient is 0, not NaN, where v is 0."""
  return jnp.sqrt(jnp.maximum((v * v).sum(axis, keepdims=True), TINY))


def unit(v: jax.Array, axis: int = -1) -> jax.Array:
  """Returns v / |v| along an axis; 0 where v is 0, with a finite gradient."""
  return v / norm(v, axis)


def log_prior_bias(num_classes: int) -> float:
  """Returns -log(C - 1), for which a sigmoid gives every class the probability 1 / C.

  Source: Cui et al., arXiv 1901.05555.
  """
  return -math.log(num_classes - 1)


def unit_columns(key: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
  """Draws columns from U(-1, 1), each projected to unit length."""
  return unit(jax.random.uniform(key, shape, dtype, -1, 1), axis=0)


def uniform_by_fan_in(key: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
  """Draws from U(-1 / sqrt(D), 1 / sqrt(D)) for the shape (D, C)."""
  bound = 1 / math.sqrt(shape[0])
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def dense(
  features: int,
  *,
  inputs: int,
  kernel_init: Callable | None = None,
  bias_init: Callable | None = None,
  **attributes,
) -> nn.Dense:
  """Returns the layer x W + b; W and b are from U(+-1 / sqrt(inputs)) by default.

  Args:
    features: number of outputs.
    inputs: size of x, which the initialisation needs.
    kernel_init: initialiser of W; None for PyTorch's.
    bias_init: initialiser of b; None likewise.
    **attributes: attributes of `nn.Dense`, such as its name.
  """
  bound = 1 / math.sqrt(inputs)

  def uniform(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return nn.Dense(
    features,
    kernel_init=kernel_init or uniform,
    bias_init=bias_init or uniform,
    precision=lax.Precision.HIGHEST,
    **attributes,
  )


class Linear(nn.Module):
  """logits = v W + b.

  Attributes:
    num_classes: C.
    kernel_init: (key, shape, dtype) -> W, one of `INITIALISERS`.
    first_bias: initial value of every entry of b.
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
    return product(features, kernel) + bias[None]


class ScaledLinear(nn.Module):
  r"""A linear classifier with one learned scale per class.

  .. math:: z_c = s_c (v \cdot w_c + b_c), \qquad s_c = 1 \text{ initially}

  Attributes:
    num_classes: C.

  Source: learnable weight scaling of Kang et al., arXiv 1910.09217, section 4.2, which
  trains s alone; the authors' code scales the bias too.
  """

  num_classes: int

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps (B, D) to (B, C)."""
    kernel = _kernel(self, features, INITIALISERS['kaiming'])
    shape = (self.num_classes,)
    bias = self.param('bias', nn.initializers.zeros, shape, jnp.float32)
    scale = self.param('scale', nn.initializers.ones, shape, jnp.float32)
    return scale[None] * (product(features, kernel) + bias[None])


class NearestClassMean(nn.Module):
  r"""Negative squared distances to the class means.

  .. math:: z_c = -|\tilde v - m_c|^2, \qquad \tilde v = \mathrm{unit}(v - \bar v)

  The surgery 'nearest_class_mean' measures all means on the training images.

  Attributes:
    num_classes: C.

  Source: Kang et al., arXiv 1910.09217, section 4.2; centring and normalising ("cl2n")
  as in the authors' code.
  """

  num_classes: int

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps (B, D) to (B, C)."""
    zeros, width = nn.initializers.zeros, features.shape[-1]
    centre = self.param('centre', zeros, (width,), jnp.float32)
    means = self.param('means', zeros, (self.num_classes, width), jnp.float32)
    v = centred_unit(features, centre)
    squares = (v * v).sum(-1, keepdims=True) + (means * means).sum(-1)[None]
    return 2 * product(v, means.T) - squares


def centred_unit(features: jax.Array, centre: jax.Array) -> jax.Array:
  """Returns (v - centre) / |v - centre| of features (B, D), in at least float32."""
  return unit(at_least_float32(features) - centre[None])


class Cosine(nn.Module):
  r"""Scaled cosines of the angles between features and class weights.

  .. math:: z_c = s \frac{v}{|v|} \cdot \frac{w_c}{|w_c|}

  Attributes:
    num_classes: C.
    scale: s. So a margin m on the cosine is s m on the logit.

  Source: Cao et al., arXiv 1906.07413, and its code, including the initialisation.
  """

  num_classes: int
  scale: float

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps (B, D) to (B, C)."""
    kernel = _kernel(self, features, unit_columns)
    return self.scale * product(unit(at_least_float32(features)), unit(kernel, axis=0))


class CosineBias(nn.Module):
  r"""Cosines of the angles between features and class weights, with a learned scale.

  .. math:: z_c = s \left( \frac{v}{|v|} \cdot \frac{w_c}{|w_c|} + b \right)

  Initially s = 10 and b = 0. A softmax does not depend on b; a sigmoid does.

  Attributes:
    num_classes: C.

  Source: Gidaris and Komodakis, arXiv 1804.09458, section 3.2; the bias is from the
  code.
  """

  num_classes: int

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps (B, D) to (B, C)."""
    kernel = _kernel(self, features, INITIALISERS['kaiming'])
    scale = self.param('scale', nn.initializers.constant(10.0), (), jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, (), jnp.float32)
    cosines = product(unit(at_least_float32(features)), unit(kernel, axis=0))
    return scale * (cosines + bias)


class CosineSquash(nn.Module):
  r"""Cosines scaled by a squashed length of the feature.

  .. math::
    z_c = s \frac{|v|}{1 + |v|} \frac{v}{|v|} \cdot \frac{w_c}{|w_c|}

  A short feature, which belongs clearly to no class, thus gives flat logits. No logit
  exceeds s in magnitude.

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
    return self.scale * product(v / (1 + norm(v, -1)), unit(kernel, axis=0))


class MetaEmbedding(nn.Module):
  r"""Reads a memory of class centroids M (C, D) for every feature, then classifies.

  .. math::
    o = \mathrm{softmax}(v W_h + b_h), \quad e = \tanh(v W_e + b_e), \quad
    \gamma = \min_c |v - m_c|, \quad
    \tilde v = \frac{r}{\gamma} (v + e \odot o M)

  and the logits are those of `CosineSquash` for the meta-embedding. Rare classes borrow
  from frequent ones through o M. A feature far from every centroid gets a short
  embedding and thus flat logits. No gradient reaches the memory here. Exactly on a
  centroid, gamma is 1e-6 without a gradient.

  The nearest centroid is found from |m|^2 - 2 v m, a matrix product, and only the
  distance to that one is computed explicitly, so no array of (B, C, D) is ever made.

  Attributes:
    num_classes: C.
    scale: factor of the logits.
    reach: r.

  Source: Liu et al., arXiv 1904.05160, equations 2 to 5; r and the squashing of lengths
  are from the authors' code (the paper has r = 1).
  """

  num_classes: int
  scale: float
  reach: float

  @nn.compact
  def __call__(
    self, features: jax.Array, *, centroids: jax.Array | None = None
  ) -> jax.Array:
    """Maps (B, D), with centroids (C, D), to (B, C); centroids default to zero.

    Stores in the intermediates: 'hallucination' o (B, C), 'read' o M (B, D),
    'selection' e (B, D), 'reachability' r / gamma (B, 1) and 'embedding' (B, D).
    """
    v = at_least_float32(features)
    if centroids is None:
      centroids = jnp.zeros((self.num_classes, v.shape[-1]), v.dtype)
    memory = lax.stop_gradient(centroids)
    hallucination = jax.nn.softmax(Linear(self.num_classes, name='hallucinator')(v))
    read = product(hallucination, memory)
    selection = jnp.tanh(dense(v.shape[-1], inputs=v.shape[-1], name='selector')(v))
    squares = (memory * memory).sum(-1)[None]
    nearest = jnp.argmin(squares - 2 * product(v, memory.T), axis=-1)
    reachability = self.reach / norm(v - memory[nearest], axis=-1)
    embedding = reachability * (v + selection * read)
    self.sow('intermediates', 'hallucination', hallucination)
    self.sow('intermediates', 'read', read)
    self.sow('intermediates', 'selection', selection)
    self.sow('intermediates', 'reachability', reachability)
    self.sow('intermediates', 'embedding', embedding)
    return CosineSquash(self.num_classes, self.scale, name='classifier')(embedding)


def _kernel(head: nn.Module, features: jax.Array, init: Callable) -> jax.Array:
  """Returns the parameter 'kernel' (D, C) of a head."""
  shape = (features.shape[-1], head.num_classes)
  return head.param('kernel', init, shape, jnp.float32)


def product(features: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns features (B, D) times kernel (D, C), in float32 throughout."""
  return jnp.dot(at_least_float32(features), kernel, precision=lax.Precision.HIGHEST)


def linear(
  num_classes: int, *, init: str = 'kaiming', prior_bias: bool = False
) -> Linear:
  """Returns a `Linear` head.

  Args:
    num_classes: C.
    init: a key of `INITIALISERS`.
    prior_bias: initialise the bias to `log_prior_bias`, for sigmoid losses, instead of
      0. (PyTorch code, such as Cao et al.'s, draws it from U(-1 / sqrt(D), 1 /
      sqrt(D)).)
  """
  kernel_init = lookup(INITIALISERS, 'initialisation', init)
  first_bias = log_prior_bias(num_classes) if prior_bias else 0.0
  return Linear(num_classes, kernel_init, first_bias)


def scaled_linear(num_classes: int) -> ScaledLinear:
  """Returns a `ScaledLinear` head."""
  return ScaledLinear(num_classes)


def nearest_class_mean(num_classes: int) -> NearestClassMean:
  """Returns a `NearestClassMean` head."""
  return NearestClassMean(num_classes)


def cosine(num_classes: int, *, scale: float = 30.0) -> Cosine:
  """Returns a `Cosine` head; its attributes are the arguments."""
  return Cosine(num_classes, scale)


def cosine_bias(num_classes: int) -> CosineBias:
  """Returns a `CosineBias` head."""
  return CosineBias(num_classes)


def cosine_squash(num_classes: int, *, scale: float = 16.0) -> CosineSquash:
  """Returns a `CosineSquash` head; its attributes are the arguments."""
  return CosineSquash(num_classes, scale)


def meta_embedding(
  num_classes: int, *, scale: float = 16.0, reach: float = 10.0
) -> MetaEmbedding:
  """Returns a `MetaEmbedding` head; its attributes are the arguments."""
  return MetaEmbedding(num_classes, scale, reach)


HEADS: dict[str, Callable[..., nn.Module]] = {
  'linear': linear,
  'scaled_linear': scaled_linear,
  'nearest_class_mean': nearest_class_mean,
  'cosine': cosine,
  'cosine_bias': cosine_bias,
  'cosine_squash': cosine_squash,
  'meta_embedding': meta_embedding,
}
