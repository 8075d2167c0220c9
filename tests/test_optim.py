"""Optimisers against NumPy loops, rules for parameters, schedules by epoch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax.errors import UserError
from lt_jax.optim import OPTIMIZERS, adam, make_optimizer, per_parameter, sgd
from lt_jax.schedules import epoch_start, make_schedule

STEPS = 6
DECAY = (('net/head/bias', 0.0), ('.*', 0.1))
SCALE = (('net/trunk/.*', 0.1), ('.*', 1.0))


def rate(step):
  """A learning rate that drops at step 3."""
  return jnp.where(step >= 3, 0.02, 0.2).astype(jnp.float32)


def toy_params(dtype=np.float32):
  rng = np.random.default_rng(0)
  return {
    'net': {
      'head': {
        'bias': rng.normal(size=3).astype(dtype),
        'kernel': rng.normal(size=(2, 3)).astype(dtype),
      },
      'trunk': {'kernel': rng.normal(size=(2, 2)).astype(dtype)},
    }
  }


def toy_grads(params, step):
  """The gradient of a perturbed quadratic, which depends on the parameters."""
  return jax.tree.map(lambda p: 0.5 * p + jnp.cos(step + p.size), params)


def train(optimizer, params, start=0):
  params = jax.tree.map(jnp.asarray, params)
  opt_state = optimizer.init(params)

  @jax.jit
  def update(params, opt_state, step):
    return optimizer.update(toy_grads(params, step), opt_state, params, step)

  for step in range(start, start + STEPS):
    params, opt_state = update(params, opt_state, jnp.int32(step))
  return params, opt_state


def assert_trees_close(tree, expected, **tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance), tree, expected
  )


def reference(params, direction, decoupled):
  """Trains each parameter separately; `direction(g, memory, t)` is PyTorch's update."""
  decays = {'bias': 0.0, 'head': 0.1, 'trunk': 0.1}
  scales = {'bias': 1.0, 'head': 1.0, 'trunk': 0.1}

  def one(kind, p):
    p = p.astype(np.float64)
    memory = {}
    for step in range(STEPS):
      eta = 0.02 if step >= 3 else 0.2
      g = 0.5 * p + np.cos(step + p.size)
      if decoupled:
        shrunk = p * (1 - eta * scales[kind] * decays[kind])
        p = shrunk - eta * scales[kind] * direction(g, memory, step + 1)
      else:
        p = p - eta * scales[kind] * direction(g + decays[kind] * p, memory, step + 1)
    return p

  head = params['net']['head']
  return {
    'net': {
      'head': {
        'bias': one('bias', head['bias']),
        'kernel': one('head', head['kernel']),
      },
      'trunk': {'kernel': one('trunk', params['net']['trunk']['kernel'])},
    }
  }


