"""The report: numbers over seeds, rejected input, escaping, figures."""

import base64
import html.parser
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import urllib.parse
import warnings
from collections import Counter
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.stats
from etils import epath
from PIL import Image

from configs import cifar10_lt, places_lt
from lt_jax import report
from lt_jax.config import resolve
from lt_jax.errors import UserError
from lt_jax.evals import classification
from lt_jax.report import (
  across,
  curves,
  differences,
  drawing,
  figures,
  grids,
  learned,
  pictures,
  published,
  runs,
  tables,
)

COUNTS = (200, 90, 30, 8, 3)
NAMES = ('cat', '<script>alert(1)</script>', 'a & "b"', '$x_1$', 'x|y')
ALL = figures.FIGURES | figures.OF_ONE_RUN
RUN_FIGURES = set(ALL)
ARRAYS = {
  'predictions.npz': {'confusion', 'reliability'},
  'open_set.npz': {'open_set'},
  'weights.npz': {'weights', 'epsilons'},
  'features.npz': {'features'},
}
"""file -> the figures made from it."""

WEIGHTS = ('prior', 'mean', 'spread', 'learned')


def config(recipe='ce', seed=0, **changes):
  data = {
    'many_shot': 100,
    'few_shot': 20,
    'imbalance': 100.0,
    'profile': 'exponential',
  }
  made = {
    'name': 'cifar10_lt',
    'recipe': recipe,
    'seed': seed,
    'epochs': 200.0,
    'data': data,
    'model': {'trunk': 'resnet32'},
    'stages': {'plain': {}, 'second': {'surgeries': [['copy', {'pattern': '.*'}]]}},
    **changes,
  }
  return json.loads(json.dumps(made))


STARTED = {'event': 'started', 'time': 1, 'pid': 1, 'host': ''}
DIVERGED = {'event': 'diverged', 'time': 2, 'stage': 'train', 'step': 15, 'see': ''}


def add_events(folder, *rows):
  """Adds rows to events.jsonl."""
  with (folder / 'events.jsonl').open('a') as file:
    file.writelines(json.dumps(row) + '\n' for row in rows)


def write_run(folder, made=None, accuracy=0.5, counts=COUNTS, names=NAMES):
  """Writes the files of a finished run, with random arrays; returns the folder."""
  made = made or config()
  rng = np.random.default_rng(made['seed'])
  classes = len(counts)
  folder.mkdir(parents=True)
  label = np.repeat(np.arange(classes), 10)
  predicted = {
    'prediction': rng.integers(0, classes, len(label), np.int32),
    'confidence': rng.uniform(0.2, 1, len(label)).astype(np.float32),
  }
  np.savez(folder / 'predictions.npz', label=label, **predicted)
  np.savez(
    folder / 'features.npz',
    features=rng.normal(size=(len(label), 6)).astype(np.float16),
    label=label,
    prediction=label,
    centroids=rng.normal(size=(classes, 6)).astype(np.float16),
  )
  np.savez(
    folder / 'samples.npz',
    image=rng.integers(0, 255, (3, 8, 8, 1), np.uint8),
    label=np.array([1, 3, 4]),
    prediction=np.array([0, 1, 0]),
    confidence=np.float32([0.9, 0.8, 0.7]),
  )
  falling = np.linspace(1, 0, 20)
  curve = dict.fromkeys(
    ('f_measure_oltr2019', 'f_measure_oltr2020', 'known_accuracy', 'open_accuracy'),
    falling,
  )
  scores = {
    f'{score}/{name}': values
    for score in ('known_score', 'energy')
    for name, values in {'threshold': falling, **curve}.items()
  }
  np.savez(folder / 'open_set.npz', **scores)
  vectors = {name: rng.random((4, classes)) for name in WEIGHTS}
  np.savez(
    folder / 'weights.npz', counts=np.array(counts), step=np.arange(4), **vectors
  )
  rows = [
    {'stage': stage, 'split': split, 'step': step, 'loss': 1.0, 'accuracy': 0.5}
    for stage in ('plain', 'second')
    for step in (10, 20)
    for split in ('train', 'test')
  ]
  rows[-2]['loss'] = None  # not finite
  rows[0]['learning_rate'] = rows[4]['learning_rate'] = 0.1
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'metrics.jsonl').write_text(text)
  add_events(folder, STARTED)
  (folder / 'config.json').write_text(json.dumps(made))
  facts = {'class_names': names, 'counts': {'train': counts}, 'fingerprint': 'f' * 64}
  (folder / 'data.json').write_text(json.dumps(facts))
  test = {
    'accuracy': accuracy,
    'many': 0.75,
    'medium': accuracy,
    'few': 0.25,
    'class_accuracy': [accuracy] * (classes - 1) + [None],
    'ece': 0.125,
    'auroc': 0.5,
  }
  result = {
    'test': test,
    'threshold': {'value': 0.5, 'chosen_by': 'fixed'},
    'best_on_test': {'accuracy': accuracy + 0.05, 'step': 10, 'epoch': 1},
    'wall_seconds': 1.5,
    'device': '1 x cpu',
    'state_sha256': 'ab' * 32,
  }
  (folder / 'result.json').write_text(json.dumps(result))
  return folder


class Page(html.parser.HTMLParser):
  """A parsed page: tags, ids, references, and the text between tags."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.ids, self.links, self.text = Counter(), [], [], ''
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags[tag] += 1
    for name, value in attrs:
      if name == 'id':
        self.ids.append(value)
      if name in ('href', 'src', 'xlink:href'):
        self.links.append(value)
      self.links += re.findall(r'url\((.+?)\)', value or '')

  def handle_data(self, data):
    self.text += data


def page_of(folder):
  return Page(report.write(folder).read_text())


def svgs(folder):
  """Returns the parsed figures of a run's report; checks that the page has the same."""
  text = (folder / 'report.html').read_text()
  found = re.findall(r'<svg .*?</svg>', text, re.DOTALL)
  return [ElementTree.fromstring(svg) for svg in found]


@pytest.fixture
def run_folder(tmp_path):
  return write_run(tmp_path / 'run <b>1')


def test_a_run_has_every_figure_in_one_page(run_folder):
  page = page_of(run_folder)
  drawn = svgs(run_folder)
  assert page.tags['svg'] == len(drawn) == len(RUN_FIGURES)
  for svg in drawn:
    size = [float(svg.get(name)) for name in ('width', 'height')]
    box = [float(number) for number in svg.get('viewBox').split()]
    assert min(*size, *box[2:]) > 100 and svg.get('aria-label')
  saved = {path.stem for path in (run_folder / 'figures').iterdir()}
  assert saved == RUN_FIGURES
  for path in (run_folder / 'figures').iterdir():
    assert 'prefers-color-scheme' in ElementTree.parse(path).getroot()[0].text
  assert page.tags['img'] == 3
  assert 'not drawn' not in page.text


