"""Metrics by domain, their means, and the gap a method covers."""

import math

import numpy as np
import pytest

from lt_jax.evals.domains import (
  gap_coverage,
  mean_metrics,
  of_domains,
  proxy_a_distance,
  records_by_domain,
)


def test_a_domain_has_the_records_of_its_own_images():
  test = {'domain': np.array([0, 1, 1, 0]), 'x': np.array([1, 5, 7, 3])}
  other = {'x': np.array([9])}
  records = {'val': other, 'test': test, 'source/test': other, 'far/open_test': other}
  found = records_by_domain(records, ['a', 'b'])
  x = {name: own['x'].tolist() for name, own in found.items()}
  assert x == {'a': [1, 3], 'b': [5, 7], 'source': [9]}
  alone = records_by_domain({'test': {'x': test['x']}}, ['a'])
  assert list(alone) == ['a'] and alone['a']['x'] is test['x']


def test_of_each_domain_some_images_are_kept_evenly():
  def records(size, start):
    number = start + np.arange(size)
    return {
      'features': number[:, None] * 1.0,
      'label': number,
      'prediction': number,
      'logits': number,
    }

  kept = of_domains({'a': records(5, 0), 'b': records(2, 10)}, most=3)
  assert kept['label'].tolist() == [0, 2, 4, 10, 11]
  assert kept['features'].tolist() == [[0], [2], [4], [10], [11]]
  assert kept['domain'].tolist() == [0, 0, 0, 1, 1]
  assert kept['domains'].tolist() == ['a', 'b'] and 'logits' not in kept


@pytest.mark.parametrize('apart', [0.0, 1.0, 2.0, 12.0])
def test_the_distance_of_two_gaussians_is_that_of_the_best_linear_classifier(
  apart, rng
):
  """For equal spheres the best classifier errs by Phi(-apart / 2)."""
  source, target = rng.normal(size=(2, 1000, 5))
  target[:, 0] += apart
  scaled = np.array([100, 1, 1, 1e-3, 0])  # a scale that carries no information
  error = math.erfc(apart / 2 / math.sqrt(2)) / 2
  found = proxy_a_distance(source * scaled, 7 + target * scaled)
  shifted = proxy_a_distance(source * scaled, target * scaled)
  assert found == 2.0  # they differ everywhere
  assert shifted == pytest.approx(2 * (1 - 2 * error), abs=0.15)
  assert shifted == proxy_a_distance(source * scaled, target * scaled)


def test_domains_that_differ_in_size_count_alike(rng):
  """Otherwise always predicting the larger one would look good."""
  few, many = rng.normal(size=(200, 3)), rng.normal(size=(4000, 3))
  assert proxy_a_distance(few, many) < 0.4 and proxy_a_distance(many, few) < 0.4


def test_there_is_no_distance_of_too_few_features_or_of_infinite_ones(rng):
  features = rng.normal(size=(40, 3))
  assert proxy_a_distance(features[:19], features) is None
  assert proxy_a_distance(features, np.where(features > 1, np.inf, features)) is None


def test_every_domain_counts_alike_and_what_is_missing_does_not_count():
  one = {'accuracy': 0.5, 'few': None, 'by_class': np.array([1.0, np.nan, np.nan])}
  other = {'accuracy': 0.7, 'few': 0.2, 'by_class': np.array([0.0, 0.5, np.nan])}
  found = mean_metrics([one, other])
  assert found['accuracy'] == pytest.approx(0.6) and found['few'] is None
  np.testing.assert_array_equal(found['by_class'], [0.5, 0.5, np.nan])
  assert mean_metrics([one]) == one


@pytest.mark.parametrize(
  ('accuracy', 'source', 'target', 'covered'),
  [  # Ganin and Lempitsky, ICML 2015, table 1
    (0.8149, 0.5749, 0.9891, 0.579),
    (0.9048, 0.8665, 0.9244, 0.661),
    (0.7107, 0.5919, 0.9951, 0.295),
    (0.8866, 0.7400, 0.9987, 0.567),
  ],
)
def test_the_published_gaps_are_covered_as_published(accuracy, source, target, covered):
  assert gap_coverage(accuracy, source, target) == pytest.approx(covered, abs=2e-3)
  assert gap_coverage(accuracy, 0.5, 0.5) is None
