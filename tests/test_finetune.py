"""Fine-tuning: what is kept of given weights, what moves, and at which rate."""

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax import (
  build,
  export,
  method,
  run,
  surgery,
  train,
)
from lt_jax.config import base_config, resolve
from lt_jax.errors import UserError
from lt_jax.models import make_classifier
from lt_jax.models.layers import chopped, trunk_layers
from lt_jax.models.taps import tapped
from lt_jax.optim import make_optimizer
from lt_jax.pretrained import ours
from tests import tiny

pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
  return tiny.write_npz(tmp_path_factory.mktemp('tune') / 'tiny.npz')


def finetuned(npz, recipe, **overrides):
  """Returns the config of a recipe on eight images, with rates that a recipe set."""
  config = tiny.config(npz, f'{recipe},epochs=4.0')
  return {**config, **overrides}


@pytest.fixture(scope='module')
def source(npz, tmp_path_factory):
  """The folder of a finished run whose pixels are not those of the config."""
  config = tiny.config(npz, 'ce,epochs=2.0')
  config['data'] |= {'mean': [0.25], 'std': [0.75]}
  folder = tmp_path_factory.mktemp('source') / 'run'
  run.run(config, folder)
  return folder


def begun(config):
  """Returns (the first stage, its State after weights and surgeries)."""
  stage = next(iter(build.build(config, devices=1).stages.values()))
  state = train.initial_state(
    stage.method, stage.streams, jax.random.key(3), build.sharding.make_mesh(1)
  )
  if stage.start:
    state, _ = stage.start(state)
  return stage, surgery.operate(state, {}, stage.surgeries)


def stepped(stage, state, steps=2):
  arrays = {name: stream.arrays for name, stream in stage.streams.items()}
  metrics = {}
  step = jax.jit(stage.method.step)
  for number in range(steps):
    payloads = train.payloads_at(stage.streams, number)
    key = jax.random.key(0)
    batches = train.batches_at(stage.streams, arrays, payloads, key, number)
    state, metrics = step(state, batches)
  return state, metrics


def same(one, other):
  equal = jax.tree.map(lambda a, b: bool((a == b).all()), one, other)
  return all(jax.tree.leaves(equal))


# The optimiser.


def test_rates_fall_from_layer_to_layer_and_the_updates_with_them():
  net = make_classifier('resnet8', 'linear', 3, trunk_options={'width': 2})
  layers = trunk_layers(net, (8, 8, 1))
  assert [layer.name for layer in layers] == ['stem', 'stage1', 'stage2', 'stage3']
  init = functools.partial(net.init, train=False)
  shapes = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 8, 8, 1)))['params']

  def made(decay):
    return make_optimizer(
      'sgd',
      lambda step: np.float32(0.1),
      layers=lambda: [layer.pattern for layer in layers],
      momentum=0.9,
      layer_decay=decay,
    )

  optimizer = made(0.5)
  trunk = optimizer.rates({'net': shapes})['net']['trunk']
  for name, rate in (
    ('stage3_block1', 0.5),
    ('stage1_block1', 0.125),
    ('norm', 0.0625),
  ):
    assert set(jax.tree.leaves(trunk[name])) == {rate}
  few = ('stage3_block1', 'norm')
  params = {'net': {'trunk': {n: {'w': jnp.ones(2)} for n in few}, 'head': jnp.ones(2)}}
  grads = jax.tree.map(jnp.ones_like, params)
  after, _ = optimizer.update(grads, optimizer.init(params), params, 0)
  moved = jax.tree.map(lambda a, b: float((b - a)[0]), after, params)['net']
  assert moved['head'] == pytest.approx(0.1, rel=1e-5)
  ratio = {name: moved['trunk'][name]['w'] / moved['head'] for name in few}
  assert ratio == pytest.approx({'stage3_block1': 0.5, 'norm': 0.0625}, rel=1e-5)
  with pytest.raises(UserError, match='layer_decay is 1.5; it must be above 0'):
    made(1.5).init(params)


@pytest.mark.parametrize('decoupled', [False, True])
def test_an_anchored_parameter_decays_towards_its_start(rng, decoupled):
  """The closed form in float64: momentum on g + lambda (p - p0), or apart from it."""
  start, grads = rng.normal(size=4), rng.normal(size=(3, 4))
  params = {'net': {'trunk': jnp.asarray(start, jnp.float32), 'head': jnp.ones(2)}}
  optimizer = make_optimizer(
    'sgd',
    lambda step: jnp.float32(0.1),
    momentum=0.5,
    decoupled=decoupled,
    weight_decay=(('.*', 0.2),),
    anchored='net/trunk',
  )
  opt = optimizer.init({'net': {'trunk': jnp.zeros(4), 'head': jnp.zeros(2)}})
  opt = surgery.anchored_here(opt, params)
  p, buffer, head = start.copy(), np.zeros(4), np.ones(2)
  for step, g in enumerate(grads):
    every = {'net': {'trunk': jnp.asarray(g, jnp.float32), 'head': jnp.zeros(2)}}
    params, opt = optimizer.update(every, opt, params, step)
    pull = 0.2 * (p - start)
    buffer = 0.5 * buffer + g + (0 if decoupled else pull)
    p = p - 0.1 * (buffer + (pull if decoupled else 0))
  np.testing.assert_allclose(params['net']['trunk'], p, rtol=1e-5)
  assert (params['net']['head'] < head).all()  # which decays towards zero


