"""Meta gradients by both routes, and whole steps, against hand-written formulas."""

import functools
import itertools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from configs import digits_lt
from lt_jax import build, sharding, train
from lt_jax.errors import UserError
from lt_jax.losses import make_loss
from lt_jax.method import Player, State
from lt_jax.methods import meta
from lt_jax.models import make_classifier
from lt_jax.models.weight_net import WeightNet
from lt_jax.optim import make_optimizer
from tests import tiny
from tests.test_methods import Runner

NOWHERE = pathlib.Path('nowhere')  # the folder of a run that never began

CLASSES, TRAIN, META, PIXELS, HIDDEN = 5, 16, 10, 12, 7
COUNTS = np.array([40, 20, 10, 5, 2])
CLASS_WEIGHTS = (0.2, 0.5, 1.0, 1.5, 1.8)
PRECISIONS = {'float64': 1e-10, 'float32': 1e-5}


# A network of two dense layers with batch normalisation, written here in full.


def network(params, images):
  """Returns logits; the statistics are those of the batch, as in training mode."""
  x = images @ params['hidden']
  x = (x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + 1e-5)
  x = jnp.tanh(x * params['scale'][None] + params['shift'][None])
  return x @ params['head'] + params['bias'][None]


def cross_entropy(logits, label):
  return optax.softmax_cross_entropy_with_integer_labels(logits, label)


class Problem(NamedTuple):
  """Parameters with an optimiser history, a training batch and a meta batch."""

  params: dict
  train: dict
  meta: dict
  history: list
  weight_net: dict

  def state(self, optimizer):
    """A State after two optimiser steps, so that nothing in it is zero."""
    params = {'net': self.params}
    opt = optimizer.init(params)
    for step, grads in enumerate(self.history):
      _, opt = optimizer.update({'net': grads}, opt, params, jnp.int32(step))
    return State(
      step=jnp.int32(2),
      key=jax.random.key(0),
      params={**params, 'weight_net': self.weight_net},
      stats={},
      opt=opt,
      memory={},
    )

  def losses(self, params):
    logits = network(params['net'], self.train['image'])
    return cross_entropy(logits, self.train['label']), logits

  def meta_loss(self, params):
    return cross_entropy(
      network(params['net'], self.meta['image']), self.meta['label']
    ).mean()


def make_problem(precision):
  """Draws a problem."""
  generator = np.random.default_rng(0)

  def draw(*shape):
    return generator.standard_normal(shape).astype(precision)

  params = {
    'hidden': draw(PIXELS, HIDDEN),
    'scale': 1 + draw(HIDDEN) / 10,
    'shift': draw(HIDDEN) / 10,
    'head': draw(HIDDEN, CLASSES),
    'bias': draw(CLASSES),
  }
  return Problem(
    params,
    {'image': draw(TRAIN, PIXELS), 'label': np.arange(TRAIN) % CLASSES},
    {'image': draw(META, PIXELS), 'label': np.arange(META) % CLASSES},
    [jax.tree.map(lambda p: draw(*p.shape), params) for _ in 'ab'],
    {
      'hidden': {'kernel': draw(1, 100), 'bias': draw(100)},
      'weight': {'kernel': draw(100, 1) / 10, 'bias': draw(1)},
    },
  )


def weight_player(rate=1e-5, **optimizer):
  """Returns the weight network of the methods, by default with Adam."""
  made = make_optimizer(
    learning_rate=lambda step: jnp.float32(rate), **{'name': 'adam', **optimizer}
  )
  return Player(WeightNet(), made)


def given(name):
  """Returns the context that the library gives a method of `meta`."""
  return {
    'meta_weight_net': {'counts': COUNTS, 'players': {'weight_net': weight_player()}},
    'meta_reweight': {'class_weights': lambda step: jnp.asarray(CLASS_WEIGHTS)},
  }[name]


def weighing(name, **options):
  """Returns the `Weighing` of a method of `meta`."""
  return getattr(meta, name).__wrapped__(**{**given(name), **options})


L2RW = {'prior': 'none', 'clip': True, 'normalise': True, 'eps_lr': 1.0}

