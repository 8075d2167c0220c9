"""Batch penalties and centroid losses compared with formulas, and in edge cases."""

import functools
import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax.errors import UserError
from lt_jax.losses import PENALTIES, make_penalty, metric

CLASSES = 5
DIMENSIONS = 7
COUNTS = np.array([100, 40, 16, 6, 2])
# Classes with four, three, two, one and no images; not in order.
LABELS = np.array([2, 0, 1, 0, 3, 1, 0, 2, 1, 0], np.int32)


# References in float64 with loops over pairs, straight from the formulas.


def length(v):
  return math.sqrt(sum(x * x for x in v))


def units(features):
  return [v / length(v) for v in np.asarray(features, np.float64)]


def pairs(labels):
  """Unordered pairs of one class."""
  return [
    (i, j)
    for i, j in itertools.combinations(range(len(labels)), 2)
    if labels[i] == labels[j]
  ]


def reference_lifted(features, labels, margin):
  v = units(features)

  def push(i):
    others = [k for k in range(len(v)) if labels[k] != labels[i]]
    return sum(math.exp(margin - length(v[i] - v[k])) for k in others)

  hinges = [
    max(0.0, length(v[i] - v[j]) + math.log(push(i) + push(j)))
    for i, j in pairs(labels)
  ]
  return sum(h * h for h in hinges) / (2 * len(hinges))


def reference_range(features, labels, alpha, beta, margin):
  v = units(features)
  intra, centres = 0.0, []
  for c in sorted(set(labels.tolist())):
    members = [x for x, y in zip(v, labels, strict=True) if y == c]
    centres.append(sum(members) / len(members))
    squares = [length(a - b) ** 2 for a, b in itertools.combinations(members, 2)]
    widest = sorted(squares, reverse=True)[:2]
    if widest:
      intra += len(widest) / sum(1 / d for d in widest)
  closest = min(length(p - q) ** 2 for p, q in itertools.combinations(centres, 2))
  return alpha * intra + beta * max(0.0, margin - closest)


def reference_lade(logits, labels, regularisation, weight_by_example):
  prior = COUNTS / COUNTS.sum()
  total = 0.0
  for c in range(CLASSES):
    own = [z[c] for z, y in zip(logits, labels, strict=True) if y == c]
    weights = [1 / (CLASSES * prior[y if weight_by_example else c]) for y in labels]
    terms = [w * math.exp(z[c]) for w, z in zip(weights, logits, strict=True)]
    spread = math.log(sum(terms) / len(logits))
    mean = sum(own) / len(own) if own else 0.0
    total += prior[c] * (spread + regularisation * spread**2 - mean)
  return total


def reference_attraction(features, labels, centroids):
  own = [length(v - centroids[y]) ** 2 for v, y in zip(features, labels, strict=True)]
  return sum(own) / (2 * len(own))


def others(features, labels, centroids):
  """For every image, the distances to the centroids of other classes."""
  return [
    [length(v - c) for j, c in enumerate(centroids) if j != y]
    for v, y in zip(features, labels, strict=True)
  ]


def reference_repulsion(features, labels, centroids, margin):
  total = sum(d * d for row in others(features, labels, centroids) for d in row)
  return min(max(margin - total / (len(features) * len(centroids)), 0.0), 1e6)


def reference_large_margin(features, labels, centroids, margin):
  hinges = [
    max(0.0, length(v - centroids[y]) - sum(row) + margin)
    for v, y, row in zip(
      features, labels, others(features, labels, centroids), strict=True
    )
  ]
  return sum(hinges) / len(hinges)


# (penalty, options, reference)
CASES = [
  ('lifted', {}, lambda v, y: reference_lifted(v, y, 1.0)),
  # Far below zero for some pairs: the hinge matters.
  ('lifted', {'margin': -2.2}, lambda v, y: reference_lifted(v, y, -2.2)),
  ('range', {}, lambda v, y: reference_range(v, y, 0.5, 0.5, 1.0)),
  (
    'range',
    {'alpha': 0.2, 'beta': 3.0, 'margin': 2.0},
    lambda v, y: reference_range(v, y, 0.2, 3.0, 2.0),
  ),
  ('lade', {}, lambda z, y: reference_lade(z, y, 0.1, False)),
  (
    'lade',
    {'regularisation': 0.5, 'weight_by_example': True},
    lambda z, y: reference_lade(z, y, 0.5, True),
  ),
]
every_penalty = pytest.mark.parametrize(
  'name, options, reference', CASES, ids=[f'{c[0]}-{c[1]}' for c in CASES]
)


