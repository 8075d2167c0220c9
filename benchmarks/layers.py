"""The table of Caltech-101 by layer: probes of a frozen network, several draws.

  python -m benchmarks.layers caltech101.npz --init=lite0.safetensors --workdir=DIR

The .npz has x_train, y_train, x_test, y_test and class_names. Every draw takes 30
images of each class from both parts for training, and tests on the rest. `lt_jax.probe`
then fits an SVM and a softmax to 1, 5, 15 and 30 of them. Run the same command again to
run the draws that have not finished. The numbers go to results/caltech101_layers.json.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
SHOTS, KINDS = (1, 5, 15, 30), ('svm', 'softmax')
TRAIN = 30


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


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('pool', type=pathlib.Path)
  parser.add_argument('--init', type=pathlib.Path, required=True)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--draws', type=int, default=5)
  given = parser.parse_args()
  given.workdir = given.workdir.absolute()
  given.init = given.init.absolute()
  given.workdir.mkdir(parents=True, exist_ok=True)
  draws = [probed(number, given) for number in range(given.draws)]
  table = {
    layer: {
      'values': row['values'],
      **{
        kind: {
          str(fit['shots']): [
            found[layer]['classifiers'][kind][i]['accuracy'][0] for found in draws
          ]
          for i, fit in enumerate(row['classifiers'][kind])
        }
        for kind in KINDS
      },
    }
    for layer, row in draws[0].items()
  }
  report = {'draws': given.draws, 'layers': table}
  path = ROOT / 'results' / 'caltech101_layers.json'
  path.write_text(json.dumps(report, indent=1) + '\n')
  heads = [f'{kind}, {shots}' for kind in KINDS for shots in SHOTS]
  print(f'| layer | {" | ".join(heads)} |\n|{"---|" * (1 + len(heads))}')
  for layer, row in table.items():
    cells = [row[kind][str(shots)] for kind in KINDS for shots in SHOTS]
    print(f'| `{layer}` | {" | ".join(f"{100 * np.mean(c):.1f}" for c in cells)} |')
  print(path)


if __name__ == '__main__':
  main()
