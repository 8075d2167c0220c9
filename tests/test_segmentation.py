"""Segmentation metrics compared with float64 NumPy, on hand-made cases and by batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax.errors import UserError
from lt_jax.evals import TASKS, label_free, segmentation
from lt_jax.evals.calibration import calibration
from lt_jax.method import Method
from lt_jax.methods.tiled import starts, tiled

GROUPS = {
  'many': np.array([True, False, False, False]),
  'few': np.array([False, False, False, True]),
}
NAMES = ('miou', 'pixel_accuracy', 'mean_accuracy', 'frequency_weighted_iou')


def test_a_hand_case_with_a_class_that_is_nowhere_and_one_only_predicted():
  """Labels 0 0 0 1 1 2; predictions 0 0 1 1 3 2. Class 3 is only predicted."""
  matrix = np.zeros((5, 5), int)
  for label, prediction in zip((0, 0, 0, 1, 1, 2), (0, 0, 1, 1, 3, 2), strict=True):
    matrix[label, prediction] += 1
  groups = {name: np.append(mask, False) for name, mask in GROUPS.items()}
  found = segmentation.of_confusion(matrix, groups)
  iou = [2 / 3, 1 / 3, 1, 0, np.nan]
  np.testing.assert_allclose(found['iou_by_class'], iou, rtol=1e-15)
  np.testing.assert_allclose(found['class_accuracy'], [2 / 3, 0.5, 1, np.nan, np.nan])
  expected = (np.mean(iou[:4]), 4 / 6, np.mean([2 / 3, 0.5, 1]), (2 + 2 / 3 + 1) / 6)
  np.testing.assert_allclose([found[name] for name in NAMES], expected, rtol=1e-15)
  assert (found['many'], found['few'], found['classes_counted']) == (2 / 3, 0, 4)


def test_nothing_labelled_has_no_metric():
  found = segmentation.of_confusion(np.zeros((4, 4), int), GROUPS)
  assert [found[name] for name in (*NAMES[:3], 'many')] == [None] * 4


@pytest.fixture(scope='module')
def case():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(5, 3, 4, 4))
  label = rng.integers(-1, 4, (5, 6, 8))
  return logits, label


def records(logits, label):
  outputs = {'logits': jnp.asarray(logits, jnp.float32)}
  batch = {'label': jnp.asarray(label, jnp.int32)}
  return jax.device_get(jax.jit(segmentation.record)(outputs, batch))


def test_records_are_those_of_numpy_at_the_size_of_the_labels(case):
  logits, label = case
  found = records(logits, label)
  # Bilinear with factor 2: 3/4 of the nearer pixel and 1/4 of the other, per axis.
  large = logits
  for axis in (1, 2):
    first, last = (np.take(large, [i], axis) for i in (0, -1))
    before = np.concatenate([first, np.delete(large, -1, axis)], axis)
    after = np.concatenate([np.delete(large, 0, axis), last], axis)
    pair = np.stack(
      [0.75 * large + 0.25 * before, 0.75 * large + 0.25 * after], axis + 1
    )
    shape = list(large.shape)
    shape[axis] *= 2
    large = pair.reshape(shape)
  log_p = large - np.log(np.exp(large).sum(-1, keepdims=True))
  seen, prediction = label >= 0, log_p.argmax(-1)
  for image in range(len(label)):
    matrix = np.zeros((4, 4), int)
    at = seen[image]
    np.add.at(matrix, (label[image][at], prediction[image][at]), 1)
    np.testing.assert_array_equal(found['confusion'][image], matrix)
  of_label = np.take_along_axis(log_p, np.maximum(label, 0)[..., None], -1)[..., 0]
  loss = np.where(seen, -of_label, 0).sum((1, 2))
  np.testing.assert_allclose(found['loss'], loss, rtol=1e-5)
  entropy = np.where(seen, -(np.exp(log_p) * log_p).sum(-1), 0).sum((1, 2))
  np.testing.assert_allclose(found['entropy'], entropy, rtol=1e-5)
  measured = segmentation.measure(found, num_classes=4, groups=GROUPS)
  confidence, right = np.exp(log_p.max(-1))[seen], (prediction == label)[seen]
  expected = calibration(confidence, right)['ece']
  assert measured['ece'] == pytest.approx(expected, abs=1e-6)
  assert measured['loss'] == pytest.approx(-of_label[seen].mean(), rel=1e-5)


def test_metrics_do_not_depend_on_the_batch_or_on_void_pixels(case):
  logits, label = case
  whole = segmentation.measure(records(logits, label), num_classes=4, groups=GROUPS)
  parts = [records(logits[i : i + 1], label[i : i + 1]) for i in range(5)]
  joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
  again = segmentation.measure(joined, num_classes=4, groups=GROUPS)
  for name in (*NAMES, 'many', 'few', 'classes_counted'):
    assert whole[name] == again[name]
  more = np.concatenate([label, np.full_like(label, -1)])
  with_void = records(np.concatenate([logits, logits]), more)
  found = segmentation.measure(with_void, num_classes=4, groups=GROUPS)
  assert found['miou'] == whole['miou'] and found['loss'] == pytest.approx(
    whole['loss']
  )


def test_a_picture_shows_every_pixel_of_small_maps(case):
  logits, label = case
  found = segmentation.picture(
    {'logits': jnp.asarray(np.repeat(np.repeat(logits, 2, 1), 2, 2))},
    {'label': jnp.asarray(label)},
  )
  assert {str(x.dtype) for x in found.values()} == {'uint8'}
  np.testing.assert_array_equal(found['label'], np.where(label < 0, 255, label))
  uniform = segmentation.picture(
    {'logits': jnp.zeros((1, 2, 2, 4))}, {'label': jnp.zeros((1, 2, 2), jnp.int32)}
  )
  assert (np.asarray(uniform['entropy']) == 255).all()


def of_pixels(state, images):
  """A network that sees one pixel at a time and has two outputs."""
  return {
    'logits': images @ state,
    'low_logits': images,
    'features': images.mean((1, 2)),
  }


def test_tiles_cover_every_pixel_and_do_not_change_pixelwise_networks():
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 11, 9, 3)))
  weights = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)))
  method = Method(None, None, of_pixels)
  for size in ({'height': 4, 'width': 6}, {'height': 11, 'width': 9, 'overlap': 0.0}):
    found = jax.jit(tiled(method, **size).predict)(weights, images)
    np.testing.assert_allclose(found['logits'], images @ weights, rtol=1e-5, atol=1e-6)
    assert found['features'].shape == (2, 3)
  assert starts(11, 4, 0.5) == [0, 2, 4, 5, 7] and starts(8, 4, 0.0) == [0, 4]
  with pytest.raises(
    UserError, match='tiles of 6 x 12 pixels are larger than the imag'
  ):
    tiled(method, height=12, width=6).predict(weights, images)
  with pytest.raises(UserError, match='they must be positive'):
    tiled(method, height=0, width=6)


def test_the_headline_is_the_miou_and_a_state_can_be_chosen_by_it():
  task = TASKS['segmentation']
  assert task.headline == 'miou' and task.metrics['miou'].better == 1
  assert task.per_pixel and 'pixel_accuracy' in task.metrics


def test_no_map_of_logits_leaves_the_device():
  """Of an image of 2048 x 1024 pixels, by shapes: some C^2 numbers, and features."""
  size, classes, width = (1024, 2048), 19, 64
  outputs = {
    'logits': jax.ShapeDtypeStruct((1, 512, 1024, classes), jnp.float32),
    'features': jax.ShapeDtypeStruct((1, width), jnp.float32),
  }
  batch = {'label': jax.ShapeDtypeStruct((1, *size), jnp.int32)}
  kept = segmentation.keep(1, classes)
  for record in (segmentation.record, kept, label_free.keep_of_pixels):
    found = jax.eval_shape(record, outputs, batch)
    assert sum(x.size for x in jax.tree.leaves(found)) < 2 * classes**2
  shown = jax.eval_shape(segmentation.picture, outputs, batch)
  assert {x.shape for x in shown.values()} == {(1, 128, 256)}
