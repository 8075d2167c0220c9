"""OpenMax: moves part of the logits of known classes to an unknown class.

For each class we store the mean logits of its correctly classified training images, and
how far the farthest of them are from that mean. If a test image is farther away, its
logit of the class moves to an unknown class, the last column of `recalibrate`:

  p = softmax(recalibrate(logits, tails));  known_score = 1 - p[:, C]

The class of an image is the arg max over the first C columns. The image is rejected if
the unknown class wins, which is OpenMax's own rule, or if `known_score` is below a
threshold. The caller does both, and both are evaluated.

Source: Bendale and Boult, Towards Open Set Deep Networks, CVPR 2016, arXiv 1511.06233,
algorithms 1 and 2; the authors' code (abhijitbendale/OSDN) and its extreme value
library (Vastlab/libMR). Where these differ, the docstrings say which one we follow.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.errors import ClassError, UserError

EUCLIDEAN_WEIGHT = 1 / 200
FEWEST = 3
"""The smallest number of images to fit a tail to."""


class Tails(NamedTuple):
  """OpenMax's parameters of all classes: a pytree of float32 arrays and `fitted`.

  Attributes:
    mean: (C, C) mean logits of the images classified right, one row per class; zeros
      for classes that are not fitted.
    shape: (C,) of the Weibull distribution of large distances.
    scale: (C,), in the unit of the distance.
    location: (C,) where it starts; the CDF is 1 - exp(-((d - location) / scale)^shape).
    fitted: (C,) bool; other classes keep their logits.
  """

  mean: np.ndarray
  shape: np.ndarray
  scale: np.ndarray
  location: np.ndarray
  fitted: np.ndarray


def unfitted(num_classes: int) -> Tails:
  """Returns tails in which no class is fitted, so no logit changes.

  Examples:
    >>> unfitted(2).fitted.tolist()
    [False, False]
  """
  ones, zeros = np.ones(num_classes, np.float32), np.zeros(num_classes, np.float32)
  # A JAX array, which takes no memory when only its shape is needed.
  mean = jnp.zeros((num_classes, num_classes), jnp.float32)
  return Tails(mean, ones, ones, zeros, np.zeros(num_classes, bool))


def distance(logits: jax.Array, means: jax.Array) -> jax.Array:
  r"""Returns the distance of every image from every class.

  .. math:: d = \frac{\| z - \mu \|}{200} + 1 - \frac{z \cdot \mu}{\|z\| \, \|\mu\|}

  The square is expanded, so no array is larger than (B, C). The cosine with a vector of
  zeros is 0.

  Args:
    logits: (B, C) float32.
    means: (K, C) mean logits of K classes.

  Returns:
    (B, K), finite and non-negative.

  Examples:
    >>> images, means = jnp.array([[3.0, 4.0]]), jnp.zeros((1, 2))
    >>> round(distance(images, means).item(), 3)  # 5 / 200 + 1
    1.025

  Source: the authors' code, where it is called eucos and is the default.
  """
  inner = jnp.matmul(logits, means.T, precision='highest')
  return _eucos(inner, _square(logits)[:, None], _square(means)[None])


def own_distance(logits: jax.Array, labels: jax.Array, means: jax.Array) -> jax.Array:
  """Returns the distance of every image from its own class, for `fit_tails`.

  Args:
    logits: (B, C) float32.
    labels: (B,) int in [0, C).
    means: (C, C) mean logits, one row per class.

  Returns:
    (B,), the entries of `distance` at the labels.

  Examples:
    >>> images, means = jnp.array([[3.0, 4.0]]), jnp.zeros((1, 2))
    >>> round(own_distance(images, jnp.array([0]), means).item(), 3)  # 5 / 200 + 1
    1.025
  """
  own = means[labels]
  return _eucos((logits * own).sum(axis=-1), _square(logits), _square(own))


def _square(x: jax.Array) -> jax.Array:
  """Returns the squared norm of each row."""
  return (x * x).sum(axis=-1)


def _eucos(inner: jax.Array, square: jax.Array, other: jax.Array) -> jax.Array:
  """Returns the distance from an inner product and both squared norms."""
  # If the vectors are equal, rounding can make either difference negative.
  euclidean = jnp.sqrt(jnp.maximum(square + other - 2 * inner, 0))
  norms = jnp.sqrt(square) * jnp.sqrt(other)
  cosine = inner / jnp.where(norms > 0, norms, 1)
  return EUCLIDEAN_WEIGHT * euclidean + jnp.maximum(1 - cosine, 0)


def fit_tails(
  distances: np.ndarray, labels: np.ndarray, means: np.ndarray, tail: int = 20
) -> Tails:
  """Fits a Weibull distribution to the largest distances of each class, on the host.

  The tail is shifted so that its smallest distance is 1, then `fit_weibull` is applied.
  Shifting it to 0 would make the likelihood diverge. libMR also uses 1; earlier
  releases used 10,000, which changes the CDF by hundredths if tails are shorter than 1,
  and is beyond the precision of float32.

  A class keeps its logits (`fitted` is False) if fewer than three images were
  classified right or if its tail is constant (to a relative 1e-5, since the distances
  are float32): there is nothing to fit. Few-shot classes with fewer than `tail` images
  use all of theirs.

  Args:
    distances: (N,) from `own_distance`, for training images classified right.
    labels: (N,) int in [0, C).
    means: (C, C) mean logits of the same images, one row per class; can be anything,
      such as NaN, for a class without images.
    tail: the largest number of distances to use per class; at least 3.

  Raises:
    UserError: a tail too short, a label out of range or a distance that is not finite.

  Examples:
    >>> distances, labels = np.array([1.0, 2.0, 3.0, 1.0]), np.array([0, 0, 0, 1])
    >>> tails = fit_tails(distances, labels, means=np.zeros((2, 2)))
    >>> tails.fitted.tolist(), tails.location.tolist()
    ([True, False], [0.0, 0.0])

  Source: algorithm 1 (its parameter eta is `tail`) with FitHigh of libMR. It does not
  mention classes without a tail.
  """
  distances, labels = np.asarray(distances, np.float64), np.asarray(labels)
  count = len(means)
  _check(distances, labels, count, tail)
  shape, scale, location = np.ones(count), np.ones(count), np.zeros(count)
  fitted = np.zeros(count, bool)
  order = np.lexsort((distances, labels))
  ends = np.searchsorted(labels[order], np.arange(1, count))
  for c, ascending in enumerate(np.split(distances[order], ends)):
    largest = ascending[-tail:]
    fitted[c] = len(largest) >= FEWEST and not np.allclose(largest, largest[0])
    if fitted[c]:
      location[c] = largest[0] - 1
      shape[c], scale[c] = fit_weibull(largest - location[c])
  mean = np.where(fitted[:, None], means, 0)
  numbers = (x.astype(np.float32) for x in (mean, shape, scale, location))
  return Tails(*numbers, fitted)


def check_tail(tail: int) -> None:
  """Raises a `UserError` if a tail is too short to fit."""
  if tail < FEWEST:
    raise UserError(f'openmax: tail must be at least {FEWEST}, got {tail}')


def _check(distances: np.ndarray, labels: np.ndarray, count: int, tail: int) -> None:
  """Raises a `UserError` if the tails of these distances cannot be fitted."""
  check_tail(tail)
  outside = (labels < 0) | (labels >= count)
  if outside.any():
    raise UserError(f'openmax: label {labels[outside][0]} is not in [0, {count})')
  bad = ~np.isfinite(distances)
  if bad.any():
    raise ClassError('openmax: a distance of ', labels[bad][0], ' is not finite')


def fit_weibull(values: np.ndarray) -> tuple[float, float]:
  r"""Returns the maximum likelihood shape and scale, by Brent's method.

  With x = log y, the inverse shape s is the only root of

  .. math::
    h(s) = s + \bar x - \frac{\sum_i x_i e^{x_i / s}}{\sum_i e^{x_i / s}}, \qquad
    \text{scale} = \Big( \frac{1}{n} \sum_i y_i^{1/s} \Big)^{s}

  where h increases in s, and the root is between the two ends passed to the solver.

  Args:
    values: (n,) float64, positive and not all equal.

  Examples:
    >>> share = (np.arange(1000) + 0.5) / 1000
    >>> shape, scale = fit_weibull(3 * np.sqrt(-np.log(1 - share)))
    >>> round(shape, 1), round(scale, 1)
    (2.0, 3.0)

  Source: the likelihood equations of the Weibull distribution; libMR solves the same
  equation for s.
  """
  from scipy.optimize import brentq

  x = np.log(values)
  top = x.max()
  x = x - top  # does not change h, and keeps the exponentials from overflowing
  mean = x.mean()

  def h(s):
    weight = np.exp(x / s)
    return s + mean - (weight * x).sum() / weight.sum()

  # From |x| e^(-|x| / s) <= s / e: h < 0 at the lower end. h > 0 at the range of x.
  ends = -mean / (1 + len(x)), -x.min()
  s = brentq(h, *ends, xtol=1e-12 * ends[0], rtol=1e-12)
  return 1 / s, float(np.exp(top + s * np.log(np.exp(x / s).mean())))


def recalibrate(logits: jax.Array, tails: Tails, alpha: int = 10) -> jax.Array:
  r"""Returns logits of C + 1 classes, the last of them unknown.

  With r = 0, 1, ... the rank of class j among the logits, and F_j the fitted CDF:

  .. math::
    w_j = 1 - \max\Big( \frac{\alpha - r}{\alpha}, 0 \Big) F_j(d_j), \qquad
    z'_j = z_j - (1 - w_j) \max(z_j, 0), \qquad
    z'_C = \sum_j (1 - w_j) \max(z_j, 0)

  Only positive logits shrink: shrinking a negative one would raise it, and lower the
  unknown one. (We could also shift all logits of an image until none is negative, but
  then every ranked class far from the image adds its share, so with few classes most
  known images are rejected.)

  Args:
    logits: (B, C) float32.
    tails: from `fit_tails`.
    alpha: how many of the largest logits can shrink, at least 1; all C if larger.
      Among equal logits the lower class ranks first.

  Returns:
    (B, C + 1), finite.

  Raises:
    UserError: an alpha below 1.

  Examples:
    >>> near = unfitted(2)
    >>> recalibrate(jnp.array([[2.0, 1.0]]), near).tolist()
    [[2.0, 1.0, 0.0]]
    >>> far = near._replace(scale=np.full(2, 1e-3), fitted=np.array([True, True]))
    >>> recalibrate(jnp.array([[2.0, 1.0]]), far, alpha=1).tolist()
    [[0.0, 1.0, 2.0]]

  Source: algorithm 2; ranks and the factor F_j follow the authors' code, which also
  shrinks negative logits.
  """
  if alpha < 1:
    raise UserError(f'openmax: alpha must be at least 1, got {alpha}')
  alpha = min(alpha, logits.shape[-1])
  from_start = distance(logits, tails.mean) - tails.location[None]
  ratio = jnp.maximum(from_start, 0) / tails.scale[None]
  cdf = jnp.where(tails.fitted[None], -jnp.expm1(-(ratio ** tails.shape[None])), 0)
  rank = jnp.argsort(jnp.argsort(-logits, axis=-1), axis=-1)
  weight = 1 - jnp.maximum(1 - rank / alpha, 0) * cdf
  taken = (1 - weight) * jnp.maximum(logits, 0)
  unknown = taken.sum(axis=-1, keepdims=True)
  return jnp.concatenate([logits - taken, unknown], axis=-1)
