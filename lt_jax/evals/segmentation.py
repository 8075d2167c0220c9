"""Segmentation: one label per pixel; all metrics come from confusion matrices.

The device turns each image into a confusion matrix of C^2 integers and sums for
calibration; maps of logits never leave it. The metrics of a split are then exact
functions of the sum over its images, whatever the batch size or the devices.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.evals import label_free
from lt_jax.evals.calibration import BINS
from lt_jax.evals.collect import Collected
from lt_jax.evals.tasks import Metric, Record, Task, no_more
from lt_jax.method import Batch, Outputs
from lt_jax.models.segmentation import resize

MOST_SIDE = 256
"""The largest side, in pixels, of a picture that a run saves."""


def at_labels(outputs: Outputs, label: jax.Array) -> jax.Array:
  """Returns logits (B, H, W, C) resized to label maps (B, H, W), bilinear."""
  logits = outputs['logits']
  if logits.shape[1:3] == label.shape[1:]:
    return logits
  return resize(logits, label.shape[1:])


def confusion(label: jax.Array, prediction: jax.Array, num_classes: int) -> jax.Array:
  """Returns the confusion matrix of every image.

  Args:
    label: (B, ...) int; -1 is left out.
    prediction: (B, ...) int in [0, C).
    num_classes: C.

  Returns:
    (B, C, C) int32: pixels whose label is the row and whose prediction is the column.

  Examples:
    >>> label, prediction = jnp.array([[0, 1, -1]]), jnp.array([[0, 0, 0]])
    >>> confusion(label, prediction, num_classes=2).tolist()
    [[[1, 0], [1, 0]]]
  """
  cell = jnp.where(label < 0, num_classes**2, label * num_classes + prediction)

  def count(cells: jax.Array) -> jax.Array:
    return jnp.bincount(cells.reshape(-1), length=num_classes**2)  # drops larger values

  counted = jax.lax.map(count, cell).astype(jnp.int32)
  return counted.reshape(-1, num_classes, num_classes)


def record(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns what the metrics of segmentation need to know about a batch.

  Args:
    outputs: with 'logits' (B, h, w, C), which are resized to the labels here.
    batch: with 'label' (B, H, W), -1 for void; optionally 'domain' and 'bad' (B,).

  Returns:
    'confusion' (B, C, C) int32; for the labelled pixels in each bin of confidence,
    their number 'pixels' and how many are 'right' (B, bins) int32, and the sum of their
    'confidence' (B, bins) float32; 'loss' and 'entropy' (B,), sums of cross-entropy and
    entropy over labelled pixels, in nats.
  """
  label = batch['label']
  log_p = jax.nn.log_softmax(at_labels(outputs, label))
  num_classes = log_p.shape[-1]
  prediction = log_p.argmax(-1).astype(jnp.int32)
  labelled = label >= 0
  confidence = jnp.exp(log_p.max(-1))
  place = jnp.clip(jnp.ceil(confidence * BINS).astype(jnp.int32) - 1, 0, BINS - 1)
  places = jnp.where(labelled, place, BINS).reshape(len(label), -1)

  def by_bin(values: jax.Array) -> jax.Array:
    def add(of_image: tuple[jax.Array, jax.Array]) -> jax.Array:
      where, what = of_image
      return jnp.zeros(BINS, values.dtype).at[where].add(what, mode='drop')

    return jax.lax.map(add, (places, values.reshape(places.shape)))

  of_label = jnp.take_along_axis(log_p, jnp.maximum(label, 0)[..., None], -1)[..., 0]
  entropy = -(jnp.exp(log_p) * log_p).sum(-1)

  def total(values: jax.Array) -> jax.Array:
    return jnp.where(labelled, values, 0).sum((1, 2))

  return {
    **{key: batch[key] for key in ('domain', 'bad') if key in batch},
    'confusion': confusion(label, prediction, num_classes),
    'pixels': by_bin(labelled.astype(jnp.int32)),
    'right': by_bin((labelled & (prediction == label)).astype(jnp.int32)),
    'confidence': by_bin(confidence.astype(jnp.float32)),
    'loss': total(-of_label),
    'entropy': total(entropy),
  }


def keep(examples: int, classes: int) -> Record:
  """Returns the function that keeps records and image features of a test split."""
  del examples, classes
  return _kept


