r"""How well a network will transfer to a target, estimated from its outputs there.

A score is a function of features (N, D), or of the probabilities of a source head
(N, C_s), and of target labels (N,); higher is better. It compares networks on one
target, not targets with each other. Everything is float64, on training images of the
target.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lt_jax.errors import UserError

Score = Callable[[np.ndarray, np.ndarray], float]


def leep(probabilities: np.ndarray, labels: np.ndarray) -> float:
  r"""Returns the log expected empirical prediction, at most 0.

  .. math::
    \frac1N \sum_n \log \sum_z P(y_n | z)\, \theta_{nz}, \qquad
    P(y, z) = \frac1N \sum_{n: y_n = y} \theta_{nz}

  Args:
    probabilities: theta (N, Z), from the source head.
    labels: (N,) of the target.

  Examples:
    >>> labels = np.array([0, 1])
    >>> leep(np.eye(2), labels), round(leep(np.full((2, 2), 0.5), labels), 3)
    (0.0, -0.693)

  Source: Nguyen et al., ICML 2020, arXiv 2002.12462.
  """
  theta = np.asarray(probabilities, np.float64)
  joint = _one_hot(labels).T @ theta / len(theta)
  marginal = joint.sum(0)
  given = np.divide(joint, marginal, out=np.zeros_like(joint), where=marginal > 0)
  expected = (theta * given[labels]).sum(1)
  return float(np.log(np.maximum(expected, np.finfo(float).tiny)).mean())


def nce(probabilities: np.ndarray, labels: np.ndarray) -> float:
  """Returns minus the entropy of the target label given the source's prediction.

  Args:
    probabilities: (N, Z), from the source head; only the arg max matters.
    labels: (N,) of the target.

  Examples:
    >>> labels = np.array([0, 1])
    >>> nce(np.eye(2), labels), round(nce(np.full((2, 2), 0.5), labels), 3)
    (0.0, -0.693)

  Source: Tran et al., ICCV 2019, arXiv 1908.08142.
  """
  predicted = np.asarray(probabilities).argmax(1)
  joint = _one_hot(labels).T @ _one_hot(predicted) / len(labels)
  marginal = joint.sum(0)
  share = np.divide(joint, marginal, out=np.ones_like(joint), where=joint > 0)
  return float((joint * np.log(share)).sum())


def h_score(features: np.ndarray, labels: np.ndarray) -> float:
  r"""Returns how much of the features' variance is between classes, whitened.

  .. math:: \mathrm{tr}(\mathrm{cov}(f)^+\, \mathrm{cov}(E[f | y]))

  Examples:
    >>> features, labels = np.array([[3], [1], [-1], [-3]]), np.array([0, 0, 1, 1])
    >>> round(h_score(features, labels), 3)  # 4 of a variance of 5
    0.8

  Source: Bao et al., ICIP 2019.
  """
  centred, between = _covariances(features, labels)
  return float(np.trace(np.linalg.pinv(centred.T @ centred / len(centred)) @ between))


def regularised_h_score(features: np.ndarray, labels: np.ndarray) -> float:
  """Returns the H-score with a covariance shrunk towards a multiple of the identity.

  The shrinkage a is that of Ledoit and Wolf; the covariance between classes is
  multiplied by 1 - a.

  Examples:
    >>> features, labels = np.array([[3], [1], [-1], [-3]]), np.array([0, 0, 1, 1])
    >>> round(regularised_h_score(features, labels), 3)  # one feature: no shrinkage
    0.8

  Source: Ibrahim et al., ECML 2022, arXiv 2110.06893.
  """
  from sklearn.covariance import ledoit_wolf

  centred, between = _covariances(features, labels)
  shrunk, shrinkage = ledoit_wolf(centred, assume_centered=True)
  return float(np.trace(np.linalg.pinv(shrunk) @ between) * (1 - shrinkage))


def log_me(features: np.ndarray, labels: np.ndarray) -> float:
  r"""Returns the log evidence of linear regressions of each class against the rest.

  For y = F w + noise, where w has variance 1 / alpha and the noise 1 / beta, alpha and
  beta maximise the evidence by fixed-point steps,

  .. math::
    \gamma = \sum_i \frac{s_i}{s_i + \alpha / \beta}, \qquad
    \alpha \leftarrow \frac{\gamma}{|m|^2}, \qquad
    \beta \leftarrow \frac{N - \gamma}{|F m - y|^2}

  with the eigenvalues s of F^T F (some are zero if N < D), until alpha / beta changes
  by less than 1 %, at most eleven times. The result is divided by N and averaged over
  classes.

  Examples:
    >>> features, labels = np.array([[1], [1], [-1], [-1]]), np.array([0, 0, 1, 1])
    >>> log_me(features, labels) > log_me(features, labels=np.array([0, 1, 0, 1]))
    True

  Source: You et al., ICML 2021, arXiv 2102.11005, and the faster form of its journal
  version; the authors' code leaves out the zeros of s if N < D, which is wrong.
  """
  f = np.asarray(features, np.float64)
  left, singular, _ = np.linalg.svd(f, full_matrices=False)
  evidence = [
    _evidence(left, singular**2, y, f.shape[1]).value
    for y in _one_hot(labels).T
    if y.any()
  ]
  return float(np.mean(evidence))


class _Evidence(NamedTuple):
  """The log evidence of one class divided by N, and its alpha and beta."""

  value: float
  alpha: float
  beta: float


def _evidence(left: np.ndarray, s: np.ndarray, y: np.ndarray, width: int) -> _Evidence:
  """Returns the evidence of one class."""
  images, tiny = len(y), 1e-12
  x2 = (left.T @ y) ** 2
  outside = max(y @ y - x2.sum(), 0.0)  # the part of y not spanned by the features

  def norms(ratio: float) -> tuple[float, float]:
    """Returns |m|^2 and |F m - y|^2 if alpha / beta is `ratio`."""
    return (s * x2 / (s + ratio) ** 2).sum(), (
      x2 * (ratio / (s + ratio)) ** 2
    ).sum() + outside

  alpha = beta = ratio = 1.0
  for _ in range(11):
    gamma = (s / (s + ratio)).sum()
    square, residual = norms(ratio)
    alpha = gamma / (square + tiny)
    beta = (images - gamma) / (residual + tiny)
    before, ratio = ratio, alpha / beta
    if abs(ratio - before) <= 0.01 * before:
      break
  square, residual = norms(ratio)
  log_det = np.log(alpha + beta * s).sum() + (width - len(s)) * np.log(alpha)
  value = (
    width * np.log(alpha)
    + images * np.log(beta)
    - log_det
    - beta * residual
    - alpha * square
    - images * np.log(2 * np.pi)
  ) / (2 * images)
  return _Evidence(float(value), float(alpha), float(beta))


def trans_rate(
  features: np.ndarray, labels: np.ndarray, epsilon: float = 1e-4
) -> float:
  r"""Returns the coding rate of features minus that within classes.

  .. math::
    R(Z) - \sum_c \frac{n_c}{N} R(Z_c), \qquad
    R(Z) = \tfrac12 \log\det\left(I + \frac{Z^T Z}{n \epsilon}\right)

  of centred features. Unlike the paper, the authors' code weighs all classes equally.

  Examples:
    >>> features = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])
    >>> rate = trans_rate(features, np.array([0, 0, 1, 1]))  # an axis for each class
    >>> round(rate, 3)  # log(5001) - log(10001) / 2
    3.912

  Source: Huang et al., ICML 2022, arXiv 2106.09362.
  """
  _one_hot(labels)  # checks them
  z = np.asarray(features, np.float64)
  z = z - z.mean(0)

  def rate(part: np.ndarray) -> float:
    # Both products give the same determinant; take the smaller one.
    product = part.T @ part if part.shape[0] > part.shape[1] else part @ part.T
    scaled = np.eye(len(product)) + product / (len(part) * epsilon)
    return 0.5 * np.linalg.slogdet(scaled)[1]

  within = sum((labels == c).mean() * rate(z[labels == c]) for c in np.unique(labels))
  return float(rate(z) - within)


def _covariances(
  features: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns centred features and the covariance of their class means."""
  f = np.asarray(features, np.float64)
  f = f - f.mean(0)
  hot = _one_hot(labels)
  counts = np.maximum(hot.sum(0), 1)
  means = (hot.T @ f / counts[:, None])[labels]
  return f, means.T @ means / len(f)


def _one_hot(labels: np.ndarray) -> np.ndarray:
  labels = np.asarray(labels)
  if len(labels) < 2 or labels.min() < 0:
    raise UserError('a transferability score needs two labelled images or more')
  return np.eye(labels.max() + 1)[labels]


OF_FEATURES: dict[str, Score] = {
  'logme': log_me,
  'h_score': h_score,
  'regularised_h_score': regularised_h_score,
  'trans_rate': trans_rate,
}
"""name -> score of features; networks are ranked by the first."""

OF_PROBABILITIES: dict[str, Score] = {'leep': leep, 'nce': nce}
"""name -> score of a source head's probabilities."""
