"""Metrics by domain, and their means over domains; how much of a gap is covered."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lt_jax.evals.collect import Collected

Metrics = dict[str, Any]


def by_domain(
  records: Collected, names: Sequence[str], measure: Callable[[Collected], Metrics]
) -> dict[str, Metrics]:
  """Returns name of a domain -> its metrics.

  Args:
    records: (N, ...) arrays of images, with 'domain' (N,) where there are several.
    names: of the domains, in the order of their numbers.
    measure: records -> metrics.
  """
  if len(names) == 1:
    return {names[0]: measure(records)}
  of_domain = [records['domain'] == number for number in range(len(names))]
  return {
    name: measure({key: values[mask] for key, values in records.items()})
    for name, mask in zip(names, of_domain, strict=True)
  }


def mean_metrics(domains: Sequence[Mapping[str, Any]]) -> Metrics:
  """Returns metrics averaged over domains, each of which counts alike.

  A number is None where any domain has none; of an array each entry is averaged over
  the domains in which it is finite.
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
  """Returns the mean over axis 0 of what is finite; NaN where nothing is."""
  finite = np.isfinite(values)
  total = np.where(finite, values, 0.0).sum(axis=0)
  return np.divide(
    total, finite.sum(0), out=np.full(total.shape, np.nan), where=finite.any(axis=0)
  )


def gap_coverage(
  accuracy: float, source_only: float, target_only: float
) -> float | None:
  """Returns how much of the gap between two controls a method covers.

  .. math:: (a - a_{source}) / (a_{target} - a_{source})

  0 is as good as no adaptation, 1 as training on the target's labels; negative is
  negative transfer. None where there is no gap.

  Args:
    accuracy: of the method on the target's test images.
    source_only: of a network that saw the source alone.
    target_only: of one that was trained on the target's labels.

  Source: Ganin and Lempitsky, ICML 2015, arXiv 1409.7495, table 1.
  """
  gap = target_only - source_only
  return (accuracy - source_only) / gap if gap > 0 else None