def test_rules_that_train_nothing_are_rejected():
  params = {'net': {'head': jnp.ones(2), 'trunk': jnp.ones(2)}}
  rules = (('net/heda', 1.0), ('.*', 0.0))
  with pytest.raises(UserError, match="rule 'net/heda' matches no parameter"):
    make_optimizer('sgd', lambda s: 0.1, learning_rate_scale=rules).init(params)
  with pytest.raises(UserError, match='trains nothing: every parameter has the rate 0'):
    make_optimizer('sgd', lambda s: 0.1, learning_rate_scale=0.0).init(params)


# Layers.


def test_kept_layers_compute_what_they_did(rng):
  """And those after them, with the head, begin anew."""
  net = make_classifier('digits_cnn', 'linear', 3, trunk_options={'width': 2})
  images = jnp.asarray(rng.normal(size=(2, 8, 8, 1)), jnp.float32)
  variables = jax.jit(functools.partial(net.init, train=False))(
    jax.random.key(1), images
  )
  stats = jax.tree.map(lambda x: x + 0.5, variables['batch_stats'])
  state = method.first_state(
    jax.random.key(0), {'net': variables['params']}, {'net': stats}, {}
  )
  taps = jax.jit(functools.partial(tapped, net))

  def kept(which):
    surgeries = [
      surgery.keep_layers(
        kept=which, net=net, image_shape=(8, 8, 1), layers=trunk_layers(net, (8, 8, 1))
      )
    ]
    after = surgery.operate(state, {}, surgeries)
    found = taps(after.params['net'], after.stats['net'], images)
    equal = [bool((found[n] == before[n]).all()) for n in ('conv1', 'conv2')]
    return after, equal

  before = taps(state.params['net'], state.stats['net'], images)
  for which in ('first:1', 'first:conv1'):
    after, equal = kept(which)
    assert equal == [True, False]
    assert not same(after.params['net']['head'], state.params['net']['head'])
    assert same(after.stats['net']['trunk']['norm1'], stats['trunk']['norm1'])
    assert not same(after.stats['net']['trunk']['norm2'], stats['trunk']['norm2'])
  assert kept('first:2')[1] == [True, True]
  after, equal = kept('last:1')
  assert equal == [False, False]
  assert same(after.params['net']['head'], state.params['net']['head'])
  one, other = (x.params['net']['trunk'] for x in (after, state))
  assert [same(one[name], other[name]) for name in ('conv1', 'conv2')] == [False, True]


@pytest.mark.parametrize(
  ('kept', 'message'),
  [
    ('first', "kept_layers is 'first'; use a form like 'first:2'"),
    ('first:5', 'the trunk has 4 layers: stem, stage1, stage2, stage3'),
    ('last:0', 'the trunk has 4 layers'),
    ('first:stage3_blok1', "no layer 'stage3_blok1'; did you mean 'stage3_block1'"),
  ],
)
def test_missing_layers_are_reported(kept, message):
  net = make_classifier('resnet8', 'linear', 3, trunk_options={'width': 2})
  with pytest.raises(UserError, match=message):
    chopped(trunk_layers(net, (8, 8, 1)), kept)


# Recipes.


@pytest.mark.parametrize('recipe', ['frozen', 'chop', 'l2_sp'])
def test_kept_layers_need_initial_weights(npz, recipe):
  stage = next(iter(build.build(finetuned(npz, recipe), devices=1).stages.values()))
  shapes = train.state_shapes(stage.method, stage.streams)
  with pytest.raises(UserError, match='cannot start at random: give --config.init='):
    stage.start(shapes)


