"""Metrics by domain, their means over domains, and how far apart domains are."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lt_jax.evals.collect import Collected

Metrics = dict[str, Any]


def split_by_domain(records: Collected, names: Sequence[str]) -> dict[str, Collected]:
  """Returns domain -> the records of its images.

  Args:
    records: (N, ...) arrays over images, with 'domain' (N,) if there are several.
    names: names of the domains, in the order of their numbers.

  Examples:
    >>> records = {'label': np.array([3, 4, 5]), 'domain': np.array([0, 1, 0])}
    >>> found = split_by_domain(records, ['photo', 'sketch'])
    >>> {name: one['label'].tolist() for name, one in found.items()}
    {'photo': [3, 5], 'sketch': [4]}
  """
  if len(names) == 1:
    return {names[0]: records}
  of_domain = [records['domain'] == number for number in range(len(names))]
  return {
    name: {key: values[mask] for key, values in records.items()}
    for name, mask in zip(names, of_domain, strict=True)
  }


def records_by_domain(
  records: Mapping[str, Collected], names: Sequence[str]
) -> dict[str, Collected]:
  """Returns domain -> the records of its test images.

  Args:
    records: split -> records; 'test' has the domains `names`, and 'NAME/test' another
      one.
    names: the domains of 'test', in the order of their numbers; they come first.
  """
  others = {
    name.removesuffix('/test'): found
    for name, found in records.items()
    if name.endswith('/test')
  }
  return split_by_domain(records['test'], names) | others


def sampled(records: Collected, most: int) -> Collected:
  """Returns features, labels and predictions of evenly spaced images.

  Args:
    records: with 'features', 'label' and 'prediction', the images first.
    most: the largest number of images.
  """
  last = len(records['label']) - 1
  rows = np.unique(np.linspace(0, last, most).round().astype(int))
  return {name: records[name][rows] for name in ('features', 'label', 'prediction')}


def of_domains(domains: Mapping[str, Collected], most: int) -> Collected:
  """Returns the `sampled` images of every domain, joined.

  Args:
    domains: name -> records.
    most: the largest number of images per domain.

  Returns:
    the arrays of `sampled`, 'domain' (N,) int32 and 'domains', the names it indexes.
  """
  parts = [sampled(records, most) for records in domains.values()]
  sizes = [len(part['label']) for part in parts]
  return {
    **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
    'domain': np.repeat(np.arange(len(parts), dtype=np.int32), sizes),
    'domains': np.array([*domains]),
  }


def mean_metrics(domains: Sequence[Mapping[str, Any]]) -> Metrics:
  """Returns metrics averaged over domains, all with the same weight.

  A number is None if any domain lacks it. Each entry of an array is averaged over the
  domains in which it is finite.

  Examples:
    >>> mean_metrics([{'accuracy': 0.5, 'ece': None}, {'accuracy': 1.0, 'ece': 0.1}])
    {'accuracy': 0.75, 'ece': None}
  """
  first, *others = domains
  if not others:
    return dict(first)
  found: Metrics = {}
  for key, value in first.items():
    values = [one.get(key) for one in domains]
    if isinstance(value, np.ndarray):
      found[key] = _nanmean(np.stack(values).astype(np.float64))
    elif all(isinstance(one, int | float) for one in values):
      found[key] = float(np.mean(values))
    else:
      found[key] = None
  return found


def _nanmean(values: np.ndarray) -> np.ndarray:
  """Returns the mean of finite values over axis 0; NaN where there are none."""
  finite = np.isfinite(values)
  total = np.where(finite, values, 0.0).sum(axis=0)
  return np.divide(
    total, finite.sum(0), out=np.full(total.shape, np.nan), where=finite.any(axis=0)
  )


def gap_coverage(
  accuracy: float, source_only: float, target_only: float
) -> float | None:
  """Returns how much of the gap between two controls a method closes.

  .. math:: (a - a_{source}) / (a_{target} - a_{source})

  0 is as good as no adaptation, 1 as training on the target's labels; negative values
  are negative transfer. None if there is no gap.

  Args:
    accuracy: that of the method on the target's test images.
    source_only: that of a network trained on the source alone.
    target_only: that of a network trained on the target's labels.

  Examples:
    >>> round(gap_coverage(0.7, source_only=0.5, target_only=0.9), 3)
    0.5

  Source: Ganin and Lempitsky, ICML 2015, arXiv 1409.7495, table 1.
  """
  gap = target_only - source_only
  return (accuracy - source_only) / gap if gap > 0 else None


FEWEST_COMPARED = 20
"""The smallest number of images per domain for a distance between domains."""

COSTS = (1e-3, 1e-2, 1e-1)
"""Costs of an error to choose from, for a support vector machine."""


def proxy_a_distance(source: np.ndarray, target: np.ndarray) -> float | None:
  r"""Returns how well a linear classifier separates the features of two domains.

  .. math:: \hat d_A = 2 (1 - 2 \epsilon)

  with the error of a linear support vector machine. 0: it separates the domains no
  better than chance, 2: without an error. It is fitted on half of the features, with
  equally many from each domain, and the error is measured on the other half. Its cost
  is chosen within the first half, by fitting on one half of that. The random draws have
  a fixed seed, so the result only depends on the arguments.

  Args:
    source: (S, D).
    target: (T, D).

  Returns:
    The distance; None if there are too few features or some are not finite.

  Examples:
    >>> proxy_a_distance(np.zeros((40, 1)), np.ones((40, 1)))
    2.0

  Source: Ben-David et al., "Analysis of Representations for Domain Adaptation", NIPS
  2006, and "A theory of learning from different domains", Machine Learning 79, 2010.
  A linear support vector machine, as in Ganin et al., JMLR 17(59), 2016; its cost is
  chosen within the half it is fitted to, since the held-out half measures the error.
  """
  size = min(len(source), len(target)) // 2
  if size < FEWEST_COMPARED // 2:
    return None
  if not (np.isfinite(source).all() and np.isfinite(target).all()):
    return None
  rng = np.random.default_rng(0)
  both = [x[rng.permutation(len(x))[: 2 * size]] for x in (source, target)]
  features = np.stack(both).astype(np.float64)
  half, held_out = features[:, :size], features[:, size:]
  fit, chosen_on = half[:, : size // 2], half[:, size // 2 :]
  cost = min(COSTS, key=lambda cost: _domain_error(fit, chosen_on, cost))
  return max(0.0, 2 * (1 - 2 * _domain_error(half, held_out, cost)))


def _domain_error(fit: np.ndarray, held_out: np.ndarray, cost: float) -> float:
  """Returns the error of a linear classifier of two domains.

  Args:
    fit: (2, N, D) features of both domains to fit it to.
    held_out: (2, M, D) other features, to measure the error on.
    cost: of an error in the fit.
  """
  from sklearn.exceptions import ConvergenceWarning
  from sklearn.svm import LinearSVC

  mean, deviation = fit.mean(axis=(0, 1)), fit.std(axis=(0, 1))
  scale = np.where(deviation > 0, deviation, 1)

  def scaled(x: np.ndarray) -> np.ndarray:
    return ((x - mean) / scale).reshape(-1, x.shape[-1])

  def domain(x: np.ndarray) -> np.ndarray:
    return np.repeat((0, 1), x.shape[1])

  machine = LinearSVC(C=cost, dual=False)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', ConvergenceWarning)  # still an estimate
    machine.fit(scaled(fit), domain(fit))
  return float((machine.predict(scaled(held_out)) != domain(held_out)).mean())
