"""Crops: every file becomes RGB or one line, and windows are where they should be."""

import glob
import io
import os
import zlib

import numpy as np
import pytest
from PIL import Image

from lt_jax.data import crops
from lt_jax.errors import UserError


def encode(image, kind, **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def decode(encoded, where='x'):
  """The pixels as Pillow decodes them, whatever the format."""
  return crops._open_by_pillow(encoded, where)[1](1)


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
    np.testing.assert_array_equal(decode(encoded), expected)


def test_sixteen_bits_are_scaled_and_not_cut_off():
  deep = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
  image = decode(encode(Image.fromarray(deep), 'PNG'))
  for channel in range(3):
    assert image[0, :, channel].tolist() == [0, 0, 1, 128, 255]


def test_cmyk_jpeg_has_the_right_colours():
  colour = Image.new('RGB', (16, 16), (200, 100, 30))
  image = decode(encode(colour.convert('CMYK'), 'JPEG', quality=100))
  assert np.abs(image.astype(int) - (200, 100, 30)).max() <= 8


def test_orientation_is_not_applied():
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by a quarter
  encoded = encode(Image.new('RGB', (20, 10)), 'JPEG', exif=exif)
  assert decode(encoded).shape == (10, 20, 3)


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
    (bitmap_of(30000, 30000), 'more than 268,435,456 pixels'),
    (bitmap_of(17000, 17000), 'more than 268,435,456 pixels'),
  ],
)
def test_bad_files_are_named_in_a_line(encoded, message):
  with pytest.raises(UserError, match=message) as error:
    decode(encoded, 'folder/a b.jpg')
  assert str(error.value).startswith('folder/a b.jpg: ')
  assert '\n' not in str(error.value)


def jpeg_of(width, height):
  """A JPEG whose header claims a size."""
  encoded = bytearray(encode(Image.new('RGB', (8, 8)), 'JPEG'))
  place = encoded.index(b'\xff\xc0') + 5
  encoded[place : place + 4] = height.to_bytes(2, 'big') + width.to_bytes(2, 'big')
  return bytes(encoded)


def png_of(width, height):
  """A PNG whose header claims a size."""
  encoded = encode(Image.new('L', (1, 1)), 'PNG')
  header = (
    b'IHDR' + width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + encoded[24:29]
  )
  return encoded[:12] + header + zlib.crc32(header).to_bytes(4, 'big') + encoded[33:]


FAST = ('simplejpeg', 'cykooz_resizer')


@pytest.fixture(params=['fast', 'Pillow'])
def level(request, monkeypatch):
  """With the fast libraries and without; by how much their crops are off Pillow's."""
  for name in FAST:
    if request.param == 'fast':
      pytest.importorskip(name)
  if request.param == 'Pillow':
    monkeypatch.setattr(crops, '_optional', lambda name: None)
  return int(request.param == 'fast')


def assert_within(ours, theirs, level):
  assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.uint8
  assert np.abs(ours.astype(int) - theirs).max() <= level


def texture(rng, width, height):
  """Smooth shapes and fine grain: amplitudes fall with the frequency, as in nature."""
  wave = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
  wave[0, 0] = 1
  channels = []
  for _ in range(3):
    spectrum = np.fft.fft2(rng.standard_normal((height, width))) / wave
    grey = np.fft.ifft2(spectrum).real
    channels.append(128 + 50 * (grey - grey.mean()) / grey.std())
  shared = 0.8 * channels[0]
  pixels = np.stack([shared + 0.2 * channel for channel in channels], -1)
  return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def both_crops(encoded, where='x', seed=0, size=24):
  """The two crops of an encoded image."""
  generator = np.random.default_rng(seed)
  return (
    crops.random_resized_crop(encoded, where, generator, size=size),
    crops.center_crop(encoded, where, size=size, resize=size + 4),
  )


def center_crop(image, size, resize):
  """The central square as Pillow resizes it."""
  with pytest.MonkeyPatch.context() as without:
    without.setattr(crops, '_optional', lambda name: None)
    square = crops.center_crop(encode(image, 'PNG'), 'x', size=size, resize=resize)
  return square


