"""Augmentation on the device: pure functions of (key, images), run inside jit."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GREY = np.array([[[0.299, 0.587, 0.114]]])
"""Weights of red, green and blue in perceived brightness (ITU-R BT.601)."""

PAD_MODES = {'zero': 'constant', 'reflect': 'reflect'}

UNITS = {'none': None, 'l1': 1, 'l2': 2}
"""Name of a norm -> its order."""


def unit(images: jax.Array, norm: str) -> jax.Array:
  """Divides each float array by its norm; arrays of zeros stay as they are.

  Args:
    images: (B, H, W, channels) float.
    norm: a key of `UNITS`; 'none' does nothing.
  """
  order = UNITS[norm]
  if order is None:
    return images
  size = (jnp.abs(images) ** order).sum((1, 2, 3), keepdims=True) ** (1 / order)
  return images / jnp.where(size > 0, size, 1.0)


def white(images: jax.Array) -> float:
  """Returns the value of white: 255, or 1 for float arrays."""
  return 255.0 if images.dtype == jnp.uint8 else 1.0


def normalise(
  images: jax.Array,
  mean: Sequence[float],
  std: Sequence[float],
  most: float | None = None,
) -> jax.Array:
  """Returns (x / most - mean) / std in float32.

  Args:
    images: (B, H, W, channels), uint8 or float.
    mean: one value per channel, or one for all, on a scale where white is 1.
    std: the same.
    most: the value of white; None derives it from the type.
  """
  most = white(images) if most is None else most
  scale = jnp.asarray(1.0 / (most * jnp.asarray(std, jnp.float32)))
  shift = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
  shape = (1, 1, 1, -1)
  return images.astype(jnp.float32) * scale.reshape(shape) - shift.reshape(shape)


def moments(images: np.ndarray, norm: str = 'none') -> tuple[np.ndarray, np.ndarray]:
  """Returns mean and deviation of each channel for `normalise`, on the host.

  Args:
    images: (N, H, W, channels), uint8 or float.
    norm: for `unit`, which is applied first.

  Returns:
    (channels,) each, float64; the deviation of constant channels is 1.
  """
  pixels = math.prod(images.shape[:-1])
  chunks = np.array_split(images, math.ceil(images.size / 2**22))

  def total(function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    values = (np.asarray(unit(x, norm), np.float64) / white(x) for x in chunks)
    return sum(function(x).sum((0, 1, 2)) for x in values)

  mean = total(lambda x: x) / pixels
  std = np.sqrt(total(lambda x: (x - mean) ** 2) / pixels)
  varies = std > np.finfo(np.float32).eps * np.abs(mean)
  return mean, np.where(varies, std, 1.0)


def pad_crop(
  key: jax.Array, images: jax.Array, *, pad: int, mode: str = 'zero'
) -> jax.Array:
  """Pads every image on all sides and takes a random window of its original size.

  Args:
    key: random key.
    images: (B, H, W, channels), usually raw uint8, so zero is black.
    pad: pixels on each side.
    mode: 'zero' or 'reflect'.

  Returns:
    (B, H, W, channels), offsets uniform on {0, ..., 2 * pad} in each direction.
  """
  batch, height, width, channels = images.shape
  margins = ((0, 0), (pad, pad), (pad, pad), (0, 0))
  padded = jnp.pad(images, margins, mode=PAD_MODES[mode])
  corners = jax.random.randint(key, (batch, 2), 0, 2 * pad + 1)

  def window(image: jax.Array, corner: jax.Array) -> jax.Array:
    start = (corner[0], corner[1], jnp.zeros_like(corner[0]))
    return lax.dynamic_slice(image, start, (height, width, channels))

  return jax.vmap(window)(padded, corners)


MAPS = ('label', 'pseudo_label')
"""Entries of a batch that can be label maps, with classes or -1."""


def with_maps(
  move: Callable[[jax.Array], jax.Array], batch: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
  """Moves the pixels of images and of their label maps in the same way.

  Args:
    move: (B, H, W, channels) -> the same with its pixels moved; new ones are 0.
    batch: with 'image' and optionally `MAPS` (B, H, W), where new pixels are -1.
  """
  moved = {**batch, 'image': move(batch['image'])}
  for name in MAPS:
    if name in batch and batch[name].ndim == 3:
      moved[name] = move(batch[name][..., None] + 1)[..., 0] - 1
  return moved


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
  """Mirrors each image left to right with probability one half."""
  mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
  return jnp.where(mirrored, images[:, :, ::-1], images)


def colour_jitter(key: jax.Array, images: jax.Array, *, strength: float) -> jax.Array:
  r"""Changes brightness, contrast and saturation of each image, in random order.

  Each is a blend f x + (1 - f) z, clipped to [0, 255], with f uniform on
  [1 - strength, 1 + strength] and z black, the mean grey of the image, or the grey of
  each pixel: 0.299 R + 0.587 G + 0.114 B.

  Args:
    key: random key.
    images: (B, H, W, 3) uint8.
    strength: in [0, 1].

  Returns:
    (B, H, W, 3) float32 on the same scale.

  Source: torchvision's ColorJitter with equal strengths and no hue, but without its
  rounding to integers after each change.
  """
  batch = len(images)
  order_key, *factor_keys = jax.random.split(key, 4)
  orders = jnp.asarray(list(itertools.permutations(range(3))))
  order = orders[jax.random.randint(order_key, (batch,), 0, len(orders))]
  factors = jnp.stack(
    [
      jax.random.uniform(k, (batch,), minval=1 - strength, maxval=1 + strength)
      for k in factor_keys
    ],
    axis=1,
  )

  def jittered(image: jax.Array, order: jax.Array, factors: jax.Array) -> jax.Array:
    for place in range(3):
      kind = order[place]
      grey = (image * GREY.astype(image.dtype)).sum(-1, keepdims=True)
      other = jnp.stack(
        [jnp.zeros_like(grey), jnp.broadcast_to(grey.mean(), grey.shape), grey]
      )[kind]
      image = jnp.clip(factors[kind] * (image - other) + other, 0, 255)
    return image

  return jax.vmap(jittered)(images.astype(jnp.float32), order, factors)