def test_ids_are_unique_and_references_lead_somewhere_without_a_network(tmp_path):
  for recipe in ('ce', 'l2rw'):
    write_run(tmp_path / recipe, config(recipe))
  page_of(tmp_path / 'ce')
  page = page_of(tmp_path)
  assert len(set(page.ids)) == len(page.ids) > 2
  for link in page.links:
    if link.startswith('#'):
      assert link[1:] in page.ids
    elif not link.startswith('data:image/'):
      assert (tmp_path / urllib.parse.unquote(link)).exists()
  for address in ('ce/report.html', 'l2rw/'):  # from both tables with a row a run
    assert page.links.count(address) == 2
  text = (tmp_path / 'report.html').read_text()
  assert "default-src 'none'" in text
  assert set(re.findall(r'https?://[^"\' ]*', text)) <= {*drawing.NAMESPACES.values()}


def test_names_and_paths_are_text(run_folder):
  page = page_of(run_folder)
  assert page.tags['script'] == 1 and page.tags['b'] == 0
  assert NAMES[1] in page.text  # a sample, with labels and predictions
  assert str(run_folder) in page.text
  for figure in ('confusion', 'class_accuracy'):
    path = run_folder / f'figures/{figure}.svg'
    text = ''.join(ElementTree.parse(path).getroot().itertext())
    assert 'a & "b"' in text and '$x_1$' in text and '<script>aler' in text


def test_characters_that_text_cannot_hold_are_replaced(tmp_path):
  names = ('\x00\x1b[31m', '\udc80', '\n', '漢字', 'x' * 200)
  run = runs.Run(write_run(tmp_path / 'run', names=names), 'run')
  drawn = drawing.draw('confusion', figures.confusion, [run], 'page')
  text = ''.join(ElementTree.fromstring(drawn.svg).itertext())
  assert '\ufffd\ufffd[31m' in text and '漢字' in text and '\x1b' not in text
  assert 'DejaVu' not in drawn.svg and drawing.FONTS.split(',')[0] in drawn.svg


def test_names_of_any_script_stay_whole_and_have_room(tmp_path):
  family = '\U0001f469\u200d\U0001f469\u200d\U0001f467'
  names = ('می\u200cخواهم', family, '蝴蝶與花園的長名稱', 'e\u0301' * 14, 'cat')
  run = runs.Run(write_run(tmp_path / 'run', names=names), 'run')
  assert tuple(run.class_names) == names
  shown = [drawing.shortened(name).replace(drawing.ROOM, '') for name in names]
  assert shown == [*names[:2], '蝴蝶與花園的…', *names[3:]]
  assert drawing.shortened('x' * 15) == 'x' * 13 + '…'
  figure, _ = figures.confusion([run])
  (axes,) = figure.axes
  with warnings.catch_warnings(action='ignore'):  # of missing glyphs
    figure.draw_without_rendering()
    _, _, wide, _, latin = (
      label.get_window_extent().width / figure.dpi for label in axes.get_yticklabels()
    )
  size = axes.get_yticklabels()[0].get_size() / 72
  assert wide > 6.5 * size > latin  # an em a character, and the dots


@pytest.mark.slow
def test_the_same_files_give_the_same_page(run_folder):
  first = report.write(run_folder).read_bytes()
  assert report.write(run_folder).read_bytes() == first


@pytest.fixture
def tables_only(monkeypatch):
  """Reports without figures, for tests of numbers and text."""
  for family in ('FIGURES', 'COMPARISONS', 'OF_ONE_RUN'):
    monkeypatch.setattr(figures, family, {})


def row_of(folder, label):
  lines = (folder / 'report.md').read_text().splitlines()
  rows = [[text.strip() for text in line.strip('|').split(' | ')] for line in lines]
  head = next(row for row in rows if row[0] == 'method')
  return dict(zip(head, next(r for r in rows if r[0] == label), strict=True))


def test_means_and_deviations_are_over_seeds(tables_only, tmp_path):
  values = (0.5, 0.75, 0.7)
  for seed, accuracy in enumerate(values):
    write_run(tmp_path / f'ce/{seed}', config(seed=seed), accuracy)
  report.write(tmp_path)
  row = row_of(tmp_path, 'ce')
  assert row['runs'] == '3 finished'
  deviation = np.sqrt(sum((100 * (v - 0.65)) ** 2 for v in values) / 2)
  assert row['accuracy'] == f'65.0 ± {deviation:.1f}'
  assert row['many-shot'] == '75.0 ± 0.0'
  latex = (tmp_path / 'report.tex').read_text()
  assert rf'65.0 $\pm$ {deviation:.1f}' in latex and r'\toprule' in latex


def test_every_table_has_its_title_and_its_note_beside_it(tables_only, tmp_path):
  for recipe in ('ce', 'ldam_drw'):
    write_run(tmp_path / recipe, config(recipe))
  page = page_of(tmp_path)
  text = (tmp_path / 'report.md').read_text()
  first, second = text.split('## Differences from ce\n\n')
  assert first.startswith('## Results\n\nTest metrics in %.\n\n| method')
  assert second.startswith('Difference in points with its 95 % interval. Noise may')
  assert 'grey' not in text and 'Such differences are grey' in page.text
  latex = (tmp_path / 'report.tex').read_text()
  assert '% Differences from ce\n% Difference in points' in latex


def test_a_run_alone_has_a_list_of_its_metrics(tables_only, tmp_path):
  folder = write_run(tmp_path / 'run')
  path = folder / 'result.json'
  result = json.loads(path.read_text()) | {'step': 20, 'select': 'val/accuracy'}
  result['test']['medium'] = None  # there is no such class
  path.write_text(json.dumps(result))
  add_events(folder, STARTED | {'command': 'python -m lt_jax.main --config=x'})
  page = page_of(folder)
  for text in (
    'Checkpoint of step 20 (best val/accuracy), trained in 2 s',
    'below 0.5: this threshold is fixed',
  ):
    assert text in page.text
  assert 'Command: python -m lt_jax.main --config=x' in page.text
  rows = (folder / 'report.md').read_text().splitlines()[4:]
  cells = [[text.strip() for text in row.strip('|').split('|')] for row in rows]
  assert cells[0] == ['metric', 'test (%)'] and cells[2] == ['accuracy', '50.0']
  assert ['medium-shot', 'n/a'] not in cells and ['few-shot', '25.0'] in cells


def test_a_rule_of_another_type_is_reported(tables_only, tmp_path):
  folder = write_run(tmp_path / 'run')
  path = folder / 'result.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'select': 5}))
  assert 'result.json is damaged' in page_of(folder).text