def example(name, rng):
  """The array that a penalty takes: features, or logits for LADE."""
  return 2 * rng.normal(size=(len(LABELS), CLASSES if name == 'lade' else DIMENSIONS))


def as_function(name, options, weight=1.0):
  """(array, labels) -> penalty; the array is both features and logits."""
  penalty = make_penalty(name, weight, COUNTS, **options)
  return lambda x, y: penalty({'features': x, 'logits': x}, {'label': y})


def numerical_gradient(function, x, step=1e-5):
  """Central differences of a float64 function of one array."""
  gradient = np.zeros_like(x)
  for index in np.ndindex(x.shape):
    up, down = x.copy(), x.copy()
    up[index] += step
    down[index] -= step
    gradient[index] = (function(up) - function(down)) / (2 * step)
  return gradient


@functools.cache
def compiled(name):
  """(array, labels) -> value and gradient of a penalty with its default options."""
  return jax.jit(jax.value_and_grad(as_function(name, {})))


def finite(name, x, labels):
  """Returns value and gradient by the array; asserts that both are finite."""
  value, gradient = compiled(name)(jnp.asarray(x, jnp.float32), labels)
  assert np.isfinite(value)
  assert np.isfinite(gradient).all()
  return float(value), np.asarray(gradient)


def test_every_penalty_has_a_case():
  assert {case[0] for case in CASES} | {'none'} == set(PENALTIES)


@pytest.mark.parametrize('name', metric.PENALTIES)
def test_signature(name):
  first, second, *rest = inspect.signature(PENALTIES[name]).parameters.values()
  assert first.name in ('features', 'logits')
  assert second.name == 'labels'
  assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in rest)


@every_penalty
def test_values_and_gradients(name, options, reference, rng):
  x = example(name, rng)
  expected = reference(x, LABELS)
  slopes = numerical_gradient(lambda array: reference(array, LABELS), x)
  assert abs(expected) > 1e-3
  assert np.abs(slopes).max() > 1e-3
  function = as_function(name, options)
  with jax.enable_x64(True):
    value, gradient = jax.jit(jax.value_and_grad(function))(x, LABELS)
    assert value.shape == ()
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, slopes, atol=1e-8)
  single = jax.jit(function)(x.astype(np.float32), LABELS)
  assert single.dtype == np.float32
  np.testing.assert_allclose(single, expected, rtol=1e-5)


@pytest.mark.parametrize('name', metric.PENALTIES)
def test_order_of_the_batch_does_not_matter(name, rng):
  x, order = example(name, rng), rng.permutation(len(LABELS))
  np.testing.assert_allclose(
    finite(name, x[order], LABELS[order])[0], finite(name, x, LABELS)[0], rtol=1e-5
  )


@pytest.mark.parametrize('name', ['lifted', 'range'])
def test_length_of_features_does_not_matter(name, rng):
  x = example(name, rng)
  lengths = rng.uniform(0.1, 10, size=(len(x), 1))
  np.testing.assert_allclose(
    finite(name, x * lengths, LABELS)[0], finite(name, x, LABELS)[0], rtol=1e-5
  )


def test_weight_multiplies(rng):
  x = example('range', rng)
  quarter = jax.jit(as_function('range', {}, weight=0.25))(x, LABELS)
  np.testing.assert_allclose(4 * quarter, finite('range', x, LABELS)[0], rtol=1e-6)


ONES = np.ones((4, DIMENSIONS))
PAIRS = np.array([0, 0, 1, 1], np.int32)
ALONE = np.zeros(4, np.int32)


