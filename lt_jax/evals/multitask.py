"""Several tasks per image, each with the metric of its kind.

Softmax by accuracy, sigmoid by the mean over its labels of the 11-point average
precision of VOC 2007, regression by the coefficient of determination; of all of these
more is better, so their mean is a number to choose by.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lt_jax.evals import classification
from lt_jax.evals.collect import Collected
from lt_jax.evals.tasks import Metric, Record, Task
from lt_jax.losses.tasks import KINDS
from lt_jax.method import Batch, Outputs


def record(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns the records of classification, and outputs and labels of the other tasks.

  Args:
    outputs: with 'KIND/NAME' (B, K) of the other tasks.
    batch: with 'NAME' for the tasks that these images belong to.
  """
  return classification.record(outputs, batch) | _others(outputs, batch)


def _others(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  found = {}
  for key, value in outputs.items():
    kind, _, name = key.partition('/')
    if kind in KINDS and name in batch:
      found |= {f'{key}/output': value, f'{key}/label': batch[name]}
  return found


@functools.cache
def _kept(inner: Record) -> Record:
  return lambda outputs, batch: inner(outputs, batch) | _others(outputs, batch)


def keep(examples: int, classes: int) -> Record:
  """Returns the function that keeps a test split, see `classification.keep`."""
  return _kept(classification.keep(examples, classes))


def accuracy(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
  """Returns the share of images (N,) with a label whose class is the arg max.

  Examples:
    >>> accuracy(np.eye(2), np.array([0, 0])), accuracy(np.eye(2), np.array([0, -1]))
    ({'accuracy': 0.5}, {'accuracy': 1.0})
  """
  valid = labels >= 0
  right = outputs[valid].argmax(-1) == labels[valid]
  return {'accuracy': float(right.mean()) if valid.any() else None}


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float | None:
  r"""Returns the 11-point average precision of one label.

  .. math:: \frac1{11} \sum_{t \in \{0, 0.1, \dots, 1\}} \max_{r \ge t} p(r)

  Args:
    scores: (N,).
    labels: (N,) int, 1 or 0, -1 for images that do not count.

  Returns:
    None where no image has the label.

  Examples:
    >>> scores, labels = np.array([0.9, 0.8, 0.7]), np.array([1, 0, 1])
    >>> round(average_precision(scores, labels), 3)  # (6 * 1 + 5 * 2/3) / 11
    0.848

  Source: Everingham et al., IJCV 88, 2010, section 4.2.
  """
  valid = labels >= 0
  scores, positive = scores[valid], labels[valid] == 1
  if not positive.any():
    return None
  hits = positive[np.argsort(-scores, kind='stable')].cumsum()
  precision = hits / np.arange(1, len(hits) + 1)
  # Recall in whole tenths, which floats would not hold exactly.
  best = [
    precision[10 * hits >= tenth * hits[-1]].max(initial=0.0) for tenth in range(11)
  ]
  return float(np.mean(best))


def mean_average_precision(
  outputs: np.ndarray, labels: np.ndarray
) -> dict[str, float | None]:
  """Returns the mean of `average_precision` over labels (N, K).

  Examples:
    >>> mean_average_precision(np.array([[0.9], [0.1]]), np.array([[1], [0]]))
    {'map': 1.0}
  """
  labels = labels.reshape(outputs.shape)
  found = [average_precision(s, y) for s, y in zip(outputs.T, labels.T, strict=True)]
  there = [value for value in found if value is not None]
  return {'map': float(np.mean(there)) if there else None}


def determination(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
  """Returns R^2 over all values, and the root mean squared error.

  Examples:
    >>> determination(np.array([1.0, 1.0]), np.array([0.0, 2.0]))
    {'r2': 0.0, 'rmse': 1.0}
  """
  outputs, labels = (
    x.astype(np.float64).reshape(len(x), -1) for x in (outputs, labels)
  )
  valid = np.isfinite(labels)
  if not valid.any():
    return {'r2': None, 'rmse': None}
  error = float(((outputs - labels)[valid] ** 2).mean())
  spread = float(labels[valid].var())
  return {'r2': 1 - error / spread if spread else None, 'rmse': error**0.5}


MEASURES: dict[str, Callable[..., dict[str, float | None]]] = {
  'softmax': accuracy,
  'sigmoid': mean_average_precision,
  'regression': determination,
}
"""Kind -> measures, of which the first one counts."""


def measure(
  records: Collected, *, num_classes: int, groups: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Returns what classification measures, and of each other task its measures.

  They are called NAME_MEASURE; 'task_mean' is the mean of the first of each task, the
  classes' accuracy among them, None where one has none.
  """
  found = classification.measure(records, num_classes=num_classes, groups=groups)
  firsts = [found['accuracy']]
  for key in records:
    kind, _, rest = key.partition('/')
    if kind in MEASURES and rest.endswith('/output'):
      name = rest.removesuffix('/output')
      values = MEASURES[kind](records[key], records[f'{kind}/{name}/label'])
      firsts.append(next(iter(values.values())))
      found |= {f'{name}_{what}': value for what, value in values.items()}
  mean = None if None in firsts else float(np.mean(firsts))
  return found | {'task_mean': mean}


MULTITASK = Task(
  record,
  keep,
  measure,
  classification.across,
  {**classification.METRICS, 'task_mean': Metric('mean over tasks')},
)


def relative_gain(
  together: Mapping[str, float], alone: Mapping[str, float], better: Mapping[str, int]
) -> float | None:
  r"""Returns the mean relative gain of learning together.

  .. math:: \frac1K \sum_k (\pm)_k \frac{M_k - M_k^{single}}{M_k^{single}}

  Args:
    together: task -> measure.
    alone: task -> measure of a network that only learned this task.
    better: task -> 1 if more is better, -1 if less is.

  Returns:
    The gain; None if a control is missing or not positive.

  Examples:
    >>> alone, better = {'acc': 0.5, 'rmse': 2.0}, {'acc': 1, 'rmse': -1}
    >>> relative_gain({'acc': 0.6, 'rmse': 1.0}, alone, better)  # (0.2 + 0.5) / 2
    0.35

  Source: Maninis et al., CVPR 2019, arXiv 1904.08918, equation 3.
  """
  if together.keys() != alone.keys() or not all(v and v > 0 for v in alone.values()):
    return None
  gains = [better[k] * (together[k] - v) / v for k, v in alone.items()]
  return float(np.mean(gains))