def expected_crops(image, seed=0, size=24):
  """The same of a decoded one, with Pillow as torchvision uses it."""
  generator = np.random.default_rng(seed)
  box = crops._random_box(*image.size, generator, (0.08, 1.0), (3 / 4, 4 / 3))
  squares = [
    image.crop(box).resize((size, size), Image.Resampling.BILINEAR),
    center_crop(image, size=size, resize=size + 4),
  ]
  return [np.asarray(square) for square in squares]


@pytest.mark.parametrize(
  'options',
  [
    {'subsampling': '4:2:0'},
    {'subsampling': '4:2:2'},
    {'subsampling': '4:4:4'},
    {'progressive': True},
    {'restart_marker_rows': 1},
    {'keep_rgb': True},
    {'quality': 30},
    {'mode': 'L'},
    {'mode': 'CMYK'},
  ],
  ids=str,
)
def test_crops_of_a_jpeg_are_those_of_pillow(rng, level, options):
  options = dict(options)
  image = texture(rng, 47, 45).convert(options.pop('mode', 'RGB'))
  encoded = encode(image, 'JPEG', **options)
  decoded = Image.open(io.BytesIO(encoded)).convert('RGB')
  np.testing.assert_array_equal(crops.pixels(encoded, 'x'), np.asarray(decoded))
  for crop, expected in zip(both_crops(encoded), expected_crops(decoded), strict=True):
    assert crop.shape == (24, 24, 3)
    assert_within(crop, expected, level)


def test_crops_of_other_files(rng, level):
  image = texture(rng, 47, 45)
  deep = np.asarray(image)[..., 0].astype(np.uint16) << 8
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by a quarter
  animated = image.convert('P')
  cases = [
    (encode(image, 'PNG'), image),
    (encode(image, 'WEBP', lossless=True), image),
    (encode(Image.fromarray(deep), 'PNG'), image.getchannel(0).convert('RGB')),
    (
      encode(animated, 'GIF', save_all=True, append_images=[animated.rotate(180)]),
      animated.convert('RGB'),
    ),
    (encode(image, 'JPEG', exif=exif), None),
    (encode(image.resize((1, 1)), 'JPEG'), None),
    (encode(image.resize((1, 60)), 'JPEG'), None),
  ]
  for encoded, decoded in cases:
    decoded = decoded or Image.open(io.BytesIO(encoded)).convert('RGB')
    for crop, expected in zip(
      both_crops(encoded, 'photograph.jpg'), expected_crops(decoded), strict=True
    ):
      assert_within(crop, expected, level)


@pytest.mark.parametrize('size', [209, 208, 150, 104, 60, 52, 26, 20])
def test_large_windows_are_close_to_exact(rng, level, size):
  encoded = encode(texture(rng, 640, 480), 'JPEG', quality=90)
  decoded = Image.open(io.BytesIO(encoded)).convert('RGB')
  # 0.75 * 640 * 480 with r = 4 / 3: w = sqrt(307200) = 554.3, h = sqrt(172800) = 415.7.
  generator = Fixed([0.75, 0.28768207], [3, 37])
  crop = crops.random_resized_crop(encoded, 'x', generator, size=size)
  window = decoded.crop((37, 3, 37 + 554, 3 + 416))
  exact = np.asarray(window.resize((size, size), Image.Resampling.BILINEAR))
  difference = np.abs(crop.astype(int) - exact)
  if size == 209:  # 416 is less than twice
    assert difference.max() <= level
  else:
    assert 0.2 < difference.mean() < 3.5
    assert difference.max() < 30


def test_a_smaller_image_is_not_shifted(level):
  # A shift by half a pixel would change the steepest places by 8 grey levels.
  x, y = np.meshgrid(np.arange(640), np.arange(480))
  waves = [np.sin(0.157 * x), np.sin(0.157 * y), np.sin(0.111 * (x + y))]
  image = Image.fromarray((128 + 100 * np.stack(waves, -1)).round().astype(np.uint8))
  encoded = encode(image, 'JPEG', quality=100, subsampling='4:4:4')
  for corner in range(5):
    # 0.5 * 640 * 480 = 391.9 squared, rounded to 392.
    generator = Fixed([0.5, 0.0], [corner + 3, corner + 6])
    crop = crops.random_resized_crop(encoded, 'x', generator, size=128)
    box = (corner + 6, corner + 3, corner + 398, corner + 395)
    exact = image.crop(box).resize((128, 128), Image.Resampling.BILINEAR)
    difference = crop.astype(int) - np.asarray(exact)
    assert np.abs(difference[2:-2, 2:-2]).max() <= 4


