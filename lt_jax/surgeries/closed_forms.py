"""Zero-shot learning in closed form or by one convex fit, in float64 NumPy throughout.

Features are X (N, D), labels y (N,), descriptions S (C, A) with rows of unit norm, and
`fitted` (C,) bool marks the classes that are learned from. A fit yields the parameters
of a head of `lt_jax.models.described` for each set of hyper-parameters in turn; what
they share is computed once.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lt_jax.data.attributes import binary

Params = dict[str, np.ndarray]
Hyper = dict[str, float]

BLOCK = 4096
"""Rows of a large matrix that are computed at once."""

LARGE = 2**29
"""Bytes of a symmetric matrix that is solved on one thread. On two, OpenBLAS crashed in
`potrf` from 16,000 rows on and in `syrk` from 24,000 (NumPy 2.4.6 and 2.5.5, SciPy)."""

POWERS = tuple(10.0**power for power in range(-3, 4))


class Seen(NamedTuple):
  """The data to fit to.

  Attributes:
    x: (N, D) float64 features.
    y: (N,) int labels.
    described: (C, A) float64, rows of unit norm.
    raw: (C, A) float64, descriptions without normalising.
    fitted: (C,) bool, the classes of these images.
  """

  x: np.ndarray
  y: np.ndarray
  described: np.ndarray
  raw: np.ndarray
  fitted: np.ndarray


class ClosedForm(NamedTuple):
  """A method.

  Attributes:
    fits: (seen, sets of hyper-parameters) -> parameters of the head for each.
    scores: (parameters, features (N, D), unit descriptions (C, A), raw ones (C, A)) ->
      (N, C) scores.
    grid: name of a hyper-parameter -> values to try.
    fills: names of the head's parameters.
    reads: attributes of the head that are further arguments of `scores`.
  """

  fits: Callable[[Seen, Sequence[Hyper]], Iterator[Params]]
  scores: Callable[..., np.ndarray]
  grid: Mapping[str, Sequence[float]]
  fills: tuple[str, ...] = ('kernel',)
  reads: tuple[str, ...] = ()

  def sets(self, given: Mapping[str, float]) -> list[Hyper]:
    """Returns every set of hyper-parameters; given ones are fixed."""
    values = {
      name: (given[name],) if name in given else v for name, v in self.grid.items()
    }
    return [
      dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())
    ]


# ESZSL.


def eszsl(seen: Seen, sets: Sequence[Hyper]) -> Iterator[Params]:
  r"""Fits the bilinear form with two ridge regressions at once.

  .. math::
    W = (X^\top X + g I)^{-1} X^\top Y S (S^\top S + l I)^{-1}, \qquad
    Y \in \{-1, 1\}^{N \times C}

  minimises |X W S^T - Y|^2 + g |W S^T|^2 + l |X W|^2 + g l |W|^2 over the fitted
  classes. Both matrices are diagonalised once, so a set costs two products.

  Source: Romera-Paredes and Torr, An Embarrassingly Simple Approach to Zero-Shot
  Learning, ICML 2015, equation 8.
  """
  described = seen.described[seen.fitted]
  right = _signed_sums(seen.x, seen.y, seen.fitted) @ described
  values, vectors = np.linalg.eigh(seen.x.T @ seen.x)
  weights, axes = np.linalg.eigh(described.T @ described)
  turned = vectors.T @ right @ axes
  for one in sets:
    scaled = turned / (values + one['g'])[:, None] / (weights + one['l'])[None]
    yield {'kernel': vectors @ scaled @ axes.T}


def _signed_sums(x: np.ndarray, y: np.ndarray, fitted: np.ndarray) -> np.ndarray:
  """Returns X^T Y (D, fitted classes); Y is 1 for the true class and -1 otherwise."""
  belongs = (y[:, None] == np.flatnonzero(fitted)[None]).astype(np.float64)
  return 2 * (x.T @ belongs) - x.sum(0)[:, None]


def bilinear_scores(
  params: Params,
  x: np.ndarray,
  described: np.ndarray,
  raw: np.ndarray,
  scale: float = 1.0,
) -> np.ndarray:
  """Returns X W S^T, times a factor."""
  del raw
  return scale * (x @ params['kernel'] @ described.T)


def kernel_eszsl(seen: Seen, sets: Sequence[Hyper]) -> Iterator[Params]:
  r"""Fits `eszsl` on a Gaussian kernel of the features.

  With W = X^T alpha the same objective has its minimum at

  .. math:: \alpha = (K + g I)^{-1} Y S (S^\top S + l I)^{-1}

  Sigma is `width` times the root mean squared distance between images.

  Source: Romera-Paredes and Torr, ICML 2015, section 3.2.
  """
  from scipy import linalg
  from threadpoolctl import threadpool_limits

  described = seen.described[seen.fitted]
  belongs = seen.y[:, None] == np.flatnonzero(seen.fitted)[None]
  right = np.where(belongs, 1.0, -1.0) @ described
  spread = np.sqrt(2 * seen.x.var(0).sum())
  inner = described.T @ described
  eye = np.eye(len(inner))
  for (factor, g), group in itertools.groupby(
    sets, key=lambda one: (one['width'], one['g'])
  ):
    width = factor * spread
    gram = gaussian(seen.x, seen.x, width)
    gram[np.diag_indices_from(gram)] += g
    with threadpool_limits(1 if gram.nbytes >= LARGE else None):
      solved = linalg.solve(gram, right, assume_a='pos', overwrite_a=True)
    for one in group:
      alpha = linalg.solve(inner + one['l'] * eye, solved.T, assume_a='pos').T
      yield {'kernel': alpha, 'support': seen.x, 'width': np.float64(width)}


def gaussian(x: np.ndarray, support: np.ndarray, width: float) -> np.ndarray:
  """Returns exp(-|x - s|^2 / 2 width^2), (N, M), with one matrix of that size.

  In blocks of rows, since NumPy computes a whole X X^T with `syrk`: see `LARGE`.
  """
  apart = np.empty((len(x), len(support)))
  for begin in range(0, len(x), BLOCK):
    rows = slice(begin, begin + BLOCK)
    np.matmul(-2 * x[rows], support.T, out=apart[rows])
  apart += (x * x).sum(1)[:, None]
  apart += (support * support).sum(1)[None]
  np.maximum(apart, 0, out=apart)
  apart /= -2 * width**2
  return np.exp(apart, out=apart)


def kernel_scores(
  params: Params, x: np.ndarray, described: np.ndarray, raw: np.ndarray
) -> np.ndarray:
  """Returns k(X) alpha S^T."""
  del raw
  near = gaussian(x, params['support'], float(params['width']))
  return near @ params['kernel'] @ described.T


# SAE.


def sae(seen: Seen, sets: Sequence[Hyper]) -> Iterator[Params]:
  r"""Fits a linear autoencoder with the description as its code.

  .. math::
    \min_W |X^\top - W \Sigma|^2 + \lambda |W^\top X^\top - \Sigma|^2

  for the descriptions Sigma (A, N) of the images. The solution solves a Sylvester
  equation in V = W^T, A V + V B = C, with A = Sigma Sigma^T, B = lambda X^T X and C =
  (1 + lambda) Sigma X. A and B are symmetric, so they are diagonalised once, and each
  lambda costs one division.

  Source: Kodirov et al., Semantic Autoencoder for Zero-Shot Learning, arXiv 1704.08345,
  equation 8.
  """
  codes = seen.described[seen.y]
  weights, axes = np.linalg.eigh(codes.T @ codes)
  values, vectors = np.linalg.eigh(seen.x.T @ seen.x)
  # Directions in which no image varies would give 0 / 0; their projection is 0.
  weights, values = np.maximum(weights, 0), np.maximum(values, 0)
  turned = axes.T @ (codes.T @ seen.x) @ vectors
  for one in sets:
    weight = one['weight']
    sums = weights[:, None] + weight * values[None]
    coded = np.divide(
      (1 + weight) * turned, sums, out=np.zeros_like(sums), where=sums > 1e-12
    )
    yield {'kernel': (axes @ coded @ vectors.T).T}


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Returns the cosines between rows (N, A) and rows (C, A)."""
  unit = [
    x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    for x in (one, other)
  ]
  return unit[0] @ unit[1].T


