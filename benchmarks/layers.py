"""The table of Caltech-101 by layer: probes of a frozen network, several draws.

  python -m benchmarks.layers caltech101.npz --init=lite0.safetensors --workdir=DIR

The .npz has x_train, y_train, x_test, y_test and class_names. Every draw takes 30
images of each class from both parts for training, and tests on the rest. `lt_jax.probe`
then fits an SVM and a softmax to 1, 5, 15 and 30 of them. Run the same command again to
run the draws that have not finished. After each draw, the numbers of all draws so far
go to results/caltech101_layers.json.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'results' / 'caltech101_layers.json'
SHOTS, KINDS = (1, 5, 15, 30), ('svm', 'softmax')
TRAIN, DRAWS = 30, 5


def draw(pool, number, path):
  """Writes one draw of the pool: 30 images per class to train on, the rest to test."""
  with np.load(pool, allow_pickle=False) as stored:
    x, y = (np.concatenate([stored[f'{n}_train'], stored[f'{n}_test']]) for n in 'xy')
    names = stored['class_names']
  rng, train = np.random.RandomState(number), np.zeros(len(y), bool)
  for label in range(len(names)):
    train[rng.permutation(np.flatnonzero(y == label))[:TRAIN]] = True
  parts = {'train': train, 'test': ~train}
  arrays = {f'x_{n}': x[m] for n, m in parts.items()}
  arrays |= {f'y_{n}': y[m] for n, m in parts.items()}
  np.savez(path, class_names=names, **arrays)


def probed(number, given):
  """Returns the result of the probe of a draw; runs it if it is missing."""
  folder = given.workdir / f'draw{number}'
  if not (folder / 'probe.json').exists():
    path = given.workdir / f'draw{number}.npz'
    draw(given.pool, number, path)
    config = f'fine_grained:ce,target=caltech101,data=npz:{path},size=0,background=1'
    command = [sys.executable, '-m', 'lt_jax.probe', f'--init={given.init}']
    command += [f'--config={config},net=efficientnet_lite0', f'--out={folder}']
    command += [f'--shots={",".join(map(str, SHOTS))}', '--draws=1']
    command += [f'--classifiers={",".join(KINDS)}']
    subprocess.run(command, cwd=ROOT, check=True)
    path.unlink()
  return json.loads((folder / 'probe.json').read_text())['layers']


def table(draws):
  """Returns layer -> classifier -> images per class -> accuracies, one per draw."""
  return {
    layer: {kind: _by_shots(draws, layer, kind) for kind in KINDS} for layer in draws[0]
  }


def _by_shots(draws, layer, kind):
  fits = zip(*(found[layer]['classifiers'][kind] for found in draws), strict=True)
  return {one[0]['shots']: [fit['accuracy'][0] for fit in one] for one in fits}


def markdown(found):
  """Returns a table of the mean over the draws, in %."""
  columns = [(kind, shots) for kind in KINDS for shots in SHOTS]
  heads = ['layer', *(f'{kind}, {shots}' for kind, shots in columns)]
  rows = [
    [f'`{layer}`', *(f'{100 * np.mean(row[k][shots]):.1f}' for k, shots in columns)]
    for layer, row in found.items()
  ]
  return '\n'.join(f'| {" | ".join(r)} |' for r in (heads, ['---'] * len(heads), *rows))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('pool', type=pathlib.Path)
  parser.add_argument('--init', type=pathlib.Path, required=True)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  given = parser.parse_args()
  given.workdir, given.init = given.workdir.absolute(), given.init.absolute()
  given.workdir.mkdir(parents=True, exist_ok=True)
  draws = []
  for number in range(DRAWS):
    draws.append(probed(number, given))
    found = table(draws)
    RESULTS.write_text(json.dumps({'draws': len(draws), 'layers': found}) + '\n')
  print(f'{markdown(found)}\n{RESULTS}')


if __name__ == '__main__':
  main()