def test_a_terminal_shows_a_short_table(tables_only, tmp_path):
  write_run(tmp_path / 'ldam_drw', config('ldam_drw'), 0.7)
  write_run(tmp_path / 'ce', config('ce'))
  assert report.summary(tmp_path).splitlines() == [
    'method    accuracy (%)  many-shot (%)  medium-shot (%)  few-shot (%)',
    'ce                50.0           75.0             50.0          25.0',
    'ldam_drw          70.0           75.0             70.0          25.0',
  ]
  fail(tmp_path / 'oltr', 'oltr')
  lines = report.summary(tmp_path).splitlines()
  assert lines[0].split()[:2] == ['method', 'runs']
  assert lines[-1].split()[:3] == ['oltr', '1', 'failed']


def test_methods_are_in_the_order_of_the_sweep_or_the_reference_is_first(tmp_path):
  for recipe in ('adaboost', 'ce', 'ldam', 'zebra'):
    write_run(tmp_path / recipe, config(recipe))

  def order():
    found = runs.find(epath.Path(tmp_path))
    groups, _ = runs.grouped(found, runs.methods(epath.Path(tmp_path)))
    return [group.label for group in groups]

  assert order() == ['ce', 'adaboost', 'ldam', 'zebra']
  (tmp_path / runs.ORDER).write_text('{"methods": ["zebra", "ldam"]}')
  assert order() == ['zebra', 'ldam', 'ce', 'adaboost']
  (tmp_path / runs.ORDER).write_text('{"methods": ')
  assert order() == ['ce', 'adaboost', 'ldam', 'zebra']


def test_every_choice_of_a_threshold_has_its_sentence():
  scores = {
    'known_score': np.ones(2),
    'label': np.arange(2),
    'prediction': np.arange(2),
  }
  unknown = {**scores, 'label': np.full(2, -1)}
  for records in ({'val': scores}, {'val': scores, 'open_val': unknown}):
    found = classification._choose_threshold(records, 'known_score')
    assert found['chosen_by'] in report.page.CHOSEN_BY


def test_nothing_is_said_about_what_a_run_does_not_have(tmp_path):
  """No open set, no learned weights, one seed, and all classes in one shot group."""
  for recipe in ('ce', 'ldam'):
    folder = write_run(tmp_path / recipe, config(recipe), counts=(300,) * 5)
    for name in ('open_set.npz', 'weights.npz'):
      (folder / name).unlink()
    path = folder / 'result.json'
    result = json.loads(path.read_text())
    del result['test']['auroc']
    path.write_text(json.dumps(result))
  page = page_of(tmp_path)
  for text in (
    'not drawn',
    'over seeds',
    'shot group',
    'open class',
    'Learned weights',
  ):
    assert text not in page.text
  assert page.text.count('Gain over the plain network') >= 2


def test_other_configurations_are_not_averaged(tables_only, tmp_path):
  write_run(tmp_path / 'a', config(), 0.5)
  write_run(tmp_path / 'b', config(seed=1, epochs=100.0), 0.7)
  page = page_of(tmp_path)
  assert row_of(tmp_path, 'ce (epochs=200)')['accuracy'] == '50.0'
  assert row_of(tmp_path, 'ce (epochs=100)')['accuracy'] == '70.0'
  warning = 'runs with 2 different configs or data sets, which are not averaged'
  assert warning in page.text
  assert warning in (tmp_path / 'report.md').read_text()
  assert warning in (tmp_path / 'report.tex').read_text()


def test_other_data_are_not_averaged(tables_only, tmp_path):
  write_run(tmp_path / 'a', config(), 0.5)
  other = write_run(tmp_path / 'b', config(seed=1), 0.7) / 'data.json'
  other.write_text(other.read_text().replace('f' * 64, 'e' * 64))
  report.write(tmp_path)
  assert row_of(tmp_path, 'ce (data=fffffff)')['accuracy'] == '50.0'
  assert row_of(tmp_path, 'ce (data=eeeeeee)')['accuracy'] == '70.0'


def test_warnings_of_a_result_are_shown_once(tables_only, tmp_path):
  for name in ('a', 'b'):
    path = write_run(tmp_path / name, config(seed=ord(name))) / 'result.json'
    result = json.loads(path.read_text()) | {'warnings': ['an untrained network']}
    path.write_text(json.dumps(result))
  report.write(tmp_path)
  for name in ('report.md', 'report.html'):
    text = (tmp_path / name).read_text()
    assert text.count('Warning of a and 1 more: an untrained network') == 1


@pytest.mark.parametrize(
  ('channels', 'kind'), [(1, 'L'), (2, 'L'), (3, 'RGB'), (4, 'RGB')]
)
def test_images_of_any_channels_can_be_shown(channels, kind):
  uri = pictures.uri(np.zeros((90, 90, channels), np.uint8))
  image = Image.open(io.BytesIO(base64.b64decode(uri.partition(',')[2])))
  assert image.mode == kind and image.size == (90, 90)


def test_a_label_is_short_and_the_note_is_whole(tables_only, tmp_path):
  shared = {'defer_epoch': 160.0, 'wrappers': {'ema': 1.0}}
  changes = [
    {'epochs': 200.0, 'schedule': {'boundaries': [160.0]}},
    {'epochs': 40.0, 'schedule': {'boundaries': [32.0]}},
    {'epochs': 40.0, 'schedule': {'boundaries': [32.0]}, 'batch': 64, 'warm': 0.1},
  ]
  for place, change in enumerate(changes):
    write_run(tmp_path / f'{place}', config(**shared, **change))
  notes = page_of(tmp_path).text
  labels = ['ce (batch=-, epochs=200)', 'ce (batch=-, epochs=40)']
  for label in (*labels, 'ce (batch=64, epochs=40)'):
    assert row_of(tmp_path, label)['runs'] == '1 finished'
  for note in ('schedule.boundaries=[160.0]', 'batch=64, ', 'warm=0.1', 'epochs=200, '):
    assert note in notes
  assert 'defer_epoch=' not in notes and 'ema=' not in notes


def test_equal_names_are_distinguished_by_digest(tables_only, tmp_path):
  found = [
    runs.Run(write_run(tmp_path / str(epochs), config(epochs=epochs)), 'run')
    for epochs in (200.0, 200.00001)
  ]
  labels = [group.label for group in runs.grouped(found)[0]]
  assert labels == [f'ce (config={run.kind[0]})' for run in found]


def test_a_seed_counts_once(tables_only, tmp_path):
  for name in ('a', 'b', 'copy of b'):
    write_run(tmp_path / name, config(seed=int(name != 'a')), 0.5 + 0.2 * (name != 'a'))
  page = page_of(tmp_path)
  row = row_of(tmp_path, 'ce')
  assert row['accuracy'] == tables.percent([0.5, 0.7])
  assert row['runs'] == '2 finished, 1 repeated'
  note = 'copy of b repeats the method, config and seed of another run, so it is not'
  assert note in page.text


def fail(folder, recipe='ce', seed=0, error='OSError: no <space> left'):
  """Writes what a sweep leaves for a failed cell."""
  folder.mkdir(parents=True, exist_ok=True)
  failure = {'recipe': recipe, 'seed': seed, 'error': error, 'time': 1.0}
  (folder / 'error.json').write_text(json.dumps(failure))
  return folder


