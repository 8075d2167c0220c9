"""The tables of docs/results.md: each is a sweep whose numbers go to results/NAME.json.

  python -m benchmarks.tables digits_lt --workdir=runs/digits_lt

benchmarks/two_component.py makes the table of the two-component approach.

Run the same command again to run what has not finished; that way you can fill a table
in several sittings. On a CPU the methods are split among sweeps of one core each, which
is faster for networks this small. On an accelerator there is one sweep, which gets
whatever follows `--` as its options, such as `-- --vectorise`. The published tables are
those of report.md in the same folder.

An option can also say where the data are (`-- --config.data.source=npz:FILE`). Any
other option (`-- --config.epochs=2`, `-- --methods=ce --seeds=0`) makes a different
table from the published one, so its numbers go to DIR/NAME.json.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import platform
import re
import shlex
import signal
import subprocess
import sys
from typing import NamedTuple

from lt_jax import commands, files, report
from lt_jax.config import resolve, trained_by
from lt_jax.errors import WRONG_INPUT
from lt_jax.evals import titles
from lt_jax.recipes import RECIPES
from lt_jax.report import runs as read
from lt_jax.sweep import cells, loader, parse_grid

ONE_DOMAIN = [
  name for name, made in RECIPES.items() if {'meta', 'held_out'}.issuperset(made.needs)
]
"""Recipes that learn from a single data set."""

TWO_DOMAINS = [name for name, made in RECIPES.items() if made.needs == ('target',)]
"""Recipes for domain adaptation, and their controls."""

ZERO_SHOT = [n for n, made in RECIPES.items() if made.needs == ('class_vectors',)]

FINE_TUNING = [n for n, made in RECIPES.items() if made.needs == ('init',)]

ROOT = pathlib.Path(__file__).parents[1]

CIFAR = (
  'ce,focal,cb_ce,cb_focal,ldam,ldam_drw,ce_drw,balanced_softmax,l2rw,mwn,meta_ce,'
  'meta_ce_control,meta_focal,meta_ldam,crt,tau_norm'
)

PAIR = 'source_only,dann,adda,dan,deep_coral,self_supervised,fda,target_only'

PIXELS = (
  'source_only,entropy,minent,advent,advent_minent,label_prior,fda,mean_teacher,'
  'target_only'
)


class Sweep(NamedTuple):
  """The arguments of `lt_jax.sweep` for a table."""

  config: str
  methods: str
  seeds: str
  options: tuple[str, ...] = ()


BETAS = '--grid=class_weights.beta=0.9,0.99,0.999,0.9999'
GAMMAS = '--grid=loss.gamma=0.5,1,2'

SWITCHES = (
  '--grid=stages.meta.method.prior=class_weights,none',
  '--grid=stages.meta.method.clip=False,True',
  '--grid=stages.meta.method.normalise=False,True',
  # Large enough to have an effect: without a prior, epsilon is the whole weight.
  '--config.stages.meta.method.eps_scale=relative',
  '--config.stages.meta.method.eps_lr=0.5',
)
"""The switches between learning to reweight and the two-component approach."""

# Validation images, which no CIFAR protocol has.
VALIDATED = ('--config.data.n_max=4950', '--config.data.val_per_class=50')


def cifar(classes: int, imbalance: int) -> Sweep:
  """Returns a table in the papers' setting: ResNet-32, their schedules, three seeds."""
  return Sweep(f'cifar{classes}_lt.py:imbalance={imbalance}', CIFAR, '0,1,2')