def _kept(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  return {
    **record(outputs, batch),
    **{key: outputs[key] for key in ('borrowed',) if key in outputs},
    'features': outputs['features'].astype(jnp.float32),
  }


def picture(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns what the report shows of some images, `MOST_SIDE` pixels at most.

  Returns:
    'label' and 'prediction' (B, H', W') uint8, void 255, and 'entropy' of the
    predictions over its greatest value, from 0 to 255: every k-th pixel of the maps.
  """
  label = batch['label']
  step = -(-max(label.shape[1:]) // MOST_SIDE)
  logits = at_labels(outputs, label)[:, ::step, ::step]
  log_p = jax.nn.log_softmax(logits)
  entropy = -(jnp.exp(log_p) * log_p).sum(-1) / np.log(logits.shape[-1])
  few = label[:, ::step, ::step]
  return {
    'label': jnp.where(few < 0, 255, few).astype(jnp.uint8),
    'prediction': logits.argmax(-1).astype(jnp.uint8),
    'entropy': jnp.clip(jnp.rint(255 * entropy), 0, 255).astype(jnp.uint8),
  }


def of_confusion(
  matrix: np.ndarray, groups: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  r"""Returns the metrics of a confusion matrix N, all in [0, 1].

  With the number of pixels of class c, :math:`t_c = \sum_k N_{ck}`, and of pixels
  predicted as c, :math:`p_c = \sum_k N_{kc}`:

  .. math::
    \text{IoU}_c = \frac{N_{cc}}{t_c + p_c - N_{cc}}, \quad
    \text{mIoU} = \frac{1}{C'} \sum_c \text{IoU}_c, \quad
    \text{frequency-weighted IoU} = \sum_c \frac{t_c}{\sum_k t_k} \text{IoU}_c

  A class with neither labels nor predictions has no IoU and is left out of C'; one that
  is only predicted has 0. Pixel accuracy is over pixels, mean accuracy over the classes
  with labels.

  Args:
    matrix: (C, C) integers, one row per label.
    groups: name -> (C,) bool.

  Returns:
    'miou', 'pixel_accuracy', 'mean_accuracy', 'frequency_weighted_iou', the mean IoU of
    each group, None if none of its classes has one; 'classes_counted' (C'); and the
    arrays 'iou_by_class' and 'class_accuracy' (C,), NaN for classes without one.

  Examples:
    >>> found = of_confusion([[3, 1], [0, 4]], groups={})
    >>> found['iou_by_class'].tolist(), found['pixel_accuracy']
    ([0.75, 0.8], 0.875)

  Source: Long et al., Fully Convolutional Networks, arXiv 1411.4038, section 5; mIoU is
  the nanmean, as in the code of Vu et al. (ADVENT).
  """
  n = np.asarray(matrix, np.float64)
  right, labelled, predicted = np.diag(n), n.sum(1), n.sum(0)
  union = labelled + predicted - right
  iou, accuracy = _ratio(right, union), _ratio(right, labelled)
  total = labelled.sum()
  share = labelled / max(total, 1)
  return {
    'miou': _mean(iou),
    'pixel_accuracy': float(right.sum() / total) if total else None,
    'mean_accuracy': _mean(accuracy),
    'frequency_weighted_iou': float(np.where(labelled > 0, share * iou, 0).sum()),
    **{name: _mean(iou[mask]) for name, mask in groups.items()},
    'classes_counted': int((union > 0).sum()),
    'iou_by_class': iou,
    'class_accuracy': accuracy,
  }


def measure(
  records: Collected, *, num_classes: int, groups: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Returns the metrics of `of_confusion` for a split, and pixel loss and calibration.

  Args:
    records: from `record`.
    num_classes: C.
    groups: name -> (C,) bool.

  Returns:
    also 'loss' and 'entropy', means over labelled pixels in nats, and 'ece', the
    expected calibration error over `BINS` equal bins of confidence.
  """
  del num_classes
  found = of_confusion(records['confusion'].sum(0, dtype=np.int64), groups)
  pixels, right, confidence = (
    records[name].sum(0, dtype=np.float64) for name in ('pixels', 'right', 'confidence')
  )
  total = max(pixels.sum(), 1)
  sums = {name: records[name].sum(dtype=np.float64) for name in ('loss', 'entropy')}
  return {
    **found,
    **{name: float(value / total) for name, value in sums.items()},
    'ece': float(np.abs(right - confidence).sum() / total),
  }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
  return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float | None:
  finite = values[np.isfinite(values)]
  return float(finite.mean()) if finite.size else None


METRICS = {
  'miou': Metric('mIoU'),
  'many': Metric('many-shot'),
  'medium': Metric('medium-shot'),
  'few': Metric('few-shot'),
  'pixel_accuracy': Metric('pixel accuracy'),
  'mean_accuracy': Metric('mean accuracy'),
  'frequency_weighted_iou': Metric('frequency-weighted IoU'),
  'loss': Metric(better=-1),
  'ece': Metric('ECE', better=-1),
}

SEGMENTATION = Task(
  record,
  keep,
  measure,
  no_more,
  METRICS,
  criteria=label_free.keep_of_pixels,
  picture=picture,
  per_pixel=True,
  by_class='iou_by_class',
  of_class='IoU',
)
"""Shot groups are by training pixels; the metric of a group is its mIoU."""
