"""Zero-shot recognition: several views of the same predictions, and their metrics.

With only the unseen classes to choose from (zero-shot), T is the accuracy on their
images. With all classes (generalised zero-shot), S is the accuracy on images of seen
classes, U that on unseen ones, and H their harmonic mean. Accuracies are means over the
classes with test images.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.data.attributes import binary
from lt_jax.evals import classification, segmentation
from lt_jax.evals.closed_set import closed_set
from lt_jax.evals.collect import Collected
from lt_jax.evals.tasks import Across, Metric, Record, Task
from lt_jax.method import Batch, Outputs

CURVE_POINTS = 1000
"""The largest number of points of a curve kept for plotting; the area uses all."""


def harmonic_mean(seen: Any, unseen: Any) -> Any:
  """Returns 2 S U / (S + U), 0 where both are 0.

  Examples:
    >>> round(float(harmonic_mean(0.6, 0.3)), 3), float(harmonic_mean(0.0, 0.0))
    (0.4, 0.0)
  """
  total = np.asarray(seen + unseen, np.float64)
  product = 2 * np.asarray(seen, np.float64) * unseen
  return np.divide(product, total, out=np.zeros(total.shape), where=total > 0)


class Scores(NamedTuple):
  """The best class of each kind per image, which calibrated stacking needs.

  Attributes:
    label: (N,) int.
    seen_score: (N,) the largest score of a seen class.
    seen_class: (N,) int, that class.
    unseen_score: (N,) the largest score of an unseen class.
    unseen_class: (N,) int.
  """

  label: np.ndarray
  seen_score: np.ndarray
  seen_class: np.ndarray
  unseen_score: np.ndarray
  unseen_class: np.ndarray


class Curve(NamedTuple):
  """Accuracies as functions of gamma, which is subtracted from scores of seen classes.

  Attributes:
    gamma: (K,) where predictions change, ascending from -inf. Place k holds the values
      from gamma[k] to gamma[k + 1].
    seen: (K,) S.
    unseen: (K,) U.
  """

  gamma: np.ndarray
  seen: np.ndarray
  unseen: np.ndarray

  @property
  def area(self) -> float:
    """The area under S over U, by trapezoids: AUSUC."""
    return float(np.trapezoid(self.seen, self.unseen))

  @property
  def best(self) -> int:
    """The place of the largest H; the first of equal ones."""
    return int(harmonic_mean(self.seen, self.unseen).argmax())

  def at(self, gamma: float) -> tuple[float, float]:
    """Returns (S, U) at a gamma."""
    place = int(np.searchsorted(self.gamma, gamma, side='right')) - 1
    return float(self.seen[place]), float(self.unseen[place])

  def between(self, place: int) -> float:
    """Returns a gamma in the middle of a place's interval."""
    low = self.gamma[place]
    high = self.gamma[place + 1] if place + 1 < len(self.gamma) else np.inf
    if not np.isfinite(low):
      return float(high - 1) if np.isfinite(high) else 0.0
    return float(low + 1) if not np.isfinite(high) else float((low + high) / 2)


def seen_unseen_curve(scores: Scores, unseen: np.ndarray) -> Curve | None:
  r"""Returns U and S exactly for every gamma of calibrated stacking.

  .. math:: \hat y = \arg\max_c\; s_c - \gamma\, [c \text{ seen}]

  Only the best class of each kind matters: the prediction of an image switches from one
  to the other when gamma passes the difference of their scores. So we sort the
  differences, and where an image switches we add its weight, 1 / (images of its class)
  / (classes of its kind). The curve starts at gamma = -inf with (U, S) = (0, S among
  seen classes only) and ends with (U among unseen classes only, 0).

  Args:
    scores: for test images of both kinds.
    unseen: (C,) bool.

  Returns:
    The curve; None if images of either kind are missing.

  Examples:
    >>> label, unseen = np.array([0, 1]), np.array([False, True])
    >>> scores = scores_of(np.array([[2.0, 1.0], [2.0, 1.0]]), label, unseen)
    >>> curve = seen_unseen_curve(scores, unseen)
    >>> curve.at(0.5), curve.at(1.5), curve.area
    ((1.0, 0.0), (0.0, 1.0), 0.5)

  Source: Chao et al., An Empirical Study and Analysis of Generalized Zero-Shot
  Learning, arXiv 1605.04253, equation 3 and section 4.
  """
  of_unseen = unseen[scores.label]
  if of_unseen.all() or not of_unseen.any():
    return None
  counts = np.bincount(scores.label, minlength=len(unseen))
  there = counts > 0
  kinds = np.where(of_unseen, (there & unseen).sum(), (there & ~unseen).sum())
  share = 1 / (counts[scores.label] * kinds)
  lost = share * (scores.seen_class == scores.label) * ~of_unseen
  won = share * (scores.unseen_class == scores.label) * of_unseen
  # If the best scores of an image are equal, the seen class is predicted.
  turn = scores.seen_score.astype(np.float64) - scores.unseen_score
  order = np.argsort(turn, kind='stable')
  ascending = turn[order]
  last = np.append(ascending[1:] != ascending[:-1], True)
  seen = lost.sum() - np.cumsum(lost[order])[last]
  gained = np.cumsum(won[order])[last]
  return Curve(
    np.append(-np.inf, np.nextafter(ascending[last], np.inf)),
    np.append(lost.sum(), np.maximum(seen, 0)),
    np.append(0.0, gained),
  )


