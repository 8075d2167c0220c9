"""Images with several classes each, measured class by class.

For every class the images are ranked by its logit, and the average precision says how
high the images of the class rank. No threshold is needed.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.evals.classification import half
from lt_jax.evals.collect import Collected
from lt_jax.evals.tasks import Metric, Record, Task, no_more
from lt_jax.losses.classification import sigmoid_cross_entropy
from lt_jax.method import Batch, Outputs


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float | None:
  r"""Returns the 11-point average precision of one label.

  .. math:: \frac1{11} \sum_{t \in \{0, 0.1, \dots, 1\}} \max_{r \ge t} p(r)

  Args:
    scores: (N,).
    labels: (N,) int, 1 or 0; images with -1 are ignored.

  Returns:
    The average precision, or None if no image has the label.

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
  # Recall is compared in integers, because floats do not represent tenths exactly.
  best = [
    precision[10 * hits >= tenth * hits[-1]].max(initial=0.0) for tenth in range(11)
  ]
  return float(np.mean(best))


def record(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns what the metrics need from a batch.

  Args:
    outputs: has 'logits' (B, C).
    batch: has 'label' (B,) and 'classes' (B, C): 1 for each class of an image, 0 for
      others, -1 if unknown; optionally 'domain' and 'bad' (B,).

  Returns:
    'classes' and 'scores' (B, C), the logits; 'prediction' (B,), the class with the
    largest logit, 'confidence', its sigmoid, and 'label', which is the prediction if
    the image has that class and else the label of the batch; 'loss' (B,), the sum of
    the binary cross-entropies of known classes, in nats.
  """
  logits, classes = outputs['logits'], batch['classes']
  prediction = logits.argmax(-1).astype(jnp.int32)
  hit = jnp.take_along_axis(classes, prediction[:, None], axis=1)[:, 0] == 1
  return {
    **{key: batch[key] for key in ('domain', 'bad') if key in batch},
    'classes': classes,
    'scores': logits.astype(jnp.float32),
    'label': jnp.where(hit, prediction, batch['label']),
    'prediction': prediction,
    'confidence': jax.nn.sigmoid(logits.max(-1)),
    'loss': sigmoid_cross_entropy(logits, batch['label'], classes=classes),
  }


def keep(examples: int, classes: int) -> Record:
  """Returns the function that keeps records, features and logits of a test split."""
  del examples, classes
  return _kept


def _kept(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  more = {key: half(outputs[key]) for key in ('features', 'logits')}
  return record(outputs, batch) | more


def measure(
  records: Collected, *, num_classes: int, groups: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Returns the average precision of every class, and its means, in [0, 1].

  Args:
    records: what `record` keeps.
    num_classes: C.
    groups: name -> (C,) bool.

  Returns:
    'map', the mean over classes that some image has, and the same for each group, None
    if it has no such class; 'hit', the share of images that have the class with the
    largest logit; 'loss', the mean binary cross-entropy of known classes, in nats;
    'classes_counted'; and the array 'class_average_precision' (C,), NaN for a class
    that no image has.
  """
  scores, classes = records['scores'].astype(np.float64), records['classes']
  found = [average_precision(scores[:, c], classes[:, c]) for c in range(num_classes)]
  by_class = np.array([np.nan if value is None else value for value in found])
  known = max(int((classes >= 0).sum()), 1)
  return {
    'map': _mean(by_class),
    **{name: _mean(by_class[mask]) for name, mask in groups.items()},
    'hit': float((records['label'] == records['prediction']).mean()),
    'loss': float(records['loss'].sum(dtype=np.float64) / known),
    'classes_counted': int(np.isfinite(by_class).sum()),
    'class_average_precision': by_class,
  }


def _mean(values: np.ndarray) -> float | None:
  there = values[np.isfinite(values)]
  return float(there.mean()) if there.size else None


METRICS = {
  'map': Metric('mean average precision'),
  'many': Metric('many-shot'),
  'medium': Metric('medium-shot'),
  'few': Metric('few-shot'),
  'hit': Metric('top class is right'),
  'loss': Metric(better=-1),
}

MULTILABEL = Task(
  record,
  keep,
  measure,
  no_more,
  METRICS,
  by_class='class_average_precision',
  of_class='average precision',
  probability=jax.nn.sigmoid,
  reads={
    'classes': "tfds: data have 'labels', an archive y_test.classes (N, C) of 1, 0, -1"
  },
)
"""Average precision at 11 points, as in VOC 2007."""