WEIGHINGS = {
  'multiplicative': ('meta_reweight', {'form': 'multiplicative'}),
  'additive': ('meta_reweight', {'form': 'additive'}),
  'l2rw': ('meta_reweight', L2RW),
  'mwn': ('meta_weight_net', {'normalise': True, 'detach': False}),
  'mwn detached': ('meta_weight_net', {'normalise': True, 'detach': True}),
  'mwn mean': ('meta_weight_net', {'normalise': False, 'detach': False}),
  'mwn mean detached': ('meta_weight_net', {'normalise': False, 'detach': True}),
}
OPTIMIZERS = {
  'sgd': ('sgd', {'name': 'sgd', 'momentum': 0.0}),
  'heavy-ball': ('optimizer', {'name': 'sgd', 'momentum': 0.9}),
  'nesterov': (
    'optimizer',
    {'name': 'sgd', 'momentum': 0.9, 'nesterov': True, 'weight_decay': (('.*', 0.01),)},
  ),
  'adam': ('optimizer', {'name': 'adam'}),
}


def rate(step):
  return jnp.asarray(0.1)


# The same by hand: the objective F, the optimisers' updates, and the definition.


def v(losses, net):
  """The weight network."""
  hidden = losses[:, None] * net['hidden']['kernel'] + net['hidden']['bias'][None]
  out = jnp.maximum(hidden, 0) @ net['weight']['kernel'] + net['weight']['bias'][None]
  return 1 / (1 + jnp.exp(-out[:, 0]))


def v_mean(losses, net):
  weights = v(losses, net)
  return weights / weights.sum()


held = jax.lax.stop_gradient
OBJECTIVES = {
  'multiplicative': lambda loss, eps, w: jnp.mean(w * (1 + eps) * loss),
  'additive': lambda loss, eps, w: jnp.sum((w + eps) * loss),
  'l2rw': lambda loss, eps, w: jnp.sum(eps * loss),
  'mwn': lambda loss, net, w: jnp.sum(v_mean(loss, net) * loss),
  'mwn detached': lambda loss, net, w: jnp.sum(v_mean(held(loss), net) * loss),
  'mwn mean': lambda loss, net, w: jnp.mean(v(loss, net) * loss),
  'mwn mean detached': lambda loss, net, w: jnp.mean(v(held(loss), net) * loss),
}
"""F as a function of training losses, learned variables, and class weights."""


def momentum(p, gradients, *, decay=0.0, nesterov=False):
  buffer = 0
  for gradient in gradients:
    direction = gradient + decay * p
    buffer = 0.9 * buffer + direction
  return p - 0.1 * (direction + 0.9 * buffer if nesterov else buffer)


def adam(p, gradients):
  m = u = 0
  for gradient in gradients:
    m, u = 0.9 * m + 0.1 * gradient, 0.999 * u + 0.001 * gradient**2
  t = len(gradients)
  return p - 0.1 * (m / (1 - 0.9**t)) / (jnp.sqrt(u / (1 - 0.999**t)) + 1e-8)


UPDATES = {
  'sgd': lambda p, gradients: p - 0.1 * gradients[-1],
  'heavy-ball': momentum,
  'nesterov': functools.partial(momentum, decay=0.01, nesterov=True),
  'adam': adam,
}
"""A parameter after its last gradient; the other gradients are its history."""


def updated(problem, name, gradient):
  """Returns the parameters after an optimiser update with this history."""
  return jax.tree.map(
    lambda p, *gradients: UPDATES[name](p, gradients),
    problem.params,
    *problem.history,
    gradient,
  )


def by_hand(problem, kind, virtual, loss=cross_entropy):
  """Returns (meta loss after the virtual step, its gradient) by definition."""
  w = jnp.asarray(CLASS_WEIGHTS)[problem.train['label']]

  def outcome(learned):
    def trained(params):
      logits = network(params, problem.train['image'])
      losses = loss(logits, problem.train['label'])
      return OBJECTIVES[kind](losses, learned, w)

    moved = updated(problem, virtual, jax.grad(trained)(problem.params))
    return problem.meta_loss({'net': moved})

  zeros = jnp.zeros(TRAIN, problem.train['image'].dtype)
  return jax.value_and_grad(outcome)(
    problem.weight_net if kind.startswith('mwn') else zeros
  )


@functools.cache
def defined(kind, virtual):
  """The same in float64, for the tests' problem."""
  with jax.enable_x64(True):
    by = jax.jit(by_hand, static_argnums=(1, 2))
    return by(make_problem('float64'), kind, virtual)


