"""Self-supervised tasks: what they do to images, and who learns from them how."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax import sharding
from lt_jax.errors import UserError
from lt_jax.method import Player, forward, named_key
from lt_jax.methods.self_supervised import ORDERS, TASKS, changed
from lt_jax.models.heads import linear
from lt_jax.optim import sgd
from tests.test_adaptation import (
  batches_of,
  close,
  made,
  normalised_net,
  plain_net,
  rate,
)


def head(labels, base=0.3):
  return Player(linear(labels), sgd(rate(base), momentum=0.0))


# What is done to images.

SHOWN = {
  'rotation': [np.asarray, lambda x: np.rot90(x), lambda x: np.rot90(x, 2), None],
  'digit_rotation': [np.asarray, lambda x: x.transpose(1, 0, 2), np.fliplr, None],
  'flip': [np.asarray, np.flipud],
}
for turned in ('rotation', 'digit_rotation'):
  SHOWN[turned][3] = lambda x: np.rot90(x, 3)


@pytest.mark.parametrize('task', SHOWN)
def test_a_label_says_what_is_done_to_an_image(task, rng):
  images = rng.normal(size=(8, 6, 6, 2)).astype(np.float32)
  labels = np.arange(8) % len(SHOWN[task])
  expected = [SHOWN[task][z](x) for x, z in zip(images, labels, strict=True)]
  np.testing.assert_array_equal(changed(task, images, labels), expected)
  assert len(TASKS[task]) == len(SHOWN[task])


@pytest.mark.parametrize('side', [6, 7])
def test_a_location_is_a_quarter_at_full_size(side, rng):
  images = np.repeat(rng.normal(size=(1, side, side, 1)).astype(np.float32), 4, 0)
  shown = np.asarray(changed('location', images, np.arange(4)))[..., 0]
  image, half = images[0, ..., 0], side // 2
  parts = {0: slice(None, half), 1: slice(side - half, None)}
  for label in range(4):
    quarter = image[parts[label // 2]][:, parts[label % 2]]
    assert shown[label].shape == (side, side)
    assert set(np.unique(shown[label])) == set(np.unique(quarter))
    if side == 6:
      doubled = quarter.repeat(2, 0).repeat(2, 1)
      np.testing.assert_array_equal(shown[label], doubled)


def test_no_label_of_a_digit_is_half_a_turn(rng):
  """Which makes a 6 of a 9, and leaves what is alike on both sides, such as a 0."""
  image = rng.normal(size=(6, 6, 1)).astype(np.float32)
  alike = image + np.rot90(image, 2)
  four, labels = np.stack([alike] * 4), np.arange(4)

  def different(task):
    return len(np.unique(changed(task, four, labels).reshape(4, -1), axis=0))

  assert different('rotation') == 2 and different('digit_rotation') == 4
  digits = np.asarray(changed('digit_rotation', np.stack([image] * 4), labels))
  assert not any(np.array_equal(digit, np.rot90(image, 2)) for digit in digits)


def test_only_square_images_are_turned():
  with pytest.raises(UserError, match='images of 4 x 6 pixels change shape'):
    changed('rotation', np.zeros((1, 4, 6, 1)), np.zeros(1, int))


# What a step does.


def log_p(logits, labels):
  chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
  return chosen.mean()


def expected_step(net, state, batches, tasks, order, weight):
  """The parameters after a step, written out from the formula."""
  images = [batches[name]['image'] for name in ('train', 'target')]

  def loss(params, name):
    if name == 'source':
      outputs, _ = forward(net, params['net'], {}, images[0], train=True)
      return -log_p(outputs['logits'], batches['train']['label'])
    keys = jax.random.split(named_key(state.key, name, state.step))
    total = 0
    for key, x in zip(keys, images, strict=True):
      z = jax.random.randint(key, (len(x),), 0, tasks[name])
      outputs, _ = forward(net, params['net'], {}, changed(name, x, z), train=True)
      own = params[name]
      total -= log_p(outputs['conv'] @ own['kernel'] + own['bias'][None], z)
    return weight * total / 2

  def descend(params, names):
    grads = jax.grad(lambda p: sum(loss(p, name) for name in names))(params)
    rates = {name: 0.1 if name == 'net' else 0.3 for name in params}
    return {
      name: jax.tree.map(lambda p, g, r=rates[name]: p - r * g, params[name], g)
      for name, g in grads.items()
    }

  names = [*tasks, 'source']
  params = state.params
  for group in [names] if order == 'summed' else [[name] for name in names]:
    params = descend(params, group)
  return params


@pytest.mark.parametrize(
  'order',
  [
    pytest.param(order, marks=pytest.mark.slow if order == 'summed' else ())
    for order in ORDERS
  ],
)
def test_a_step_is_the_formula(order):
  net, batches, tasks = plain_net(), batches_of(8, 4), {'flip': 2}
  method = made(
    'self_supervised',
    net,
    weight=0.5,
    align_on=('conv',),
    players={name: head(labels) for name, labels in tasks.items()},
    optimizer=sgd(rate(0.1), momentum=0.0),
    order=order,
  )
  state = jax.jit(method.init)(jax.random.key(0), batches)
  state = state.replace(step=jnp.int32(3))  # of whose labels the key is
  after, metrics = jax.jit(method.step)(state, batches)
  expected = jax.jit(
    functools.partial(expected_step, net, tasks=tasks, order=order, weight=0.5)
  )(state, batches)
  close(after.params, expected, atol=1e-6)
  assert int(after.step) == 4
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert {'loss', 'accuracy', 'flip_loss'} <= metrics.keys()
  assert metrics['flip_accuracy'][1] == 12


@functools.cache
def two_steps(devices):
  """Parameters and statistics after two steps of a normalised network."""
  method = made(
    'self_supervised',
    normalised_net(),
    players={'flip': head(2)},
    statistics='domain_specific',
  )
  mesh, batches = sharding.make_mesh(devices), batches_of(16, 8)
  state = jax.jit(method.init)(jax.random.key(0), batches)
  state = sharding.put_replicated(mesh, state)
  batches = sharding.put_batch(mesh, jax.tree.map(np.asarray, batches), leading=0)
  traces = []

  @jax.jit
  def step(state, batches):
    traces.append(1)
    return method.step(state, batches)[0]

  for _ in range(2):
    state = step(state, batches)
  assert len(traces) == 1
  return jax.device_get((state.params, state.stats))


@pytest.mark.slow
def test_eight_devices_are_one():
  close(two_steps(8), two_steps(1), rtol=2e-3, atol=2e-5)


def test_the_sources_loss_moves_the_sources_statistics():
  _, stats = two_steps(1)
  assert set(stats) == {'net', 'net_source'}
  difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), *stats.values())
  assert max(jax.tree.leaves(difference)) > 1e-3


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'players': {}}, 'needs a head for each of its tasks'),
    ({'players': {'rotaton': head(4)}}, "'rotaton'; did you mean"),
    ({'order': 'sumed'}, "order of updates 'sumed'; did you mean 'summed'"),
    ({'align_on': ()}, 'self_supervised needs alignment.align_on'),
    ({'statistics': 'none'}, 'unknown kind of batch statistics'),
  ],
)
def test_mistakes_are_reported_when_it_is_built(given, message):
  with pytest.raises(UserError, match=message):
    made('self_supervised', plain_net(), **{'players': {'flip': head(2)}} | given)


def test_a_head_of_another_size_is_reported():
  method = made('self_supervised', plain_net(), players={'rotation': head(2)})
  state = jax.eval_shape(method.init, jax.random.key(0), batches_of())
  with pytest.raises(UserError, match='players.rotation has 2 outputs.* has 4 labels'):
    jax.eval_shape(method.step, state, batches_of())
