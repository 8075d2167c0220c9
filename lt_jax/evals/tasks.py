"""Tasks: what a label is, and how predictions are measured against it.

A metric is added in one place: it is computed by a task's `measure`, and its line in
the task's `metrics` says how tables call it and whether a State may be chosen by it.
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
    title: what tables call it; '' leaves it out of them, and in result.json.
    better: 1 if more is better, -1 if less is: a State can be chosen by it. 0: never.
  """

  title: str = ''
  better: int = 1


class Across(NamedTuple):
  """Metrics that need several splits at once, such as the open set and the test set.

  Attributes:
    metrics: places of result.json -> name -> value, beside those of `measure`.
    threshold: of the known score, how it was chosen and its value; None without one.
    curves: score -> arrays by threshold.
    arrays: name of a file -> what NAME.npz in the run's folder holds.
  """

  metrics: dict[str, dict[str, Any]] = {}
  threshold: dict[str, Any] | None = None
  curves: dict[str, dict[str, np.ndarray]] = {}
  arrays: dict[str, dict[str, np.ndarray]] = {}


def no_groups(counts: np.ndarray) -> dict[str, np.ndarray]:
  """Returns that a task measures no groups but the shot groups."""
  del counts
  return {}


class Task(NamedTuple):
  """What is measured; of a split, always from records of its examples.

  Attributes:
    record: (outputs, batch) -> arrays with the batch first: what `measure` needs.
    keep: (examples, classes) -> as `record`, with what is written of the test split.
    measure: (records, num_classes=, groups=) -> name -> value, of one split with
      labels of known classes.
    across: (records by split, num_classes=, groups=) -> `Across`.
    metrics: name -> how it is used, in the order of tables; the first is the headline.
    play: (predict, state, domain -> source of its test images) -> domain -> name ->
      value, what needs the network itself rather than records; see `Play`. None for
      nothing.
    bind: (unseen classes (C,) bool, descriptions (C, A) or None, names of attributes)
      -> the task for these classes; None of a task for which all classes are alike.
    criteria: as `record`, what label-free criteria are computed from.
    picture: as `record`, what samples.npz shows of a few test images; None: it shows
      errors on rare classes.
    per_pixel: whether every pixel has a label, and logits.
    by_class: the metric (C,) of single classes whose mean over them tables have.
    of_class: what figures call it.
    probability: from logits to what predictions are told by.
    groups: counts (C,) -> name -> (C,) bool, groups of classes that it measures beside
      the shot groups.
    reads: what batches of test images must have beside a label -> how data come by it.
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
  of_class: str = 'accuracy'
  probability: Callable[[jax.Array], jax.Array] = jax.nn.softmax
  groups: Callable[[np.ndarray], dict[str, np.ndarray]] = no_groups
  reads: Mapping[str, str] = {}

  @property
  def headline(self) -> str:
    """The name of the headline metric."""
    return next(iter(self.metrics))


def no_more(records: Mapping[str, Collected], **facts: Any) -> Across:
  """Returns that a task measures nothing across splits."""
  del records, facts
  return Across()
