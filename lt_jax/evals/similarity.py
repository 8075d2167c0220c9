r"""How near the classes of a source are to a target, and which ones suit it best.

A domain is the mean feature of each class with its number of images as weight. The
distance between two domains is the least cost of moving one's weights onto the other's,
over Euclidean distances between means: the earth mover's distance, computed exactly.

Source: Cui et al., CVPR 2018, arXiv 1806.06193, sections 3.2 and 4, and the authors'
demonstration.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lt_jax.errors import UserError, lookup

GAMMA = 0.01
MIN_IMAGES = 200

MOST_WITHOUT_POT = 40_000
"""The largest number of class pairs for SciPy's linear programme instead of POT."""

MOST_ITERATIONS = 10_000_000


class Domain(NamedTuple):
  """The classes of a data set as points with weights.

  Attributes:
    name: name of the data set.
    classes: names of the K classes.
    means: (K, D) float64, the mean feature of each class.
    counts: (K,) images per class.
  """

  name: str
  classes: tuple[str, ...]
  means: np.ndarray
  counts: np.ndarray

  @property
  def weights(self) -> np.ndarray:
    """(K,) shares of the images."""
    return self.counts / self.counts.sum()


class Similarity(NamedTuple):
  """How a source and a target compare.

  Attributes:
    emd: the earth mover's distance.
    similarity: exp(-gamma emd).
    flow: (Ks, Kt), how much of the weight of a source class goes to a target class.
  """

  emd: float
  similarity: float
  flow: np.ndarray


def domain(
  name: str,
  features: np.ndarray,
  labels: np.ndarray,
  classes: Sequence[str],
  min_images: int = 0,
) -> Domain:
  """Returns the domain of labelled features.

  Args:
    name: name of the data set.
    features: (N, D).
    labels: (N,) int, -1 for images of no class.
    classes: names of the C classes.
    min_images: classes with fewer images are left out.

  Raises:
    UserError: a feature is not finite, or no class is left.

  Examples:
    >>> features, labels = np.array([[0.0], [2.0], [9.0]]), np.array([0, 0, 1])
    >>> domain('photos', features, labels, classes=('cat', 'dog')).means.tolist()
    [[1.0], [9.0]]
  """
  rows = np.flatnonzero(labels >= 0)
  values = np.asarray(features, np.float64).reshape(len(features), -1)
  bad = ~np.isfinite(values).all(1)
  if bad.any():
    raise UserError(f'{name}: the features of image {bad.argmax()} are not finite')
  counts = np.bincount(labels[rows], minlength=len(classes))
  sums = np.zeros((len(classes), values.shape[1]))
  np.add.at(sums, labels[rows], values[rows])
  kept = np.flatnonzero(counts >= max(1, min_images))
  if not len(kept):
    most = counts.max(initial=0)
    raise UserError(
      f'{name}: no class has {min_images} images (the largest has {most}): '
      'lower --min_images'
    )
  return Domain(
    name,
    tuple(classes[k] for k in kept),
    sums[kept] / counts[kept, None],
    counts[kept],
  )


def joined(name: str, domains: Sequence[Domain]) -> Domain:
  """Joins several domains into one with all their classes and image counts.

  Examples:
    >>> one = Domain('photos', ('cat',), np.array([[0.0]]), np.array([5]))
    >>> joined('both', [one, one._replace(name='sketches')]).classes
    ('photos/cat', 'sketches/cat')
  """
  return Domain(
    name,
    tuple(f'{one.name}/{label}' for one in domains for label in one.classes),
    np.concatenate([one.means for one in domains]),
    np.concatenate([one.counts for one in domains]),
  )


def distances(source: Domain, target: Domain) -> np.ndarray:
  """Returns the Euclidean distances between class means, (Ks, Kt).

  Raises:
    UserError: the features have different sizes.

  Examples:
    >>> source = Domain('s', ('cat', 'dog'), np.array([[0.0], [6.0]]), np.array([1, 1]))
    >>> target = Domain('t', ('fox',), np.array([[1.0]]), np.array([1]))

    >>> distances(source, target).tolist()
    [[1.0], [5.0]]
  """
  from scipy.spatial.distance import cdist

  widths = source.means.shape[1], target.means.shape[1]
  if widths[0] != widths[1]:
    raise UserError(
      f'{source.name} has {widths[0]} features per image and {target.name} '
      f'{widths[1]}: they must come from the same network'
    )
  return cdist(source.means, target.means)


def solver() -> str:
  """Returns the name of the transport solver: 'POT VERSION' or 'SciPy'."""
  try:
    import ot
  except ImportError:
    return 'SciPy'
  return f'POT {ot.__version__}'


