"""Residual networks compared with published sizes and loops over pixels."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax.errors import UserError
from lt_jax.models.normalisation import BatchNorm
from lt_jax.models.resnet import RESNETS, basic, bottleneck, resnet

# Parameters with a linear head of 1000 classes, as torchvision lists them.
PUBLISHED = {
  'resnet18': 11_689_512,
  'resnet34': 21_797_672,
  'resnet50': 25_557_032,
  'resnet101': 44_549_160,
  'resnet152': 60_192_808,
  'resnext50_32x4d': 25_028_904,
}
GROUPED = functools.partial(bottleneck, inner=2, groups=4)
PLAIN = resnet(basic, (1, 1), width=4)


@functools.partial(jax.jit, static_argnums=0, static_argnames='train')
def apply(net, variables, images, *, train):
  """Returns the map and the updated statistics."""
  return net.apply(variables, images, train=train, mutable=['batch_stats'])


def shapes_of(net, *sides, **options):
  """Returns the shapes of the map and of the variables, without computing."""
  images = jnp.zeros((1, *sides, 3))
  return jax.eval_shape(
    lambda: net.init_with_output(jax.random.key(0), images, train=False, **options)
  )


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def drawn(net, rng, *sides):
  """Returns random variables of a network, in double precision."""

  def draw(path, leaf):
    value = rng.uniform(0.5, 1.5, leaf.shape)
    if path[-1].key in ('kernel', 'bias', 'mean'):
      value *= rng.choice([-1, 1], leaf.shape)
    return value / math.sqrt(math.prod(leaf.shape[:-1]))

  return jax.tree_util.tree_map_with_path(draw, shapes_of(net, *sides)[1])


# Sizes.


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name in ('resnet101', 'resnet152')))
    for name in PUBLISHED
  ],
)
def test_published_sizes(name):
  features, variables = shapes_of(RESNETS[name](), 224, 224)
  channels = 512 if name in ('resnet18', 'resnet34') else 2048
  assert features.shape == (1, 7, 7, channels)
  head = 1000 * channels + 1000
  assert count(variables['params']) + head == PUBLISHED[name]


def test_size_of_resnet10():
  features, variables = shapes_of(RESNETS['resnet10'](), 224, 224)
  kernels, channels = 49 * 3 * 64, 64
  for before, width in ((64, 64), (64, 128), (128, 256), (256, 512)):
    kernels += 9 * before * width + 9 * width * width
    channels += 2 * width
    if before != width:
      kernels += before * width
      channels += width
  assert features.shape == (1, 7, 7, 512)
  assert count(variables['params']) == kernels + 2 * channels
  assert count(variables['batch_stats']) == 2 * channels


@pytest.mark.parametrize(
  ('sides', 'expected'), [((225, 97), (8, 4)), ((97, 224), (4, 7)), ((33, 1), (2, 1))]
)
def test_a_side_halves_five_times_and_rounds_up(sides, expected):
  """Like PyTorch's (n + 2p - k) // 2 + 1 for (k, p) of (7, 3), (3, 1), (1, 0)."""
  for net in (resnet(basic, (1, 1, 1, 1)), resnet(GROUPED, (1, 1, 1, 1), width=4)):
    assert shapes_of(net, *sides)[0].shape[1:3] == expected


@pytest.mark.parametrize(
  ('branch', 'sides'),
  [(basic, (8, 8)), (bottleneck, (16, 8, 8)), (GROUPED, (16, 8, 8))],
)
def test_a_3x3_convolution_strides(branch, sides):
  net = resnet(branch, (1, 2), width=4)
  _, variables = shapes_of(net, 64, 64, capture_intermediates=True)
  for block, expected in (('block1', sides), ('block2', (8,) * len(sides))):
    inside = variables['intermediates'][f'stage2_{block}']
    convs = [inside[f'conv{i + 1}']['__call__'][0] for i in range(len(sides))]
    assert tuple(x.shape[1] for x in convs) == expected
  assert {*inside} == {'__call__'} | {
    f'{layer}{i + 1}' for layer in ('conv', 'norm') for i in range(len(sides))
  }


