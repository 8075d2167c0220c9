"""Open long-tailed recognition: attention, meta-embedding and the centroids' step."""

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax.errors import UserError
from lt_jax.losses import REDUCTIONS
from lt_jax.methods.memory import oltr
from lt_jax.models import make_classifier
from lt_jax.models.attention import ModulatedAttention
from lt_jax.models.heads import meta_embedding
from lt_jax.optim import sgd

# The references: float64 NumPy, an image at a time, straight from the formulas.


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def affine(params, x):
  return x @ params['kernel'] + params['bias']


def draw_like(rng, tree):
  """Returns random numbers in the shapes of a tree, biases too."""
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), tree)


def numerical_gradient(function, x, step=1e-5):
  """Central differences of a float64 function of one array."""
  gradient = np.zeros_like(x)
  for index in np.ndindex(x.shape):
    up, down = x.copy(), x.copy()
    up[index] += step
    down[index] -= step
    gradient[index] = (function(up) - function(down)) / (2 * step)
  return gradient


# Modulated attention.


def attention_by_numpy(params, image):
  """Returns the parts by name, of one image (H, W, C)."""
  pixels = image.reshape(-1, image.shape[-1])
  parts = {name: affine(params[name], pixels) for name in ('theta', 'phi', 'g')}
  similarity = [[t @ p for p in parts['phi']] for t in parts['theta']]
  read = softmax(np.array(similarity)) @ parts['g']
  parts['out'] = read @ params['out']['kernel']
  parts['spatial'] = affine(params['spatial'], image.reshape(-1))
  place = softmax(parts['spatial'])
  mixed = [x + s * a for x, s, a in zip(pixels, place, parts['out'], strict=True)]
  parts['y'] = np.reshape(mixed, image.shape)
  return parts


def attention_params(rng, shape):
  shapes = jax.eval_shape(
    ModulatedAttention().init, jax.random.key(0), jnp.zeros((1, *shape))
  )['params']
  return draw_like(rng, shapes)


@pytest.mark.parametrize(('height', 'width'), [(2, 3), (1, 1), (3, 3)])
def test_attention(rng, height, width):
  x = rng.normal(size=(4, height, width, 6))
  params = attention_params(rng, x.shape[1:])
  assert params['theta']['kernel'].shape == (6, 3)
  assert params['spatial']['kernel'].shape == (height * width * 6, height * width)
  assert 'bias' not in params['out']
  with jax.enable_x64(True):
    apply = functools.partial(
      ModulatedAttention().apply, capture_intermediates=True, mutable=['intermediates']
    )
    found, captured = jax.jit(apply)({'params': params}, x)
  captured = captured['intermediates']
  for i, image in enumerate(x):
    expected = attention_by_numpy(params, image)
    np.testing.assert_allclose(found[i], expected.pop('y'), rtol=1e-10, atol=1e-10)
    for name, part in expected.items():
      layer = captured[name]['__call__'][0][i]
      np.testing.assert_allclose(layer, part, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_attention_in_bfloat16(rng, dtype):
  x = jnp.asarray(rng.normal(size=(2, 3, 3, 4)), jnp.bfloat16)
  params = attention_params(rng, x.shape[1:])
  rounded = jax.tree.map(lambda p: jnp.asarray(p / 2, jnp.bfloat16), params)
  wide = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), rounded)
  found = jax.jit(ModulatedAttention(dtype).apply)({'params': wide}, x)
  assert found.dtype == jnp.bfloat16
  rounded = jax.tree.map(lambda p: np.asarray(p, np.float64), rounded)
  expected = [
    attention_by_numpy(rounded, image)['y'] for image in np.asarray(x, np.float64)
  ]
  np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=0.06)


def test_attention_does_not_start_as_the_identity():
  """Scales of the first weights: sqrt(2 / channels out), and PyTorch's elsewhere."""
  x = jnp.ones((1, 2, 2, 128))
  init = jax.jit(ModulatedAttention().init_with_output)
  found, variables = init(jax.random.key(0), x)
  assert np.abs(found - x).max() > 0.01
  params = variables['params']
  for name, out in (('theta', 64), ('phi', 64), ('g', 64), ('out', 128)):
    kernel = np.asarray(params[name]['kernel'])
    assert kernel.std() == pytest.approx(math.sqrt(2 / out), rel=0.05)
    assert np.abs(kernel).max() > 3 * kernel.std()  # normal, not uniform
  for name, inputs in (('theta', 128), ('phi', 128), ('g', 128), ('spatial', 512)):
    bound = 1 / math.sqrt(inputs)
    assert 0 < np.abs(params[name]['bias']).max() <= bound
  assert 0.99 * bound < np.abs(params['spatial']['kernel']).max() <= bound