def transport(
  supply: np.ndarray,
  demand: np.ndarray,
  cost: np.ndarray,
  most_iterations: int = MOST_ITERATIONS,
) -> tuple[float, np.ndarray]:
  """Returns (least cost, plan) for moving a supply onto a demand.

  Uses POT's network simplex, which is exact. Without POT it uses SciPy's linear
  programme, which is exact too but only suits small problems.

  Args:
    supply: (S,), sums to one.
    demand: (T,), sums to one.
    cost: (S, T) per unit.
    most_iterations: limit for POT.

  Raises:
    UserError: it did not converge, or POT is needed and not installed.

  Examples:
    >>> cost, plan = transport([1.0], [0.75, 0.25], [[0.0, 4.0]])
    >>> round(cost, 3), plan.round(3).tolist()
    (1.0, [[0.75, 0.25]])
  """
  supply, demand = (np.asarray(x, np.float64) / np.sum(x) for x in (supply, demand))
  cost = np.ascontiguousarray(cost, np.float64)
  try:
    import ot
  except ImportError:
    return _linear_programme(supply, demand, cost)
  # If POT gives up, it warns and returns a cost that is too small.
  plan, log = ot.emd(supply, demand, cost, numItermax=most_iterations, log=True)
  if log['warning'] is not None:
    raise UserError(
      f'the earth mover’s distance for {cost.shape[0]} x {cost.shape[1]} classes did '
      f'not converge in {most_iterations} iterations: {log["warning"]}'
    )
  return float(log['cost']), plan


def _linear_programme(
  supply: np.ndarray, demand: np.ndarray, cost: np.ndarray
) -> tuple[float, np.ndarray]:
  """Solves the problem of `transport` with SciPy."""
  from scipy import sparse
  from scipy.optimize import linprog

  rows, columns = cost.shape
  if cost.size > MOST_WITHOUT_POT:
    raise UserError(
      f'{rows} x {columns} classes are too many for SciPy: install POT, an exact and '
      "fast solver, with pip install 'lt_jax[similarity]'"
    )
  sums = sparse.vstack(
    [
      sparse.kron(sparse.eye(rows), np.ones((1, columns))),
      sparse.kron(np.ones((1, rows)), sparse.eye(columns)),
    ]
  ).tocsr()
  # One sum follows from the others; with rounding it would contradict them.
  found = linprog(
    cost.ravel(), A_eq=sums[:-1], b_eq=np.concatenate([supply, demand])[:-1]
  )
  if found.status:
    raise UserError(f'the earth mover’s distance did not converge: {found.message}')
  return float(found.fun), found.x.reshape(cost.shape)


def similarity(source: Domain, target: Domain, gamma: float = GAMMA) -> Similarity:
  r"""Returns how similar a source is to a target.

  .. math:: \exp(-\gamma\, \mathrm{EMD}(S, T))

  Args:
    source: S.
    target: T.
    gamma: a scale, which does not affect the order. 0.01 fits the paper's features.

  Raises:
    UserError: gamma is not positive; or as for `transport`.

  Examples:
    >>> source = Domain('s', ('cat', 'dog'), np.array([[0.0], [6.0]]), np.array([1, 1]))
    >>> target = Domain('t', ('fox',), np.array([[1.0]]), np.array([1]))

    >>> found = similarity(source, target, gamma=0.01)
    >>> round(found.emd, 3), round(found.similarity, 3)  # (1 + 5) / 2, exp(-0.03)
    (3.0, 0.97)
  """
  if not gamma > 0 or not np.isfinite(gamma):
    raise UserError(f'gamma is {gamma}; it must be positive and finite')
  cost = distances(source, target)
  emd, flow = transport(source.weights, target.weights, cost)
  return Similarity(emd, float(np.exp(-gamma * emd)), flow)


def class_distances(source: Domain, target: Domain) -> np.ndarray:
  r"""Returns the distance of each single source class from a target, (Ks,).

  A single class must ship all its weight, so there is nothing to optimise:

  .. math:: \mathrm{EMD}(\{s_i\}, T) = \sum_j w_j |s_i - t_j|

  Examples:
    >>> source = Domain('s', ('cat', 'dog'), np.array([[0.0], [6.0]]), np.array([1, 1]))
    >>> target = Domain('t', ('fox',), np.array([[1.0]]), np.array([1]))

    >>> class_distances(source, target).tolist()
    [1.0, 5.0]
  """
  return distances(source, target) @ target.weights


def _nearest_to_all(source: Domain, target: Domain) -> np.ndarray:
  """Returns the scores of the paper's rule: the distance to the whole target."""
  return class_distances(source, target)


def _nearest_to_any(source: Domain, target: Domain) -> np.ndarray:
  """Returns each class's best rank among the nearest classes of a target class.

  For a target of several groups, where the paper's rule would favour classes in the
  middle. This rule is ours.
  """
  cost = distances(source, target)
  rank = cost.argsort(0, kind='stable').argsort(0, kind='stable')
  best = rank.min(1)
  tie = cost.min(1)
  return best + tie / (1 + tie.max())


