"""Metrics: against cases made by hand, scikit-learn and the formulas."""

import functools
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax.errors import UserError
from lt_jax.evals.calibration import calibration
from lt_jax.evals.classification import across, measure, rank, record
from lt_jax.evals.closed_set import closed_set
from lt_jax.evals.open_set import (
  best_threshold,
  by_rule,
  f_measure,
  keep_threshold,
  open_auc,
  open_set,
  ranking,
)

MANY, FEW = np.array([True, True, False, False]), np.array([False, False, False, True])


def test_record_of_a_batch(rng):
  logits = rng.normal(size=(5, 3)).astype(np.float32)
  label = np.array([0, 1, 2, -1, 0], np.int32)
  found = record({'logits': jnp.asarray(logits)}, {'label': jnp.asarray(label)})
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  np.testing.assert_array_equal(found['prediction'], logits.argmax(1))
  np.testing.assert_allclose(found['confidence'], p.max(1), rtol=1e-5)
  np.testing.assert_allclose(found['known_score'], p.max(1), rtol=1e-5)
  loss = [-np.log(p[i, y]) if y >= 0 else 0 for i, y in enumerate(label)]
  np.testing.assert_allclose(found['loss'], loss, rtol=1e-5)
  order = np.argsort(-logits, axis=1)
  ranks = [
    list(row).index(y) if y >= 0 else 3 for row, y in zip(order, label, strict=True)
  ]
  np.testing.assert_array_equal(found['rank'], ranks)


def test_of_equal_logits_the_first_class_is_preferred():
  nan = np.nan
  logits = jnp.array([[1.0, 1, 1, 0], [1, 1, 1, 0], [nan, 0, 0, 0], [0, nan, 0, 0]])
  np.testing.assert_array_equal(rank(logits, jnp.array([0, 2, 0, 0])), [0, 2, 4, 1])


def test_five_guesses_if_there_are_more_classes():
  records = {
    'label': np.arange(6),
    'prediction': np.zeros(6, int),
    'confidence': np.full(6, 0.5),
    'rank': np.array([0, 4, 5, 1, 2, 9]),
    'loss': np.zeros(6),
  }
  assert measure(records, num_classes=6, groups={})['top5_accuracy'] == 4 / 6
  records['label'] = np.arange(6) % 5
  assert 'top5_accuracy' not in measure(records, num_classes=5, groups={})


def test_record_keeps_the_methods_own_score():
  outputs = {'logits': jnp.zeros((2, 3)), 'known_score': jnp.array([5.0, -1.0])}
  found = record(outputs, {'label': jnp.array([0, 1])})
  np.testing.assert_array_equal(found['known_score'], [5.0, -1.0])


def test_record_is_finite_at_huge_logits():
  outputs = {'logits': jnp.array([[1e4, -1e4], [-1e4, 1e4]])}
  found = record(outputs, {'label': jnp.array([0, 0])})
  assert np.isfinite(found['loss']).all() and found['loss'][1] == 2e4


def test_closed_set_by_hand():
  label = np.array([0, 0, 0, 0, 1, 1, 3, 3])
  prediction = np.array([0, 0, 0, 1, 1, 1, 3, 0])
  found = closed_set(
    label, prediction, num_classes=4, groups={'many': MANY, 'few': FEW}
  )
  assert found['accuracy'] == 6 / 8
  assert found['macro_accuracy'] == pytest.approx((0.75 + 1 + 0.5) / 3)
  assert found['many'] == (0.75 + 1) / 2
  assert found['few'] == 0.5
  assert found['worst_class'] == 0.5
  assert found['harmonic_mean'] == pytest.approx(3 / (1 / 0.75 + 1 + 2))
  assert found['classes_counted'] == 3
  assert np.isnan(found['class_accuracy'][2])


def test_nothing_is_as_large_as_the_square_of_the_classes(rng):
  label, prediction = rng.integers(0, 10_000, (2, 500))
  tracemalloc.start()
  closed_set(label, prediction, num_classes=10_000, groups={})
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 10e6  # counts of pairs would be 800 MB


def test_a_group_without_test_images_is_none_and_a_hopeless_class_zeroes_the_mean():
  empty = np.array([False, False, True, False])
  found = closed_set(
    np.array([0, 1, 1]), np.array([1, 1, 1]), num_classes=4, groups={'medium': empty}
  )
  assert found['medium'] is None
  assert found['harmonic_mean'] == 0.0