def in_attributes_scores(
  params: Params,
  x: np.ndarray,
  described: np.ndarray,
  raw: np.ndarray,
  scale: float = 1.0,
) -> np.ndarray:
  """Returns cosines between codes and descriptions, times a factor."""
  del raw
  return scale * cosines(x @ params['kernel'], described)


def in_features_scores(
  params: Params,
  x: np.ndarray,
  described: np.ndarray,
  raw: np.ndarray,
  scale: float = 1.0,
) -> np.ndarray:
  """Returns cosines between features and decoded descriptions, times a factor."""
  del raw
  return scale * cosines(x, described @ params['kernel'].T)


# Classifiers of attributes and of classes.


def softmax_regression(
  x: np.ndarray, targets: np.ndarray, penalty: float
) -> tuple[np.ndarray, np.ndarray]:
  r"""Fits a softmax to one-hot targets by L-BFGS.

  .. math:: \sum_i \ell(x_i W + b, t_i) + \frac{\lambda}{2} |W|^2

  b is not penalised. It descends in V = P^{-1} W with :math:`P = (X^\top X / 4 +
  \lambda I)^{-1/2}`, where the curvature at 0 is about the same in all directions.

  Args:
    x: (N, D).
    targets: (N, K).
    penalty: lambda.

  Returns:
    (W (D, K), b (K,)).
  """
  from scipy import optimize, special

  examples, width = x.shape
  outputs = targets.shape[1]
  values, vectors = np.linalg.eigh(x.T @ x)
  curvature = np.maximum(values, 0) / 4 + penalty
  scale = (vectors / np.sqrt(curvature)) @ vectors.T
  square = (vectors / curvature) @ vectors.T
  z = x @ scale

  def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
    weights = flat.reshape(width + 1, outputs)
    logits = z @ weights[:-1] + weights[-1]
    total = special.logsumexp(logits, axis=1, keepdims=True)
    error = np.exp(logits - total) - targets
    decay = penalty * (square @ weights[:-1])
    loss = total.sum() - (targets * logits).sum() + (decay * weights[:-1]).sum() / 2
    slope = np.vstack([z.T @ error + decay, error.sum(0)])
    return loss / examples, slope.ravel() / examples

  found = optimize.minimize(
    value,
    np.zeros((width + 1) * outputs),
    jac=True,
    method='L-BFGS-B',
    options={'maxiter': 300, 'ftol': 1e-11, 'gtol': 1e-6},
  ).x.reshape(width + 1, outputs)
  return scale @ found[:-1], found[-1]


