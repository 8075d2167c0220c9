"""Heads that describe each class by attributes or word vectors.

The descriptions are stored in the network's statistics,
`stats['net']['head']['class_vectors']` (C, A). They get no gradient, are saved and
copied with the network, and new rows may be added after training for classes it has
never seen.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from lt_jax.errors import UserError, lookup
from lt_jax.models.heads import product, uniform_by_fan_in, unit
from lt_jax.models.normalisation import at_least_float32

Vectors = Callable[[], jax.Array]
"""Returns the initial descriptions, (C, A) float32."""

OUT_OF_REACH = -1e9
"""A score below any real one; finite, so that it can be multiplied by 0."""

LEAST = 1e-6
"""The smallest probability of an attribute, and of its absence."""


def _vectors(head: nn.Module) -> jax.Array:
  """Returns the descriptions (C, A) that a head reads."""
  return head.variable('batch_stats', 'class_vectors', head.vectors).value


class Compatibility(nn.Module):
  r"""Scores features against descriptions with a bilinear form.

  .. math::
    F(x, y) = \theta(x)^\top W\, \varphi(y), \qquad \varphi(y) = s_y / |s_y|

  Attributes:
    vectors: the initial descriptions.
    similarity: how they are compared: 'bilinear', as above; 'attributes', the cosine of
      :math:`W^\top x` and s; 'features', the cosine of x and :math:`W s`.
    scale: factor of the scores.

  ESZSL, DeViSE, SJE and ALE are ways to fit W; SAE compares by cosine.
  """

  vectors: Vectors
  similarity: Callable[..., jax.Array]
  scale: float

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps (B, D) to (B, C)."""
    described = unit(_vectors(self))
    shape = (features.shape[-1], described.shape[-1])
    kernel = self.param('kernel', uniform_by_fan_in, shape, jnp.float32)
    return self.scale * self.similarity(at_least_float32(features), kernel, described)


def bilinear(x: jax.Array, kernel: jax.Array, described: jax.Array) -> jax.Array:
  """Returns x W s of features (B, D), kernel (D, A) and unit descriptions (C, A)."""
  return product(product(x, kernel), described.T)


def in_attributes(x: jax.Array, kernel: jax.Array, described: jax.Array) -> jax.Array:
  """Returns cosines between the attributes predicted from features and descriptions."""
  return product(unit(product(x, kernel)), described.T)


def in_features(x: jax.Array, kernel: jax.Array, described: jax.Array) -> jax.Array:
  """Returns cosines between features and the features predicted from descriptions."""
  return product(unit(x), unit(product(described, kernel.T)).T)


SIMILARITIES = {
  'bilinear': bilinear,
  'attributes': in_attributes,
  'features': in_features,
}


class KernelCompatibility(nn.Module):
  r"""The bilinear form of `Compatibility` on a Gaussian kernel of the features.

  .. math::
    F(x, y) = k(x)^\top \alpha\, \varphi(y), \qquad
    k_i(x) = \exp(-|x - x_i|^2 / 2 \sigma^2)

  Attributes:
    vectors: the initial descriptions.
    support: number of features x_i to keep.
  """

  vectors: Vectors
  support: int

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps (B, D) to (B, C)."""
    described, zeros = unit(_vectors(self)), nn.initializers.zeros
    shape = (self.support, features.shape[-1])
    support = self.param('support', zeros, shape, jnp.float32)
    ones = nn.initializers.ones
    width = self.param('width', ones, (), jnp.float32)
    shape = (self.support, described.shape[-1])
    kernel = self.param('kernel', zeros, shape, jnp.float32)
    x = at_least_float32(features)
    squares = (x * x).sum(-1, keepdims=True) + (support * support).sum(-1)[None]
    apart = jnp.maximum(squares - 2 * product(x, support.T), 0)
    near = jnp.exp(-apart / (2 * width**2))
    return product(product(near, kernel), described.T)


class Attributes(nn.Module):
  r"""Attribute classifiers, and the class whose attributes fit their predictions.

  Attributes are binary: a class has one where its description exceeds a threshold.

  Attributes:
    vectors: the initial descriptions.
    rule: turns probabilities into scores, one of `RULES`.

  Its logits are the scores. It also returns 'attributes' (B, A), the probabilities.
  """

  vectors: Vectors
  rule: Callable[..., jax.Array]

  @nn.compact
  def __call__(self, features: jax.Array) -> dict[str, jax.Array]:
    """Maps (B, D) to logits (B, C) and attributes (B, A)."""
    described, zeros = _vectors(self), nn.initializers.zeros
    shape = (features.shape[-1], described.shape[-1])
    kernel = self.param('kernel', zeros, shape, jnp.float32)
    bias = self.param('bias', zeros, shape[1:], jnp.float32)
    probability = jax.nn.sigmoid(product(features, kernel) + bias[None])
    codes, prior, varies = _codes(self, described)
    return {
      'logits': self.rule(probability, codes, prior, varies),
      'attributes': probability,
    }


def _codes(
  head: nn.Module, described: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns binary attributes (C, A), their prior (A,), and which of them vary (A,).

  Threshold and prior are parameters, so that they do not change when a class is added.
  """
  constant = nn.initializers.constant
  threshold = head.param('threshold', nn.initializers.zeros, (), jnp.float32)
  shape = described.shape[-1:]
  prior = head.param('prior', constant(0.5), shape, jnp.float32)
  varies = (prior > 0) & (prior < 1)
  return (described > threshold).astype(jnp.float32), prior, varies


