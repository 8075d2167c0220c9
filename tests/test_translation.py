"""Images of the source in the style of the target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_domains
from lt_jax import build, sharding, train
from lt_jax.config import resolve
from lt_jax.errors import UserError
from lt_jax.method import Method
from lt_jax.methods.translation import fda, low_amplitudes

PIXELS = {'train': ((0.2, 0.1), (0.5, 0.4)), 'target': ((0.6,), (0.25,))}


def reference(source, target, beta):
  """The formula, by the spectrum of each channel with its zero in the middle."""
  height, width, channels = source.shape
  reach = max(1, int(beta * min(height, width)))
  result = np.empty(source.shape)
  for channel in range(channels):
    s, t = (
      np.fft.fftshift(np.fft.fft2(x[..., channel].astype(np.float64)))
      for x in (source, target)
    )
    amplitude, phase = np.abs(s), np.angle(s)
    rows, columns = (
      slice(size // 2 - reach, size // 2 + reach + 1) for size in (height, width)
    )
    amplitude[rows, columns] = np.abs(t)[rows, columns]
    mixed = np.fft.ifft2(np.fft.ifftshift(amplitude * np.exp(1j * phase)))
    result[..., channel] = mixed.real
  return result


@pytest.mark.parametrize(
  ('shape', 'beta'),
  [((16, 16, 3), 0.01), ((28, 28, 1), 0.09), ((9, 12, 2), 0.3), ((8, 8, 1), 0.49)],
)
def test_it_is_the_formula(shape, beta, rng):
  source, target = rng.uniform(size=(2, 3, *shape))
  with jax.enable_x64(True):
    found = np.asarray(low_amplitudes(source, target, beta=beta))
  assert found.dtype == np.float64
  expected = [reference(s, t, beta) for s, t in zip(source, target, strict=True)]
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_the_window_is_never_empty(rng):
  """Where beta is less than one pixel: the mean moves, and waves as long as a side."""
  source = rng.uniform(size=(1, 16, 16, 1)).astype(np.float32)
  target = 0.5 * rng.uniform(size=(1, 16, 16, 1)).astype(np.float32)
  found = np.asarray(low_amplitudes(source, target, beta=0.01))
  np.testing.assert_allclose(found.mean(), target.mean(), rtol=1e-5)
  spectra = [np.abs(np.fft.fft2(x[0, ..., 0])) for x in (source, target, found)]
  np.testing.assert_allclose(spectra[2][:2, :2], spectra[1][:2, :2], rtol=1e-3)
  np.testing.assert_allclose(spectra[2][2:14], spectra[0][2:14], rtol=1e-2)


def test_an_image_in_its_own_style_is_itself(rng):
  images = rng.uniform(size=(2, 8, 8, 3)).astype(np.float32)
  images[1] = 0  # of which no phase is known
  found = low_amplitudes(images, images, beta=0.2)
  np.testing.assert_allclose(found, images, atol=1e-6)


def test_it_is_done_on_the_scale_where_black_is_zero(rng):
  """Then the images are normalised as the target's are, of which there may be more."""
  source, target = (rng.uniform(size=(n, 8, 8, 2)) for n in (2, 4))
  batches = {
    'train': {'image': jnp.asarray((source - [0.2, 0.1]) / [0.5, 0.4], jnp.float32)},
    'target': {'image': jnp.asarray((target - 0.6) / 0.25, jnp.float32)},
  }
  batches['train']['label'] = jnp.arange(2)
  keep = Method(None, lambda state, batches: (state, batches), None)
  wrapped = fda(keep, pixels=PIXELS, streams=('train', 'target'), beta=0.2)
  _, seen = jax.jit(wrapped.step)(0, batches)
  expected = [reference(source[i], target[2 * i], 0.2) for i in range(2)]
  styled = 0.25 * np.asarray(seen['train']['image'], np.float64) + 0.6
  np.testing.assert_allclose(styled, expected, atol=1e-5)
  np.testing.assert_array_equal(seen['train']['label'], [0, 1])
  np.testing.assert_array_equal(seen['target']['image'], batches['target']['image'])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'beta': 0.5}, 'fda: beta must be between 0 and 0.5, got 0.5'),
    ({'beta': 0.0}, 'fda: beta must be'),
    ({'streams': ('train',)}, "fda reads a stream 'target'"),
  ],
)
def test_mistakes_are_told_when_it_is_built(options, message):
  given = {'pixels': PIXELS, 'streams': ('train', 'target')} | options
  with pytest.raises(UserError, match=message):
    fda(Method(None, None, None), **given)


def test_a_recipe_wraps_supervised_learning():
  made = digits_domains.get_config('fda,epochs=1.0')
  experiment = build.build(resolve(made), devices=1)
  streams, method = experiment.last.streams, experiment.last.method
  assert set(streams) == {'train', 'target'}
  state = train.state_shapes(method, streams)
  metrics = train.metric_shapes(method, streams, state, experiment.mesh)
  assert {'loss', 'accuracy'} <= metrics.keys()
  made.wrappers = {}
  with pytest.raises(UserError, match="'supervised' does not read the stream 'target'"):
    build.build(resolve(made), devices=1)


def test_images_stay_on_their_device(rng):
  images = rng.uniform(size=(2, 16, 8, 8, 1)).astype(np.float32)
  keep = Method(None, lambda state, batches: (state, batches['train']['image']), None)
  pixels = dict.fromkeys(('train', 'target'), ((0.5,), (0.5,)))
  wrapped = fda(keep, pixels=pixels, streams=('train', 'target'))
  mesh = sharding.make_mesh(8)
  batches = {
    name: {'image': x} for name, x in zip(('train', 'target'), images, strict=True)
  }
  one = jax.jit(wrapped.step)(0, batches)[1]
  placed = sharding.put_batch(mesh, batches, leading=0)
  step = jax.jit(wrapped.step).lower(0, placed).compile()
  assert 'all-' not in step.as_text() and 'permute' not in step.as_text()
  np.testing.assert_allclose(step(0, placed)[1], one, atol=1e-5)
