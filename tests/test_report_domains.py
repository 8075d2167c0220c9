"""The report by domain: the table, the marks, the warnings and the figures."""

import json

import numpy as np
import pytest
from etils import epath

from lt_jax import report
from lt_jax.report import domain_figures, domains, drawing, figures, runs, selection
from tests import test_report as plain

ALL = domain_figures.FIGURES | domain_figures.OF_ONE_RUN
ACCURACY = {'photo': 0.5, 'inverted': 0.3, 'source': 0.9, 'sketch': 0.1}
"""Domain -> test accuracy, in the order of result.json: the targets come first."""


def config(recipe='dann', seed=0, targets=('photo', 'inverted'), **changes):
  roles = {'target': targets, 'open_domains': ['sketch']}
  return plain.config(recipe, seed, stages={}, **roles, **changes)


def metrics(accuracy):
  classes = len(plain.COUNTS)
  by_class = [accuracy] * (classes - 1) + [None]
  groups = dict.fromkeys(('many', 'medium', 'few'), accuracy)
  return {'accuracy': accuracy, 'class_accuracy': by_class, **groups}


def write_run(folder, made=None, accuracy=ACCURACY, judge=()):
  """Writes the files of a run with four domains; returns the folder.

  In the domain `inverted` it always predicts class 0.
  """
  made = made or config()
  plain.write_run(folder, made, accuracy['photo'])
  path = folder / 'result.json'
  targets = made['target']
  mean = float(np.mean([accuracy[name] for name in targets]))
  every = np.mean([accuracy[name] for name in (*targets, 'sketch')])
  shown = [*targets, 'source', 'sketch']
  result_of_domains = {
    'domains': {name: metrics(accuracy[name]) for name in shown},
    'domain_means': {'compound': metrics(mean), 'compound_open': metrics(float(every))},
    'a_distance': {name: 0.5 + number for number, name in enumerate(targets)},
  }
  result = json.loads(path.read_text())
  result['test']['accuracy'] = mean
  path.write_text(json.dumps(result | result_of_domains))
  rng, classes = np.random.default_rng(0), len(plain.COUNTS)
  label = np.tile(np.repeat(np.arange(classes), 4), len(targets))
  domain = np.repeat(np.arange(len(targets)), len(label) // len(targets))
  prediction = np.where(domain == 0, label, 0)
  arrays = {'label': label, 'prediction': prediction, 'domain': domain}
  for name in ('source', 'sketch'):
    arrays |= {f'{name}/label': label[:20], f'{name}/prediction': label[:20]}
  confidence = np.full(len(label), 0.5, np.float32)
  np.savez(folder / 'predictions.npz', domains=shown, confidence=confidence, **arrays)
  np.savez(
    folder / 'features.npz',
    features=rng.normal(size=(20, 6)).astype(np.float16),
    label=np.tile(np.arange(classes), 4),
    prediction=np.zeros(20, int),
    domain=np.repeat(np.arange(4), 5)[:20] % len(shown),
    domains=shown,
    centroids=rng.normal(size=(classes, 6)).astype(np.float16),
  )
  splits = ['train', 'test', *(f'{name}/test' for name in shown)]
  rows = [
    {'stage': 'train', 'split': split, 'step': step, 'accuracy': 0.5, 'loss': 1.0}
    for step in (10, 20)
    for split in splits
  ]
  rows += [
    {'stage': 'train', 'split': 'train', 'step': step, 'domain_accuracy': right}
    for step, right in enumerate(judge)
  ]
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'metrics.jsonl').write_text(text)
  return folder


def groups_of(folder):
  return runs.grouped(runs.find(epath.Path(folder)))[0]


def table_of(folder):
  """Method -> heading -> cell."""
  table = domains.domains_table(groups_of(folder))
  head = table.headings
  return {row[0]: dict(zip(head, row, strict=True)) for row in table.rows}


def test_the_table_has_every_domain_its_means_and_distances(tmp_path):
  for seed, accuracy in enumerate((0.4, 0.6)):
    write_run(tmp_path / f'{seed}', config(seed=seed), ACCURACY | {'photo': accuracy})
  assert table_of(tmp_path) == {
    'dann': {
      'method': 'dann',
      'source': '90.0 ± 0.0',
      'photo (target)': '50.0 ± 14.1',
      'inverted (target)': '30.0 ± 0.0',
      'sketch (open)': '10.0 ± 0.0',
      'mean of targets': '40.0 ± 7.1',
      'mean of targets and open': '30.0 ± 4.7',
      'A-distance of photo': '0.50 ± 0.00',
      'A-distance of inverted': '1.50 ± 0.00',
    }
  }


def write_sweep(folder, accuracies, **changes):
  """Writes one run per seed, given recipe -> accuracies on photo and inverted."""
  for recipe, (photo, inverted) in accuracies.items():
    for seed in (0, 1):
      found = ACCURACY | {'photo': photo + 0.1 * seed, 'inverted': inverted}
      write_run(folder / recipe / str(seed), config(recipe, seed, **changes), found)