@functools.partial(jax.jit, static_argnames=('route', 'kind', 'optimizer', 'layers'))
def meta_gradient(problem, route, kind, optimizer, layers=(None, None)):
  """Returns (meta loss, meta gradient) by a route, as in a step of the method."""
  name, options = WEIGHINGS[kind]
  how = weighing(name, **options)
  virtual, options = OPTIMIZERS[optimizer]
  optimizer = make_optimizer(learning_rate=rate, **options)
  state = problem.state(optimizer)
  params = {'net': problem.params}
  take, put = layers
  take, put = take or (lambda tree: tree), put or (lambda leaves, tree: leaves)
  zeros = jax.tree.map(jnp.zeros_like, params)
  differentiated = meta.separate if route == 'low memory' else meta.shared
  losses = differentiated(lambda t: problem.losses(put(t, params)), take(params))

  def move(grads):
    step = meta.VIRTUAL[virtual]
    return take(step(optimizer, state, params, put(grads, zeros)))

  return meta.ROUTES['unrolled' if route == 'unrolled' else 'jvp'](
    losses,
    lambda values, weights: how.objective(values, weights, state, problem.train),
    move,
    lambda theta: problem.meta_loss(put(theta, params)),
    how.variables(state, problem.train),
    still=how.still,
  )


def assert_same_gradient(found, expected, precision):
  """Compares (meta loss, gradient), with the gradient relative to its largest entry."""
  np.testing.assert_allclose(found[0], expected[0], rtol=PRECISIONS[precision])
  ours, theirs = (
    np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
    for _, gradient in (found, expected)
  )
  tolerance = PRECISIONS[precision] * np.abs(theirs).max()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


@pytest.fixture(params=['float64', pytest.param('float32', marks=pytest.mark.slow)])
def precision(request):
  with jax.enable_x64(request.param == 'float64'):
    yield request.param


def marked(often):
  """Returns pairs of a weighting and an optimiser; all but the named ones are slow."""
  pairs = [(kind, 'sgd') for kind in WEIGHINGS]
  pairs += [(k, name) for k in ('multiplicative', 'mwn') for name in [*OPTIMIZERS][1:]]
  return [
    pytest.param(*pair, marks=() if pair in often else pytest.mark.slow)
    for pair in pairs
  ]


DOUBLE = [('additive', 'sgd'), ('mwn detached', 'sgd'), ('mwn', 'adam')]
"""The last of these is unrolled too, as are all that are slow."""
SINGLE = [('mwn', 'sgd')]


@pytest.mark.parametrize(('kind', 'optimizer'), marked(DOUBLE))
def test_it_is_the_gradient_through_the_virtual_step(kind, optimizer):
  with jax.enable_x64(True):
    check_the_gradient('float64', kind, optimizer)


@pytest.mark.parametrize(('kind', 'optimizer'), marked(SINGLE))
def test_it_is_so_in_single_precision(kind, optimizer):
  check_the_gradient('float32', kind, optimizer)


def check_the_gradient(precision, kind, optimizer):
  problem = make_problem(precision)
  expected = defined(kind, optimizer)
  unrolled = precision == 'float64' and (kind, optimizer) not in DOUBLE[:-1]
  for route in ('jvp', 'unrolled') if unrolled else ('jvp',):
    found = meta_gradient(problem, route, kind, optimizer)
    assert_same_gradient(found, expected, precision)
  assert any(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(found[1]))


def test_separate_passes_give_the_same(precision):
  problem = make_problem(precision)
  found = meta_gradient(problem, 'low memory', 'mwn', 'adam')
  expected = meta_gradient(problem, 'jvp', 'mwn', 'adam')
  assert_same_gradient(found, expected, precision)


def test_the_head_alone_has_a_closed_form(precision):
  """-rate * r_i . (G^T h_i + g), with G and g from the meta batch at the moved head."""
  problem = make_problem(precision)

  def take(tree):
    return [tree['net']['bias'], tree['net']['head']]

  def put(leaves, tree):
    return {'net': {**tree['net'], 'bias': leaves[0], 'head': leaves[1]}}

  _, gradient = meta_gradient(problem, 'jvp', 'additive', 'sgd', layers=(take, put))

  def features(batch):
    eye = {**problem.params, 'head': jnp.eye(HIDDEN), 'bias': jnp.zeros(HIDDEN)}
    return np.asarray(network(eye, batch['image']))

  def residuals(h, label, head, bias):
    z = h @ head + bias
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True) - np.eye(CLASSES)[np.asarray(label)]

  bias, head = (np.asarray(problem.params[k], np.float64) for k in ('bias', 'head'))
  h, h_meta = features(problem.train), features(problem.meta)
  r = residuals(h, problem.train['label'], head, bias)
  w = np.array(CLASS_WEIGHTS)[np.asarray(problem.train['label'])]
  moved = head - 0.1 * h.T @ (w[:, None] * r), bias - 0.1 * (w[:, None] * r).sum(0)
  r_meta = residuals(h_meta, problem.meta['label'], *moved)
  slope, slope_bias = h_meta.T @ r_meta / META, r_meta.mean(0)
  expected = -0.1 * (r * (h @ slope + slope_bias)).sum(1)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(
    gradient, expected, rtol=0, atol=PRECISIONS[precision] * scale
  )


