"""Batch penalties: terms that exist only over a whole batch.

They use distances between the features of a batch, distances to class centroids, and
LADE's bound on the logits. A penalty is added to the objective after the reduction and
is never weighted by class. Memory is a few arrays of (B, B), (B, C), (B, D) and (C, D).
Everything is finite, with finite gradients, even where vectors coincide or are zero.
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lt_jax.losses.classification import one_hot_targets


def distances(
  features: jax.Array, centroids: jax.Array, squared: bool = False
) -> jax.Array:
  r"""Euclidean distances from every feature to every centroid.

  .. math::
    d_{bc}^2 = \max(0, |v_b|^2 + |c_c|^2 - 2 v_b^\top c_c)

  The gradient of d is 0 where d is 0. In float32 the subtraction leaves an error of
  about 1e-7 |v|^2 in d^2, so don't trust distances below about 1e-3 |v|.

  Args:
    features: (B, D).
    centroids: (C, D); pass the features again for distances within a batch.
    squared: return d^2.

  Returns:
    (B, C), at least float32, even for narrower inputs.

  Examples:
    >>> distances(jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 0.0], [3.0, 4.0]])).tolist()
    [[5.0, 0.0]]
  """
  chex.assert_rank([features, centroids], 2)
  chex.assert_equal_shape_suffix([features, centroids], 1)
  features, centroids = _wide(features), _wide(centroids)
  squares = _squares(features)[:, None] + _squares(centroids)[None]
  squares = jnp.maximum(squares - 2 * _product(features, centroids.T), 0)
  if squared:
    return squares
  apart = squares > 0
  # The inner `where` keeps the square root's infinite slope out of the gradient.
  return jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1)), 0)


def lifted_structure(
  features: jax.Array, labels: jax.Array, *, margin: float = 1.0
) -> jax.Array:
  r"""Lifted structured loss: every positive pair against all negatives of both ends.

  .. math::
    P = \frac{1}{2 |\mathcal P|} \sum_{(i, j) \in \mathcal P} \max(0, J_{ij})^2, \qquad
    J_{ij} = D_{ij} + \log \Big( \sum_{k: y_k \ne y_i} e^{m - D_{ik}}
    + \sum_{l: y_l \ne y_j} e^{m - D_{jl}} \Big)

  over pairs i != j of one class, where D are the distances of the features projected to
  unit length. The sum over negatives is the paper's smooth bound on the hardest one.
  The penalty is 0 for a batch without positive pairs, and for one without negatives,
  where J is -inf.

  Args:
    features: (B, D), projected to unit length here.
    labels: (B,) int.
    margin: m, on distances of unit vectors, which are at most 2.

  Returns:
    () penalty.

  Examples:
    >>> alike = jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    >>> round(lifted_structure(alike, jnp.array([0, 1, 1])).item(), 3)  # J = 1 + log 2
    1.433

  Song et al., "Deep Metric Learning via Lifted Structured Feature Embedding", CVPR
  2016, arXiv 1511.06452, equation 4; the unit length is ours.
  """
  same = _same_class(features, labels)
  vectors = _unit(features)
  distance = distances(vectors, vectors)
  positive = same & ~jnp.eye(len(labels), dtype=bool)
  opposed = ~same.all()
  # A class has negatives exactly if the batch has two classes. Without negatives the
  # sum runs over arbitrary finite values and is masked below.
  push = jax.nn.logsumexp(margin - distance, axis=1, where=~same | ~opposed)
  hinges = jax.nn.relu(distance + jnp.logaddexp(push[:, None], push[None]))
  pairs = jnp.where(positive & opposed, hinges, 0) ** 2
  # Both the sum and the count include each pair in both orders.
  return pairs.sum() / (2 * jnp.maximum(positive.sum(), 1))


def range_loss(
  features: jax.Array,
  labels: jax.Array,
  *,
  alpha: float = 0.5,
  beta: float = 0.5,
  margin: float = 1.0,
) -> jax.Array:
  r"""Range loss: the widest pairs of each class, and the two closest class centres.

  .. math::
    P = \alpha \sum_c H_c + \beta \max(0, m - \min_{p \ne q} |\mu_p - \mu_q|^2), \qquad
    H_c = \frac{k}{\sum_{i \le k} 1 / D_i}

  over the classes in the batch. D_1 >= D_2 are the largest squared distances between
  two images of the class, H is their harmonic mean, with k = 2. A class with two images
  has one pair, and k = 1; a class with one image adds nothing to the first term. mu is
  the mean of the class's images in the batch. A batch with a single class has no second
  term.

  Args:
    features: (B, D), projected to unit length here.
    labels: (B,) int.
    alpha: weight of the spread within classes.
    beta: weight of the closeness of centres.
    margin: m, on squared distances of centres.

  Returns:
    () penalty.

  Examples:
    >>> features = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> range_loss(features, jnp.array([0, 1, 1])).item()  # 0.5 * 2 + 0.5 * (1 - 0.5)
    1.25

  Zhang et al., "Range Loss for Deep Face Recognition with Long-tail", ICCV 2017, arXiv
  1611.08976. The unit length is ours, and so are the defaults of alpha, beta and m,
  which suit it: the paper's are for face features of any length.
  """
  same = _same_class(features, labels)
  vectors = _unit(features)
  within = distances(vectors, vectors, squared=True)
  intra = _harmonic_ranges(within, same).sum()
  # The class centre, repeated for every image of the class: ties share the gradient.
  centres = _product(same.astype(vectors.dtype), vectors) / same.sum(1, keepdims=True)
  between = distances(centres, centres, squared=True)
  closest = jnp.where(same, jnp.inf, between).min()
  return alpha * intra + beta * jax.nn.relu(margin - closest)


def lade(
  logits: jax.Array,
  labels: jax.Array,
  *,
  counts: np.ndarray,
  regularisation: float = 0.1,
  weight_by_example: bool = False,
) -> jax.Array:
  r"""LADE's regulariser: a bound that separates each class from a uniform mixture.

  .. math::
    P = \sum_c \pi_c \Big( \ell_c + \lambda \ell_c^2
    - \frac{1}{n_c} \sum_{b: y_b = c} z_{bc} \Big), \qquad
    \ell_c = \log \frac{1}{B} \sum_b w\, e^{z_{bc}}

  This is the negated Donsker-Varadhan bound on the divergence between p(x | c) and a
  mixture of all classes, plus a pull of l_c towards 0. n_c counts the images of class c
  in the batch; pi is the training prior. The importance weight w = p_u / p_s, with p_u
  = 1 / C and p_s = pi, simulates images drawn uniformly over classes.

  Here the released code and the formula differ. Importance sampling needs the weight of
  the image's own class, w = 1 / (C pi_{y_b}) (`weight_by_example`). The code takes the
  weight of the class being bounded, w = 1 / (C pi_c), which only shifts l_c: its
  optimum is z_c = log p_s(c | x) + log C, the posterior under the training prior, while
  that of the formula is the balanced log p_u(c | x) + log C. The code's weight is the
  default because it produced the published figures. For a class without images in the
  batch, l_c stays and the sum is empty, as in the code, whose constants 1e-9 and 1e-8
  are left out.

  LADE combines this with `balanced_softmax` as the per-example loss; on CIFAR-100-LT
  the authors weight this term by 0.1.

  Args:
    logits: (B, C).
    labels: (B,) int.
    counts: (C,) training images per class, all > 0.
    regularisation: lambda, >= 0.
    weight_by_example: take w of the image's class, not of the class being bounded.

  Returns:
    () penalty, of either sign.

  Examples:
    >>> logits = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    >>> penalty = lade(logits, jnp.array([0, 1]), counts=np.array([50, 50]))
    >>> round(penalty.item(), 3)  # l + 0.1 l^2 - 1, with l = log cosh 1
    -0.547

  Hong et al., "Disentangling Label Distribution for Long-tailed Visual Recognition",
  CVPR 2021, arXiv 2012.00321, equation 16; code: hyperconnect/LADE, `LADELoss`.
  """
  chex.assert_shape(counts, logits.shape[-1:])
  targets = one_hot_targets(logits, labels)
  prior = np.asarray(counts, np.float64) / np.sum(counts)
  log_weights = jnp.asarray(-np.log(prior.size * prior), logits.dtype)[None]
  if weight_by_example:
    log_weights = (targets * log_weights).sum(1, keepdims=True)
  spread = jax.nn.logsumexp(logits + log_weights, axis=0) - math.log(len(logits))
  own = (targets * logits).sum(0) / jnp.maximum(targets.sum(0), 1)
  bounds = spread + regularisation * spread**2 - own
  return (jnp.asarray(prior, logits.dtype) * bounds).sum()


PENALTIES = {'lifted': lifted_structure, 'range': range_loss, 'lade': lade}


# The parts of the discriminative centroid loss, for a method that keeps centroids.


def attraction(
  features: jax.Array, labels: jax.Array, centroids: jax.Array
) -> jax.Array:
  r"""Half the mean squared distance from the features to their own centroids.

  .. math::
    \frac{1}{2B} \sum_b |v_b - c_{y_b}|^2

  Args:
    features: (B, D).
    labels: (B,) int.
    centroids: (C, D). The released code moves them by `centroid_gradient` instead of
      this gradient: wrap them in `stop_gradient` to do the same.

  Returns:
    () penalty.

  Examples:
    >>> features, centroids = jnp.array([[3.0, 4.0]]), jnp.zeros((1, 2))
    >>> attraction(features, jnp.array([0]), centroids).item()  # 25 / 2
    12.5

  Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019, arXiv
  1904.05160, in the form of the authors' code; the centre loss of Wen et al., ECCV
  2016.
  """
  return _squares(_to_own(features, labels, centroids)).mean() / 2


def repulsion(
  features: jax.Array,
  labels: jax.Array,
  centroids: jax.Array,
  *,
  margin: float = 10.0,
) -> jax.Array:
  r"""One hinge on the batch's mean squared distance to the centroids of other classes.

  .. math::
    \min\Big(\max\Big(m - \frac{1}{BC} \sum_b \sum_{c \ne y_b} |v_b - c_c|^2,\; 0\Big),
    \; 10^6\Big)

  An image's own centroid counts as distance 0 and stays in the denominator B C.

  Args:
    features: (B, D).
    labels: (B,) int.
    centroids: (C, D).
    margin: m, on mean squared distances.

  Returns:
    () penalty.

  Examples:
    >>> features, labels = jnp.array([[3.0, 4.0]]), jnp.array([1])
    >>> centroids = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    >>> repulsion(features, labels, centroids, margin=20.0).item()  # 20 - 25 / 2
    7.5

  Liu et al., arXiv 1904.05160, in the form of the authors' code, bounds included.
  """
  v, c = _wide(features), _wide(centroids)
  everyone = _squares(v).mean() + _squares(c).mean() - 2 * (v.mean(0) * c.mean(0)).sum()
  own = _squares(_to_own(features, labels, centroids)).mean() / len(c)
  return jnp.clip(margin - (everyone - own), 0, 1e6)


def centroid_gradient(
  features: jax.Array, labels: jax.Array, centroids: jax.Array
) -> jax.Array:
  r"""The update direction of the centroids for `attraction`, in closed form.

  .. math::
    g_j = \frac{1}{B} \frac{\sum_{b: y_b = j} (c_j - v_b)}{1 + n_j}

  n_j counts class j in the batch. The derivative of `attraction` lacks the 1 + n_j. In
  the released code the weight of the loss does not scale this gradient either.

  Args:
    features: (B, D).
    labels: (B,) int.
    centroids: (C, D).

  Returns:
    (C, D), 0 for classes that are not in the batch.

  Examples:
    >>> features, centroids = jnp.array([[3.0, 4.0]]), jnp.zeros((1, 2))
    >>> centroid_gradient(features, jnp.array([0]), centroids).tolist()
    [[-1.5, -2.0]]

  Wen et al., "A Discriminative Feature Learning Approach for Deep Face Recognition",
  ECCV 2016, equation 4; divided by B as in the code of Liu et al., arXiv 1904.05160.
  """
  difference = -_to_own(features, labels, centroids)
  # A product, not a scatter: it sums in the same order on every device.
  members = jax.nn.one_hot(labels, len(centroids), dtype=difference.dtype, axis=0)
  sums = _product(members, difference)
  return sums / (1 + members.sum(1, keepdims=True)) / len(labels)


def large_margin(
  features: jax.Array,
  labels: jax.Array,
  centroids: jax.Array,
  *,
  margin: float = 5.0,
) -> jax.Array:
  r"""The discriminative centroid loss as printed in the paper, averaged over the batch.

  .. math::
    \frac{1}{B} \sum_b \max\Big(0, |v_b - c_{y_b}|
    - \sum_{c \ne y_b} |v_b - c_c| + m\Big)

  The sum has C - 1 terms, so with many classes the hinge is rarely active. The authors'
  code uses `attraction` and `repulsion` instead.

  Args:
    features: (B, D).
    labels: (B,) int.
    centroids: (C, D).
    margin: m, on distances.

  Returns:
    () penalty.

  Examples:
    >>> features, labels = jnp.array([[3.0, 4.0]]), jnp.array([1])
    >>> centroids = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    >>> large_margin(features, labels, centroids, margin=6.0).item()  # 0 - 5 + 6
    1.0

  Liu et al., arXiv 1904.05160, equation 9.
  """
  distance = distances(features, centroids)
  own = one_hot_targets(distance, labels)
  return jax.nn.relu(((2 * own - 1) * distance).sum(1) + margin).mean()


def _harmonic_ranges(within: jax.Array, same: jax.Array) -> jax.Array:
  """Returns (B,): the harmonic mean of a class's two widest pairs, at its first image.

  Args:
    within: (B, B) squared distances.
    same: (B, B), whether two images share a class.
  """
  before = jnp.tri(len(same), k=-1, dtype=bool)
  # -1 stands for "no pair"; two columns of it make a batch of any size wide enough.
  pairs = jnp.where(same & before, within, -1)
  pairs = jnp.pad(pairs, ((0, 0), (0, 2)), constant_values=-1)
  widest = lax.top_k(pairs, 2)[0]
  # The two widest pairs of a class are among the two widest pairs of each of its
  # images.
  candidates = jnp.where(same[:, :, None], widest[None], -1)
  first, second = lax.top_k(candidates.reshape(len(same), -1), 2)[0].T
  mean = 2 * first * second / jnp.where(first > 0, first + second, 1)
  mean = jnp.where(second >= 0, mean, jnp.maximum(first, 0))
  return jnp.where((same & before).any(1), 0, mean)


def _same_class(features: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns (B, B): whether two images of the batch share a class."""
  _check_batch(features, labels)
  return labels[:, None] == labels[None]