SWEEP = {
  'source_only': (0.3, 0.2),  # 0.275 over targets and seeds
  'dann': (0.5, 0.1),  # 0.325
  'mcc': (0.2, 0.2),  # 0.225
  'target_only': (0.8, 0.1),  # 0.475
}


def test_gap_coverage_is_of_means_over_targets_and_seeds(tmp_path):
  write_sweep(tmp_path, SWEEP)
  table = table_of(tmp_path)
  assert {name: row['gap covered'] for name, row in table.items()} == {
    'source_only': '0 %',
    'dann': '25.0 % (negative transfer on inverted)',
    'mcc': '-25.0 % (negative transfer)',
    'target_only': '100.0 %',
  }


def test_without_target_only_points_are_counted_from_source_only(tmp_path):
  write_sweep(tmp_path, {k: v for k, v in SWEEP.items() if k != 'target_only'})
  table = table_of(tmp_path)
  assert {name: row['points above source_only'] for name, row in table.items()} == {
    'source_only': '0',
    'dann': '+5.0 (negative transfer on inverted)',
    'mcc': '-5.0 (negative transfer)',
  }


def test_a_control_of_other_targets_or_data_is_none(tmp_path):
  write_sweep(tmp_path / 'both', SWEEP)
  alone = tmp_path / 'alone'
  write_sweep(alone, {'dann': (0.5, 0.1)}, targets=('photo',))
  assert table_of(alone)['dann'].get('gap covered') is None
  found = table_of(tmp_path)
  (other,) = (
    name for name in found if name.startswith('dann') and "'inverted'" not in name
  )
  assert found[other]['gap covered'] == 'n/a'
  assert found['mcc']['gap covered'] == '-25.0 % (negative transfer)'


@pytest.mark.parametrize(
  ('judge', 'message'),
  [
    ((0.7, 0.9, 0.99, 1.0), 'always wins'),
    ((0.5, 0.52, 0.48, 0.5), 'always loses'),
    ((0.9, 0.8, 0.6, 0.5), ''),
    ((1.0, 1.0), ''),  # too few rows
  ],
)
def test_a_discriminator_that_never_plays_is_reported_once(tmp_path, judge, message):
  for seed in (0, 1):
    write_run(tmp_path / f'{seed}', config(seed=seed), judge=judge)
  lines = domains.discriminator_notes(groups_of(tmp_path))
  assert len(lines) == bool(message)
  for line in lines:
    assert line.startswith(f'Warning of dann: the discriminator {message}')
    assert line.endswith('(seeds 0, 1).')


@pytest.fixture
def by_domain_only(monkeypatch):
  """Reports without the figures that every run has."""
  for family in ('FIGURES', 'COMPARISONS', 'OF_ONE_RUN'):
    monkeypatch.setattr(figures, family, {})


def test_a_run_has_its_figures_by_domain_in_the_page(by_domain_only, tmp_path):
  folder = write_run(tmp_path / 'run', judge=(1.0,) * 4)
  page = plain.page_of(folder)
  drawn = {path.stem for path in (folder / 'figures').iterdir()}
  assert drawn == ALL.keys() and 'not drawn' not in page.text
  assert len(set(page.ids)) == len(page.ids)
  assert all(link[1:] in page.ids for link in page.links if link.startswith('#'))
  for text in ('By domain', 'photo (target)', 'A-distance', 'always wins'):
    assert text in page.text
  for name in ('report.md', 'report.tex'):
    assert 'photo (target)' in (folder / name).read_text()


def test_methods_are_compared_by_domain(by_domain_only, tmp_path, monkeypatch):
  monkeypatch.setattr(domain_figures, 'FIGURES', {})
  write_sweep(tmp_path, {name: SWEEP[name] for name in ('dann', 'source_only')})
  report.write(epath.Path(tmp_path))
  assert (tmp_path / 'figures/compare_domains.svg').exists()
  figure, _ = domain_figures.compare_domains(groups_of(tmp_path))
  (axes,) = figure.axes
  titles = [text.get_text() for text in figure.legends[0].get_texts()]
  assert titles == ['source', 'photo (target)', 'inverted (target)', 'sketch (open)']
  means = [bar.lines[0].get_xdata().tolist() for bar in axes.containers]
  assert means[1] == pytest.approx([35, 55]) and means[3] == pytest.approx([10, 10])


def test_a_collapse_is_seen_in_the_histogram(tmp_path):
  run = runs.Run(epath.Path(write_run(tmp_path / 'run')), 'run')
  figure, caption = domain_figures.domain_predictions([run])
  titles = [axes.get_title() for axes in figure.axes]
  assert titles == [
    'source: entropy 1.00',
    'photo (target): entropy 1.00',
    'inverted (target): entropy 0.00',
    'sketch (open): entropy 1.00',
  ]
  heights = [[bar.get_height() for bar in axes.patches] for axes in figure.axes]
  assert heights[2] == [100, 0, 0, 0, 0] and heights[0] == pytest.approx([20] * 5)
  assert 'mode collapse' in caption


