"""Accuracy on known classes: overall, by class, by shot group."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

SHOTS = ('many', 'medium', 'few')
"""Names of the shot groups and of their metrics."""


def told_apart(groups: Iterable[str]) -> list[str]:
  """Returns the shot groups to show, in order.

  Args:
    groups: those with at least one class. A single group has all classes, so that its
      metric says nothing new.

  Examples:
    >>> told_apart({'few', 'many'}), told_apart(['medium'])
    (['many', 'few'], [])
  """
  given = {*groups}
  there = [name for name in SHOTS if name in given]
  return there if len(there) > 1 else []


def closed_set(
  label: np.ndarray,
  prediction: np.ndarray,
  *,
  num_classes: int,
  groups: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  r"""Returns accuracies on known images, all in [0, 1].

  With a_c the accuracy of class c over its test images:

  .. math::
    \text{macro} = \frac{1}{C'} \sum_c a_c, \qquad
    \text{harmonic mean} = C' \Big/ \sum_c \frac{1}{a_c}

  Classes without test images are left out of both means and of C'. A class with a_c = 0
  makes the harmonic mean 0. The value of a group is the mean a_c of its classes, None
  if none of them has test images.

  Args:
    label: (N,) int in [0, C).
    prediction: (N,) int in [0, C), or -1 where an image was rejected as unknown.
    num_classes: C.
    groups: name -> (C,) bool, such as the many-, medium- and few-shot classes.

  Returns:
    'accuracy' (over images), 'macro_accuracy', 'harmonic_mean', 'worst_class', one
    value per group, 'classes_counted' (C'); and the array 'class_accuracy' (C,), NaN
    where a class has no test images. There is no (C, C) confusion matrix: with 100,000
    classes it would need 80 GB, and labels and predictions say the same.

  Examples:
    >>> label, prediction = np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0])
    >>> groups = {'many': np.array([True, False]), 'few': np.array([False, True])}
    >>> found = closed_set(label, prediction, num_classes=2, groups=groups)
    >>> [found[name] for name in ('accuracy', 'macro_accuracy', 'many', 'few')]
    [0.75, 0.5, 1.0, 0.0]

  Source: the groups are those of Liu et al., arXiv 1904.05160, section 4.
  """
  right = label == prediction
  total = np.bincount(label, minlength=num_classes)
  hits = np.bincount(label[right], minlength=num_classes)
  there = total > 0
  by_class = np.divide(hits, total, out=np.full(num_classes, np.nan), where=there)
  seen = by_class[there]
  harmonic = len(seen) / (1 / seen).sum() if seen.size and seen.all() else 0.0
  return {
    'accuracy': float(right.mean()),
    'macro_accuracy': float(seen.mean()),
    **{name: _mean(by_class[mask & there]) for name, mask in groups.items()},
    'harmonic_mean': float(harmonic),
    'worst_class': float(seen.min()),
    'classes_counted': int(there.sum()),
    'class_accuracy': by_class,
  }


def _mean(values: np.ndarray) -> float | None:
  return float(values.mean()) if values.size else None