def test_only_a_change_of_shape_is_projected():
  for name, projecting in (('resnet18', [2, 3, 4]), ('resnet50', [1, 2, 3, 4])):
    params = shapes_of(RESNETS[name](), 32, 32)[1]['params']
    found = [block for block in params if 'shortcut_conv' in params[block]]
    assert sorted(found) == [f'stage{stage}_block1' for stage in projecting]
    assert [block for block in params if 'shortcut_norm' in params[block]] == found


# Numbers.


def convolved(x, kernel, stride=1, groups=1):
  """Returns the sum over every window, zero outside of the image."""
  k, (b, h, w, _) = len(kernel), x.shape
  x = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
  y = np.zeros((b, (h - 1) // stride + 1, (w - 1) // stride + 1, kernel.shape[-1]))
  parts = zip(
    np.split(x, groups, -1),
    np.split(kernel, groups, -1),
    np.split(y, groups, -1),  # These are views: writing to a part writes to y.
    strict=True,
  )
  for inputs, weights, out in parts:
    for i in range(y.shape[1]):
      for j in range(y.shape[2]):
        window = inputs[:, i * stride : i * stride + k, j * stride : j * stride + k]
        out[:, i, j] = np.tensordot(window, weights, 3)
  return y


def pooled(x):
  """Returns the maximum of every 3x3 window at stride 2, ignoring pixels outside."""
  y = np.zeros((len(x), (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2, x.shape[3]))
  for i in range(y.shape[1]):
    for j in range(y.shape[2]):
      rows = slice(max(2 * i - 1, 0), 2 * i + 2)
      columns = slice(max(2 * j - 1, 0), 2 * j + 2)
      y[:, i, j] = x[:, rows, columns].max((1, 2))
  return y


def expected_map(variables, x, train, blocks, kinds, groups, small=False):
  """Returns the map by definition.

  Args:
    variables: variables by name.
    x: images.
    train: normalise by batch statistics.
    blocks: number of blocks in each stage.
    kinds: kernel sizes in a block.
    groups: groups of the 3x3 convolutions in a bottleneck.
    small: whether nothing before the first block has a stride.
  """
  params, stats = variables['params'], variables['batch_stats']

  def layer(x, place, conv, norm, stride=1, groups=1):
    weights, averages = params, stats
    for name in place:
      weights, averages = weights[name], averages[name]
    x = convolved(x, weights[conv]['kernel'], stride, groups)
    if train:
      mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    else:
      mean, var = averages[norm]['mean'], averages[norm]['var']
    x = (x - mean) / np.sqrt(var + 1e-5)
    return weights[norm]['scale'] * x + weights[norm]['bias']

  x = np.maximum(layer(x, (), 'conv', 'norm', 1 if small else 2), 0)
  x = x if small else pooled(x)
  for stage, length in enumerate(blocks, start=1):
    for block in range(1, length + 1):
      place = (f'stage{stage}_block{block}',)
      stride = 2 if (stage > 1 or small) and block == 1 else 1
      if kinds == (3, 3):
        y = np.maximum(layer(x, place, 'conv1', 'norm1', stride), 0)
        y = layer(y, place, 'conv2', 'norm2')
      else:
        y = np.maximum(layer(x, place, 'conv1', 'norm1'), 0)
        y = np.maximum(layer(y, place, 'conv2', 'norm2', stride, groups), 0)
        y = layer(y, place, 'conv3', 'norm3')
      if y.shape != x.shape:
        x = layer(x, place, 'shortcut_conv', 'shortcut_norm', stride)
      x = np.maximum(x + y, 0)
  return x


@pytest.mark.parametrize(
  ('net', 'blocks', 'kinds', 'groups', 'train'),
  [
    (PLAIN, (1, 1), (3, 3), 1, True),
    (resnet(GROUPED, (2, 1), width=4), (2, 1), (1, 3, 1), 4, False),
  ],
)
def test_the_map_is_the_definition(rng, net, blocks, kinds, groups, train):
  images = rng.normal(size=(2, 17, 20, 3))
  variables = drawn(net, rng, 17, 20)
  with jax.enable_x64(True):
    found, _ = apply(net, variables, images, train=train)
  expected = expected_map(variables, images, train, blocks, kinds, groups)
  assert found.shape == expected.shape == (2, 3, 3, 8 if kinds == (3, 3) else 32)
  assert 0.2 < (expected > 0).mean() < 1
  np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)


def test_a_small_stem_strides_first_in_the_first_stage(rng):
  net = resnet(basic, (1, 1), width=4, stem='small')
  images = rng.normal(size=(2, 17, 20, 3))
  variables = drawn(net, rng, 17, 20)
  with jax.enable_x64(True):
    found, _ = apply(net, variables, images, train=True)
  expected = expected_map(variables, images, True, (1, 1), (3, 3), 1, small=True)
  assert found.shape == expected.shape == (2, 5, 5, 8)
  np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)


def test_faces_of_112_pixels_have_the_map_of_224_pixels():
  for name, channels in (('resnet18', 512), ('resnet50', 2048)):
    features, variables = shapes_of(RESNETS[name](stem='small'), 112, 112)
    assert features.shape == (1, 7, 7, channels)
    assert variables['params']['conv']['kernel'].shape == (3, 3, 3, 64)
  dilated, _ = shapes_of(RESNETS['resnet10'](stem='small', output_stride=8), 64, 64)
  assert dilated.shape[1:3] == (8, 8)


def test_groups_of_the_batch_are_separate_batches(rng):
  images, variables = rng.normal(size=(4, 17, 20, 3)), drawn(PLAIN, rng, 17, 20)
  pairs = resnet(basic, (1, 1), width=4, norm=functools.partial(BatchNorm, groups=2))
  with jax.enable_x64(True):
    found = apply(pairs, variables, images, train=True)
    halves = [apply(PLAIN, variables, half, train=True) for half in np.split(images, 2)]
  (features, updated), *halves = jax.tree.map(np.asarray, [found, *halves])
  same = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
  same(features, np.concatenate([x for x, _ in halves]))
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *(stats for _, stats in halves))
  jax.tree.map(same, updated, mean)