def test_photographs_are_within_the_stated_tolerance(level):
  folder = os.path.join(os.environ.get('LT_JAX_DATA', '.'), 'photos')
  names = sorted(glob.glob(f'{folder}/*.jpg'))[::4]
  if not names:
    pytest.skip('LT_JAX_DATA names no folder with photos/*.jpg')
  means, largest = [], 0
  for seed, name in enumerate(names):
    with open(name, 'rb') as file:
      encoded = file.read()
    decoded = Image.open(io.BytesIO(encoded)).convert('RGB')
    exact, center = expected_crops(decoded, seed, 224)  # all of them below 448 pixels
    crop, ours = both_crops(encoded, name, seed, 224)
    assert_within(crop, exact, 2 * level)  # its two passes round apart, very rarely
    assert_within(ours, center, 2 * level)
    crop, _ = both_crops(encoded, name, seed, 80)
    exact, _ = expected_crops(decoded, seed, 80)
    difference = np.abs(crop.astype(int) - exact)
    means.append(difference.mean())
    largest = max(largest, difference.max())
  assert 0 < np.mean(means) < 2
  assert max(means) < 5
  assert largest < 70


@pytest.mark.parametrize(
  ('encoded', 'message'),
  [
    (b'', 'is empty'),
    (b'<html>not found</html>', 'not an image'),
    (encode(ramp(40, 40), 'JPEG')[:300], 'damaged'),
    (encode(ramp(40, 40), 'JPEG')[:-200], 'damaged'),
    (encode(ramp(40, 40), 'JPEG', progressive=True)[:-200], 'damaged'),
    (encode(ramp(40, 40), 'PNG')[:-60], 'damaged'),
    (bitmap_of(30000, 30000), 'more than 268,435,456 pixels'),
    (jpeg_of(30000, 30000), 'more than 268,435,456 pixels'),
  ],
)
def test_bad_files_are_named_by_every_crop(level, encoded, message):
  for crop in (crops.pixels, lambda *file: both_crops(*file)):
    with pytest.raises(UserError, match=message) as error:
      crop(encoded, 'folder/a b.jpg')
    assert str(error.value).startswith('folder/a b.jpg: ')
    assert '\n' not in str(error.value)
  with pytest.raises(UserError, match=message):
    crops.center_crop(encoded, 'x', size=24, resize=24)


@pytest.mark.parametrize(
  ('kind', 'options'),
  [
    ('JPEG', {}),
    ('JPEG', {'progressive': True}),
    ('JPEG', {'mode': 'CMYK'}),
    ('PNG', {}),
    ('PNG', {'mode': 'RGBA'}),
    ('PNG', {'mode': 'P'}),
  ],
  ids=str,
)
def test_large_images_are_decoded_at_half_their_scale(
  rng, level, monkeypatch, kind, options
):
  image = texture(rng, 95, 1291)  # more than two strips, and odd sides
  encoded = encode(image.convert(options.pop('mode', 'RGB')), kind, **options)
  whole = crops.pixels(encoded, 'x')
  crop = crops.random_resized_crop(
    encoded, 'x', np.random.default_rng(0), size=8, scale=(1, 1), ratio=(0.07, 0.08)
  )
  square = crops.center_crop(encoded, 'x', size=16, resize=16)
  expected = np.asarray(Image.fromarray(whole).reduce(2))
  monkeypatch.setattr(crops, 'FULL_PIXELS', whole[..., 0].size - 1)
  size, half = crops.measured(encoded, 'x')
  assert size == (95, 1291) and half.shape == expected.shape == (646, 48, 3)
  np.testing.assert_array_equal(half, crops.pixels(encoded, 'x'))
  difference = np.abs(half.astype(int) - expected)
  assert difference.mean() < 3.5 and (kind == 'JPEG' or not difference.any())
  again = crops.random_resized_crop(
    encoded, 'x', np.random.default_rng(0), size=8, scale=(1, 1), ratio=(0.07, 0.08)
  )
  assert_within(again, crop, 1 if kind == 'PNG' else 12)  # which was at 1/8 anyway
  near = crops.center_crop(encoded, 'x', size=16, resize=16).astype(int)
  assert np.abs(near - square).mean() < 3
  monkeypatch.setattr(crops, 'MAX_PIXELS', crops.FULL_PIXELS)
  with pytest.raises(UserError, match='more than 122,644 pixels: resize it'):
    crops.pixels(encoded, 'x')


