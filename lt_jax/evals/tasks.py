"""Tasks: what a label is, and how predictions are measured against it.

You add a metric in one place: the task's `measure` computes it, and its line in the
task's `metrics` gives its name in tables and says whether a State can be selected by
it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lt_jax.evals import label_free
from lt_jax.evals.collect import Collected
from lt_jax.method import Batch, Outputs

Record = Callable[[Outputs, Batch], dict[str, jax.Array]]
Play = Callable[..., dict[str, dict[str, Any]]]
"""`predict` takes a State and images as they are stored."""


class Metric(NamedTuple):
  """How a metric is used.

  Attributes:
    title: its name in tables; with '' it is in result.json only.
    better: 1 if more is better, -1 if less is; 0 if no State is selected by it.
  """

  title: str = ''
  better: int = 1


class Across(NamedTuple):
  """Metrics that need several splits at once, such as the open set and the test set.

  Attributes:
    metrics: entry of result.json -> name -> value, added to those of `measure`.
    threshold: the value of the known score's threshold and how it was chosen; None
      without one.
    curves: score -> arrays by threshold.
    arrays: name -> the arrays of NAME.npz in the run's folder.
  """

  metrics: dict[str, dict[str, Any]] = {}
  threshold: dict[str, Any] | None = None
  curves: dict[str, dict[str, np.ndarray]] = {}
  arrays: dict[str, dict[str, np.ndarray]] = {}


def no_groups(counts: np.ndarray) -> dict[str, np.ndarray]:
  """Returns no groups, for a task that only measures the shot groups."""
  del counts
  return {}


class Task(NamedTuple):
  """What is measured, always from records of a split's examples.

  Attributes:
    record: (outputs, batch) -> arrays with the batch first, which `measure` needs.
    keep: (examples, classes) -> like `record`, plus what is saved for the test split.
    measure: (records, num_classes=, groups=) -> name -> value, for one split with
      labels of known classes.
    across: (records by split, num_classes=, groups=) -> `Across`.
    metrics: name -> how it is used, in the order of tables; the first is the headline.
    play: (predict, state, domain -> source of its test images) -> domain -> name ->
      value, for metrics that need the network itself rather than records; see `Play`.
      None for none.
    bind: (unseen classes (C,) bool, descriptions (C, A) or None, names of attributes)
      -> the task for these classes; None if the task treats all classes alike.
    criteria: like `record`, what label-free criteria are computed from.
    picture: like `record`, what samples.npz shows of a few test images; None: it shows
      errors on rare classes.
    per_pixel: whether every pixel has a label, and logits.
    by_class: the per-class metric (C,) whose mean over classes is in tables.
    groups: counts (C,) -> name -> (C,) bool, groups of classes that it measures besides
      the shot groups.
    reads: what batches of test images must have besides a label -> how to provide it.
  """

  record: Record
  keep: Callable[[int, int], Record]
  measure: Callable[..., dict[str, Any]]
  across: Callable[..., Across]
  metrics: Mapping[str, Metric]
  play: Play | None = None
  bind: Callable[..., 'Task'] | None = None
  criteria: Record = label_free.keep
  picture: Record | None = None
  per_pixel: bool = False
  by_class: str = 'class_accuracy'
  groups: Callable[[np.ndarray], dict[str, np.ndarray]] = no_groups
  reads: Mapping[str, str] = {}

  @property
  def headline(self) -> str:
    """The name of the headline metric."""
    return next(iter(self.metrics))


def no_more(records: Mapping[str, Collected], **facts: Any) -> Across:
  """Returns no metrics, for a task that measures nothing across splits."""
  del records, facts
  return Across()
