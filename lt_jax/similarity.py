r"""Which source suits a target: python -m lt_jax.similarity --source=... --target=...

  python -m lt_jax.similarity --out=found --init=runs/pretrained --min_images=1 \
    --source=folder:animals,folder:plants --target=folder:birds --k=100

compares every source, and their union, with every target, by the features of one
network: the folder of a run, an export, or published weights with --net. Sources and
targets are data ('folder:DIR', 'tfds:NAME', 'npz:FILE', ...), folders of runs, which
stand for their training images, or 'npz:' files of features, which need no network. It
keeps the K source classes nearest to each target, and writes into the folder

  similarity.json      distances, similarities, scores by class, classes to keep
  keep_classes.txt     the classes of the source to keep, for data.keep_classes; with
                       several sources keep_classes_1.txt and so on, in their order
  similarity.html      the matrix, what serves what, similarity against accuracy

--accuracy=FILE.csv has rows source,target,accuracy for pairs with known accuracies.

  python -m lt_jax.similarity --out=found --runs=runs --target=folder:birds

ranks finished runs as starting points for the target, by transferability scores.
"""

import csv
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from lt_jax import commands, files
from lt_jax.errors import UserError, lookup
from lt_jax.evals import similarity as measures
from lt_jax.evals import transferability
from lt_jax.evals.similarity import Domain, Similarity

SOURCE = commands.list_flag('source', 'Source data or runs.')
TARGET = commands.list_flag('target', 'Target data or runs.')
INIT = commands.init_flag()
NET = flags.DEFINE_string('net', '', 'The trunk that published weights belong to.')
SIZE = flags.DEFINE_integer('size', 224, 'Image size for published weights.')
RUNS = commands.path_flag('runs', 'A folder of finished runs to rank.')
ACCURACY = commands.path_flag(
  'accuracy', 'A CSV file with rows source,target,accuracy.'
)
GAMMA = flags.DEFINE_float('gamma', measures.GAMMA, 'Scale of the similarity.')
MIN_IMAGES = flags.DEFINE_integer(
  'min_images',
  measures.MIN_IMAGES,
  'Fewest images of a source class; others are ignored.',
)
K = flags.DEFINE_list(
  'k', ['200'], 'Source classes to keep per target, or one number for all.'
)
RULE = flags.DEFINE_string(
  'rule', 'greedy', 'How classes are ranked: ' + ', '.join(measures.RULES) + '.'
)
OUT = commands.out_flag('The folder to write to.')

UNION = 'union'


def main() -> None:
  """Compares the data or ranks the runs that the flags name."""
  from lt_jax.report.similarity import page

  if not TARGET.value:
    raise UserError('--target is missing: give data or a run')
  if not (SOURCE.value or RUNS.value):
    raise UserError('--source is missing; or give --runs, a folder of finished runs')
  lookup(measures.RULES, 'selection rule', RULE.value)
  folder = files.make_workdir(OUT.value)
  found: dict[str, Any] = {}
  if RUNS.value:
    found['runs'] = ranked(epath.Path(RUNS.value), TARGET.value)
    for target, rows in found['runs'].items():
      print(f'\n{target}')
      for row in rows:
        scores = ', '.join(f'{k} {v:.4g}' for k, v in row['scores'].items())
        print(f'  {row["run"]}: {scores}' + f'  {row["note"]}' * bool(row['note']))
  if SOURCE.value:
    found |= _compared_by_flags(folder)
  files.write_json(folder / 'similarity.json', found)
  files.write_atomically(folder / 'similarity.html', page(found))
  print(f'\n{folder / "similarity.html"}')


