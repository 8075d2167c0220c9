"""Every loss passes the same contract tests, followed by tests of its own."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax import losses
from lt_jax.class_weights import inverse_effective_number
from lt_jax.errors import UserError
from lt_jax.losses import LOSSES, REDUCTIONS, make_loss
from lt_jax.losses.margin import ldam_margins

CLASSES = 5
BATCH = 35
COUNTS = np.array([100, 40, 16, 6, 2])
CIFAR10_LT_100 = np.array([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])


def softmax(z):
  powers = [math.exp(v - max(z)) for v in z]
  return [p / sum(powers) for p in powers]


def sigmoid(v):
  return 1 / (1 + math.exp(-v))


def reference_cross_entropy(z, y, s=0.0):
  targets = [s / len(z) + (1 - s) * (c == y) for c in range(len(z))]
  return -sum(t * math.log(p) for t, p in zip(targets, softmax(z), strict=True))


def reference_softmax_focal(z, y, gamma):
  p = softmax(z)[y]
  return -((1 - p) ** gamma) * math.log(p)


def reference_sigmoid_focal(z, y, gamma):
  states = [sigmoid(v) if c == y else 1 - sigmoid(v) for c, v in enumerate(z)]
  return -sum((1 - p) ** gamma * math.log(p) for p in states)


def reference_prior(z, y, tau):
  weights = [n**tau * math.exp(v) for n, v in zip(COUNTS.tolist(), z, strict=True)]
  return -math.log(weights[y] / sum(weights))


def reference_margin(z, y, scale, margins):
  """The papers' form: CE(scale * (cosine - margin)) with cosine = z / scale."""
  cosines = [v / scale for v in z]
  cosines[y] -= margins[y]
  return reference_cross_entropy([scale * v for v in cosines], y)


def reference_label_aware_smoothing(z, y, head, tail):
  low, high = min(COUNTS), max(COUNTS)
  angle = math.pi * (COUNTS[y] - low) / (2 * (high - low))
  return reference_cross_entropy(z, y, tail + (head - tail) * math.sin(angle))


def reference_vector_scaling(z, y, gamma, tau):
  counts = COUNTS.tolist()
  scales = [(n / max(counts)) ** gamma for n in counts]
  shifts = [tau * math.log(n / sum(counts)) for n in counts]
  scaled = [d * v + i for d, v, i in zip(scales, z, shifts, strict=True)]
  return reference_cross_entropy(scaled, y)


def reference_temperature(z, y, gamma):
  counts = COUNTS.tolist()
  temperatures = [(max(counts) / n) ** gamma for n in counts]
  cooled = [v / a for v, a in zip(z, temperatures, strict=True)]
  return reference_cross_entropy(cooled, y)


def reference_ranking(z, y, margin):
  """Returns how closely each other class approaches the right one."""
  return [max(0.0, margin + v - z[y]) for c, v in enumerate(z) if c != y]


def reference_ale(z, y, margin):
  found = reference_ranking(z, y, margin)
  rank = sum(v > 0 for v in found)
  return sum(found) * sum(1 / i for i in range(1, rank + 1)) / max(rank, 1)


LDAM_MARGINS = [0.4 * (2 / n) ** 0.25 for n in COUNTS.tolist()]

