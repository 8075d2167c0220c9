"""Methods for two domains: joint batches, updates of players, many devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from sklearn.datasets import make_moons

from lt_jax import sharding
from lt_jax.errors import UserError, construct
from lt_jax.losses import make_loss, mean
from lt_jax.losses.alignment import make_alignment, make_weight
from lt_jax.method import Player, forward
from lt_jax.methods import METHODS
from lt_jax.methods.adversarial import (
  domain_loss,
  entropy_weights,
  grad_reverse,
  multilinear,
)
from lt_jax.methods.mcd import discrepancy
from lt_jax.methods.pairs import STATISTICS, apart, forward_pair, together
from lt_jax.methods.supervised import make_objective
from lt_jax.models import Classifier, make_classifier
from lt_jax.models.digits import Convolution, DigitsNet
from lt_jax.models.discriminator import mlp
from lt_jax.models.heads import linear
from lt_jax.optim import adam, sgd
from lt_jax.replicas import vectorise
from lt_jax.schedules import make_schedule

CLASSES = 3
STEPS = 20
JUDGED = ('dann', 'cdan', 'adda')
"""Methods with a discriminator."""


def plain_net():
  """A network with named layers and no batch normalisation."""
  return Classifier(DigitsNet((Convolution(3),), (6, 5)), linear(CLASSES))


def normalised_net(**batch_norm):
  return make_classifier(
    'tiny_cnn', 'linear', CLASSES, trunk_options={'width': 3}, batch_norm=batch_norm
  )


def batches_of(source=8, target=8, seed=0):
  rng = np.random.default_rng(seed)
  label = jnp.asarray(np.arange(source) % CLASSES, jnp.int32)
  images = [rng.normal(size=(n, 8, 8, 2)).astype(np.float32) for n in (source, target)]
  images[1] += 0.5
  return {
    'train': {'image': jnp.asarray(images[0]), 'label': label},
    'target': {'image': jnp.asarray(images[1])},
  }


def rate(base):
  return make_schedule('constant', base, length=1, batch=1)


def progress(step):
  return jnp.asarray(step, jnp.float32) / STEPS


def made(
  name,
  net,
  *,
  weight=1.0,
  align_on=('features',),
  judge=None,
  players=None,
  optimizer=None,
  **options,
):
  """Returns a method, given the context that a run would give it."""
  alignment = options.pop('alignment', None)
  align = make_alignment(
    alignment or 'none',
    align_on=align_on,
    weight=weight,
    counts=np.ones(CLASSES),
    progress=progress,
  )
  judge = judge or Player(mlp(hidden=(4,)), adam(rate(0.01)))
  if players is None:
    players = {'discriminator': judge} if name in JUDGED else {}
  parts = {
    'loss': make_loss('cross_entropy', np.ones(CLASSES, int)),
    'class_weights': lambda step: jnp.ones(CLASSES),
    'reduction': mean,
    'penalty': None,
  }
  return construct(
    METHODS,
    'method',
    name,
    net,
    optimizer or sgd(rate(0.1)),
    options=options,
    **parts,
    objective=make_objective(**parts),
    streams=('train', 'target'),
    image_shape=(8, 8, 2),
    pixels={'train': ((0.0,), (1.0,)), 'target': ((0.6,), (0.25,))},
    alignment=align,
    align_on=align_on,
    alignment_weight=make_weight(weight, progress),
    players=players,
  )


def close(a, b, **tolerances):
  tolerances = {'rtol': 1e-4, 'atol': 1e-5} | tolerances
  jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerances), a, b)


# Gradient reversal.


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_reversal_passes_values_and_flips_gradients(dtype, rng):
  x = jnp.asarray(1e4 * rng.normal(size=(4, 3)), dtype)
  traces = []

  @jax.jit
  def pull(x, scale, g):
    traces.append(1)
    y, back = jax.vjp(grad_reverse, x, scale)
    return y, *back(g)

  for scale in (0.0, 0.5, 2.0):
    y, to_x, to_scale = pull(x, jnp.float32(scale), jnp.ones_like(x))
    np.testing.assert_array_equal(y, x)  # bit by bit
    np.testing.assert_array_equal(to_x, jnp.full_like(x, -scale))
    assert to_x.dtype == x.dtype and to_scale == 0
  assert len(traces) == 1  # the scale is not a compiled constant
  scales = jnp.asarray([1.0, 3.0])
  pulled = jax.vmap(lambda s: jax.grad(lambda x: grad_reverse(x, s).sum())(x))(scales)
  np.testing.assert_array_equal(pulled[:, 0, 0], [-1, -3])


# Two batches through one network.


@pytest.mark.parametrize('sizes', [(8, 8), (16, 8), (6, 4), (7, 5), (4, 12)])
def test_batches_put_together_come_apart(sizes):
  source, target = (
    np.arange(n * 2).reshape(n, 2) + 100 * d for d, n in enumerate(sizes)
  )
  both = together(source, target)
  for part, whole in zip(apart(both, len(source)), (source, target), strict=True):
    np.testing.assert_array_equal(part, whole)
  of_target = np.asarray(both[:, 0] >= 100)
  blocks = of_target.reshape(np.gcd(*sizes), -1).sum(1)
  assert (blocks == blocks[0]).all()  # every device has equally many


@pytest.fixture(scope='module')
def normalised():
  net = normalised_net()
  images = batches_of()['train']['image']
  return jax.jit(functools.partial(net.init, train=False))(jax.random.key(0), images)


def both_ways(net, variables, batches, statistics):
  """Returns (outputs of both, updated statistics, a gradient) from `forward_pair`."""
  stats = variables['batch_stats']
  if statistics == 'domain_specific':
    first = {'net': stats, 'net_source': stats}
  else:
    first = {'net': stats}

  def run(params):
    s, t = batches['train']['image'], batches['target']['image']
    source, target, stats = forward_pair(
      net, params, first, s, t, statistics=statistics
    )
    value = (source['logits'] ** 2).sum() + (target['features'] ** 3).sum()
    return value, (source, target, stats)

  grads, found = jax.jit(jax.grad(run, has_aux=True))(variables['params'])
  return *found, grads


def test_separate_passes_are_one_pass_with_two_groups(normalised):
  """For consecutive batches, outputs, gradients and running averages agree."""
  batches = batches_of()
  source, target, stats, grads = both_ways(
    normalised_net(), normalised, batches, 'separate'
  )
  images = jnp.concatenate([batches[name]['image'] for name in ('train', 'target')])

  def run(params):
    outputs, stats = forward(
      normalised_net(groups=2), params, normalised['batch_stats'], images, train=True
    )
    value = (outputs['logits'][:8] ** 2).sum() + (outputs['features'][8:] ** 3).sum()
    return value, (outputs, stats)

  expected, (outputs, groups_stats) = jax.jit(jax.grad(run, has_aux=True))(
    normalised['params']
  )
  for name in ('logits', 'features'):
    close(jnp.concatenate([source[name], target[name]]), outputs[name])
  close(stats, {'net': groups_stats})
  close(grads, expected, atol=1e-4)


def test_joint_statistics_are_those_of_both_batches(normalised):
  batches = batches_of(8, 4)
  source, target, stats, _ = both_ways(normalised_net(), normalised, batches, 'joint')
  images = jnp.concatenate([batches[name]['image'] for name in ('train', 'target')])
  outputs, expected = forward(
    normalised_net(),
    normalised['params'],
    normalised['batch_stats'],
    images,
    train=True,
  )
  for name in ('logits', 'features'):
    close(jnp.concatenate([source[name], target[name]]), outputs[name])
  close(stats, {'net': expected})


def test_domain_specific_statistics_are_two_and_the_targets_predict(normalised):
  batches = batches_of()
  net = normalised_net()
  source, target, stats, _ = both_ways(net, normalised, batches, 'domain_specific')
  names = (('train', source, 'net_source'), ('target', target, 'net'))
  for name, found, player in names:
    outputs, expected = jax.jit(functools.partial(forward, net, train=True))(
      normalised['params'], normalised['batch_stats'], batches[name]['image']
    )
    close(found['logits'], outputs['logits'])
    close(stats[player], expected)
  method = made('aligned', net, statistics='domain_specific')
  state = jax.jit(method.init)(jax.random.key(0), batches)
  assert set(state.stats) == {'net', 'net_source'}
  state, _ = jax.jit(method.step)(state, batches)
  moved = jax.tree.leaves(
    jax.tree.map(lambda a, b: float(abs(a - b).max()), *state.stats.values())
  )
  assert max(moved) > 1e-3
  images = batches['target']['image']
  expected, _ = jax.jit(functools.partial(forward, net, train=False))(
    state.params['net'], state.stats['net'], images
  )
  close(jax.jit(method.predict)(state, images)['logits'], expected['logits'])


# What the steps do.


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('aligned', {'statistics': 'separate'}),
    pytest.param(
      'aligned', {'alignment': 'coral', 'weight': 0.0}, marks=pytest.mark.slow
    ),
    ('dann', {'weight': 0.0}),
  ],
)
def test_without_a_weight_it_is_supervised_learning(name, options):
  """In a network without batch normalisation, the target changes nothing."""
  batches, states = batches_of(), []
  for method in (made('supervised', plain_net()), made(name, plain_net(), **options)):
    state, step = jax.jit(method.init)(jax.random.key(0), batches), jax.jit(method.step)
    for _ in range(3):
      state, _ = step(state, batches)
    states.append(state)
  close(states[0].params['net'], states[1].params['net'])
  assert int(states[1].step) == 3


def test_aligned_descends_the_sum_of_both():
  net, batches = plain_net(), batches_of(8, 4)
  method = made('aligned', net, alignment='coral', weight=2.0, align_on=('conv',))
  state = jax.jit(method.init)(jax.random.key(0), batches)

  def objective(params):
    def outputs(name):
      return forward(net, params, {}, batches[name]['image'], train=True)[0]

    source, target = outputs('train'), outputs('target')
    p = jax.nn.log_softmax(source['logits'])
    loss = -jnp.take_along_axis(p, batches['train']['label'][:, None], 1).mean()
    difference = jnp.cov(source['conv'].T) - jnp.cov(target['conv'].T)
    apart = 2 * (difference**2).sum() / (4 * len(difference) ** 2)
    return loss + apart, apart

  (value, apart), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(
    state.params['net']
  )
  after, metrics = jax.jit(method.step)(state, batches)
  close(metrics['loss'][0], value - apart)
  close(metrics['alignment'][0], apart)
  close(
    after.params['net'],
    jax.tree.map(lambda p, g: p - 0.1 * g, state.params['net'], grads),
  )
  assert {'accuracy', 'class_loss', 'grad_norm', 'learning_rate'} <= metrics.keys()


def test_dann_descends_for_one_player_and_ascends_for_the_other():
  """The discriminator has weight 1 and its own optimiser, whatever lambda is."""
  net, batches = plain_net(), batches_of(8, 4)
  judge = Player(mlp(hidden=(4,)), sgd(rate(0.3), momentum=0.0))
  weight = {'name': 'dann', 'gamma': 10.0, 'weight': 1.0}
  method = made('dann', net, judge=judge, weight=weight, align_on=('conv', 'fc1'))
  state = jax.jit(method.init)(jax.random.key(0), batches)
  state = state.replace(step=jnp.int32(5))  # a quarter of the stage
  scale = 2 / (1 + np.exp(-2.5)) - 1

  def losses(params):
    def outputs(name):
      return forward(net, params['net'], {}, batches[name]['image'], train=True)[0]

    def domain(outputs, label):
      layers = jnp.concatenate([outputs['conv'], outputs['fc1']], 1)
      z = judge.net.apply({'params': params['discriminator']}, layers)
      p = jax.nn.sigmoid(z)
      return -jnp.log(p if label else 1 - p).mean(), ((z > 0) == label).sum()

    source, target = outputs('train'), outputs('target')
    p = jax.nn.log_softmax(source['logits'])
    labels = batches['train']['label'][:, None]
    of_labels = -jnp.take_along_axis(p, labels, 1).mean()
    (of_source, right), (of_target, also) = domain(source, 0), domain(target, 1)
    return of_labels, of_source + of_target, right + also

  @jax.jit
  def by_hand(params):
    first, second = (jax.grad(lambda p, i=i: losses(p)[i])(params) for i in (0, 1))
    return *losses(params), first, second

  of_labels, of_domains, right, first, second = by_hand(state.params)
  after, metrics = jax.jit(method.step)(state, batches)
  close(
    after.params['net'],
    jax.tree.map(
      lambda p, a, b: p - 0.1 * (a - scale * b),
      state.params['net'],
      first['net'],
      second['net'],
    ),
  )
  close(
    after.params['discriminator'],
    jax.tree.map(
      lambda p, g: p - 0.3 * g, state.params['discriminator'], second['discriminator']
    ),
  )
  assert int(after.step) == 6
  close(metrics['loss'][0], of_labels)
  close(metrics['domain_loss'][0], of_domains)
  close(metrics['lambda'][0], scale)
  assert metrics['domain_accuracy'] == (right, 12)


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def test_a_discriminator_returns_one_logit_for_each_image():
  with pytest.raises(UserError, match=r'returns \(4, 2\) for 4 images'):
    domain_loss(jnp.zeros((4, 2)), jnp.zeros((4, 2)))


def test_parts_of_adversarial_losses_are_their_formulas(rng):
  """Compares with float64 loops."""
  f, z, other = (rng.normal(size=(5, n)) for n in (4, CLASSES, CLASSES))
  p, q = softmax(z), softmax(other)
  r_f, r_p = (rng.normal(size=(n, 6)) for n in (4, CLASSES))
  drawn = {'features': r_f, 'predictions': r_p}
  sure = [1 + np.exp(sum(x * np.log(x) for x in row)) for row in p]
  weights = np.array(sure) / np.mean(sure)
  of_source, of_target = rng.normal(size=5), rng.normal(size=2)
  log_loss = [
    w * np.log(1 + np.exp(x)) for w, x in zip(weights, of_source, strict=True)
  ]
  log_loss = np.mean(log_loss) + np.mean(np.log(1 + np.exp(-of_target)))
  with jax.enable_x64(True):
    for ours, expected in (
      (multilinear(f, p), [np.outer(a, b).ravel() for a, b in zip(f, p, strict=True)]),
      (
        multilinear(f, p, drawn),
        (f @ r_f) * (p @ r_p) / np.sqrt(6),
      ),
      (entropy_weights(jnp.asarray(z)), weights),
      (
        discrepancy(jnp.asarray(z), jnp.asarray(other)),
        sum(abs(a - b) for a, b in zip(p.ravel(), q.ravel(), strict=True)) / p.size,
      ),
      (domain_loss(of_source, jnp.asarray(of_target), weights)[0], log_loss),
    ):
      np.testing.assert_allclose(ours, expected, rtol=1e-9)
      assert ours.dtype == jnp.float64


def test_a_random_projection_keeps_inner_products_on_average(rng):
  """The inner products of the products are <f, f'> <p, p'>."""
  f, p = rng.normal(size=(2, 5)), softmax(rng.normal(size=(2, CLASSES)))
  r_f, r_p = (rng.normal(size=(n, 40_000)) for n in (5, CLASSES))
  drawn = {'features': r_f, 'predictions': r_p}
  full, projected = multilinear(f, p), multilinear(f, p, drawn)
  close(projected @ projected.T, full @ full.T, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
  'form',
  [
    pytest.param({}, marks=pytest.mark.slow),
    {'entropy': True, 'largest': 14, 'projected': 7},
  ],
)
def test_cdan_reverses_what_a_conditioned_discriminator_learns(form):
  net, batches = plain_net(), batches_of(8, 4)
  judge = Player(mlp(hidden=(4,)), sgd(rate(0.3), momentum=0.0))
  method = made('cdan', net, judge=judge, weight=0.5, **form)
  state = jax.jit(method.init)(jax.random.key(0), batches)
  width = 7 if form else 5 * CLASSES
  assert state.params['discriminator']['fc1']['kernel'].shape == (width, 4)
  assert set(state.memory) == ({'projections'} if form else set())

  def domain(params, fixed):
    """Its loss, with constant predictions from `fixed`."""

    def of(name, label):
      images = batches[name]['image']
      features = forward(net, params['net'], {}, images, train=True)[0]['features']
      p = jax.nn.softmax(forward(net, fixed, {}, images, train=True)[0]['logits'])
      if form:
        drawn = state.memory['projections']
        read = (features @ drawn['features']) * (p @ drawn['predictions']) / np.sqrt(7)
        w = 1 + jnp.exp((p * jnp.log(p)).sum(1))
      else:
        read = jnp.einsum('bd,bc->bdc', features, p).reshape(len(p), -1)
        w = jnp.ones(len(p))
      d = jax.nn.sigmoid(judge.net.apply({'params': params['discriminator']}, read))
      return -(w * jnp.log(d if label else 1 - d)).sum() / w.sum()

    return of('train', 0) + of('target', 1)

  def supervised(params):
    logits = forward(net, params, {}, batches['train']['image'], train=True)[0][
      'logits'
    ]
    p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(p, batches['train']['label'][:, None], 1).mean()

  @jax.jit
  def by_hand(params):
    return jax.value_and_grad(domain)(params, params['net']), jax.grad(supervised)(
      params['net']
    )

  (value, grads), of_labels = by_hand(state.params)
  after, metrics = jax.jit(method.step)(state, batches)
  close(metrics['domain_loss'][0], value)
  assert metrics['domain_accuracy'][1] == 12
  close(after.memory, state.memory)
  for player, expected in (
    ('net', jax.tree.map(lambda a, b: 0.1 * (a - 0.5 * b), of_labels, grads['net'])),
    ('discriminator', jax.tree.map(lambda g: 0.3 * g, grads['discriminator'])),
  ):
    moved = jax.tree.map(jnp.subtract, state.params[player], after.params[player])
    close(moved, expected)


def test_mcd_is_its_three_updates():
  """With momentum, which would also move players that must not move."""
  net, batches = plain_net(), batches_of(8, 4)
  label = batches['train']['label'][:, None]
  method = made('mcd', net, inner_steps=2)
  state = jax.jit(method.init)(jax.random.key(0), batches)
  first = jax.device_get(state.params)
  parts = {'trunk': first['net']['trunk'], 'one': first['net']['head']}
  parts['two'] = first['second_head']
  buffers = jax.tree.map(np.zeros_like, parts)

  def logits(parts, name):
    images = batches[name]['image']
    return [
      forward(
        net, {'trunk': parts['trunk'], 'head': parts[head]}, {}, images, train=True
      )
      for head in ('one', 'two')
    ]

  @jax.jit
  def learned(parts):
    outputs = [outputs['logits'] for outputs, _ in logits(parts, 'train')]
    chosen = [jnp.take_along_axis(jax.nn.log_softmax(z), label, 1) for z in outputs]
    return -sum(x.mean() for x in chosen)

  @jax.jit
  def apart(parts):
    one, two = (jax.nn.softmax(z['logits']) for z, _ in logits(parts, 'target'))
    return jnp.abs(one - two).sum(1).mean() / CLASSES

  grad = {f: jax.jit(jax.grad(f)) for f in (learned, apart)}
  loss = learned(parts) / 2

  def move(names, grads):
    for name in names:
      old, g = buffers[name], grads[name]
      buffers[name] = jax.tree.map(lambda b, g: 0.9 * b + g, old, g)
      parts[name] = jax.tree.map(lambda p, b: p - 0.1 * b, parts[name], buffers[name])

  move(parts, grad[learned](parts))
  before = apart(parts)
  a, b = grad[learned](parts), grad[apart](parts)
  move(('one', 'two'), jax.tree.map(jnp.subtract, a, b))
  for _ in range(2):
    move(('trunk',), grad[apart](parts))

  after, metrics = jax.jit(method.step)(state, batches)
  expected = {'trunk': parts['trunk'], 'head': parts['one']}
  close(after.params, {'net': expected, 'second_head': parts['two']})
  close(metrics['loss'][0], loss)
  close(metrics['discrepancy'][0], before)
  trace = after.opt['net'].inner_state.trace
  close(trace, {'trunk': buffers['trunk'], 'head': buffers['one']})
  assert int(after.step) == 1


def test_adda_fools_the_discriminator_that_has_just_learned():
  net, batches = plain_net(), batches_of(8, 4)
  judge = Player(mlp(hidden=(4,)), sgd(rate(0.3), momentum=0.0))
  frozen = sgd(rate(0.1), learning_rate_scale=(('net/head/.*', 0.0), ('.*', 1.0)))

  def step_of(**options):
    method = made('adda', net, judge=judge, optimizer=frozen, **options)
    return method.init, jax.jit(method.step)

  init, _ = step_of()
  state = jax.jit(init)(jax.random.key(0), batches)

  def features(params, name):
    images = batches[name]['image']
    return forward(net, params, {}, images, train=False)[0]['features']

  @jax.jit
  def by_hand(params):
    source = features(params['source_net'], 'train')

    def target_probability(judge_params, own):
      z = judge.net.apply({'params': judge_params}, features(own, 'target'))
      return jax.nn.sigmoid(z)

    def judged(judge_params):
      of_source = jax.nn.sigmoid(judge.net.apply({'params': judge_params}, source))
      of_target = target_probability(judge_params, params['net'])
      right = (of_source < 0.5).sum() + (of_target > 0.5).sum()
      loss = -jnp.log(1 - of_source).mean() - jnp.log(of_target).mean()
      return loss, right

    (domain, right), grads = jax.value_and_grad(judged, has_aux=True)(
      params['discriminator']
    )
    new = jax.tree.map(lambda p, g: p - 0.3 * g, params['discriminator'], grads)
    fooled, grads = jax.value_and_grad(
      lambda own: -jnp.log(1 - target_probability(new, own)).mean()
    )(params['net'])
    trunk = jax.tree.map(
      lambda p, g: p - 0.1 * g, params['net']['trunk'], grads['trunk']
    )
    return new, trunk, domain, fooled, right

  new, trunk, domain, fooled, right = by_hand(state.params)
  share = float(right) / 12
  _, step = step_of(threshold=share - 0.01)
  after, metrics = step(state, batches)
  assert metrics['moved'] == (1, 1)
  close(after.params['discriminator'], new)
  close(after.params['net'], {'trunk': trunk, 'head': state.params['net']['head']})
  close(after.params['source_net'], state.params['source_net'], rtol=0, atol=0)
  close(metrics['domain_loss'][0], domain)
  close(metrics['loss'][0], fooled)
  assert metrics['domain_accuracy'] == (right, 12)
  _, step = step_of(threshold=share)  # at the threshold itself it does not move
  now, metrics = step(state, batches)
  assert metrics['moved'] == (0, 1)
  close(now.params['net'], state.params['net'], atol=1e-7)
  close(now.opt['net'], state.opt['net'], atol=1e-7)
  close(now.params['discriminator'], new)


DESCENDS = {
  'dann': {'weight': 0.1},
  'cdan': {'weight': 0.1, 'entropy': True},
  'mcd': {'inner_steps': 1, 'optimizer': adam(rate(0.005))},
  'adda': {
    'judge': Player(mlp(hidden=(4,)), sgd(rate(0.0))),
    'optimizer': adam(rate(0.002)),
  },
}
"""Method -> options with which its loss falls; for ADDA the discriminator waits."""


@pytest.mark.parametrize(
  'name',
  [pytest.param(n, marks=[pytest.mark.slow] * (n != 'mcd')) for n in DESCENDS],
)
def test_it_descends_and_is_traced_once(name):
  batches, traces = batches_of(), []
  net = Classifier(DigitsNet((Convolution(8),), (32,)), linear(CLASSES))
  method = made(name, net, **DESCENDS[name])

  @jax.jit
  def step(state, batches):
    traces.append(1)
    return method.step(state, batches)

  state, losses = jax.jit(method.init)(jax.random.key(0), batches), []
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  for _ in range(60):
    state, metrics = step(state, batches)
    losses.append(float(metrics['loss'][0]))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
  assert len(traces) == 1 and np.isfinite(losses).all()
  assert losses[-1] < 0.5 * losses[0]
  if name != 'adda':  # it overfits; ADDA reads no labels
    outputs = method.predict(state, batches['train']['image'])
    assert (outputs['logits'].argmax(-1) == batches['train']['label']).all()


@pytest.mark.parametrize(
  ('name', 'given', 'message'),
  [
    ('aligned', {'statistics': 'seperate'}, "statistics 'seperate'; did you mean"),
    ('dann', {'statistics': 'seperate'}, "statistics 'seperate'; did you mean"),
    ('dann', {'align_on': ()}, 'dann needs alignment.align_on'),
    ('adda', {'align_on': ()}, 'adda needs alignment.align_on'),
    ('mcd', {'inner_steps': 0}, 'inner_steps is 0; it must be at least 1'),
    ('aligned', {'lambda': 1.0}, "method 'aligned' has no option 'lambda'"),
  ],
)
def test_mistakes_are_reported_when_it_is_built(name, given, message):
  with pytest.raises(UserError, match=message):
    made(name, plain_net(), **given)


def test_a_missing_layer_is_reported():
  method = made('dann', normalised_net(), align_on=('conv',))
  with pytest.raises(UserError, match="network 'conv'; known: features, logits"):
    jax.eval_shape(method.init, jax.random.key(0), batches_of())


def test_dann_needs_its_player():
  dann = functools.partial(
    METHODS['dann'], align_on=('conv',), players={}, streams=('target',)
  )
  with pytest.raises(UserError, match='discriminator'):
    dann(None, None, objective=None, alignment_weight=None)


# Devices and replicas.

TWO_PLAYERS = {'weight': {'name': 'dann'}, 'align_on': ('features',)}


@functools.cache
def two_steps(devices, statistics='', groups=1, name='dann', **options):
  """Returns (parameters after two steps on some devices, the program's text)."""
  net = normalised_net(groups=groups)
  if statistics:
    options['statistics'] = statistics
  method = made(name, net, **options, **TWO_PLAYERS)
  mesh = sharding.make_mesh(devices)
  batches = batches_of(16, 8)
  state = jax.jit(method.init)(jax.random.key(0), batches)
  state = sharding.put_replicated(mesh, state)
  state = state.replace(step=sharding.put_replicated(mesh, jnp.int32(10)))
  batches = sharding.put_batch(mesh, jax.tree.map(np.asarray, batches), leading=0)
  step = jax.jit(method.step).lower(state, batches).compile()
  for _ in range(2):
    state, _ = step(state, batches)
  return jax.device_get(state.params), step.as_text()


@pytest.mark.parametrize(
  'statistics',
  [
    pytest.param(name, marks=() if name == 'joint' else pytest.mark.slow)
    for name in STATISTICS
  ],
)
def test_eight_devices_are_one(statistics):
  one, many = (two_steps(devices, statistics)[0] for devices in (1, 8))
  close(many, one, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize('devices', [pytest.param(2, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize(
  ('name', 'options'),
  [
    pytest.param('cdan', {'entropy': True, 'largest': 8}, marks=pytest.mark.slow),
    pytest.param('mcd', {'inner_steps': 1}, marks=pytest.mark.slow),
    pytest.param('adda', {'threshold': 0.01}, marks=pytest.mark.slow),
  ],
)
def test_many_devices_are_one_by_any_method(name, options, devices):
  one, many = (two_steps(n, name=name, **options)[0] for n in (1, devices))
  close(many, one, rtol=2e-3, atol=2e-5)


def test_no_image_moves_from_one_device_to_another():
  """Each device normalises its own share of both domains; only sums are exchanged."""
  _, text = two_steps(8, 'joint', groups=8)
  assert 'all-reduce' in text
  assert not re.findall(r'all-gather|all-to-all|collective-permute', text)


@pytest.mark.slow
def test_replicas_are_single_runs():
  method = made('dann', plain_net(), **TWO_PLAYERS)
  batches, keys = batches_of(), jax.random.split(jax.random.key(1), 2)
  both = vectorise(method, 2, sharding.make_mesh(1))
  stacked = jax.tree.map(lambda x: jnp.stack([x, x]), batches)
  init, step = jax.jit(method.init), jax.jit(method.step)
  state, _ = jax.jit(both.step)(jax.jit(both.init)(keys, stacked), stacked)
  for replica in range(2):
    single, _ = step(init(keys[replica], batches), batches)
    own = jax.tree.map(lambda x, i=replica: x[i], state.params)
    close(own, single.params)


# Learning.


class Plane(nn.Module):
  """A network for points in a plane, given as images of 1 x 1 pixels."""

  @nn.compact
  def __call__(self, images, *, train):
    x = nn.relu(nn.Dense(15)(images[:, 0, 0]))
    x = nn.relu(nn.Dense(15, name='features')(x))
    return {'features': x, 'logits': nn.Dense(CLASSES)(x)}


@pytest.mark.slow
def test_dann_crosses_from_moons_to_turned_moons():
  """The paper's toy problem: two half moons, and the same rotated by 35 degrees."""
  points, label = make_moons(300, noise=0.1, random_state=0)
  points -= points.mean(0)
  angle = np.deg2rad(35)
  turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
  source, target = (
    jnp.asarray(x[:, None, None], jnp.float32) for x in (points, points @ turn.T)
  )
  batches = {
    'train': {'image': source, 'label': jnp.asarray(label, jnp.int32)},
    'target': {'image': target},
  }

  def accuracy(name, **options):
    method = made(name, Plane(), **options)

    def run(key):
      state = jax.lax.fori_loop(
        0,
        1000,
        lambda _, state: method.step(state, batches)[0],
        method.init(key, batches),
      )
      return (method.predict(state, target)['logits'].argmax(-1) == label).mean()

    return jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(3), 6)).mean()

  judge = Player(mlp(hidden=(20,)), adam(rate(0.01)))
  assert accuracy('dann', judge=judge) > accuracy('supervised') + 0.1