def test_the_wrong_shortcut_is_wrong():
  """Single images have other batch statistics, so per-image gradients are wrong."""
  with jax.enable_x64(True):
    problem = make_problem('float64')
    _, right = jax.device_get(meta_gradient(problem, 'jvp', 'additive', 'sgd'))

    images, labels = (jnp.asarray(problem.train[name]) for name in ('image', 'label'))

    def alone(params, i):
      image = images[i][None]
      return cross_entropy(network(params, image), labels[i][None])[0]

    @jax.jit
    def by_image(problem):
      slope = jax.grad(lambda p: problem.meta_loss({'net': p}))(problem.params)
      each = jax.vmap(jax.grad(alone), (None, 0))(problem.params, jnp.arange(TRAIN))
      products = jax.tree.map(
        lambda a, b: b.reshape(TRAIN, -1) @ a.ravel(), slope, each
      )
      return -0.1 * sum(jax.tree.leaves(products))

    wrong = by_image(problem)
    error = np.linalg.norm(right - wrong) / np.linalg.norm(right)
    assert error > 0.05


# How gradients become weights.


BATCH = {'label': jnp.array([0, 1, 2, 3])}


def state_at(step, **params):
  return State(jnp.int32(step), jax.random.key(0), params, {}, {}, {})


def test_l2rw_clips_and_normalises():
  weigh = weighing('meta_reweight', **L2RW).weigh
  gradient = jnp.array([-3.0, 1.0, -1.0, 0.0])
  weights = weigh(gradient, jnp.ones(4), state_at(0), BATCH)
  np.testing.assert_allclose(weights, 4 * np.array([0.75, 0, 0.25, 0]))


def test_l2rw_where_nothing_helps_weighs_nothing():
  weigh = weighing('meta_reweight', **L2RW).weigh
  weights = weigh(jnp.ones(4), jnp.ones(4), state_at(0), BATCH)
  np.testing.assert_array_equal(weights, 0)
  weights = weigh(None, jnp.ones(4), state_at(0), BATCH)  # no meta batch
  np.testing.assert_array_equal(weights, 1)


SWITCHES = list(itertools.product((False, True), repeat=3))


@pytest.mark.parametrize(('from_class_weights', 'clip', 'normalise'), SWITCHES)
def test_each_switch_does_its_part(from_class_weights, clip, normalise):
  how = weighing(
    'meta_reweight',
    eps_lr=0.5,
    prior='class_weights' if from_class_weights else 'none',
    clip=clip,
    normalise=normalise,
  )
  gradient = np.array([2.0, -1.0, 0.0, 4.0])
  expected = np.maximum(-0.5 * gradient, 0 if clip else -np.inf)
  if from_class_weights:
    expected = expected + CLASS_WEIGHTS[:4]
  if normalise:
    expected = 4 * expected / np.abs(expected).sum()
  weights = how.weigh(jnp.asarray(gradient), jnp.ones(4), state_at(0), BATCH)
  np.testing.assert_allclose(weights, expected, rtol=1e-6)
  assert how.mean_one == normalise and how.still != from_class_weights


@pytest.mark.parametrize(
  ('form', 'scale', 'expected'),
  [
    ('additive', 'absolute', [0.2 - 0.02, 0.5 + 0.01, 1.0, 1.5 - 0.01]),
    ('multiplicative', 'absolute', [0.2 * 0.98, 0.5 * 1.01, 1.0, 1.5 * 0.99]),
    ('additive', 'relative', [0.2 - 0.01, 0.5 + 0.005, 1.0, 1.5 - 0.005]),
  ],
)
def test_meta_reweight_adds_a_step_against_the_gradient(form, scale, expected):
  how = weighing('meta_reweight', eps_lr=0.01, form=form, eps_scale=scale)
  gradient = jnp.array([2.0, -1.0, 0.0, 1.0])
  weights = how.weigh(gradient, jnp.ones(4), state_at(0), BATCH)
  np.testing.assert_allclose(weights, expected, rtol=1e-6)
  weights = how.weigh(None, jnp.ones(4), state_at(0), BATCH)
  np.testing.assert_allclose(weights, how.prior(state_at(0), BATCH))


