"""Tiled prediction for images too large for a device or a network."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lt_jax.errors import UserError
from lt_jax.method import Method, State


def tiled(method: Method, *, height: int, width: int, overlap: float = 0.5) -> Method:
  r"""Predicts every pixel as the mean over the tiles that contain it.

  Tiles cover the image and are spaced as evenly as possible, at most (1 - overlap) of
  their size apart. An output with a value for every pixel, such as 'logits', is
  averaged over the tiles that contain the pixel; 'features' are averaged over all
  tiles. Training does not change.

  Args:
    method: a method that predicts pixels.
    height: height of a tile in pixels.
    width: width of a tile in pixels.
    overlap: smallest share of a tile that the next one also covers, in [0, 1).

  Raises:
    UserError: the tiles are impossible.
  """
  if min(height, width) < 1 or not 0 <= overlap < 1:
    raise UserError(
      f'tiled: height, width and overlap are {height}, {width} and {overlap}; they '
      'must be positive, and the overlap in [0, 1)'
    )

  def predict(state: State, images: jax.Array) -> dict[str, jax.Array]:
    size = images.shape[1:3]
    if height > size[0] or width > size[1]:
      raise UserError(
        f'tiled: tiles of {width} x {height} pixels are larger than the images of '
        f'{size[1]} x {size[0]}'
      )
    rows, columns = starts(size[0], height, overlap), starts(size[1], width, overlap)
    corners = jnp.asarray([*itertools.product(rows, columns)])
    cover = np.zeros((*size, 1), np.float32)
    for top, left in itertools.product(rows, columns):
      cover[top : top + height, left : left + width] += 1

    def tile(corner: jax.Array) -> dict[str, jax.Array]:
      part = lax.dynamic_slice(
        images,
        (0, *corner, 0),
        (images.shape[0], height, width, images.shape[-1]),
      )
      outputs = method.predict(state, part)
      kept = {n: x for n, x in outputs.items() if x.shape[1:3] == (height, width)}
      return kept | {'features': outputs['features']}

    shapes = jax.eval_shape(tile, corners[0])
    sums = {
      name: jnp.zeros(
        (images.shape[0], *size, x.shape[-1]) if x.ndim == 4 else x.shape, x.dtype
      )
      for name, x in shapes.items()
    }

    def add(corner, sums):
      found = tile(corner)
      return {name: _added(total, found[name], corner) for name, total in sums.items()}

    # One tile at a time, to need the memory of only one.
    sums = lax.fori_loop(0, len(corners), lambda i, s: add(corners[i], s), sums)
    return {
      name: total / (cover[None] if total.ndim == 4 else len(corners))
      for name, total in sums.items()
    }

  return method._replace(predict=predict)


def _added(total: jax.Array, part: jax.Array, corner: jax.Array) -> jax.Array:
  """Adds a tile to a sum at its place; outputs without a place are added as a whole."""
  if total.ndim != 4:
    return total + part
  place = (0, *corner, 0)
  there = lax.dynamic_slice(total, place, part.shape)
  return lax.dynamic_update_slice(total, there + part, place)


def starts(whole: int, part: int, overlap: float) -> list[int]:
  """Returns where tiles start along an axis, from 0 up to where the last one fits."""
  number = 1 + max(0, -(-(whole - part) // max(1, int(part * (1 - overlap)))))
  return np.linspace(0, whole - part, number).round().astype(int).tolist()


WRAPPERS = {'tiled': tiled}