@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_a_photograph_of_a_phone_is_within_a_limit_of_pillow(kind):
  """With 108 megapixels; the header alone is looked at."""
  encoded = jpeg_of(12000, 9000) if kind == 'JPEG' else png_of(12000, 9000)
  assert crops.open_image(io.BytesIO(encoded)).size == (12000, 9000)
  crops._check_size(12000, 9000, 'x')
  assert crops.least_divisor(12000, 9000) == 2 and crops.least_divisor(4000, 3000) == 1


def test_lost_pixels_are_never_grey(rng):
  pytest.importorskip('simplejpeg')
  encoded = encode(texture(rng, 64, 64), 'JPEG', quality=95)
  lost = encoded[:-900] + b'\xff\xd9'  # with the marker that ends a whole image
  assert Image.open(io.BytesIO(lost)).convert('RGB').size == (64, 64)
  for crop in (crops.pixels, both_crops):
    with pytest.raises(UserError, match='x: a damaged image: Corrupt JPEG data'):
      crop(lost, 'x')


def test_superfluous_bytes_do_no_harm(rng, level):
  encoded = encode(texture(rng, 64, 64), 'JPEG')
  for more in (encoded[:-2] + b'abcde' + encoded[-2:], encoded + b'abcde'):
    image = crops.pixels(more, 'x')
    np.testing.assert_array_equal(image, crops.pixels(encoded, 'x'))
    for crop, expected in zip(
      both_crops(more, size=40), both_crops(encoded, size=40), strict=True
    ):
      np.testing.assert_array_equal(crop, expected)
    halved = both_crops(more, size=20)[0].astype(int)
    assert np.abs(halved - both_crops(encoded, size=20)[0]).mean() < 1


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
  cropped = crops.center_crop(encode(image, 'PNG'), 'x', size=224, resize=256)
  assert cropped.shape == (224, 224, 3)
  assert cropped.dtype == np.uint8
  assert np.abs(cropped - expected).max() <= 1  # Pillow may swap its two passes


def test_center_crop_of_a_strip_takes_little_memory():
  strip = Image.new('RGB', (30000, 1), (1, 2, 3))
  cropped = crops.center_crop(encode(strip, 'PNG'), 'x', size=224, resize=256)
  assert cropped.shape == (224, 224, 3)
  assert (cropped == (1, 2, 3)).all()
  with pytest.raises(UserError, match='256 pixels out of a short side of 224'):
    crops.center_crop(encode(ramp(300, 300), 'PNG'), 'x', size=256, resize=224)


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
  encoded = encode(image, 'PNG')
  cropped = crops.random_resized_crop(encoded, 'x', generator, size=32)
  logs = (pytest.approx(-0.2876821), pytest.approx(0.2876821))
  assert generator.asked == [(0.08, 1.0), logs, 80 - 57 + 1, 100 - 71 + 1]
  window = image.crop((29, 7, 100, 64))  # 57 is less than twice 32
  expected = window.resize((32, 32), Image.Resampling.BILINEAR)
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
def test_impossible_windows_are_cut_from_the_middle(width, height, box):
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
  encoded = encode(ramp(90, 70), 'PNG')

  def crop(*seed):
    generator = np.random.default_rng(seed)
    return crops.random_resized_crop(encoded, 'x', generator, size=24)

  first = crop(3, 17)
  assert first.shape == (24, 24, 3)
  assert first.dtype == np.uint8
  crop(3, 18)
  np.testing.assert_array_equal(first, crop(3, 17))
  assert any((first != crop(3, p)).any() for p in (18, 19))
  assert (first != crop(4, 17)).any()


def test_a_whole_window_keeps_the_corners():
  encoded, generator = encode(ramp(64, 64), 'PNG'), Fixed([1.0, 0.0], [0, 0])
  cropped = crops.random_resized_crop(encoded, 'x', generator, size=64)
  np.testing.assert_array_equal(cropped, np.asarray(ramp(64, 64)))
