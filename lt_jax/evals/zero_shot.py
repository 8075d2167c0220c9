"""Zero-shot recognition: the views of one set of predictions, and their metrics.

Labels are seen in three views. Among unseen classes only (zero-shot): T. Among all
classes (generalised zero-shot): S of images of seen classes, U of unseen ones, and H,
their harmonic mean. Accuracies are means over classes, of those with test images.
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
"""Most points of a curve that are kept for drawing; its area is of all of them."""


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
  """What calibrated stacking needs to know of images: the best class of either kind.

  Attributes:
    label: (N,) int.
    seen_score: (N,) the largest score of a seen class.
    seen_class: (N,) int, which that is.
    unseen_score: (N,) the largest of an unseen one.
    unseen_class: (N,) int.
  """

  label: np.ndarray
  seen_score: np.ndarray
  seen_class: np.ndarray
  unseen_score: np.ndarray
  unseen_class: np.ndarray


class Curve(NamedTuple):
  """Accuracies as what is taken from scores of seen classes grows.

  Attributes:
    gamma: (K,) where predictions change, ascending, from -inf on. What holds from
      gamma[k] to gamma[k + 1] is in place k.
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
    """The place of the largest H; of equal ones the first."""
    return int(harmonic_mean(self.seen, self.unseen).argmax())

  def at(self, gamma: float) -> tuple[float, float]:
    """Returns (S, U) at a gamma."""
    place = int(np.searchsorted(self.gamma, gamma, side='right')) - 1
    return float(self.seen[place]), float(self.unseen[place])

  def between(self, place: int) -> float:
    """Returns a gamma in the middle of where a place holds."""
    low = self.gamma[place]
    high = self.gamma[place + 1] if place + 1 < len(self.gamma) else np.inf
    if not np.isfinite(low):
      return float(high - 1) if np.isfinite(high) else 0.0
    return float(low + 1) if not np.isfinite(high) else float((low + high) / 2)


def seen_unseen_curve(scores: Scores, unseen: np.ndarray) -> Curve | None:
  r"""Returns U and S for every gamma of calibrated stacking, exactly.

  .. math:: \hat y = \arg\max_c\; s_c - \gamma\, [c \text{ seen}]

  Only the best class of either kind matters: an image turns from one to the other at
  the difference of their scores. So the differences are sorted, and each image adds its
  share, one over the images of its class and over the classes of its kind, where it
  turns. Where gamma is -inf the point is (U, S) = (0, S alone), and in the end (U
  alone, 0).

  Args:
    scores: of test images of both kinds.
    unseen: (C,) bool.

  Returns:
    The curve; None where images of either kind are missing.

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
  # Of an image whose best scores are equal the seen class is predicted.
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
  """Returns the best class of either kind, in NumPy.

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
  """Returns the mean accuracy of some classes over their images; None without any.

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
  """Returns the task whose views are by which classes are unseen.

  Args:
    unseen: (C,) bool.
    vectors: (C, A) descriptions of the classes, for the accuracy of attributes; None
      without any.
    columns: names of the attributes; () without any.
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
  """Returns what classification records, and the best class of either kind.

  Beside them 'gamma' (B,), what was already taken from the scores of seen classes, and
  'attributes' (B, A) bool, those that a method predicts.
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
"""S, U and H before anything is taken from the scores of seen classes."""


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
  """Returns the open set's metrics, and the seen-unseen curve for drawing.

  'unknown' is the share of images of unknown classes that are rejected, at the
  threshold that validation images have chosen.
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
  """Returns the task of segmentation whose views are by which classes are unseen.

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
  """Returns the metrics of segmentation, S and U as mean IoU, and H of these.

  Every pixel is predicted to be of one of all classes; so there is no view of unseen
  classes alone.
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
"""Classes with images and classes with a description alone."""

ZERO_SHOT_SEGMENTATION = segmentation.SEGMENTATION._replace(
  metrics=PIXEL_METRICS, bind=zero_shot_segmentation_task
)
"""The same where every pixel has a label. Between domains, seen classes are shared, and
unseen ones private to the target."""
