"""What segmentation keeps in a State: pixel memory, class shares, a second network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lt_jax import run, trained
from lt_jax.data import scenes
from lt_jax.errors import UserError
from lt_jax.evals.collect import Survey
from lt_jax.method import Method, first_state
from lt_jax.methods import METHODS
from lt_jax.models import make_classifier
from lt_jax.models.heads import Linear
from lt_jax.models.pixel_memory import PixelMemory
from lt_jax.optim import sgd
from lt_jax.recipes import compound
from lt_jax.surgeries import pixels, posthoc
from tests.test_memory import numerical_gradient
from tests.test_segmentation_recipes import TINY, config

CLASSES, D = 3, 4


@pytest.fixture(autouse=True)
def few(monkeypatch):
  monkeypatch.setattr(scenes, 'SPLITS', TINY)


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize('indicator', [True, False])
def test_what_is_added_to_a_pixel_is_the_formula(indicator, rng):
  v = rng.normal(size=(4, 2, 3, D)) + rng.normal(size=(4, 1, 1, D))
  net = PixelMemory(Linear(CLASSES), CLASSES, indicator)
  kernel, bias = rng.normal(size=(D, CLASSES)), rng.normal(size=CLASSES)
  gate, offset = rng.normal(size=(D, D)), rng.normal(size=D)
  memory, centre = rng.normal(size=(CLASSES, D)), rng.normal(size=D)

  m = softmax(v @ kernel + bias) @ memory
  u = (v - m).mean((1, 2))
  away = np.linalg.norm(u - centre, axis=1)
  spread = np.sort(away)[1] + 1e-3  # two images are near, two are far
  delta = away / spread
  e = np.maximum(0, 1 - 1 / delta) if indicator else np.ones(4)
  added = e[:, None, None, None] * np.tanh(v @ gate + offset) * m
  logits = (v + added) @ kernel + bias

  with jax.enable_x64(True):
    variables = {
      'params': {
        'head': {'kernel': kernel, 'bias': bias},
        'gate': {'kernel': gate, 'bias': offset},
      },
      'batch_stats': {'centroids': memory, 'centre': centre, 'spread': spread},
    }
    found = net.apply(variables, {'features': jnp.asarray(v)}, (2, 3))
  np.testing.assert_allclose(found['logits'], logits, rtol=1e-9)
  np.testing.assert_allclose(found['domain_feature'], u, rtol=1e-9)
  np.testing.assert_allclose(found['domain_distance'], delta, rtol=1e-9)
  share = np.linalg.norm(added, axis=-1) / np.linalg.norm(v, axis=-1)
  np.testing.assert_allclose(
    found['borrowed'], share.mean((1, 2)), rtol=1e-5, atol=1e-6
  )
  assert (np.asarray(found['borrowed'][np.argsort(away)[:2]]) < 1e-5).all() == indicator


def test_without_a_memory_nothing_is_added(rng):
  """Nor in the first step with a memory, though the gate learns."""
  v = {'features': jnp.asarray(rng.normal(size=(2, 2, 3, D)), jnp.float32)}
  net = PixelMemory(Linear(CLASSES), CLASSES)
  variables = net.init(jax.random.key(0), v, (2, 3))
  plain = Linear(CLASSES).apply(
    {'params': variables['params']['head']}, v['features'].reshape(-1, D)
  )
  for memory in (0.0, 1.0):
    stats = jax.tree.map(
      lambda x, m=memory: jnp.full_like(x, m), variables['batch_stats']
    )
    given = {'params': variables['params'], 'batch_stats': stats}
    found = net.apply(given, v, (2, 3))
    np.testing.assert_allclose(
      found['logits'].reshape(-1, CLASSES), plain, rtol=1e-5, atol=1e-6
    )
  slope = jax.grad(
    lambda gate: net.apply(
      {**given, 'params': given['params'] | {'gate': gate}}, v, (2, 3)
    )['logits'].sum()
  )(given['params']['gate'])
  assert np.abs(slope['kernel']).max() > 1e-4


def test_a_head_that_scores_other_pixels_cannot_be_enriched():
  net = make_classifier(
    'fcn_vgg16',
    'pixel_memory',
    CLASSES,
    head_options={'head': 'fcn8'},
    per_pixel=True,
  )
  with pytest.raises(UserError, match="needs a head that scores .* 'multi_dilation'"):
    jax.eval_shape(
      lambda x: net.init(jax.random.key(0), x, train=False), jnp.zeros((1, 64, 64, 3))
    )


def test_the_memory_is_the_mean_feature_of_each_class(rng):
  """Map pixels have the label of the image pixel at their centre."""
  maps = rng.normal(size=(5, 2, 3, D))
  label = rng.integers(0, 2, (5, 4, 9))  # the third class has no pixels
  label[0, 1, 1] = label[2, 3, 4] = -1
  domain = rng.normal(size=(5, D))
  at_map = label[:, [1, 3]][:, :, [1, 4, 7]]
  expected = np.zeros((CLASSES, D))
  for c in range(2):
    expected[c] = maps[at_map == c].mean(0)

  def total(state, split, fold):
    del state, split
    mask = jnp.arange(6) < 5  # a padded row
    pad = [(0, 1)] + [(0, 0)] * 3
    batch = {'label': jnp.pad(jnp.asarray(label), pad[:3]), 'mask': mask}
    return jax.device_get(fold({'map': jnp.pad(jnp.asarray(maps), pad)}, batch))

  def collect(state, split, keep):
    np.testing.assert_allclose(
      state.stats['net']['head']['centroids'], expected, rtol=1e-5, atol=1e-6
    )
    return keep({'domain_feature': domain}, {})

  shapes = {'logits': jnp.zeros((1, 4, 9, CLASSES)), 'map': jnp.zeros((1, 2, 3, D))}
  survey = Survey(lambda state, split: shapes, collect, total)
  sizes = {'centroids': (CLASSES, D), 'centre': (D,), 'spread': ()}
  stats = {'net': {'head': {name: jnp.zeros(size) for name, size in sizes.items()}}}
  state = first_state(jax.random.key(0), {}, stats, {})
  found = pixels.pixel_memory(survey=survey)(state, {}).stats['net']['head']
  np.testing.assert_allclose(found['centroids'], expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found['centre'], domain.mean(0), rtol=1e-5)
  away = np.linalg.norm(domain - domain.mean(0), axis=1)
  np.testing.assert_allclose(found['spread'], away.mean(), rtol=1e-5)


LAST = {
  'ocda': {'pixel_memory', 'stage', 'domain_loss'},
  'ocda_no_memory': {'stage', 'domain_loss'},
  'ocda_no_indicator': {'pixel_memory', 'stage', 'domain_loss'},
  'ocda_random_order': {'pixel_memory', 'domain_loss'},
  'ocda_entropy': {'pixel_memory', 'stage', 'alignment'},
}


@pytest.mark.parametrize('recipe', LAST)
def test_ablations_differ_in_their_last_stage_alone(recipe):
  made, whole = (config(f'{name},target=fog+rain') for name in (recipe, 'ocda'))
  assert list(made['stage_order']) == ['source', 'memory', 'scheduled']
  for stage in ('source', 'memory'):
    first, second = made['stages'][stage], whole['stages'][stage]
    if recipe != 'ocda_no_indicator':  # it reads the memory differently
      assert first == second
  last = made['stages']['scheduled']
  found = {last.get('model', {}).get('head'), *last['streams']['target']}
  found |= {'domain_loss'} if last['method']['name'] == 'advent' else {'alignment'}
  assert found & {'pixel_memory', 'stage', 'domain_loss', 'alignment'} == LAST[recipe]
  assert not {*compound.RECIPES[recipe].needs} - {'target', 'pixels'}


@pytest.mark.parametrize('recipe', ['ocda_released', 'ocda_oracle_domains'])
def test_recipes_without_a_form_for_label_maps_are_refused(recipe):
  with pytest.raises(UserError, match=f"recipe '{recipe}' needs one label per image"):
    config(recipe)


@pytest.mark.slow
@pytest.mark.usefixtures('one_device')
def test_a_run_enriches_pixels_and_orders_the_target(tmp_path):
  made = config('ocda_entropy,target=fog+rain', evaluate_every_epochs=9.0, epochs=1.0)
  result = run.run(made, tmp_path)
  assert result['stage'] == 'scheduled' and not result['uses_target_labels']
  with np.load(tmp_path / 'order.npz') as stored:
    order = dict(stored)
  with np.load(tmp_path / 'stages/memory/arrays.npz') as stored:
    np.testing.assert_array_equal(
      order['score'], stored['target/train/domain_distance']
    )
  assert (order['score'] > 1).all() and order['domains'].tolist() == ['fog', 'rain']
  with np.load(tmp_path / 'borrowed.npz') as stored:
    assert np.isfinite(stored['borrowed']).all() and len(stored['borrowed']) == 32
  opened = trained.open_run(tmp_path)
  state = opened.state
  memory = state.stats['net']['head']
  assert np.abs(memory['centroids']).sum(1).min() > 0 and memory['spread'] > 0
  np.testing.assert_array_equal(
    memory['centroids'], state.stats['net_source']['head']['centroids']
  )
  assert np.abs(state.params['net']['head']['gate']['kernel']).max() > 0
  # Each domain is predicted with its own statistics.
  norms = (state.stats[name]['trunk'] for name in ('net', 'net_source'))
  assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, norms), strict=True))


# Class shares of whole images.


def test_a_ridge_is_chosen_by_leaving_each_image_out(rng):
  x = rng.normal(size=(14, 5)) * (1, 10, 0.1, 1, 0) + 3
  y = softmax(x @ rng.normal(size=(5, CLASSES)) / 4 + rng.normal(size=(14, CLASSES)))
  kernel, bias = pixels.ridge(x, y)
  scale = np.where(x.std(0) > 0, x.std(0), 1)

  def fit(penalty, keep):
    """Solves the normal equations, without a penalty on the bias."""
    design = np.c_[(x - x.mean(0)) / scale, np.ones(14)][keep]
    cost = np.diag([14 * penalty] * 5 + [0])
    return np.linalg.solve(design.T @ design + cost, design.T @ y[keep])

  def left_out(penalty):
    error = 0
    for i in range(14):
      weights = fit(penalty, np.arange(14) != i)
      error += ((np.append((x[i] - x.mean(0)) / scale, 1) @ weights - y[i]) ** 2).sum()
    return error

  best = fit(min(pixels.PENALTIES, key=left_out), np.arange(14))
  expected = np.c_[(x - x.mean(0)) / scale, np.ones(14)] @ best
  np.testing.assert_allclose(x @ kernel + bias, expected, rtol=1e-8)


def first(params, **others):
  return first_state(jax.random.key(0), params, {}, {}).replace(**others)


def test_class_shares_come_from_a_linear_map(rng):
  features, kernel = rng.normal(size=(3, D)), rng.normal(size=(D, CLASSES))
  outputs = {'features': jnp.asarray(features), 'logits': jnp.zeros((3, 2, 2, CLASSES))}
  plain = Method(lambda key, batches: first({}), None, lambda state, images: outputs)
  method = pixels.label_shares(plain)
  state = method.init(jax.random.key(0), {'train': {'image': jnp.zeros((3, 2, 2, 3))}})
  even = method.predict(state, None)['label_shares']
  np.testing.assert_allclose(even, 1 / CLASSES, rtol=1e-6)
  memory = {'label_shares': {'kernel': kernel, 'bias': np.full(CLASSES, 0.3)}}
  found = method.predict(state.replace(memory=memory), None)['label_shares']
  raw = np.maximum(features @ kernel + 0.3, 1e-6)
  np.testing.assert_allclose(found, raw / raw.sum(1, keepdims=True), rtol=1e-5)


def test_the_prior_asks_for_the_shares_of_an_image(rng):
  """The method adds only the cross-entropy of shares to the source's loss."""

  class Net(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
      logits = nn.Dense(CLASSES, use_bias=False, name='head')(images)
      return {'logits': logits, 'features': images.mean((1, 2))}

  source, target = rng.normal(size=(2, 4, 2, 3, D)).astype(np.float32)
  shares = softmax(rng.normal(size=(4, CLASSES))).astype(np.float32)

  def objective(outputs, batch, step):
    return (outputs['logits'] ** 2).mean(), {}

  method = METHODS['label_prior'](
    Net(),
    sgd(lambda step: jnp.float32(0.1), momentum=0.0),
    objective=objective,
    alignment_weight=lambda step: jnp.float32(0.5),
    streams=('train', 'target'),
  )
  batches = {
    'train': {'image': source},
    'target': {'image': target, 'label_shares': shares},
  }
  state = jax.jit(method.init)(jax.random.key(0), batches)
  kernel = np.asarray(state.params['net']['head']['kernel'], np.float64)

  def total(w):
    p = softmax(target @ w).mean((1, 2))
    return ((source @ w) ** 2).mean() - 0.5 * (shares * np.log(p)).sum(1).mean()

  after, metrics = jax.jit(method.step)(state, batches)
  np.testing.assert_allclose(
    metrics['loss'][0] + 0.5 * metrics['label_prior'][0], total(kernel), rtol=1e-5
  )
  moved = kernel - 0.1 * numerical_gradient(total, kernel)
  np.testing.assert_allclose(after.params['net']['head']['kernel'], moved, atol=1e-5)
  with pytest.raises(UserError, match="needs 'label_shares' in the stream 'target'"):
    jax.eval_shape(method.step, state, batches | {'target': {'image': target}})


# Two networks.


def test_the_logits_of_two_networks_are_averaged():
  def predict(state, images):
    return {
      'logits': images * state.params['net'] + state.stats['net'],
      'other': images,
    }

  init = first({'net': jnp.float32(2)}, stats={'net': jnp.float32(1)})
  plain = Method(lambda key, batches: init, None, predict)
  method = posthoc.average_logits(plain, weight=0.25)
  state = method.init(jax.random.key(0), {})
  second = first({'net': jnp.float32(10)}, stats={'net': jnp.float32(5)})
  state = posthoc.second_network(stage='b')(state, {'b': second})
  found = method.predict(state, jnp.float32(4))
  assert found == {'logits': 0.75 * 9 + 0.25 * 45, 'other': 4}
  with pytest.raises(UserError, match="stage 'c' has another network"):
    posthoc.second_network(stage='c')(
      state, {'c': second.replace(params={'net': jnp.zeros(3)})}
    )
  with pytest.raises(UserError, match="no wrapper 'average_logits'"):
    posthoc.second_network(stage='b')(init, {'b': second})
  with pytest.raises(UserError, match='weight must be in'):
    posthoc.average_logits(plain, weight=2.0)
