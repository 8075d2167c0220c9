"""Class weights from the training counts, as functions of the step.

A rule maps the counts (C,) of the whole training set, never of a batch, to weights (C,)
that sum to C, so that the mean weight is one if classes are uniform. Batches are
long-tailed, so their mean weight is far below one: `lt_jax.losses.REDUCTIONS` says what
to divide by.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.errors import ClassError, UserError, construct


def check_counts(counts: np.ndarray, what: str) -> np.ndarray:
  """Returns the counts as float64, after checking that no class is empty.

  Args:
    counts: (C,) number of training images of each class.
    what: what needs them, for the message.

  Raises:
    UserError: the counts are not a vector, or a class is empty; the message names it.

  Examples:
    >>> check_counts([90, 10], 'this loss').tolist()
    [90.0, 10.0]
  """
  counts = np.asarray(counts, np.float64)
  if counts.ndim != 1 or not counts.size:
    raise UserError(f'{what} needs one count per class, got the shape {counts.shape}')
  empty = np.flatnonzero(~(counts > 0))
  if empty.size:
    others = f' (and {empty.size - 1} more)' if empty.size > 1 else ''
    has = f'{others} has {counts[empty[0]]:g}'
    raise ClassError(f'{what} needs training images of every class: ', empty[0], has)
  return counts


def uniform(counts: np.ndarray) -> np.ndarray:
  """All ones: no re-weighting. Classes without images are allowed.

  Args:
    counts: (C,); only the length matters.

  Returns:
    (C,) float64.

  Examples:
    >>> uniform([90, 10]).tolist()
    [1.0, 1.0]
  """
  return np.ones(len(counts))


def effective_number(
  counts: np.ndarray | int,
  beta: float | None = None,
  *,
  prototypes: float | None = None,
) -> np.ndarray:
  r"""The effective number of images of a class: how many add something new.

  .. math::
    E_n = \frac{1 - \beta^n}{1 - \beta}, \qquad \beta = \frac{N - 1}{N}

  An image covers a region of its class, which is as large as N such regions. Wherever n
  regions fall, they cover E_n together in expectation: 1 for one image, approaching N.
  `benchmarks/effective_number.py` simulates it.

  Args:
    counts: (...) images, n >= 0.
    beta: in [0, 1); with 0, every image repeats the first.
    prototypes: N >= 1, instead of beta.

  Returns:
    (...) float64.

  Raises:
    UserError: beta or N is out of range, or not exactly one of the two is given.

  Examples:
    >>> effective_number([1, 2, 100], beta=0.5).tolist()
    [1.0, 1.5, 2.0]

  Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019,
  arXiv 1901.05555, proposition 1.
  """
  if (beta is None) == (prototypes is None):
    raise UserError('effective_number needs either beta or prototypes')
  if prototypes is not None and not 1 <= prototypes < float('inf'):
    raise UserError(f'effective_number needs prototypes of 1 or more, got {prototypes}')
  beta = 1 - 1 / prototypes if beta is None else beta
  return _new(np.asarray(counts, np.float64), beta) / (1 - beta)


def _new(counts: np.ndarray, beta: float) -> np.ndarray:
  """Returns 1 - beta^n of float64 counts without cancellation."""
  if not 0 <= beta < 1:
    raise UserError(f'effective_number needs beta in [0, 1), got {beta}')
  with np.errstate(divide='ignore', invalid='ignore'):
    power = counts * np.log1p(beta - 1.0)
  return -np.expm1(np.where(counts == 0, 0.0, power))


def inverse_effective_number(counts: np.ndarray, beta: float = 0.9999) -> np.ndarray:
  r"""Weights by the inverse of the effective number of images (class-balanced loss).

  .. math:: w_c = C \frac{1 / E_{n_c}}{\sum_k 1 / E_{n_k}}

  beta = 0 gives ones, beta -> 1 inverse frequency. Classes saturate at about
  1 / (1 - beta) images: all classes much larger than that weigh the same.

  Args:
    counts: (C,) training images of each class.
    beta: in [0, 1).

  Returns:
    (C,) float64, sum C.

  Raises:
    UserError: beta is out of range, or a class is empty.

  Examples:
    >>> inverse_effective_number([2, 1], beta=0.5).round(3).tolist()
    [0.8, 1.2]
    >>> inverse_effective_number([90, 10], beta=0).tolist()
    [1.0, 1.0]

  Cui et al., CVPR 2019, arXiv 1901.05555, equation 4.
  """
  # Normalisation cancels the factor 1 - beta.
  return _sum_to_classes(1.0 / _new(check_counts(counts, 'effective_number'), beta))


def inverse_frequency(counts: np.ndarray) -> np.ndarray:
  """Weights proportional to 1 / n_c, so that all classes have the same total weight.

  Args:
    counts: (C,) training images of each class.

  Returns:
    (C,) float64, sum C.

  Raises:
    UserError: a class is empty.

  Examples:
    >>> inverse_frequency([90, 10]).round(3).tolist()
    [0.2, 1.8]
  """
  return _sum_to_classes(1.0 / check_counts(counts, 'inverse_frequency'))


def inverse_square_root(counts: np.ndarray) -> np.ndarray:
  """Weights proportional to 1 / sqrt(n_c), halfway to inverse frequency.

  Args:
    counts: (C,) training images of each class.

  Returns:
    (C,) float64, sum C.

  Raises:
    UserError: a class is empty.

  Examples:
    >>> inverse_square_root([90, 10]).round(3).tolist()
    [0.5, 1.5]
  """
  return _sum_to_classes(check_counts(counts, 'inverse_square_root') ** -0.5)


def median_frequency(
  counts: np.ndarray, *, class_pixels: Callable[[], np.ndarray]
) -> np.ndarray:
  r"""Weights of pixels by how large a class is in those images that show it.

  .. math::
    w_c \propto \frac{\operatorname{median}_k f_k}{f_c}, \qquad
    f_c = \frac{\sum_i n_{ic}}{\sum_{i:\, n_{ic} > 0} \sum_k n_{ik}}

  with n the labelled pixels of each class in each training image. A class that few
  images show, but that fills them, is thus no rare one. Like all weights here they are
  scaled to sum to C, so the median is a factor that cancels.

  Args:
    counts: (C,) training pixels of each class.
    class_pixels: () -> (N, C) int, n.

  Returns:
    (C,) float64, sum C.

  Raises:
    UserError: an empty class.

  Examples:
    >>> n = np.array([[90, 10, 0], [50, 0, 50]])  # f: 0.7, 0.1, 0.5
    >>> median_frequency(n.sum(0), class_pixels=lambda: n).round(2).tolist()
    [0.32, 2.23, 0.45]

  Eigen and Fergus, "Predicting Depth, Surface Normals and Semantic Labels with a Common
  Multi-Scale Convolutional Architecture", ICCV 2015, arXiv 1411.4734, section 6.3.2;
  taken up by SegNet (Badrinarayanan et al., arXiv 1511.00561).
  """
  counts, pixels = check_counts(counts, 'median_frequency'), class_pixels()
  of_images = ((pixels > 0) * pixels.sum(1, keepdims=True)).sum(0)
  return _sum_to_classes(of_images / counts)


CLASS_WEIGHTS = {
  'uniform': uniform,
  'effective_number': inverse_effective_number,
  'inverse_frequency': inverse_frequency,
  'inverse_square_root': inverse_square_root,
  'median_frequency': median_frequency,
}


def make_class_weights(
  name: str,
  counts: np.ndarray,
  *,
  start_step: int = 0,
  class_pixels: Callable[[], np.ndarray] | None = None,
  **options: Any,
) -> Callable[[jax.Array], jax.Array]:
  """Returns class weights as a function of the step.

  Deferred re-weighting (DRW) means `start_step` > 0: ones before that step, the weights
  from it on. LDAM-DRW switches at its first learning-rate drop, to effective-number
  weights with beta 0.9999, although the paper speaks of inverse frequency.

  Args:
    name: a key of `CLASS_WEIGHTS`.
    counts: (C,) training images of each class.
    start_step: first re-weighted step.
    class_pixels: () -> (N, C) pixels of each class in each training image, for rules
      that use them.
    **options: options of the rule, such as `beta`.

  Returns:
    step -> (C,), sum C.

  Raises:
    UserError: a name or option is unknown, or a class is empty.

  Examples:
    >>> weights = make_class_weights('inverse_square_root', [90, 10], start_step=100)
    >>> weights(99).tolist(), weights(100).tolist()
    ([1.0, 1.0], [0.5, 1.5])

  Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
  NeurIPS 2019, arXiv 1906.07413.
  """
  weights = construct(
    CLASS_WEIGHTS,
    'class weights',
    name,
    counts,
    options=options,
    class_pixels=class_pixels,
  )

  def class_weights(step: jax.Array) -> jax.Array:
    return jnp.where(step >= start_step, jnp.asarray(weights), 1.0)

  return class_weights


def weights_of(class_weights: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the weight of each label's class, or 0 if the label is -1.

  Args:
    class_weights: (C,).
    labels: (...) int. Plain indexing would treat -1 as the last class.

  Returns:
    (...).

  Examples:
    >>> weights_of(np.array([0.5, 1.5]), np.array([1, 0, -1])).tolist()
    [1.5, 0.5, 0.0]
  """
  return (
    jnp.asarray(class_weights)
    .at[labels]
    .get(mode='fill', fill_value=0, wrap_negative_indices=False)
  )


def _sum_to_classes(raw: np.ndarray) -> np.ndarray:
  """Scales weights (C,) so that they sum to C."""
  return raw * (raw.size / raw.sum())
