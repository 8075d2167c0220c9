"""Trunks for photographs: against PyTorch at every tap, NumPy, and published sizes."""

import functools
import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lt_jax.errors import UserError
from lt_jax.models import Classifier, make_classifier
from lt_jax.models.convolution import Conv, conv, kaiming
from lt_jax.models.efficientnet import EfficientNetLite, Stage, efficientnet_lite0
from lt_jax.models.heads import linear
from lt_jax.models.normalisation import BatchNorm
from lt_jax.models.plain import STYLES, VGG, AlexNet, adaptive_mean, response_norm
from lt_jax.models.taps import tap_shapes, tapped
from lt_jax.pretrained import published
from lt_jax.pretrained.dialects import LITE
from tests.golden import resnet_torch
from tests.golden import trunks_torch as golden

CONV = functools.partial(Conv, kernel_init=kaiming, dtype=None)


def shapes_of(net, height, width, channels=3):
  """Returns the shapes of a classifier's (params, stats); nothing is computed."""
  images = jax.ShapeDtypeStruct((1, height, width, channels), np.float32)
  init = functools.partial(net.init, train=False)
  variables = jax.eval_shape(init, jax.random.key(0), images)
  return variables['params'], variables.get('batch_stats', {})


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def zeros(shapes):
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


# Sizes and layers.

LITE_BLOCKS = tuple(
  f'stage{stage}_block{block}'
  for stage, blocks in enumerate((1, 2, 2, 3, 3, 4, 1), 1)
  for block in range(1, blocks + 1)
)
CONVS = tuple(f'conv{i}' for i in range(1, 6))


@pytest.mark.parametrize(
  ('trunk', 'options', 'size', 'taps'),
  [
    ('efficientnet_lite0', {}, 4_652_008, ('stem', *LITE_BLOCKS, 'last')),
    ('vgg16', {}, 138_357_544, (*CONVS, 'fc6', 'fc7')),
    ('vgg16_bn', {}, 138_365_992, (*CONVS, 'fc6', 'fc7')),
    ('alexnet', {}, 60_965_224, (*CONVS, 'fc6', 'fc7')),
    ('alexnet', {'style': 'zeiler_fergus'}, 62_357_608, (*CONVS, 'fc6', 'fc7')),
    ('alexnet', {'style': 'torchvision'}, 61_100_840, (*CONVS, 'fc6', 'fc7')),
    (
      'resnet10',
      {'width': 8},
      None,
      ('stem', *(f'stage{s}_block1' for s in range(1, 5))),
    ),
    ('tiny_cnn', {}, None, ('conv1', 'conv2')),
    ('lenet', {}, None, ('conv1', 'conv2', 'fc1')),
  ],
)
def test_sizes_and_taps(trunk, options, size, taps):
  net = make_classifier(trunk, 'linear', 1000, trunk_options=options)
  params, stats = shapes_of(net, 224, 224)
  if size:
    assert count(params) == size
  images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
  shapes = tap_shapes(net, params, stats, images)
  assert tuple(shapes) == taps
  assert all(shape.shape[0] == 2 for shape in shapes.values())


@pytest.mark.parametrize(
  ('style', 'size', 'sides'),
  [
    # Krizhevsky's figure has 55, 27 and 13 before the maxima, that of Zeiler and Fergus
    # 55 and 13 behind them.
    ('krizhevsky', 227, (27, 13, 13, 13, 6)),
    ('krizhevsky', 224, (27, 13, 13, 13, 6)),
    ('zeiler_fergus', 224, (55, 13, 13, 13, 6)),
    ('torchvision', 224, (27, 13, 13, 13, 6)),
  ],
)
def test_maps_of_alexnet_are_those_of_its_figure(style, size, sides):
  net = make_classifier('alexnet', 'linear', 2, trunk_options={'style': style})
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  shapes = tap_shapes(net, *shapes_of(net, size, size), images)
  assert tuple(shapes[f'conv{i}'].shape[1] for i in range(1, 6)) == sides
  assert shapes['fc7'].shape == (1, 4096)


@pytest.mark.parametrize('trunk', ['alexnet', 'vgg16'])
def test_images_that_are_too_small(trunk):
  net = make_classifier(trunk, 'linear', 2)
  with pytest.raises(UserError, match='images of 20 x 90 pixels are too small'):
    shapes_of(net, 20, 90)


def test_classes_of_torchvision_are_aligned_on_fc6_and_fc7():
  """As named layers of the outputs; the features are fc7."""
  net = Classifier(AlexNet(STYLES['torchvision'], hidden=8, conv=CONV), linear(3))
  images = jnp.ones((2, 70, 70, 3))
  outputs = jax.eval_shape(
    lambda: net.init_with_output(jax.random.key(0), images, train=False)[0]
  )
  assert {name: x.shape for name, x in outputs.items()} == {
    'fc6': (2, 8),
    'fc7': (2, 8),
    'features': (2, 8),
    'logits': (2, 3),
  }


