"""Intervals of differences, against SciPy and the formula of the deviation."""

import numpy as np
import pytest
import scipy.stats

from lt_jax.report import noise


@pytest.mark.parametrize('seeds', [2, 3, 7])
def test_the_t_interval_agrees_with_scipy(rng, seeds):
  ours, theirs = rng.normal(size=(2, seeds))
  expected = scipy.stats.ttest_rel(ours, theirs)
  interval = expected.confidence_interval(noise.LEVEL)
  found = noise.paired_t(ours, theirs)
  np.testing.assert_allclose(found[1:], [interval.low, interval.high], rtol=1e-9)
  assert found.within_noise == (expected.pvalue >= 1 - noise.LEVEL)


def test_equal_measurements_are_within_noise():
  assert noise.paired_t([0.5, 0.7], [0.5, 0.7]) == (0, 0, 0)
  assert noise.paired_t([0.5, 0.7], [0.5, 0.7]).within_noise
  assert not noise.Interval(1.0, 0.5, 1.5).within_noise
  for seeds in ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]):  # a difference of 0.2, every time
    found = noise.paired_t(np.add(seeds, 0.2), seeds)
    assert found.within_noise and not found.is_known


def accuracy_gain(counts):
  return (counts @ [1, -1, 0] / counts.sum(axis=1))[:, None]


def test_the_bootstrap_of_accuracies_has_the_deviation_of_their_difference():
  images = np.array([60, 40, 300])  # only ours right, only theirs, or both alike
  n, mean = images.sum(), 20 / 400
  error = np.sqrt((100 / n - mean**2) / n)
  (found,) = noise.paired_bootstrap(accuracy_gain, images)
  assert found.difference == mean
  expected = scipy.stats.norm(mean, error).interval(noise.LEVEL)
  np.testing.assert_allclose(found[1:], expected, atol=0.2 * error)
  assert found.within_noise == (abs(mean) < 1.96 * error)


def test_the_bootstrap_is_the_same_every_time_and_in_any_blocks(monkeypatch):
  found = noise.paired_bootstrap(accuracy_gain, [20, 10, 70])
  monkeypatch.setattr(noise, '_BLOCK', 300)
  assert noise.paired_bootstrap(accuracy_gain, [20, 10, 70]) == found


def test_draws_without_an_image_of_a_class_do_not_count():
  def of_the_first(counts):
    with np.errstate(invalid='ignore'):
      return counts[:, :1] / counts[:, :1]

  assert noise.paired_bootstrap(of_the_first, [1, 50]) == [(1, 1, 1)]