def scores_of(logits: np.ndarray, label: np.ndarray, unseen: np.ndarray) -> Scores:
  """Returns the best class of each kind, in NumPy.

  Args:
    logits: (N, C).
    label: (N,) int.
    unseen: (C,) bool.

  Examples:
    >>> logits, unseen = np.array([[2.0, 3.0, 1.0]]), np.array([False, False, True])
    >>> scores = scores_of(logits, np.array([0]), unseen)
    >>> scores.seen_class.tolist(), scores.unseen_score.tolist()
    ([1], [1.0])
  """
  found = []
  for mask in (~unseen, unseen):
    masked = np.where(mask[None], logits, -np.inf)
    found += [masked.max(1), masked.argmax(1)]
  return Scores(label, *found)


def class_mean_accuracy(
  label: np.ndarray, prediction: np.ndarray, classes: np.ndarray
) -> float | None:
  """Returns the mean accuracy over some classes; None if they have no images.

  Args:
    label: (N,) int.
    prediction: (N,) int.
    classes: (C,) bool.

  Examples:
    >>> label, prediction = np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0])
    >>> class_mean_accuracy(label, prediction, classes=np.array([True, True]))
    0.5
  """
  mask = classes[label]
  if not mask.any():
    return None
  found = closed_set(
    label[mask],
    prediction[mask],
    num_classes=len(classes),
    groups={},
  )
  return found['macro_accuracy']


# The task.


def zero_shot_task(
  unseen: np.ndarray, vectors: np.ndarray | None, columns: tuple[str, ...]
) -> Task:
  """Returns the zero-shot task for given unseen classes.

  Args:
    unseen: (C,) bool.
    vectors: (C, A) descriptions of the classes, for the accuracy of attributes; None if
      there are none.
    columns: names of the attributes; () if there are none.
  """
  record = functools.partial(_record, unseen)
  return Task(
    record=record,
    keep=lambda examples, classes: _keep(
      record, classification.keep(examples, classes)
    ),
    measure=functools.partial(_measure, unseen, vectors),
    across=functools.partial(_across, unseen, vectors, columns),
    metrics=METRICS,
  )