def test_lite_normalises_with_the_epsilon_of_tensorflow():
  frozen = functools.partial(BatchNorm, frozen=True)
  assert efficientnet_lite0(norm=frozen).norm.keywords == {
    'frozen': True,
    'epsilon': 1e-3,
  }


# Against PyTorch.


def network(name):
  """Returns ours of a network in `golden.NETWORKS`."""
  if name == 'lite0':
    trunk = efficientnet_lite0()
  elif name.startswith('vgg'):
    normalised = name == 'vgg16_bn'
    trunk = VGG(golden.VGG16, normalised, hidden=golden.HIDDEN, conv=CONV)
  else:
    widths = [layer[0] for layer in golden.ALEXNETS[name]]
    layers = [
      layer._replace(features=features)
      for layer, features in zip(STYLES[name], widths, strict=True)
    ]
    trunk = AlexNet(tuple(layers), hidden=golden.HIDDEN, conv=CONV)
  return Classifier(trunk, linear(resnet_torch.CLASSES))


@pytest.fixture(scope='module')
def stored():
  with np.load(golden.FILE, allow_pickle=False) as file:
    return dict(file)


def state_of(stored, name):
  """Returns PyTorch's own state of a network, with weights that follow from names."""
  state = json.loads(bytes(stored[f'{name}/state']))
  return {key: resnet_torch.tensor(key, tuple(shape)) for key, shape in state}


@functools.cache
def shapes_by_name(name):
  """Returns the shapes of a network's (params, stats), traced once."""
  return shapes_of(network(name), *golden.images(name).shape[1:3])


def assigned(name, tensors):
  """Returns (params, stats, report) of a network with tensors loaded."""
  weights = published.Weights(tensors, 'FILE', '', '', (), ())
  return published.assign(weights, *map(zeros, shapes_by_name(name)), head=True)


@pytest.mark.parametrize('name', golden.NETWORKS)
def test_every_tap_agrees_with_pytorch(name, stored):
  net, images = network(name), golden.images(name)
  tensors = state_of(stored, name)
  params, stats, report = assigned(name, tensors)
  assert report.fresh == report.dropped == ()
  assert report.loaded == sum('num_batches' not in key for key in tensors)

  @jax.jit
  def run(params, stats, images):
    variables = {'params': params, 'batch_stats': stats}
    logits = net.apply(variables, images, train=False)['logits']
    return tapped(net, params, stats, images) | {'logits': logits}

  found = run(params, stats, images)
  assert found.keys() == {
    key.removeprefix(f'{name}/')
    for key in stored
    if key.startswith(f'{name}/') and key != f'{name}/state'
  }
  for key, x in found.items():
    expected = stored[f'{name}/{key}']
    error = np.abs(resnet_torch.sample(np.asarray(x)) - expected).max()
    assert error <= 1e-5 * np.abs(expected).max(), key
    assert expected.std() > 0.15


def test_pytorch_reproduces_the_stored_outputs(stored):
  pytest.importorskip('torch')
  for name in golden.NETWORKS:
    for key, value in golden.run(name).items():
      np.testing.assert_allclose(value, stored[key], rtol=1e-4, atol=1e-4)


# Names of weights.


def renamed(tensors, *pairs):
  """Returns tensors under other names, by pieces of the names."""

  def name(key):
    for ours, theirs in pairs:
      key = key.replace(ours, theirs)
    return key

  return {name(key): value for key, value in tensors.items()}


def test_the_port_of_lite0_has_other_names(stored):
  """Which are those of its file: see its numbers of blocks, and its norms from 0."""
  timm = state_of(stored, 'lite0')
  place, port = 0, {}
  for stage, blocks in enumerate((1, 2, 2, 3, 3, 4, 1)):
    for block in range(blocks):
      convs = ('conv_pw', 'conv_dw', 'conv_pwl')[: 3 if stage else 2]
      theirs = ('_expand_conv', '_depthwise_conv', '_project_conv')
      if not stage:
        convs, theirs = ('conv_dw', 'conv_pw'), theirs[1:]
      for number, (one, other) in enumerate(zip(convs, theirs, strict=True), 1):
        norm = number - bool(stage)
        port[f'blocks.{stage}.{block}.{one}'] = f'_blocks.{place}.{other}'
        port[f'blocks.{stage}.{block}.bn{number}'] = f'_blocks.{place}._bn{norm}'
      place += 1
  port |= {
    'conv_stem': '_conv_stem',
    'bn1': '_bn0',
    'conv_head': '_conv_head',
    'bn2': '_bn1',
    'classifier': '_fc',
  }
  other = {}
  for key, value in timm.items():
    module, _, leaf = key.rpartition('.')
    other[f'{port[module]}.{leaf}'] = value
  params, stats, report = assigned('lite0', timm)
  again = assigned('lite0', other)
  jax.tree.map(np.testing.assert_array_equal, again[:2], (params, stats))
  assert (report.mean, report.std) == ((), ())  # others have timm's names too
  assert again[2].mean == LITE['mean'] and again[2].loaded == report.loaded