def test_failed_cells_are_in_the_table(tables_only, tmp_path):
  fail(tmp_path / 'ce/0')
  write_run(tmp_path / 'ce/1', config(seed=1))
  (fail(write_run(tmp_path / 'ce/2', config(seed=2)), seed=2) / 'result.json').unlink()
  fail(tmp_path / 'oltr/0', 'oltr', error='ValueError: \ud800')
  for seed, epochs in enumerate((10.0, 20.0)):
    write_run(tmp_path / f'ldam/{seed}', config('ldam', seed, epochs=epochs))
  fail(tmp_path / 'ldam/2', 'ldam', 2)
  text = page_of(tmp_path).text
  assert text.count('failed: OSError: no <space> left') == 3
  assert 'failed: ValueError: \ufffd' in text
  cells = {'ce': '1 finished, 2 failed', 'oltr': '1 failed'}
  cells |= {'ldam (no config)': '1 failed', 'ldam (epochs=10)': '1 finished'}
  assert {label: row_of(tmp_path, label)['runs'] for label in cells} == cells


def test_a_failed_run_alone_has_a_page(tmp_path):
  page = page_of(fail(tmp_path / 'run', seed=3))
  assert 'ce, seed 3' in page.text and 'failed: OSError' in page.text
  (tmp_path / 'run/error.json').write_text('{"recipe": 1, "seed": 2}')
  assert 'error.json is damaged' in page_of(tmp_path / 'run').text


def test_a_cell_that_failed_and_then_finished_has_finished(run_folder):
  assert runs.Run(fail(run_folder), 'run').state == 'finished'


WRONG = {
  'config.json': [{'recipe': 5}, {'seed': []}, {'data': 'cifar'}, {'name': None}],
  'data.json': [{'counts': 'many'}, {'class_names': 5}, {'fingerprint': 5}],
  'result.json': [
    {'test': {'accuracy': 'high'}},
    {'test': {'accuracy': 0.5, 'few': [0.5]}},
    {'test': {'accuracy': float('nan')}},
    {'test': {'accuracy': 10**400}},
    {'test': []},
    {'versions': ['1.0']},
    {'threshold': 'high'},
    {'threshold': {'value': 'high'}},
    {'best_on_test': {'accuracy': None}},
  ],
}


@pytest.mark.parametrize(
  ('name', 'wrong'), [(name, wrong) for name in WRONG for wrong in WRONG[name]]
)
def test_wrong_contents_cost_the_run_that_has_them(tables_only, tmp_path, name, wrong):
  write_run(tmp_path / '0', config())
  path = write_run(tmp_path / '1', config(seed=1), 0.7) / name
  path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
  for folder in (tmp_path, tmp_path / '1'):
    assert f'{name} is damaged' in page_of(folder).text
  found, _ = runs.grouped(runs.find(epath.Path(tmp_path)))
  assert [run.name for group in found for run in group.counted] == ['0']


def test_a_threshold_without_a_finite_value_is_none(tables_only, run_folder):
  path = run_folder / 'result.json'
  threshold = {'threshold': {'value': None, 'chosen_by': 'fixed'}}
  path.write_text(json.dumps(json.loads(path.read_text()) | threshold))
  page = page_of(run_folder)
  assert 'finished' in page.text and 'Threshold' not in page.text


def test_invalid_rows_of_metrics_are_left_out(run_folder):
  path = run_folder / 'metrics.jsonl'
  good = path.read_text()
  wrong = [{'step': '10'}, {'step': 10, 'stage': [], 'split': 'train', 'loss': 'x'}]
  path.write_text(good + ''.join(json.dumps(row) + '\n' for row in wrong))
  assert len(runs.Run(run_folder, 'run').rows) == len(good.splitlines())


def test_a_folder_need_not_have_a_name_of_text(tables_only, tmp_path):
  folder = tmp_path / os.fsdecode(b'caf\xe9')
  write_run(folder / 'ce')
  for path in (folder / 'ce', folder):
    report.write(path)
    assert 'caf\ufffd' in page_of(path).text


def test_unfinished_cells_are_in_the_table(tables_only, tmp_path):
  write_run(tmp_path / '0', config(), 0.5)
  for seed in (1, 2, 3):
    (write_run(tmp_path / f'{seed}', config(seed=seed)) / 'result.json').unlink()
  add_events(tmp_path / '1', DIVERGED)
  (tmp_path / '3/result.json').write_text('{"test": ')
  (tmp_path / '2/metrics.jsonl').unlink()
  page = page_of(tmp_path)
  row = row_of(tmp_path, 'ce')
  assert row['accuracy'] == '50.0'
  assert sorted(row['runs'].split(', ')) == [
    '1 diverged',
    '1 finished',
    '1 result.json is damaged',
    '1 unfinished',
  ]
  for reason in ('diverged at step 15', 'unfinished, without a log yet'):
    assert reason in page.text


def test_an_unfinished_run_alone_has_its_training_curves(tmp_path):
  folder = write_run(tmp_path / 'run')
  for name in ('result.json', 'samples.npz', *ARRAYS):
    (folder / name).unlink()
  page = page_of(folder)
  assert page.tags['svg'] == 1 and 'unfinished, at step 20' in page.text
  assert {path.stem for path in (folder / 'figures').iterdir()} == {'training'}


def test_a_diverged_run_that_continues_has_not_failed(tables_only, run_folder):
  (run_folder / 'result.json').unlink()
  add_events(run_folder, DIVERGED, STARTED)
  assert 'unfinished, at step 20' in page_of(run_folder).text


@pytest.mark.parametrize('name', ARRAYS)
@pytest.mark.parametrize('damage', ['missing', 'damaged', 'unexpected contents'])
def test_a_missing_file_costs_its_figures_and_is_named(run_folder, name, damage):
  path = run_folder / name
  learned = run_folder / 'stages/second/metrics/weight_prior.npz'
  learned.parent.mkdir(parents=True)
  learned.touch()  # without it, no weights.npz is expected
  if damage == 'missing':
    path.unlink()
  elif damage == 'damaged':
    path.write_bytes(path.read_bytes()[:99])
  else:
    np.savez(path, other=np.zeros(3), learned=np.zeros(3))
  for figure in ARRAYS[name]:
    drawn = drawing.draw(figure, ALL[figure], [runs.Run(run_folder, 'run')], 'page')
    assert drawn.svg == ''
    assert drawn.caption.startswith(f'“{drawn.title}” is not drawn: ')
    assert damage in drawn.caption and drawn.caption.count('\n') == 0
    assert damage == 'unexpected contents' or name in drawn.caption