@pytest.mark.parametrize('decoupled', [False, True])
@pytest.mark.parametrize(
  'momentum, nesterov', [(0.9, False), (0.9, True), (0.0, False)]
)
def test_sgd_is_torchs(momentum, nesterov, decoupled):
  def direction(d, memory, t):
    del t
    memory['b'] = momentum * memory['b'] + d if memory else d
    return d + momentum * memory['b'] if nesterov else memory['b']

  optimizer = sgd(
    rate,
    momentum=momentum,
    nesterov=nesterov,
    weight_decay=DECAY,
    decoupled=decoupled,
    learning_rate_scale=SCALE,
  )
  params, _ = train(optimizer, toy_params())
  expected = reference(toy_params(), direction, decoupled)
  assert_trees_close(params, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('decoupled', [False, True])
def test_adam(decoupled):
  def direction(d, memory, t):
    memory['m'] = 0.8 * memory.get('m', 0) + 0.2 * d
    memory['v'] = 0.95 * memory.get('v', 0) + 0.05 * d**2
    root = np.sqrt(memory['v'] / (1 - 0.95**t))
    return memory['m'] / (1 - 0.8**t) / (root + 1e-3)

  optimizer = adam(
    rate,
    b1=0.8,
    b2=0.95,
    eps=1e-3,
    weight_decay=DECAY,
    decoupled=decoupled,
    learning_rate_scale=SCALE,
  )
  params, _ = train(optimizer, toy_params())
  expected = reference(toy_params(), direction, decoupled)
  assert_trees_close(params, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_the_step_is_the_only_clock(name):
  """After updates without gradients the state is as good as fresh."""
  optimizer = make_optimizer(name, rate)
  params = toy_params()
  fresh = used = optimizer.init(params)
  for step in (0, 1, 9):
    zeros = jax.tree.map(np.zeros_like, params)
    _, used = optimizer.update(zeros, used, params, step)
  grads = toy_grads(params, 0)
  from_fresh, _ = optimizer.update(grads, fresh, params, 2)
  from_used, _ = optimizer.update(grads, used, params, 2)
  assert_trees_close(from_used, from_fresh, rtol=0)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_zero_scale_freezes(name):
  optimizer = make_optimizer(
    name,
    rate,
    weight_decay=(('.*', 0.1),),
    learning_rate_scale=(('net/trunk/.*', 0.0), ('.*', 1.0)),
  )
  params = toy_params()
  opt_state = optimizer.init(params)
  assert not any(leaf.shape == (2, 2) for leaf in jax.tree.leaves(opt_state))
  grads = toy_grads(params, 0)
  grads['net']['trunk']['kernel'] *= np.nan
  moved, new_state = optimizer.update(grads, opt_state, params, 0)
  frozen = params['net']['trunk']['kernel']
  np.testing.assert_array_equal(moved['net']['trunk']['kernel'], frozen)
  assert (moved['net']['head']['bias'] != params['net']['head']['bias']).all()
  assert jax.tree.structure(new_state) == jax.tree.structure(opt_state)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_dtypes_are_kept(name):
  optimizer = make_optimizer(name, make_schedule('constant', 0.1, length=1, batch=1))
  params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), toy_params())
  moved, opt_state = optimizer.update(params, optimizer.init(params), params, 0)
  assert all(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(moved))
  again, _ = optimizer.update(params, opt_state, moved, 1)
  assert jax.tree.structure(again) == jax.tree.structure(params)
  with jax.enable_x64(True):
    params = toy_params(np.float64)
    moved, _ = optimizer.update(params, optimizer.init(params), params, 0)
    assert all(p.dtype == jnp.float64 for p in jax.tree.leaves(moved))


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_update_is_differentiable_in_the_gradient(name):
  """Meta-gradients pass through an update, even where a gradient is zero."""
  optimizer = make_optimizer(name, rate)
  params = {'w': jnp.ones(2)}
  opt_state = optimizer.init(params)

  def moved(g):
    return optimizer.update({'w': g}, opt_state, params, 0)[0]['w'].sum()

  slopes = jax.grad(moved)(jnp.array([0.5, 0.0]))
  assert np.isfinite(slopes).all()


def test_learning_rate_is_given_back():
  assert sgd(rate).learning_rate is rate


def test_per_parameter_first_full_match_wins():
  values = per_parameter(
    (('net/head/bias', 0), ('.*kernel', 2), ('net/.*', 3)),
    {'net': {'head': {'bias': 0, 'kernel': 0}, 'kernel': {'scale': 0}}},
  )
  assert values == {
    'net': {'head': {'bias': 0.0, 'kernel': 2.0}, 'kernel': {'scale': 3.0}}
  }


@pytest.mark.parametrize(
  'rules, message',
  [
    ((('net/head/.*', 1.0),), "no rule covers 'net/trunk/kernel'"),
    ((('head/bias', 0.0), ('.*', 1.0)), "'head/bias' matches no parameter"),
    ((('.*', 1.0), ('net/head/bias', 0.0)), "'net/head/bias' matches no parameter"),
    ((('net/(head', 1.0), ('.*', 1.0)), r"'net/\(head' is not a regular expression"),
    ((), 'no rule covers'),
  ],
)
def test_bad_rules(rules, message):
  with pytest.raises(UserError, match=message) as error:
    per_parameter(rules, toy_params())
  assert '\n' not in str(error.value)
  for key in ('weight_decay', 'learning_rate_scale'):
    with pytest.raises(UserError, match=message):
      sgd(rate, **{key: rules}).init(toy_params())