def test_features_have_the_colours_of_domains_and_beside_them_of_classes(tmp_path):
  run = runs.Run(epath.Path(write_run(tmp_path / 'run')), 'run')
  figure, _ = domain_figures.domain_features([run])
  sizes = [
    [len(dots.get_offsets()) for dots in axes.collections] for axes in figure.axes
  ]
  assert sizes == [[5] * 4, [4] * 5]
  figure, caption = figures.features([run])
  assert '10 test features' in caption  # for the two targets only


def test_curves_are_of_source_targets_and_open_domains(tmp_path):
  run = runs.Run(epath.Path(write_run(tmp_path / 'run', judge=(0.9, 0.8))), 'run')
  figure, _ = domain_figures.domain_training([run])
  accuracy, judge = figure.axes
  assert [line.get_label() for line in accuracy.lines] == [
    'training images',
    'source',
    'photo (target)',
    'inverted (target)',
    'sketch (open)',
  ]
  assert judge.lines[0].get_ydata()[-2:] == pytest.approx([90, 80])


def test_an_order_and_what_is_borrowed_are_shown_by_domain(by_domain_only, tmp_path):
  """For a run that wrote them: which domain comes first, and which borrows more."""
  folder = write_run(tmp_path / 'run')
  targets = np.array(['photo', 'inverted'])
  score = np.r_[np.linspace(0, 1, 40), np.linspace(1.5, 2, 40)]
  np.savez(
    folder / 'order.npz', score=score, domain=np.repeat([0, 1], 40), domains=targets
  )
  every = np.array([*targets, 'source', 'sketch'])
  np.savez(
    folder / 'borrowed.npz',
    borrowed=np.repeat(np.arange(4.0), 10),
    domain=np.repeat(np.arange(4), 10),
    domains=every,
  )
  run = runs.Run(epath.Path(folder), 'run')
  figure, _ = domain_figures.domain_order([run])
  left, right = figure.axes
  assert [one.get_label() for one in left.patches] == [
    'photo (target)',
    'inverted (target)',
  ]
  shares = [one.get_data().values for one in right.patches]
  np.testing.assert_allclose(shares, [[100] * 5 + [0] * 5, [0] * 5 + [100] * 5])
  figure, _ = domain_figures.domain_borrowed([run])
  (axes,) = figure.axes
  assert [text.get_text() for text in axes.get_yticklabels()][0] == 'source'
  medians = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == 'o']
  assert medians == [2, 0, 1, 3]  # source, both targets, the open domain
  plain.page_of(folder)
  drawn = {path.stem for path in (folder / 'figures').iterdir()}
  assert drawn == {*ALL, *domain_figures.OF_FILES}


@pytest.mark.parametrize('name', ['features.npz', 'predictions.npz'])
def test_files_of_an_earlier_version_cost_their_figure_alone(tmp_path, name):
  folder = write_run(tmp_path / 'run')
  with np.load(folder / name) as stored:
    kept = {key: stored[key] for key in stored if 'domain' not in key}
  np.savez(folder / name, **kept)
  run, figure = runs.Run(epath.Path(folder), 'run'), f'domain_{name.partition(".")[0]}'
  drawn = drawing.draw(figure, ALL[figure], [run], 'page')
  assert drawn.svg == '' and f'{name} has no domains' in drawn.caption


def test_a_run_of_one_domain_has_none_of_this(by_domain_only, tmp_path):
  folder = plain.write_run(tmp_path / 'run')
  page = plain.page_of(folder)
  assert 'By domain' not in page.text and 'not drawn' not in page.text
  assert not list((folder / 'figures').iterdir())


def without_target_metrics(folder):
  """Removes what a run cannot know of targets without labels."""
  path = folder / 'result.json'
  result = json.loads(path.read_text())
  for name in ('photo', 'inverted'):
    del result['domains'][name]
  path.write_text(json.dumps(result))


def test_a_target_without_labels_is_not_judged_by_the_source(tmp_path):
  for recipe, accuracy in (('source_only', 0.6), ('dann', 0.4)):
    folder = write_run(
      tmp_path / recipe, config(recipe), ACCURACY | {'photo': accuracy}
    )
    without_target_metrics(folder)
  table = table_of(tmp_path)
  assert table['dann'] == {
    'method': 'dann',
    'source': '90.0',
    'sketch (open)': '10.0',
    'mean of source and open': table['dann']['mean of source and open'],
    'A-distance of photo': '0.50',
    'A-distance of inverted': '1.50',
  }
  groups = groups_of(tmp_path)
  lines = domains.remarks(domains.domains_table(groups), groups)
  assert 'those of the target' not in lines[0] and 'means over' not in lines[0]
  assert lines[1].startswith('The target of ') and 'dann' in lines[1]
  assert not selection.selection_table(groups).rows


def test_controls_without_labels_of_the_target_leave_the_others_compared(tmp_path):
  write_run(tmp_path / 'source_only', config('source_only'))
  write_run(tmp_path / 'dann', config('dann'))
  without_target_metrics(write_run(tmp_path / 'cdan', config('cdan')))
  table = table_of(tmp_path)
  assert table['cdan']['points above source_only'] == 'n/a'
  assert table['dann']['points above source_only'] == '+0.0'
