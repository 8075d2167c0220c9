"""Whole runs: CIFAR-10-LT with one seed, with several as one program, and in PyTorch.

  python -m benchmarks.epoch [--torch_python=PATH] [--json=FILE] [--source=npz:PATH]

Seconds from the config to the last file, including compilation, an evaluation after
every epoch and the results. PyTorch's loop uses a DataLoader and is timed from its
first tensor to its last accuracy. The sides take turns. Images are generated unless
--source names a file, which makes no difference to the times.
"""

import argparse
import pathlib
import subprocess
import tempfile
import time

import jax
import numpy as np

from benchmarks import timing
from benchmarks.train_step import find_torch
from configs import cifar10_lt
from lt_jax import build, run
from lt_jax.config import resolve

HERE = pathlib.Path(__file__).parent


def configs(options, seeds):
  """Returns a resolved config for each seed."""
  made = []
  for seed in range(seeds):
    argument = f'ce,net={options.net},epochs={options.epochs}'
    config = cifar10_lt.get_config(argument)
    config.seed = seed
    config.data.source = options.source
    config.update(evaluate_every_epochs=1.0, save_every_epochs=options.epochs)
    made.append(resolve(config))
  return made


def one_seed(options):
  """Returns the seconds of a run."""
  (config,) = configs(options, 1)
  with tempfile.TemporaryDirectory() as folder:
    began = time.perf_counter()
    run.run(config, folder)
    return time.perf_counter() - began


def all_seeds(options):
  """Returns the seconds of runs with several seeds as one program."""
  given = configs(options, options.seeds)
  with tempfile.TemporaryDirectory() as folder:
    began = time.perf_counter()
    run.run_seeds(given, [pathlib.Path(folder) / str(c['seed']) for c in given])
    return time.perf_counter() - began


def write_pool(options, path):
  """Writes our training and test images as .npz, for PyTorch."""
  (config,) = configs(options, 1)
  splits = build.build(config, devices=1).dataset.every
  arrays = {}
  for name in ('train', 'test'):
    split = splits[name]
    arrays[f'x_{name}'] = np.stack([split.source[row] for row in split.rows])
    arrays[f'y_{name}'] = split.labels
  np.savez(path, **arrays)


def torch_run(options, python, pool):
  """Returns (seconds, version, device) of PyTorch's run."""
  command = [python, HERE / 'torch_epoch.py', f'--data={pool}']
  command += [f'--epochs={options.epochs}', f'--workers={options.workers}']
  command += [f'--depth={options.net.removeprefix("resnet")}']
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  seconds, _, _, version, device = done.stdout.split()
  return float(seconds), version, device


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--net', default='resnet32')
  parser.add_argument('--epochs', type=int, default=200)
  parser.add_argument('--seeds', type=int, default=8, help='as one program')
  parser.add_argument('--source', default='fake')
  parser.add_argument('--workers', type=int, default=4, help="of PyTorch's DataLoader")
  parser.add_argument('--rounds', type=int, default=1)
  parser.add_argument('--torch_python', default=None)
  parser.add_argument('--json', default=None)
  options = parser.parse_args()

  report = {**timing.facts(), **vars(options), 'seconds': {}}
  del report['json'], report['torch_python']
  seconds = report['seconds']
  python = find_torch(options.torch_python)
  with tempfile.TemporaryDirectory() as folder:
    pool = pathlib.Path(folder) / 'pool.npz'
    if python:
      write_pool(options, pool)
    for _ in range(options.rounds):
      seconds.setdefault('one seed', []).append(one_seed(options))
      seconds.setdefault(f'{options.seeds} seeds', []).append(all_seeds(options))
      if python:
        taken, report['torch'], report['torch_device'] = torch_run(
          options, python, pool
        )
        seconds.setdefault('PyTorch, one seed', []).append(taken)
  report['ratios'] = {
    name: timing.ratio(values, seconds['one seed']) for name, values in seconds.items()
  }
  print(f'\n{jax.devices()[0].device_kind}: {options.net}, {options.epochs} epochs')
  for name, values in seconds.items():
    text = f'{min(values):8.1f} s  {report["ratios"][name]:6.2f} x one seed'
    print(f'  {name:<20}{text}')
  if not python:
    print('  PyTorch: not run, because no Python with it was found')
  timing.write_report(options.json, report)


if __name__ == '__main__':
  main()
