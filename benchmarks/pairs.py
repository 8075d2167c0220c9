"""Tables of domain pairs: every method from every domain to every other.

  python -m benchmarks.pairs office_caltech10 --workdir=runs/office_caltech10

The features come from files, see configs/NAME.py; --features=FILE if yours has another
name. There is one process, and runs of the same shape share one compiled program. Run
the same command again to run what has not finished. The numbers go to
results/NAME.json; with --methods or --seeds, which make a different table, they go to
WORKDIR/NAME.json.
"""

import argparse
import importlib
import itertools
import json
import pathlib
from typing import NamedTuple

import numpy as np

from lt_jax import commands, files, run
from lt_jax.config import resolve
from lt_jax.results import versions

ROOT = pathlib.Path(__file__).parents[1]


class Table(NamedTuple):
  """The runs of a table.

  Attributes:
    domains: their names.
    features: the file they are in.
    methods: arguments of the config, starting with a recipe.
    seeds: one seed is enough for recipes without random numbers.
  """

  domains: tuple[str, ...]
  features: str
  methods: tuple[str, ...]
  seeds: tuple[int, ...] = (0,)


TABLES = {
  'office_caltech10': Table(
    ('caltech', 'amazon', 'webcam', 'dslr'),
    'office_caltech10_surf.npz',
    (
      'nearest_neighbour',
      'sa',
      'sa_oracle',
      'coral_shallow',
      'linear_svm',
      'sa,classifier=linear_svm',
      'coral_shallow,classifier=linear_svm',
    ),
  ),
  'office31': Table(
    ('amazon', 'dslr', 'webcam'),
    'office31_lite0.npz',
    ('source_only', 'dan', 'dann', 'mcc', 'sa', 'target_only'),
    (0, 1, 2),
  ),
}


def cell(name, method, pair, seed, features, workdir):
  """Returns (target accuracy, seconds, memory) of a run; runs it if it is missing."""
  folder = workdir / f'{method}/{"-".join(pair)}/{seed}'
  made = importlib.import_module(f'configs.{name}').get_config(
    f'{method},source={pair[0]},target={pair[1]},features={features}'
  )
  made.seed = seed
  path = folder / 'result.json'
  result = json.loads(path.read_text()) if path.exists() else None
  if result is None:
    result = run.run(resolve(made), folder)
  return result['test']['accuracy'], result['wall_seconds'], result['memory']


def percent(values):
  """Returns the mean in %, with the standard deviation if there are several seeds."""
  values = 100 * np.asarray(values)
  if len(values) == 1:
    return f'{values[0]:.2f}'
  return f'{values.mean():.1f} ± {values.std(ddof=1):.1f}'


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('name', choices=TABLES)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--features', default='', help='the .npz, if it is elsewhere')
  parser.add_argument('--methods', nargs='*', default=None)
  parser.add_argument('--seeds', type=int, nargs='*', default=None)
  given = parser.parse_args()
  raise SystemExit(commands.exit_code(lambda: make(given)))


def make(given):
  """Runs a table, prints it and writes its numbers."""
  table = TABLES[given.name]
  methods, seeds = given.methods or table.methods, given.seeds or table.seeds
  features = files.absolute(given.features or table.features)
  pairs = [*itertools.permutations(table.domains, 2)]
  workdir = files.absolute(given.workdir)
  rows = {
    method: {
      '>'.join(pair): [
        cell(given.name, method, pair, seed, features, workdir) for seed in seeds
      ]
      for pair in pairs
    }
    for method in methods
  }
  titles = [f'{a[0]}>{b[0]}'.upper() for a, b in pairs]
  print(f'| method | {" | ".join(titles)} | mean |')
  print('|---' * (len(titles) + 2) + '|')
  for method, found in rows.items():
    accuracy = np.array([[one[0] for one in cells] for cells in found.values()])
    texts = [percent(own) for own in accuracy]
    print(f'| `{method}` | {" | ".join(texts)} | {percent(accuracy.mean(0))} |')
  whole = given.methods is None and given.seeds is None
  folder = ROOT / 'results' if whole else workdir
  path = pathlib.Path(folder) / f'{given.name}.json'
  report = {
    'command': f'python -m benchmarks.pairs {given.name} --workdir=DIR',
    'seeds': list(seeds),
    'versions': versions(),
    'rows': {
      method: {
        pair: {
          'accuracy': [one[0] for one in cells],
          'wall_seconds': [one[1] for one in cells],
          'chosen': [one[2] for one in cells],
        }
        for pair, cells in found.items()
      }
      for method, found in rows.items()
    },
  }
  path.write_text(json.dumps(report, indent=1) + '\n')
  print(path)


if __name__ == '__main__':
  main()
