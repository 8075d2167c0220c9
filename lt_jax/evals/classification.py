"""Classification: one label per image, known classes and optionally an open set."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.evals import open_set
from lt_jax.evals.calibration import calibration
from lt_jax.evals.closed_set import closed_set
from lt_jax.evals.collect import Collected
from lt_jax.evals.tasks import Across, Metric, Record, Task
from lt_jax.method import Batch, Outputs

MOST_LOGITS = 10**8
"""predictions.npz holds every logit up to this number of test images times classes."""

TOP = 20

TOP_K = 5


def record(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns what the classification metrics need to know about a batch.

  Args:
    outputs: with 'logits' (B, C), optionally 'known_score' (B,), and 'is_unknown' (B,)
      if the method has its own rule for rejection.
    batch: with 'label' (B,), -1 for an image of no known class; optionally 'domain'
      (B,) and 'bad' (B,), whether another image replaces one that cannot be read.

  Returns:
    (B,) arrays: 'label', 'prediction' (the arg max), 'confidence' (its softmax
    probability), 'rank' (of the label, see `rank`), 'known_score' (the method's, or
    else the confidence), 'energy' (the log-sum-exp of the logits, another known score)
    and 'loss' (the cross-entropy in nats; 0 for label -1); and 'domain', 'bad' and
    'is_unknown' if the arguments have them.

  Source of the energy, negated: Liu et al., Energy-based Out-of-distribution Detection,
  arXiv 2010.03759, equation 4 with T = 1.
  """
  log_p = jax.nn.log_softmax(outputs['logits'])
  label = batch['label']
  confidence = jnp.exp(log_p.max(axis=-1))
  of_label = jnp.take_along_axis(log_p, jnp.maximum(label, 0)[:, None], axis=-1)[:, 0]
  return {
    **{key: batch[key] for key in ('domain', 'bad') if key in batch},
    **{key: outputs[key] for key in ('is_unknown',) if key in outputs},
    'label': label,
    'prediction': log_p.argmax(axis=-1).astype(jnp.int32),
    'confidence': confidence,
    'rank': rank(outputs['logits'], label),
    'known_score': outputs.get('known_score', confidence),
    'energy': jax.nn.logsumexp(outputs['logits'], axis=-1),
    'loss': jnp.where(label < 0, 0.0, -of_label),
  }


def rank(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Returns how many classes a network prefers to the label: 0 where it is right.

  Among equal logits it prefers the first class, like the arg max.

  Args:
    logits: (B, C).
    label: (B,) int; -1 has rank C, and so has a label whose logit is NaN.

  Returns:
    (B,) int32.

  Examples:
    >>> rank(jnp.array([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]]), jnp.array([1, 0])).tolist()
    [0, 2]
  """
  classes = jnp.arange(logits.shape[-1])
  own = jnp.take_along_axis(logits, jnp.maximum(label, 0)[:, None], axis=-1)
  behind = (logits < own) | ((logits == own) & (classes[None] >= label[:, None]))
  ahead = (~behind).sum(axis=-1, dtype=jnp.int32)
  return jnp.where(label < 0, len(classes), ahead)


def keep(examples: int, classes: int) -> Record:
  """Returns the function that keeps records, features and logits of a test split.

  Args:
    examples: size of the split.
    classes: C. Above `MOST_LOGITS` logits it only keeps the largest.
  """
  return _keep(examples * classes <= MOST_LOGITS)


@functools.cache
def _keep(all_logits: bool) -> Record:
  """Returns `keep`; it selects on the device, so few logits go to the host."""

  def kept(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    logits = outputs['logits']
    found = {
      **record(outputs, batch),
      **{key: outputs[key] for key in ('borrowed',) if key in outputs},
      'features': half(outputs['features']),
    }
    if all_logits:
      return found | {'logits': half(logits)}
    top, classes = jax.lax.top_k(logits, TOP)
    of_label = jnp.take_along_axis(logits, batch['label'][:, None], axis=-1)[:, 0]
    return found | {
      'top_logits': half(top),
      'top_classes': classes,
      'label_logit': of_label,
      'log_sum_exp': jax.nn.logsumexp(logits, axis=-1),
    }

  return kept


def half(values: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
  """Returns values in float16, clipped to its range.

  Examples:
    >>> half(np.array([0.5, 1e6])).tolist()
    [0.5, 65504.0]
  """
  most = float(np.finfo(np.float16).max)
  return values.astype(np.float32).clip(-most, most).astype(np.float16)


def measure(
  records: Collected, *, num_classes: int, groups: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Returns closed-set accuracies, mean loss and ECE of a split of known images.

  With more than five classes also 'top5_accuracy', the share of images whose class is
  among the five with the largest logits.

  Args:
    records: from `record`.
    num_classes: C.
    groups: name -> (C,) bool.
  """
  label, prediction = records['label'], records['prediction']
  found = closed_set(label, prediction, num_classes=num_classes, groups=groups)
  calibrated = calibration(records['confidence'], prediction == label)
  loss = float(records['loss'].mean(dtype=np.float64))
  top = {}
  if num_classes > TOP_K:
    top = {f'top{TOP_K}_accuracy': float((records['rank'] < TOP_K).mean())}
  return {**found, **top, 'loss': loss, 'ece': calibrated['ece']}