PLATT_STEPS = 30


def platt(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  r"""Fits a sigmoid :math:`p = \sigma(\alpha s + \beta)` to the scores of each column.

  Newton steps on the log-likelihood, for all columns at once. The targets of the n_+
  positive and n_- negative examples are (n_+ + 1) / (n_+ + 2) and 1 / (n_- + 2), so
  that the optimum is finite even if the scores separate the examples.

  Args:
    scores: (N, K).
    targets: (N, K) bool.

  Returns:
    (alpha (K,), beta (K,)).

  Source: Platt, Probabilistic Outputs for Support Vector Machines, 1999; Newton's
  method as in Lin et al., Machine Learning 68, 2007.
  """
  from scipy import special

  positive = targets.sum(0)
  high, low = (positive + 1) / (positive + 2), 1 / (len(targets) - positive + 2)
  wanted = np.where(targets, high, low)
  spread = scores.std(0)
  z = (scores - scores.mean(0)) / np.where(spread > 0, spread, 1)
  alpha, beta = np.zeros(z.shape[1]), np.log((positive + 1) / (1 + (~targets).sum(0)))
  for _ in range(PLATT_STEPS):
    p = special.expit(alpha * z + beta)
    error, curve = p - wanted, p * (1 - p) + 1e-12
    g, h = (error * z).sum(0), error.sum(0)
    a, b, c = (curve * z * z).sum(0) + 1e-9, (curve * z).sum(0), curve.sum(0)
    determinant = a * c - b * b
    alpha = alpha - np.clip((c * g - b * h) / determinant, -2, 2)
    beta = beta - np.clip((a * h - b * g) / determinant, -2, 2)
  alpha = alpha / np.where(spread > 0, spread, 1)
  return alpha, beta - alpha * scores.mean(0)


def _coded(seen: Seen) -> Params:
  """Returns the threshold of attributes and their prior among the fitted classes."""
  codes, threshold = binary(seen.raw)
  return {
    'threshold': np.float64(threshold),
    'prior': codes[seen.fitted].mean(0),
  }


def attribute_classifiers(seen: Seen, sets: Sequence[Hyper]) -> Iterator[Params]:
  r"""Fits the probability of each attribute: ridge regression, then a sigmoid.

  .. math::
    w_m = (\tilde X^\top \tilde X + \lambda I)^{-1} \tilde X^\top a_m, \qquad
    p(a_m = 1 \mid x) = \sigma(\alpha_m\, x^\top w_m + \beta_m)

  with centred features and the attributes of each image's class. All attributes share
  one eigendecomposition.

  Source: Lampert et al., TPAMI 36(3), 2014, section 4, which uses kernel machines
  instead of ridge regression.
  """
  codes, _ = binary(seen.raw)
  wanted = codes[seen.y]
  centred = seen.x - seen.x.mean(0)
  values, vectors = np.linalg.eigh(centred.T @ centred)
  turned = vectors.T @ (centred.T @ wanted)
  for one in sets:
    weights = vectors @ (turned / (np.maximum(values, 0) + one['penalty'])[:, None])
    alpha, beta = platt(seen.x @ weights, wanted)
    yield {'kernel': weights * alpha, 'bias': beta, **_coded(seen)}


def _attribute_probability(params: Params, x: np.ndarray) -> np.ndarray:
  from scipy import special

  return special.expit(x @ params['kernel'] + params['bias'])


def direct(probability: np.ndarray, params: Params, raw: np.ndarray) -> np.ndarray:
  """Returns the scores of direct attribute prediction, see `described.direct`."""
  codes = (raw > params['threshold']).astype(np.float64)
  varies = (params['prior'] > 0) & (params['prior'] < 1)
  p, q = (np.clip(v, 1e-6, 1 - 1e-6) for v in (probability, params['prior']))
  has = (np.log(p) - np.log(q)) * varies
  lacks = (np.log1p(-p) - np.log1p(-q)) * varies
  return has @ codes.T + lacks @ (1 - codes.T)


def dap_scores(
  params: Params, x: np.ndarray, described: np.ndarray, raw: np.ndarray
) -> np.ndarray:
  """Returns `direct` for the attributes' probabilities."""
  del described
  return direct(_attribute_probability(params, x), params, raw)


def hamming_scores(
  params: Params, x: np.ndarray, described: np.ndarray, raw: np.ndarray
) -> np.ndarray:
  """Returns minus the number of attributes that are predicted wrongly."""
  del described
  has = (_attribute_probability(params, x) >= 0.5).astype(np.float64)
  codes = (raw > params['threshold']).astype(np.float64)
  return -(has @ (1 - codes.T) + (1 - has) @ codes.T)


def cosine_scores(
  params: Params, x: np.ndarray, described: np.ndarray, raw: np.ndarray
) -> np.ndarray:
  """Returns cosines between the attributes' probabilities and the attributes."""
  del described
  codes = (raw > params['threshold']).astype(np.float64)
  return cosines(_attribute_probability(params, x), codes)


def seen_classifier(seen: Seen, sets: Sequence[Hyper]) -> Iterator[Params]:
  """Fits a softmax over the fitted classes; it cannot predict other classes itself."""
  places = np.flatnonzero(seen.fitted)
  targets = (seen.y[:, None] == places[None]).astype(np.float64)
  classes = len(seen.fitted)
  for one in sets:
    weights, offsets = softmax_regression(seen.x, targets, one['penalty'])
    kernel, bias = np.zeros((seen.x.shape[1], classes)), np.full(classes, -1e9)
    kernel[:, places], bias[places] = weights, offsets
    yield {'kernel': kernel, 'bias': bias, **_coded(seen)}


def _seen_probability(params: Params, x: np.ndarray) -> np.ndarray:
  from scipy import special

  return special.softmax(x @ params['kernel'] + params['bias'], axis=1)


def iap_scores(
  params: Params, x: np.ndarray, described: np.ndarray, raw: np.ndarray
) -> np.ndarray:
  """Returns `direct` for the attributes expected from the class probabilities."""
  del described
  codes = (raw > params['threshold']).astype(np.float64)
  return direct(_seen_probability(params, x) @ codes, params, raw)


def conse_scores(
  params: Params, x: np.ndarray, described: np.ndarray, raw: np.ndarray, top: int = 10
) -> np.ndarray:
  """Returns cosines with the average description of the most likely classes."""
  del raw
  probability = _seen_probability(params, x)
  least = np.sort(probability, axis=1)[:, -min(top, probability.shape[1])]
  kept = np.where(probability >= least[:, None], probability, 0)
  return cosines(kept @ described, described)


PENALTIES: dict[str, Any] = {'penalty': (1.0, 10.0, 100.0)}

RIDGES: dict[str, Any] = {'penalty': tuple(10.0**power for power in range(-2, 4))}

WEIGHTS: dict[str, Any] = {'weight': tuple(10.0**power for power in range(-4, 7))}

CODED = ('kernel', 'bias', 'threshold', 'prior')

FORMS: dict[str, ClosedForm] = {
  'eszsl': ClosedForm(
    eszsl, bilinear_scores, {'g': POWERS, 'l': POWERS}, reads=('scale',)
  ),
  'kernel_eszsl': ClosedForm(
    kernel_eszsl,
    kernel_scores,
    {'width': (0.5, 1.0), 'g': (1e-2, 1e-1, 1.0, 10.0), 'l': (1e-2, 1e-1, 1.0, 10.0)},
    ('kernel', 'support', 'width'),
  ),
  'sae': ClosedForm(sae, in_attributes_scores, WEIGHTS, reads=('scale',)),
  'sae_features': ClosedForm(sae, in_features_scores, WEIGHTS, reads=('scale',)),
  'dap': ClosedForm(attribute_classifiers, dap_scores, RIDGES, CODED),
  'nearest_hamming': ClosedForm(
    attribute_classifiers, hamming_scores, PENALTIES, CODED
  ),
  'nearest_cosine': ClosedForm(attribute_classifiers, cosine_scores, RIDGES, CODED),
  'iap': ClosedForm(seen_classifier, iap_scores, PENALTIES, CODED),
  'conse': ClosedForm(seen_classifier, conse_scores, PENALTIES, CODED, ('top',)),
}
"""Name -> method. Its recipe sets the matching head."""