def test_rejected_images_are_wrong():
  found = closed_set(
    np.array([0, 1, 1]), np.array([-1, 1, -1]), num_classes=2, groups={}
  )
  assert found['accuracy'] == pytest.approx(1 / 3)


def test_calibration_by_hand():
  confidence = np.array([0.55, 0.58, 0.95, 0.99, 1.0])
  correct = np.array([True, False, True, True, False])
  found = calibration(confidence, correct, bins=10)
  expected = 2 / 5 * abs(0.5 - 0.565) + 3 / 5 * abs(2 / 3 - 2.94 / 3)
  assert found['ece'] == pytest.approx(expected)
  np.testing.assert_array_equal(found['bin_count'], [0] * 5 + [2, 0, 0, 0, 3])
  assert np.isnan(found['bin_accuracy'][0])


def test_calibration_is_a_sum_over_masks(rng):
  confidence = rng.uniform(0.1, 1, 1000)
  correct = rng.uniform(size=1000) < confidence**2
  total = 0.0
  for b in range(15):
    inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
    if inside.any():
      total += abs(correct[inside].sum() - confidence[inside].sum()) / 1000
  assert calibration(confidence, correct)['ece'] == pytest.approx(total)


# Known: right and sure, right and unsure, wrong and sure, wrong and unsure; open:
# accepted, rejected. The six images make every cell of both definitions.
LABEL = np.array([0, 1, 2, 3, -1, -1])
PREDICTION = np.array([0, 1, 0, 0, 2, 2])
SCORE = np.array([0.9, 0.2, 0.8, 0.1, 0.7, 0.3])


@pytest.mark.parametrize(
  ('definition', 'threshold', 'tp', 'fp', 'fn'),
  [
    ('oltr2019', 0.5, 1, 1, 1),
    ('oltr2020', 0.5, 1, 3, 1),
    ('oltr2019', 0.0, 2, 2, 2),
    ('oltr2020', 0.0, 2, 2, 2),
    ('oltr2019', 0.95, 0, 0, 0),
    ('oltr2020', 0.95, 0, 4, 0),
  ],
)
def test_f_measure_by_hand(definition, threshold, tp, fp, fn):
  precision, recall = tp / (tp + fp or 1), tp / (tp + fn or 1)
  expected = 2 * precision * recall / (precision + recall + 1e-12)
  found = f_measure(LABEL, PREDICTION, SCORE, threshold, definition=definition)
  assert found == pytest.approx(expected, abs=1e-9)


def test_precision_of_the_second_definition_is_accuracy_after_rejection():
  kept = SCORE >= 0.5
  known = LABEL >= 0
  accuracy = (known & kept & (LABEL == PREDICTION)).sum() / known.sum()
  f = f_measure(LABEL, PREDICTION, SCORE, 0.5, definition='oltr2020')
  recall = 1 / 2
  assert f == pytest.approx(2 * accuracy * recall / (accuracy + recall))


def test_ranking_counts_pairs(rng):
  known, other = rng.integers(0, 9, 40) / 8, rng.integers(0, 9, 30) / 12
  found = ranking(known, other)
  pairs = (known[:, None] > other) + 0.5 * (known[:, None] == other)
  assert found['auroc'] == pytest.approx(pairs.mean())
  threshold = max(t for t in known if (known >= t).mean() >= 0.95)
  assert found['fpr_at_95_tpr'] == pytest.approx((other >= threshold).mean())


def test_threshold_that_keeps_a_share():
  scores = np.arange(1, 101) / 100
  assert keep_threshold(scores) == 0.06
  assert (scores >= keep_threshold(scores)).mean() == 0.95
  assert keep_threshold(np.array([0.5])) == 0.5


def youden(label, prediction, score, threshold):
  del prediction
  kept = score >= threshold
  return kept[label >= 0].mean() - kept[label < 0].mean()