# The meta-embedding.

BATCH, CLASSES, WIDTH = 5, 7, 6
SCALE, REACH = 3.0, 2.0


def head_by_numpy(params, features, centroids, scale=SCALE, reach=REACH):
  """Returns every quantity of the head by its name, and 'logits'."""
  v, m = features, centroids
  hallucination = softmax(affine(params['hallucinator'], v))
  read = hallucination @ m
  selection = np.tanh(affine(params['selector'], v))
  nearest = np.linalg.norm(v[:, None] - m, axis=-1).min(1)[:, None]
  embedding = reach / nearest * (v + selection * read)
  w = params['classifier']['kernel']
  length = np.linalg.norm(embedding, axis=1, keepdims=True)
  cosines = embedding @ w / length / np.linalg.norm(w, axis=0)
  return {
    'hallucination': hallucination,
    'read': read,
    'selection': selection,
    'reachability': reach / nearest,
    'embedding': embedding,
    'logits': scale * length / (1 + length) * cosines,
  }


@pytest.fixture
def head(rng):
  """(head, params, features, centroids), all doubles."""
  module = meta_embedding(CLASSES, scale=SCALE, reach=REACH)
  features = rng.normal(size=(BATCH, WIDTH))
  shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, WIDTH)))
  params = draw_like(rng, shapes['params'])
  return module, params, features, rng.normal(size=(CLASSES, WIDTH))


def apply_head(module, params, features, centroids):
  return module.apply({'params': params}, features, centroids=centroids)


run_head = jax.jit(apply_head, static_argnums=0)


def test_meta_embedding(head):
  module, params, features, centroids = head
  with jax.enable_x64(True):
    apply = functools.partial(module.apply, mutable=['intermediates'])
    logits, kept = jax.jit(apply)({'params': params}, features, centroids=centroids)
  expected = head_by_numpy(params, features, centroids)
  np.testing.assert_allclose(logits, expected.pop('logits'), rtol=1e-10, atol=1e-10)
  kept = kept['intermediates']
  assert kept.keys() == expected.keys()
  for name, value in expected.items():
    assert kept[name][0].shape == value.shape
    np.testing.assert_allclose(kept[name][0], value, rtol=1e-10, err_msg=name)


def test_the_meta_embedding_of_the_released_code():
  module = meta_embedding(CLASSES)
  assert (module.scale, module.reach) == (16, 10)


def test_first_weights_of_the_meta_embedding():
  width = 400
  first = jax.jit(meta_embedding(9).init)(jax.random.key(0), jnp.zeros((1, width)))
  params = first['params']
  bound = 1 / math.sqrt(width)
  for leaf in (
    params['classifier']['kernel'],
    params['selector']['kernel'],
    params['selector']['bias'],
  ):
    assert 0.95 * bound < np.abs(leaf).max() <= bound
  assert 'bias' not in params['classifier']


def test_gradients_of_the_meta_embedding(head, rng):
  """Also through the distance to the nearest centroid."""
  module, params, features, centroids = head
  direction = rng.normal(size=(BATCH, CLASSES))

  def by_numpy(params, features):
    return (direction * head_by_numpy(params, features, centroids)['logits']).sum()

  with jax.enable_x64(True):
    gradient = jax.grad(
      lambda p, v, m: (direction * apply_head(module, p, v, m)).sum(),
      argnums=(0, 1, 2),
    )
    found, of_features, of_centroids = jax.jit(gradient)(params, features, centroids)
  slopes = numerical_gradient(functools.partial(by_numpy, params), features)
  assert np.abs(slopes).max() > 0.1
  np.testing.assert_allclose(of_features, slopes, rtol=1e-6, atol=1e-8)
  for layer, arrays in params.items():
    for name, array in arrays.items():

      def moved(x, layer=layer, name=name):
        changed = {**params, layer: {**params[layer], name: x}}
        return by_numpy(changed, features)

      slopes = numerical_gradient(moved, array)
      assert np.abs(slopes).max() > 1e-3
      np.testing.assert_allclose(found[layer][name], slopes, rtol=1e-6, atol=1e-8)
  np.testing.assert_array_equal(of_centroids, np.zeros((CLASSES, WIDTH)))


def test_no_centroids_are_zeros(head):
  module, params, features, centroids = head
  absent = run_head(module, params, jnp.asarray(features, jnp.float32), None)
  zeros = run_head(
    module, params, jnp.asarray(features, jnp.float32), jnp.zeros(centroids.shape)
  )
  np.testing.assert_array_equal(absent, zeros)


