"""Resizing and transposed convolutions: hand tables, loops in float64, PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax.errors import UserError
from lt_jax.models.upsampling import resize, upsample

TABLE = {
  # (inputs, outputs, aligned): of the values 0, 4, 8, ...
  (3, 5, True): (0, 2, 4, 6, 8),
  (2, 4, True): (0, 4 / 3, 8 / 3, 4),
  (5, 2, True): (0, 16),
  (3, 1, True): (0,),
  (1, 3, True): (0, 0, 0),
  (2, 4, False): (0, 1, 3, 4),
  (3, 6, False): (0, 1, 3, 5, 7, 8),
  (4, 2, False): (2, 10),
  (5, 2, False): (3, 13),  # read at 0.75 and 3.25
  (3, 1, False): (4,),
  (1, 3, False): (0, 0, 0),
}


@pytest.mark.parametrize('key', TABLE, ids=str)
def test_resizing_by_hand(key):
  inputs, outputs, aligned = key
  with jax.enable_x64(True):
    line = 4.0 * jnp.arange(inputs, dtype=jnp.float64)
    for maps, size, axis in (
      (line[None, :, None, None], (outputs, 1), 1),
      (line[None, None, :, None], (1, outputs), 2),
    ):
      found = resize(maps, size, aligned_corners=aligned)
      assert found.dtype == jnp.float64
      expected = np.expand_dims(TABLE[key], (0, 3 - axis, 3))
      np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize('aligned', [False, True])
@pytest.mark.parametrize('size', [(9, 12), (3, 4), (7, 2), (5, 7)])
def test_resizing_of_planes_is_exact_and_its_gradient_is_the_transpose(
  aligned, size, rng
):
  """Bilinear interpolation keeps a + b h + c w + d h w, and is linear."""
  height, width = 5, 7
  with jax.enable_x64(True):
    maps = jnp.asarray(rng.normal(size=(2, height, width, 3)))
    grown, pull = jax.vjp(lambda x: resize(x, size, aligned_corners=aligned), maps)
    for b in range(2):
      for h, w in ((0, 0), (size[0] - 1, size[1] - 1), (1, size[1] // 2)):
        np.testing.assert_allclose(
          grown[b, h, w], interpolated(maps[b], h, w, size, aligned), rtol=1e-12
        )
    back = jnp.asarray(rng.normal(size=grown.shape))
    np.testing.assert_allclose(
      jnp.vdot(back, grown), jnp.vdot(pull(back)[0], maps), rtol=1e-12
    )


def interpolated(image, h, w, size, aligned):
  """One pixel of a resized image (H, W, C), from its four neighbours."""
  at = []
  for i, n, m in zip((h, w), image.shape[:2], size, strict=True):
    u = i * (n - 1) / (m - 1) if aligned else (i + 0.5) * n / m - 0.5
    u = min(max(u, 0), n - 1)
    low = int(u)
    at.append(((low, 1 - (u - low)), (min(low + 1, n - 1), u - low)))
  return sum(p * q * image[i, j] for i, p in at[0] for j, q in at[1])


@pytest.mark.parametrize('factor', [2, 8])
def test_a_transposed_convolution_puts_its_kernel_around_each_pixel(factor, rng):
  maps = rng.normal(size=(2, 3, 4, 2))
  side = np.arange(2 * factor)
  tent = 1 - np.abs(side - (factor - 0.5)) / factor
  kernel = tent[:, None] * tent[None]
  full = np.zeros((2, factor * 4, factor * 5, 2))
  for i in range(3):
    for j in range(4):
      window = np.s_[:, i * factor :, j * factor :]
      part = full[window][:, : 2 * factor, : 2 * factor]
      part += kernel[None, :, :, None] * maps[:, i : i + 1, j : j + 1]
  with jax.enable_x64(True):
    for size, offset in (((4 * factor, 5 * factor), 0), ((5, 3), factor - 1)):
      found = upsample(jnp.asarray(maps), factor, size=size, offset=offset)
      window = np.s_[:, offset : offset + size[0], offset : offset + size[1]]
      np.testing.assert_allclose(found, full[window], atol=1e-12)
  with pytest.raises(UserError, match='do not fit'):
    upsample(jnp.asarray(maps), factor, size=(4 * factor, 1), offset=1)


@pytest.mark.parametrize('aligned', [False, True])
def test_resizing_agrees_with_pytorch(aligned, rng):
  torch = pytest.importorskip('torch')
  maps = rng.normal(size=(2, 5, 9, 3)).astype(np.float32)
  theirs = torch.tensor(maps.transpose(0, 3, 1, 2))
  for size in ((33, 20), (5, 40), (3, 4), (1, 1)):
    expected = torch.nn.functional.interpolate(
      theirs, size, mode='bilinear', align_corners=aligned
    )
    found = resize(jnp.asarray(maps), size, aligned_corners=aligned)
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), atol=1e-5)


def test_a_transposed_convolution_agrees_with_pytorch(rng):
  torch = pytest.importorskip('torch')
  maps = rng.normal(size=(1, 4, 3, 2)).astype(np.float32)
  tent = 1 - np.abs(np.arange(16) - 7.5) / 8
  kernel = np.broadcast_to(tent[:, None] * tent[None], (2, 1, 16, 16)).copy()
  expected = torch.nn.functional.conv_transpose2d(
    torch.tensor(maps.transpose(0, 3, 1, 2)),
    torch.tensor(kernel, dtype=torch.float32),
    stride=8,
    groups=2,
  )
  found = upsample(jnp.asarray(maps), 8, size=(40, 32), offset=0)
  np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), atol=1e-5)