# (loss, options, the same for one example in plain Python floats)
CASES = [
  ('cross_entropy', {}, reference_cross_entropy),
  (
    'cross_entropy',
    {'label_smoothing': 0.1},
    lambda z, y: reference_cross_entropy(z, y, 0.1),
  ),
  ('sigmoid_cross_entropy', {}, lambda z, y: reference_sigmoid_focal(z, y, 0)),
  ('softmax_focal', {'gamma': 0.5}, lambda z, y: reference_softmax_focal(z, y, 0.5)),
  ('softmax_focal', {}, lambda z, y: reference_softmax_focal(z, y, 1)),
  ('softmax_focal', {'gamma': 2}, lambda z, y: reference_softmax_focal(z, y, 2)),
  ('sigmoid_focal', {'gamma': 0.5}, lambda z, y: reference_sigmoid_focal(z, y, 0.5)),
  ('sigmoid_focal', {}, lambda z, y: reference_sigmoid_focal(z, y, 1)),
  ('balanced_softmax', {}, lambda z, y: reference_prior(z, y, 1)),
  ('logit_adjustment', {'tau': 1.5}, lambda z, y: reference_prior(z, y, 1.5)),
  (
    'label_aware_smoothing',
    {},
    lambda z, y: reference_label_aware_smoothing(z, y, 0.3, 0.0),
  ),
  (
    'label_aware_smoothing',
    {'head': 0.4, 'tail': 0.1},
    lambda z, y: reference_label_aware_smoothing(z, y, 0.4, 0.1),
  ),
  ('vector_scaling', {}, lambda z, y: reference_vector_scaling(z, y, 0.3, 1.0)),
  (
    'vector_scaling',
    {'gamma': 0.15, 'tau': 1.25},
    lambda z, y: reference_vector_scaling(z, y, 0.15, 1.25),
  ),
  ('class_dependent_temperature', {}, lambda z, y: reference_temperature(z, y, 0.3)),
  (
    'class_dependent_temperature',
    {'gamma': 0.1},
    lambda z, y: reference_temperature(z, y, 0.1),
  ),
  (
    'ldam',
    {'max_margin': 0.4, 'scale': 10.0},
    lambda z, y: reference_margin(z, y, 10, LDAM_MARGINS),
  ),
  ('devise', {}, lambda z, y: sum(reference_ranking(z, y, 0.1))),
  ('devise', {'margin': 2}, lambda z, y: sum(reference_ranking(z, y, 2))),
  ('sje', {}, lambda z, y: max(reference_ranking(z, y, 1))),
  ('ale', {}, lambda z, y: reference_ale(z, y, 1)),
  ('negative_score', {}, lambda z, y: -z[y]),
  ('uniform_margin', {}, lambda z, y: reference_margin(z, y, 30, [0.5] * CLASSES)),
]
every_loss = pytest.mark.parametrize(
  'name, options, reference', CASES, ids=[f'{c[0]}-{c[1]}' for c in CASES]
)


def batch(seed=0):
  rng = np.random.default_rng(seed)
  logits = 2 * rng.normal(size=(BATCH, CLASSES))
  return logits, rng.integers(CLASSES, size=BATCH).astype(np.int32)


def derivatives(name, options):
  """(logits, labels, weights) -> values, gradient of the weighted sum, tangents."""
  loss = make_loss(name, COUNTS, **options)

  def evaluate(logits, labels, weights):
    def values(z):
      return loss({'logits': z}, {'label': labels})

    grads = jax.grad(lambda z: jnp.dot(weights, values(z)))(logits)
    return *jax.jvp(values, (logits,), (jnp.ones_like(logits),)), grads

  return jax.jit(evaluate)


def numerical_gradient(reference, z, y, step=1e-5):
  """Central differences of the reference, in plain Python floats."""
  shifted = [
    [[v + sign * step * (c == k) for k, v in enumerate(z)] for sign in (1, -1)]
    for c in range(len(z))
  ]
  return [(reference(up, y) - reference(down, y)) / (2 * step) for up, down in shifted]


def test_every_loss_has_a_case():
  assert {case[0] for case in CASES} == set(LOSSES)


@pytest.mark.parametrize('name', LOSSES)
def test_signature(name):
  first, second, *rest = inspect.signature(LOSSES[name]).parameters.values()
  assert (first.name, second.name) == ('logits', 'labels')
  assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in rest)