def direct(
  probability: jax.Array, codes: jax.Array, prior: jax.Array, varies: jax.Array
) -> jax.Array:
  r"""Returns the log-probability of all attributes of a class, relative to their prior.

  .. math::
    \sum_m \log p(a_m = a_m^y \mid x) - \log p(a_m = a_m^y)

  over the attributes that vary between seen classes. Probabilities stay 1e-6 away from
  0 and 1.

  Args:
    probability: (B, A), p(a_m = 1 | x).
    codes: (C, A), a^y.
    prior: (A,), p(a_m = 1).
    varies: (A,) bool.

  Source: Lampert et al., Attribute-Based Classification for Zero-Shot Visual Object
  Categorization, TPAMI 36(3), 2014, equations 2 and 3.
  """
  p, q = (jnp.clip(x, LEAST, 1 - LEAST) for x in (probability, prior))
  has = (jnp.log(p) - jnp.log(q)[None]) * varies[None]
  lacks = (jnp.log1p(-p) - jnp.log1p(-q)[None]) * varies[None]
  return product(has, codes.T) + product(lacks, 1 - codes.T)


def hamming(
  probability: jax.Array, codes: jax.Array, prior: jax.Array, varies: jax.Array
) -> jax.Array:
  """Returns minus the number of attributes that are predicted wrongly; see `direct`.

  This includes attributes that are the same for all seen classes.
  """
  del prior, varies
  has = (probability >= 0.5).astype(jnp.float32)
  return -(product(has, 1 - codes.T) + product(1 - has, codes.T))


def cosine(
  probability: jax.Array, codes: jax.Array, prior: jax.Array, varies: jax.Array
) -> jax.Array:
  """Returns cosines between probabilities and attributes; see `direct`."""
  del prior, varies
  return product(unit(probability), unit(codes).T)


RULES = {'dap': direct, 'hamming': hamming, 'cosine': cosine}


class SeenClasses(nn.Module):
  r"""A softmax over seen classes that scores the others through their descriptions.

  With the rule 'iap', an attribute's probability is that of the classes that have it,

  .. math:: p(a_m = 1 \mid x) = \sum_k p(y_k \mid x)\, a_m^{y_k}

  and scores are those of `direct`. With 'conse', the most likely classes are averaged,

  .. math:: e(x) = \frac{1}{Z} \sum_{t=1}^{T} p(y_t \mid x)\, \varphi(y_t)

  and scores are cosines between e and the descriptions.

  Attributes:
    vectors: the initial descriptions.
    rule: 'iap' or 'conse'.
    top: T of 'conse'.

  Sources: Lampert et al., TPAMI 36(3), 2014, equation 4; Norouzi et al., Zero-Shot
  Learning by Convex Combination of Semantic Embeddings, arXiv 1312.5650, equation 3.
  """

  vectors: Vectors
  rule: str
  top: int

  @nn.compact
  def __call__(self, features: jax.Array) -> dict[str, jax.Array]:
    """Maps (B, D) to logits (B, C), and with 'iap' also attributes (B, A)."""
    described, zeros = _vectors(self), nn.initializers.zeros
    learnt = self.vectors().shape[0]
    shape = (features.shape[-1], learnt)
    kernel = self.param('kernel', zeros, shape, jnp.float32)
    bias = self.param('bias', zeros, (learnt,), jnp.float32)
    logits = product(features, kernel) + bias[None]
    codes, prior, varies = _codes(self, described)
    if self.rule == 'iap':
      probability = product(jax.nn.softmax(logits), codes[:learnt])
      return {
        'logits': direct(probability, codes, prior, varies),
        'attributes': probability,
      }
    likely, classes = lax.top_k(jax.nn.softmax(logits), min(self.top, learnt))
    directions = unit(described)
    embedded = (likely[..., None] * directions[classes]).sum(1)
    return {'logits': product(unit(embedded), directions.T)}


