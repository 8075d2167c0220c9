"""Images of the source in the style of the target."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_domains
from lt_jax import build, run, sharding, train
from lt_jax.config import resolve
from lt_jax.errors import UserError
from lt_jax.method import Method, Player, forward
from lt_jax.methods.translation import fda, low_amplitudes
from lt_jax.models.decoder import decoder
from lt_jax.models.discriminator import image_discriminator, mlp
from lt_jax.optim import sgd
from lt_jax.report import page
from tests.test_adaptation import batches_of, close, made, plain_net, rate

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
def test_mistakes_are_reported_when_it_is_built(options, message):
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


# Translation through shared features.

OFF = {'identity': 0.0, 'images': 0.0, 'cycle': 0.0, 'translated': 0.0}
WEIGHTS = {'identity': 0.5, 'images': 2.0, 'cycle': 0.7, 'translated': 0.3}


def all_players():
  networks = {
    'discriminator': mlp(hidden=(4,)),
    'source_decoder': decoder(width=2),
    'target_decoder': decoder(width=2),
    'source_images': image_discriminator(width=2),
    'target_images': image_discriminator(width=2),
  }
  plain = sgd(rate(0.3), momentum=0.0)
  return {name: Player(network, plain) for name, network in networks.items()}


def i2i_method(net, players, **options):
  return made(
    'i2i',
    net,
    players=players,
    align_on=('features',),
    weight=0.5,
    optimizer=sgd(rate(0.1), momentum=0.0),
    **options,
  )


def test_without_its_own_terms_it_is_dann():
  players = {'discriminator': all_players()['discriminator']}
  batches, states = batches_of(8, 4), []
  shared = {'weight': 0.5, 'align_on': ('features',), 'players': players}
  for name, options in (('dann', {}), ('i2i', OFF)):
    method = made(name, plain_net(), **shared, **options)
    state = jax.jit(method.init)(jax.random.key(0), batches)
    states.append(jax.jit(method.step)(state, batches)[0])
  jax.tree.map(np.testing.assert_array_equal, states[0].params, states[1].params)


def expected_grads(net, players, state, batches):
  """Of all players, from the formula: who descends what, and who is turned around."""
  x, y = (batches[name]['image'] for name in ('train', 'target'))
  labels, weights = batches['train']['label'][:, None], WEIGHTS

  def terms(params):
    def outputs(images):
      return forward(net, params['net'], {}, images, train=True)[0]

    def draw(domain, z):
      shape = batches['train']['image'].shape[1:]
      network = players[f'{domain}_decoder'].net.clone(shape=shape)
      return network.apply({'params': params[f'{domain}_decoder']}, z)

    def cross_entropy(logits):
      return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels, 1).mean()

    def judge(name, false, true):
      p = [
        jax.nn.sigmoid(players[name].net.apply({'params': params[name]}, v))
        for v in (false, true)
      ]
      return -(jnp.log(1 - p[0]).mean() + jnp.log(p[1]).mean())

    def far(a, b):
      return jnp.abs(a - b).mean()

    z_x, z_y = outputs(x)['features'], outputs(y)['features']
    as_target, as_source = draw('target', z_x), draw('source', z_y)
    there, back = outputs(as_target), outputs(as_source)
    descended = cross_entropy(outputs(x)['logits'])
    descended += weights['identity'] * (far(draw('source', z_x), x))
    descended += weights['identity'] * (far(draw('target', z_y), y))
    descended += weights['cycle'] * far(draw('source', there['features']), x)
    descended += weights['cycle'] * far(draw('target', back['features']), y)
    descended += weights['translated'] * cross_entropy(there['logits'])
    latent = judge('discriminator', z_x, z_y)
    drawn = judge('target_images', as_target, y) + judge('source_images', as_source, x)
    for name, images in (('target_images', as_target), ('source_images', as_source)):
      z = players[name].net.apply({'params': params[name]}, images)
      taken_for_true = jnp.log(jax.nn.sigmoid(z)).mean()
      descended -= 0.5 * weights['images'] * taken_for_true
    return descended, latent, drawn

  def ours(params):
    descended, latent, _ = terms(params)
    return descended - 0.5 * latent

  def of_judges(params):
    _, latent, drawn = terms(params)
    return latent + drawn

  of_us, of_them = (jax.grad(f)(state.params) for f in (ours, of_judges))
  drawing = ('net', 'source_decoder', 'target_decoder')
  return {name: (of_us if name in drawing else of_them)[name] for name in state.params}


def test_a_step_is_the_formula():
  net, players, batches = plain_net(), all_players(), batches_of(8, 4)
  method = i2i_method(net, players, **WEIGHTS)
  state = jax.jit(method.init)(jax.random.key(0), batches)
  grads = jax.jit(functools.partial(expected_grads, net, players))(state, batches)
  step = jax.jit(method.step)
  after, metrics = step(state, batches)
  for name, of_player in grads.items():
    base = 0.1 if name == 'net' else 0.3
    moved = jax.tree.map(jnp.subtract, state.params[name], after.params[name])
    close(moved, jax.tree.map(lambda g, b=base: b * g, of_player), atol=1e-6)
  assert set(WEIGHTS) - {'images'} <= metrics.keys()
  assert metrics['target_images_accuracy'][1] == 12
  step(after, batches)
  assert step._cache_size() == 1


def test_images_are_drawn_in_both_styles_on_the_scale_of_pixels():
  net, batches = plain_net(), batches_of(8, 4)
  off = OFF | {'identity': 1.0}
  players = {name: all_players()[name] for name in ('source_decoder', 'target_decoder')}
  method = i2i_method(net, players, **off)
  state = jax.jit(method.init)(jax.random.key(0), batches)
  outputs = jax.jit(method.predict)(state, batches['target']['image'])
  network = decoder(width=2).clone(shape=(8, 8, 2))
  params = {'params': state.params['target_decoder']}
  drawn = network.apply(params, outputs['features'])
  close(outputs['as_target'], 0.25 * drawn + 0.6)  # as the target is normalised
  assert outputs['as_source'].shape == (4, 8, 8, 2)


@pytest.mark.slow
def test_a_run_leaves_what_it_draws_and_the_report_shows_it(tmp_path, one_device):
  made = digits_domains.get_config('i2i,epochs=1.0')
  run.run(resolve(made), tmp_path)
  with np.load(tmp_path / 'translations.npz') as found:
    assert len(found) == 6
    for name in ('test/image', 'test/as_source', 'source/test/as_target'):
      assert found[name].shape == (16, 16, 16, 3) and found[name].dtype == np.uint8
  page.write(tmp_path)
  text = (tmp_path / 'report.html').read_text()
  assert 'Translated test images' in text and 'source/test/as target' in text


@pytest.mark.parametrize('shape', [(7, 9, 2), (16, 16, 3), (28, 28, 1)])
def test_a_decoder_draws_images_of_any_size(shape):
  network = decoder(width=2).clone(shape=shape)
  drawn = jax.eval_shape(
    lambda: network.init_with_output(jax.random.key(0), jnp.zeros((3, 5)))[0]
  )
  assert drawn.shape == (3, *shape)


@pytest.mark.parametrize(
  ('missing', 'options', 'message'),
  [
    ('source_decoder', {}, "needs a player 'source_decoder'"),
    ('target_images', {}, "needs a player 'target_images'"),
    ('', {'images': 0.0}, "has no player 'source_images'"),
    ('', OFF, "has no player 'source_decoder'"),
  ],
)
def test_players_are_those_of_the_terms(missing, options, message):
  players = {name: p for name, p in all_players().items() if name != missing}
  with pytest.raises(UserError, match=message):
    i2i_method(plain_net(), players, **options)