TABLES = {
  'digits_lt': Sweep('digits_lt.py', ','.join(ONE_DOMAIN), '0,1,2,3,4'),
  # Learned weights that change more than the papers' constants allow.
  'digits_lt_mwn': Sweep(
    'digits_lt.py:mwn',
    'mwn',
    '0,1,2,3,4',
    ('--config.players.weight_net.schedule.base=0.1',),
  ),
  'digits_lt_meta_ce': Sweep(
    'digits_lt.py:meta_ce',
    'meta_ce',
    '0,1,2,3,4',
    (
      '--config.stages.meta.method.eps_scale=relative',
      '--config.stages.meta.method.eps_lr=0.5',
    ),
  ),
  # The tail as a domain shift: the balanced set without labels, and controls.
  'digits_lt_tail_shift': Sweep(
    'digits_lt.py',
    'ce,ce_plus_meta,meta_ce,tail_mmd,tail_dann,tail_self_supervised,tail_mmd_meta',
    '0,1,2,3,4',
  ),
  # The best class-balanced loss, chosen on validation images.
  'digits_lt_cb_focal': Sweep('digits_lt.py', 'cb_focal', '0,1,2,3,4', (GAMMAS, BETAS)),
  'digits_lt_cb': Sweep('digits_lt.py', 'cb_ce,cb_sigmoid', '0,1,2,3,4', (BETAS,)),
  'digits_lt_switches': Sweep(
    'digits_lt.py:meta_ce',
    'meta_ce',
    '0,1,2,3,4',
    ('--grid=defer_epoch=0,160', *SWITCHES),
  ),
  'digits_domains': Sweep('digits_domains.py', ','.join(TWO_DOMAINS), '0,1,2,3,4'),
  'digits_zero_shot': Sweep('digits_zero_shot.py', ','.join(ZERO_SHOT), '0,1,2,3,4'),
  'open_world': Sweep('open_world.py', ','.join(ZERO_SHOT), '0,1,2,3,4'),
  'digits_transfer': Sweep(
    'digits_transfer.py', ','.join(['ce', *FINE_TUNING]), '0,1,2,3,4'
  ),
  'mnist_mnistm': Sweep('mnist_mnistm.py', f'{PAIR},sa', '0,1,2'),
  'mnist_usps': Sweep('mnist_usps.py:steps=2000', f'{PAIR},sa', '0,1,2'),
  'usps_mnist': Sweep('usps_mnist.py:steps=2000', f'{PAIR},sa', '0,1,2'),
  'c_digits_small': Sweep(
    'c_digits_small.py:epochs=10',
    'source_only,dann,adda_cycada,ocda_source,ocda,ocda_released,ocda_no_memory,'
    'ocda_no_indicator,ocda_random_order,ocda_oracle_domains,target_only',
    '0,1,2',
  ),
  'c_mazes': Sweep(
    'c_mazes.py',
    'source_only,dann,deep_coral,mcc,ocda_source,ocda,target_only',
    '0,1,2',
  ),
  'scenes_zero_shot': Sweep(
    'scenes_zero_shot.py:target=real',
    'zero_shot_pixels,zero_shot_pixels_self_training,boundless',
    '0,1,2',
  ),
  'scenes': Sweep('scenes.py', PIXELS, '0,1,2'),
  'scenes_compound': Sweep(
    'scenes.py:target=fog+night+rain',
    'source_only,adapt_seg,minent,ocda,ocda_entropy,ocda_no_memory,ocda_no_indicator,'
    'ocda_random_order,target_only',
    '0,1,2',
  ),
  'camvid_dusk': Sweep('camvid_dusk.py', PIXELS, '0,1,2'),
  'cifar10_lt_cb_focal': Sweep(
    'cifar10_lt.py:imbalance=100', 'cb_focal', '0,1,2', (GAMMAS, BETAS, *VALIDATED)
  ),
  'cifar10_lt_cb': Sweep(
    'cifar10_lt.py:imbalance=100', 'cb_ce,cb_sigmoid', '0,1,2', (BETAS, *VALIDATED)
  ),
  'cifar10_lt_switches': Sweep(
    'cifar10_lt.py:meta_ce,imbalance=100',
    'meta_ce',
    '0,1,2',
    ('--grid=defer_epoch=0,160', *SWITCHES),
  ),
  'cifar10_lt_resnet8': Sweep(
    'cifar10_lt.py:net=resnet8,epochs=40',
    'ce,cb_ce,ce_drw,ldam_drw,balanced_softmax,meta_ce,meta_ce_control,crt,oltr',
    '0',
  ),
} | {
  f'cifar{classes}_lt_{imbalance}': cifar(classes, imbalance)
  for imbalance, classes in itertools.product((100, 10, 200, 50, 20), (10, 100))
}
"""name -> its sweep, the most informative first."""

SAME_TABLE = re.compile(r'--vectorise|--config\.(data|domains\.\w+)\.(source|dir)=.*')
"""Options that leave a table the same as the published one."""


