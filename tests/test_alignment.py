"""Alignments compared with their formulas in float64, and in edge cases."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax.errors import UserError
from lt_jax.losses import alignment
from lt_jax.losses.alignment import ALIGNMENTS, make_alignment, make_weight

SIZES = {'conv': 6, 'features': 4, 'logits': 3}
SOURCE, TARGET = 8, 6
FAMILY = (0.125, 0.25, 0.5, 1.0, 2.0)


def example(rng, images, shift=0.0):
  return {name: 2 * rng.normal(size=(images, d)) + shift for name, d in SIZES.items()}


@pytest.fixture
def pair(rng):
  return example(rng, SOURCE), example(rng, TARGET, shift=0.3)


# The references: float64, loops over images, straight from the formulas.


def covariance(x):
  mean = sum(x) / len(x)
  return sum(np.outer(v - mean, v - mean) for v in x) / (len(x) - 1)


def reference_coral(source, target, layers, a, b):
  total = 0.0
  for name in layers:
    s, t = source[name], target[name]
    d = s.shape[1]
    total += a * np.linalg.norm(covariance(s) - covariance(t)) ** 2 / d**2
    total += b * np.linalg.norm(sum(s) / len(s) - sum(t) / len(t)) ** 2 / d
  return total


def moments(x, order):
  mean = sum(x) / len(x)
  return [
    mean,
    *(sum((v - mean) ** k for v in x) / len(x) for k in range(2, order + 1)),
  ]


def reference_moments(source, target, layers, order):
  total = 0.0
  for name in layers:
    s, t = (1 / (1 + np.exp(-outputs[name])) for outputs in (source, target))
    both = zip(moments(s, order), moments(t, order), strict=True)
    total += sum(np.linalg.norm(a - b) for a, b in both)
  return total


def square(x, y):
  return sum((a - b) ** 2 for a, b in zip(x, y, strict=True))


def softmax(z):
  e = np.exp(z - z.max())
  return e / e.sum()


def family(s, t, bandwidths=FAMILY):
  both = [*s, *t]
  mean = sum(square(x, y) for x in both for y in both) / len(both) ** 2
  return lambda x, y: sum(math.exp(-square(x, y) / (2 * a * mean)) for a in bandwidths)


def reference_estimate(s, t, k, estimate):
  """Returns the estimate for images s and t of any kind, given their kernel."""
  if estimate == 'linear':
    m = min(len(s), len(t)) // 2
    pairs = [(s[2 * i], s[2 * i + 1], t[2 * i], t[2 * i + 1]) for i in range(m)]
    return sum(k(a, b) + k(c, d) - k(a, d) - k(b, c) for a, b, c, d in pairs) / m
  within = itertools.product if estimate == 'biased' else None

  def mean(x):
    pairs = within(x, x) if within else itertools.permutations(x, 2)
    values = [k(a, b) for a, b in pairs]
    return sum(values) / len(values)

  across = [k(a, b) for a in s for b in t]
  return mean(s) + mean(t) - 2 * sum(across) / len(across)


def reference_mmd(source, target, layers, estimate, bandwidths=FAMILY):
  return sum(
    reference_estimate(
      list(source[n]),
      list(target[n]),
      family(source[n], target[n], bandwidths),
      estimate,
    )
    for n in layers
  )


def reference_joint(source, target, layers, estimate, sigma=0.92):
  kernels = [family(source[n], target[n]) for n in layers]

  def images(outputs):
    predictions = [softmax(z) for z in outputs['logits']]
    return list(zip(*(outputs[n] for n in layers), predictions, strict=True))

  def k(x, y):
    value = math.exp(-square(x[-1], y[-1]) / (2 * sigma**2))
    return value * math.prod(
      f(a, b) for f, a, b in zip(kernels, x[:-1], y[:-1], strict=True)
    )

  return reference_estimate(images(source), images(target), k, estimate)


def entropy_of(p):
  return -sum(x * math.log(x) for x in p)


def reference_entropy(source, target):
  return sum(entropy_of(softmax(z)) for z in target['logits']) / TARGET


def reference_mcc(source, target, temperature):
  p = [softmax(z / temperature) for z in target['logits']]
  sure = [1 + math.exp(-entropy_of(x)) for x in p]
  classes = range(SIZES['logits'])
  m = np.zeros((len(classes), len(classes)))
  for x, w in zip(p, sure, strict=True):
    m += TARGET * w / sum(sure) * np.outer(x, x)
  shares = [[m[j][k] / sum(m[j]) for k in classes] for j in classes]
  return sum(shares[j][k] for j in classes for k in classes if j != k) / len(classes)


BOTH = ('conv', 'features')
# (alignment, layers, options, reference)
CASES = [
  (
    'coral',
    ('features',),
    {},
    lambda s, t: reference_coral(s, t, ('features',), 0.25, 0),
  ),
  ('coral', BOTH, {'form': 'adapt'}, lambda s, t: reference_coral(s, t, BOTH, 0.25, 1)),
  (
    'coral',
    BOTH,
    {'form': 'domainbed'},
    lambda s, t: reference_coral(s, t, BOTH, 1, 1),
  ),
  (
    'central_moments',
    BOTH,
    {},
    functools.partial(reference_moments, layers=BOTH, order=5),
  ),
  (
    'central_moments',
    ('conv',),
    {'order': 2},
    functools.partial(reference_moments, layers=('conv',), order=2),
  ),
  *(
    (
      'mmd',
      BOTH,
      {'estimate': estimate},
      functools.partial(reference_mmd, layers=BOTH, estimate=estimate),
    )
    for estimate in ('unbiased', 'biased', 'linear')
  ),
  (
    'mmd',
    ('conv',),
    {'bandwidths': [1.0, 3.0]},
    lambda s, t: reference_mmd(s, t, ('conv',), 'unbiased', (1.0, 3.0)),
  ),
  *(
    (
      'joint_mmd',
      BOTH,
      {'estimate': estimate},
      functools.partial(reference_joint, layers=BOTH, estimate=estimate),
    )
    for estimate in ('unbiased', 'biased', 'linear')
  ),
  (
    'joint_mmd',
    ('features',),
    {'sigma': 0.5},
    lambda s, t: reference_joint(s, t, ('features',), 'unbiased', 0.5),
  ),
  ('entropy', (), {}, reference_entropy),
  ('mcc', (), {}, lambda s, t: reference_mcc(s, t, 2.5)),
  ('mcc', (), {'temperature': 1.0}, lambda s, t: reference_mcc(s, t, 1.0)),
]
every_case = pytest.mark.parametrize(
  'name, layers, options, reference', CASES, ids=[f'{c[0]}-{c[2]}' for c in CASES]
)


def made(name, layers=('features',), weight=1.0, **options):
  progress = functools.partial(jnp.multiply, jnp.float32(0.01))  # 100 steps
  counts = np.ones(SIZES['logits'], int)
  return make_alignment(
    name,
    align_on=layers,
    weight=weight,
    counts=counts,
    progress=progress,
    **options,
  )


@every_case
def test_it_is_its_formula(name, layers, options, reference, pair):
  align = made(name, layers, weight=0.5, **options)
  expected = 0.5 * reference(*pair)
  with jax.enable_x64(True):
    wide = jax.tree.map(jnp.asarray, pair)
    np.testing.assert_allclose(jax.jit(align)(*wide, 3), expected, rtol=1e-6)
  single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), pair)
  value = jax.jit(align)(*single, jnp.int32(3))
  assert (value.shape, value.dtype) == ((), jnp.float32)
  np.testing.assert_allclose(value, expected, rtol=2e-4, atol=2e-6)


OF_PIXELS = ('minent', 'class_prior')
"""Alignments of label maps, which tests/test_pixel_adaptation.py tests."""

ONE_EACH = [
  *((name, {}) for name in ALIGNMENTS if name not in ('none', *OF_PIXELS)),
  ('coral', {'form': 'domainbed'}),
  ('mmd', {'estimate': 'linear'}),
]
every_alignment = pytest.mark.parametrize('name, options', ONE_EACH)


@functools.cache
def derivative(name, **options):
  return jax.jit(jax.grad(made(name, **options), argnums=(0, 1)))


@every_alignment
@pytest.mark.parametrize('kind', ['equal', 'zero', 'sure', 'masked', 'far'])
def test_gradients_are_finite_at_the_corners(name, options, kind, rng):
  source, target = (
    {n: np.tile(x[:1], (SOURCE, 1)).astype(np.float32) for n, x in o.items()}
    for o in (example(rng, 1),) * 2
  )
  if kind == 'zero':  # all vectors coincide, at the origin
    source, target = jax.tree.map(np.zeros_like, (source, target))
  if kind == 'sure':
    target['logits'] = np.eye(SOURCE, 3, dtype=np.float32) * 1e4
  if kind == 'masked':  # a class that is ruled out
    target['logits'][:, 0] = -1e9
  if kind == 'far':
    target['features'] = target['features'] + np.float32(1e6)
  grads = derivative(name, **options)(source, target, jnp.int32(0))
  for leaf in jax.tree.leaves(grads):
    assert np.isfinite(leaf).all()


@pytest.mark.parametrize(
  'name, options',
  [
    pytest.param(*one, marks=[pytest.mark.slow] * (one[0] != 'joint_mmd'))
    for one in ONE_EACH
  ],
)
def test_replicas_are_one_after_the_other(name, options, rng):
  pairs = [(example(rng, 4), example(rng, 4)) for _ in range(2)]
  pairs = jax.tree.map(np.float32, pairs)
  align = jax.jit(functools.partial(made(name, **options), step=0))
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *pairs)
  np.testing.assert_allclose(
    jax.vmap(align)(*stacked), [align(*pair) for pair in pairs], rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize('name', ['coral', 'central_moments', 'mmd', 'joint_mmd'])
def test_it_does_not_depend_on_the_order_of_images(name, pair, rng):
  align = jax.jit(made(name))
  orders = [rng.permutation(size) for size in (SOURCE, TARGET)]
  mixed = [{n: x[o] for n, x in y.items()} for y, o in zip(pair, orders, strict=True)]
  np.testing.assert_allclose(align(*mixed, 0), align(*pair, 0), rtol=1e-3, atol=1e-6)


def test_coral_is_zero_for_equal_covariances_whatever_the_means(rng):
  source = example(rng, SOURCE)
  moved = jax.tree.map(lambda x: x + 3.0, source)
  assert made('coral')(source, moved, 0) < 1e-6
  assert made('coral', form='adapt')(source, moved, 0) == pytest.approx(9, rel=1e-4)


def test_estimates_of_equal_laws_are_zero_in_the_mean(rng):
  draws = 300
  batches = [
    {n: rng.normal(size=(draws, 16, d)).astype(np.float32) for n, d in SIZES.items()}
    for _ in range(2)
  ]
  for estimate in ('unbiased', 'linear'):
    align = functools.partial(made('mmd', estimate=estimate), step=0)
    values = np.asarray(jax.jit(jax.vmap(align))(*batches))
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(draws)
    assert values.min() < 0  # not clipped
  biased = functools.partial(made('mmd', estimate='biased'), step=0)
  assert jax.jit(jax.vmap(biased))(*batches).min() > 0


def test_confusion_and_entropy_of_sure_and_of_even_predictions():
  sure = {'logits': np.eye(3, dtype=np.float32) * 1e3}
  even = {'logits': np.zeros((3, 3), np.float32)}
  for name, most in (('entropy', math.log(3)), ('mcc', 2 / 3)):
    assert made(name)(sure, sure, 0) == pytest.approx(0, abs=1e-6)
    assert made(name)(sure, even, 0) == pytest.approx(most, rel=1e-5)


# Names, layers and weights.


@pytest.mark.parametrize(
  ('name', 'given', 'message'),
  [
    ('corall', {}, "unknown alignment 'corall'; did you mean 'coral'"),
    ('coral', {'frm': 'paper'}, "'coral' has no option 'frm'; did you mean 'form'"),
    ('none', {'form': 'paper'}, "'none' has no option 'form'; it takes none"),
    ('mmd', {'layers': ()}, "'mmd' needs alignment.align_on: the layers it compares"),
    ('mmd', {'weight': {'name': 'dan'}}, "weight schedule 'dan'; did you mean 'dann'"),
    ('mmd', {'weight': {'name': 'dann', 'gama': 1}}, "no option 'gama'; did you mean"),
    ('mmd', {'weight': {'gamma': 1.0}}, 'must be a number, or a schedule'),
    (
      'mmd',
      {'weight': {'name': 'linear', 'weight': 1.0, 'end': 0.0}},
      '0 <= begin < end, got 0.0 and 0.0',
    ),
  ],
)
def test_wrong_names_are_user_errors(name, given, message):
  with pytest.raises(UserError, match=message):
    made(name, **given)


@pytest.mark.parametrize(
  ('name', 'given', 'message'),
  [
    ('coral', {'form': 'papr'}, "unknown form of coral 'papr'; did you mean 'paper'"),
    ('central_moments', {'order': 0}, 'order of central_moments is 0; it must be'),
    ('mmd', {'estimate': 'linaer'}, "unknown estimate 'linaer'; did you mean 'linear'"),
    (
      'mmd',
      {'layers': ('fc7',)},
      "layer of this network 'fc7'; known: conv, features, logits",
    ),
  ],
)
def test_wrong_layers_and_forms_are_reported_when_a_step_is_traced(
  name, given, message, pair
):
  with pytest.raises(UserError, match=message):
    made(name, **given)(*pair, 0)


@pytest.mark.parametrize('name', ['coral', 'mmd', 'joint_mmd'])
def test_one_image_is_no_distribution(name, pair, rng):
  with pytest.raises(UserError, match='at least 2 images each, not 8 and 1'):
    made(name)(pair[0], example(rng, 1), 0)


def test_none_gives_none():
  assert ALIGNMENTS['none'] is None and made('none', layers=()) is None


def test_weights_by_progress():
  progress = np.array([0, 0.1, 0.25, 0.5, 1], np.float32)

  def weights(weight):
    return make_weight(weight, lambda step: progress)(0)

  expected = 2 / (1 + np.exp(-10.0 * progress)) - 1
  np.testing.assert_allclose(expected, [0, 0.462, 0.848, 0.987, 1.0], atol=5e-4)
  rises = weights({'name': 'dann', 'gamma': 10.0, 'weight': 1.0})
  np.testing.assert_allclose(rises, expected, atol=1e-6)
  np.testing.assert_allclose(
    weights({'name': 'dann', 'weight': 3.0}), 3 * expected, atol=3e-6
  )
  np.testing.assert_array_equal(weights(0.25), np.full(5, 0.25))
  np.testing.assert_array_equal(weights({'name': 'constant', 'weight': 2}), [2.0] * 5)
  ramp = {'name': 'linear', 'weight': 2.0, 'begin': 0.1, 'end': 0.5}
  np.testing.assert_allclose(weights(ramp), [0, 0, 0.75, 2, 2], atol=1e-6)
  assert rises.dtype == weights(0.25).dtype == weights(ramp).dtype == jnp.float32


def test_the_schedule_that_counts_steps_is_the_one_by_progress():
  """TLLib's: high 1, low 0, alpha 1, 1,000 steps; DANN's gamma is 10 of 10,000."""
  steps = np.array([0, 1, 100, 777, 5000, 10_000])
  by_step = 2 / (1 + np.exp(-1.0 * steps / 1000)) - 1
  value = alignment.dann(jnp.asarray(steps / 10_000, jnp.float32))
  np.testing.assert_allclose(value, by_step, atol=1e-6)