def test_many_bare_parameters_make_a_short_line():
  with pytest.raises(UserError, match="'p0', 'p1', 'p2' and 6 more"):
    per_parameter((), {f'p{i}': 0 for i in range(9)})


LENGTH, BATCH = 12406, 128
EPOCHS = {'length': LENGTH, 'batch': BATCH}
LONG_TAIL = {**EPOCHS, 'boundaries': (160, 180), 'factors': (1e-2, 1e-4)}


@pytest.mark.parametrize(
  'epoch, length, batch, step',
  [
    (0, LENGTH, BATCH, 0),
    (1, LENGTH, BATCH, 97),
    (160, LENGTH, BATCH, 15508),
    (3, 96, 32, 9),
    (5, 1, 3, 2),
    (0.1, 100, 10, 1),
    (160.0, 30, 3, 1600),
    (7, 1, 1, 7),
  ],
)
def test_epoch_start(epoch, length, batch, step):
  assert epoch_start(epoch, length, batch) == step
  assert isinstance(epoch_start(epoch, length, batch), int)


def first_and_last_step(epoch):
  """The steps whose first example is in this 0-based epoch, by counting."""
  first = -(-epoch * LENGTH // BATCH)
  last = -(-(epoch + 1) * LENGTH // BATCH) - 1
  return [first, last]


@pytest.mark.parametrize(
  'epoch, expected',
  [
    (0, 0.02),
    (1, 0.04),
    (4, 0.1),
    (5, 0.1),
    (159, 0.1),
    (160, 1e-3),
    (179, 1e-3),
    (180, 1e-5),
    (199, 1e-5),
  ],
)
def test_cao(epoch, expected):
  learning_rate = make_schedule(
    'step_decay', 0.1, warmup='staircase', warmup_epochs=5, **LONG_TAIL
  )
  for step in first_and_last_step(epoch):
    value = jax.jit(learning_rate)(jnp.int32(step))
    assert value.dtype == jnp.float32
    assert value.shape == ()
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize('epoch', [0, 4, 5, 159, 160, 179, 180])
def test_cui(epoch):
  learning_rate = make_schedule('step_decay', 0.1, warmup_epochs=5, **LONG_TAIL)
  for step in first_and_last_step(epoch):
    position = step * BATCH / LENGTH
    expected = 0.1 * position / 5 if epoch < 5 else 0.1
    expected *= 1 if epoch < 160 else 1e-2 if epoch < 180 else 1e-4
    value = learning_rate(jnp.int32(step))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_cosine():
  learning_rate = make_schedule('cosine', 0.4, end=10, **EPOCHS)
  steps = np.array([0, 97, 500, 969, 970, 5000])
  position = np.minimum(steps * BATCH / LENGTH / 10, 1)
  expected = [0.2 * (1 + math.cos(math.pi * r)) for r in position]
  values = learning_rate(jnp.asarray(steps, jnp.int32))
  assert values.dtype == jnp.float32
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-7)


def test_cosine_after_a_warm_up():
  learning_rate = make_schedule(
    'cosine', 1.0, length=1, batch=1, warmup_epochs=4, begin=4, end=12
  )
  values = learning_rate(jnp.arange(13))
  np.testing.assert_allclose(values[:5], [0, 0.25, 0.5, 0.75, 1], rtol=1e-6)
  np.testing.assert_allclose(values[8], 0.5, rtol=1e-6)
  np.testing.assert_allclose(values[12], 0, atol=1e-7)


def test_dann_is_the_table_of_its_formula():
  learning_rate = make_schedule('dann', 0.01, length=1000, batch=10, end=20)
  values = learning_rate(jnp.asarray([0, 1000, 2000, 9000], jnp.int32))
  last = 0.01 * 11**-0.75
  np.testing.assert_allclose(values, [0.01, 0.01 * 6**-0.75, last, last], rtol=1e-5)
  np.testing.assert_allclose(values[1:3], [0.00261, 0.00166], atol=5e-6)
  # Others count steps: this is the same for a training of 10,000 steps.
  by_step = make_schedule('dann', 0.01, length=1, batch=1, end=10_000)
  expected = 0.01 * (1 + 0.001 * np.array([0, 1, 77, 5000, 10_000])) ** -0.75
  steps = jnp.asarray([0, 1, 77, 5000, 10_000], jnp.int32)
  np.testing.assert_allclose(by_step(steps), expected, rtol=1e-5)


def test_poly_ends_at_its_end():
  """ADVENT's, which stops at 120,000 of 250,000 steps, and one that reaches zero."""
  learning_rate = make_schedule('poly', 2.5e-4, length=1, batch=1, end=250_000)
  steps = jnp.asarray([0, 60_000, 120_000, 250_000, 300_000], jnp.int32)
  expected = 2.5e-4 * np.maximum(0, 1 - np.asarray(steps) / 250_000) ** 0.9
  np.testing.assert_allclose(learning_rate(steps), expected, rtol=1e-5)
  np.testing.assert_allclose(learning_rate(steps[2]), 1.39e-4, rtol=1e-2)
  by_epoch = make_schedule('poly', 1.0, length=100, batch=10, end=2, power=2.0)
  np.testing.assert_allclose(by_epoch(jnp.int32(5)), 0.75**2, rtol=1e-6)


@pytest.mark.parametrize('x64', [False, True])
@pytest.mark.parametrize(
  'name, options',
  [
    ('constant', {}),
    ('step_decay', {'boundaries': (), 'factors': ()}),
    ('step_decay', {'boundaries': (2,), 'factors': (0.5,)}),
    ('cosine', {'end': 3}),
    ('dann', {'end': 3}),
    ('poly', {'end': 3}),
  ],
)
def test_schedules_are_float32_of_the_shape_of_the_step(name, options, x64):
  with jax.enable_x64(x64):
    for warmup in ('linear', 'staircase'):
      for epochs in (0, 1):
        learning_rate = make_schedule(
          name, 0.1, length=2, batch=1, warmup=warmup, warmup_epochs=epochs, **options
        )
        for step in (jnp.int32(2), jnp.arange(3, dtype=jnp.int32)):
          value = learning_rate(step)
          assert (value.dtype, value.shape) == (jnp.float32, step.shape)
        np.testing.assert_allclose(learning_rate(2), value[2], rtol=1e-6)


def test_no_warm_up_starts_at_the_base():
  for name, options in {'constant': {}, 'cosine': {'end': 3}}.items():
    learning_rate = make_schedule(name, 0.3, **EPOCHS, **options)
    np.testing.assert_allclose(learning_rate(jnp.int32(0)), 0.3, rtol=1e-6)


@pytest.mark.parametrize(
  'name, options, message',
  [
    ('cosin', {}, "unknown schedule 'cosin'; did you mean 'cosine'"),
    ('cosine', {}, "'cosine' needs the option 'end'"),
    ('cosine', {'end': 3, 'bgin': 1}, "no option 'bgin'; did you mean 'begin'"),
    ('cosine', {'end': 3, 'begin': 3}, 'end 3 and begin 3'),
    ('dann', {'end': 0}, 'end 0 and alpha 10'),
    ('poly', {'end': 3, 'power': 0}, 'end > 0 and power > 0, got 3 and 0'),
    ('step_decay', {'boundaries': (3, 2), 'factors': (1, 1)}, 'increasing'),
    ('step_decay', {'boundaries': (3,), 'factors': (1, 1)}, '1 boundaries and 2'),
    ('constant', {'warmup': 'linaer'}, "unknown warm-up 'linaer'; did you mean"),
    ('constant', {'warmup': 'staircase', 'warmup_epochs': 1.5}, 'whole epochs'),
    ('constant', {'warmup_epochs': -1}, 'warmup_epochs'),
  ],
)
def test_bad_schedules(name, options, message):
  with pytest.raises(UserError, match=message):
    make_schedule(name, 0.1, length=5, batch=2, **options)


def test_bad_optimizers():
  with pytest.raises(UserError, match="unknown optimizer 'adm'; did you mean 'adam'"):
    make_optimizer('adm', rate)
  with pytest.raises(UserError, match="'momentun'; did you mean 'momentum'"):
    make_optimizer('sgd', rate, momentun=0.9)
