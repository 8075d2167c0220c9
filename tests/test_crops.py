"""Crops: every file becomes RGB or one line, and windows are where they should be."""

import io

import numpy as np
import pytest
from PIL import Image

from lt_jax.data import crops
from lt_jax.errors import UserError


def encode(image, kind, **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def ramp(width, height):
  """An image whose red is the column and whose green is the row, scaled to 8 bits."""
  red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
  pixels = np.stack([red, green, np.full_like(red, 7)], -1).round().astype(np.uint8)
  return Image.fromarray(pixels)


def test_every_colour_model_becomes_rgb(rng):
  pixels = rng.integers(0, 256, (5, 7, 3), np.uint8)
  colour = Image.fromarray(pixels)
  grey = Image.fromarray(pixels[..., 0])
  grey3 = np.repeat(pixels[..., :1], 3, -1)
  transparent = colour.copy()
  transparent.putalpha(grey)
  palette = grey.convert('P')
  cases = [
    (encode(colour, 'PNG'), pixels),
    (encode(colour, 'WEBP', lossless=True), pixels),
    (encode(colour, 'BMP'), pixels),
    (encode(grey, 'PNG'), grey3),
    (encode(transparent, 'PNG'), pixels),
    (encode(palette, 'PNG', transparency=bytes(range(9))), grey3),
    (encode(palette, 'GIF', save_all=True, append_images=[palette.rotate(180)]), grey3),
  ]
  for encoded, expected in cases:
    image = crops.decode(encoded, 'x')
    assert image.mode == 'RGB'
    np.testing.assert_array_equal(np.asarray(image), expected)


def test_sixteen_bits_are_scaled_and_not_cut_off():
  deep = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
  image = np.asarray(crops.decode(encode(Image.fromarray(deep), 'PNG'), 'x'))
  for channel in range(3):
    assert image[0, :, channel].tolist() == [0, 0, 1, 128, 255]


def test_cmyk_jpeg_has_the_right_colours():
  colour = Image.new('RGB', (16, 16), (200, 100, 30))
  image = crops.decode(encode(colour.convert('CMYK'), 'JPEG', quality=100), 'x')
  assert np.abs(np.asarray(image).astype(int) - (200, 100, 30)).max() <= 8


def test_orientation_is_not_applied():
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by a quarter
  encoded = encode(Image.new('RGB', (20, 10)), 'JPEG', exif=exif)
  assert crops.decode(encoded, 'x').size == (20, 10)


def bitmap_of(width, height):
  """A BMP header that claims a size."""
  encoded = bytearray(encode(Image.new('L', (1, 1)), 'BMP'))
  encoded[18:22] = width.to_bytes(4, 'little')
  encoded[22:26] = height.to_bytes(4, 'little')
  return bytes(encoded)


@pytest.mark.parametrize(
  ('encoded', 'message'),
  [
    (b'', 'is empty'),
    (b'<html>not found</html>', 'not an image'),
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'not an image'),
    (encode(ramp(40, 40), 'JPEG')[:300], 'damaged'),
    (encode(ramp(40, 40), 'JPEG')[:-200], 'damaged'),
    (encode(ramp(40, 40), 'PNG')[:-60], 'damaged'),
    (bitmap_of(30000, 30000), 'more than 89,478,485 pixels'),
    (bitmap_of(10000, 10000), 'more than 89,478,485 pixels'),
  ],
)
def test_bad_files_are_named_in_a_line(encoded, message):
  with pytest.raises(UserError, match=message) as error:
    crops.decode(encoded, 'folder/a b.jpg')
  assert str(error.value).startswith('folder/a b.jpg: ')
  assert '\n' not in str(error.value)


