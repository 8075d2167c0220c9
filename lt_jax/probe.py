r"""How useful each layer of a network is: probes of its features, layer by layer.

  python -m lt_jax.probe --workdir=runs/ldam_drw/1
  python -m lt_jax.probe --config=my_images:net=efficientnet_lite0,data=photos \
    --init=timm/tf_efficientnet_lite0.in1k --shots=1,5,15,30 --out=probes/photos

The network is that of a run, or published weights on the data of a config. Features of
every layer are averaged to at most --budget values and cached in the folder `features`
of --out, keyed by weights, layer, preprocessing and images, so that repeating the
command only fits classifiers. These learn from --shots training images per class, drawn
--draws times, smaller draws being subsets of larger ones. The mean accuracy over
classes on the test images is reported.

It writes probe.json, probe.md and probe.svg to --out, by default `probe` in the run's
folder. --retrieval also measures how well test images find training images of their
class, and writes retrieval.html: some test images with the images nearest to them, by
the features of the best layer. --save=FILE.npz writes the features of one layer, for
every domain, as a file that `npz:` reads; domains already in the file are kept. The
network is not trained and no number of the run changes.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from absl import flags
from etils import epath

from lt_jax import (
  build,
  commands,
  config_file,
  evaluate,
  files,
  sharding,
  train,
  trained,
)
from lt_jax.build import Experiment, Stage
from lt_jax.build.experiment import PREPROCESSING
from lt_jax.cautions import cautions
from lt_jax.config import resolve
from lt_jax.data.streams import Pass, Split, evaluation_pass
from lt_jax.errors import UserError, lookup
from lt_jax.evals import probing
from lt_jax.evals.collect import collector
from lt_jax.method import State
from lt_jax.models.taps import tap_shapes, tapped
from lt_jax.pretrained import ours
from lt_jax.report import drawing, retrieval, tables
from lt_jax.report.page import STANDALONE
from lt_jax.surgeries.classifiers import CLASSIFIERS
from lt_jax.writers import write_npz

WORKDIR = commands.workdir_flag('The folder of a run whose network to probe.')
CONFIG = commands.config_flag()
DATA_DIR = commands.data_dir_flag()
INIT = commands.init_flag()
OUT = commands.out_flag('The folder to write to; by default RUN/probe.')
SAVE = commands.path_flag('save', 'The .npz file for features of one layer.')
LAYERS = flags.DEFINE_list('layers', [], 'Layers to probe; all by default.')
KINDS = flags.DEFINE_list('classifiers', list(CLASSIFIERS), 'Classifiers to fit.')
SHOTS = flags.DEFINE_list(
  'shots', ['0'], 'Training images per class to learn from; 0: all.'
)
DRAWS = flags.DEFINE_integer('draws', 5, 'How many times to draw these images.')
FOLDS = flags.DEFINE_integer(
  'folds', 3, 'Folds for choosing the regularisation strength.'
)
BUDGET = flags.DEFINE_integer('budget', 2048, 'Most values per layer; 0: no limit.')
RETRIEVAL = flags.DEFINE_bool('retrieval', False, 'Measure retrieval, too.')


class Network(NamedTuple):
  """A network with its data.

  Attributes:
    experiment: its data and devices.
    stage: the stage whose network it is.
    state: its State.
  """

  experiment: Experiment
  stage: Stage
  state: State


def main() -> None:
  """Probes the network that the flags name."""
  shots = ascending(SHOTS.value)
  for name in KINDS.value:
    lookup(CLASSIFIERS, 'classifier', name)
  if min(DRAWS.value, FOLDS.value - 1) < 1 or BUDGET.value < 0:
    raise UserError('--draws must be 1 or more, --folds 2 or more, --budget 0 or more')
  if not SAVE.value and OUT.value is WORKDIR.value is None:
    raise UserError('--out is missing: the folder to write to')
  network = opened()
  layers = chosen_layers(network, LAYERS.value)
  if SAVE.value:
    return save(network, layers, epath.Path(SAVE.value), BUDGET.value)
  out = _folder()
  for line in cautions(network.experiment):
    print(f'warning: {line}')
  draws = probing.Draws(shots, DRAWS.value, FOLDS.value)
  found = probe(network, layers, KINDS.value, draws, out, BUDGET.value, RETRIEVAL.value)
  files.write_json(out / 'probe.json', found)
  (out / 'probe.md').write_text(table(found))
  (out / 'probe.svg').write_text(figure(found))
  if RETRIEVAL.value:
    write_retrieval(network, found, out, BUDGET.value)
  print(f'\n{shown(found)}')
  print(f'files: {out}/probe.json, probe.md (with all columns) and probe.svg')


def ascending(given: Sequence[str]) -> list[int]:
  """Returns the values of --shots once each, from few images to all of them (0).

  Raises:
    UserError: there are none, or one is not a whole number.
  """
  if not given or not all(text.isdecimal() for text in given):
    raise UserError(f'--shots must be whole numbers, such as 1,5,0: {",".join(given)}')
  return sorted({int(text) for text in given}, key=lambda shots: shots or math.inf)


def _folder() -> epath.Path:
  """Creates and returns the output folder."""
  out = files.absolute(OUT.value or f'{WORKDIR.value}/probe')
  out.mkdir(parents=True, exist_ok=True)
  return out


def opened() -> Network:
  """Opens the run, or the config with weights, that the flags name.

  Raises:
    UserError: neither or both are named, or the network would be random.
  """
  if (WORKDIR.value is None) == (CONFIG.value is None):
    raise UserError('give either --workdir=RUN, or --config with --init=WEIGHTS')
  if WORKDIR.value is not None:
    workdir = files.absolute(WORKDIR.value)
    experiment = evaluate.with_data(workdir, DATA_DIR.value)
    stage = experiment.last
    state = trained.restore(workdir, stage, experiment.mesh, None).state
    return Network(experiment, stage, state)
  return untrained(resolve(CONFIG.value, config_file.overrides()), INIT.value)


def untrained(config: Mapping[str, Any], weights: str | None = None) -> Network:
  """Returns the network of a config's first stage as it is before training.

  Args:
    config: a resolved config.
    weights: replaces its key `init`.

  Raises:
    UserError: the network would be random.
  """
  if weights:
    config = ours.adopted({**config, 'init': weights})
  experiment = build.build(config)
  stage = next(iter(experiment.stages.values()))
  state = train.initial_state(
    stage.method, stage.streams, jax.random.key(config['seed']), experiment.mesh
  )
  if stage.start is not None:
    state, _ = stage.start(state)
  elif jax.tree.leaves(state.params['net'].get('trunk', {})):
    raise UserError('the network would have random weights; pass --init=WEIGHTS')
  state = sharding.put_replicated(experiment.mesh, jax.device_get(state))
  return Network(experiment, stage, state)


WHOLE = 'features'
"""The input of the head: the only layer of a network whose trunk has no taps."""


def chosen_layers(network: Network, names: Sequence[str]) -> list[str]:
  """Returns the layers to probe, in order.

  Raises:
    UserError: one does not exist; the message suggests a near miss.
  """
  stage, own = network.stage, network.state
  shape = (1, *stage.dataset.image_shape)
  images = jax.ShapeDtypeStruct(shape, np.float32)
  known = tap_shapes(stage.net, own.params['net'], own.stats['net'], images)
  known = {**known, WHOLE: None}
  for name in names:
    lookup(known, 'layer', name)
  taken = names or [name for name in known if name != WHOLE or len(known) == 1]
  return [name for name in known if name in taken]


def features(
  network: Network, one_pass: Pass, layers: Sequence[str], budget: int
) -> dict[str, np.ndarray]:
  """Returns layer -> features (N, D) of the images of a pass, and 'label' (N,)."""
  net = network.stage.net

  def predict(state: State, images: jax.Array) -> dict[str, jax.Array]:
    found = tapped(net, state.params['net'], state.stats['net'], images)
    if WHOLE in layers:
      found[WHOLE] = network.stage.method.predict(state, images)['features']
    return found

  def keep(outputs, batch) -> dict[str, jax.Array]:
    kept = {name: probing.pooled(outputs[name], budget) for name in layers}
    return kept | {'label': batch['label']}

  return collector(predict, keep, network.experiment.mesh)(network.state, one_pass)


def _pass(network: Network, domain: str, split: Split) -> Pass:
  """Returns a pass over images of a domain, as the run evaluates them."""
  experiment = network.experiment
  data = experiment.data[domain]
  return evaluation_pass(
    split,
    batch=sharding.round_up(experiment.config['eval_batch'], experiment.mesh.size),
    transform=build.domains.make_transforms(data)[1],
    workers=build.streams.workers(data['workers']),
  )


def cached(
  network: Network, layers: Sequence[str], split: str, folder: epath.Path, budget: int
) -> dict[str, probing.Images]:
  """Returns layer -> features of a split of the stage's domain, cached in files.

  Args:
    network: the network.
    layers: their names.
    split: 'train' or 'test'.
    folder: of the files.
    budget: most values per layer.
  """
  stage = network.stage
  key = {
    'weights': digest(network.state),
    'images': f'{stage.dataset.fingerprint} {split}',
    'preprocessing': {
      key: network.experiment.data[stage.domain][key] for key in PREPROCESSING
    },
    'budget': budget,
  }
  text = json.dumps(key, sort_keys=True, default=list)
  paths = {
    name: folder / f'{hashlib.sha256(f"{text} {name}".encode()).hexdigest()[:16]}.npz'
    for name in layers
  }
  missing = [name for name, path in paths.items() if not path.exists()]
  if missing:
    folder.mkdir(parents=True, exist_ok=True)
    images = stage.dataset.every[split]
    found = features(network, _pass(network, stage.domain, images), missing, budget)
    for name in missing:
      write_npz(paths[name], features=found[name], labels=found['label'])
  read = {name: files.read_npz(path) for name, path in paths.items()}
  return {n: probing.Images(one['features'], one['labels']) for n, one in read.items()}


def digest(state: State) -> str:
  """Returns a digest of the network without its head, which computes the features."""
  net = {name: part for name, part in state.params['net'].items() if name != 'head'}
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(jax.device_get((net, state.stats['net']))):
    digest.update(np.ascontiguousarray(leaf))
  return digest.hexdigest()


def probe(
  network: Network,
  layers: Sequence[str],
  kinds: Sequence[str],
  draws: probing.Draws,
  out: epath.Path,
  budget: int = 2048,
  retrieves: bool = False,
) -> dict[str, Any]:
  """Probes layers and returns plain data.

  Args:
    network: the network.
    layers: their names.
    kinds: keys of `CLASSIFIERS`.
    draws: how images are drawn.
    out: the folder of the cached features.
    budget: most values per layer.
    retrieves: whether to measure retrieval too.
  """
  classes = network.stage.dataset.class_names
  groups = {name: network.stage.groups[name] for name in ('many', 'medium', 'few')}
  counts = network.stage.dataset.counts
  for shots in draws.shots:
    short = [name for name, count in zip(classes, counts, strict=True) if count < shots]
    if len(short) == len(classes):
      raise UserError(
        f'no class has {shots} training images; the most is {counts.max()}'
      )
    if short:
      print(
        f'{len(short)} classes have fewer than {shots} images, such as {short[0]!r}'
      )
  sets = {
    split: cached(network, layers, split, out / 'features', budget)
    for split in ('train', 'test')
  }
  found: dict[str, Any] = {'classes': list(classes), 'layers': {}}
  for layer in layers:
    own, held_out = sets['train'][layer], sets['test'][layer]
    rows = {
      kind: probing.probe(kind, own, held_out, len(classes), groups, draws)
      for kind in kinds
    }
    print(f'{layer}: {own.features.shape[1]} values', flush=True)
    row = {'values': own.features.shape[1], 'classifiers': rows}
    if retrieves:
      row['retrieval'] = probing.retrieval(held_out, own)
    found['layers'][layer] = row
  return found


SHOWN_QUERIES, SHOWN_FOUND = 30, 8


def write_retrieval(
  network: Network, found: Mapping[str, Any], out: epath.Path, budget: int
) -> None:
  """Writes retrieval.html: test images and the training images nearest to them.

  Args:
    network: the network.
    found: the result of `probe`, with retrieval.
    out: the folder of the page and the cached features.
    budget: most values per layer.
  """
  measured = {layer: row['retrieval'] for layer, row in found['layers'].items()}
  best = max(measured, key=lambda layer: measured[layer]['mean_average_precision'])
  splits = [network.stage.dataset.every[name] for name in ('test', 'train')]
  if splits[0].dtype != np.uint8:
    print('retrieval.html is not written: float arrays are not images')
    return
  queries, gallery = (
    cached(network, [best], name, out / 'features', budget)[best]
    for name in ('test', 'train')
  )
  shown = probing.one_of_each(queries.labels, SHOWN_QUERIES)
  near = probing.nearest(queries.features[shown], gallery.features)[:, :SHOWN_FOUND]

  def image(split: Split, position: int) -> np.ndarray:
    return split.image(split.rows[position])

  rows = [
    retrieval.Query(
      image(splits[0], query),
      found['classes'][queries.labels[query]],
      [image(splits[1], place) for place in places],
      [found['classes'][gallery.labels[place]] for place in places],
    )
    for query, places in zip(shown, near, strict=True)
  ]
  page = retrieval.page(best, measured[best], rows)
  files.write_atomically(out / 'retrieval.html', page)
  print(out / 'retrieval.html')


def save(
  network: Network, layers: Sequence[str], path: epath.Path, budget: int
) -> None:
  """Writes the features of one layer, for every domain, as a file that `npz:` reads.

  Raises:
    UserError: there are several layers, or the file has features of another size.
  """
  if len(layers) != 1:
    raise UserError(
      f'--save takes one layer: set --layers to one of {", ".join(layers)}'
    )
  made: dict[str, np.ndarray] = {}
  for domain, dataset in network.experiment.domains.items():
    parts = [dataset.splits['train']]
    test = dataset.tests.get('test')
    if test is not None and not _same_images(parts[0], test):
      parts.append(test)
    names = [domain] if len(parts) == 1 else [f'{domain}_train', f'{domain}_test']
    for name, split in zip(names, parts, strict=True):
      found = features(network, _pass(network, domain, split), layers, budget)
      made |= {f'x_{name}': found[layers[0]], f'y_{name}': found['label']}
  made['class_names'] = np.array(network.stage.dataset.class_names)
  earlier = files.read_npz(path) if path.exists() else {}
  widths = {v.shape[1] for k, v in (earlier | made).items() if k.startswith('x_')}
  if len(widths) > 1:
    raise UserError(f'{path} has features of another size; save to another file')
  write_npz(path, **earlier | made)
  print(path)


def _same_images(one: Split, other: Split) -> bool:
  """Returns whether two splits are the same images, as if all are tested on."""
  return one.source is other.source and np.array_equal(one.rows, other.rows)


def percent(values: Sequence[float | None]) -> str:
  """Returns the mean in %, and the deviation over draws if there are several."""
  known = [100 * value for value in values if value is not None]
  if not known:
    return 'n/a'
  spread = f' ± {np.std(known, ddof=1):.1f}' if len(known) > 1 else ''
  return f'{np.mean(known):.1f}{spread}'


def table(found: Mapping[str, Any]) -> str:
  """Returns a Markdown table: a row per layer, a column per classifier and shots."""
  columns = _columns(found)
  heads = ['layer', 'values', *columns]
  rows = [
    [layer, str(row['values']), *(cells[i] for cells in columns.values())]
    for i, (layer, row) in enumerate(found['layers'].items())
  ]
  lines = [heads, ['---'] * len(heads), *rows]
  return '\n'.join(f'| {" | ".join(row)} |' for row in lines) + '\n'


def shown(found: Mapping[str, Any]) -> str:
  """Returns what a terminal shows: a row per layer, a column per classifier.

  The classifiers are those with the most training images.
  """
  layers = found['layers']
  rows = [one[-1] for row in layers.values() for one in row['classifiers'].values()]
  shots = rows[0]['shots'] if rows else 0
  given = f'{shots} training images per class' if shots else 'all training images'
  kinds = [*next(iter(layers.values()))['classifiers']]
  cells = [
    [name, str(row['values'])]
    + [percent(row['classifiers'][kind][-1]['accuracy']) for kind in kinds]
    for name, row in layers.items()
  ]
  listed = tables.plain(tables.Table(['layer', 'values', *kinds], cells, []))
  return (
    'Mean accuracy over classes on the test images, in %, of classifiers on the '
    f'features\nof each layer, fitted to {given}:\n\n{listed}'
  )


def _columns(found: Mapping[str, Any]) -> dict[str, list[str]]:
  """Returns title -> one cell per layer."""
  columns: dict[str, list[str]] = {}
  for layer in found['layers'].values():
    for kind, rows in layer['classifiers'].items():
      for row in rows:
        shots = f', {row["shots"]} per class' if row['shots'] else ''
        columns.setdefault(f'{kind}{shots}', []).append(percent(row['accuracy']))
        if not row['shots']:
          for group, values in row['groups'].items():
            if any(value is not None for value in values):
              columns.setdefault(f'{kind}, {group}', []).append(percent(values))
    for name, value in layer.get('retrieval', {}).items():
      columns.setdefault(name.replace('_', ' '), []).append(percent([value]))
  return columns


def figure(found: Mapping[str, Any]) -> str:
  """Draws accuracy by layer at the most shots, one line per classifier, as SVG."""
  layers = [*found['layers']]
  with matplotlib.rc_context(drawing.STYLE):
    drawn, axes = drawing.plot()
    for kind in found['layers'][layers[0]]['classifiers']:
      rows = [found['layers'][layer]['classifiers'][kind][-1] for layer in layers]
      values = [100 * np.mean(row['accuracy']) for row in rows]
      spread = [100 * np.std(row['accuracy']) for row in rows]
      axes.errorbar(range(len(layers)), values, spread, marker='o', ms=3, label=kind)
    axes.set_xticks(range(len(layers)), layers, rotation=60, ha='right')
    axes.set_ylabel('mean accuracy over classes, %')
    drawing.legend(drawn, axes)
    text = drawing.svg(drawn, 'probe', 'Accuracy by layer')
  return text.replace('>', f'>{STANDALONE}', 1)


if __name__ == '__main__':
  commands.launch(main)
