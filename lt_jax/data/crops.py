"""Decodes image files on the host, and crops them to one size."""

import contextlib
import functools
import importlib
import io
import math
import struct
import threading
import types
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from lt_jax.errors import UserError

if TYPE_CHECKING:
  from PIL.Image import Image

MAX_PIXELS = 2**28
"""A larger image is treated as a mistake or an attack."""

FULL_PIXELS = 2**28 // 3
"""A larger image is decoded at half its scale: 256 MiB as RGB."""

_STRIP = 512  # rows converted at a time, a multiple of all divisors
_LARGE = threading.Lock()  # large images are decoded one at a time

# Without this list Pillow would pass PostScript files to an interpreter.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF')
# What Pillow's decoders raise for damaged files.
DECODE_ERRORS = (OSError, EOFError, IndexError, SyntaxError, ValueError)
DECODE_ERRORS += (struct.error, zlib.error)
_JPEG_MODELS = ('YCbCr', 'Gray', 'RGB')  # both decoders give the same RGB for these
# Parts of libjpeg's messages when pixels are missing; it fills these with grey.
_PIXELS_LOST = ('premature end', 'bad huffman', 'bad arithmetic', 'found marker')


def open_image(file: BinaryIO) -> 'Image':
  """Opens an image file; decodes only its header.

  Like `Image.open`, but without Pillow's global size limit, which phone photographs
  exceed. The caller must check the size.

  Args:
    file: a JPEG, PNG, WebP, BMP or GIF file.

  Raises:
    UnidentifiedImageError: it is none of these.
  """
  from PIL import Image, UnidentifiedImageError

  Image.init()
  prefix = file.read(16)
  for name in FORMATS:
    factory, accept = Image.OPEN[name]
    if accept is not None and accept(prefix) is True:
      file.seek(0)
      try:
        return factory(file, '')
      except (SyntaxError, IndexError, TypeError, struct.error) as error:
        raise UnidentifiedImageError(str(error)) from None
  raise UnidentifiedImageError