def across(
  records: Mapping[str, Collected],
  *,
  num_classes: int,
  groups: Mapping[str, np.ndarray],
) -> Across:
  """Returns the metrics of the open set, if there is one.

  Args:
    records: split -> records, for 'test' and optionally 'open_test', 'val' and
      'open_val'.
    num_classes: C.
    groups: name -> (C,) bool.

  Returns:
    in 'test' the metrics by the method's known score, and by its own rule if it has
    one; in 'test_by_energy' those by the energy.
  """
  if 'open_test' not in records:
    return Across()
  thresholds, curves, metrics = {}, {}, {}
  test = records['test']
  # The papers' threshold means nothing for a method's own score.
  own = not np.array_equal(test['known_score'], test['confidence'])
  probability = None if own else 'known_score'
  for score, place in {'known_score': 'test', 'energy': 'test_by_energy'}.items():
    thresholds[score] = _choose_threshold(records, score)
    both = _joined(score, records['test'], records['open_test'])
    curves[score] = open_set.curve(*both)
    metrics[place] = open_set.open_set(
      *both,
      thresholds[score]['value'],
      num_classes=num_classes,
      groups=groups,
      fixed=open_set.FIXED_THRESHOLD if score == probability else None,
    )
  if 'is_unknown' in test:
    both = _joined('is_unknown', test, records['open_test'])
    ruled = open_set.by_rule(*both, num_classes=num_classes, groups=groups)
    metrics['test'] |= ruled
  return Across(metrics, thresholds['known_score'], curves)


def _joined(score: str, *parts: Collected) -> tuple[np.ndarray, ...]:
  names = ('label', 'prediction', score)
  return tuple(np.concatenate([part[name] for part in parts]) for name in names)


def _choose_threshold(records: Mapping[str, Collected], score: str) -> dict[str, Any]:
  """Chooses the threshold of a score, on validation images only."""
  if 'open_val' in records and 'val' in records:
    found = _joined(score, records['val'], records['open_val'])
    value = open_set.best_threshold(*found)
    return {'value': value, 'chosen_by': 'f_measure_oltr2020 on val and open_val'}
  if 'val' in records:
    value = open_set.keep_threshold(records['val'][score])
    return {'value': value, 'chosen_by': 'keeps 95 % of val'}
  return {'value': None, 'chosen_by': 'nothing: there are no validation images'}


METRICS = {
  'accuracy': Metric('accuracy'),
  'many': Metric('many-shot'),
  'medium': Metric('medium-shot'),
  'few': Metric('few-shot'),
  'macro_accuracy': Metric('macro accuracy'),
  f'top{TOP_K}_accuracy': Metric(f'top-{TOP_K} accuracy'),
  'harmonic_mean': Metric('harmonic mean'),
  'worst_class': Metric(),
  'loss': Metric(better=-1),
  'ece': Metric('ECE', better=-1),
  'auroc': Metric('open-set AUROC', better=0),
  'f_measure_oltr2019': Metric('open-set F (oltr2019)', better=0),
  'f_measure_oltr2020': Metric('open-set F (oltr2020)', better=0),
  'f_measure_oltr2019_own_rule': Metric('open-set F (oltr2019), own rule', better=0),
  'f_measure_oltr2020_own_rule': Metric('open-set F (oltr2020), own rule', better=0),
}

CLASSIFICATION = Task(record, keep, measure, across, METRICS)