@pytest.mark.parametrize(
  ('by', 'value'),
  [
    ('f_measure', functools.partial(f_measure, definition='oltr2020')),
    ('youden', youden),
  ],
)
def test_best_threshold_is_the_lowest_of_the_best(rng, by, value):
  label = np.where(np.arange(60) < 40, rng.integers(0, 4, 60), -1)
  prediction = rng.integers(0, 4, 60)
  prediction[:25] = label[:25]
  score = (rng.integers(0, 16, 60) + 8 * (label >= 0)) / np.float32(24)  # with ties
  values = {t: value(label, prediction, score, t) for t in score.tolist()}
  expected = min(t for t, v in values.items() if v > max(values.values()) - 1e-9)
  assert best_threshold(label, prediction, score, by=by) == expected


@pytest.mark.parametrize('label', [[0, 1, 1], [-1, -1, -1]])
def test_best_threshold_needs_both_kinds_of_image(label):
  with pytest.raises(UserError, match='both known and open'):
    best_threshold(np.array(label), np.zeros(3, int), np.ones(3))


def test_best_threshold_of_an_unknown_criterion():
  with pytest.raises(UserError, match="did you mean 'youden'"):
    best_threshold(LABEL, PREDICTION, SCORE, by='yuden')


def test_open_auc_counts_pairs(rng):
  known, other = rng.integers(0, 9, 40) / 8, rng.integers(0, 9, 30) / 12
  right = rng.uniform(size=40) < 0.6
  pairs = (known[:, None] > other) + 0.5 * (known[:, None] == other)
  assert open_auc(right, known, other) == pytest.approx((pairs * right[:, None]).mean())
  everything = open_auc(np.ones(40, bool), known, other)
  assert everything == pytest.approx(ranking(known, other)['auroc'])


def test_open_set_names_both_definitions_and_both_thresholds():
  found = open_set(
    LABEL, PREDICTION, SCORE, 0.5, num_classes=4, groups={'many': MANY, 'few': FEW}
  )
  assert found['f_measure_oltr2019'] == pytest.approx(0.5)
  assert found['f_measure_oltr2020'] == pytest.approx(2 * 0.25 * 0.5 / 0.75)
  assert found['f_measure_oltr2019_at_0.1'] == pytest.approx(0.5)
  assert found['open_accuracy'] == 0.5
  assert found['known_accuracy'] == 0.25
  assert found['open_auc'] == pytest.approx((1 + 0) / 4)
  assert found['known_many'] == 0.5 and found['known_few'] == 0.0
  at = open_set(
    LABEL, PREDICTION, SCORE, 0.1, num_classes=4, groups={'many': MANY, 'few': FEW}
  )
  for name in ('open_accuracy', 'known_accuracy', 'known_many', 'known_few'):
    assert found[f'{name}_at_0.1'] == at[name]
  assert found['threshold'] == 0.5
  alone = open_set(LABEL, PREDICTION, SCORE, None, num_classes=4, groups={'many': MANY})
  assert alone['known_many_at_0.1'] == at['known_many']
  assert not alone.keys() & {'known_many', 'open_accuracy', 'threshold'}


def test_a_methods_own_rule_is_scored_beside_thresholds():
  """Two known images are kept, one of them right; of three open ones one is kept."""
  label = np.array([0, 1, 2, 3, -1, -1, -1])
  prediction = np.array([0, 0, 2, 3, 1, 2, 3])
  unknown = np.array([False, False, True, True, False, True, True])
  groups = {'many': MANY, 'few': FEW}
  found = by_rule(label, prediction, unknown, num_classes=4, groups=groups)
  assert found['f_measure_oltr2019_own_rule'] == pytest.approx(2 / (2 + 1 + 1))
  assert found['f_measure_oltr2020_own_rule'] == pytest.approx(2 / (2 + 3 + 1))
  assert found['open_accuracy_own_rule'] == pytest.approx(2 / 3)
  assert found['known_accuracy_own_rule'] == 0.25
  assert found['known_many_own_rule'] == 0.5 and found['known_few_own_rule'] == 0.0
  records = {
    name: {
      'label': label[rows],
      'prediction': prediction[rows],
      'confidence': np.full(len(label[rows]), 0.5),
      'known_score': np.full(len(label[rows]), 0.5),
      'energy': np.full(len(label[rows]), 0.5),
      'is_unknown': unknown[rows],
    }
    for name, rows in (('test', label >= 0), ('open_test', label < 0))
  }
  both = across(records, num_classes=4, groups=groups)
  assert found.items() <= both.metrics['test'].items()
  del records['test']['is_unknown']
  assert (
    not found.keys() & across(records, num_classes=4, groups=groups).metrics['test']
  )