@pytest.mark.parametrize(
  'features, labels, lifted, range_loss',
  [
    # All coincide: J = log(4 e), and the centres are at distance 0.
    (ONES, PAIRS, math.log(4 * math.e) ** 2 / 2, 0.5),
    # Each class in a point, opposite: D = 2 between, J = log(4 / e) > 0.
    (ONES * [[1], [1], [-1], [-1]], PAIRS, math.log(4 / math.e) ** 2 / 2, 0.0),
    # One class: no negatives; three images coincide, three pairs have D = 4.
    (ONES * [[1], [1], [-1], [1]], ALONE, 0.0, 0.5 * 4),
    # One class in a point.
    (ONES, ALONE, 0.0, 0.0),
    # No positive pair.
    (np.eye(4, DIMENSIONS), np.arange(4, dtype=np.int32), 0.0, 0.0),
    (-ONES[:1], ALONE[:1], 0.0, 0.0),
    # Three zero vectors: J = log(2 e + 2) and 1 + log(2 e + 2); one pair of D = 1,
    # centres at squared distance 1/4.
    (
      ONES * [[0], [0], [0], [1]],
      PAIRS,
      ((LOG := math.log(2 * math.e + 2)) ** 2 + (1 + LOG) ** 2) / 4,
      0.5 * 1 + 0.5 * 0.75,
    ),
    (0 * ONES, PAIRS, math.log(4 * math.e) ** 2 / 2, 0.5),
  ],
)
def test_corners(features, labels, lifted, range_loss):
  for name, expected in (('lifted', lifted), ('range', range_loss)):
    value, _ = finite(name, features, labels)
    # If images coincide, distances are square roots of rounding errors.
    np.testing.assert_allclose(value, expected, rtol=5e-3, atol=1e-5)


@pytest.mark.parametrize('name', ['lifted', 'range'])
def test_nearly_coincident_features_keep_small_gradients(name, rng):
  """The square root must not amplify rounding in |v|^2 + |c|^2 - 2 v c."""
  base = rng.normal(size=(2, 64)).repeat(8, axis=0)
  noise = rng.normal(size=base.shape)
  labels = np.arange(2, dtype=np.int32).repeat(8)
  for scale in (1e-3, 1e-4, 1e-5, 1e-7, 0):
    _, gradient = finite(name, base + scale * noise, labels)
    assert np.abs(gradient).max() < 1


def test_range_takes_the_two_widest_pairs_of_the_class():
  """Pairs may share an image, but no pair counts twice."""
  angles = np.radians([0, 10, 100, 103, 200])
  features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
  squares = sorted(
    (2 - 2 * math.cos(a - b) for a, b in itertools.combinations(angles, 2)),
    reverse=True,
  )
  expected = 2 / (1 / squares[0] + 1 / squares[1])
  for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 17):
    value, _ = finite('range', features[list(order)], np.zeros(5, np.int32))
    np.testing.assert_allclose(value, 0.5 * expected, rtol=1e-6)