def _to_own(features: jax.Array, labels: jax.Array, centroids: jax.Array) -> jax.Array:
  """Returns v_b - c_{y_b}, (B, D)."""
  _check_batch(features, labels)
  chex.assert_equal_shape_suffix([features, centroids], 1)
  return _wide(features) - _wide(centroids)[labels]


def _check_batch(features: jax.Array, labels: jax.Array) -> None:
  """Checks the shapes (B, D) and (B,), and that labels are integers."""
  chex.assert_rank([features, labels], [2, 1])
  chex.assert_type(labels, int)
  chex.assert_equal_shape_prefix([features, labels], 1)


def _unit(features: jax.Array) -> jax.Array:
  """Returns features at unit length; those shorter than 1e-6 stay as they are."""
  features = _wide(features)
  squares = _squares(features)[:, None]
  return features / jnp.sqrt(jnp.where(squares > 1e-12, squares, 1))


def _squares(vectors: jax.Array) -> jax.Array:
  """Returns squared lengths: (N, D) -> (N,)."""
  return (vectors * vectors).sum(-1)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
  """Returns a matrix product in full precision, without bfloat16 passes."""
  return jnp.dot(left, right, precision=lax.Precision.HIGHEST)


def _wide(x: jax.Array) -> jax.Array:
  """Returns x as float32 if its type is narrower."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
