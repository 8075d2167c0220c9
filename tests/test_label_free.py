"""Criteria that choose a State without labels of the target."""

import types

import numpy as np
import pytest

from configs import digits_domains
from lt_jax import run
from lt_jax.config import resolve
from lt_jax.evals import label_free
from lt_jax.evals.label_free import Seen, centroid_rule, scores
from lt_jax.report import selection
from lt_jax.writers import read_rows

pytestmark = pytest.mark.usefixtures('one_device')


def records(rng, n=40, classes=3, dims=4, shift=0.0, labelled=False, sharp=1.0):
  """What `keep` would keep for n images."""
  logits = sharp * rng.normal(size=(n, classes))
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  found = {'log_p': log_p, 'features': rng.normal(size=(n, dims)) + shift}
  return found | ({'label': rng.integers(classes, size=n)} if labelled else {})


@pytest.fixture
def seen():
  rng = np.random.default_rng(0)
  return Seen(
    target=records(rng, shift=1.0),
    train=records(rng, n=60),
    val=records(rng, labelled=True),
  )


def test_scores_follow_the_formulas(seen):
  p = np.exp(seen.target['log_p'])
  found = scores(seen)
  entropies = [-sum(x * np.log(x) for x in row) for row in p]
  assert found['entropy'] == pytest.approx(np.mean(entropies), abs=1e-12)
  mean = p.mean(0)
  total = -(mean * np.log(mean)).sum()
  assert found['information'] == pytest.approx(total - np.mean(entropies), abs=1e-12)
  density = []
  for i, row in enumerate(p):
    others = [other for j, other in enumerate(p) if j != i]
    unit = [other / np.sqrt((other**2).sum()) for other in others]
    near = np.exp([(row / np.sqrt((row**2).sum())) @ u / 0.05 for u in unit])
    near /= near.sum()
    density.append(-(near * np.log(near)).sum())
  assert found['soft_neighbours'] == pytest.approx(np.mean(density), abs=1e-9)
  apart = seen.train['features'].mean(0) - seen.target['features'].mean(0)
  assert found['centroid_distance'] == pytest.approx(np.sqrt((apart**2).sum()))


def test_one_prediction_for_all_has_no_information():
  log_p = np.log(np.tile([0.98, 0.01, 0.01], (10, 1)))
  same = {'log_p': log_p, 'features': np.ones((10, 2))}
  assert label_free.information(Seen(same, same, None)) == pytest.approx(0)


def test_deep_embedded_validation_weighs_what_looks_like_the_target():
  """It is higher if the source images near the target are classified wrongly."""
  rng = np.random.default_rng(1)
  train, target = records(rng, n=400), records(rng, n=400, shift=1.5)
  val = records(rng, n=400, labelled=True)
  near = val['features'].mean(1) > 0
  right = np.log(np.full((400, 3), 0.05))
  right[np.arange(400), val['label']] = np.log(0.9)
  wrong = np.roll(right, 1, axis=1)
  bad_near = val | {'log_p': np.where(near[:, None], wrong, right)}
  bad_far = val | {'log_p': np.where(near[:, None], right, wrong)}
  risks = [
    label_free.deep_embedded(Seen(target, train, v)) for v in (bad_near, bad_far)
  ]
  assert risks[0] > risks[1] + 0.5
  assert 'deep_embedded' not in scores(Seen(target, train, None))
  # With the domains alike it is the mean loss.
  alike = label_free.deep_embedded(Seen(train, train, bad_near))
  of_label = np.take_along_axis(bad_near['log_p'], val['label'][:, None], 1)
  assert alike == pytest.approx(-of_label.mean(), abs=1e-6)


def test_the_centroid_rule_weighs_error_against_distance():
  error, distance = np.array([0.10, 0.04, 0.05]), np.array([1.0, 4.0, 2.0])
  assert centroid_rule(error, distance) == 2  # .14, .20, .13


def test_a_run_is_scored_and_chosen_without_labels(tmp_path):
  made = digits_domains.get_config('source_only,epochs=2.0')
  made.model.trunk, made.model.trunk_options = 'tiny_cnn', {'width': 4}
  made.evaluate_every_epochs, made.open_domains = 1.0, ()
  made.select = 'target/information'
  result = run.run(resolve(made), tmp_path)
  rows = [r for r in read_rows(tmp_path / 'metrics.jsonl') if r['split'] == 'target']
  assert len(rows) == 2 and set(label_free.CRITERIA) <= rows[0].keys()
  assert result['select'] == 'target/information'
  best = max(rows, key=lambda row: row['information'])
  assert result['step'] == best['step']


def test_the_report_compares_the_choices_of_rules():
  table = {'val': [0.9, 0.8], 'test': [0.3, 0.5]}
  rows = [
    {'stage': 'train', 'split': split, 'step': step, 'accuracy': value}
    for split, values in table.items()
    for step, value in enumerate(values, 1)
  ]
  scored = {'entropy': (0.1, 0.2), 'centroid_distance': (4.0, 1.0)}
  rows += [
    {'stage': 'train', 'split': 'target', 'step': i + 1}
    | {name: values[i] for name, values in scored.items()}
    for i in range(2)
  ]
  one = types.SimpleNamespace(
    rows=rows, result={'stage': 'train'}, headline='accuracy', measures_targets=True
  )
  group = types.SimpleNamespace(counted=[one], label='dann', anchor='dann')
  found = selection.selection_table([group])
  cells = dict(zip(found.headings, found.rows[0], strict=True))
  assert (cells['last'], cells['oracle'], cells['val/accuracy']) == (
    '50.0',
    '50.0',
    '30.0',
  )
  assert (cells['target/entropy'], cells['centroid rule']) == ('30.0', '50.0')
  assert 'target/information' not in cells  # was not measured