def _open_by_pillow(
  encoded: bytes, where: str
) -> tuple[tuple[int, int], Callable[[int], np.ndarray]]:
  """Returns the same as `_open` for any image, which is decoded right away.

  Drops transparency; keeps the upper eight of 16 bits, and the first frame of an
  animation.

  Raises:
    UserError: it is empty, damaged, not an image or larger than `MAX_PIXELS`.
  """
  from PIL import Image, UnidentifiedImageError

  if not encoded:
    raise UserError(f'{where}: the file is empty')
  try:
    image = open_image(io.BytesIO(encoded))
    size = image.size
    _check_size(*size, where)
    least = least_divisor(*size)
    if least == 1:
      image.load()
      return size, functools.partial(_to_pixels, image)
    with _LARGE:
      image.draft(None, tuple(side // least for side in size))  # only affects JPEG
      drafted = image.size != size
      half = Image.fromarray(_to_pixels(image, 1 if drafted else least))
    return size, lambda divisor: _to_pixels(half, divisor // least)
  except UserError:
    raise
  except UnidentifiedImageError:
    raise UserError(f'{where}: not an image ({", ".join(FORMATS)})') from None
  except DECODE_ERRORS as error:
    raise _damaged(where, error) from None


def least_divisor(width: int, height: int) -> int:
  """Returns 2 for an image to decode at half its scale or less, else 1."""
  return 2 if width * height > FULL_PIXELS else 1


def _check_size(width: int, height: int, where: str) -> None:
  """Raises a `UserError` for an image of more than `MAX_PIXELS`."""
  if width * height > MAX_PIXELS:
    raise UserError(f'{where}: an image of more than {MAX_PIXELS:,} pixels; resize it')


def _damaged(where: str, error: Exception) -> UserError:
  """Returns the error for an image that a decoder rejects."""
  reason = ' '.join(str(error).split()) or type(error).__name__
  return UserError(f'{where}: a damaged image: {reason}')


def _to_pixels(image: 'Image', divisor: int) -> np.ndarray:
  """Returns an image as RGB, averaged over blocks of divisor x divisor pixels.

  It is converted strip by strip, because copies of a large image need much memory.
  """
  image.load()
  image.info.pop('transparency', None)  # dropping it causes a warning otherwise
  width, height = image.size
  made = np.empty((-(-height // divisor), -(-width // divisor), 3), np.uint8)
  for top in range(0, height, _STRIP):
    strip = _to_rgb(image.crop((0, top, width, min(top + _STRIP, height))))
    rows = np.asarray(strip.reduce(divisor) if divisor > 1 else strip)
    made[top // divisor :][: len(rows)] = rows
  return made


def _to_rgb(image: 'Image') -> 'Image':
  """Converts any colour model to RGB."""
  from PIL import Image

  if image.mode.startswith('I;16'):  # which Pillow would cut off at 255
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert('RGB')
  return image.convert('RGB')


def pixels(encoded: bytes, where: str) -> np.ndarray:
  """Returns an encoded image as (H, W, 3) uint8, in the orientation it is stored in.

  One of more than `FULL_PIXELS` comes at half its scale. Transparency is dropped, of 16
  bits the upper eight are kept, and of an animation the first frame. A JPEG of which a
  part is lost is an error even where Pillow would fill that part with grey.

  Args:
    encoded: a JPEG, PNG, WebP, BMP or GIF file.
    where: its name, for messages.

  Raises:
    UserError: it is empty, damaged, not an image or larger than `MAX_PIXELS`.
  """
  return measured(encoded, where)[1]


def measured(encoded: bytes, where: str) -> tuple[tuple[int, int], np.ndarray]:
  """Returns (width, height) of an encoded image, and what `pixels` does."""
  size, read = _open(encoded, where)
  return size, read(least_divisor(*size))


def _open(
  encoded: bytes, where: str
) -> tuple[tuple[int, int], Callable[[int], np.ndarray]]:
  """Returns (width, height) and what decodes the image, each side divided by 1 to 8.

  The divisor must be `least_divisor` at least. Of a plain JPEG only the header has been
  read by then. Whatever else it is, and everything where `simplejpeg` is not installed,
  is decoded by Pillow at once.
  """
  size = _jpeg_size(encoded)
  if size is None:
    return _open_by_pillow(encoded, where)
  _check_size(*size, where)
  return size, functools.partial(_read_jpeg, encoded, where, size)


@functools.cache
def _optional(name: str) -> types.ModuleType | None:
  """Returns a module, or None; looks once, as a vain search takes time an image."""
  try:
    return importlib.import_module(name)
  except ImportError:
    return None


def _jpeg_size(encoded: bytes) -> tuple[int, int] | None:
  """Returns (width, height) of a plain JPEG, or None for any other file."""
  simplejpeg = _optional('simplejpeg')
  if simplejpeg is None:
    return None
  try:
    height, width, model, _ = simplejpeg.decode_jpeg_header(encoded)
  except ValueError:
    return None
  return (width, height) if model in _JPEG_MODELS else None


def _read_jpeg(
  encoded: bytes, where: str, size: tuple[int, int], divisor: int
) -> np.ndarray:
  """Decodes a plain JPEG to ceil(side / divisor) pixels, from part of its waves."""
  import simplejpeg

  width, height = (-(-side // divisor) for side in size)
  large = least_divisor(*size) > 1
  try:
    with _LARGE if large else contextlib.nullcontext():
      return simplejpeg.decode_jpeg(
        encoded, 'RGB', min_width=width, min_height=height, strict=True
      )
  except ValueError as error:
    if any(lost in str(error).lower() for lost in _PIXELS_LOST):
      raise _damaged(where, error) from None
    # Strict mode also rejects harmless things, such as a few extra bytes.
    return _open_by_pillow(encoded, where)[1](divisor)


def random_resized_crop(
  encoded: bytes,
  where: str,
  generator: np.random.Generator,
  *,
  size: int,
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
  """Returns a random window of an encoded image, resized to a square.

  The window has the area a * W * H, with a uniform on `scale`, and the aspect ratio
  (width over height) r, with log r uniform on log `ratio`; its position is uniform. If
  ten such windows do not fit, it is the largest central one whose r is within `ratio`.

  If the window's sides are at least 2, 4 or 8 times `size`, the image is decoded at
  1/2, 1/4 or 1/8, which the decoder makes from the low frequencies alone. An image of
  more than `FULL_PIXELS` is decoded at 1/2 or less.

  Args:
    encoded: a JPEG, PNG, WebP, BMP or GIF file.
    where: its name, for messages.
    generator: for the random numbers. If each image has its own, made from the seed and
      the position in the run, the crop is a function of these two.
    size: side of the square in pixels.
    scale: smallest and largest share of the area.
    ratio: smallest and largest aspect ratio.

  Returns:
    (size, size, 3) uint8, bilinear and antialiased. If a side of the window is below
    2 * `size`, within one grey level of Pillow and torchvision. Otherwise, on
    photographs, it differs by 1.4 grey levels on average over the pixels, 4.5 in the
    worst image, and 56 in the worst pixel.

  Raises:
    UserError: as for `pixels`.

  Source: Szegedy et al., Going Deeper with Convolutions, arXiv 1409.4842, section 6, in
    the form of torchvision's RandomResizedCrop.
  """
  (width, height), read = _open(encoded, where)
  box = _random_box(width, height, generator, scale, ratio)
  left, top, right, bottom = box
  divisor = least_divisor(width, height)
  while divisor < 8 and 2 * divisor * size <= min(right - left, bottom - top):
    divisor *= 2
  x, y = left // divisor, top // divisor
  window = read(divisor)[y : -(-bottom // divisor), x : -(-right // divisor)]
  inside = (left / divisor - x, top / divisor - y)
  inside += (right / divisor - x, bottom / divisor - y)
  return _resized(window, size, inside)


def center_crop(encoded: bytes, where: str, *, size: int, resize: int) -> np.ndarray:
  """Resizes an encoded image by its short side and returns the central square.

  The long side becomes floor(resize * long / short), and the window begins at
  round((side - size) / 2), with halves rounded to even. The image is decoded in full,
  or at half its scale if it has more than `FULL_PIXELS`.

  Args:
    encoded: a JPEG, PNG, WebP, BMP or GIF file.
    where: its name, for messages.
    size: side of the square in pixels.
    resize: the short side in pixels, at least `size`.

  Returns:
    (size, size, 3) uint8, bilinear and antialiased.

  Raises:
    UserError: as for `pixels`, or the square does not fit.

  Source: torchvision's Resize and CenterCrop, which it matches to one grey level.
  """
  if size > resize:
    raise UserError(f'a crop of {size} pixels out of a short side of {resize}')
  sides, image = measured(encoded, where)
  least = least_divisor(*sides)
  box = []
  for side in sides:
    resized = resize * side // min(sides)
    start = round((resized - size) / 2)
    end = min((start + size) * side / resized, side)
    box.append((start * side / resized / least, end / least))
  (left, right), (top, bottom) = box
  # Compute only the square: resizing a strip of 1 x 30,000 would make one of 256 x 7.7
  # million.
  window = (left, top, right, bottom)
  return _resized(image, size, window)


class Crop(NamedTuple):
  """Crops encoded images of any size to squares.

  Attributes:
    size: side of the square in pixels.
    resize: the short side of an image before the central square is taken.
    area: the smallest share of an image in a random window; 1: the whole of a square.
  """

  size: int
  resize: int
  area: float = 0.08

  def training(
    self, encoded: bytes, where: str, generator: np.random.Generator
  ) -> np.ndarray:
    """Returns a random window, see `random_resized_crop`."""
    scale = (self.area, 1.0)
    return random_resized_crop(encoded, where, generator, size=self.size, scale=scale)

  def evaluation(self, encoded: bytes, where: str) -> np.ndarray:
    """Returns the central window, see `center_crop`."""
    return center_crop(encoded, where, size=self.size, resize=self.resize)


def _random_box(
  width: int,
  height: int,
  generator: np.random.Generator,
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
  """Draws (left, top, right, bottom) of a window."""
  for _ in range(10):
    area = width * height * generator.uniform(*scale)
    r = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * r)), round(math.sqrt(area / r))
    if 0 < w <= width and 0 < h <= height:
      top = int(generator.integers(height - h + 1))
      left = int(generator.integers(width - w + 1))
      return left, top, left + w, top + h
  w = min(width, round(height * ratio[1]))
  h = min(height, round(width / ratio[0]))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def _resized(
  image: np.ndarray, size: int, box: tuple[float, float, float, float]
) -> np.ndarray:
  """Returns a window (left, top, right, bottom) of an image as a square.

  If `cykooz.resizer` is not installed, Pillow does it. It is slower, and its values
  differ by one in an eighth of all pixels; on real photographs by two in one of 7.5
  million.
  """
  resizer = _optional('cykooz_resizer')
  if resizer is None:
    return _resized_by_pillow(image, size, box)
  kind = resizer.PixelType.U8x3
  source = resizer.ImageData(image.shape[1], image.shape[0], kind, image.tobytes())
  square = resizer.ImageData(size, size, kind)
  left, top, right, bottom = box
  options = resizer.ResizeOptions(
    resizer.ResizeAlg.convolution(resizer.FilterType.bilinear),
    crop_box=resizer.CropBox(left, top, right - left, bottom - top),
  )
  resizer.Resizer().resize(source, square, options)
  return np.frombuffer(square.get_buffer(), np.uint8).reshape(size, size, 3)


def _resized_by_pillow(
  image: np.ndarray, size: int, box: tuple[float, float, float, float]
) -> np.ndarray:
  """Does what `_resized` does, bit for bit like torchvision."""
  from PIL import Image

  square = Image.fromarray(image).resize(
    (size, size), Image.Resampling.BILINEAR, box=box
  )
  return np.asarray(square)