def test_the_pixel_limit_does_not_need_the_warning_of_pillow(monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
  with pytest.raises(UserError, match='more than 89,478,485 pixels'):
    crops.decode(bitmap_of(10000, 10000), 'x')


@pytest.mark.parametrize(
  ('width', 'height', 'resized'),
  [
    (500, 375, (341, 256)),  # 341.33 is cut off
    (375, 500, (256, 341)),
    (300, 451, (256, 384)),  # so is 384.85
    (64, 64, (256, 256)),
    (256, 300, (256, 300)),
    (1, 9, (256, 2304)),
  ],
)
def test_center_crop_is_resize_then_crop(rng, width, height, resized):
  image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
  whole = np.asarray(image.resize(resized, Image.Resampling.BILINEAR))
  # round((341 - 224) / 2) = round(58.5) = 58, halves to even.
  start = {256: 16, 341: 58, 384: 80, 300: 38, 2304: 1040}
  left, top = start[resized[0]], start[resized[1]]
  expected = whole[top : top + 224, left : left + 224].astype(int)
  cropped = crops.center_crop(np.asarray(image), size=224, resize=256)
  assert cropped.shape == (224, 224, 3)
  assert cropped.dtype == np.uint8
  assert np.abs(cropped - expected).max() <= 1  # Pillow may swap its two passes


def test_center_crop_of_a_strip_takes_little_memory():
  cropped = crops.center_crop(
    np.full((1, 30000, 3), (1, 2, 3), np.uint8), size=224, resize=256
  )
  assert cropped.shape == (224, 224, 3)
  assert (cropped == (1, 2, 3)).all()
  with pytest.raises(UserError, match='256 pixels out of a short side of 224'):
    crops.center_crop(np.asarray(ramp(300, 300)), size=256, resize=224)


class Fixed:
  """A generator that gives out prepared numbers, and records what it is asked."""

  def __init__(self, uniform, integers=()):
    self.numbers, self.places = list(uniform), list(integers)
    self.asked = []

  def uniform(self, low, high):
    self.asked.append((low, high))
    return self.numbers.pop(0)

  def integers(self, high):
    self.asked.append(high)
    return self.places.pop(0)


def test_a_random_window_by_hand():
  # Half of 100 x 80 with r = 1.25: w = sqrt(5000) = 70.7, h = sqrt(3200) = 56.6.
  generator, image = Fixed([0.5, 0.2231435513], [7, 29]), ramp(100, 80)
  cropped = crops.random_resized_crop(np.asarray(image), generator, size=32)
  logs = (pytest.approx(-0.2876821), pytest.approx(0.2876821))
  assert generator.asked == [(0.08, 1.0), logs, 80 - 57 + 1, 100 - 71 + 1]
  expected = image.resize((32, 32), Image.Resampling.BILINEAR, box=(29, 7, 100, 64))
  np.testing.assert_array_equal(cropped, np.asarray(expected))


@pytest.mark.parametrize(
  ('width', 'height', 'box'),
  [
    (100, 100, (0, 0, 100, 100)),
    (400, 100, (133, 0, 266, 100)),  # w = round(133.3), left = floor(267 / 2)
    (100, 400, (0, 133, 100, 266)),
    (1000, 2, (498, 0, 501, 2)),  # w = round(2.67) = 3, left = floor(997 / 2)
    (1, 1, (0, 0, 1, 1)),
    (1, 50, (0, 24, 1, 25)),
  ],
)
def test_what_never_fits_is_cut_from_the_middle(width, height, box):
  # 100 times the area fits into nothing, whatever the ratio.
  generator = Fixed([100.0, 0.0] * 10)
  scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
  assert crops._random_box(width, height, generator, scale, ratio) == box
  assert not generator.numbers


def test_windows_are_spread_as_they_should():
  generator = np.random.default_rng(0)
  scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
  width, height = 600, 500
  boxes = [
    crops._random_box(width, height, generator, scale, ratio) for _ in range(4000)
  ]
  left, top, right, bottom = np.array(boxes).T
  assert (left >= 0).all() and (top >= 0).all()
  assert (right <= width).all() and (bottom <= height).all()
  share = (right - left) * (bottom - top) / (width * height)
  ratios = (right - left) / (bottom - top)
  assert 0.075 < share.min() < 0.09
  assert 0.9 < share.max() <= 1.001
  assert 0.74 < ratios.min() < 0.76
  assert 1.32 < ratios.max() < 1.35
  # Windows up to 0.6 of the area always fit, so that there the share is uniform.
  small = share[share < 0.6]
  quarters = np.quantile(small, [0.25, 0.5, 0.75])
  np.testing.assert_allclose(quarters, 0.08 + 0.52 * np.array([1, 2, 3]) / 4, atol=0.02)
  # The logarithm of the ratio is uniform, and so symmetric about 0, its ends half each.
  logs = np.log(ratios[share < 0.6])
  np.testing.assert_allclose(np.median(logs), 0, atol=0.02)
  np.testing.assert_allclose(
    np.quantile(logs, [0.25, 0.75]), np.log(4 / 3) * np.array([-0.5, 0.5]), atol=0.02
  )
  # The place is uniform on what the window leaves free.
  slack = width - (right - left)
  np.testing.assert_allclose((left / np.maximum(slack, 1)).mean(), 0.5, atol=0.03)


def test_a_crop_is_a_function_of_its_generator():
  image = ramp(90, 70)

  def crop(*seed):
    return crops.random_resized_crop(
      np.asarray(image), np.random.default_rng(seed), size=24
    )

  first = crop(3, 17)
  assert first.shape == (24, 24, 3)
  assert first.dtype == np.uint8
  crop(3, 18)
  np.testing.assert_array_equal(first, crop(3, 17))
  assert any((first != crop(3, p)).any() for p in (18, 19))
  assert (first != crop(4, 17)).any()


def test_a_whole_window_keeps_the_corners():
  cropped = crops.random_resized_crop(
    np.asarray(ramp(64, 64)), Fixed([1.0, 0.0], [0, 0]), size=64
  )
  np.testing.assert_array_equal(cropped, np.asarray(ramp(64, 64)))
