"""The table of the two-component approach on CIFAR-LT: methods by imbalance.

  python -m benchmarks.two_component --classes=10 --workdir=DIR [--show]

Each column is one or two sweeps under DIR/IMBALANCE. Run the same command again to run
what has not finished; that way you can fill the table in several sittings. --show runs
nothing. A cell shows the top-1 error in % of the last epoch and of the epoch that is
best on the test set, and the published number, with an asterisk if that was measured in
another way or is doubtful in its source. Cells that have not been run say so. Whatever
follows `--` goes to the sweeps, such as `-- --vectorise`; runs with another setting, as
with `-- --config.epochs=2`, are not counted.
"""

import argparse
import os
import pathlib
import sys

from benchmarks import tables
from lt_jax import commands, files
from lt_jax.config import resolve
from lt_jax.errors import UserError
from lt_jax.report import published, runs
from lt_jax.report.tables import Table, markdown, percent
from lt_jax.sweep import loader

ROWS = {
  'ce,protocol=cui': 'cross-entropy',
  'cb_ce': 'class-balanced cross-entropy',
  'cb_finetune': 'class-balanced fine-tuning',
  'cb_finetune,protocol=shu': 'class-balanced fine-tuning, rerun',
  'l2rw': 'L2RW',
  'l2rw,protocol=shu': 'L2RW, rerun',
  'mwn': 'meta-weight net',
  'meta_ce': 'two components, cross-entropy',
  'sigmoid_focal': 'focal',
  'cb_focal': 'class-balanced focal',
  'meta_focal': 'two components, focal',
  'ldam': 'LDAM',
  'ldam_drw': 'LDAM-DRW',
  'meta_ldam': 'two components, LDAM',
}
"""Recipe and its options -> its name in the talk."""

IMBALANCES = (200, 100, 50, 20, 10, 1)
SEEDS = '0,1,2'


def sweeps(classes, imbalance):
  """Returns the sweeps of a column: name of the folder -> sweep."""
  methods = {}
  for row in ROWS:
    recipe, _, option = row.partition(',')
    methods.setdefault(option, []).append(recipe)
  return {
    folder(imbalance, option): tables.Sweep(
      f'cifar{classes}_lt.py:{options(imbalance, option)}', ','.join(recipes), SEEDS
    )
    for option, recipes in methods.items()
  }


def folder(imbalance, option):
  return f'{imbalance},{option}'.rstrip(',')


def options(imbalance, option):
  return ','.join(filter(None, [option, f'imbalance={imbalance}']))


def cells(classes, workdir):
  """Returns (row, imbalance) -> the finished runs with that cell's setting."""
  found = {}
  for row in ROWS:
    recipe, _, option = row.partition(',')
    for imbalance in IMBALANCES:
      argument = options(imbalance, option)
      path = os.fspath(tables.ROOT / 'configs' / f'cifar{classes}_lt.py')
      make = loader(path, argument, {})
      own = published.setting(resolve(make(recipe)))
      here = files.absolute(workdir) / folder(imbalance, option) / recipe
      try:
        there = runs.find(here) if here.is_dir() else []
      except UserError:  # no run has started
        there = []
      found[row, imbalance] = [
        run for run in there if run.result and published.setting(run.config) == own
      ]
  return found


def cell_text(ours, number):
  """Returns the text of a cell: our error or 'not run', and the published number."""
  text = 'not run'
  if ours:
    best = [(run.result.get('best_on_test') or {}).get('accuracy') for run in ours]
    errors = [
      percent([None if value is None else 1 - value for value in values])
      for values in ([run.result['test']['accuracy'] for run in ours], best)
    ]
    seeds = f', {len(ours)} of 3 seeds' * (len(ours) < 3)
    text = f'{errors[0]} (best {errors[1]}{seeds})'
  if number is None:
    return f'{text}; -'
  return f'{text}; {number["value"]:.2f}{"*" if "mark" in number else ""}'


def table(classes, found):
  """Returns the table, and notes on its asterisks.

  Args:
    classes: 10 or 100.
    found: what `cells` returns.
  """
  numbers = {r['config']: r for r in published.read()[0] if r['metric'] == 'error'}
  rows, notes = [], {}
  for row, title in ROWS.items():
    texts = []
    for imbalance in IMBALANCES:
      number = numbers.get(f'cifar{classes}_lt:{row},imbalance={imbalance}')
      texts.append(cell_text(found[row, imbalance], number))
      if number and 'mark' in number:
        notes.setdefault((row, number['mark']), []).append(str(imbalance))
    rows.append([title, row, *texts])
  headings = ['method', 'recipe', *(f'imbalance {n}' for n in IMBALANCES)]
  lines = [f'{row} at {", ".join(at)}: {mark}' for (row, mark), at in notes.items()]
  return Table(headings, rows, [''] * len(rows)), lines


def main():
  given = sys.argv[1:]
  end = given.index('--') if '--' in given else len(given)
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--classes', type=int, choices=(10, 100), required=True)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--show', action='store_true', help='only print the table')
  chosen = parser.parse_args(given[:end])
  code = 0
  for imbalance in () if chosen.show else IMBALANCES:
    for name, one in sweeps(chosen.classes, imbalance).items():
      one = one._replace(options=tuple(given[end + 1 :]))
      codes = tables.sweep(one, chosen.workdir / name)
      code = next(filter(None, [code, *codes]), 0)
  made, notes = table(chosen.classes, cells(chosen.classes, chosen.workdir))
  lines = [
    'Top-1 error in %: ours at the last epoch (and the best one); published.',
    markdown(made),
    '\n'.join(f'* {note}' for note in notes),
  ]
  text = '\n\n'.join(lines)
  print(text)
  if chosen.workdir.is_dir():
    (chosen.workdir / f'two_component_cifar{chosen.classes}.md').write_text(text + '\n')
  raise SystemExit(code)


if __name__ == '__main__':
  raise SystemExit(commands.exit_code(main))
