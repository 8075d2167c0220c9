"""Published numbers, wherever they stand: beside their own setting, or with a mark.

The project carries them in published.json, in the docstrings of configs and in
docs/results.md. Where LT_JAX_DATA names a folder that has published.csv, or has it in
the folder `published` beside it, every number of that file is looked up too.
"""

import csv
import functools
import importlib
import os
import pathlib
import re

import pytest

from lt_jax import recipes
from lt_jax.report import published

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = os.fspath(ROOT / 'configs')


@functools.cache
def carried():
  """Returns (config, metric, value) -> whether the number has a mark."""
  return {
    (row['config'], metric(row['metric']), row['value']): 'mark' in row
    for row in published.read()[0]
  }


def metric(name):
  """Returns a metric, F-measures under one name, as tables have one column of them."""
  return 'F' if name.startswith('f_measure') else name


def test_settings_are_those_of_the_configurations():
  """Where this fails, lt_jax/report/published.py says what to do."""
  assert published.made(CONFIGS) == published.PATH.read_text()


def test_no_number_stands_twice_beside_a_setting():
  rows = published.read()[0]
  places = [(r['setting'], r['metric'], r['source'], r['value']) for r in rows]
  assert len(set(places)) == len(places)


WRONG = {
  'softmax focal in the place of sigmoid focal': (
    'cifar10_lt:sigmoid_focal,imbalance=100',
    'cifar10_lt:focal,protocol=cui,imbalance=100',
    {'loss.name', 'model.head_options.prior_bias'},
  ),
  'another protocol': (
    'cifar10_lt:ce,protocol=cui,imbalance=100',
    'cifar10_lt:ce,imbalance=100',
    {'schedule.warmup', 'model.trunk_options.shortcut'},
  ),
  'without the prior by class': (
    'cifar10_lt:meta_ce,imbalance=100',
    'cifar10_lt:l2rw,protocol=jamal,imbalance=100',
    {'method.prior', 'method.clip', 'method.normalise', 'method.eps_lr'},
  ),
}


@pytest.mark.parametrize('name', WRONG)
def test_a_number_beside_another_setting_is_noticed(name, tmp_path, monkeypatch):
  own, other, keys = WRONG[name]
  rows, facts = published.read()
  (row,) = [row for row in rows if row['config'] == own]
  moved = {**row, 'config': other}
  found = published.differences(moved, facts, published.configuration(moved, CONFIGS))
  assert set(found) == keys
  monkeypatch.setattr(published, 'read', lambda: ([dict(moved)], facts))
  with pytest.raises(ValueError, match='not as measured'):
    published.made(CONFIGS)
  marked = {**moved, 'mark': 'of another setting'}
  monkeypatch.setattr(published, 'read', lambda: ([dict(marked)], facts))
  assert published.made(CONFIGS)
  untold = {key: value for key, value in row.items() if key != 'measured'}
  monkeypatch.setattr(published, 'read', lambda: ([untold], facts))
  with pytest.raises(ValueError, match='not as measured'):
    published.made(CONFIGS)


def test_every_fact_is_used():
  rows, facts = published.read()
  assert {name for row in rows for name in row.get('measured', ())} == set(facts)


# Tables in texts.


def check(config, name, cell):
  """Refuses a number in a text that is not carried, or whose mark is not."""
  if cell in ('', '-') or cell.endswith('†'):
    return 0
  text = cell.rstrip('*')
  value = round(100 * float(text), 2) if text.startswith('.') else float(text)
  marked = carried().get((config, metric(name), value))
  assert marked is not None, f'{config}, {name}: {cell} is in no row of published.json'
  assert marked == cell.endswith('*'), f'{config}, {name}: {cell}: the mark'
  return 1


SHOTS = ('many', 'medium', 'few', 'accuracy', 'f_measure')
COLUMNS = {
  'cifar10_lt': [(',imbalance=100', 'error'), (',imbalance=10', 'error')],
  'cifar100_lt': [(',imbalance=100', 'error'), (',imbalance=10', 'error')],
  'imagenet_lt': [('', name) for name in SHOTS],
  'places_lt': [('', name) for name in SHOTS],
  'mnist_mnistm': [('', 'accuracy')] * 2,
  'inat18': [('', 'error')],
}
"""config -> what the columns of the table in its docstring are: option, metric."""

KANG = {'ce, 90 epochs': 'ce,protocol=kang', 'lws, 90 epochs': 'lws'}


@pytest.mark.parametrize('name', COLUMNS)
def test_docstrings_agree_with_published_json(name):
  text = importlib.import_module(f'configs.{name}').__doc__
  rows = re.findall(r'^  ([a-z][\w=,]*(?:, 90 epochs)?) {2,}([-.\d].*)$', text, re.M)
  checked = 0
  rows = [row for row in rows if row[0].partition(',')[0] in recipes.RECIPES]
  for recipe, cells in rows:
    for (option, what), cell in zip(COLUMNS[name], cells.split(), strict=False):
      config = f'{name}:{KANG.get(recipe, recipe)}{option}'
      checked += check(config, what, cell)
  assert checked >= 2, text