def _compared_by_flags(folder: epath.Path) -> dict[str, Any]:
  """Compares the data that the flags name; writes the lists of classes."""
  from lt_jax import features

  network = None
  if INIT.value:
    network = features.network(INIT.value, NET.value, SIZE.value)
  every = {
    name: features.seen(name, network) for name in (*SOURCE.value, *TARGET.value)
  }
  if not all(k.isdecimal() for k in K.value):
    raise UserError(f'--k must be whole numbers: {",".join(K.value)}')
  for line in leaks(every, SOURCE.value, TARGET.value):
    print(f'warning: {line}')

  def domain(name: str, min_images: int) -> Domain:
    one = every[name]
    return measures.domain(name, one.features, one.labels, one.class_names, min_images)

  sources = {name: domain(name, MIN_IMAGES.value) for name in SOURCE.value}
  targets = {name: domain(name, 0) for name in TARGET.value}
  found = compared(
    sources,
    targets,
    gamma=GAMMA.value,
    most=[int(k) for k in K.value],
    rule=RULE.value,
    accuracy=read_accuracy(ACCURACY.value) if ACCURACY.value else {},
  )
  found |= {
    'features': network.name if network else 'as stored',
    'min_images': MIN_IMAGES.value,
    'leaks': leaks(every, SOURCE.value, TARGET.value),
    'transferability': {name: scores(every[name]) for name in TARGET.value},
  }
  names = [f'_{i + 1}' for i in range(len(sources))] if len(sources) > 1 else ['']
  for suffix, kept in zip(names, found['kept'].values(), strict=True):
    text = ''.join(f'{name}\n' for name in kept)
    files.write_atomically(folder / f'keep_classes{suffix}.txt', text)
  for pair in found['pairs']:
    print(
      f'{pair["source"]} -> {pair["target"]}: EMD {pair["emd"]:.4f}, similarity '
      f'{pair["similarity"]:.4f}'
    )
  kept = {name: len(names) for name, names in found['kept'].items()}
  print(
    ', '.join(f'{count} classes of {name} are kept' for name, count in kept.items())
  )
  return found


def compared(
  sources: Mapping[str, Domain],
  targets: Mapping[str, Domain],
  *,
  gamma: float = measures.GAMMA,
  most: Sequence[int] = (200,),
  rule: str = 'greedy',
  accuracy: Mapping[tuple[str, str], float] | None = None,
) -> dict[str, Any]:
  """Returns what similarity.json says about sources and targets.

  Args:
    sources: name -> domain; if there are several, their union is compared too.
    targets: name -> domain.
    gamma: scale of the similarity.
    most: classes to keep for each target, or one number for all.
    rule: how to choose them, see `measures.RULES`.
    accuracy: (source, target) -> accuracy, for pairs where it is known.

  Raises:
    UserError: as for `measures.similarity` and `measures.select`.
  """
  pool = measures.joined(UNION, [*sources.values()])
  rows = {**sources, UNION: pool} if len(sources) > 1 else dict(sources)
  pairs = measures.matrix(rows, targets, gamma)
  chosen, by_class = measures.select(pool, [*targets.values()], most, rule)
  kept = {name: [] for name in sources}
  owners = [(name, label) for name, one in sources.items() for label in one.classes]
  for place in chosen:
    name, label = owners[place]
    kept[name].append(label)
  known = {pair: value for pair, value in (accuracy or {}).items() if pair in pairs}
  return {
    'gamma': gamma,
    'solver': measures.solver(),
    'rule': rule,
    'k': list(most),
    'pairs': [
      {
        'source': s,
        'target': t,
        'emd': one.emd,
        'similarity': one.similarity,
        'accuracy': known.get((s, t)),
      }
      for (s, t), one in pairs.items()
    ],
    'classes': [f'{name}/{label}' for name, label in owners],
    'by_class': {name: values.tolist() for name, values in by_class.items()},
    'kept': kept,
    'flows': [_flow(rows[s], targets[t], one) for (s, t), one in pairs.items()],
    'correlations': _correlations(pairs, known),
  }