def test_predictions_of_an_earlier_version_are_marked(run_folder):
  path = run_folder / 'predictions.npz'
  label = np.load(path)['label']
  np.savez(path, label=label, logits=np.zeros((len(label), 5), np.float16))
  for figure in ARRAYS['predictions.npz']:
    drawn = drawing.draw(figure, ALL[figure], [runs.Run(run_folder, 'run')], 'page')
    assert 'predictions.npz was written by an earlier version; ' in drawn.caption


def test_every_file_may_be_missing_but_the_configuration(tmp_path):
  folder = tmp_path / 'run'
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(config()))
  page = page_of(folder)
  assert page.tags['svg'] == 0
  assert 'not drawn' not in page.text  # there is nothing to draw yet
  (folder / 'config.json').write_text('{')
  assert 'config.json is damaged' in page_of(folder).text


def test_the_command_names_the_page(tables_only, run_folder, capsys):
  importlib.import_module('lt_jax.report.__main__').main(str(run_folder))
  assert capsys.readouterr().out == f'{run_folder}/report.html\n'


def test_a_folder_without_runs_is_rejected(tmp_path):
  (tmp_path / 'model').mkdir()
  (tmp_path / 'model/config.json').write_text('{"hidden_size": 3}')
  with pytest.raises(UserError, match='no config.json'):
    report.write(tmp_path)
  with pytest.raises(UserError, match='no config.json'):
    report.write(tmp_path / 'absent')


@pytest.mark.parametrize('name', ['config.json', 'error.json'])
@pytest.mark.parametrize('text', ['', '[' * 10**5], ids=['torn', 'nested'])
def test_a_torn_file_hides_no_runs_below_it(tables_only, tmp_path, name, text):
  for seed in (0, 1):
    write_run(tmp_path / f'ce/{seed}', config(seed=seed))
  (tmp_path / 'ce' / name).write_text(text)
  found = runs.find(epath.Path(tmp_path))
  assert [run.name for run in found] == ['ce/0', 'ce/1']


def test_a_run_does_not_hide_the_runs_below_it(tmp_path):
  """Such as those of a sweep that was given the folder of a run, or the reverse."""
  record = json.dumps({'recipe': 'ce', 'seed': 0})
  for folder in ('.', 'ce/0', 'stages/train', 'figures'):
    path = tmp_path / folder / 'config.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record)
  found = runs.find(epath.Path(tmp_path))
  assert [run.folder for run in found] == [tmp_path, tmp_path / 'ce/0']


def labels_below(groups):
  """Returns the labels below the classes by which methods are compared."""
  figure, caption = figures.compare_classes(groups)
  (axes,) = figure.axes
  ticks = [label.get_text() for label in axes.get_xticklabels()]
  return ticks, axes.get_xlabel(), caption


@pytest.mark.parametrize('classes', [5, 40])
def test_training_images_are_shown_if_all_methods_have_the_same(tmp_path, classes):
  names = [f'class {c}' for c in range(classes)]
  few, many = (tuple(range(n, n + classes)) for n in (10, 200))
  for recipe, counts in (('ce', few), ('focal', few), ('ldam', many)):
    write_run(tmp_path / recipe, config(recipe), counts=counts, names=names)
  groups, _ = runs.grouped(runs.find(epath.Path(tmp_path)))
  same, rows, caption = labels_below(groups[:2])
  assert same[0] == ('class 4\n14' if classes == 5 else '49 to 48')
  assert 'training images' in rows and 'different' not in caption
  other, rows, caption = labels_below(groups)
  assert other[0] == ('class 4' if classes == 5 else '1 to 2')
  assert (
    'training images' not in rows and 'different numbers of training images' in caption
  )


def test_many_classes_are_drawn_in_blocks(tmp_path):
  counts = tuple(int(500 * 0.96**c) + 1 for c in range(120))
  names = [f'class {c}' for c in range(120)]
  arguments = {'counts': counts, 'names': names}
  write_run(tmp_path / 'ce', config(), **arguments)
  write_run(tmp_path / 'l2rw', config('l2rw'), **arguments)
  found = runs.find(epath.Path(tmp_path))
  for name in ('confusion', 'class_accuracy'):
    drawn = drawing.draw(name, ALL[name], found[:1], 'page')
    assert drawn.svg and len(drawn.svg) < 200_000
    assert ('20 blocks of classes' in drawn.caption) == (name == 'confusion')
  compared = figures.compare_classes
  assert drawing.draw('compare', compared, runs.grouped(found)[0], 'page').svg


def test_a_curve_of_one_row_is_a_point(run_folder):
  path = run_folder / 'metrics.jsonl'
  path.write_text(path.read_text().splitlines()[0] + '\n')
  figure, _ = figures.training([runs.Run(run_folder, 'run')])
  lines = [line for axes in figure.axes for line in axes.lines]
  drawn = [line.get_marker() for line in lines if len(line.get_xdata())]
  assert drawn == ['o'] * 3


def test_steps_continue_where_a_stage_carries_the_clock(tmp_path):
  folder = write_run(tmp_path / 'run')
  run = runs.Run(folder, 'run')
  assert curves.stages_of(run) == {'plain': (0, 0), 'second': (20, 20)}
  made = config()
  made['stages']['second']['surgeries'].append(['carry', {'fields': ['opt', 'step']}])
  (folder / 'config.json').write_text(json.dumps(made))
  assert curves.stages_of(runs.Run(folder, 'run'))['second'] == (20, 0)


def resolved(module, recipe, **changes):
  made = module.get_config(recipe)
  made.update_from_flattened_dict(changes)
  return resolve(made)


def test_published_numbers_stand_beside_their_own_setting_only(tables_only, tmp_path):
  elsewhere = {
    'data.source': 'npz:cifar10.npz',
    'seed': 1,
    'evaluate_every_epochs': 1.0,
  }
  same = resolved(cifar10_lt, 'ldam_drw', **elsewhere)
  write_run(tmp_path / 'same', same, 0.75)
  write_run(tmp_path / 'short', resolved(cifar10_lt, 'ldam,epochs=10'))
  page = page_of(tmp_path)
  lines = (tmp_path / 'report.md').read_text().splitlines()
  rows = [line for line in lines if 'Jamal' in line]
  assert len(rows) == 1
  cells = [text.strip() for text in rows[0].strip('|').split(' | ')]
  assert cells[1:5] == ['top-1 error', '25.0', '20.0', '23.0']
  assert 'Compared with published numbers' in page.text
  report.write(tmp_path / 'short')
  assert 'Compared with published' not in (tmp_path / 'short/report.html').read_text()


@pytest.mark.parametrize(
  'change',
  [
    {'data.source': 'fake'},
    {'data.n_max': 500},
    {'data.imbalance': 50.5},
    {'data.flip': False},
    {'batch': 64},
    {'schedule.base': 0.2},
    {'defer_epoch': 10.0},
    {'init': 'weights.safetensors'},
    {'stages.meta.method.eps_lr': 0.5},
  ],
)
def test_one_other_key_is_another_setting(change):
  plain = resolved(cifar10_lt, 'meta_ce')
  assert [row['value'] for row in published.beside(plain)] == [23.59]
  assert published.beside(resolved(cifar10_lt, 'meta_ce', **change)) == []