def test_penalties_see_the_global_batch(rng):
  """A batch split over devices has the same penalty as on one."""
  mesh = jax.make_mesh((5,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.NamedSharding(mesh, jax.P('data'))
  for name in metric.PENALTIES:
    x = example(name, rng).astype(np.float32)
    value, gradient = compiled(name)(*jax.device_put((x, LABELS), split))
    known_value, known_gradient = compiled(name)(x, LABELS)
    np.testing.assert_allclose(value, known_value, rtol=1e-5)
    np.testing.assert_allclose(gradient, known_gradient, rtol=1e-4, atol=1e-6)


def joint_batch():
  """Images x of three kinds and labels y with a joint distribution p_s(x, y)."""
  table = np.array([[12, 2, 1], [4, 6, 1], [2, 1, 3]])
  kinds, labels = np.indices(table.shape).reshape(2, -1)
  repeats = table.ravel()
  return table, kinds.repeat(repeats), labels.repeat(repeats).astype(np.int32)


@pytest.mark.parametrize('weight_by_example', [False, True])
def test_optimum_of_lade(weight_by_example):
  """The released code gives the training posterior, the formula the balanced one."""
  table, kinds, labels = joint_batch()
  joint = table / table.sum()
  if weight_by_example:
    joint = joint / joint.sum(0) / 3
  posterior = joint / joint.sum(1, keepdims=True)
  penalty = make_penalty('lade', 1.0, table.sum(0), weight_by_example=weight_by_example)

  @jax.jit
  @jax.value_and_grad
  def cost(z):
    return penalty({'logits': z[kinds]}, {'label': labels})

  optimum = np.log(posterior) + math.log(3)
  with jax.enable_x64(True):
    least, gradient = cost(optimum)
    np.testing.assert_allclose(gradient, np.zeros((3, 3)), atol=1e-12)
    for step in 0.1 * np.eye(9).reshape(9, 3, 3):
      assert cost(optimum + step)[0] > least
      assert cost(optimum - step)[0] > least


def test_lade_at_extreme_logits_is_finite(rng):
  finite('lade', 1e4 * np.sign(example('lade', rng)), LABELS)


# Centroids.


def features_and_centroids(rng):
  return rng.normal(size=(len(LABELS), DIMENSIONS)), rng.normal(
    size=(CLASSES, DIMENSIONS)
  )


@pytest.mark.parametrize(
  'function, options, reference',
  [
    (metric.attraction, {}, reference_attraction),
    # A mean squared distance of about 2 D (C - 1) / C = 11: within and out of reach.
    (metric.repulsion, {'margin': 20.0}, lambda *a: reference_repulsion(*a, 20.0)),
    (metric.repulsion, {'margin': 1.0}, lambda *a: reference_repulsion(*a, 1.0)),
    (metric.repulsion, {'margin': 3e6}, lambda *a: reference_repulsion(*a, 3e6)),
    # Four others at about 3.7 each: all, some or no hinges are active.
    (metric.large_margin, {'margin': 30.0}, lambda *a: reference_large_margin(*a, 30)),
    (metric.large_margin, {'margin': 11.0}, lambda *a: reference_large_margin(*a, 11)),
    (metric.large_margin, {}, lambda *a: reference_large_margin(*a, 5.0)),
  ],
)
def test_centroid_losses(function, options, reference, rng):
  v, c = features_and_centroids(rng)
  slopes = (
    numerical_gradient(lambda x: reference(x, LABELS, c), v),
    numerical_gradient(lambda x: reference(v, LABELS, x), c),
  )
  with jax.enable_x64(True):
    value, grads = jax.jit(
      jax.value_and_grad(lambda v, c: function(v, LABELS, c, **options), (0, 1))
    )(v, c)
    np.testing.assert_allclose(value, reference(v, LABELS, c), rtol=1e-12, atol=1e-12)
  for gradient, slope in zip(grads, slopes, strict=True):
    np.testing.assert_allclose(gradient, slope, atol=1e-7)


def test_defaults_are_those_of_code_and_paper(rng):
  v, c = features_and_centroids(rng)
  near = 0.1 * jnp.asarray(v, jnp.float32), LABELS, 0.1 * jnp.asarray(c, jnp.float32)
  as_float64 = [np.asarray(x) for x in near]
  np.testing.assert_allclose(
    metric.repulsion(*near), reference_repulsion(*as_float64, 10.0), rtol=1e-6
  )
  np.testing.assert_allclose(
    metric.large_margin(*near), reference_large_margin(*as_float64, 5.0), rtol=1e-5
  )


def test_centroid_gradient(rng):
  v, c = features_and_centroids(rng)
  expected = np.zeros_like(c)
  for j in range(CLASSES):
    members = [b for b in range(len(v)) if LABELS[b] == j]
    for b in members:
      expected[j] += (c[j] - v[b]) / (1 + len(members)) / len(v)
  assert not expected[4].any()
  with jax.enable_x64(True):
    result = np.asarray(jax.jit(metric.centroid_gradient)(v, LABELS, c))
    np.testing.assert_allclose(result, expected, rtol=1e-12)
    derivative = np.asarray(jax.grad(metric.attraction, argnums=2)(v, LABELS, c))
  counts = np.bincount(LABELS, minlength=CLASSES)
  np.testing.assert_allclose(
    result * (1 + counts)[:, None], derivative, rtol=1e-12, atol=1e-12
  )


@pytest.mark.parametrize('squared', [False, True])
def test_distances(squared, rng):
  v, c = features_and_centroids(rng)
  expected = np.array([[length(x - y) for y in c] for x in v])
  if squared:
    expected = expected**2
  with jax.enable_x64(True):
    np.testing.assert_allclose(metric.distances(v, c, squared), expected, rtol=1e-12)
  single = metric.distances(v.astype(np.float32), c.astype(np.float32), squared)
  np.testing.assert_allclose(single, expected, rtol=1e-5)
  narrow = [jnp.asarray(x, jnp.bfloat16) for x in (v, c)]
  wide = [jnp.asarray(x, jnp.float32) for x in narrow]
  assert metric.distances(*narrow).dtype == np.float32
  np.testing.assert_array_equal(metric.distances(*narrow), metric.distances(*wide))


def test_centroid_losses_are_finite_at_coincidence(rng):
  _, c = features_and_centroids(rng)
  c = jnp.asarray(c, jnp.float32)
  on_own = c[LABELS]
  for function in (metric.attraction, metric.repulsion, metric.large_margin):
    both = jax.jit(jax.grad(lambda v, c, f=function: f(v, LABELS, c), (0, 1)))
    for args in ((on_own, c), (0 * on_own, 0 * c)):
      assert all(np.isfinite(gradient).all() for gradient in both(*args))
  assert not np.asarray(metric.attraction(on_own, LABELS, c))
  # Everything in one point: margin and no distance.
  assert metric.large_margin(0 * on_own, LABELS, 0 * c) == 5
  assert metric.repulsion(0 * on_own, LABELS, 0 * c) == 10
  root = jax.jit(jax.grad(lambda v: metric.distances(v, v).sum()))(jnp.ones((2, 3)))
  np.testing.assert_array_equal(root, np.zeros((2, 3)))


def test_nothing_of_size_batch_by_classes_by_dimensions():
  """Their largest arrays are (B, C), (B, D) or (C, D)."""
  batch, classes, dimensions = 16, 32, 64
  v, c = jnp.zeros((batch, dimensions)), jnp.zeros((classes, dimensions))
  labels = jnp.zeros(batch, jnp.int32)
  for function in (
    metric.attraction,
    metric.repulsion,
    metric.centroid_gradient,
    metric.large_margin,
  ):
    jaxpr = jax.make_jaxpr(function)(v, labels, c).jaxpr
    sizes = [out.aval.size for eqn in jaxpr.eqns for out in eqn.outvars]
    assert max(sizes) <= classes * dimensions


# Names, options, shapes.


def test_no_penalty_is_none():
  assert make_penalty('none', 0.0, COUNTS) is None


@pytest.mark.parametrize(
  'name, counts, options, message',
  [
    ('lited', COUNTS, {}, "unknown penalty 'lited'; did you mean 'lifted'"),
    ('none', COUNTS, {'margin': 1}, "'none' has no option 'margin'; it takes none"),
    ('range', COUNTS, {'margn': 1}, "'range' has no option 'margn'.*'margin'"),
    ('lifted', COUNTS, {'features': 1}, "'lifted' has no option 'features'"),
    ('lade', [5, 3, 0], {}, "penalty 'lade' .* class 2 has 0"),
  ],
)
def test_user_errors(name, counts, options, message):
  with pytest.raises(UserError, match=message) as error:
    make_penalty(name, 1.0, counts, **options)
  assert '\n' not in str(error.value)


def test_empty_class_is_fine_where_counts_are_not_used():
  make_penalty('lifted', 1.0, np.array([3, 0, 1]))


@pytest.mark.parametrize(
  'name, x, labels',
  [
    ('lifted', np.zeros((2, 3)), np.zeros(2)),
    ('lifted', np.zeros(3), np.zeros(3, np.int32)),
    ('range', np.zeros((2, 3)), np.zeros((2, 1), np.int32)),
    ('range', np.zeros((2, 3)), np.zeros(3, np.int32)),
    ('lade', np.zeros((2, CLASSES + 1)), np.zeros(2, np.int32)),
  ],
)
def test_shapes_and_types_are_guarded(name, x, labels):
  with pytest.raises(AssertionError):
    as_function(name, {})(x, labels)
