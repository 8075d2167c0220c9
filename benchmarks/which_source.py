"""Does similarity predict transfer? Domains as sources and targets of each other.

  python -m benchmarks.which_source --workdir=DIR amazon=office31_lite0.npz \
    dslr=office31_lite0.npz webcam=office31_lite0.npz \
    caltech=caltech101_lite0.npz:source

Each argument is DOMAIN=FILE or DOMAIN=FILE:NAME, where the file has features of a
network that was not trained on any of these domains, as `lt_jax.probe --save` writes
them: x_NAME and y_NAME, or x_NAME_train and so on. Each domain in turn is a source: a
bottleneck of 256 and a head learn its classes. The accuracy of a pair is that of a
softmax that learns the target's classes from 5 images per class and the source's
bottleneck, tested on all other images of the target, mean over five draws and three
seeds. The predictions are the earth mover's distance between source and target on the
features that were given, and LogME and others on the features of the source's
bottleneck.

Nothing here predicts from images that the accuracy is measured on, except that the
distance and the scores see all images of the target with their labels, as published.
The numbers go to results/which_source.json.
"""

import argparse
import json
import pathlib

import numpy as np

from benchmarks.layers import accuracies
from lt_jax import commands, features, files, run, similarity
from lt_jax.config import apply, base_config, resolve
from lt_jax.errors import UserError
from lt_jax.evals import probing, transferability
from lt_jax.evals import similarity as measures
from lt_jax.protocols import train_by
from lt_jax.protocols.pairs import BATCH, FEATURE_STEPS, tllib
from lt_jax.results import versions
from lt_jax.writers import write_npz

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'results' / 'which_source.json'
SHOTS, SEEDS = 5, (0, 1, 2)
SCORES = tuple(transferability.OF_FEATURES)


def whole(path, name):
  """Returns the features and labels of all images of a domain in a file."""
  stored = files.read_npz(path)
  names = [name] if f'x_{name}' in stored else [f'{name}_train', f'{name}_test']
  try:
    x, y = (np.concatenate([stored[f'{one}_{n}'] for n in names]) for one in 'xy')
  except KeyError as error:
    raise UserError(f'{path} has no {error}') from None
  labels = np.unique(y, return_inverse=True)[1]
  return probing.Images(x, labels)


def trained(source, path, images, seed, workdir):
  """Trains a bottleneck and a head on a domain; returns the network."""
  folder = workdir / 'runs' / source / str(seed)
  epochs = (FEATURE_STEPS - 0.5) * BATCH / images
  data = {'source': f'npz:{path}', 'standardise': True}
  config = apply(
    base_config(),
    {'name': 'which_source', 'data': data, 'model': {'trunk': 'identity'}},
  )
  config = train_by(config, 'ce', tllib(epochs, epochs))
  config.seed = seed
  if not (folder / 'result.json').exists():
    run.run(resolve(config), folder)
  return features.network(str(folder))


def measured(name, path, network):
  """Returns the accuracy of a probe of a target, and its transferability scores."""
  seen = features.seen(f'npz:{path}', network)
  pool = probing.Images(seen.features, seen.labels)
  found = accuracies('softmax', pool, SHOTS, most=SHOTS)
  return {'accuracy': np.mean(found['accuracy'])} | similarity.scores(seen)


def correlated(rows):
  """Returns what predicts accuracy -> its correlations over the pairs."""
  targets = [row['target'] for row in rows]
  accuracy = [row['accuracy'] for row in rows]
  return {
    name: measures.correlations([row[name] for row in rows], accuracy, targets)
    for name in ('similarity', *SCORES)
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('domains', nargs='+', metavar='DOMAIN=FILE')
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  given = parser.parse_args()
  raise SystemExit(commands.exit_code(lambda: make(given)))


def make(given):
  """Trains the sources, measures all pairs and writes the numbers."""
  workdir = files.make_workdir(given.workdir)
  pools, paths = {}, {}
  for domain, _, place in (one.partition('=') for one in given.domains):
    path, _, name = place.partition(':')
    pools[domain] = own = whole(files.absolute(path), name or domain)
    paths[domain] = workdir / f'{domain}.npz'
    classes = [f'{domain}_{label}' for label in range(own.labels.max() + 1)]
    splits = ('train', 'test')  # the same images: tests are made by the probes
    arrays = {f'x_{split}': own.features for split in splits}
    arrays |= {f'y_{split}': own.labels for split in splits}
    write_npz(paths[domain], **arrays, class_names=np.array(classes))
  domains = {
    name: measures.domain(
      name, own.features, own.labels, [str(c) for c in np.unique(own.labels)], 1
    )
    for name, own in pools.items()
  }
  distances = measures.matrix(domains, domains)
  rows, plain = [], {}
  for target, path in paths.items():
    plain[target] = measured(target, path, None)
    for source, of_source in paths.items():
      if source == target:
        continue
      found = [
        measured(
          target,
          path,
          trained(source, of_source, len(pools[source].labels), seed, workdir),
        )
        for seed in SEEDS
      ]
      distance = distances[source, target]
      rows.append(
        {'source': source, 'target': target, 'emd': distance.emd}
        | {'similarity': distance.similarity}
        | {key: float(np.mean([one[key] for one in found])) for key in found[0]}
        | {'accuracy_by_seed': [float(one['accuracy']) for one in found]}
      )
      print(rows[-1], flush=True)
  report = {'shots': SHOTS, 'seeds': SEEDS, 'versions': versions(), 'rows': rows}
  report |= {'without_a_source': plain, 'correlations': correlated(rows)}
  files.write_json(files.absolute(RESULTS), report)
  print(json.dumps(report['correlations'], indent=1, default=float))
  print(RESULTS)


if __name__ == '__main__':
  main()