def sweep(chosen, workdir):
  """Runs the cells of a table that have not finished; failed ones are left out.

  Returns:
    The exit codes of its sweeps, or only that of the check before them if it fails.
  """
  methods = chosen.methods.split(',')
  check = [*_command(chosen, methods, workdir), '--list']
  code = subprocess.run(check, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
  if code:
    return [code]
  cores = os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else set()
  own = sorted(cores)[: len(methods)] if cores and backend() == 'cpu' else [None]
  started = []
  # Passes on signals that only this process gets, as from `timeout`.
  signal.signal(signal.SIGTERM, lambda number, _: [p.terminate() for p in started])
  for i, core in enumerate(own):
    if core is not None:
      os.sched_setaffinity(0, {core})  # inherited by the process started below
    command = _command(chosen, methods[i :: len(own)], workdir)
    started.append(subprocess.Popen(command, cwd=ROOT))
  if cores:
    os.sched_setaffinity(0, cores)
  return [process.wait() for process in started]


def _command(chosen, methods, workdir):
  """Returns the command that sweeps over some methods of a table."""
  command = [sys.executable, '-m', 'lt_jax.sweep', f'--config=configs/{chosen.config}']
  command += [f'--methods={",".join(methods)}', f'--seeds={chosen.seeds}']
  return [*command, f'--workdir={workdir}', *chosen.options]


def backend():
  """Returns JAX's backend, from another process so that this one doesn't hold it."""
  command = [sys.executable, '-c', 'import jax; print(jax.default_backend())']
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  return done.stdout.strip()


def table(config, runs):
  """Returns the rows of a table: one per method, with every seed's numbers."""
  file, _, argument = config.partition(':')
  argument = ','.join(part for part in argument.split(',') if '=' in part)
  make = loader(os.fspath(ROOT / 'configs' / file), argument, {})
  groups, _ = read.grouped(runs)
  rows = []
  for group in groups:
    if not group.counted:
      continue
    results = [run.result for run in group.counted]
    recipe = ','.join(filter(None, (results[0]['recipe'], argument)))
    given = overrides(make(results[0]['recipe']), group.counted[0].config)
    command = ['python', '-m', 'lt_jax.main', f'--config=configs/{file}:{recipe}']
    rows.append(
      {
        'recipe': results[0]['recipe'],
        'command': f'{shlex.join([*command, *given])} --config.seed=SEED --workdir=DIR',
        'config_digest': group.counted[0].kind[0],
        'data': group.counted[0].kind[1],
        'seeds': [result['seed'] for result in results],
        'device': sorted({result['device'] for result in results}),
        'versions': results[0]['versions'],
        'wall_seconds': [result['wall_seconds'] for result in results],
        'replicas': [result.get('replicas', 1) for result in results],
        'best_on_test': [(r['best_on_test'] or {}).get('accuracy') for r in results],
        'learned_over_prior': [learned_over_prior(run) for run in group.counted],
        'val_accuracy': [(r.get('val') or {}).get('accuracy') for r in results],
        'domains': {
          name: [result['domains'][name][headline(results)] for result in results]
          for name in results[0].get('domains') or {}
        },
        'test': {
          metric: [result['test'][metric] for result in results]
          for metric in titles()
          if metric in results[0]['test']
        },
      }
    )
  return rows


def headline(results):
  """Returns the metric that tables show for every domain."""
  return next(metric for metric in titles() if metric in results[0]['test'])


def overrides(before, config):
  """Returns the options that turn a recipe's config into that of a run."""
  before = trained_by(resolve(before))
  return [
    anywhere(f'--config.{key}={tuple(value) if isinstance(value, list) else value}')
    for key, value in trained_by(config).items()
    if key != 'seed' and value != before.get(key)
  ]


def anywhere(option):
  """Removes this machine's folders from an option: npz:/home/x.npz -> npz:x.npz."""
  return re.sub(r'(=|:)~?/[^\s:]*/', r'\1', option)


def learned_over_prior(run):
  """Returns mean |learned weight| over mean prior, averaged over the meta steps."""
  rows = [row['learned_over_prior'] for row in run.rows if 'learned_over_prior' in row]
  return sum(rows) / len(rows) if rows else None


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('name', choices=TABLES)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  given = sys.argv[1:]
  end = given.index('--') if '--' in given else len(given)
  options = parser.parse_args(given[:end])
  make = functools.partial(make_table, options.name, options.workdir, given[end + 1 :])
  raise SystemExit(commands.exit_code(make))


def make_table(name, workdir, passed):
  """Makes a table, and exits with the exit code of its sweep."""
  config, methods, seeds, options = TABLES[name]
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  parser.add_argument('--methods', default=methods)
  parser.add_argument('--seeds', default=seeds)
  own, rest = parser.parse_known_args(passed)
  chosen = Sweep(config, own.methods, own.seeds, (*options, *rest))
  workdir = files.absolute(workdir)
  given = [o.removeprefix('--grid=') for o in chosen.options if o.startswith('--grid=')]
  grid = parse_grid(given)
  every = cells(own.methods.split(','), own.seeds.split(','), workdir, grid)
  code = next(filter(None, sweep(chosen, workdir)), 0)
  if code and not workdir.exists():
    raise SystemExit(code)  # the sweep has printed why
  report.write(workdir)
  folders = {cell.workdir for cell in every}
  rows = table(config, [run for run in read.find(workdir) if run.folder in folders])
  if not rows:
    commands.fail(f'no run in {workdir} has finished', code or WRONG_INPUT)
  again = ['python', '-m', 'benchmarks.tables', name, '--workdir=DIR']
  facts = {
    'command': shlex.join(
      [*again, *(['--', *map(anywhere, passed)] if passed else [])]
    ),
    'methods': list(dict.fromkeys(cell.method for cell in every)),
    'seeds': list(dict.fromkeys(cell.seed for cell in every)),
    'machine': f'{platform.machine()}, {os.cpu_count()} cores',
  }
  folder = ROOT / 'results' if all(map(SAME_TABLE.fullmatch, passed)) else workdir
  folder.mkdir(exist_ok=True)
  path = folder / f'{name}.json'
  text = json.dumps(facts, indent=1).removesuffix('\n}')
  rows = ',\n'.join(map(json.dumps, rows))
  path.write_text(f'{text},\n "rows": [\n{rows}\n]}}\n')
  print(f'{(workdir / "report.md").read_text()}\n{path}')
  raise SystemExit(code)


if __name__ == '__main__':
  main()
