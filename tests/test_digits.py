"""Networks for digits, named layers of a classifier, and domain classifiers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lt_jax.errors import UserError, construct
from lt_jax.method import forward
from lt_jax.models import NETWORKS, make_classifier
from lt_jax.models.convolution import max_pool


def shapes_of(net, image_shape):
  """(shapes of the parameters, of the outputs) of one image."""

  def run(images):
    variables = net.init(jax.random.key(0), images, train=False)
    return variables['params'], net.apply(variables, images, train=False)

  return jax.eval_shape(run, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ('trunk', 'shape', 'layers', 'size'),
  [
    (
      'mnist_dann',
      (28, 28, 3),
      {'conv': 768, 'fc1': 100, 'features': 100},
      (75 * 32 + 32) + (25 * 32 * 48 + 48) + (768 * 100 + 100) + (100 * 100 + 100),
    ),
    (
      'svhn_dann',
      (32, 32, 3),
      {'conv': 8192, 'fc1': 3072, 'features': 2048},
      (75 * 64 + 64)
      + (25 * 64 * 64 + 64)
      + (25 * 64 * 128 + 128)
      + (8192 * 3072 + 3072)
      + (3072 * 2048 + 2048),
    ),
    (
      'lenet',
      (28, 28, 1),
      {'conv': 800, 'features': 500},
      (25 * 20 + 20) + (25 * 20 * 50 + 50) + (800 * 500 + 500),
    ),
    ('mnist_dann', (16, 16, 3), {'conv': 48, 'fc1': 100, 'features': 100}, None),
  ],
)
def test_layers_and_sizes_of_the_papers(trunk, shape, layers, size):
  params, outputs = shapes_of(make_classifier(trunk, 'linear', 10), shape)
  assert {n: x.shape for n, x in outputs.items()} == {
    **{name: (1, width) for name, width in layers.items()},
    'logits': (1, 10),
  }
  if size:
    assert count(params['trunk']) == size


def test_named_layers_follow_one_another(rng):
  """`fc1` is of `conv`, `features` of `fc1`, the logits of `features`."""
  net = make_classifier('mnist_dann', 'linear', 3)
  images = jnp.asarray(rng.normal(size=(2, 16, 16, 1)), jnp.float32)
  variables = net.init(jax.random.key(0), images, train=False)
  outputs, _ = forward(net, variables['params'], {}, images, train=True)
  trunk = jax.tree.map(np.float64, variables['params']['trunk'])
  x = np.float64(outputs['conv'])
  for name, layer in (('fc1', 'fc1'), ('fc2', 'features')):
    x = np.maximum(x @ trunk[name]['kernel'] + trunk[name]['bias'], 0)
    np.testing.assert_allclose(outputs[layer], x, rtol=1e-4, atol=1e-5)
  head, _ = forward(
    net, variables['params'], {}, outputs['features'], train=False, method='head'
  )
  np.testing.assert_array_equal(head['logits'], outputs['logits'])


def test_a_projection_is_of_the_named_features():
  net = make_classifier('lenet', 'linear', 3, projection=7)
  _, outputs = shapes_of(net, (28, 28, 1))
  assert outputs['features'].shape == (1, 7) and outputs['conv'].shape == (1, 800)


def test_layers_are_float32_whatever_the_trunk_computes_in():
  _, outputs = shapes_of(
    make_classifier('lenet', 'linear', 3, dtype='bfloat16'), (28, 28, 1)
  )
  assert {x.dtype for x in outputs.values()} == {jnp.dtype('float32')}


@pytest.mark.parametrize('side', [8, 7])
def test_max_pooling_agrees_with_flax(side, rng):
  """In value and both derivatives, also where maxima tie."""
  x = jnp.asarray(rng.integers(0, 3, (2, side, side, 3)), jnp.float32)
  g = jnp.asarray(rng.normal(size=(2, side // 2, side // 2, 3)), jnp.float32)
  t = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

  def flax(x):
    return nn.max_pool(x, (2, 2), (2, 2))

  @functools.partial(jax.jit, static_argnums=0)
  def derivatives(pool, x):
    y, pull = jax.vjp(pool, x)
    return y, *pull(g), jnp.vdot(g, jax.jvp(pool, (x,), (t,))[1])

  ours, theirs = derivatives(max_pool, x), derivatives(flax, x)
  np.testing.assert_array_equal(ours[0], theirs[0])
  np.testing.assert_array_equal(ours[1], theirs[1])
  np.testing.assert_allclose(ours[2], np.vdot(theirs[1], t), rtol=1e-5)
  batched = jax.vmap(max_pool)(x[None])
  np.testing.assert_array_equal(batched[0], theirs[0])


def test_small_images_and_attention_are_user_errors():
  with pytest.raises(UserError, match='8 x 8 pixels are too small'):
    shapes_of(make_classifier('mnist_dann', 'linear', 3), (8, 8, 1))
  with pytest.raises(UserError, match='attention needs a trunk that ends in a map'):
    shapes_of(make_classifier('lenet', 'linear', 3, attention=True), (28, 28, 1))


def test_domain_classifiers_map_a_layer_to_a_logit_an_image():
  made = construct(NETWORKS, 'network', 'mlp', options={'hidden': [1024, 1024]})
  layer = jnp.zeros((4, 8192))
  shapes = jax.eval_shape(lambda: made.init_with_output(jax.random.key(0), layer))
  assert shapes[0].shape == (4,)
  sizes = (8192, 1024, 1024, 1)
  assert count(shapes[1]['params']) == sum(
    (a + 1) * b for a, b in zip(sizes, sizes[1:], strict=False)
  )