def test_timm_has_the_hidden_layers_of_vgg_as_convolutions(stored):
  torchvision = state_of(stored, 'vgg16')
  timm = renamed(
    torchvision,
    ('classifier.0', 'pre_logits.fc1'),
    ('classifier.3', 'pre_logits.fc2'),
    ('classifier.6', 'head.fc'),
  )
  for name, side in (('fc1', 7), ('fc2', 1)):
    key = f'pre_logits.{name}.weight'
    timm[key] = timm[key].reshape(golden.HIDDEN, -1, side, side)
  there, here = (assigned('vgg16', tensors) for tensors in (timm, torchvision))
  jax.tree.map(np.testing.assert_array_equal, there[:2], here[:2])
  assert there[2] == here[2]
  timm['pre_logits.fc1.weight'] = timm['pre_logits.fc1.weight'].reshape(32, -1)
  with pytest.raises(UserError, match="'pre_logits.fc1.weight' is of another shape"):
    assigned('vgg16', timm)


def test_alexnet_of_another_style(stored):
  with pytest.raises(UserError, match="'features.0.*' is of another shape"):
    assigned('krizhevsky', state_of(stored, 'torchvision'))


@pytest.mark.parametrize(
  ('model', 'mean'),
  [
    ('timm/tf_efficientnet_lite0.in1k', LITE['mean']),
    ('timm/tf_efficientnet_lite0.in1k@main', LITE['mean']),
    ('timm/vgg16_bn.tv_in1k', (0.485, 0.456, 0.406)),
    ('timm/vgg16.other', ()),
    ('someone/tf_efficientnet_lite0.in1k', ()),
  ],
)
def test_pixels_that_a_model_expects(model, mean, monkeypatch, tmp_path):
  path = tmp_path / 'model.safetensors'
  path.write_bytes(b'\2\0\0\0\0\0\0\0{}')
  monkeypatch.setattr(published, '_download', lambda source: (str(path), 'r'))
  assert published.load(model).mean == mean


def test_a_network_of_timm_with_other_padding_is_not_downloaded():
  with pytest.raises(UserError, match="'efficientnet_lite0'; did you mean 'tf_effic"):
    published._download('timm/efficientnet_lite0.ra_in1k')


# Parts.


@pytest.mark.parametrize(
  ('size', 'stride', 'side'),
  [
    (3, 2, 7),
    *(pytest.param(*x, marks=pytest.mark.slow) for x in ((3, 1, 4), (5, 2, 6))),
  ],
)
def test_a_depthwise_convolution_by_either_form(rng, size, stride, side):
  """Padded as in TensorFlow; values, both derivatives, and second ones."""
  x = rng.normal(size=(2, side, side + 1, 3))
  kernel = rng.normal(size=(size, size, 1, 3))

  def grouped(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=3,
    )

  def ours(x, kernel):
    return conv(x, kernel, stride, 3, 'SAME')

  def all_of(f, x, kernel):
    def total(kernel):
      return (f(x, kernel) ** 3).sum()

    def slope(kernel):
      return jax.jvp(total, (kernel,), (jnp.ones_like(kernel),))[1]

    gradients = jax.grad(lambda x, k: (f(x, k) ** 3).sum(), (0, 1))(x, kernel)
    return f(x, kernel), gradients, slope(kernel), jax.grad(slope)(kernel)

  with jax.enable_x64(True):
    given = jnp.asarray(x, jnp.float64), jnp.asarray(kernel, jnp.float64)
    found, expected = (
      jax.jit(functools.partial(all_of, f))(*given) for f in (ours, grouped)
    )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-9), found, expected
  )


def test_only_the_cpu_gets_products():
  """A convolution elsewhere; for one pixel a product of matrices."""
  x = jnp.ones((2, 4, 4, 8))
  for kernel, groups in ((jnp.ones((3, 3, 1, 8)), 8), (jnp.ones((1, 1, 8, 4)), 1)):
    traced = jax.jit(functools.partial(conv, groups=groups)).trace(x, kernel)
    for platform, expected in (('cpu', 0), ('tpu', 1), ('cuda', 1)):
      text = traced.lower(lowering_platforms=(platform,)).as_text()
      assert text.count('stablehlo.convolution') == expected