@pytest.mark.parametrize('value', [0.0, 1.0, 1e3])
def test_a_feature_on_a_centroid_stays_finite(head, value):
  """Zero on zero too: as it is before the centroids are measured."""
  module, params, _, centroids = head
  centroids[2] = value
  params, centroids = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.float32), (params, centroids)
  )
  features = jnp.stack([centroids[2], centroids[2] + 1e-9, centroids[0]])

  def total(params, features):
    logits = apply_head(module, params, features, centroids)
    return (logits * jnp.arange(1.0, CLASSES + 1)[None]).sum(), logits

  gradient = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
  (_, logits), grads = jax.jit(gradient)(params, features)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((logits, grads)))
  assert np.abs(logits).max() <= SCALE * (1 + 1e-5)


@pytest.mark.parametrize('size', [1e-4, 1.0, 1e4])
def test_logits_are_bounded_by_the_scale(head, rng, size):
  module, params, _, centroids = head
  features = size * rng.normal(size=(200, WIDTH))
  with jax.enable_x64(True):
    logits = run_head(module, params, jnp.asarray(features), jnp.asarray(centroids))
  assert np.abs(logits).max() <= SCALE


def test_far_features_get_flat_logits(head, rng):
  """The length of the embedding is that of a direction over a distance."""
  module, params, _, centroids = head
  far = 1e6 * rng.normal(size=(BATCH, WIDTH))
  near = centroids[:BATCH] + 1e-3 * rng.normal(size=(BATCH, WIDTH))
  with jax.enable_x64(True):
    found = [
      np.abs(run_head(module, params, jnp.asarray(v), jnp.asarray(centroids))).max(1)
      for v in (far, near)
    ]
  assert (found[0] < SCALE * REACH / (1 + REACH) * 1.01).all()
  assert (found[1] > found[0].max() / 2).all()


def arrays_of(jaxpr):
  """Yields the shape of every value of a program, those of inner ones too."""
  for equation in jaxpr.eqns:
    yield from (getattr(v.aval, 'shape', ()) for v in equation.outvars)
    for value in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from arrays_of(inner)


def test_nothing_is_as_large_as_batch_times_classes_times_width(head):
  module, *arrays = head

  def both(params, features, centroids):
    def total(params, features):
      return (apply_head(module, params, features, centroids) ** 2).sum()

    return jax.value_and_grad(total, argnums=(0, 1))(params, features)

  shapes = list(arrays_of(jax.make_jaxpr(both)(*arrays).jaxpr))
  assert (BATCH, CLASSES) in shapes and (CLASSES, WIDTH) in shapes
  assert max(map(math.prod, shapes)) < BATCH * CLASSES * WIDTH

  def naive(features, centroids):
    return jnp.square(features[:, None] - centroids[None]).sum(-1).min(1)

  naive_shapes = list(arrays_of(jax.make_jaxpr(naive)(*arrays[1:]).jaxpr))
  assert max(map(math.prod, naive_shapes)) == BATCH * CLASSES * WIDTH  # it is seen


# The step.

WEIGHT = 0.2
LABELS = np.array([0, 0, 0, 1, 1, 3, 0, 1], np.int32)  # no image of class 2
COUNT = 4
WIDTH_OF_NETWORK = 8
CLASS_WEIGHTS = np.array([1.0, 2.0, 5.0, 3.0])


@functools.cache
def network(projection=-1):
  return make_classifier(
    'digits_cnn',
    'meta_embedding',
    COUNT,
    attention=True,
    projection=projection,
    trunk_options={'width': 4},
  )


def cross_entropy(outputs, batch):
  log_p = jax.nn.log_softmax(outputs['logits'])
  return -log_p[jnp.arange(len(batch['label'])), batch['label']]


def method(projection=-1, *, rules=(('.*', 1.0),), form='released'):
  """Its steps of length 1 are the gradients that it uses, negated."""
  return oltr(
    network(projection),
    sgd(lambda step: jnp.float32(1), momentum=0.0, learning_rate_scale=rules),
    cross_entropy,
    class_weights=lambda step: jnp.asarray(CLASS_WEIGHTS, jnp.float32),
    reduction=REDUCTIONS['mean'],
    weight=WEIGHT,
    form=form,
  )


@functools.cache
def compiled_step(options):
  return jax.jit(method(**dict(options)).step)


def a_step(state, batch, **options):
  """Returns what was taken from the parameters, the last State and the metrics."""
  step = compiled_step(tuple(options.items()))
  last, metrics = step(state, {'train': batch})
  taken = jax.tree.map(lambda a, b: np.asarray(a - b), state.params, last.params)
  return taken, last, jax.device_get(metrics)