def test_the_weight_network_is_a_sigmoid_of_a_hidden_layer(rng):
  how = weighing('meta_weight_net', normalise=False)
  params = how.init(jax.random.key(0))[0]['weight_net']
  assert jax.tree.map(jnp.shape, params) == {
    'hidden': {'kernel': (1, 100), 'bias': (100,)},
    'weight': {'kernel': (100, 1), 'bias': (1,)},
  }
  assert np.abs(params['weight']['kernel']).max() <= 0.1
  losses = rng.uniform(0, 5, 4).astype(np.float32)
  state = state_at(0, weight_net=params)
  weights = how.weigh(None, losses, state, BATCH)
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  hidden = np.maximum(losses[:, None] * p['hidden']['kernel'] + p['hidden']['bias'], 0)
  v = 1 / (1 + np.exp(-(hidden @ p['weight']['kernel'] + p['weight']['bias'])[:, 0]))
  np.testing.assert_allclose(weights, v, rtol=1e-5)
  normalised = weighing('meta_weight_net').weigh(None, losses, state, BATCH)
  np.testing.assert_allclose(normalised, 4 * v / v.sum(), rtol=1e-5)


def test_the_weight_network_learns_before_it_weighs():
  player = weight_player(0.5, name='sgd', momentum=0.0)
  how = weighing('meta_weight_net', players={'weight_net': player})
  params, opt = how.init(jax.random.key(0))
  state = state_at(0, **params).replace(opt=opt)
  gradient = jax.tree.map(jnp.ones_like, params['weight_net'])
  moved = how.learn(gradient, state)
  jax.tree.map(
    lambda new, old: np.testing.assert_allclose(new, old - 0.5, rtol=1e-6, atol=1e-6),
    moved.params,
    params,
  )
  assert int(moved.step) == 0


def test_weights_are_reported_per_class():
  weights, prior = jnp.array([1.5, -0.5, 3.0]), jnp.array([1.0, 1.0, 2.0])
  found = meta.weight_metrics(weights, prior, jnp.array([0, 0, 2]), 4)
  means = {name: train.means(*pair) for name, pair in found.items()}
  nan = np.nan
  np.testing.assert_allclose(means['weight_prior'], [1, nan, 2, nan])
  np.testing.assert_allclose(means['weight_learned'], [-0.5, nan, 1, nan])
  np.testing.assert_allclose(means['weight_about'], [-0.5, nan, 1, nan])
  np.testing.assert_allclose(means['weight_about_square'], [1.25, nan, 1, nan])
  np.testing.assert_allclose(means['weight_negative'], [0.5, nan, 0, nan])
  np.testing.assert_allclose(means['learned_over_prior'], 3 / 4)


def test_normalised_weights_are_compared_with_normalised_ones():
  """Class-balanced weights with mean one have learned nothing; their spread stays."""
  prior = jnp.array([0.1, 0.1, 0.4])
  found = meta.weight_metrics(
    prior / 0.2, prior, jnp.array([0, 0, 2]), 3, mean_one=True
  )
  means = {name: train.means(*pair) for name, pair in found.items()}
  np.testing.assert_allclose(means['weight_prior'], [0.5, np.nan, 2], rtol=1e-6)
  np.testing.assert_allclose(means['weight_learned'], [0, np.nan, 0], atol=1e-6)
  np.testing.assert_allclose(means['learned_over_prior'], 0, atol=1e-6)
  np.testing.assert_allclose(means['weight_about'], [0.4, np.nan, 1.6], rtol=1e-6)
  assert weighing('meta_weight_net').mean_one
  assert not weighing('meta_weight_net', normalise=False).mean_one
  assert not weighing('meta_reweight').mean_one


# Whole steps, by hand.


class Net(nn.Module):
  """The network above, with a running mean of the inputs of its statistics."""

  @nn.compact
  def __call__(self, images, train):
    shapes = {
      'hidden': (PIXELS, HIDDEN),
      'scale': (HIDDEN,),
      'shift': (HIDDEN,),
      'head': (HIDDEN, CLASSES),
      'bias': (CLASSES,),
    }
    zeros = nn.initializers.zeros
    params = {
      name: self.param(name, zeros, shape, images.dtype)
      for name, shape in shapes.items()
    }
    mean = self.variable('batch_stats', 'mean', jnp.zeros, HIDDEN, images.dtype)
    if train:
      mean.value = 0.9 * mean.value + 0.1 * (images @ params['hidden']).mean(0)
    return {'logits': network(params, images), 'features': images}


def ldam(logits, label):
  margins = 0.5 * jnp.asarray((2 / COUNTS) ** 0.25)
  return cross_entropy(logits - 3 * margins[None] * jnp.eye(CLASSES)[label], label)


LOSSES = {
  'cross_entropy': (cross_entropy, {}),
  'ldam': (ldam, {'scale': 3.0, 'max_margin': 0.5}),
}
TAU = 0.7


