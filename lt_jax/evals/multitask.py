"""Several tasks per image, each with the metric of its kind.

Softmax has accuracy, sigmoid the mean over its labels of the 11-point average precision
of VOC 2007, regression the coefficient of determination. For all of these more is
better, so a State can be chosen by their mean.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lt_jax.evals import classification
from lt_jax.evals.collect import Collected
from lt_jax.evals.multilabel import average_precision
from lt_jax.evals.tasks import Across, Metric, Record, Task
from lt_jax.losses.tasks import KINDS
from lt_jax.method import Batch, Outputs


def record(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns the records of classification, with outputs and labels of other tasks.

  Args:
    outputs: has 'KIND/NAME' (B, K) for the other tasks.
    batch: has 'NAME' for the tasks of these images.
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
  """Returns the function that keeps records of a test split."""
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
"""Kind -> function that returns its measures, of which the first is averaged."""


def measure(
  records: Collected, *, num_classes: int, groups: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Returns the metrics of classification, and the measures of each other task.

  The latter are called NAME_MEASURE. 'task_mean' is the mean over tasks of the first
  measure, including the accuracy of the classes; None if one of them is undefined.
  """
  found = classification.measure(records, num_classes=num_classes, groups=groups)
  return found | _with_mean(found['accuracy'], _measured(records))


def _measured(records: Collected) -> dict[str, dict[str, float | None]]:
  """Returns task -> its measures, for the tasks with their own head."""
  found = {}
  for key in records:
    kind, _, rest = key.partition('/')
    if kind in MEASURES and rest.endswith('/output'):
      name = rest.removesuffix('/output')
      found[name] = MEASURES[kind](records[key], records[f'{kind}/{name}/label'])
  return found


def _with_mean(
  accuracy: float, tasks: Mapping[str, Mapping[str, float | None]]
) -> dict[str, float | None]:
  """Returns NAME_MEASURE for each task, and 'task_mean'."""
  firsts = [accuracy, *(next(iter(values.values())) for values in tasks.values())]
  return {
    **{
      f'{name}_{what}': value
      for name, values in tasks.items()
      for what, value in values.items()
    },
    'task_mean': None if None in firsts else float(np.mean(firsts)),
  }


def across(
  records: Mapping[str, Collected],
  *,
  num_classes: int,
  groups: Mapping[str, np.ndarray],
) -> Across:
  """Returns what classification returns, and measures of tasks with their own images.

  Args:
    records: split -> records; 'test/STREAM' for the test images of another stream,
      which have no class of the network's own head.
    num_classes: C.
    groups: name -> (C,) bool.
  """
  found = classification.across(records, num_classes=num_classes, groups=groups)
  others = [own for split, own in records.items() if split.startswith('test/')]
  if not others:
    return found
  test = records['test']
  accuracy = float((test['label'] == test['prediction']).mean())
  tasks = {
    name: values for own in (test, *others) for name, values in _measured(own).items()
  }
  more = found.metrics.get('test', {}) | _with_mean(accuracy, tasks)
  return found._replace(metrics={**found.metrics, 'test': more})


MULTITASK = Task(
  record,
  keep,
  measure,
  across,
  {**classification.METRICS, 'task_mean': Metric('mean over tasks')},
)


def relative_gain(
  together: Mapping[str, float], alone: Mapping[str, float], better: Mapping[str, int]
) -> float | None:
  r"""Returns the mean relative gain of learning together.

  .. math:: \frac1K \sum_k (\pm)_k \frac{M_k - M_k^{single}}{M_k^{single}}

  Args:
    together: task -> measure.
    alone: task -> measure of a network that learned only this task.
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