@pytest.fixture(scope='module')
def begun():
  """The first State, and a batch."""
  images = np.random.default_rng(3).normal(size=(8, 8, 8, 1)).astype(np.float32)
  batch = {'image': images, 'label': LABELS}
  init = jax.jit(method().init)
  return init(jax.random.key(1), {'train': batch}), batch


@pytest.fixture(scope='module')
def centroids(begun):
  shape = begun[0].params['centroids'].shape
  return np.random.default_rng(4).normal(size=shape).astype(np.float32)


def with_centroids(state, centroids):
  return state.replace(params={**state.params, 'centroids': jnp.asarray(centroids)})


def square(x):
  return (x * x).sum()


def released_by_numpy(features, centroids):
  """Returns the loss, its gradients by features and centroids, and active hinges.

  The centroids' is what a step takes: with the weight, but where they are attracted.
  """
  n, loss, hinge = len(LABELS), 0.0, 10.0
  of_features, attracted = np.zeros_like(features), np.zeros_like(centroids)
  pushed, repelled = np.zeros_like(features), np.zeros_like(centroids)
  for b, y in enumerate(LABELS):
    for c in range(COUNT):
      difference = features[b] - centroids[c]
      if c == y:
        loss += difference @ difference / (2 * n)
        of_features[b] += difference / n
        attracted[c] -= difference / n / (1 + np.sum(np.equal(LABELS, c)))
      else:
        hinge -= difference @ difference / (n * COUNT)
        pushed[b] -= 2 * difference / (n * COUNT)
        repelled[c] += 2 * difference / (n * COUNT)
  if hinge > 0:
    loss += 0.01 * hinge
    of_features += 0.01 * pushed
    attracted += WEIGHT * 0.01 * repelled
  return loss, of_features, attracted, int(hinge > 0)


def paper_by_numpy(features, centroids):
  """The same of the printed loss, with a hinge an image."""
  n, loss, active = len(LABELS), 0.0, 0
  of_features, of_centroids = np.zeros_like(features), np.zeros_like(centroids)
  for b, y in enumerate(LABELS):
    difference = features[b] - centroids
    distance = np.linalg.norm(difference, axis=1)
    sign = np.where(np.arange(COUNT) == y, 1, -1)
    hinge = sign @ distance + 5
    if hinge > 0:
      active += 1
      slopes = (sign / distance)[:, None] * difference
      loss += hinge / n
      of_features[b] = slopes.sum(0) / n
      of_centroids -= WEIGHT * slopes / n
  return loss, of_features, of_centroids, active


@jax.jit
def network_gradient(params, stats, centroids, images, slopes):
  """Returns the outputs, and the gradient of a function with slopes by outputs."""

  def outputs(params):
    variables = {'params': params, 'batch_stats': stats}
    found, _ = network().apply(
      variables, images, train=True, centroids=centroids, mutable=['batch_stats']
    )
    return found

  found, pull = jax.vjp(outputs, params)
  return found, pull(slopes)[0]


class Expected(NamedTuple):
  value: float
  apart: float
  outputs: dict
  grads: dict
  hinges: int


def expected_step(state, batch, by_numpy):
  """Returns what a step is made of, in doubles."""
  arrays = state.params['net'], state.stats['net'], state.params['centroids']
  wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (*arrays, batch['image']))
  zeros = {'logits': np.zeros((8, COUNT)), 'features': np.zeros((8, WIDTH_OF_NETWORK))}
  with jax.enable_x64(True):
    outputs, _ = jax.device_get(network_gradient(*wide, zeros))
    p = softmax(outputs['logits'])
    rows, coefficients = np.arange(8), CLASS_WEIGHTS[LABELS] / 8
    apart, of_features, of_centroids, hinges = by_numpy(outputs['features'], wide[2])
    slopes = {
      'logits': coefficients[:, None] * (p - np.eye(COUNT)[LABELS]),
      'features': WEIGHT * of_features,
    }
    _, of_net = jax.device_get(network_gradient(*wide, slopes))
  value = coefficients @ -np.log(p[rows, LABELS]) + WEIGHT * apart
  grads = {'net': of_net, 'centroids': of_centroids}
  return Expected(value, apart, outputs, grads, hinges)


def assert_trees_close(found, expected, **tolerance):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, **tolerance)


def norm(tree):
  return math.sqrt(sum(square(np.asarray(x)) for x in jax.tree.leaves(tree)))


