"""Metrics by domain, their means, and the gap that a method covers."""

import numpy as np
import pytest

from lt_jax.evals.domains import by_domain, gap_coverage, mean_metrics


def test_a_domain_has_the_metrics_of_its_own_images():
  records = {'domain': np.array([0, 1, 1, 0]), 'x': np.array([1.0, 5.0, 7.0, 3.0])}
  found = by_domain(records, ['a', 'b'], lambda own: {'mean': own['x'].mean()})
  assert found == {'a': {'mean': 2.0}, 'b': {'mean': 6.0}}
  alone = by_domain({'x': records['x']}, ['a'], lambda own: {'mean': own['x'].mean()})
  assert alone == {'a': {'mean': 4.0}}


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