class TwoTower(nn.Module):
  r"""Two networks into a common space, one for features and one for descriptions.

  .. math::
    z = f(x) / |f(x)|, \quad c_y = g(s_y) / |g(s_y)|, \qquad
    F(x, y) = z \cdot c_y / \tau

  or, with `distance`, :math:`F(x, y) = -|f(x) - g(s_y)|^2` without normalising. f is
  linear; g has a hidden layer. One side can be fixed: with `fixed` 'classes', g(s) = s
  / |s| and f maps into that space; with 'images', f(x) = x and g maps descriptions to
  features.

  Attributes:
    vectors: the initial descriptions.
    width: dimension of the space, if neither side is fixed.
    hidden: units of g's hidden layer.
    temperature: tau.
    fixed: 'none', 'classes' or 'images'.
    distance: compare by distance rather than by cosine.

  It returns 'embedding' (B, E) besides the logits.

  Sources: Frome et al., DeViSE, NIPS 2013 ('classes'); Zhang et al., Learning a Deep
  Embedding Model for Zero-Shot Learning, arXiv 1611.05088 ('images'); both towers with
  a contrastive loss, as in Radford et al., arXiv 2103.00020.
  """

  vectors: Vectors
  width: int
  hidden: int
  temperature: float
  fixed: str
  distance: bool

  @nn.compact
  def __call__(self, features: jax.Array) -> dict[str, jax.Array]:
    """Maps (B, D) to logits (B, C) and the embedding (B, E)."""
    x, described = at_least_float32(features), unit(_vectors(self))
    sizes = {'classes': described.shape[-1], 'images': x.shape[-1]}
    size = sizes.get(self.fixed, self.width)
    z, c = x, described
    if self.fixed != 'images':
      z = _dense(size, 'images')(x)
    if self.fixed != 'classes':
      c = _dense(size, 'classes')(nn.relu(_dense(self.hidden, 'hidden')(described)))
    if self.distance:
      squares = (z * z).sum(-1, keepdims=True) + (c * c).sum(-1)[None]
      return {'logits': 2 * product(z, c.T) - squares, 'embedding': z}
    z = unit(z)
    return {'logits': product(z, unit(c).T) / self.temperature, 'embedding': z}


def _dense(size: int, name: str) -> nn.Dense:
  return nn.Dense(size, precision=lax.Precision.HIGHEST, name=name)


def _first(head: str, class_vectors: np.ndarray | None) -> Vectors:
  """Returns the function that makes the initial descriptions.

  Raises:
    UserError: there are no descriptions.
  """
  if class_vectors is None:
    raise UserError(
      f'head {head!r} reads descriptions of the classes: set data.class_vectors'
    )
  return lambda: jnp.asarray(class_vectors, jnp.float32)


def compatibility(
  num_classes: int,
  *,
  class_vectors: np.ndarray | None,
  similarity: str = 'bilinear',
  scale: float = 1.0,
) -> Compatibility:
  """Returns a `Compatibility` head; `similarity` is a key of `SIMILARITIES`."""
  del num_classes
  compared = lookup(SIMILARITIES, 'similarity', similarity)
  return Compatibility(_first('compatibility', class_vectors), compared, scale)


def kernel_compatibility(
  num_classes: int, *, class_vectors: np.ndarray | None, examples: int
) -> KernelCompatibility:
  """Returns a `KernelCompatibility` head with one x_i for each training example."""
  del num_classes
  return KernelCompatibility(_first('kernel_compatibility', class_vectors), examples)


def attributes(
  num_classes: int, *, class_vectors: np.ndarray | None, rule: str = 'dap'
) -> Attributes:
  """Returns an `Attributes` head; `rule` is a key of `RULES`."""
  del num_classes
  by = lookup(RULES, 'rule', rule)
  return Attributes(_first('attributes', class_vectors), by)


def seen_classes(
  num_classes: int,
  *,
  class_vectors: np.ndarray | None,
  rule: str = 'conse',
  top: int = 10,
) -> SeenClasses:
  """Returns a `SeenClasses` head; its attributes are the arguments."""
  del num_classes
  lookup({'iap': 0, 'conse': 0}, 'rule', rule)
  return SeenClasses(_first('seen_classes', class_vectors), rule, top)


def two_tower(
  num_classes: int,
  *,
  class_vectors: np.ndarray | None,
  width: int = 64,
  hidden: int = 128,
  temperature: float = 0.1,
  fixed: str = 'none',
  distance: bool = False,
) -> TwoTower:
  """Returns a `TwoTower` head; its attributes are the arguments."""
  del num_classes
  lookup({'none': 0, 'classes': 0, 'images': 0}, 'side to fix', fixed)
  vectors = _first('two_tower', class_vectors)
  return TwoTower(vectors, width, hidden, temperature, fixed, distance)


HEADS: dict[str, Callable[..., nn.Module]] = {
  'compatibility': compatibility,
  'kernel_compatibility': kernel_compatibility,
  'attributes': attributes,
  'seen_classes': seen_classes,
  'two_tower': two_tower,
}
