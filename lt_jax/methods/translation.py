"""Translation of images: the source is trained on in the style of the target."""

from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lt_jax.errors import UserError
from lt_jax.method import Batch, Method, Metrics, State

Pixels = tuple[Sequence[float], Sequence[float]]
"""(mean, std) by which images were normalised."""


def low_amplitudes(source: jax.Array, target: jax.Array, *, beta: float) -> jax.Array:
  r"""Gives images the low-frequency amplitudes of others; their phases stay.

  .. math::
    x = F^{-1}\big( (M |F t| + (1 - M) |F s|)\, e^{i \angle F s} \big), \qquad
    M_{jk} = [\, |j| \le b \wedge |k| \le b \,], \quad
    b = \max(1, \lfloor \beta \min(H, W) \rfloor)

  for every channel. Of digits, beta times the side is often below one, where some codes
  swap the mean alone or nothing at all; here the window always has the lowest
  frequencies too. Nothing is clipped, as in the authors' code.

  Args:
    source: (B, H, W, C), from 0 (black) on, on any scale. Amplitudes are not those of
      the image if a number has been taken from all pixels: the mean is one of them.
    target: (B, H, W, C) on the same scale, one for each.
    beta: in (0, 0.5).

  Returns:
    (B, H, W, C).

  Yang and Soatto, "FDA: Fourier Domain Adaptation for Semantic Segmentation", CVPR
  2020, arXiv 2004.05498, equation 3.
  """
  _, height, width, _ = source.shape
  side = min(height, width)
  most = min(max(1, int(beta * side)), (side - 1) // 2)
  waves = [_waves(size, most, source.dtype) for size in (height, width)]

  # The few frequencies of the window as products of matrices: unlike a fast transform,
  # each device computes those of its own images.
  def spectrum(images: jax.Array) -> jax.Array:
    return _product('bhwc,hj,wk->bjkc', images, *waves)

  of_source, of_target = spectrum(source), spectrum(target)
  phase = jnp.exp(1j * jnp.angle(of_source))
  change = jnp.abs(of_target) * phase - of_source
  back = _product('bjkc,hj,wk->bhwc', change, *(wave.conj() for wave in waves))
  return source + back.real / (height * width)


def _waves(size: int, most: int, dtype: jnp.dtype) -> jax.Array:
  """Returns exp(-2 pi i x k / size), (pixels x, frequencies k from -most to most)."""
  angles = np.outer(np.arange(size), np.arange(-most, most + 1)) / size
  waves = np.exp(-2j * np.pi * angles)
  return jnp.asarray(waves, jnp.result_type(dtype, jnp.complex64))


def _product(spec: str, *factors: jax.Array) -> jax.Array:
  return jnp.einsum(spec, *factors, precision=lax.Precision.HIGHEST)


def fda(
  method: Method,
  *,
  pixels: Mapping[str, Pixels],
  streams: Collection[str],
  beta: float = 0.09,
) -> Method:
  """Trains a method on source images in the style of target images (FDA).

  The i-th image of the batch 'train' takes the amplitudes of an image of the batch
  'target', see `low_amplitudes`, on the scale where black is 0 and white is 1. It is
  then normalised as the target's images are. Nothing is learned for it, and predictions
  are those of the method.

  Args:
    method: the method, of which 'target' is a stream or is not.
    pixels: stream -> (mean, std) by which its images are normalised.
    streams: names of the streams, of which it reads 'target'.
    beta: size of the window, as a share of the image's side; 0.01 to 0.09 in the paper.

  Raises:
    UserError: beta is out of range, or there is no target.
  """
  if not 0 < beta < 0.5:
    raise UserError(f'fda: beta must be between 0 and 0.5, got {beta}')
  if 'target' not in streams:
    raise UserError("fda reads a stream 'target': set streams.target")

  def step(state: State, batches: Mapping[str, Batch]) -> tuple[State, Metrics]:
    batch = batches['train']
    source, target = (
      _raw(batches[name]['image'], *pixels[name]) for name in ('train', 'target')
    )
    # Neighbours in a batch stay neighbours, and so on their device.
    chosen = np.arange(len(source)) * len(target) // len(source)
    styled = low_amplitudes(source, target[chosen], beta=beta)
    images = _normalised(styled, *pixels['target'])
    return method.step(state, {**batches, 'train': {**batch, 'image': images}})

  return method._replace(step=step)


def _raw(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  return images * _channels(std) + _channels(mean)


def _normalised(
  images: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  return (images - _channels(mean)) / _channels(std)


def _channels(values: Sequence[float]) -> jax.Array:
  return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)


WRAPPERS = {'fda': fda}
