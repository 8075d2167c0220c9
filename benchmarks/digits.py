"""Trains recipes on Digits-LT and draws accuracy by class: docs/digits.svg.

  python -m benchmarks.digits --workdir=runs/digits

Prints the tables of docs/results.md, and how far example weights were learned. Runs
that are finished already are not run again.
"""

import argparse
import json
import pathlib

import numpy as np

DRAWN = {
  'ce': 'cross-entropy',
  'balanced_softmax': 'balanced softmax',
  'ldam_drw': 'LDAM-DRW',
}
LEARNED = ('l2rw', 'mwn', 'meta_ce', 'meta_ldam')
LARGER = {
  'mwn, rate 0.1': ('mwn', {'method.weight_learning_rate': 0.1}),
  'meta_ce, relative 0.5': (
    'meta_ce',
    {
      'stages.meta.method.eps_scale': 'relative',
      'stages.meta.method.eps_lr': 0.5,
    },
  ),
}
"""Learned weights that move further than the papers' constants let them."""
CONTROLS = ('meta_ce_control', 'cb_finetune', 'ce_plus_meta')
OPEN = (
  'ce',
  'ce_aware',
  'focal_aware',
  'lifted',
  'range',
  'openmax',
  'fslwf',
  'oltr',
  'crt',
  'crt_las',
  'lws',
  'tau_norm',
  'ncm',
  'lade',
  'vs',
  'cdt',
)
"""Recipes of the table with the open set."""
OPENED = (
  'auroc',
  'energy:auroc',
  'f_measure_oltr2019',
  'f_measure_oltr2020',
  'f_measure_oltr2019_at_0.1',
)
COLOURS = ('#999999', '#d95f02', '#1b62a5')


def train(name, seed, workdir):
  """Returns the result of one run, from disk where it is finished."""
  from configs import digits_lt
  from lt_jax import build, run

  recipe, changes = LARGER.get(name, (name, {}))
  config = digits_lt.get_config(recipe)
  config.update_from_flattened_dict(changes)
  config.seed = seed
  config.log_every_steps = 100
  folder = workdir / name / str(seed)
  if not (folder / 'result.json').exists():
    run.run(build.resolve(config), folder)
  return json.loads((folder / 'result.json').read_text())


def shown(values):
  """Returns mean ± standard deviation in %, or n/a where a run has no such number."""
  if None in values:
    return 'n/a'
  values = 100 * np.array(values)
  return f'{values.mean():.1f} ± {values.std(ddof=1):.1f}'


def learned_over_prior(folder):
  """Returns mean |weight - prior| over mean prior, over all steps that learned."""
  rows = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
  return np.mean([r['learned_over_prior'] for r in rows if 'learned_over_prior' in r])


def table(results, recipes, columns):
  """Prints mean ± standard deviation of test metrics; 'energy:X' is X by the energy."""
  print('| recipe | ' + ' | '.join(columns) + ' |')
  print('|---' * (len(columns) + 1) + '|')
  for recipe in recipes:
    cells = []
    for column in columns:
      place = 'test_by_energy' if column.startswith('energy:') else 'test'
      name = column.removeprefix('energy:')
      cells.append(shown([run[place].get(name) for run in results[recipe]]))
    print(f'| `{recipe}` | {" | ".join(cells)} |')
  print()


def draw(results, counts, path):
  """Draws the mean accuracy of each class, with one standard deviation."""
  import matplotlib

  matplotlib.use('svg')
  matplotlib.rcParams['svg.hashsalt'] = 'lt_jax'  # the same file from the same numbers
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(7, 3.2), layout='constrained')
  figure.patch.set_facecolor('white')
  place = np.arange(len(counts))
  for offset, (recipe, colour) in enumerate(zip(DRAWN, COLOURS, strict=True)):
    values = 100 * np.array([r['test']['class_accuracy'] for r in results[recipe]])
    axes.errorbar(
      place + 0.12 * (offset - 1),
      values.mean(0),
      values.std(0, ddof=1),
      color=colour,
      fmt='o-',
      markersize=5,
      linewidth=0.8,
      capsize=2,
      label=DRAWN[recipe],
    )
  axes.set_xticks(place, [f'{i}\n{n}' for i, n in enumerate(counts)])
  axes.set_xlabel('digit, and how many training images it has')
  axes.set_ylabel('test accuracy (%)')
  axes.legend(ncols=3, frameon=False, loc='lower left')
  axes.grid(axis='y', linewidth=0.4)
  axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(path, metadata={'Date': None})


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--seeds', type=int, default=5)
  options = parser.parse_args()
  results = {
    recipe: [train(recipe, seed, options.workdir) for seed in range(options.seeds)]
    for recipe in dict.fromkeys((*DRAWN, *LEARNED, *LARGER, *CONTROLS, *OPEN))
  }
  data = json.loads((options.workdir / 'ce' / '0' / 'data.json').read_text())
  draw(
    results,
    data['counts']['train'],
    pathlib.Path(__file__).parents[1] / 'docs' / 'digits.svg',
  )
  closed = ('accuracy', 'many', 'medium', 'few', 'auroc', 'f_measure_oltr2020')
  table(results, (*DRAWN, *LEARNED, *LARGER, *CONTROLS), closed)
  table(results, OPEN, (*closed[:4], *OPENED))
  for recipe in (*LEARNED, *LARGER):
    learned = [
      learned_over_prior(options.workdir / recipe / str(seed))
      for seed in range(options.seeds)
    ]
    print(f'{recipe}: mean |learned part| / mean weight {np.mean(learned):.3g}')


if __name__ == '__main__':
  main()
