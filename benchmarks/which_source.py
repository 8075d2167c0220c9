"""Does similarity predict transfer? Domains as sources and targets of each other.

  python -m benchmarks.which_source --workdir=DIR amazon=office31_lite0.npz \
    dslr=office31_lite0.npz webcam=office31_lite0.npz \
    caltech=caltech101_lite0.npz:source

Each argument is DOMAIN=FILE.npz, or DOMAIN=FILE.npz:NAME if the file has another name
for it. The file has features of a network that was not trained on any of these domains,
as `lt_jax.probe --save` writes them: x_NAME and y_NAME, or x_NAME_train, x_NAME_test
and their labels.

Each domain in turn is a source: a bottleneck of 256 and a head learn its classes. For
every other domain, a softmax then learns the target's classes from 5 images per class,
seen through the bottleneck, and is tested on all other images of the target: mean over
five draws and three seeds. There are two controls: the features as they were given, and
a bottleneck that learned nothing.

What may predict this accuracy: the earth mover's distance between source and target on
the given features, and LogME and other scores of the source's bottleneck on the target.
As published, all of them read every image of the target with its label, including those
that the accuracy is measured on. The numbers go to results/which_source.json.
"""

import argparse
import hashlib
import pathlib
from typing import NamedTuple

import numpy as np

from benchmarks.layers import accuracies
from lt_jax import commands, features, files, run, similarity
from lt_jax.config import apply, base_config, resolve
from lt_jax.errors import UserError
from lt_jax.evals import probing
from lt_jax.evals import similarity as measures
from lt_jax.protocols import train_by
from lt_jax.protocols.pairs import BATCH, BOTTLENECK, FEATURE_STEPS, tllib
from lt_jax.results import versions
from lt_jax.surgeries import classifiers
from lt_jax.writers import write_npz

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'results' / 'which_source.json'
SHOTS, SEEDS = 5, (0, 1, 2)
FEWEST = 3
"""Domains: with fewer, a target has no sources to rank."""


class Domain(NamedTuple):
  """A domain: its images, a file of them, and their classes for distances."""

  name: str
  pool: probing.Images
  path: str
  classes: measures.Domain
  digest: str


def opened(argument, workdir):
  """Returns the domain that an argument describes, and writes its file.

  Raises:
    UserError: a malformed argument, a missing file or array, or a class that is too
      small to test.
  """
  name, separator, path = argument.partition('=')
  if not separator:
    raise UserError(f'{argument!r} is not DOMAIN=FILE.npz')
  inside = name
  if not path.endswith('.npz'):
    path, _, inside = path.rpartition(':')
  path = files.absolute(path)
  if not path.exists():
    raise UserError(f'{argument}: there is no file {path}')
  stored = files.read_npz(path)
  parts = [inside] if f'x_{inside}' in stored else [f'{inside}_train', f'{inside}_test']
  try:
    x, y = (np.concatenate([stored[f'{n}_{part}'] for part in parts]) for n in 'xy')
  except KeyError as error:
    raise UserError(f'{path} has no array {error}') from None
  x, y = x[y >= 0], y[y >= 0]
  labels = np.unique(y, return_inverse=True)[1]
  smallest = np.bincount(labels).min()
  if smallest <= SHOTS:
    raise UserError(
      f'{name}: a class has {smallest} images, but {SHOTS} are learned from, and at '
      'least one is tested'
    )
  classes = [f'{name}_{label}' for label in range(labels.max() + 1)]
  # Both splits hold all images: a run's own test accuracy means nothing here.
  arrays = {
    f'{n}_{split}': a
    for split in ('train', 'test')
    for n, a in (('x', x), ('y', labels))
  }
  write_npz(workdir / f'{name}.npz', **arrays, class_names=np.array(classes))
  return Domain(
    name,
    probing.Images(x, labels),
    f'npz:{workdir / name}.npz',
    measures.domain(name, x, labels, classes, min_images=1),
    hashlib.sha256(x.tobytes() + labels.tobytes()).hexdigest()[:12],
  )


