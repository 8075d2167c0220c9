"""Resizes images in memory, once: to one size and number of channels, or rotated.

This lets one network use data sets of different shapes: MNIST (28x28x1), USPS (16x16x1)
and MNIST-M (32x32x3) as 28x28x3. `crops` handles files of many sizes.
"""

import dataclasses
from typing import Any

import numpy as np

from lt_jax.errors import UserError

CHUNK = 256
"""Images at a time; their float64 copies take about 20 MB."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601), as in Pillow."""


def brought_to(source: Any, size: int = 0, channels: int = 0, name: str = '') -> Any:
  """Returns a source in memory with its images resized and their channels converted.

  Args:
    source: with `images` (N, H, W, channels) uint8, such as `arrays.Arrays`.
    size: side of the resulting square; other shapes are stretched. 0 keeps height and
      width.
    channels: 1 or 3; 0 keeps them.
    name: name of the source, for messages.

  Returns:
    The source itself if there is nothing to change.

  Raises:
    UserError: its images are not in memory, or their channels cannot be converted.
  """
  images = getattr(source, 'images', None)
  height, width, have = source.image_shape
  wanted = (size or height, size or width, channels or have)
  if wanted == (height, width, have):
    return source
  if images is None:
    raise UserError(
      f'{name or "the source"}: data.size and data.channels are for images in memory; '
      'for files of many sizes set data.image_size and data.resize'
    )
  if images.dtype != np.uint8:
    raise UserError(
      f'{name or "the source"}: data.size and data.channels are for uint8 images, not '
      f'for {images.dtype} arrays'
    )
  if have != wanted[2] and {have, wanted[2]} != {1, 3}:
    raise UserError(
      f'{name or "the source"}: images of {have} channels cannot become {wanted[2]}: '
      'set data.channels to 0'
    )
  return dataclasses.replace(source, images=resized(images, *wanted))


def turned(source: Any, degrees: int, name: str = '') -> Any:
  """Returns a source in memory with its images rotated counterclockwise.

  Bilinear, about the centre; pixels from outside the image are black.

  Args:
    source: with `images` (N, H, W, 1 or 3) uint8.
    degrees: counterclockwise.
    name: name of the source, for messages.

  Raises:
    UserError: its images are not in memory, or are features.
  """
  from PIL import Image

  images = getattr(source, 'images', None)
  if images is None or images.dtype != np.uint8 or images.shape[3] not in (1, 3):
    raise UserError(
      f'{name or "the source"}: only uint8 images in memory can be rotated'
    )

  def turn(image: np.ndarray) -> np.ndarray:
    flat = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return np.array(flat.rotate(degrees, Image.Resampling.BILINEAR))

  made = np.stack([turn(image) for image in images]).reshape(images.shape)
  return dataclasses.replace(source, images=made)


def resized(images: np.ndarray, height: int, width: int, channels: int) -> np.ndarray:
  """Returns images at another size: bilinear, antialiased, rounded once at the end.

  Grey is repeated to RGB, and RGB becomes grey by `LUMA`. The result is the same byte
  for byte on every machine, as a fingerprint needs it: the weights are multiples of
  2^-20, so sums of their products are exact in float64 in whatever order.

  Args:
    images: (N, H, W, channels) uint8, of 1 or 3 channels if they are to change.
    height: of the result.
    width: of the result.
    channels: of the result.

  Returns:
    (N, height, width, channels) uint8, within one grey level of Pillow's, which rounds
    between its two passes.
  """
  if images.shape[1:3] == (height, width) and channels >= images.shape[3]:
    return np.repeat(images, channels // images.shape[3], axis=3)
  rows = _weights(images.shape[1], height)
  columns = _weights(images.shape[2], width).T
  made = np.empty((len(images), height, width, channels), np.uint8)
  for start in range(0, len(images), CHUNK):
    planes = np.moveaxis(images[start : start + CHUNK], 3, 1).astype(np.float64)
    planes = rows @ planes @ columns
    if channels == 1 < planes.shape[1]:
      planes = sum(planes[:, c, None] * share for c, share in enumerate(LUMA))
    # One plane of grey is broadcast to all channels.
    made[start : start + CHUNK] = np.moveaxis(np.rint(planes), 1, 3)
  return made


def _weights(old: int, new: int) -> np.ndarray:
  """Returns (new, old): what each old pixel adds to a new one, in float64.

  A triangle around the centre of the new pixel, as wide as the two nearest pixels, and
  wider by the factor by which pixels get fewer, so that nothing aliases. Beyond the
  edges nothing is read: the rest of the triangle is scaled up.
  """
  scale = old / new
  centres = (np.arange(new)[:, None] + 0.5) * scale
  distance = np.abs(np.arange(old) + 0.5 - centres) / max(scale, 1.0)
  weights = np.maximum(1 - distance, 0)
  weights /= weights.sum(1, keepdims=True)
  return np.rint(weights * 2**20) / 2**20