def _record(unseen: np.ndarray, outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns the records of classification, and the best class of each kind.

  Also 'gamma' (B,), which the method has already subtracted from the scores of seen
  classes, and 'attributes' (B, A) bool, if the method predicts them.
  """
  logits = outputs['logits']
  found = classification.record(outputs, batch)
  for name, mask in (('seen', ~unseen), ('unseen', unseen)):
    masked = jnp.where(jnp.asarray(mask)[None], logits, -jnp.inf)
    found[f'{name}_score'] = masked.max(-1)
    found[f'{name}_class'] = masked.argmax(-1).astype(jnp.int32)
  found['gamma'] = outputs.get('gamma', jnp.zeros(len(logits), jnp.float32))
  if 'attributes' in outputs:
    found['attributes'] = outputs['attributes'] >= 0.5
  return found


def _keep(record: Record, kept: Record) -> Record:
  return lambda outputs, batch: kept(outputs, batch) | record(outputs, batch)


def _measure(
  unseen: np.ndarray,
  vectors: np.ndarray | None,
  records: Collected,
  *,
  num_classes: int,
  groups: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """Returns the metrics of classification and those of the three views."""
  found = classification.measure(records, num_classes=num_classes, groups=groups)
  label = records['label']
  found['zero_shot'] = class_mean_accuracy(label, records['unseen_class'], unseen)
  found |= _generalised(label, records['prediction'], unseen)
  curve = seen_unseen_curve(_scores(records), unseen)
  before = dict.fromkeys(UNCALIBRATED)
  if curve is not None:
    gamma = float(records['gamma'][0])
    seen, other = curve.at(-gamma if gamma else 0.0)
    before = dict(
      zip(UNCALIBRATED, (seen, other, float(harmonic_mean(seen, other))), strict=True)
    )
  found |= before | {'ausuc': curve.area if curve else None}
  if 'attributes' in records and vectors is not None:
    codes, _ = binary(vectors)
    right = (records['attributes'] == codes[label]).mean(0)
    found |= {'attribute_accuracy': float(right.mean()), 'attribute_accuracies': right}
  return found


UNCALIBRATED = ('seen_plain', 'unseen_plain', 'harmonic_mean_plain')
"""S, U and H with nothing subtracted from the scores of seen classes."""


def _scores(records: Collected) -> Scores:
  return Scores(*(records[name] for name in Scores._fields))


def _generalised(
  label: np.ndarray, prediction: np.ndarray, unseen: np.ndarray
) -> dict[str, float | None]:
  """Returns S, U and H."""
  seen = class_mean_accuracy(label, prediction, ~unseen)
  other = class_mean_accuracy(label, prediction, unseen)
  both = seen is not None and other is not None
  mean = float(harmonic_mean(seen, other)) if both else None
  return {'seen': seen, 'unseen': other, 'harmonic_mean': mean}


def _across(
  unseen: np.ndarray,
  vectors: np.ndarray | None,
  columns: tuple[str, ...],
  records: Mapping[str, Collected],
  *,
  num_classes: int,
  groups: Mapping[str, np.ndarray],
) -> Across:
  """Returns the open set's metrics, and the seen-unseen curve for plotting.

  'unknown' is the share of images of unknown classes that are rejected, at the
  threshold chosen on validation images.
  """
  found = classification.across(records, num_classes=num_classes, groups=groups)
  test = found.metrics.get('test', {})
  if 'open_accuracy' in test:
    test['unknown'] = test['open_accuracy']
  curve = seen_unseen_curve(_scores(records['test']), unseen)
  arrays = {'columns': np.array(columns, 'U')}
  if vectors is not None:
    arrays['class_vectors'] = vectors.astype(np.float32)
  if curve is not None:
    last = len(curve.gamma) - 1
    shown = np.linspace(0, last, min(CURVE_POINTS, last + 1)).round().astype(int)
    gamma = float(records['test']['gamma'][0])
    arrays |= {
      'gamma': curve.gamma[shown] + gamma,
      'seen': curve.seen[shown],
      'unseen': curve.unseen[shown],
      'chosen': np.array([*curve.at(0.0)]),
      'plain': np.array([*curve.at(-gamma)]),
    }
  return found._replace(arrays={'zero_shot': arrays})


# Pixels.


def zero_shot_segmentation_task(
  unseen: np.ndarray, vectors: np.ndarray | None, columns: tuple[str, ...]
) -> Task:
  """Returns the zero-shot segmentation task for given unseen classes.

  Args:
    unseen: (C,) bool.
    vectors: not used.
    columns: not used.
  """
  del vectors, columns
  return segmentation.SEGMENTATION._replace(
    measure=functools.partial(_measure_pixels, unseen), metrics=PIXEL_METRICS
  )


def _measure_pixels(
  unseen: np.ndarray,
  records: Collected,
  *,
  num_classes: int,
  groups: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """Returns the metrics of segmentation, S and U as mean IoU, and their H.

  Pixels are predicted among all classes, so there is no zero-shot T.
  """
  groups = {**groups, 'seen': ~unseen, 'unseen': unseen}
  found = segmentation.measure(records, num_classes=num_classes, groups=groups)
  seen, other = found['seen'], found['unseen']
  both = seen is not None and other is not None
  mean = float(harmonic_mean(seen, other)) if both else None
  return {**found, 'harmonic_mean': mean}


METRICS = {
  'zero_shot': Metric('zero-shot T'),
  'unseen': Metric('unseen U'),
  'seen': Metric('seen S'),
  'harmonic_mean': Metric('harmonic mean'),
  'unseen_plain': Metric('U, not calibrated', better=0),
  'seen_plain': Metric('S, not calibrated', better=0),
  'harmonic_mean_plain': Metric('H, not calibrated', better=0),
  'ausuc': Metric('AUSUC'),
  'unknown': Metric('unknown rejected', better=0),
  'attribute_accuracy': Metric('attributes', better=0),
  **{
    name: metric
    for name, metric in classification.METRICS.items()
    if name != 'harmonic_mean'
  },
}

PIXEL_METRICS = {
  name: METRICS[name] for name in ('harmonic_mean', 'unseen', 'seen')
} | segmentation.METRICS

ZERO_SHOT = Task(
  record=classification.record,
  keep=classification.keep,
  measure=classification.measure,
  across=classification.across,
  metrics=METRICS,
  bind=zero_shot_task,
)
"""Some classes have images, others only a description."""

ZERO_SHOT_SEGMENTATION = segmentation.SEGMENTATION._replace(
  metrics=PIXEL_METRICS, bind=zero_shot_segmentation_task
)
"""The same with a label per pixel. With two domains, seen classes are shared and unseen
ones private to the target."""