@pytest.mark.parametrize(
  ('height', 'width', 'side'), [(9, 4, 6), (13, 12, 6), (7, 7, 7)]
)
def test_the_adaptive_mean(rng, height, width, side):
  x = rng.normal(size=(2, height, width, 3))
  expected = np.empty((2, side, side, 3))
  for i in range(side):
    for j in range(side):
      rows = slice(math.floor(i * height / side), math.ceil((i + 1) * height / side))
      columns = slice(math.floor(j * width / side), math.ceil((j + 1) * width / side))
      expected[:, i, j] = x[:, rows, columns].mean((1, 2))
  found = adaptive_mean(jnp.asarray(x, jnp.float32), side)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_response_normalisation(rng):
  """Of activations so large that their neighbours matter."""
  x = rng.normal(size=(1, 2, 2, 7)) * 200
  expected = np.empty_like(x)
  for c in range(7):
    total = (x[..., max(0, c - 2) : c + 3] ** 2).sum(-1)
    expected[..., c] = x[..., c] / (2 + 1e-4 * total) ** 0.75
  found = response_norm(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_miniature_of_lite_learns(rng):
  """Gradients reach every parameter."""
  trunk = EfficientNetLite((Stage(1, 3, 2, 2, 8),), first=4, last=8, conv=CONV)
  net = Classifier(trunk, linear(3))
  images = jnp.asarray(rng.normal(size=(4, 9, 9, 3)), jnp.float32)
  init = jax.jit(functools.partial(net.init, train=False))
  variables = init(jax.random.key(0), images)

  @jax.jit
  def gradient(params):
    def loss(params):
      outputs, _ = net.apply(
        variables | {'params': params}, images, train=True, mutable=['batch_stats']
      )
      return outputs['logits'][:, 0].sum() ** 2

    return jax.grad(loss)(params)

  for leaf in jax.tree.leaves(gradient(variables['params'])):
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0


# Published weights and real photographs.

IMAGENET = {  # class of Caltech-101 -> its places in ImageNet's list of classes
  'Leopards': (288, 289, 290),
  'accordion': (401,),
  'ant': (310,),
  'barrel': (427,),
  'beaver': (337,),
  'cannon': (471,),
  'crayfish': (124,),
  'dalmatian': (251,),
  'dragonfly': (319, 320),
  'electric_guitar': (546,),
  'elephant': (101, 385, 386),
  'flamingo': (130,),
  'grand_piano': (579,),
  'hedgehog': (334,),
  'laptop': (620, 681),
  'llama': (355,),
  'nautilus': (117,),
  'panda': (388,),
  'pizza': (963,),
  'platypus': (103,),
  'rooster': (7,),
  'scorpion': (71,),
  'soccer_ball': (805,),
  'starfish': (327,),
  'strawberry': (949,),
}


def real_file(variable, name):
  """Returns a file of a folder that an environment variable names, or skips."""
  path = pathlib.Path(os.environ.get(variable, '.')) / name
  if not path.exists():
    pytest.skip(f'{variable} names no folder with {name}')
  return path


def test_published_weights_name_photographs():
  """The first two test images of 25 classes of Caltech-101 that ImageNet has too.

  Of all 434 test images of these classes, which are squashed to 128 x 128 pixels, the
  first guess of 1,000 is right for 64 %, and one of the first five for 85 %.
  """
  path = real_file('LT_JAX_WEIGHTS', 'lite0.safetensors')
  with np.load(real_file('LT_JAX_DATA', 'caltech101.npz'), allow_pickle=False) as file:
    pixels, labels = file['x_test'], file['y_test']
    names = file['class_names'].tolist()
  rows = [np.flatnonzero(labels == names.index(name))[:2] for name in IMAGENET]
  images = np.stack(
    [
      np.asarray(Image.fromarray(pixels[row]).resize((224, 224), Image.BICUBIC))
      for row in np.concatenate(rows)
    ]
  )
  net = make_classifier('efficientnet_lite0', 'linear', 1000)
  params, stats, report = published.pretrained(
    str(path), *map(zeros, shapes_of(net, 224, 224)), head=True
  )
  assert report.fresh == report.dropped == ()
  normalised = (images / 255 - np.array(report.mean)) / np.array(report.std)
  predict = jax.jit(functools.partial(net.apply, train=False))
  variables = {'params': params, 'batch_stats': stats}
  logits = predict(variables, jnp.asarray(normalised, jnp.float32))['logits']
  guesses = np.argsort(-np.asarray(logits))[:, :5].tolist()
  places = [IMAGENET[name] for name in IMAGENET for _ in range(2)]
  first = sum(g[0] in p for g, p in zip(guesses, places, strict=True))
  among = sum(not set(g).isdisjoint(p) for g, p in zip(guesses, places, strict=True))
  print(f'of {len(images)} photographs {first} named first, {among} among five')
  assert first >= 0.6 * len(images) and among >= 0.8 * len(images)