def moved_net(net, gradient):
  """The weight network after Adam's third step, with moments that were zero."""

  def moved(p, g):
    mean, square = 0.1 * g / (1 - 0.9**3), 0.001 * g**2 / (1 - 0.999**3)
    return p - 2**-4 * mean / (jnp.sqrt(square) + 1e-8)

  return jax.tree.map(moved, net, gradient)


def clipped(gradient):
  wanted = jnp.maximum(-gradient, 0)
  return wanted / wanted.sum()


WEIGHTS = {
  'multiplicative': lambda loss, gradient, w, net: w * (1 - TAU * gradient),
  'additive': lambda loss, gradient, w, net: w - TAU * gradient,
  'l2rw': lambda loss, gradient, w, net: TRAIN * clipped(gradient),
  'mwn': lambda loss, gradient, w, net: TRAIN * v_mean(loss, moved_net(net, gradient)),
}
"""Weights of the training step, given losses, meta gradient and class weights."""


@pytest.mark.filterwarnings('ignore:scatter inputs')  # metrics are float32
@pytest.mark.parametrize(
  ('kind', 'optimizer', 'loss', 'options'),
  [
    pytest.param(
      'multiplicative',
      'nesterov',
      'ldam',
      {'virtual': 'optimizer', 'eps_lr': TAU},
      marks=pytest.mark.slow,
    ),
    pytest.param(
      'additive',
      'heavy-ball',
      'ldam',
      {'low_memory': True, 'eps_lr': TAU},
      marks=pytest.mark.slow,
    ),
    pytest.param(
      'l2rw',
      'adam',
      'cross_entropy',
      {'virtual': 'optimizer'},
      marks=pytest.mark.slow,
    ),
    (
      'mwn',
      'heavy-ball',
      'cross_entropy',
      {'players': {'weight_net': weight_player(2**-4)}},
    ),
  ],
)
def test_a_whole_step_by_hand(kind, optimizer, loss, options):
  """Meta loss, new weights, new parameters and statistics, at the third step."""
  with jax.enable_x64(True):
    problem = make_problem('float64')
    name, how = WEIGHINGS[kind]
    formula, loss_options = LOSSES[loss]
    player = make_optimizer(learning_rate=rate, **OPTIMIZERS[optimizer][1])
    method = getattr(meta, name)(
      Net(),
      player,
      make_loss(loss, counts=COUNTS, **loss_options),
      streams=('train', 'meta'),
      **{**given(name), **how, **options},
    )
    batches = {'train': problem.train, 'meta': problem.meta}
    shapes = jax.eval_shape(method.init, jax.random.key(0), batches)
    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
    here = problem.state(player)
    before = here.replace(
      params={n: here.params[n] for n in shapes.params},
      stats=zeros(shapes.stats),
      opt=zeros(shapes.opt) | here.opt,
    )
    step = jax.jit(method.step)
    after, metrics = step(before, batches)

    def expectation(problem):
      virtual = optimizer if options.get('virtual') == 'optimizer' else 'sgd'
      meta_loss, gradient = by_hand(problem, kind, virtual, formula)
      label = problem.train['label']
      w = jnp.asarray(CLASS_WEIGHTS)[label]

      def losses(params):
        return formula(network(params, problem.train['image']), label)

      weights = held(
        WEIGHTS[kind](losses(problem.params), gradient, w, problem.weight_net)
      )
      value, slope = jax.value_and_grad(lambda p: (weights * losses(p)).mean())(
        problem.params
      )
      mean = 0.1 * (problem.train['image'] @ problem.params['hidden']).mean(0)
      return {
        'meta_loss': meta_loss,
        'loss': value,
        'params': updated(problem, optimizer, slope),
        'stats': mean,
        'weight_net': moved_net(problem.weight_net, gradient) if kind == 'mwn' else {},
      }

    found = {
      'meta_loss': metrics['meta_loss'][0],
      'loss': metrics['loss'][0],
      'params': after.params['net'],
      'stats': after.stats['net']['mean'],
      'weight_net': after.params.get('weight_net', {}),
    }
    expected = jax.jit(expectation)(problem)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10),
      found,
      expected,
    )
    assert int(after.step) == 3


# Whole steps with the library's networks.

ROWS = {'train': {'split': 'train'}}


def meta_row(batch=8, every=1):
  return ROWS | {'meta': {'split': 'meta', 'batch': batch, 'every': every}}


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
  return tiny.write_npz(tmp_path_factory.mktemp('meta') / 'tiny.npz')


