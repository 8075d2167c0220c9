"""Images on the host: decoded whatever their kind, and cropped to one size."""

import io
import math
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

from lt_jax.errors import UserError

if TYPE_CHECKING:
  from PIL.Image import Image

MAX_PIXELS = 2**28 // 3
"""Above this an image is taken for a mistake or an attack: 256 MiB as RGB."""

# Without this limit Pillow would hand a PostScript file to an interpreter.
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF')
# What the decoders of Pillow raise on damaged files.
_DECODE_ERRORS = (OSError, EOFError, IndexError, SyntaxError, ValueError)
_DECODE_ERRORS += (struct.error, zlib.error)


def decode(encoded: bytes, where: str) -> 'Image':
  """Returns an encoded image as RGB, in the orientation it is stored in.

  Transparency is dropped, of 16 bits the upper eight are kept, and of an animation the
  first frame.

  Args:
    encoded: a JPEG, PNG, WebP, BMP or GIF file.
    where: its name, for messages.

  Raises:
    UserError: it is empty, damaged, not an image or larger than `MAX_PIXELS`.
  """
  from PIL import Image, UnidentifiedImageError

  too_large = f'{where}: an image of more than {MAX_PIXELS:,} pixels'
  if not encoded:
    raise UserError(f'{where}: the file is empty')
  try:
    with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
      if image.width * image.height > MAX_PIXELS:
        raise UserError(too_large)
      return _to_rgb(image)
  except UserError:
    raise
  except (Image.DecompressionBombError, Image.DecompressionBombWarning):
    raise UserError(too_large) from None
  except UnidentifiedImageError:
    raise UserError(f'{where}: not an image ({", ".join(_FORMATS)})') from None
  except _DECODE_ERRORS as error:
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise UserError(f'{where}: a damaged image: {reason}') from None


def _to_rgb(image: 'Image') -> 'Image':
  """Converts any colour model to RGB."""
  from PIL import Image

  if image.mode.startswith('I;16'):  # which Pillow would cut off at 255
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert('RGB')
  image.load()
  image.info.pop('transparency', None)  # which draws a warning when it is dropped
  return image.convert('RGB')


def random_resized_crop(
  image: np.ndarray,
  generator: np.random.Generator,
  *,
  size: int,
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
  """Returns a random window of an image, resized to a square.

  The window has the area a * W * H, with a uniform on `scale`, and the width over the
  height r, with log r uniform on log `ratio`; its place is uniform. If ten such windows
  do not fit, it is the largest central one whose r is within `ratio`.

  Args:
    image: (H, W, 3) uint8.
    generator: of the random numbers; one for each image, made from the seed and the
      position in the run, makes the crop a function of these two.
    size: side of the square in pixels.
    scale: least and greatest share of the area.
    ratio: least and greatest width over height.

  Returns:
    (size, size, 3) uint8, bilinear and antialiased.

  Source: Szegedy et al., Going Deeper with Convolutions, arXiv 1409.4842, section 6, in
    the form of torchvision's RandomResizedCrop. There the filter ends at the border of
    the window; here it sees the pixels beyond.
  """
  height, width, _ = image.shape
  return _resized(image, size, _random_box(width, height, generator, scale, ratio))


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


def center_crop(image: np.ndarray, *, size: int, resize: int) -> np.ndarray:
  """Returns the central square of an image whose short side is first resized.

  The long side becomes floor(resize * long / short), and the window begins at
  round((side - size) / 2), halves to even.

  Args:
    image: (H, W, 3) uint8.
    size: side of the square in pixels.
    resize: the short side in pixels, `size` at least.

  Returns:
    (size, size, 3) uint8, bilinear and antialiased.

  Raises:
    UserError: the square does not fit.

  Source: torchvision's Resize and CenterCrop, to which it is equal up to rounding.
  """
  if size > resize:
    raise UserError(f'a crop of {size} pixels out of a short side of {resize}')
  height, width, _ = image.shape
  box = []
  for side in (width, height):
    resized = resize * side // min(width, height)
    start = round((resized - size) / 2)
    box.append((start * side / resized, min((start + size) * side / resized, side)))
  (left, right), (top, bottom) = box
  # Only the square is computed: a strip of 1 x 30,000 would become one of 256 x 7.7
  # million.
  window = (left, top, right, bottom)
  return _resized(image, size, window)


def _resized(
  image: np.ndarray, size: int, box: tuple[float, float, float, float]
) -> np.ndarray:
  """Returns a window (left, top, right, bottom) of an image as a square."""
  from PIL import Image

  square = Image.fromarray(image).resize(
    (size, size), Image.Resampling.BILINEAR, box=box
  )
  return np.asarray(square)
