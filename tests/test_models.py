"""Networks compared with NumPy and published sizes, and in both autodiff modes."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lt_jax.errors import UserError
from lt_jax.method import forward
from lt_jax.models import HEADS, TRUNKS, make_classifier
from lt_jax.models.convolution import Conv, conv, glorot
from lt_jax.models.heads import cosine, cosine_squash, linear, log_prior_bias
from lt_jax.models.normalisation import BatchNorm
from lt_jax.models.trunks import SHORTCUTS, BasicBlock, cifar_resnet
from lt_jax.sharding import compiler_options

IMAGES = (8, 8, 8, 3)


def small(head='linear', **options):
  return make_classifier('tiny_cnn', head, 5, trunk_options={'width': 4}, **options)


@pytest.fixture(scope='module')
def images():
  return jnp.asarray(np.random.default_rng(1).normal(size=IMAGES), jnp.float32)


@pytest.fixture(scope='module')
def variables(images):
  return jax.jit(functools.partial(small().init, train=False))(
    jax.random.key(0), images[:1]
  )


def shapes_of(net, image_shape):
  images = jnp.zeros((1, *image_shape))
  return jax.eval_shape(lambda: net.init(jax.random.key(0), images, train=False))


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# Sizes and types.


@pytest.mark.parametrize(
  ('depth', 'published'),
  [
    (8, None),
    (20, '0.27'),
    (32, '0.46'),
    pytest.param(44, '0.66', marks=pytest.mark.slow),
    pytest.param(56, '0.85', marks=pytest.mark.slow),
  ],
)
def test_parameters_of_a_cifar_resnet(depth, published):
  """He et al., table 6, prints the sizes in millions, to two places."""
  net = make_classifier(f'resnet{depth}', 'linear', 10)
  channels = [16] + [16 * 2**s for s in range(3) for _ in range((depth - 2) // 3)]
  kernels = sum(9 * a * b for a, b in zip([3, *channels], channels, strict=False))
  expected = kernels + 2 * sum(channels) + 64 * 10 + 10
  shapes = shapes_of(net, (32, 32, 3))
  assert count(shapes['params']) == expected
  assert count(shapes['batch_stats']) == 2 * sum(channels)
  if published:
    assert f'{expected / 1e6:.2f}' == published


def test_parameters_of_the_papers_resnet32_and_of_the_digits_network():
  resnet = shapes_of(make_classifier('resnet32', 'linear', 10), (32, 32, 3))
  assert count(resnet['params']) == 464_154
  digits = shapes_of(make_classifier('digits_cnn', 'linear', 10), (8, 8, 1))
  assert count(digits['params']) == 9 * 44 + 9 * 44 * 88 + 2 * (44 + 88) + 880 + 10


WIDTHS = {'resnet8': 64, 'digits_cnn': 88, 'tiny_cnn': 24}


@pytest.mark.parametrize(
  ('trunk', 'head'),
  [
    pytest.param(
      *pair, marks=() if {'tiny_cnn', 'linear'} & {*pair} else pytest.mark.slow
    )
    for pair in itertools.product(WIDTHS, HEADS)
  ],
)
@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_outputs_and_parameters_are_float32(trunk, head, dtype):
  described = {'class_vectors': np.eye(5), 'examples': 3}
  net = make_classifier(trunk, head, 5, dtype=dtype, **described)
  variables = shapes_of(net, (8, 8, 3))
  assert set(variables['params']) == {'trunk', 'head'}
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  outputs, updated = jax.eval_shape(
    lambda v: net.apply(v, jnp.zeros(IMAGES), train=True, mutable=['batch_stats']),
    variables,
  )
  assert outputs['logits'].shape == (8, 5)
  assert outputs['features'].shape == (8, WIDTHS[trunk])
  assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype('float32')}
  assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype('float32')}


def test_convolutions_compute_in_bfloat16(variables, images):
  full, half = (
    jax.jit(functools.partial(small(dtype=dtype).apply, train=False))(variables, images)
    for dtype in (None, 'bfloat16')
  )
  full, half = (np.asarray(one['features']) for one in (full, half))
  assert 0 < np.abs(full - half).max() < 0.05
  x = jnp.ones((1, 4, 4, 2))
  found, _ = jax.eval_shape(
    Conv(3, dtype='bfloat16').init_with_output, jax.random.key(0), x
  )
  assert found.dtype == jnp.dtype('bfloat16')


def test_doubles_stay_doubles(variables, images):
  moved = functools.partial(small().apply, train=True, mutable=['batch_stats'])
  moved = jax.jit(moved)
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (variables, images))
    outputs, updated = moved(*wide)
  single, _ = moved(variables, images)
  leaves = jax.tree.leaves((outputs, updated))
  assert {leaf.dtype for leaf in leaves} == {np.dtype('float64')}
  np.testing.assert_allclose(single['logits'], outputs['logits'], atol=1e-5)


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'trunk': 'resnet_32'}, "unknown trunk 'resnet_32'; did you mean 'resnet32'"),
    ({'head': 'cosin'}, "did you mean 'cosine'"),
    ({'trunk_options': {'widht': 4}}, "no option 'widht'; did you mean 'width'"),
    ({'head_options': {'scale': 30.0}}, "head 'linear' has no option 'scale'"),
    ({'trunk_options': {'init': 'xavier'}}, "initialisation 'xavier'"),
  ],
)
def test_wrong_names_are_user_errors(wrong, message):
  given = {'trunk': 'tiny_cnn', 'head': 'linear', 'num_classes': 3} | wrong
  with pytest.raises(UserError, match=message):
    make_classifier(**given)


def test_wrong_depths_and_shortcuts_are_user_errors():
  with pytest.raises(UserError, match='depth 18'):
    cifar_resnet(depth=18)
  with pytest.raises(UserError, match='unknown shortcut'):
    cifar_resnet(depth=20, shortcut='projection')


# Convolution.


@pytest.mark.parametrize('stride', [1, 2])
def test_convolution_is_the_sum_over_its_window(rng, stride):
  x, kernel = rng.normal(size=(2, 6, 5, 3)), rng.normal(size=(3, 3, 3, 4))
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  expected = np.zeros((2, math.ceil(6 / stride), math.ceil(5 / stride), 4))
  for i in range(expected.shape[1]):
    for j in range(expected.shape[2]):
      window = padded[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
      expected[:, i, j] = np.einsum('bhwc,hwcd->bd', window, kernel)
  found = conv(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), stride)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_only_the_cpu_gets_barriers():
  x, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 4))
  traced = jax.jit(conv).trace(x, kernel)
  for platform, barriers in (('cpu', 2), ('tpu', 0), ('cuda', 0)):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count('optimization_barrier') == barriers


def test_compiler_options_change_no_gradient(rng):
  """And this version of XLA accepts them."""
  x = jnp.asarray(rng.normal(size=(4, 8, 8, 8)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(3, 3, 8, 8)), jnp.float32)

  def gradient(x, kernel):
    return jax.grad(lambda k: (conv(x, k) ** 2).sum())(kernel)

  plain = jax.jit(gradient)(x, kernel)
  fast = jax.jit(gradient, compiler_options=compiler_options())(x, kernel)
  np.testing.assert_allclose(fast, plain, rtol=1e-4)


# Batch normalisation.


def batch_norm_by_numpy(x, scale, bias, mean, var):
  return scale * (x - mean) / np.sqrt(var + 1e-5) + bias


@pytest.fixture
def state(rng):
  """Parameters and running averages of a layer of three channels."""

  def draw():
    return jnp.asarray(rng.uniform(0.5, 2.0, 3), jnp.float32)

  return {
    'params': {'scale': draw(), 'bias': draw()},
    'batch_stats': {'mean': draw(), 'var': draw()},
  }


@pytest.mark.parametrize(
  ('options', 'groups'),
  [({}, 1), ({'groups': 4}, 4), ({'groups': 6}, 6), ({'groups': 12}, 12)],
)
def test_batch_norm_in_training(rng, state, options, groups):
  x = rng.normal(2.0, 3.0, (12, 4, 5, 3))
  found, updated = BatchNorm(**options).apply(
    state, jnp.asarray(x, jnp.float32), train=True, mutable=['batch_stats']
  )
  parts = np.split(x, groups)
  means = [part.reshape(-1, 3).mean(0) for part in parts]
  variances = [part.reshape(-1, 3).var(0) for part in parts]
  scale, bias = (np.asarray(state['params'][name]) for name in ('scale', 'bias'))
  expected = [
    batch_norm_by_numpy(part, scale, bias, mean, var)
    for part, mean, var in zip(parts, means, variances, strict=True)
  ]
  np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-5)
  old, new = state['batch_stats'], updated['batch_stats']
  for name, values in (('mean', means), ('var', variances)):
    law = 0.9 * np.asarray(old[name]) + 0.1 * np.mean(values, axis=0)
    np.testing.assert_allclose(new[name], law, rtol=1e-5)


@pytest.mark.parametrize('axes', [(), (4,), (4, 5)])
def test_batch_norm_in_evaluation_and_frozen(rng, state, axes):
  x = rng.normal(2.0, 3.0, (12, *axes, 3))
  expected = batch_norm_by_numpy(
    x, **jax.tree.map(np.asarray, state['params'] | state['batch_stats'])
  )
  x = jnp.asarray(x, jnp.float32)
  evaluated = BatchNorm(groups=7).apply(state, x, train=False)
  np.testing.assert_allclose(evaluated, expected, rtol=1e-4, atol=1e-5)
  frozen, kept = BatchNorm(frozen=True).apply(
    state, x, train=True, mutable=['batch_stats']
  )
  np.testing.assert_array_equal(frozen, evaluated)
  for name, value in kept['batch_stats'].items():
    np.testing.assert_array_equal(value, state['batch_stats'][name])


def test_groups_are_separate_batches(variables, images):
  """A network with two groups equals the network applied to each half."""
  moved, in_groups = (
    jax.jit(functools.partial(net.apply, train=True, mutable=['batch_stats']))
    for net in (small(), small(batch_norm={'groups': 2}))
  )
  halves = [moved(variables, half) for half in np.split(np.asarray(images), 2)]
  outputs, updated = in_groups(variables, images)
  both = jnp.concatenate([half['logits'] for half, _ in halves])
  np.testing.assert_allclose(outputs['logits'], both, atol=1e-5)
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *(stats for _, stats in halves))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), updated, mean)
  together, _ = moved(variables, images)
  assert np.abs(together['logits'] - outputs['logits']).max() > 1e-2


def test_initialising_in_training_mode_leaves_the_running_averages(images):
  first = BatchNorm().init(jax.random.key(0), images, train=True)['batch_stats']
  np.testing.assert_array_equal(first['mean'], np.zeros(3))
  np.testing.assert_array_equal(first['var'], np.ones(3))


@pytest.mark.parametrize('options', [{'groups': 3}, {'groups': 5}])
def test_a_batch_that_does_not_divide_is_a_user_error(images, options):
  layer = BatchNorm(**options)
  state = layer.init(jax.random.key(0), images[:1], train=False)
  with pytest.raises(UserError, match='batch of 8 does not divide into'):
    layer.apply(state, images, train=True, mutable=['batch_stats'])


def test_a_constant_channel_is_finite(state):
  """There E[x^2] - E[x]^2 may round to a negative number."""
  x = jnp.full((6, 3), 1234.567)

  def total(x):
    y, _ = BatchNorm().apply(state, x, train=True, mutable=['batch_stats'])
    return (y**2).sum()

  value, gradient = jax.jit(jax.value_and_grad(total))(x)
  assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize(('groups', 'reductions'), [(1, True), (8, False)])
def test_per_device_statistics_need_no_communication(groups, reductions):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  everywhere, split = (
    NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ('data',))
  )
  net = small(batch_norm={'groups': groups})

  def place(s, sharding):
    return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)

  variables = jax.tree.map(lambda s: place(s, everywhere), shapes_of(net, (8, 8, 3)))
  images = place(jnp.zeros((16, 8, 8, 3)), split)

  def logits(variables, images):
    return net.apply(variables, images, train=True, mutable=['batch_stats'])[0][
      'logits'
    ]

  text = (
    jax.jit(logits, out_shardings=split).lower(variables, images).compile().as_text()
  )
  assert bool(re.search(r'all-(reduce|gather)', text)) == reductions


# Autodiff.


@pytest.mark.slow
def test_forward_over_reverse_is_reverse_over_reverse(rng, images):
  """Hessian-vector products by both routes, and gradients in either mode."""
  net = small('cosine_squash', batch_norm={'groups': 2})
  variables = net.init(jax.random.key(0), images[:1], train=False)

  def loss(params):
    outputs, _ = net.apply(
      variables | {'params': params}, images, train=True, mutable=['batch_stats']
    )
    return jax.nn.logsumexp(outputs['logits'], axis=-1).mean()

  def dot(tree, tangent):
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, tree, tangent)))

  def both(params, tangent):
    gradient, forward = jax.jvp(jax.grad(loss), (params,), (tangent,))
    reverse = jax.grad(lambda p: dot(jax.grad(loss)(p), tangent))(params)
    slope = jax.jvp(loss, (params,), (tangent,))[1]
    return forward, reverse, slope, dot(gradient, tangent)

  params = variables['params']
  tangent = jax.tree.map(
    lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params
  )
  forward, reverse, slope, product = jax.jit(both)(params, tangent)
  np.testing.assert_allclose(slope, product, rtol=1e-4)
  for a, b in zip(jax.tree.leaves(forward), jax.tree.leaves(reverse), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-3 * (1 + np.abs(a).max()))


# The residual block.


def test_shortcuts(rng):
  x = rng.normal(size=(2, 6, 4, 3)).astype(np.float32)
  subsampled, averaged = (SHORTCUTS[name](x, 2) for name in ('subsample', 'average'))
  np.testing.assert_array_equal(subsampled, x[:, ::2, ::2])
  blocks = x.reshape(2, 3, 2, 2, 2, 3).mean((2, 4))
  np.testing.assert_allclose(averaged, blocks, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('shortcut', SHORTCUTS)
def test_a_block_without_its_branch_is_the_padded_shortcut(rng, shortcut):
  x = jnp.asarray(rng.normal(size=(2, 4, 4, 4)), jnp.float32)
  block = BasicBlock(8, 2, SHORTCUTS[shortcut], Conv, BatchNorm)
  variables = block.init(jax.random.key(0), x, train=False)
  variables['params']['norm2']['scale'] = jnp.zeros(8)
  found = block.apply(variables, x, train=False)
  expected = np.zeros((2, 2, 2, 8))
  expected[..., 2:6] = np.maximum(SHORTCUTS[shortcut](x, 2), 0)
  np.testing.assert_allclose(found, expected, atol=1e-6)


# Heads.


@pytest.fixture
def features(rng):
  return rng.normal(size=(6, 7))


def run_head(head, features):
  variables = head.init(jax.random.key(3), jnp.zeros((1, features.shape[1])))
  logits = head.apply(variables, jnp.asarray(features, jnp.float32))
  return np.asarray(logits), jax.tree.map(np.asarray, variables['params'])


def test_linear_head(features):
  logits, params = run_head(linear(5), features)
  np.testing.assert_allclose(logits, features @ params['kernel'], rtol=1e-4, atol=1e-5)
  assert not params['bias'].any()
  _, params = run_head(linear(10, prior_bias=True), features)
  np.testing.assert_allclose(1 / (1 + np.exp(-params['bias'])), 0.1, rtol=1e-6)
  assert log_prior_bias(100) == pytest.approx(-4.595, abs=1e-3)


def test_cosine_head(features):
  logits, params = run_head(cosine(5, scale=20.0), features)
  w = params['kernel']
  np.testing.assert_allclose(np.linalg.norm(w, axis=0), 1, rtol=1e-5)
  expected = features @ w / np.linalg.norm(features, axis=1, keepdims=True)
  np.testing.assert_allclose(logits, 20 * expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    run_head(cosine(5, scale=20.0), 9 * features)[0], logits, atol=1e-4
  )
  assert cosine(5).scale == 30


def test_cosine_squash_head(features):
  logits, params = run_head(cosine_squash(5), features)
  w = params['kernel']
  assert 0.8 / math.sqrt(7) < np.abs(w).max() <= 1 / math.sqrt(7)
  length = np.linalg.norm(features, axis=1, keepdims=True)
  expected = features @ w / length / np.linalg.norm(w, axis=0)
  np.testing.assert_allclose(logits, 16 * length / (1 + length) * expected, rtol=1e-4)
  assert np.abs(run_head(cosine_squash(5), 1e6 * features)[0]).max() <= 16.0001


@pytest.mark.parametrize('head', [linear(5), cosine(5), cosine_squash(5)])
def test_heads_are_finite_at_a_zero_feature(head):
  zeros = jnp.zeros((2, 7))
  variables = head.init(jax.random.key(0), zeros)

  def total(variables, features):
    return (
      head.apply(variables, features) ** 2 + head.apply(variables, features)
    ).sum()

  gradient = jax.value_and_grad(total, argnums=(0, 1))
  at, along = (variables, zeros), (variables, jnp.ones((2, 7)))
  leaves = jax.tree.leaves(jax.jit(functools.partial(jax.jvp, gradient))(at, along))
  assert all(np.isfinite(leaf).all() for leaf in leaves)


# Initialisation.


def test_kaiming_is_an_untruncated_normal_of_the_fan_in():
  x = jnp.zeros((1, 4, 4, 32))
  kernel = Conv(256).init(jax.random.key(0), x)['params']['kernel']
  assert kernel.std() == pytest.approx(math.sqrt(2 / (9 * 32)), rel=0.02)
  assert np.abs(kernel).max() > 3.5 * kernel.std()


def test_glorot_is_uniform_of_both_fans():
  x = jnp.zeros((1, 4, 4, 32))
  kernel = Conv(64, kernel_init=glorot).init(jax.random.key(0), x)['params']['kernel']
  bound = math.sqrt(6 / (9 * 32 + 9 * 64))
  assert 0.99 * bound < np.abs(kernel).max() <= bound
  assert kernel.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_every_trunk_takes_an_initialisation():
  for trunk in TRUNKS.keys() - {'identity'}:  # has no parameters
    net = make_classifier(trunk, 'linear', 3, trunk_options={'init': 'glorot'})
    assert net.trunk.conv.keywords['kernel_init'] is glorot


def test_the_head_alone_on_given_features(variables, images):
  args = small(), variables['params'], variables['batch_stats']
  whole, _ = forward(*args, images, train=False)
  alone, stats = forward(*args, whole['features'], train=False, method='head')
  np.testing.assert_array_equal(alone['logits'], whole['logits'])
  assert stats is variables['batch_stats']


SIDES = {
  'resnet8': 32,
  'resnet10': 32,
  'tiny_cnn': 8,
  'digits_cnn': 8,
  'lenet': 28,
  'mnist_dann': 28,
  'svhn_dann': 32,
  'gtsrb_dann': 40,
  'dtn': 32,
  'alexnet': 224,
  'efficientnet_lite0': 32,
  'value_iteration': 32,
}
"""One trunk of each kind -> the side of its images."""


@pytest.mark.parametrize(('trunk', 'side'), SIDES.items())
def test_a_batch_may_have_any_size(trunk, side):
  """As for an exported program: Python code must not compute with it."""
  net = make_classifier(trunk, 'linear', 3)
  variables = shapes_of(net, (side, side, 3))
  (size,) = jax.export.symbolic_shape('b')
  batch = jax.ShapeDtypeStruct((size, side, side, 3), 'float32')
  outputs = jax.eval_shape(lambda v, x: net.apply(v, x, train=False), variables, batch)
  assert str(outputs['logits'].shape[0]) == 'b'