def test_forward_over_reverse_is_reverse_over_reverse(rng):
  """Through max-pooling, which bilevel methods differentiate twice."""
  net, images = resnet(basic, (), width=4), rng.normal(size=(2, 9, 9, 3))
  variables = drawn(net, rng, 9, 9)
  tangent = jax.tree.map(lambda p: rng.normal(size=p.shape), variables['params'])

  def loss(params):
    x = net.apply(variables | {'params': params}, images, train=False)
    return (x**2).mean()

  def slope(params):
    gradient = jax.grad(loss)(params)
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, tangent)))

  @jax.jit
  def both(params):
    return jax.jvp(jax.grad(loss), (params,), (tangent,))[1], jax.grad(slope)(params)

  with jax.enable_x64(True):
    forward, reverse = both(variables['params'])
  assert np.abs(forward['conv']['kernel']).max() > 1e-3
  same = functools.partial(np.testing.assert_allclose, atol=1e-9)
  jax.tree.map(same, forward, reverse)


# Options.


def test_types():
  for dtype, expected in ((None, 'float32'), ('bfloat16', 'bfloat16')):
    features, variables = shapes_of(RESNETS['resnet10'](width=4, dtype=dtype), 32, 32)
    assert features.dtype == jnp.dtype(expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}


def test_the_first_weights_are_kaiming_of_the_fan_out():
  conv, x = RESNETS['resnet10']().conv, jnp.zeros((1, 4, 4, 32))
  kernel = conv(128, groups=4).init(jax.random.key(0), x)['params']['kernel']
  assert kernel.shape == (3, 3, 8, 128)
  assert kernel.std() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.05)
  assert np.abs(kernel).max() > 3.5 * kernel.std()


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'init': 'kaiming_fan_uot'}, "did you mean 'kaiming_fan_out'"),
    ({'stem': 'smal'}, "did you mean 'small'"),
    ({'width': 4}, 'bottleneck of 8 channels does not divide into 32 groups'),
  ],
)
def test_wrong_options_are_user_errors(options, message):
  with pytest.raises(UserError, match=message):
    shapes_of(RESNETS['resnext50_32x4d'](**options), 32, 32)
