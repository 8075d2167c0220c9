"""Arrays of different shapes become one: against a table by hand, and Pillow."""

import numpy as np
import pytest
from PIL import Image

from lt_jax.data import resizing
from lt_jax.data.arrays import Arrays
from lt_jax.data.resizing import brought_to, resized
from lt_jax.errors import UserError


def source(*shape):
  images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  return Arrays(images, np.arange(len(images), dtype=np.int32), ('a', 'b'))


@pytest.mark.parametrize(
  'old, new, table',
  [
    (2, 4, [[1, 0], [3 / 4, 1 / 4], [1 / 4, 3 / 4], [0, 1]]),
    (4, 2, [[3 / 7, 3 / 7, 1 / 7, 0], [0, 1 / 7, 3 / 7, 3 / 7]]),
    (3, 2, [[5 / 8, 3 / 8, 0], [0, 3 / 8, 5 / 8]]),
    (3, 3, np.eye(3)),
    (3, 1, [[2 / 7, 3 / 7, 2 / 7]]),
  ],
)
def test_the_weights_by_hand(old, new, table):
  """Triangles of height 1 over the distance to the centre, at most `old / new` wide."""
  table = np.asarray(table, np.float64)
  np.testing.assert_allclose(resizing._weights(old, new), table, atol=2**-20)
  images = source(5, old, old, 1).images
  exact = np.einsum('ih,nhwc,jw->nijc', table, images.astype(np.float64), table)
  made = resized(images, new, new, 1)
  assert made.dtype == np.uint8
  assert np.abs(made - exact).max() <= 0.5 + 1e-3


@pytest.mark.parametrize('monkey_chunk', [2, 256])
@pytest.mark.parametrize(
  'shape, size',
  [((16, 16, 1), 28), ((32, 32, 3), 28), ((28, 28, 3), 16), ((9, 14, 3), 11)],
)
def test_within_one_level_of_pillow(monkeypatch, shape, size, monkey_chunk):
  monkeypatch.setattr(resizing, 'CHUNK', monkey_chunk)
  images = source(5, *shape).images
  made = resized(images, size, size, shape[-1])
  for image, ours in zip(images, made, strict=True):
    theirs = Image.fromarray(image.squeeze()).resize(
      (size, size), Image.Resampling.BILINEAR
    )
    difference = ours - np.asarray(theirs, np.int16).reshape(ours.shape)
    assert np.abs(difference).max() <= 1
    assert difference.any()  # as Pillow rounds twice


def test_black_and_white_stay_so():
  for value in (0, 255):
    for size in (7, 16, 28, 45):
      image = np.full((1, 16, 16, 3), value, np.uint8)
      assert (resized(image, size, size, 1) == value).all()


def test_channels():
  grey, colour = source(3, 6, 6, 1), source(3, 6, 6, 3)
  repeated = brought_to(grey, channels=3)
  np.testing.assert_array_equal(repeated.images, np.repeat(grey.images, 3, axis=3))
  assert repeated.image_shape == (6, 6, 3)
  np.testing.assert_array_equal(repeated.labels, grey.labels)
  luma = brought_to(colour, channels=1).images[..., 0]
  for image, ours in zip(colour.images, luma, strict=True):
    exact = image.astype(np.float64) @ [0.299, 0.587, 0.114]
    np.testing.assert_array_equal(ours, np.rint(exact))
  together = brought_to(grey, 4, 3).images
  np.testing.assert_array_equal(together, np.repeat(brought_to(grey, 4).images, 3, 3))


def test_records_that_need_no_change_are_not_copied():
  images = source(3, 6, 6, 3)
  assert brought_to(images, 6, 3) is images
  assert brought_to(images) is images
  rows = source(3, 6, 8, 3)
  assert brought_to(rows) is rows
  assert brought_to(rows, 6).image_shape == (6, 6, 3)


class Files:
  image_shape = (None, None, 3)


@pytest.mark.parametrize(
  'given, options, message',
  [
    (Files(), {'size': 28}, 'set data.image_size'),
    (source(2, 4, 4, 4), {'channels': 3}, 'npz:a: images of 4 channels cannot'),
    (source(2, 4, 4, 1), {'channels': 2}, 'cannot become 2'),
  ],
)
def test_what_cannot_be_copied_there(given, options, message):
  with pytest.raises(UserError, match=message) as error:
    brought_to(given, name='npz:a', **options)
  assert '\n' not in str(error.value)