def _flow(source: Domain, target: Domain, found: Similarity, most: int = 60) -> dict:
  """Returns the largest flows from classes of a source to those of a target."""
  order = np.argsort(-found.flow, axis=None, kind='stable')[:most]
  places = [divmod(int(place), found.flow.shape[1]) for place in order]
  return {
    'source': source.name,
    'target': target.name,
    'links': [
      {
        'from': source.classes[i],
        'to': target.classes[j],
        'share': float(found.flow[i, j]),
      }
      for i, j in places
      if found.flow[i, j] > 0
    ],
  }


def _correlations(
  pairs: Mapping[tuple[str, str], Similarity], known: Mapping[tuple[str, str], float]
) -> dict[str, Any] | None:
  """Returns how similarity and accuracy correlate; None without accuracies."""
  if len(known) < 2:
    return None
  return measures.correlations(
    [pairs[pair].similarity for pair in known],
    [*known.values()],
    [target for _, target in known],
  )


def read_accuracy(path: str) -> dict[tuple[str, str], float]:
  """Returns (source, target) -> accuracy from a CSV file with such rows.

  Raises:
    UserError: there is no such file, or a row is malformed.
  """
  try:
    with open(path, newline='') as file:
      rows = [row for row in csv.reader(file) if row]
  except OSError as error:
    raise UserError(f'--accuracy: {path}: {error.strerror}') from None
  found = {}
  for number, row in enumerate(rows, start=1):
    try:
      source, target, value = (part.strip() for part in row)
      found[source, target] = float(value)
    except ValueError:
      if number > 1:  # the first may be a heading
        raise UserError(
          f'{path}, line {number}: {",".join(row)!r} is not source,target,accuracy'
        ) from None
  return found


def leaks(
  every: Mapping[str, Any], sources: Sequence[str], targets: Sequence[str]
) -> list[str]:
  """Returns one line for every source and target that have images in common."""
  found = []
  for s, t in itertools.product(sources, targets):
    both = set(every[s].digests) & set(every[t].digests)
    if both and s != t:
      found.append(
        f'{s} and {t} have {len(both)} images in common: a network that learned from '
        'one has already seen them in the other'
      )
  return found


def scores(seen: Any) -> dict[str, float]:
  """Returns the transferability of a network to labelled images, by their features."""
  rows = np.flatnonzero(seen.labels >= 0)
  labels = np.unique(seen.labels[rows], return_inverse=True)[1]
  found = {
    name: score(seen.features[rows], labels)
    for name, score in transferability.OF_FEATURES.items()
  }
  if seen.probabilities is not None:
    found |= {
      name: score(seen.probabilities[rows], labels)
      for name, score in transferability.OF_PROBABILITIES.items()
    }
  return found


def ranked(folder: epath.Path, targets: Sequence[str]) -> dict[str, Any]:
  """Returns target -> runs below a folder, the best starting point first.

  They are sorted by the first score of `transferability.OF_FEATURES`. Runs that cannot
  compute features of the target come last, with the reason in 'note'.

  Raises:
    UserError: there is no finished run.
  """
  from lt_jax import features
  from lt_jax.report.runs import find

  finished = [run for run in find(folder) if run.result]
  if not finished:
    raise UserError(f'{folder} holds no finished run')
  first = next(iter(transferability.OF_FEATURES))
  table: dict[str, list[dict[str, Any]]] = {target: [] for target in targets}
  for run in finished:
    for target in targets:
      row = {'run': run.name, 'recipe': run.recipe, 'scores': {}, 'note': ''}
      try:
        network = features.network(str(run.folder))
        row['scores'] = scores(features.seen(target, network))
      except UserError as error:
        row['note'] = str(error)
      table[target].append(row)
  for rows in table.values():
    rows.sort(key=lambda row: -row['scores'].get(first, -np.inf))
    if not any(row['scores'] for row in rows):
      raise UserError(f'no run can compute features of the target: {rows[0]["note"]}')
  return table


if __name__ == '__main__':
  commands.launch(main, 'out')
