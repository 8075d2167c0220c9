"""Published segmentation networks compared with PyTorch, strided versions and sizes."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax.errors import UserError
from lt_jax.models import make_classifier
from lt_jax.models.convolution import Conv, conv, dilated, kaiming
from lt_jax.models.deeplab import DilatedVGG, deeplab
from lt_jax.models.discriminator import patch_discriminator
from lt_jax.models.efficientnet import EfficientNetLite, Stage
from lt_jax.models.fcn import FullyConvolutionalVGG, fcn
from lt_jax.models.resnet import basic, bottleneck, resnet
from lt_jax.models.segmentation import Segmenter
from lt_jax.pretrained import published
from tests.golden import resnet_torch
from tests.golden import segmentation_torch as golden

CONV = functools.partial(Conv, kernel_init=kaiming, dtype=None)


# Against PyTorch.


def network(name):
  """Returns our version of a network in `golden.NETWORKS`."""
  if name == 'discriminator':
    return patch_discriminator(width=8)
  if name.startswith('fcn'):
    trunk = FullyConvolutionalVGG(golden.VGG16, golden.HIDDEN, conv=CONV)
    return Segmenter(trunk, fcn(int(name[3:]), resnet_torch.CLASSES))
  head = functools.partial(deeplab, resnet_torch.CLASSES, dilations=golden.DILATIONS)
  if name == 'deeplab_vgg16_bn':
    trunk = DilatedVGG(golden.VGG16, conv=CONV)
    return Segmenter(trunk, head(hidden=(golden.HIDDEN, golden.HIDDEN)))
  shape = {'output_stride': 8, 'also': ('stage3',)}
  trunk = resnet(bottleneck, golden.BLOCKS, width=8, style='deeplab', **shape)
  return Segmenter(trunk, head(auxiliary='stage3'))


@pytest.fixture(scope='module')
def stored():
  with np.load(golden.FILE, allow_pickle=False) as file:
    return dict(file)


def loaded(name, net, tensors):
  """Returns the variables of a network, with a trunk loaded like published weights."""
  images = jax.ShapeDtypeStruct(golden.images(name).shape, np.float32)
  train = {} if name == 'discriminator' else {'train': False}
  shapes = jax.eval_shape(
    functools.partial(net.init, **train), jax.random.key(0), images
  )
  params, stats = (
    jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes.get(key, {}))
    for key in ('params', 'batch_stats')
  )
  if name != 'discriminator':
    trunk = {k: value for k, value in tensors.items() if not k.startswith('head.')}
    weights = published.Weights(trunk, 'FILE', '', '', (), ())
    params, stats, report = published.assign(weights, params, stats)
    assert all(path.startswith('head/') for path in report.fresh)
    assert not report.dropped

  def of_ours(path, leaf):
    key = '.'.join(part.key for part in path)
    key = key.replace('kernel', 'weight')
    if key not in tensors:
      return leaf
    return tensors[key].transpose(2, 3, 1, 0) if leaf.ndim == 4 else tensors[key]

  params = jax.tree_util.tree_map_with_path(of_ours, params)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(params))
  return {'params': params, 'batch_stats': stats}


@pytest.mark.parametrize('name', golden.NETWORKS)
def test_outputs_agree_with_pytorch(name, stored):
  net = network(name)
  state = json.loads(bytes(stored[f'{name}/state']))
  tensors = {key: resnet_torch.tensor(key, tuple(shape)) for key, shape in state}
  train = {} if name == 'discriminator' else {'train': False}
  run = jax.jit(functools.partial(net.apply, **train))
  found = run(loaded(name, net, tensors), golden.images(name))
  if name == 'discriminator':
    found = {'logits': found}
  elif 'map' in found:
    found['features'] = found['map']
  expected = {
    key.removeprefix(f'{name}/'): value
    for key, value in stored.items()
    if key.startswith(f'{name}/') and not key.endswith('/state')
  }
  assert 'logits' in expected and expected.keys() <= found.keys()
  for key, value in expected.items():
    ours = resnet_torch.sample(np.asarray(found[key]))
    np.testing.assert_allclose(ours, value, rtol=0, atol=1e-5 * np.abs(value).max())
    assert value.std() > 0.01, key


def test_pytorch_reproduces_the_stored_outputs(stored):
  pytest.importorskip('torch')
  for name in golden.NETWORKS:
    for key, value in golden.run(name).items():
      np.testing.assert_allclose(value, stored[key], rtol=1e-4, atol=1e-4)


# Dilation.


def drawn(net, images, rng):
  """Returns variables of a network that keep activations near one."""
  shapes = jax.eval_shape(
    functools.partial(net.init, train=False), jax.random.key(0), images
  )

  def draw(path, leaf):
    if len(leaf.shape) > 1:
      spread = math.sqrt(2 / math.prod(leaf.shape[:-1]))
      return jnp.asarray(spread * rng.normal(size=leaf.shape), jnp.float32)
    zero = path[-1].key in ('mean', 'bias')
    return jnp.zeros(leaf.shape) if zero else jnp.ones(leaf.shape)

  return jax.tree_util.tree_map_with_path(draw, shapes)


SMALL_LITE = (
  Stage(1, 3, 2, 1, 4),
  Stage(1, 3, 2, 2, 6),
  Stage(2, 5, 2, 2, 8),
  Stage(2, 3, 2, 2, 10),
)

DILATING = {
  'basic': (lambda stride: resnet(basic, (1, 1, 2, 2), width=4, output_stride=stride)),
  'bottleneck': (
    lambda stride: resnet(bottleneck, (1, 1, 2, 2), width=4, output_stride=stride)
  ),
  'deeplab': (
    lambda stride: resnet(
      bottleneck, (1, 1, 2, 2), width=4, style='deeplab', output_stride=stride
    )
  ),
  'lite': lambda stride: EfficientNetLite(SMALL_LITE, 4, 8, output_stride=stride),
}


@pytest.mark.parametrize(
  ('name', 'stride'),
  [
    ('basic', 8),
    pytest.param('lite', 8, marks=pytest.mark.slow),
    pytest.param('bottleneck', 8, marks=pytest.mark.slow),
    pytest.param('deeplab', 8, marks=pytest.mark.slow),
    *(pytest.param(name, 16, marks=pytest.mark.slow) for name in DILATING),
  ],
)
def test_a_dilated_network_has_the_pixels_of_the_strided_one(name, stride, rng):
  """And the same weights, so ImageNet weights work for both."""
  images = jnp.asarray(rng.normal(size=(2, 97, 33, 3)), jnp.float32)
  nets = [DILATING[name](s) for s in (32, stride)]
  variables = drawn(nets[0], images, rng)
  strided, ours = (
    jax.jit(functools.partial(net.apply, train=False))(variables, images)
    for net in nets
  )
  step = 32 // stride
  assert ours.shape[1:3] == tuple(-(-side // stride) for side in (97, 33))
  np.testing.assert_allclose(ours[:, ::step, ::step], strided, rtol=1e-4, atol=1e-5)
  assert strided.std() > 0.05 and strided.shape[1:3] == (4, 2)


def test_a_depthwise_convolution_dilates_as_any_other(rng):
  x, kernel = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((2, 9, 8, 3), (3, 3, 1, 3))
  )
  apart = jnp.einsum('hwoc,cd->hwcd', kernel, jnp.eye(3))
  for pad, stride in ((None, 1), ('SAME', 2), (1, 1)):
    shape = {'pad': pad, 'stride': stride, 'dilation': 2}
    np.testing.assert_allclose(
      conv(x, kernel, groups=3, **shape), conv(x, apart, **shape), rtol=1e-4, atol=1e-5
    )


def test_layers_after_a_stride_read_further_apart():
  layers = ({'size': 1}, {'stride': 2}, {'size': 1, 'stride': 3}, {})
  assert [layer['dilation'] for layer in dilated(layers, 2)] == [2, 2, 4, 12]
  assert {layer['stride'] for layer in dilated(layers, 2)} == {1}


# Sizes.


def shapes_of(trunk, head, sides, **options):
  net = make_classifier(trunk, head, 19, per_pixel=True, **options)
  images = jax.ShapeDtypeStruct((1, *sides, 3), np.float32)
  return jax.eval_shape(
    lambda x: net.init_with_output(jax.random.key(0), x, train=False), images
  )


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


HEAD = 4 * (9 * 2048 * 19 + 19)


@pytest.mark.parametrize(
  ('trunk', 'size'),
  [('deeplab_resnet50', 23_508_032), ('deeplab_resnet101', 42_500_160)],
)
def test_deeplab_of_residual_networks_at_the_size_of_advent(trunk, size):
  options = {'auxiliary': 'stage3'}
  outputs, variables = shapes_of(trunk, 'deeplab', (720, 1280), head_options=options)
  assert outputs['low_logits'].shape == (1, 91, 161, 19)
  assert outputs['logits'].shape == outputs['auxiliary_logits'].shape
  assert outputs['logits'].shape == (1, 720, 1280, 19)
  assert outputs['stage3'].shape[-1] == 1024
  assert count(variables['params']['trunk']) == size
  auxiliary = 4 * (9 * 1024 * 19 + 19)
  assert count(variables['params']['head']) == HEAD + auxiliary


def test_deeplab_of_vgg_as_c_driving_has_it():
  options = {'head_options': {'hidden': (1024, 1024)}}
  outputs, variables = shapes_of('deeplab_vgg16_bn', 'deeplab', (512, 1024), **options)
  assert outputs['low_logits'].shape == (1, 64, 128, 19)
  convolutions = 14_714_688 + 2 * 4224  # and as many scales and shifts as channels
  assert count(variables['params']['trunk']) == convolutions
  hidden = 9 * 512 * 1024 + 1024 + 9 * 1024 * 1024 + 1024
  assert count(variables['params']['head']) == hidden + 4 * (9 * 1024 * 19 + 19)


@pytest.mark.parametrize(('head', 'low'), [('fcn32', 16), ('fcn16', 34), ('fcn8', 70)])
def test_fcn_has_the_size_of_vgg_and_logits_of_every_pixel(head, low):
  outputs, variables = shapes_of('fcn_vgg16', head, (500, 375))
  assert outputs['logits'].shape == (1, 500, 375, 19)
  assert outputs['low_logits'].shape[1] == low
  assert (
    count(variables['params']['trunk']) == 134_260_544
  )  # VGG-16 without its last layer
  skips = {'fcn32': 0, 'fcn16': 512, 'fcn8': 512 + 256}[head]
  scores = {'fcn32': 1, 'fcn16': 2, 'fcn8': 3}[head]
  assert count(variables['params']['head']) == 19 * (4096 + skips + scores)


def test_lite0_with_dilation_is_a_trunk_of_maps():
  outputs, _ = shapes_of(
    'efficientnet_lite0',
    'multi_dilation',
    (180, 240),
    trunk_options={'output_stride': 8},
  )
  assert outputs['map'].shape == (1, 23, 30, 1280)
  assert outputs['logits'].shape == (1, 180, 240, 19)


# Published weights.


def test_weights_of_vgg_fit_a_trunk_without_hidden_layers(stored):
  """Weights of hidden layers are left out, which is reported."""
  state = json.loads(bytes(stored['deeplab_vgg16_bn/state']))
  tensors = {
    key: resnet_torch.tensor(key, tuple(shape))
    for key, shape in state
    if not key.startswith('head.')
  }
  beside = {
    f'classifier.{i}.{leaf}': np.zeros(2, np.float32)
    for i in (0, 3, 6)
    for leaf in ('weight', 'bias')
  }
  net = network('deeplab_vgg16_bn')
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  shapes = jax.eval_shape(
    functools.partial(net.init, train=False), jax.random.key(0), images
  )
  weights = published.Weights(tensors | beside, 'FILE', '', '', (), ())
  report = published.assign(weights, shapes['params'], shapes['batch_stats'])[2]
  assert set(report.dropped) == set(beside)
  assert report.loaded == sum('num_batches' not in key for key in tensors)


# Errors.


@pytest.mark.parametrize(
  ('trunk', 'head', 'options', 'message'),
  [
    ('resnet18', 'fcn8', {}, "map of the trunk 'pool4'"),
    ('resnet18', 'deeplab', {'head_options': {'auxiliary': 'stage3'}}, "'stage3'"),
    ('resnet18', 'deeplab', {'trunk_options': {'also': ('stage9',)}}, "stage 'stage9'"),
    ('resnet18', 'linear', {'trunk_options': {'output_stride': 4}}, 'is 4; it must be'),
  ],
)
def test_mistakes_are_reported(trunk, head, options, message):
  with pytest.raises(UserError, match=message):
    shapes_of(trunk, head, (64, 64), **options)


@pytest.mark.parametrize('shape', [(2, 10), (2, 31, 40, 10)])
def test_a_discriminator_of_patches_needs_maps(shape):
  with pytest.raises(UserError, match='at least 32 x 32 pixels'):
    jax.eval_shape(
      lambda: patch_discriminator().init(jax.random.key(0), jnp.zeros(shape))
    )