@pytest.mark.parametrize(
  ('form', 'by_numpy', 'scale', 'active'),
  [
    ('released', released_by_numpy, 1.0, [1]),
    ('released', released_by_numpy, 3.0, [0]),
    ('paper', paper_by_numpy, 0.75, range(1, 8)),  # some images' hinges
  ],
)
def test_a_step(begun, centroids, form, by_numpy, scale, active):
  state, batch = begun
  state = with_centroids(state, scale * centroids)
  value, apart, outputs, grads, hinges = expected_step(state, batch, by_numpy)
  assert hinges in active
  taken, last, metrics = a_step(state, batch, form=form)
  np.testing.assert_allclose(
    taken['centroids'], grads['centroids'], rtol=1e-5, atol=1e-6
  )
  assert_trees_close(taken['net'], grads['net'], rtol=1e-3, atol=1e-5)
  assert int(last.step) == 1
  assert norm(jax.tree.map(jnp.subtract, last.stats, state.stats)) > 0
  sums, counts = metrics.pop('class_loss')
  log_p = np.log(softmax(outputs['logits']))[np.arange(len(LABELS)), LABELS]
  np.testing.assert_array_equal(counts, np.bincount(LABELS, minlength=COUNT))
  np.testing.assert_allclose(
    sums, np.bincount(LABELS, -log_p, minlength=COUNT), rtol=1e-4
  )
  expected = {
    'loss': value,
    'centroid_loss': apart,
    'accuracy': (outputs['logits'].argmax(-1) == LABELS).mean(),
    'grad_norm': norm(grads),
    'learning_rate': 1.0,
  }
  assert metrics.keys() == expected.keys()
  for name, (total, number) in metrics.items():
    np.testing.assert_allclose(total / number, expected[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize('trained', ['net/head/.*', 'centroids'])
def test_frozen_parameters_do_not_move_and_are_not_counted(begun, centroids, trained):
  state, batch = begun
  state = with_centroids(state, 30 * centroids)  # far: a gradient of some size
  grads = expected_step(state, batch, released_by_numpy).grads
  assert norm(grads['centroids']) > norm(grads['net']) / 10

  def kept(path, gradient):
    path = jax.tree_util.keystr(path, simple=True, separator='/')
    return gradient if re.fullmatch(trained, path) else np.zeros_like(gradient)

  expected = jax.tree_util.tree_map_with_path(kept, grads)
  rules = ((trained, 1.0), ('.*', 0.0))
  taken, _, metrics = a_step(state, batch, rules=rules)
  assert_trees_close(taken, expected, rtol=1e-3, atol=1e-5)
  for a, b in zip(jax.tree.leaves(taken), jax.tree.leaves(expected), strict=True):
    assert np.any(b) or not np.any(a)
  total, number = metrics['grad_norm']
  np.testing.assert_allclose(total / number, norm(expected), rtol=1e-4)


def test_an_unknown_form_is_reported():
  with pytest.raises(UserError, match="'papper'; did you mean 'paper'"):
    method(form='papper')


# First states and predictions.


def test_centroids_start_at_zero(begun):
  state, _ = begun
  centroids = state.params['centroids']
  np.testing.assert_array_equal(centroids, np.zeros((COUNT, WIDTH_OF_NETWORK)))
  assert centroids.dtype == np.float32
  assert int(state.step) == 0


@pytest.mark.parametrize(('projection', 'width'), [(0, 8), (-1, 8), (5, 5)])
def test_centroids_have_the_size_of_the_features(begun, projection, width):
  _, batch = begun
  state = jax.eval_shape(method(projection).init, jax.random.key(0), {'train': batch})
  assert state.params['centroids'].shape == (COUNT, width)
  parts = {'trunk', 'attention', 'head'} | ({'projection'} if projection else set())
  assert state.params['net'].keys() == parts


def test_predictions_read_the_centroids(begun, centroids):
  state, batch = begun
  predict = jax.jit(method().predict)
  outputs, elsewhere = (
    predict(with_centroids(state, m), batch['image']) for m in (centroids, -centroids)
  )
  params = jax.tree.map(
    lambda x: np.asarray(x, np.float64), state.params['net']['head']
  )
  features = np.asarray(outputs['features'], np.float64)
  expected = head_by_numpy(params, features, centroids, scale=16, reach=10)
  np.testing.assert_allclose(
    outputs['logits'], expected['logits'], rtol=1e-4, atol=1e-4
  )
  np.testing.assert_array_equal(elsewhere['features'], outputs['features'])
  assert np.abs(elsewhere['logits'] - outputs['logits']).max() > 0.1