def step_of(runner, **options):
  """Returns (new State, metrics, program) of one step of a method with options."""
  streams = runner.stage.streams
  payloads = {name: stream.payload(0) for name, stream in streams.items()}
  batches = train.batches_at(streams, runner.arrays, payloads, jax.random.key(0), 0)
  net = make_classifier(
    'digits_cnn', 'linear', 4, batch_norm={'groups': 1}, trunk_options={'width': 4}
  )
  method = meta.meta_reweight(
    net,
    make_optimizer('sgd', rate, momentum=0.9),
    make_loss('cross_entropy', counts=np.ones(4)),
    class_weights=lambda step: jnp.asarray([0.2, 1.0, 1.3, 1.5]),
    eps_lr=1.0,
    streams=('train', 'meta'),
    **options,
  )
  state = jax.jit(method.init)(jax.random.key(0), batches)
  program = jax.jit(method.step).lower(state, batches).compile()
  return *program(state, batches), program


@pytest.fixture(scope='module')
def runner(npz):
  return Runner(npz, 'meta_ce')


@pytest.fixture(scope='module')
def exact(runner):
  return step_of(runner)


def assert_same_step(ours, theirs, rtol=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol),
    (ours.params, ours.stats),
    (theirs.params, theirs.stats),
  )


def test_unrolling_makes_the_same_step(runner, exact):
  assert_same_step(step_of(runner, route='unrolled')[0], exact[0])


def test_low_memory_makes_the_same_step_in_less_memory(runner, exact):
  *step, low = step_of(runner, low_memory=True)
  assert_same_step(step[0], exact[0])
  memory, flops = (
    [read(program) for program in (low, exact[2])] for read in (_temporary, _flops)
  )
  assert memory[0] < 0.8 * memory[1] and flops[0] > 1.2 * flops[1]


def _temporary(program):
  return program.memory_analysis().temp_size_in_bytes


def _flops(program):
  cost = program.cost_analysis()
  return (cost[0] if isinstance(cost, list) else cost)['flops']


def test_the_head_alone_makes_another_step(runner, exact):
  _, metrics, _ = step_of(runner, meta_layers='head')
  learned = [m['learned_over_prior'] for m in (metrics, exact[1])]
  ours, theirs = (float(total / count) for total, count in learned)
  assert ours > 0 and theirs > 0 and abs(ours - theirs) > 1e-6
  params = {'net': exact[0].params['net']}
  named, spelt = (
    meta._chosen(params, layers)[0](params)
    for layers in ('head', 'net/head/(kernel|bias)')
  )
  assert len(named) == 2 and all(a is b for a, b in zip(named, spelt, strict=True))


@pytest.mark.slow
def test_eps_lr_of_zero_is_the_control(npz):
  config = tiny.config(npz, 'meta_ce,epochs=60.0')
  options = {**config['stages']['meta']['method'], 'eps_lr': 0.0}
  stages = {**config['stages']}
  stages['meta'] = {**stages['meta'], 'method': options}
  ours = Runner(npz, 'meta_ce', stages=stages)
  control = Runner(npz, 'meta_ce_control')
  found, expected = (r.run(r.init(), 5)[0] for r in (ours, control))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    jax.device_get((found.params, found.stats, found.opt)),
    jax.device_get((expected.params, expected.stats, expected.opt)),
  )


def test_a_meta_batch_every_other_step(npz):
  runner = Runner(npz, 'mwn', streams=meta_row(every=2))
  state, thetas = runner.init(), []
  for _ in range(4):
    thetas.append(jax.device_get(state.params['weight_net']['weight']['bias']))
    state, metrics, _ = runner.run(state, 1)
    due = len(thetas) % 2 == 1
    assert metrics['meta_loss'][1] == due
  assert thetas[0] != thetas[1] and thetas[1] == thetas[2] and thetas[2] != thetas[3]
  assert len(runner.traces) == 2  # with and without a meta batch


def test_a_scan_leaves_the_meta_batch_out_as_single_calls_do(npz):
  runner = Runner(npz, 'mwn', streams=meta_row(every=2))
  streams, mesh = runner.stage.streams, runner.mesh
  one_by_one, _, _ = runner.run(runner.init(), 4)
  together = train.make_update(runner.stage.method, streams, mesh, 4)
  totals, bad = runner.zeros
  rows = sharding.put_batch(mesh, train._stack(None, streams, 0, 4), leading=1)
  scanned, metrics, _ = together(runner.init(), totals, bad, runner.arrays, rows)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    jax.device_get(scanned.params),
    jax.device_get(one_by_one.params),
  )
  assert int(metrics['meta_loss'][1]) == 2


# Rejected options.


@jax.custom_vjp
def _reverse_only(x):
  return x


_reverse_only.defvjp(lambda x: (x, None), lambda _, g: (g,))


