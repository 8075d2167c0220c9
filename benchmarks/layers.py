"""The table of Caltech-101 by layer: probes of a frozen network, several draws.

  python -m benchmarks.layers caltech101.npz --init=lite0.safetensors --workdir=DIR

The .npz has x_train, y_train, x_test, y_test and class_names, whose two parts are one
pool. Every draw takes 30 images of each class from it and tests on the others. An SVM
and a softmax learn from 1, 5, 15 and 30 of these images. How strongly they are
regularised is chosen on the first draw, by folds of its training images, and kept for
the others, which test on some of these images. Run the same command again to run the
layers that have not finished. Once all are, the numbers go to
results/caltech101_layers.json.
"""

import argparse
import hashlib
import json
import pathlib

import numpy as np

from configs import fine_grained
from lt_jax import commands, files, probe
from lt_jax.config import resolve
from lt_jax.evals import probing
from lt_jax.results import versions
from lt_jax.surgeries import classifiers

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'results' / 'caltech101_layers.json'
SHOTS, KINDS = (1, 5, 15, 30), ('svm', 'softmax')
MOST = max(SHOTS)
DRAWS, BUDGET = 5, 2048


def whole(network, layer, folder):
  """Returns the features of a layer for all images of the pool."""
  parts = [
    probe.cached(network, [layer], split, folder, BUDGET)[layer]
    for split in ('train', 'test')
  ]
  return probing.Images(*map(np.concatenate, zip(*parts, strict=True)))


def accuracies(kind, pool, shots, draws=DRAWS, most=MOST):
  """Returns the chosen strength, and for each draw the mean accuracy over classes.

  Args:
    kind: 'svm' or 'softmax'.
    pool: all images.
    shots: images per class to learn from.
    draws: the number of draws.
    most: images per class to draw; all others are the test set.
  """
  strengths, found = (), []
  if shots == 1:  # no image can be held out
    strengths = (classifiers.CLASSIFIERS[kind].default,)
  for draw in range(draws):
    place = probing.places_in_class(pool.labels, draw)
    used, rest = place < shots, place >= most
    x, labels = pool.features[used], pool.labels[used]
    scale = classifiers.scaling(x)
    fitted = classifiers.chosen(
      kind, scale(x), labels, pool.labels.max() + 1, strengths=strengths
    )
    strengths = (fitted.strength,)
    predicted = np.argmax(fitted.classifier(scale(pool.features[rest])), axis=1)
    found.append(classifiers.per_class_accuracy(predicted, pool.labels[rest]))
  return {'accuracy': found, 'strength': strengths[0]}


def markdown(found):
  """Returns a table of the mean over the draws, in %."""
  columns = [(kind, shots) for kind in KINDS for shots in SHOTS]
  heads = ['layer', *(f'{kind}, {shots}' for kind, shots in columns)]
  rows = [
    [
      f'`{layer}`',
      *(f'{100 * np.mean(row[k][str(s)]["accuracy"]):.1f}' for k, s in columns),
    ]
    for layer, row in found.items()
  ]
  return '\n'.join(f'| {" | ".join(r)} |' for r in (heads, ['---'] * len(heads), *rows))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('pool', type=pathlib.Path)
  parser.add_argument('--init', type=pathlib.Path, required=True)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  given = parser.parse_args()
  raise SystemExit(commands.exit_code(lambda: make(given)))


def make(given):
  """Fits what is missing, prints the table and writes its numbers."""
  workdir = files.make_workdir(given.workdir)
  data = f'data=npz:{given.pool.absolute()},size=0,background=1'
  config = fine_grained.get_config(
    f'ce,target=caltech101,{data},net=efficientnet_lite0'
  )
  network = probe.untrained(resolve(config), str(given.init.absolute()))
  layers = probe.chosen_layers(network, ())
  for split in ('train', 'test'):  # all layers in one pass
    probe.cached(network, layers, split, workdir / 'features', BUDGET)
  key = network.stage.dataset.fingerprint, probe.digest(network.state), SHOTS, DRAWS
  name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
  path = workdir / f'layers_{name}.json'
  found = files.read_json(path) if path.exists() else {}
  for layer in layers:
    if layer not in found:
      pool = whole(network, layer, workdir / 'features')
      found[layer] = {
        kind: {str(shots): accuracies(kind, pool, shots) for shots in SHOTS}
        for kind in KINDS
      }
      files.write_json(path, found)
      print(layer, flush=True)
  report = {'draws': DRAWS, 'versions': versions(), 'layers': found}
  files.write_atomically(files.absolute(RESULTS), json.dumps(report) + '\n')
  print(f'{markdown(found)}\n{RESULTS}')


if __name__ == '__main__':
  main()