def test_a_frozen_trunk_stays_as_it_is_statistics_included(npz, source):
  stage, state = begun(finetuned(npz, 'frozen', init=str(source)))
  after, metrics = stepped(stage, state)
  assert same(after.params['net']['trunk'], state.params['net']['trunk'])
  assert same(after.stats['net'], state.stats['net'])
  assert not same(after.params['net']['head'], state.params['net']['head'])
  assert len(jax.tree.leaves(after.opt)) == 2  # no buffer for what is frozen
  # The norm of gradients counts those of the head alone, f^T (p - y) / B.
  arrays = {name: stream.arrays for name, stream in stage.streams.items()}
  payloads = train.payloads_at(stage.streams, 0)
  key = jax.random.key(0)
  batch = train.batches_at(stage.streams, arrays, payloads, key, 0)['train']
  outputs = stage.method.predict(state, batch['image'])
  features, logits = (
    np.asarray(outputs[k], np.float64) for k in ('features', 'logits')
  )
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  error = (p - np.eye(4)[np.asarray(batch['label'])]) / len(p)
  norm = np.hypot(np.linalg.norm(features.T @ error), np.linalg.norm(error.sum(0)))
  first = stepped(stage, state, steps=1)[1]['grad_norm']
  assert float(first[0]) == pytest.approx(norm, rel=1e-4)
  assert np.isfinite(float(metrics['loss'][0]))


def test_statistics_are_measured_anew_on_request(npz, source):
  config = ours.adopted(finetuned(npz, 'frozen', init=str(source)))
  config['model'] = {**config['model'], 'batch_norm': 'recalibrate'}
  stage, state = begun(config)
  frozen = begun(finetuned(npz, 'frozen', init=str(source)))[1]
  assert same(state.params['net']['trunk'], frozen.params['net']['trunk'])
  split = build.build(config, devices=1).dataset.splits['train']
  images = (split.source.images[split.rows] / 255.0 - 0.25) / 0.75
  kernel = state.params['net']['trunk']['conv1']['kernel']
  conv = jax.lax.conv_general_dilated(
    jnp.asarray(images, jnp.float32),
    kernel,
    (1, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  found = state.stats['net']['trunk']['norm1']
  np.testing.assert_allclose(found['mean'], conv.mean((0, 1, 2)), rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(found['var'], conv.var((0, 1, 2)), rtol=1e-3, atol=1e-4)
  after, _ = stepped(stage, state)
  assert same(after.stats['net'], state.stats['net'])


# Weights of a run of ours.


def test_a_run_starts_from_another_one_and_its_preprocessing(npz, source, tmp_path):
  config = finetuned(npz, 'discriminative', init=str(source))
  adopted = ours.adopted(config)
  assert (adopted['data']['mean'], adopted['data']['std']) == ([0.25], [0.75])
  made = base_config()
  made.init = str(source)
  assert resolve(made)['data']['mean'] == [0.25]
  result = run.run(adopted, tmp_path / 'target')
  assert result['init']['source'] == str(source)
  rows = json.loads((tmp_path / 'target/stages/train/parameters.json').read_text())
  trained = {row['part']: (row['least'], row['statistics']) for row in rows}
  assert trained['head'] == (1.0, '') and trained['trunk/conv1'] == (0.1, 'trained')
  stage, state = begun(adopted)
  restored = begun({**adopted, 'init': str(tmp_path / 'target')})[1]
  assert not same(state.params['net']['trunk'], restored.params['net']['trunk'])


def test_the_head_is_taken_where_the_classes_are_the_same(npz, source, tmp_path):
  found = ours.origin(str(source))
  relative = os.path.relpath(source)
  stage, state = begun(finetuned(npz, 'discriminative', init=relative))
  report = stage.start(state)[1]
  assert report['head'] == 'taken: the classes are the same' and not report['fresh']
  other, report = surgery.start_from(
    state, source=str(source), class_names=(*found.class_names[1:], 'new')
  )
  assert report['head'] == 'fresh: different classes'
  assert set(report['fresh']) == {'head/kernel', 'head/bias'}
  report = surgery.start_from(state, source=str(source), class_names=('a', 'b'))[1]
  assert report['head'] == 'fresh: 2 classes here and 4 there'
  file = tmp_path / 'net.safetensors'
  export.export(source, 'safetensors', file)
  exported, report = surgery.start_from(
    state, source=str(file), class_names=found.class_names
  )
  assert same(exported.params, state.params) and report['head'].startswith('taken')
  assert ours.origin(str(file)).pixels == found.pixels


def test_weights_that_do_not_fit_are_reported_in_one_line(npz, source, tmp_path):
  config = finetuned(npz, 'discriminative', init=str(source))
  config['model'] = {**config['model'], 'trunk_options': {'width': 5}}
  with pytest.raises(
    UserError, match=r"of another network, with the trunk 'digits_cnn'.*5"
  ):
    begun(config)
  with pytest.raises(
    UserError, match='is a folder but not a run: it has no config.json'
  ):
    ours.adopted({**config, 'init': str(tmp_path)})
  (tmp_path / 'config.json').write_text('{}')
  (tmp_path / 'data.json').write_text('{}')
  with pytest.raises(UserError, match='is not a complete run'):
    ours.adopted({**config, 'init': str(tmp_path)})