def _mass_that_is_shipped(source: Domain, target: Domain) -> np.ndarray:
  """Returns minus the weight that each class ships if supplies are unlimited.

  Each target class then takes everything from its nearest source class. Classes that
  ship nothing follow, by distance. This rule is ours.
  """
  cost = distances(source, target)
  shipped = np.zeros(len(cost))
  np.add.at(shipped, cost.argmin(0), target.weights)
  tie = cost.min(1)
  return np.where(shipped > 0, -shipped, tie / (1 + tie.max()))


RULES = {
  'greedy': _nearest_to_all,
  'per_target_class': _nearest_to_any,
  'transport': _mass_that_is_shipped,
}
"""name -> (source, target) -> (Ks,) scores; the lowest are chosen."""


def select(
  source: Domain, targets: Sequence[Domain], most: Sequence[int], rule: str = 'greedy'
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns the source classes that suit the targets best.

  Args:
    source: the classes to choose from.
    targets: the targets to choose them for.
    most: how many classes per target, or one number for all; capped at Ks.
    rule: a key of `RULES`; 'greedy' is the paper's.

  Returns:
    ((M,) positions, ascending and unique; target -> (Ks,) scores, lower is better).

  Raises:
    UserError: an unknown rule, or the wrong number of `most`.

  Examples:
    >>> source = Domain('s', ('cat', 'dog'), np.array([[0.0], [6.0]]), np.array([1, 1]))
    >>> target = Domain('t', ('fox',), np.array([[1.0]]), np.array([1]))

    >>> select(source, [target], most=[1])[0].tolist()
    [0]
  """
  score = lookup(RULES, 'selection rule', rule)
  if len(most) == 1:
    most = [*most] * len(targets)
  if len(most) != len(targets) or min(most) < 1:
    needed = '1 target needs one number of classes, at least 1'
    if len(targets) > 1:
      needed = (
        f'{len(targets)} targets need {len(targets)} numbers of classes, each at least '
        '1, or one for all'
      )
    raise UserError(f'{needed}; got {", ".join(map(str, most))}')
  scores = {target.name: score(source, target) for target in targets}
  chosen = {
    int(place)
    for target, k in zip(targets, most, strict=True)
    for place in np.argsort(scores[target.name], kind='stable')[:k]
  }
  return np.array(sorted(chosen)), scores


def correlations(
  similar: Sequence[float], accuracy: Sequence[float], target: Sequence[str]
) -> dict[str, Any]:
  """Returns how well similarity predicts the best source for each target.

  Accuracies of different targets are not comparable, so the correlation pooled over
  targets means little and can even mislead. It is included as a warning.

  Args:
    similar: similarity of each pair of a source and a target.
    accuracy: accuracy of each pair.
    target: target of each pair.

  Returns:
    'by_target': target -> Pearson's r over its sources; 'best': for how many targets
    the most similar source is the best one; 'centred': r and Spearman's rho after
    subtracting each target's mean; 'pooled': the same without subtracting. None if a
    value is undefined.

  Examples:
    >>> found = correlations([0.9, 0.5, 0.8], [0.7, 0.3, 0.6], target=['a', 'a', 'a'])
    >>> round(found['by_target']['a'], 3), int(found['best']), found['targets']
    (1.0, 1, 1)
  """
  similar, accuracy = (np.asarray(x, np.float64) for x in (similar, accuracy))
  groups = {name: np.array(target) == name for name in dict.fromkeys(target)}
  centred = [x.copy() for x in (similar, accuracy)]
  for own in groups.values():
    for x in centred:
      x[own] -= x[own].mean()
  return {
    'by_target': {
      name: _pearson(similar[own], accuracy[own]) for name, own in groups.items()
    },
    'best': sum(
      similar[own].argmax() == accuracy[own].argmax() for own in groups.values()
    ),
    'targets': len(groups),
    'centred': {'pearson': _pearson(*centred), 'spearman': _spearman(*centred)},
    'pooled': {
      'pearson': _pearson(similar, accuracy),
      'spearman': _spearman(similar, accuracy),
    },
  }


def _pearson(x: np.ndarray, y: np.ndarray) -> float | None:
  if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
    return None
  return float(np.corrcoef(x, y)[0, 1])


def _spearman(x: np.ndarray, y: np.ndarray) -> float | None:
  from scipy.stats import rankdata

  return _pearson(rankdata(x), rankdata(y))


def matrix(
  sources: Mapping[str, Domain],
  targets: Mapping[str, Domain],
  gamma: float = GAMMA,
) -> dict[tuple[str, str], Similarity]:
  """Returns (source, target) -> similarity for every pair.

  Examples:
    >>> source = Domain('s', ('cat', 'dog'), np.array([[0.0], [6.0]]), np.array([1, 1]))
    >>> target = Domain('t', ('fox',), np.array([[1.0]]), np.array([1]))

    >>> found = matrix({'s': source}, {'t': target})
    >>> {pair: round(one.similarity, 3) for pair, one in found.items()}
    {('s', 't'): 0.97}
  """
  return {
    (s, t): similarity(source, target, gamma)
    for s, source in sources.items()
    for t, target in targets.items()
  }
