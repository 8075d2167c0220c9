"""Streams and augmentation: the right images, in the right place, on any process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax.data import augment, samplers, streams
from lt_jax.data.arrays import Arrays
from lt_jax.errors import UserError


def make_split(rng, arrays=True, count=20):
  images = rng.integers(0, 256, (30, 4, 4, 1), np.uint8)
  source = Arrays(images, np.arange(30, dtype=np.int32) % 3, ('a', 'b', 'c'))
  rows = rng.permutation(30)[:count]
  resident = {'image': jnp.asarray(images)} if arrays else {}
  return streams.Split(source, rows, source.labels[rows], resident)


def plain(key, batch):
  return {**batch, 'image': batch['image'].astype(jnp.float32)}


@pytest.mark.parametrize('resident', [True, False])
def test_a_batch_is_what_the_sampler_says(rng, resident):
  split = make_split(rng, resident)
  sampler = samplers.instance(split.labels)
  stream = streams.train_stream(split, sampler, seed=3, batch=8, transform=plain)
  for step in (0, 2, 5):
    batch = stream.prepare(stream.arrays, stream.payload(step), jax.random.key(0))
    rows = split.rows[samplers.batch_indices(sampler, 3, 8, step)]
    np.testing.assert_array_equal(batch['image'], split.source.images[rows])
    np.testing.assert_array_equal(batch['label'], split.source.labels[rows])
    np.testing.assert_array_equal(batch['index'], rows)


@pytest.mark.parametrize('resident', [True, False])
@pytest.mark.parametrize('batch', [4, 7, 20, 32])
def test_a_pass_shows_every_image_once_and_masks_the_rest(rng, resident, batch):
  split = make_split(rng, resident)
  one_pass = streams.evaluation_pass(split, batch=batch, transform=plain)
  shown, labels = [], []
  for step in range(one_pass.batches):
    payload = one_pass.stream.payload(step)
    prepared = one_pass.stream.prepare(one_pass.stream.arrays, payload, None)
    assert len(prepared['image']) == batch
    shown.append(np.asarray(prepared['image'])[payload['mask']])
    labels.append(payload['label'][payload['mask']])
  np.testing.assert_array_equal(
    np.concatenate(shown), split.source.images[split.rows].astype(np.float32)
  )
  np.testing.assert_array_equal(np.concatenate(labels), split.labels)
  assert one_pass.examples == 20


def test_passes_of_one_transform_share_their_program(rng):
  first, second = (
    streams.evaluation_pass(make_split(rng, count=n), batch=4, transform=plain)
    for n in (8, 20)
  )
  assert first.stream.prepare is second.stream.prepare


def test_processes_take_slices_of_one_order(rng):
  rows = np.arange(12)
  parts = [streams.process_rows(rows, process=p, processes=3) for p in range(3)]
  np.testing.assert_array_equal(np.concatenate(parts), rows)
  assert {len(part) for part in parts} == {4}


def test_small_passes_start_no_processes(rng, monkeypatch):
  split = make_split(rng, arrays=False)
  for most, workers in ((20, 0), (19, 2)):
    monkeypatch.setattr(streams, 'SMALL_PASS', most)
    one = streams.evaluation_pass(split, batch=4, transform=plain, workers=2)
    assert one.stream.workers == workers


@pytest.mark.parametrize(
  ('images', 'most'),
  [(3, 1), (20, 2), (57, 5), (100, 10), (5000, 10), (12000, 12), (1000000, 1000)],
)
def test_how_many_images_may_be_damaged(images, most):
  split = streams.Split(None, np.arange(images), None, {})
  assert streams.most_bad(split) == most


def test_images_of_several_sizes_are_reported_by_position():
  images = [np.zeros((4, 4, 1), np.uint8), np.zeros((4, 5, 1), np.uint8)]
  with pytest.raises(UserError, match=r'image 1 has shape \(4, 5, 1\)'):
    streams._stacked(images, np.array([0, 1]))


def test_normalise(rng):
  images = rng.integers(0, 256, (2, 3, 3, 3), np.uint8)
  mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
  expected = (images / 255.0 - np.array(mean)) / np.array(std)
  np.testing.assert_allclose(
    augment.normalise(jnp.asarray(images), mean, std), expected, atol=1e-6
  )
  one_value = augment.normalise(jnp.asarray(images), (128 / 255,), (128 / 255,))
  np.testing.assert_allclose(one_value, images / 128.0 - 1, atol=1e-6)


@pytest.mark.parametrize('mode', ['zero', 'reflect'])
def test_pad_crop_takes_windows_of_the_padded_image(rng, mode):
  images = rng.integers(1, 256, (64, 5, 6, 3), np.uint8)
  cropped = augment.pad_crop(jax.random.key(0), jnp.asarray(images), pad=2, mode=mode)
  assert cropped.dtype == jnp.uint8 and cropped.shape == images.shape
  margins = ((0, 0), (2, 2), (2, 2), (0, 0))
  padded = np.pad(images, margins, mode='constant' if mode == 'zero' else mode)
  offsets = set()
  for image, whole in zip(np.asarray(cropped), padded, strict=True):
    found = [
      (i, j)
      for i in range(5)
      for j in range(5)
      if (whole[i : i + 5, j : j + 6] == image).all()
    ]
    assert len(found) == 1
    offsets |= set(found)
  assert {i for i, _ in offsets} == {j for _, j in offsets} == set(range(5))


def test_flip_mirrors_about_half(rng):
  images = rng.integers(0, 256, (400, 2, 3, 1), np.uint8)
  flipped = np.asarray(augment.flip(jax.random.key(1), jnp.asarray(images)))
  mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
  same = (flipped == images).all((1, 2, 3))
  assert (mirrored | same).all()
  assert 150 < (mirrored & ~same).sum() < 250


def test_augmentation_depends_on_the_key_alone(rng):
  images = jnp.asarray(rng.integers(0, 256, (8, 5, 5, 1), np.uint8))
  crops = [augment.pad_crop(jax.random.key(k), images, pad=2) for k in (0, 0, 1)]
  np.testing.assert_array_equal(crops[0], crops[1])
  assert (np.asarray(crops[0]) != np.asarray(crops[2])).any()
