"""Networks of pixels: sizes, dilation and resizing against NumPy, heads of vectors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax.errors import UserError
from lt_jax.models import make_classifier
from lt_jax.models.convolution import conv
from lt_jax.models.segmentation import MultiDilation, resize

IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(2, 16, 24, 3)), jnp.float32)


def net(head='multi_dilation', trunk='small_segmenter', width=4, **options):
  return make_classifier(
    trunk, head, 5, trunk_options={'width': width}, per_pixel=True, **options
  )


def test_a_small_network_has_the_published_size():
  made = make_classifier('small_segmenter', 'multi_dilation', 7, per_pixel=True)
  shapes = jax.eval_shape(
    lambda: made.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False)
  )
  trunk = 9 * (3 * 16 + 16 * 32 + 32 * 64 + 2 * 64 * 64) + 2 * (16 + 32 + 3 * 64)
  found = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes['params']))
  assert found == trunk + 4 * (9 * 64 * 7 + 7)


@pytest.mark.parametrize('head', ['multi_dilation', 'cosine'])
def test_every_pixel_of_the_images_has_logits(head):
  variables = jax.jit(functools.partial(net(head).init, train=False))(
    jax.random.key(0), IMAGES
  )
  outputs = jax.jit(functools.partial(net(head).apply, train=False))(variables, IMAGES)
  assert outputs['logits'].shape == (2, 16, 24, 5)
  assert outputs['map'].shape == (2, 4, 6, 16)
  np.testing.assert_allclose(
    outputs['features'], outputs['map'].mean((1, 2)), rtol=1e-5
  )
  of_head = net(head).apply(
    variables, outputs['map'], train=False, method='apply_head'
  )['logits']
  np.testing.assert_allclose(
    resize(of_head, (16, 24)), outputs['logits'], rtol=1e-4, atol=1e-5
  )


def test_dilation_reads_pixels_that_far_apart():
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(1, 9, 7, 2)), rng.normal(size=(3, 3, 2, 4))
  found = conv(
    jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), dilation=3
  )
  padded = np.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))
  expected = sum(
    padded[:, 3 * i : 3 * i + 9, 3 * j : 3 * j + 7] @ kernel[i, j]
    for i in range(3)
    for j in range(3)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_head_of_maps_sums_its_branches():
  x = IMAGES[:, :6, :6]
  head = MultiDilation(4, (1, 2))
  params = head.init(jax.random.key(0), x)['params']
  kernels = {d: params[f'dilation{d}']['kernel'] for d in (1, 2)}
  expected = sum(conv(x, kernel, dilation=d) for d, kernel in kernels.items())
  np.testing.assert_allclose(head.apply({'params': params}, x), expected, atol=1e-6)


def test_resizing_interpolates_between_the_centres_of_pixels():
  row = jnp.asarray([0.0, 1.0, 2.0])
  found = resize(row[None, None, :, None], (1, 6))[0, 0, :, 0]
  np.testing.assert_allclose(found, [0, 0.25, 0.75, 1.25, 1.75, 2], atol=1e-6)


def test_parts_that_a_network_of_pixels_cannot_have_are_reported():
  with pytest.raises(UserError, match='model.attention and model.projection'):
    net(projection=8)
  made = make_classifier('lenet', 'linear', 5, per_pixel=True)
  with pytest.raises(UserError, match='a trunk that ends in a map'):
    jax.eval_shape(
      lambda: made.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), train=False)
    )
