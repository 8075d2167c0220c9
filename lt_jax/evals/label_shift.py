r"""Label shift: the shares of classes in a target, estimated without its labels.

All estimators assume that images of a class look alike in both domains,
:math:`p_t(x \mid y) = p_s(x \mid y)`, so that only the shares p(y) differ. If the
domains look different, as in adaptation, an estimate is only as good as the classifier
it relies on.

Everything is float64 NumPy over whole splits.
"""

import numpy as np

from lt_jax.errors import ClassError, UserError

LEAST = 1e-3
"""The smallest singular value of a confusion matrix that `bbse` accepts."""


def confusion(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
  r"""Returns a classifier's predictions by class, :math:`P_s(\hat y = i \mid y = j)`.

  Args:
    probabilities: (N, C) for held-out source images; one-hot for hard predictions.
    labels: (N,) int in [0, C).

  Returns:
    (C, C), whose columns sum to 1.

  Raises:
    UserError: a class has no image.

  Examples:
    >>> confusion([[0.75, 0.25], [0.5, 0.5]], np.array([0, 1])).tolist()
    [[0.75, 0.5], [0.25, 0.5]]
  """
  probabilities = np.asarray(probabilities, np.float64)
  belongs = labels[:, None] == np.arange(probabilities.shape[1])
  counts = belongs.sum(0)
  if not counts.all():
    without = ' has no image to estimate its confusion with'
    raise ClassError('label shift: ', counts.argmin(), without)
  return probabilities.T @ belongs / counts


def bbse(confused: np.ndarray, predicted: np.ndarray) -> np.ndarray:
  r"""Returns the shares of classes in a target, by black-box shift estimation.

  .. math:: \sum_j P_s(\hat y = i \mid y = j)\, q_j = P_t(\hat y = i)

  The paper solves for the weights w = q / p with the joint distribution
  :math:`P_s(\hat y, y)` over images distributed like the training images. Here we
  condition on the class, so the shares among the held-out images do not matter. Shares
  below 0 are set to 0, as the authors do with weights, and all are scaled to sum to 1.

  Args:
    confused: (C, C), see `confusion`.
    predicted: (C,), the mean of the same predictions over the target.

  Returns:
    (C,) q.

  Raises:
    UserError: the classifier cannot tell the classes apart.

  Examples:
    >>> confused = np.array([[0.9, 0.2], [0.1, 0.8]])
    >>> bbse(confused, confused @ [0.3, 0.7]).round(3).tolist()
    [0.3, 0.7]

  Source: Lipton et al., Detecting and Correcting for Label Shift with Black Box
  Predictors, arXiv 1802.03916, equation 3.
  """
  least = np.linalg.svd(confused, compute_uv=False)[-1]
  if least < LEAST:
    raise UserError(
      'label shift: the classifier confuses classes so much that bbse has no answer '
      f'(smallest singular value {least:.1g}, below {LEAST:g}); train it longer, or '
      'use em'
    )
  found = np.maximum(np.linalg.solve(confused, np.asarray(predicted, np.float64)), 0)
  return found / found.sum()


def em(
  probabilities: np.ndarray,
  shares: np.ndarray,
  *,
  tolerance: float = 1e-9,
  most: int = 10_000,
) -> np.ndarray:
  r"""Returns the class shares under which the target's images are most likely.

  .. math::
    r_{ic} = \frac{(q_c / p_c)\, P_s(c \mid x_i)}{\sum_k (q_k / p_k)\, P_s(k \mid x_i)},
    \qquad q_c \leftarrow \frac{1}{N} \sum_i r_{ic}

  starting at q = p, until q changes by less than `tolerance`. The likelihood has one
  maximum and never decreases, but the probabilities must be calibrated on the source.

  Args:
    probabilities: (N, C) for the target's images, from a classifier for the source.
    shares: (C,) p, the shares among the source's training images.
    tolerance: it stops when no share changes by this much.
    most: the maximal number of rounds.

  Returns:
    (C,) q.

  Raises:
    UserError: a class has no share in the source.

  Examples:
    >>> sure = np.eye(2)[[0, 0, 0, 1]]  # three images of class 0 and one of class 1
    >>> em(sure, shares=[0.5, 0.5]).tolist()
    [0.75, 0.25]

  Source: Saerens, Latinne and Decaestecker, Adjusting the Outputs of a Classifier to
  New a Priori Probabilities, Neural Computation 14 (2002), equation 2.9.
  """
  probabilities = np.asarray(probabilities, np.float64)
  shares = np.asarray(shares, np.float64)
  if not (shares > 0).all():
    raise ClassError('label shift: the source has no image of ', shares.argmin(), '')
  likelihood = probabilities / shares
  found = shares
  for _ in range(most):
    joint = likelihood * found
    new = (joint / joint.sum(1, keepdims=True)).mean(0)
    if np.abs(new - found).max() < tolerance:
      return new
    found = new
  return found
