"""Augmentation on the device: pure functions of (key, images), run inside jit."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

PAD_MODES = {'zero': 'constant', 'reflect': 'reflect'}


def normalise(
  images: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  """Returns (x / 255 - mean) / std in float32.

  Args:
    images: (B, H, W, channels) uint8.
    mean: a value a channel, or one for all, on the scale where white is 1.
    std: the same.
  """
  scale = jnp.asarray(1.0 / (255.0 * jnp.asarray(std, jnp.float32)))
  shift = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
  shape = (1, 1, 1, -1)
  return images.astype(jnp.float32) * scale.reshape(shape) - shift.reshape(shape)


def pad_crop(
  key: jax.Array, images: jax.Array, *, pad: int, mode: str = 'zero'
) -> jax.Array:
  """Pads every image on all sides and takes a random window of the first size.

  Args:
    key: random key.
    images: (B, H, W, channels), usually raw uint8, so that zero is black.
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


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
  """Mirrors each image left to right with probability one half."""
  mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
  return jnp.where(mirrored, images[:, :, ::-1], images)