CIFAR = [
  ('cifar10_lt', 'imbalance=100'),
  ('cifar10_lt', 'imbalance=10'),
  ('cifar100_lt', 'imbalance=100'),
  ('cifar100_lt', 'imbalance=10'),
]


def table(heading):
  """Returns the rows of a table of docs/results.md: recipe -> cells."""
  text = (ROOT / 'docs/results.md').read_text()
  body = text[text.index(heading) :].split('\n\n')[0]
  rows = [line.strip('|').split('|') for line in body.splitlines()[2:]]
  return {cells[0].strip(' `'): [c.strip() for c in cells[1:]] for cells in rows}


def test_the_page_of_results_agrees_with_published_json():
  checked = 0
  for recipe, cells in table('| recipe | CIFAR-10, 100 |').items():
    for (name, option), cell in zip(CIFAR, cells[:4], strict=True):
      checked += check(f'{name}:{recipe},{option}', 'error', cell)
  for recipe, cells in table('| recipe | ImageNet-LT, ResNet-10 |').items():
    for name, (shots, f) in (('imagenet_lt', cells[:2]), ('places_lt', cells[2:4])):
      found = ['-'] * 4 if shots == '-' else shots.split(', ')
      for what, cell in zip(SHOTS, [*found, f], strict=True):
        checked += check(f'{name}:{recipe}', what, cell)
  assert checked > 90


# The file of all published numbers.

RECIPES = {
  'cross_entropy': 'ce,protocol=cui',
  'class_balanced_cross_entropy': 'cb_ce',
  'class_balanced_fine_tuning': 'cb_finetune',
  'class_balanced_fine_tuning (rerun by Shu et al.)': 'cb_finetune,protocol=shu',
  'l2rw': 'l2rw',
  'l2rw (rerun by Shu et al.)': 'l2rw,protocol=shu',
  'meta_weight_net': 'mwn',
  'meta_reweight cross_entropy': 'meta_ce',
  'meta_reweight focal': 'meta_focal',
  'meta_reweight ldam': 'meta_ldam',
  'focal': 'sigmoid_focal',
  'class_balanced_focal': 'cb_focal',
  'ldam': 'ldam',
  'ldam_drw': 'ldam_drw',
}
OPEN_RECIPES = {
  'plain': 'ce',
  'lifted': 'lifted',
  'focal': 'focal_aware',
  'range': 'range',
  'range + openmax': 'openmax',
  'fslwf': 'fslwf',
  'oltr': 'oltr',
}
SHOT_METRICS = {
  'accuracy_many': 'many',
  'accuracy_medium': 'medium',
  'accuracy_few': 'few',
  'accuracy_overall': 'accuracy',
  'f_measure': 'F',
}
ADAPTATION = {'train_on_target': 'target_only'}
WITHOUT = {
  'transfer': 'no recipe fine-tunes on the fine-grained sets',
  'feature_taps': 'no recipe classifies the features of single layers',
  'dann': 'no config has that pair of domains, or that method',
}
"""Why a number stands beside no recipe."""


def looked_up(row):
  """Returns the place of a row of published.csv in `carried`, or why it has none."""
  kind, value = row['table'], float(row['value'].partition('±')[0])
  if kind == 'cifar10_lt':
    option = row['setting'].replace('imbalance ', 'imbalance=')
    recipe = RECIPES[row['method']]
    if value == 27.63:  # of LDAM-DRW's code, which normalises by the weights
      recipe = 'cb_ce,protocol=cao'
    return f'cifar10_lt:{recipe},{option}', 'error', value
  if kind in ('ImageNet-LT', 'Places-LT'):
    name = SHOT_METRICS[row['metric']]
    recipe = OPEN_RECIPES[row['method']]
    config = f'{kind.lower().replace("-", "_")}:{recipe}'
    if row['setting'] == 'open-set' and name != 'F':
      rule = 'own_rule' if recipe == 'openmax' else 'at_0.1'
      return config, f'known_{name}_{rule}', value
    return config, name, round(100 * value, 4) if name == 'F' else value
  if row['dataset'] == 'MNIST->MNIST-M' and row['method'] != 'subspace_alignment':
    recipe = ADAPTATION.get(row['method'], row['method'])
    return f'mnist_mnistm:{recipe}', 'accuracy', round(100 * value, 4)
  return WITHOUT[kind]


def test_every_published_number_has_its_place():
  folder = os.environ.get('LT_JAX_DATA', '')
  places = [pathlib.Path(folder, p) for p in ('', '../published')] if folder else []
  files = [place / 'published.csv' for place in places]
  path = next((path for path in files if path.exists()), None)
  if path is None:
    pytest.skip('LT_JAX_DATA names no folder with published.csv')
  with path.open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) > 200
  tally = {'exists': 0, 'marked': 0} | dict.fromkeys(WITHOUT.values(), 0)
  for row in rows:
    found = looked_up(row)
    if isinstance(found, tuple):
      marked = carried().get(found)
      assert marked is not None, f'no recipe and protocol for {row}: {found}'
      found = 'marked' if marked else 'exists'
    tally[found] += 1
  print(tally)  # which `pytest -s` shows
  assert sum(tally.values()) == len(rows) and all(tally.values()), tally