def reverse_only(logits, labels):
  """A loss with only a reverse-mode rule."""
  return cross_entropy(_reverse_only(logits), labels)


def broken(logits, labels):
  """A loss with a different error."""
  return cross_entropy(logits, labels) + None


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'streams': ROWS}, "reads a stream 'meta': set streams.meta"),
    ({'streams': meta_row(batch=9)}, 'streams.meta.batch is 9, but meta has 8 images'),
    ({'streams': meta_row(every=0)}, 'streams.meta.every is 0'),
    ({'data': {'meta_per_class': 0}}, 'there is none: set data.meta_per_class'),
    ({'streams': {'train': {'split': 'test'}}}, "unknown split to train on 'test'"),
    ({'method': {'meta_layers': 'net/nix'}}, 'matches no parameter; one is'),
    ({'method': {'meta_layers': '('}}, r"meta_layers '\('"),
    ({'method': {'route': 'jpv'}}, "did you mean 'jvp'"),
    ({'method': {'virtual': 'sdg'}}, "did you mean 'sgd'"),
    ({'method': {'low_memory': True, 'route': 'unrolled'}}, 'low_memory needs the'),
    ({'method': {'accumulate': 2}}, "no option 'accumulate'"),
    ({'reduction': 'weight_normalised'}, "does not use reduction: set it to 'mean'"),
    ({'loss': {'name': 'reverse_only'}}, 'no forward-mode rule'),
    ({'loss': {'name': 'broken'}}, 'cannot be built: TypeError: .*NoneType'),
  ],
)
def test_mistakes_are_reported_before_anything_runs(npz, monkeypatch, change, message):
  from lt_jax import losses, run

  monkeypatch.setitem(losses.LOSSES, 'reverse_only', reverse_only)
  monkeypatch.setitem(losses.LOSSES, 'broken', broken)
  config = tiny.config(npz, 'l2rw,epochs=60.0')
  for key, value in change.items():
    both = isinstance(value, dict) and key not in ('loss', 'streams')
    config[key] = {**config[key], **value} if both else value
  with pytest.raises(UserError, match=message) as error:
    run.rehearsed(config, NOWHERE)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('rate', [-1.0, np.nan, np.inf])
def test_a_rate_that_means_nothing_is_reported(rate):
  with pytest.raises(UserError, match=f'eps_lr is {rate}'):
    weighing('meta_reweight', eps_lr=rate)


def test_a_run_that_ends_before_its_second_stage_warns(npz):
  from lt_jax import run

  config = tiny.config(npz, 'meta_ce,epochs=60.0', epochs=20.0, defer_epoch=48.0)
  with pytest.raises(UserError, match="'meta' ends at step 20, but starts at 48"):
    run.rehearsed(config, NOWHERE)


def test_a_loss_without_a_forward_mode_rule_can_be_unrolled(npz, monkeypatch):
  from lt_jax import losses, run

  monkeypatch.setitem(losses.LOSSES, 'reverse_only', reverse_only)
  method = tiny.config(npz, 'l2rw,epochs=60.0')['method']
  options = {
    'loss': {'name': 'reverse_only'},
    'method': {**method, 'route': 'unrolled'},
  }
  run.rehearsed(tiny.config(npz, 'l2rw,epochs=60.0', **options), NOWHERE)


def test_a_class_missing_from_the_meta_set_is_reported(npz):
  experiment = build.build(tiny.config(npz, 'ce,epochs=60.0'))
  split = experiment.dataset.splits['meta']
  here = split.labels != 2
  cut = split._replace(rows=split.rows[here], labels=split.labels[here])
  dataset = experiment.dataset._replace(
    splits=experiment.dataset.splits | {'meta': cut}
  )
  config = tiny.config(npz, 'l2rw,epochs=60.0')
  with pytest.raises(UserError, match='the meta set has no image of class 2'):
    build.build(config, datasets={'source': dataset})


def test_the_meta_batch_is_set_without_the_batch():
  config = digits_lt.get_config('mwn')
  config.streams.meta.batch = 30
  assert (config.batch, config.streams.meta.batch) == (64, 30)


def test_meta_images_can_be_trained_on_too(npz):
  apart, merged = (
    build.build(tiny.config(npz, f'{recipe},epochs=60.0')).dataset
    for recipe in ('ce', 'ce_plus_meta')
  )
  np.testing.assert_array_equal(merged.counts, apart.counts + tiny.META)
  rows = {name: set(split.rows.tolist()) for name, split in apart.splits.items()}
  assert set(merged.splits['train'].rows.tolist()) == rows['train'] | rows['meta']
  assert not rows['train'] & rows['meta']