@every_loss
def test_values_and_gradients(name, options, reference):
  logits, labels = batch()
  weights = np.random.default_rng(1).uniform(size=BATCH)
  examples = list(zip(logits.tolist(), labels.tolist(), strict=True))
  expected = [reference(z, y) for z, y in examples]
  slopes = np.array([numerical_gradient(reference, z, y) for z, y in examples])
  with jax.enable_x64(True):
    values, tangents, grads = derivatives(name, options)(logits, labels, weights)
  assert values.dtype == np.float64
  assert values.shape == (BATCH,)
  np.testing.assert_allclose(values, expected, rtol=1e-12)
  np.testing.assert_allclose(grads, weights[:, None] * slopes, atol=1e-8)
  np.testing.assert_allclose(tangents, slopes.sum(1), atol=1e-8)


@every_loss
def test_float32(name, options, reference):
  """Single precision: alone and in a batch, with a mask and at extreme logits."""
  logits, labels = batch()
  logits = logits.astype(np.float32)
  evaluate = derivatives(name, options)
  examples = zip(logits.tolist(), labels.tolist(), strict=True)
  expected = np.array([reference(z, y) for z, y in examples])

  mask = (np.arange(BATCH) % 3 > 0).astype(np.float32)
  values, _, grads = evaluate(logits, labels, mask)
  assert values.dtype == np.float32
  np.testing.assert_allclose(values, expected, rtol=2e-5, atol=1e-6)
  total = expected[mask > 0].sum()
  np.testing.assert_allclose(np.dot(values, mask), total, rtol=2e-5)
  grads = np.asarray(grads)
  assert not grads[mask == 0].any()
  assert grads[(mask > 0) & (expected != 0)].any(axis=1).all()  # no margin violated: 0

  rows = 1e4 * np.array([[1, -1, 0, -1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
  extreme = np.concatenate([rows, -rows, 0 * rows[:1]]).astype(np.float32)
  every_label = np.tile(np.arange(CLASSES, dtype=np.int32), len(extreme))
  outcome = evaluate(
    np.repeat(extreme, CLASSES, axis=0), every_label, np.ones(BATCH, np.float32)
  )
  assert all(np.isfinite(array).all() for array in outcome)


EQUAL_COUNTS = np.full(CLASSES, 7)


@pytest.mark.parametrize(
  'name, options, counts, known',
  [
    ('softmax_focal', {'gamma': 0}, COUNTS, 'cross_entropy'),
    ('ldam', {'max_margin': 0}, COUNTS, 'cross_entropy'),
    ('uniform_margin', {'margin': 0}, COUNTS, 'cross_entropy'),
    ('balanced_softmax', {}, EQUAL_COUNTS, 'cross_entropy'),
    ('logit_adjustment', {'tau': 0}, COUNTS, 'cross_entropy'),
    ('logit_adjustment', {'tau': 1}, COUNTS, 'balanced_softmax'),
    ('label_aware_smoothing', {'head': 0, 'tail': 0}, COUNTS, 'cross_entropy'),
    (
      'label_aware_smoothing',
      {'head': 0.2, 'tail': 0.2},
      COUNTS,
      ('cross_entropy', {'label_smoothing': 0.2}),
    ),
    ('label_aware_smoothing', {'tail': 0}, EQUAL_COUNTS, 'cross_entropy'),
    ('vector_scaling', {'gamma': 0, 'tau': 0}, COUNTS, 'cross_entropy'),
    ('vector_scaling', {'gamma': 0, 'tau': 1}, COUNTS, 'balanced_softmax'),
    ('vector_scaling', {}, EQUAL_COUNTS, 'cross_entropy'),
    ('vector_scaling', {'tau': 0}, COUNTS, 'class_dependent_temperature'),
    ('class_dependent_temperature', {'gamma': 0}, COUNTS, 'cross_entropy'),
    ('ldam', {'max_margin': 0.3}, EQUAL_COUNTS, ('uniform_margin', {'margin': 0.3})),
  ],
)
def test_degenerate_parameters(name, options, counts, known):
  logits, labels = batch()
  known_name, known_options = known if isinstance(known, tuple) else (known, {})
  ours = make_loss(name, counts, **options)
  theirs = make_loss(known_name, counts, **known_options)

  @jax.jit
  def both(logits):
    given = {'logits': logits}, {'label': labels}
    return ours(*given), theirs(*given)

  np.testing.assert_allclose(*both(logits), rtol=1e-5, atol=1e-6)


def test_sigmoid_focal_without_focus_is_exactly_sigmoid():
  logits, labels = batch()
  logits = jnp.asarray(10 * logits, jnp.float32)
  focal = LOSSES['sigmoid_focal'](logits, labels, gamma=0.0)
  np.testing.assert_array_equal(focal, LOSSES['sigmoid_cross_entropy'](logits, labels))


def test_one_example_is_a_batch():
  logits, labels = batch()
  logits = jnp.asarray(logits, jnp.float32)
  loss = LOSSES['cross_entropy']
  np.testing.assert_allclose(
    loss(logits[3:4], labels[3:4])[0], loss(logits, labels)[3], rtol=1e-6
  )


PIXELS = (5, 7, 1)
"""A shape with `BATCH` labels."""


@pytest.mark.parametrize(
  'name, options, reference, reduction',
  [
    pytest.param(
      *case,
      reduction,
      marks=[pytest.mark.slow] * (reduction != 'mean' and case is not CASES[0]),
      id=f'{case[0]}-{case[1]}-{reduction}',
    )
    for case in CASES
    for reduction in REDUCTIONS
  ],
)
def test_pixels_and_the_label_that_counts_for_nothing(
  name, options, reference, reduction
):
  """Compared with sums of plain floats over labelled pixels."""
  logits, labels = batch()
  labelled = np.arange(BATCH) % 3 > 0
  weights = inverse_effective_number(COUNTS)
  w = weights[labels] * labelled
  expected = np.array(
    [reference(z, y) for z, y in zip(logits.tolist(), labels.tolist(), strict=True)]
  )
  slopes = np.array(
    [
      numerical_gradient(reference, z, y)
      for z, y in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
  )
  shares = w / (labelled.sum() if reduction == 'mean' else w.sum())
  void = np.where(labelled, labels, -1).astype(np.int32).reshape(PIXELS)
  evaluate = masked(name, options, reduction)
  values, objective, grads = evaluate(logits.reshape(*PIXELS, CLASSES), void, weights)
  assert values.shape == PIXELS
  assert not values[void < 0].any()
  assert not grads[void < 0].any()
  np.testing.assert_allclose(values.ravel(), expected * labelled, rtol=1e-12)
  np.testing.assert_allclose(objective, np.dot(shares, expected), rtol=1e-12)
  np.testing.assert_allclose(
    grads.reshape(BATCH, CLASSES), shares[:, None] * slopes, atol=1e-8
  )
  # No label at all: nothing is divided by nothing.
  for array in evaluate(
    logits.reshape(*PIXELS, CLASSES), np.full_like(void, -1), weights
  ):
    assert not array.any()


def masked(name, options, reduction):
  """(logits, labels, class weights) -> losses, objective and its gradient, float64."""
  loss = make_loss(name, COUNTS, **options)

  def evaluate(logits, labels, weights):
    def objective(z):
      values = loss({'logits': z}, {'label': labels})
      return jnp.vdot(REDUCTIONS[reduction](weights, labels), values), values

    (value, values), grads = jax.value_and_grad(objective, has_aux=True)(logits)
    return values, value, grads

  compiled = jax.jit(evaluate)

  def in_float64(*arrays):
    with jax.enable_x64(True):
      return [np.asarray(x) for x in compiled(*arrays)]

  return in_float64


@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_only_the_hardest_pixels_have_a_loss(reduction):
  """Against a sort in NumPy; void pixels are neither hard nor counted."""
  logits, labels = batch()
  void = np.where(np.arange(BATCH) % 3 > 0, labels, -1).astype(np.int32)
  n = int((void >= 0).sum())
  shaped = {'label': jnp.asarray(void.reshape(PIXELS))}

  def objective(z, hardest):
    losses = make_loss('cross_entropy', COUNTS, hardest=hardest)(
      {'logits': z.reshape(*PIXELS, CLASSES)}, shaped
    )
    return jnp.vdot(REDUCTIONS[reduction](np.ones(CLASSES), shaped['label']), losses)

  with jax.enable_x64(True):
    for hardest in (0.3, 1.0):
      kept = int(np.ceil(hardest * n))
      z = logits - np.log(np.exp(logits).sum(1, keepdims=True))
      losses = np.where(void >= 0, -z[np.arange(BATCH), labels], -np.inf)
      hard = np.argsort(-losses)[:kept]
      value, grad = jax.value_and_grad(objective)(jnp.asarray(logits), hardest)
      np.testing.assert_allclose(value, losses[hard].mean(), rtol=1e-12)
      expected = np.zeros((BATCH, CLASSES))
      expected[hard] = (np.exp(z[hard]) - np.eye(CLASSES)[labels[hard]]) / kept
      np.testing.assert_allclose(grad, expected, atol=1e-12)
    nothing = {'label': jnp.full_like(shaped['label'], -1)}
    z = {'logits': jnp.asarray(logits.reshape(*PIXELS, CLASSES))}
    assert not make_loss('cross_entropy', COUNTS, hardest=0.3)(z, nothing).any()
  for wrong in (0, 1.5, 'half'):
    with pytest.raises(UserError, match='loss.hardest must be more than 0'):
      make_loss('cross_entropy', COUNTS, hardest=wrong)


def test_a_custom_loss_is_masked_too(monkeypatch):
  """Even one that indexes with labels, for which -1 would be the last class."""

  def own(logits, labels):
    return -jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]

  monkeypatch.setitem(LOSSES, 'own', own)
  logits = jnp.arange(8.0).reshape(2, 2, 2)
  labels = jnp.array([[0, -1], [1, -1]])

  def total(z):
    return make_loss('own', COUNTS)({'logits': z}, {'label': labels}).sum()

  value, grads = jax.value_and_grad(total)(logits)
  assert value == -(0 + 5)
  np.testing.assert_array_equal(grads, [[[-1, 0], [0, 0]], [[0, -1], [0, 0]]])


@pytest.mark.parametrize(
  'name, logits, labels',
  [
    ('cross_entropy', np.zeros((2, CLASSES)), np.zeros(3, np.int32)),
    ('cross_entropy', np.zeros((2, CLASSES)), np.zeros(2)),
    ('cross_entropy', np.zeros((2, 3, CLASSES)), np.zeros((3, 2), np.int32)),
    ('ldam', np.zeros((2, CLASSES + 1)), np.zeros(2, np.int32)),
    ('logit_adjustment', np.zeros((2, CLASSES + 1)), np.zeros(2, np.int32)),
    ('label_aware_smoothing', np.zeros((2, CLASSES + 1)), np.zeros(2, np.int32)),
    ('vector_scaling', np.zeros((2, CLASSES + 1)), np.zeros(2, np.int32)),
  ],
)
def test_shapes_and_types_are_guarded(name, logits, labels):
  with pytest.raises(AssertionError):
    make_loss(name, COUNTS)({'logits': logits}, {'label': labels})


@pytest.mark.parametrize(
  'counts, expected',
  [
    (
      CIFAR10_LT_100,
      [0.1581, 0.1797, 0.2042, 0.2321, 0.2638, 0.2998, 0.3407, 0.3872, 0.4405, 0.5],
    ),
    # First and rarest class of CIFAR-10-LT with imbalance 200 and 10.
    ([5000, 25], [0.1330, 0.5]),
    ([5000, 500], [0.2812, 0.5]),
    # Classes 0, 50 and 99 of CIFAR-100-LT with imbalance 100.
    ([500, int(500 * 0.01 ** (50 / 99)), 5], [0.1581, 0.2841, 0.5]),
  ],
)
def test_ldam_margins(counts, expected):
  np.testing.assert_allclose(ldam_margins(counts), expected, atol=1e-4)


@pytest.mark.parametrize(
  'name, counts, options, message',
  [
    ('cross_entrpy', COUNTS, {}, "unknown loss 'cross_entrpy'; did you mean"),
    ('softmax_focal', COUNTS, {'gama': 1}, "'softmax_focal'.*'gama'.*'gamma'"),
    ('sigmoid_cross_entropy', COUNTS, {'gamma': 1}, "no option 'gamma'"),
    ('ldam', [5, 3, 0], {}, "loss 'ldam' .* class 2 has 0"),
    ('balanced_softmax', [0, 3, -1], {}, r'class 0 \(and 1 more\)'),
    ('vector_scaling', [5, 0, 3], {}, "'vector_scaling' .* class 1 has 0"),
    ('label_aware_smoothing', COUNTS, {'haed': 1}, "'haed'.*'head'"),
    ('logit_adjustment', np.ones((2, 2)), {}, r'\(2, 2\)'),
  ],
)
def test_user_errors(name, counts, options, message):
  with pytest.raises(UserError, match=message) as error:
    make_loss(name, counts, **options)
  assert '\n' not in str(error.value)


def test_empty_class_is_fine_where_counts_are_not_used():
  make_loss('cross_entropy', np.array([3, 0, 1]))


def test_reductions_differ_by_the_mean_weight():
  labels = batch()[1]
  rule = inverse_effective_number(COUNTS)
  weights = rule[labels]
  mean, normalised = (
    np.asarray(REDUCTIONS[name](jnp.asarray(rule, jnp.float32), labels))
    for name in ('mean', 'weight_normalised')
  )
  np.testing.assert_allclose(mean, weights / BATCH, rtol=1e-6)
  np.testing.assert_allclose(normalised, weights / sum(weights), rtol=1e-5)
  np.testing.assert_allclose(mean, normalised * weights.mean(), rtol=1e-5)


def test_reductions_agree_without_weights():
  ones, labels = jnp.ones(CLASSES), batch()[1]
  np.testing.assert_allclose(
    losses.mean(ones, labels), losses.weight_normalised(ones, labels), rtol=1e-7
  )


def test_the_mean_of_labels_that_all_count_is_the_usual_one_to_the_bit():
  weights = jnp.asarray(inverse_effective_number(COUNTS), jnp.float32)
  labels = jnp.asarray(batch()[1])
  usual = jax.jit(lambda w, y: w[y] / y.size)
  np.testing.assert_array_equal(
    jax.jit(losses.mean)(weights, labels), usual(weights, labels)
  )


@pytest.mark.parametrize('name', REDUCTIONS)
def test_reduction_of_zero_weights(name):
  zeros, labels = jnp.zeros(CLASSES), jnp.arange(3)
  np.testing.assert_array_equal(REDUCTIONS[name](zeros, labels), labels * 0.0)
  assert np.isfinite(jax.jacobian(REDUCTIONS[name])(zeros, labels)).all()


def test_training_metrics_leave_out_unlabelled_pixels():
  from lt_jax.methods.supervised import batch_metrics

  logits = jnp.array([[[2.0, 1, 0], [0, 1, 2]], [[0, 0, 1], [1, 0, 0]]])
  labels = jnp.array([[0, -1], [2, 1]])
  metrics = batch_metrics({'logits': logits}, {'label': labels}, jnp.full((2, 2), 3.0))
  np.testing.assert_array_equal(metrics['accuracy'], (2, 3))
  np.testing.assert_array_equal(metrics['class_loss'], [[3, 3, 3], [1, 1, 1]])