def trained(source, seed, workdir):
  """Returns the network of a bottleneck and a head that learned a source."""
  folder = workdir / 'runs' / f'{source.name}_{source.digest}' / str(seed)
  epochs = (FEATURE_STEPS - 0.5) * BATCH / len(source.pool.labels)
  data = {'source': source.path, 'standardise': True}
  config = apply(
    base_config(),
    {'name': 'which_source', 'data': data, 'model': {'trunk': 'identity'}},
  )
  config = train_by(config, 'ce', tllib(epochs, epochs))
  config.seed = seed
  if not (folder / 'result.json').exists():
    run.run(resolve(config), folder)
  return features.network(str(folder))


def probed(images):
  """Returns the accuracy of softmaxes that learn from few images per class."""
  return np.mean(accuracies('softmax', images, SHOTS, most=SHOTS)['accuracy'])


def at_random(images, seed):
  """Returns images seen through a bottleneck that learned nothing."""
  x, rng = images.features, np.random.default_rng(seed)
  weights = rng.normal(size=(x.shape[1], BOTTLENECK)) / np.sqrt(x.shape[1])
  seen = np.maximum(classifiers.scaling(x)(x) @ weights, 0)
  return images._replace(features=seen.astype(np.float32))


def measured(source, target, distance, workdir):
  """Returns a row: the accuracy of a pair, its distance, and scores of the source."""
  accuracy, scores = [], []
  for seed in SEEDS:
    seen = features.seen(target.path, trained(source, seed, workdir))
    accuracy.append(float(probed(probing.Images(seen.features, seen.labels))))
    scores.append(similarity.scores(seen))
  return {
    'source': source.name,
    'target': target.name,
    'accuracy': float(np.mean(accuracy)),
    'accuracy_by_seed': accuracy,
    'emd': distance.emd,
    'similarity': distance.similarity,
    'scores': {key: float(np.mean([one[key] for one in scores])) for key in scores[0]},
  }


def correlated(rows):
  """Returns how well similarity and each score predict accuracy."""
  predictions = {'similarity': [row['similarity'] for row in rows]}
  for name in rows[0]['scores']:
    predictions[name] = [row['scores'][name] for row in rows]
  accuracy, targets = ([row[key] for row in rows] for key in ('accuracy', 'target'))
  return {
    name: measures.correlations(values, accuracy, targets)
    for name, values in predictions.items()
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('domains', nargs='+', metavar='DOMAIN=FILE.npz')
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  given = parser.parse_args()
  raise SystemExit(commands.exit_code(lambda: make(given)))


def make(given):
  """Trains the sources, measures all pairs and writes the numbers."""
  workdir = files.make_workdir(given.workdir)
  domains = {one.name: one for one in (opened(arg, workdir) for arg in given.domains)}
  if len(domains) < FEWEST:
    raise UserError(f'give at least {FEWEST} domains, each once')
  classes = {name: one.classes for name, one in domains.items()}
  distances = measures.matrix(classes, classes)
  rows, controls = [], {}
  for target in domains.values():
    controls[target.name] = {
      'as_given': float(probed(target.pool)),
      'random_bottleneck': [float(probed(at_random(target.pool, s))) for s in SEEDS],
    }
    print(target.name, controls[target.name], flush=True)
    for source in domains.values():
      if source is not target:
        distance = distances[source.name, target.name]
        rows.append(measured(source, target, distance, workdir))
        print(rows[-1], flush=True)
  report = {'shots': SHOTS, 'seeds': SEEDS, 'versions': versions()}
  report |= {'solver': measures.solver(), 'rows': rows, 'controls': controls}
  report |= {'correlations': correlated(rows)}
  files.write_json(files.absolute(RESULTS), report)
  for name, found in report['correlations'].items():
    rho = found['centred']['spearman']
    print(f'{name}: rho {rho:.2f}, best source for {found["best"]} targets')
  print(RESULTS)


if __name__ == '__main__':
  main()