def test_a_setting_may_start_from_weights_anywhere():
  config = resolved(places_lt, 'oltr', init='weights.safetensors')
  assert len(published.beside(config)) == 8
  assert published.beside(resolved(places_lt, 'oltr')) == []


def test_text_of_tables_is_escaped():
  table = tables.Table(['a|b'], [['x_1 & 50 % <b> \\ ± #']], [''])
  assert tables.markdown(table).splitlines() == [
    r'| a\|b                     |',
    '| ------------------------ |',
    r'| x\_1 & 50 % \<b\> \\ ± # |',
  ]
  line = r'x\_1 \& 50 \% \textless{}b\textgreater{} \textbackslash{} $\pm$ \# \\'
  assert line in tables.latex(table).splitlines()


def test_few_features_are_mapped_by_their_principal_components(rng):
  assert figures.plane_of(rng.normal(size=(12, 5)))[1] == 'PCA'
  plane, name = figures.plane_of(rng.normal(size=(40, 5)))
  assert name == 't-SNE' and plane.shape == (40, 2) and np.isfinite(plane).all()


BROWSERS = ('chromium-headless-shell', 'chromium', 'chromium-browser', 'google-chrome')
PROBE = """
<script nonce="test">
const problems = [];
addEventListener('error', e => problems.push(`${e.message}`), true);
document.addEventListener('securitypolicyviolation', e => problems.push(e.blockedURI));
console.error = console.warn = (...given) => problems.push(given.join(' '));
addEventListener('load', () => {
  const size = e => [e.getBoundingClientRect().width, e.getBoundingClientRect().height];
  const drawn = [...document.querySelectorAll('figure svg, figure img')];
  const followed = [...document.querySelectorAll('table a')].map(a => {
    const to = a.getAttribute('href');
    if (!to.startsWith('#')) return [to, true];
    a.click();
    const there = document.getElementById(to.slice(1)).getBoundingClientRect();
    const seen = there.top >= 0 && there.top < innerHeight;
    return [to, location.hash === to && seen];
  });
  const ink = e => getComputedStyle(e).fill;
  const table = document.querySelector('table');
  const there = i => table.tHead.rows[0].cells[i];
  const sorted = [2, 2, 0].filter(there).map(i => {
    const head = table.tHead.rows[0].cells[i];
    (head.querySelector('button') ?? head).click();
    const rows = [...table.tBodies[0].rows];
    return [head.ariaSort, ...rows.map(row => row.cells[i].innerText)];
  });
  const found = {
    problems, followed, sorted,
    sizes: drawn.map(size),
    text: [...new Set([...document.querySelectorAll('svg text')].map(ink))],
    colour: getComputedStyle(document.body).color,
    back: getComputedStyle(document.body).backgroundColor,
    width: document.documentElement.scrollWidth - innerWidth,
  };
  const out = document.createElement('pre');
  out.id = 'found';
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>
"""


def look_at(page, folder, *flags):
  """Returns what a browser finds on a page; its policy only admits the probe."""
  browser = next(filter(None, map(shutil.which, BROWSERS)), None)
  if browser is None:
    pytest.skip('there is no Chromium')
  text = page.read_text()
  assert text.count("script-src 'sha256-") == 1
  text = text.replace("script-src '", "script-src 'nonce-test' '").replace(
    '<style>', f'{PROBE}<style>', 1
  )
  copy = page.with_name('probed.html')
  copy.write_text(text)
  command = [
    browser,
    '--headless',
    '--disable-gpu',
    f'--user-data-dir={folder}',
    *flags,
  ]
  command += ['--no-sandbox'] * (os.geteuid() == 0)
  command += ['--window-size=700,900', '--virtual-time-budget=5000', '--dump-dom']
  done = subprocess.run(
    [*command, copy.as_uri()], capture_output=True, text=True, timeout=120
  )
  copy.unlink()
  assert 'CONSOLE' not in done.stderr, done.stderr
  found = Page(done.stdout[done.stdout.index('<pre id="found">') :]).text
  return json.loads(found[: found.rindex('}') + 1])


