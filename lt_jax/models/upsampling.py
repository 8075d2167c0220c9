"""Bilinear resizing of maps, in the two conventions of published networks.

Both are products with two small matrices, one for each axis, whose rows hold the two
weights of an output. Gathering four neighbours takes fewer multiplications, but its
gradient is a scatter, which is slow on every backend; the gradient of a product is a
product. For maps of logits the products take a few percent of a network's time.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lt_jax.errors import UserError


def resize(
  maps: jax.Array, size: tuple[int, int], *, aligned_corners: bool = False
) -> jax.Array:
  r"""Interpolates maps linearly along both axes, without smoothing when shrinking.

  Along an axis, output i of m is read at position u of the n inputs:

  .. math::
    u = (i + \tfrac12) \frac{n}{m} - \tfrac12 \text{ within } [0, n - 1]
    \qquad \text{or} \qquad u = i\, \frac{n - 1}{m - 1}

  In the first form pixels are squares with values at their centres. In the second they
  are points, and the first and last ones keep their place.

  Args:
    maps: (B, h, w, C).
    size: (H, W).
    aligned_corners: use the second form, as do ADVENT and most DeepLab code.

  Returns:
    (B, H, W, C), the same as PyTorch's `interpolate` with this align_corners.
  """
  if maps.shape[1:3] == tuple(size):
    return maps
  inputs = maps.shape[1:3]
  rows, columns = (
    interpolation(n, m, aligned_corners=aligned_corners)
    for n, m in zip(inputs, size, strict=True)
  )
  return separable(maps, rows, columns)


def interpolation(inputs: int, outputs: int, *, aligned_corners: bool) -> np.ndarray:
  """Returns the weights (outputs, inputs) of `resize` along an axis, in float64."""
  places = np.arange(outputs)
  if aligned_corners:
    at = places * ((inputs - 1) / max(outputs - 1, 1))
  else:
    at = np.clip((places + 0.5) * (inputs / outputs) - 0.5, 0, inputs - 1)
  return _tents(at, inputs)


def upsample(
  maps: jax.Array, factor: int, *, size: tuple[int, int], offset: int
) -> jax.Array:
  r"""Applies a bilinear transposed convolution and crops a window from its result.

  Its kernel has 2 f x 2 f pixels, and its stride is f:

  .. math::
    k_{ij} = \Big(1 - \frac{|i - c|}{f}\Big) \Big(1 - \frac{|j - c|}{f}\Big), \qquad
    c = f - \tfrac12

  so pixel u of the input lies at f u + c of the output, which has f (n + 1) pixels. It
  fades to zero at the edges, which fewer inputs reach.

  Args:
    maps: (B, h, w, C); channels do not mix.
    factor: f, even.
    size: (H, W) of the window.
    offset: rows, and columns, before the window.

  Raises:
    UserError: the window extends over the edge.

  Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015,
  arXiv 1411.4038, section 3.3; the kernel is from the authors' code.
  """
  for inputs, outputs in zip(maps.shape[1:3], size, strict=True):
    if offset + outputs > factor * (inputs + 1):
      raise UserError(
        f'{outputs} pixels from {offset} on do not fit into the {factor} x larger map '
        f'of {inputs} pixels'
      )
  rows, columns = (
    _tents((np.arange(outputs) + offset - factor + 0.5) / factor, inputs)
    for inputs, outputs in zip(maps.shape[1:3], size, strict=True)
  )
  return separable(maps, rows, columns)


def _tents(at: np.ndarray, inputs: int) -> np.ndarray:
  """Returns max(0, 1 - |u - n|) for positions u (M,) and inputs n, (M, inputs)."""
  return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(inputs)))


def separable(maps: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
  """Returns sum_hw rows[H, h] columns[W, w] maps[b, h, w, c].

  Args:
    maps: (B, h, w, C).
    rows: (H, h).
    columns: (W, w).

  Returns:
    (B, H, W, C), in the type of the maps.
  """
  batch, height, width, channels = maps.shape
  rows, columns = (jnp.asarray(x, maps.dtype) for x in (rows, columns))

  def product(matrix: jax.Array, x: jax.Array) -> jax.Array:
    # Logits in bfloat16 precision would affect the loss.
    return jnp.matmul(matrix, x, precision=lax.Precision.HIGHEST)

  def along_rows(x: jax.Array) -> jax.Array:
    flat = product(rows[None], x.reshape(batch, height, -1))
    return flat.reshape(batch, len(rows), -1, channels)

  def along_columns(x: jax.Array) -> jax.Array:
    flat = product(columns[None], x.reshape(-1, width, channels))
    return flat.reshape(batch, -1, len(columns), channels)

  # The second product has the most outputs, so it sums over the shorter axis.
  if width < height:
    return along_columns(along_rows(maps))
  return along_rows(along_columns(maps))
