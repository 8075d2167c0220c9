"""Class weights: published tables, limits, the switch of DRW, bad counts."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.effective_number import simulated, union
from lt_jax.class_weights import (
  CLASS_WEIGHTS,
  effective_number,
  inverse_effective_number,
  make_class_weights,
)
from lt_jax.errors import UserError, construct

# Counts int(n_max * (1/imbalance)^(c/(C-1))) and weights for beta = 0.9999.
TABLES = {
  'cifar10-200': (
    [5000, 2775, 1540, 854, 474, 263, 146, 81, 45, 25],
    [0.0282, 0.0457, 0.0777, 0.1354, 0.2394, 0.4270, 0.7647, 1.3740, 2.4687, 4.4392],
  ),
  'cifar10-100': (
    [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
    [0.0506, 0.0769, 0.1211, 0.1950, 0.3188, 0.5246, 0.8683, 1.4426, 2.4092, 3.9927],
  ),
  'cifar10-10': (
    [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
    [0.2923, 0.3584, 0.4442, 0.5555, 0.6997, 0.8858, 1.1266, 1.4375, 1.8415, 2.3585],
  ),
}


@pytest.mark.parametrize('table', TABLES)
def test_effective_number_tables(table):
  counts, expected = TABLES[table]
  np.testing.assert_allclose(
    inverse_effective_number(counts, beta=0.9999), expected, atol=1e-4
  )


def test_effective_number_of_cifar100():
  counts = [int(500 * 0.01 ** (c / 99)) for c in range(100)]
  weights = inverse_effective_number(counts)
  np.testing.assert_allclose(weights[[0, 50, 99]], [0.0449, 0.4571, 4.3783], atol=1e-4)


@pytest.mark.parametrize('beta', [0.0, 0.5, 0.9, 1 - 2**-30])
def test_the_effective_number_itself(beta):
  counts = np.array([[0, 1, 2], [7, 30, 1000]])
  exact = Fraction(beta)
  expected = [[float(sum(exact**k for k in range(int(n)))) for n in r] for r in counts]
  np.testing.assert_allclose(effective_number(counts, beta), expected, rtol=1e-13)
  found = effective_number(counts, prototypes=1 / (1 - beta))
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
  ('beta', 'prototypes', 'message'),
  [
    (1.0, None, r'needs beta in \[0, 1\), got 1.0'),
    (None, 0.5, 'needs prototypes of 1 or more, got 0.5'),
    (None, None, 'needs either beta or prototypes'),
    (0.5, 2, 'needs either beta or prototypes'),
  ],
)
def test_an_effective_number_of_nothing_is_rejected(beta, prototypes, message):
  with pytest.raises(UserError, match=message):
    effective_number(3, beta, prototypes=prototypes)


@pytest.mark.parametrize(('examples', 'prototypes'), [(1, 5), (3, 5), (40, 50)])
def test_random_regions_cover_the_effective_number(examples, prototypes):
  covered = simulated(examples, prototypes, 4000, np.random.default_rng(0))
  expected = effective_number(examples, prototypes=prototypes)
  error = covered.std(ddof=1) / np.sqrt(len(covered))
  assert abs(covered.mean() - expected) <= 4 * error + 1e-9
  assert (covered <= min(examples, prototypes) + 1e-9).all()


def test_regions_that_overlap_count_once():
  assert union(np.array([0.0, 0.25, 3.0]), 4) == pytest.approx(2.25)
  assert union(np.array([3.5, 0.25]), 4) == pytest.approx(1.75)  # around the end


@pytest.mark.parametrize('beta', [0.9, 1 - 2**-30])
def test_effective_number_is_the_formula(beta):
  """Uses exact arithmetic, so that cancellation in 1 - beta^n would show."""
  counts = [1000, 30, 7, 1]
  inverse = [(1 - Fraction(beta)) / (1 - Fraction(beta) ** n) for n in counts]
  expected = [float(4 * w / sum(inverse)) for w in inverse]
  np.testing.assert_allclose(
    inverse_effective_number(counts, beta), expected, rtol=1e-13
  )


def test_effective_number_limits():
  counts = np.array([10**6, 1000, 3])
  np.testing.assert_array_equal(inverse_effective_number(counts, 0.0), np.ones(3))
  np.testing.assert_array_equal(inverse_effective_number(counts, 0), np.ones(3))
  np.testing.assert_allclose(
    inverse_effective_number(counts, 1 - 1e-15),
    CLASS_WEIGHTS['inverse_frequency'](counts),
    rtol=1e-8,
  )


@pytest.mark.parametrize(
  'name, raw', [('inverse_frequency', [1, 4, 16]), ('inverse_square_root', [1, 2, 4])]
)
def test_power_weights(name, raw):
  expected = 3 * np.array(raw) / sum(raw)
  np.testing.assert_allclose(CLASS_WEIGHTS[name]([64, 16, 4]), expected, rtol=1e-12)


def weights_by(name, counts):
  """Returns the weights of a rule; of pixels, all are in one image."""
  rows = {'class_pixels': lambda: np.array([counts])}
  return construct(CLASS_WEIGHTS, 'rule', name, counts, options={}, **rows)


@pytest.mark.parametrize('name', CLASS_WEIGHTS)
def test_contract(name):
  counts = np.array([5000, 17, 1, 400])
  weights = weights_by(name, counts)
  assert weights.shape == (4,)
  np.testing.assert_allclose(weights.sum(), 4, rtol=1e-12)
  assert (np.diff(weights[np.argsort(counts)]) <= 0).all()
  np.testing.assert_allclose(weights_by(name, [9, 9]), [1, 1], rtol=1e-12)


def test_the_median_frequency_is_over_the_images_that_show_a_class(rng):
  pixels = rng.integers(1, 100, (20, 5)) * (rng.random((20, 5)) < (1, 0.8, 0.5, 0.2, 1))
  frequency = [
    sum(row[c] for row in pixels) / sum(row.sum() for row in pixels if row[c])
    for c in range(5)
  ]
  published = np.median(frequency) / np.array(frequency)
  weights = make_class_weights(
    'median_frequency', pixels.sum(0), class_pixels=lambda: pixels
  )
  np.testing.assert_allclose(weights(0), 5 * published / published.sum(), rtol=1e-6)


def test_switch_is_exactly_at_start_step():
  counts = TABLES['cifar10-100'][0]
  weights = jax.jit(make_class_weights('effective_number', counts, start_step=7))
  for step, expected in [
    (0, np.ones(10)),
    (6, np.ones(10)),
    (7, inverse_effective_number(counts)),
    (10**6, inverse_effective_number(counts)),
  ]:
    value = weights(jnp.int32(step))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_without_start_step_from_the_first_step_on():
  weights = make_class_weights('effective_number', [9, 1], beta=0.5)
  np.testing.assert_allclose(
    weights(jnp.int32(0)), inverse_effective_number([9, 1], 0.5), rtol=1e-6
  )


def test_uniform_allows_an_empty_class():
  np.testing.assert_array_equal(make_class_weights('uniform', [3, 0])(0), [1, 1])


@pytest.mark.parametrize(
  'name', ['effective_number', 'inverse_frequency', 'inverse_square_root']
)
@pytest.mark.parametrize('bad', [0, -2, np.nan])
def test_empty_class_is_named(name, bad):
  with pytest.raises(UserError, match=f'{name} .* class 1 has {bad}'):
    make_class_weights(name, [3, bad, 5])


@pytest.mark.parametrize('beta', [1.0, -0.1, 2, np.nan])
def test_beta_out_of_range(beta):
  with pytest.raises(UserError, match='beta'):
    inverse_effective_number([1, 2], beta)


@pytest.mark.parametrize(
  'name, options, message',
  [
    ('efective_number', {}, "did you mean 'effective_number'"),
    ('effective_number', {'betta': 0.9}, "no option 'betta'; did you mean 'beta'"),
    ('inverse_frequency', {'beta': 0.9}, "no option 'beta'"),
  ],
)
def test_user_errors(name, options, message):
  with pytest.raises(UserError, match=message):
    make_class_weights(name, [1, 2], **options)