@pytest.mark.parametrize('dark', [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_browser_shows_every_figure_and_follows_every_link(tmp_path, dark):
  for recipe, seed in (('ce', 0), ('ce', 1), ('l2rw', 0)):
    folder = tmp_path / f'runs/{recipe}/#{seed}'
    write_run(folder, config(recipe, seed), 0.09 if recipe == 'l2rw' else 0.5)
  alone = report.write(tmp_path / 'runs/ce/#0')
  flags = [f'--blink-settings=preferredColorScheme={0 if dark else 1}']
  page = report.write(tmp_path / 'runs')
  found = look_at(page, tmp_path / 'browser', *flags)
  assert found['problems'] == []
  assert len(found['sizes']) == 2 * len(figures.FIGURES) + len(figures.COMPARISONS)
  assert min(map(min, found['sizes'])) > 50
  links = [link for link, there in found['followed'] if there]
  assert len(links) == len(found['followed'])
  folders = {'ce/%231/', 'l2rw/%230/'}
  assert set(links) == {'#group-0', '#group-1', 'ce/%230/report.html', *folders}
  rising = ['ascending', '9.0', '50.0 ± 0.0']
  falling = ['descending', *reversed(rising[1:])]  # as numbers, not as text
  assert found['sorted'] == [falling, rising, ['ascending', 'ce', 'l2rw']]
  assert found['width'] <= 0
  brightness = [sum(map(int, re.findall(r'\d+', found[k]))) for k in ('colour', 'back')]
  assert (brightness[0] > brightness[1]) == dark
  assert found['text'] == [found['colour']]
  linked = page.parent / urllib.parse.unquote('ce/%230/report.html')
  assert linked == alone
  found = look_at(linked, tmp_path / 'browser', *flags)
  assert found['problems'] == [] and min(map(min, found['sizes'])) > 50
  assert len(found['sizes']) == len(RUN_FIGURES) + 3


def validated(folder, made, test, val):
  """Writes a run with validation images."""
  path = write_run(folder, made, test) / 'result.json'
  result = json.loads(path.read_text()) | {'val': {'accuracy': val}}
  path.write_text(json.dumps(result))


def weighted(beta, gamma, seed):
  """Returns a config with two grid keys, and one that follows the first."""
  weights = {'name': 'effective_number', 'beta': beta}
  second = {'class_weights': {'beta': beta}}
  loss = {'name': 'sigmoid_focal', 'gamma': gamma}
  return config(
    'cb_focal', seed, class_weights=weights, loss=loss, stages={'s': second}
  )


def test_values_of_a_grid_are_chosen_by_validation(tmp_path, monkeypatch):
  monkeypatch.setattr(figures, 'FIGURES', {})
  monkeypatch.setattr(figures, 'COMPARISONS', {})
  val = {(0.9, 1.0): 0.6, (0.99, 1.0): 0.8, (0.9, 2.0): 0.7, (0.99, 2.0): 0.5}
  for (beta, gamma), value in val.items():
    for seed in (0, 1):  # the test set would rank them the other way round
      folder = tmp_path / f'{beta}-{gamma}/{seed}'
      validated(folder, weighted(beta, gamma, seed), 1 - value, value + 0.1 * seed)
  write_run(tmp_path / 'ce')
  (grid,) = grids.grids(runs.grouped(runs.find(epath.Path(tmp_path)))[0])
  assert grid.keys == ['class_weights.beta', 'loss.gamma']
  assert grid.values[grid.chosen] == (0.99, 1.0)
  page = page_of(tmp_path)
  assert 'Chosen by validation' in page.text
  lines = (tmp_path / 'report.md').read_text().splitlines()
  (chosen,) = [line for line in lines if line.rstrip(' |').endswith('yes')]
  cells = [cell.strip() for cell in chosen.strip('|').split(' | ')]
  values = r'class\_weights.beta=0.99, loss.gamma=1'
  assert cells[:3] == [r'cb\_focal', values, '2']
  assert cells[3] == tables.percent([0.8, 0.9]) and cells[4] == '20.0 ± 0.0'
  assert (tmp_path / 'figures/error_by_value.svg').is_file()
  figure, caption = grids.error_by_value([grid])
  (axes,) = figure.axes
  assert [tick.get_text() for tick in axes.get_xticklabels()] == ['0.9', '0.99']
  drawn = [c.lines[0] for c in axes.containers if c.get_label().endswith('gamma=1')]
  errors = np.asarray(drawn[0].get_ydata(), float)  # ordered by beta
  np.testing.assert_allclose(errors, [60, 80])
  assert 'class_weights.beta' in caption


def test_without_validation_images_nothing_is_chosen(tables_only, tmp_path):
  for epochs in (10.0, 20.0):
    write_run(tmp_path / f'{epochs}', config(epochs=epochs))
  (grid,) = grids.grids(runs.grouped(runs.find(epath.Path(tmp_path)))[0])
  assert grid.chosen is None and grid.keys == ['epochs']
  report.write(tmp_path)
  assert 'yes' not in (tmp_path / 'report.md').read_text()


def test_an_epsilon_far_below_the_weights_can_be_seen(run_folder):
  stored = dict(np.load(run_folder / 'weights.npz'))
  stored['learned'] = np.tile(1e-6 * np.arange(1.0, 6), (4, 1))
  stored['prior'] = np.ones((4, 5))
  np.savez(run_folder / 'weights.npz', **stored)
  run = runs.Run(run_folder, 'run')
  figure, caption = learned.epsilons([run])
  (points,) = [c.lines[0] for c in figure.axes[0].containers]
  np.testing.assert_allclose(
    np.asarray(points.get_ydata(), float), stored['learned'][0]
  )
  assert 'epsilon is 3.0e-06 of the weight' in caption
  del stored['learned']
  np.savez(run_folder / 'weights.npz', **stored)
  drawn = drawing.draw('epsilons', learned.epsilons, [run], 'page')
  assert 'by an earlier version' in drawn.caption


def scored(folder, recipe, seed, rates, prediction):
  """Writes a run with an open set: 50 known and 20 open images."""
  path = write_run(folder, config(recipe, seed)) / 'result.json'
  result = json.loads(path.read_text())
  result['test'] |= rates
  path.write_text(json.dumps(result))
  data = json.loads((folder / 'data.json').read_text())
  (folder / 'data.json').write_text(
    json.dumps(data | {'open_images': {'open_test': 20}})
  )
  label = np.repeat(np.arange(5), 10)
  arrays = {'label': label, 'prediction': prediction, 'confidence': np.ones(50)}
  np.savez(folder / 'predictions.npz', **arrays)


def test_f1_of_the_open_class_follows_from_reported_values(tmp_path, rng):
  """Computed by hand from the rejected images."""
  label = np.append(np.repeat(np.arange(5), 10), np.full(20, -1))
  prediction, kept = rng.integers(0, 5, 70), rng.uniform(size=70) < 0.6
  known = label >= 0
  right = (known & kept & (label == prediction)).sum()
  accepted = (kept & ~known).sum()
  rates = {
    'known_accuracy': right / 50,
    'open_accuracy': 1 - accepted / 20,
    'f_measure_oltr2019': 2 * right / (right + (kept & known).sum() + accepted),
  }
  scored(tmp_path / 'ce', 'ce', 0, rates, prediction[:50])
  found = across.open_f1(runs.Run(tmp_path / 'ce', 'ce'), 50)
  true = (~kept & ~known).sum()
  expected = 2 * true / (2 * true + (kept & ~known).sum() + (~kept & known).sum())
  assert found == pytest.approx(expected)


def test_gains_are_over_the_plain_network_by_class(tmp_path):
  label = np.repeat(np.arange(5), 10)
  worse = np.where(label == 4, 0, label)  # the rarest class is mistaken for the first
  low = {'class_accuracy': [1.0, 1, 1, 1, 0], 'open_accuracy': 0.25}
  high = {'class_accuracy': [0.9, 1, 1, 1, 1.0], 'open_accuracy': 0.75}
  for seed in (0, 1):
    scored(tmp_path / f'ce/{seed}', 'ce', seed, low, worse)
    scored(tmp_path / f'ldam/{seed}', 'ldam', seed, high, label)
  groups = runs.grouped(runs.find(epath.Path(tmp_path)))[0]
  figure, caption = across.compare_gains(groups)
  accuracy, f1 = ([text.get_text() for text in axes.texts] for axes in figure.axes)
  assert accuracy == ['-10', '+0', '+0', '+0', '+100', '+50']
  assert f1 == ['+33', '+0', '+0', '+0', '+100']  # no F for the open class
  assert [t.get_text() for t in figure.axes[-1].get_xticklabels()][-1] == 'open'
  assert drawing.draw('gains', across.compare_gains, groups, 'page').svg
  without = drawing.draw('gains', across.compare_gains, groups[1:], 'page')
  assert without.svg == without.caption == ''  # there is no plain network


def test_seeds_are_a_band_around_the_mean(tmp_path):
  for seed, accuracy in enumerate((0.5, 0.7)):
    folder = write_run(tmp_path / f'ce/{seed}', config(seed=seed))
    lines = (folder / 'metrics.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
      row['accuracy'] = accuracy
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    (folder / 'metrics.jsonl').write_text(text)
  write_run(tmp_path / 'ldam', config('ldam'))
  groups = runs.grouped(runs.find(epath.Path(tmp_path)))[0]
  figure, caption = across.compare_training(groups)
  for axes in figure.axes:
    mean = axes.lines[0]
    np.testing.assert_allclose(np.asarray(mean.get_ydata(), float), 60)
    assert list(mean.get_xdata()) == [10, 20, 30, 40]  # two stages in sequence
    (band,) = axes.collections  # of the method with two seeds
    heights = band.get_paths()[0].vertices[:, 1]
    spread = np.std([50, 70], ddof=1)
    np.testing.assert_allclose(
      [heights.min(), heights.max()], [60 - spread, 60 + spread]
    )
    assert len(axes.lines) == 2


def compared(folder):
  """Returns what methods are compared with, and how, by label."""
  groups = runs.grouped(runs.find(epath.Path(folder)))[0]
  return {found.group.label: found for found in differences.compare(groups)}


def test_seeds_in_common_are_compared_by_a_paired_t_test(tables_only, tmp_path):
  values = {'ce': (0.5, 0.6, 0.7), 'same': (0.52, 0.57, 0.71), 'more': (0.6, 0.71, 0.8)}
  for recipe, accuracies in values.items():
    for seed, accuracy in enumerate(accuracies):
      write_run(tmp_path / f'{recipe}/{seed}', config(recipe, seed), accuracy)
  write_run(tmp_path / 'same/9', config('same', 9), 0.0)  # ce has no such seed
  found = compared(tmp_path)
  assert set(found) == {'same', 'more'}  # and nothing is compared with itself
  for recipe, one in found.items():
    assert (one.reference.label, one.test) == ('ce', 'paired t, 3 seeds')
    expected = scipy.stats.ttest_rel(values[recipe], values['ce'])
    interval = expected.confidence_interval()
    got = one.intervals['accuracy']
    np.testing.assert_allclose(got[1:], [interval.low, interval.high], rtol=1e-9)
    assert got.within_noise == (expected.pvalue > 0.05) == (recipe == 'same')
  page = report.write(tmp_path).read_text()
  grey = re.findall(r'<td class="faint">(.*?)</td>', page)
  assert grey.count(tables.percent([*values['same'], 0])) == 2  # accuracy and medium
  assert not any(text.startswith('70.3') for text in grey)  # the mean of more
  assert 'Differences from ce' in page and 'paired t-test over seeds' in page
  assert '+10.3 (+8.9 to +11.8)' in (tmp_path / 'report.md').read_text()


def test_a_difference_that_never_varies_is_not_certain(tables_only, tmp_path):
  for seed in range(3):
    write_run(tmp_path / f'ce/{seed}', config('ce', seed), 0.5)
    write_run(tmp_path / f'ldam/{seed}', config('ldam', seed), 0.6)
  one = compared(tmp_path)['ldam']
  assert one.intervals['accuracy'].within_noise
  table = differences.differences_table([one])
  cells = dict(zip(table.headings, table.rows[0], strict=True))
  assert (cells['accuracy'], cells['few-shot']) == ('+10.0 (n/a)', '0.0 (n/a)')
  assert (0, table.headings.index('accuracy')) in table.faint


def write_predictions(folder, recipe, right):
  """Writes a run that is right on the given test images, ten a class."""
  label = np.repeat(np.arange(5), 10)
  prediction = np.where(right, label, (label + 1) % 5)
  path = write_run(folder, config(recipe), accuracy=right.mean()) / 'result.json'
  result = json.loads(path.read_text())
  classes = right.reshape(5, 10).mean(1)
  groups = runs.Run(folder, 'run').groups.items()
  result['test'] |= {name: classes[mask].mean() for name, mask in groups}
  path.write_text(json.dumps(result))
  arrays = {'label': label, 'prediction': prediction, 'confidence': np.ones(50)}
  np.savez(folder / 'predictions.npz', **arrays)


def test_single_runs_are_compared_by_a_bootstrap_over_images(tmp_path, rng):
  ours, theirs = rng.uniform(size=50) < 0.9, rng.uniform(size=50) < 0.4
  write_predictions(tmp_path / 'ce', 'ce', theirs)
  write_predictions(tmp_path / 'l2rw', 'l2rw', ours)
  one = compared(tmp_path)['l2rw']
  assert one.test == 'bootstrap, seed 0'
  label, gain = np.repeat(np.arange(5), 10), ours * 1.0 - theirs
  drawn = rng.integers(0, 50, (2000, 50))
  few = [  # of the classes of 8 and 3 training images
    np.mean([gain[rows][label[rows] == c].mean() for c in (3, 4)]) for rows in drawn
  ]
  for name, gains in (('accuracy', gain[drawn].mean(1)), ('few', few)):
    expected = np.percentile(gains, [2.5, 97.5])
    found = one.intervals[name]
    np.testing.assert_allclose(found[1:], expected, atol=0.25 * np.std(gains))
  assert one.intervals['few'].difference == pytest.approx(gain[30:].mean())
  path = tmp_path / 'l2rw/predictions.npz'
  np.savez(path, **{**np.load(path), 'label': np.zeros(50, int)})
  assert compared(tmp_path) == {}  # which were not the same images


def _miou(confusion):
  right = np.diag(confusion)
  return (right / (confusion.sum(0) + confusion.sum(1) - right)).mean()


def test_label_maps_are_compared_by_images(tmp_path, rng):
  theirs = rng.integers(1, 9, (6, 5, 5))
  ours = np.roll(theirs, 1, axis=2)  # with as many pixels of each label
  for recipe, n in (('ce', theirs), ('advent', ours)):
    made = config(recipe, task='segmentation')
    path = write_run(tmp_path / recipe, made) / 'result.json'
    result = json.loads(path.read_text())
    result |= {'test': {'miou': _miou(n.sum(0))}, 'best_on_test': None}
    path.write_text(json.dumps(result))
    np.savez(tmp_path / recipe / 'predictions.npz', confusion=n)
  one = compared(tmp_path)['advent']
  assert set(one.intervals) == {'miou'} and one.test == 'bootstrap, seed 0'
  drawn = rng.integers(0, 6, (2000, 6))
  gains = [_miou(ours[rows].sum(0)) - _miou(theirs[rows].sum(0)) for rows in drawn]
  expected = np.percentile(gains, [2.5, 97.5])
  found = one.intervals['miou']
  np.testing.assert_allclose(found[1:], expected, atol=0.2 * np.std(gains))


def test_without_a_control_others_are_compared_with_the_best(tmp_path):
  for recipe, accuracy in (('a', 0.5), ('b', 0.7)):
    for seed in range(3):
      write_run(tmp_path / recipe / f'{seed}', config(recipe, seed), accuracy)
  other = tmp_path / 'c'
  for seed in range(3):  # on other data
    path = write_run(other / f'{seed}', config('c', seed), 0.9) / 'data.json'
    path.write_text(path.read_text().replace('f' * 64, 'e' * 64))
  assert [(k, v.reference.label) for k, v in compared(tmp_path).items()] == [('a', 'b')]
