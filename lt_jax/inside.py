"""Looks into a finished run: python -m lt_jax.inside --workdir=DIR.

Saves what the network does with single images in the run's folder, and adds figures of
it to the run's page:

  epsilons.npz      for methods that learn example weights: the weights of training
                    images in the next batches, 100 at most, and the images with the
                    largest and smallest ones
  feature_maps.npz  for networks with attention: maps of test images, and those of the
                    first stage, the plain network
  embeddings.npz    for networks with a memory: direct features and meta-embeddings of
                    test images, and the centroids

Nothing is trained, and no number of the run changes.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from flax import linen as nn

from lt_jax import commands, evaluate, files, report, sharding, train, trained
from lt_jax.build import Experiment, Stage
from lt_jax.errors import UserError
from lt_jax.evals.classification import half
from lt_jax.evals.collect import Collected, collector
from lt_jax.method import State
from lt_jax.writers import write_npz

WORKDIR = commands.workdir_flag()
DATA_DIR = commands.path_flag(
  'data_dir', 'Where the data are, if they have moved; see docs/tools.md.'
)
IMAGES = flags.DEFINE_list(
  'look_at',
  [],
  'Positions of test images to map; by default, one image from each of a few classes.',
)

MOST_BATCHES = 100
ENDS = 8
"""Number of images shown with the largest and with the smallest epsilon."""

MOST_MAPS = 6
MOST_POINTS = 2000


def main() -> None:
  """Looks into the run that the flags name."""
  workdir = files.absolute(WORKDIR.value)
  if not all(text.isdecimal() for text in IMAGES.value):
    raise UserError(f'--look_at must be whole numbers: {",".join(IMAGES.value)}')
  written = look(workdir, [int(text) for text in IMAGES.value], DATA_DIR.value)
  for name in written:
    print(workdir / name)
  print(report.write(workdir))


def look(
  workdir: epath.Path, images: list[int], data_dir: str | None = None
) -> list[str]:
  """Writes the files of this module's docstring that apply; returns their names.

  Args:
    workdir: the run's folder.
    images: positions of test images for the maps; [] for one image from each of a few
      classes.
    data_dir: where the data are now, as for `lt_jax.evaluate`.

  Raises:
    UserError: there is no such run, its data have changed, or nothing applies to it.
  """
  experiment = evaluate.with_data(workdir, data_dir)
  stage = experiment.last
  state = trained.restore(workdir, stage, experiment.mesh, None).state
  found: dict[str, Mapping[str, Any]] = {}
  if stage.weigh is not None:
    found['epsilons.npz'] = epsilons(experiment, stage, state)
  if getattr(stage.net, 'attention', None) is not None:
    first = next(iter(experiment.stages.values()))
    plain = trained.restore(workdir, first, experiment.mesh, None).state
    maps = feature_maps(experiment, (first, plain), (stage, state), images)
    found['feature_maps.npz'] = maps
  if 'centroids' in state.params:
    found['embeddings.npz'] = embeddings(experiment, stage, state)
  if not found:
    raise UserError(
      f'{workdir} has no learned example weights, no attention and no memory: there is '
      'nothing to show that is not in its report'
    )
  for name, arrays in found.items():
    write_npz(workdir / name, **arrays)
  return list(found)


def epsilons(experiment: Experiment, stage: Stage, state: State) -> Collected:
  """Weighs training images, in the batches that training would draw next.

  Epsilon is a difference of float32 weights, so its error is 1e-7 of the weight.

  Returns:
    'label', 'epsilon' and 'prior' (N,), each image once; 'shown' (M,), positions among
    them, the largest epsilon first; and 'image' (M, H, W, channels), their images.
  """
  streams, mesh = stage.streams, experiment.mesh
  arrays = {name: stream.arrays for name, stream in streams.items()}
  weigh = jax.jit(
    lambda state, arrays, payloads, step: stage.weigh(
      state, train.batches_at(streams, arrays, payloads, state.key, step)
    )
  )
  split = stage.images[stage.trained_on['train']]
  seen: dict[int, tuple[float, float]] = {}
  begin = int(jax.device_get(state.step))
  for step in range(begin, begin + MOST_BATCHES):
    payloads = {name: stream.payload(step) for name, stream in streams.items()}
    index = payloads['train']['index']
    weights, prior = jax.device_get(
      weigh(state, arrays, sharding.put_batch(mesh, payloads), step)
    )
    seen |= dict(zip(index.tolist(), zip(weights, prior, strict=True), strict=True))
    if len(seen) == len(split.rows):
      break
  place = np.array(sorted(seen))
  weights, prior = np.array([seen[i] for i in place], np.float64).T
  epsilon = weights - prior
  order = np.argsort(-epsilon, kind='stable')
  shown = np.concatenate([order[:ENDS], order[-ENDS:]])[: len(order)]
  position = {int(row): i for i, row in enumerate(split.rows)}
  labels = split.labels[[position[int(row)] for row in place]]
  images = np.stack([split.image(place[i]) for i in shown])
  return {
    'label': labels,
    'epsilon': epsilon,
    'prior': prior,
    'shown': shown,
    'image': images,
  }


def _inside(stage: Stage, *names: str):
  """Returns a `predict` that also returns what some modules sow and return.

  Args:
    stage: the stage with the network.
    *names: names of the modules.
  """

  def wanted(module: nn.Module, method: str) -> bool:
    return method == '__call__' and module.name in names

  def predict(state: State, images: jax.Array) -> dict[str, Any]:
    variables = {'params': state.params['net'], 'batch_stats': state.stats['net']}
    memory = {k: v for k, v in state.params.items() if k == 'centroids'}
    outputs, collections = stage.net.apply(
      variables,
      images,
      train=False,
      **memory,
      capture_intermediates=wanted,
      mutable=['intermediates'],
    )
    return outputs | {'inside': collections['intermediates']}

  return predict


def feature_maps(
  experiment: Experiment,
  plain: tuple[Stage, State],
  modulated: tuple[Stage, State],
  images: list[int],
) -> Collected:
  """Returns feature maps of test images: the mean magnitude over channels.

  Args:
    experiment: the experiment.
    plain: the first stage and its State.
    modulated: the last stage and its State.
    images: positions of test images; [] for one image from each of a few classes.

  Returns:
    (M, H', W') each: 'plain', from the trunk of the first stage, 'modulated', after
    attention, and 'attention', the share of each pixel; also 'image', 'label' and the
    predictions of both networks.
  """
  stage, _ = modulated

  def sizes(x: jax.Array) -> jax.Array:
    return jnp.abs(x.astype(jnp.float32)).mean(axis=-1)

  def keep_plain(outputs, batch):
    del batch
    (trunk,) = outputs['inside']['trunk']['__call__']
    return {'plain': sizes(trunk), 'plain_prediction': outputs['logits'].argmax(-1)}

  def keep(outputs, batch):
    inside = outputs['inside']['attention']
    return {
      'modulated': sizes(inside['__call__'][0]),
      'attention': inside['place'][0],
      'prediction': outputs['logits'].argmax(-1),
      'label': batch['label'],
    }

  parts = [
    collector(_inside(one, 'trunk', 'attention'), kept, experiment.mesh)(
      state, one.passes['test']
    )
    for (one, state), kept in ((plain, keep_plain), (modulated, keep))
  ]
  found = parts[0] | parts[1]
  split = stage.images['test']
  places = images or _of_some_classes(found['label'], stage.dataset.counts)
  if max(places) >= len(split.rows):
    raise UserError(
      f'--look_at is {max(places)}, but there are only {len(split.rows)} test images'
    )
  chosen = {name: values[places] for name, values in found.items()}
  return chosen | {'image': np.stack([split.image(split.rows[i]) for i in places])}


def _of_some_classes(label: np.ndarray, counts: np.ndarray) -> list[int]:
  """Returns one test image from each of a few classes, from frequent to rare."""
  there = [c for c in np.argsort(-counts, kind='stable') if (label == c).any()]
  places = np.unique(np.linspace(0, len(there) - 1, MOST_MAPS).round().astype(int))
  return [int(np.flatnonzero(label == there[i])[0]) for i in places]


def embeddings(experiment: Experiment, stage: Stage, state: State) -> Collected:
  """Returns features, meta-embeddings and labels of test images, and centroids."""

  def keep(outputs, batch):
    (embedding,) = outputs['inside']['head']['embedding']
    return {
      'features': half(outputs['features']),
      'embeddings': half(embedding),
      'label': batch['label'],
    }

  found = collector(_inside(stage, 'head'), keep, experiment.mesh)(
    state, stage.passes['test']
  )
  few = np.linspace(0, len(found['label']) - 1, MOST_POINTS).round().astype(int)
  shown = {name: values[np.unique(few)] for name, values in found.items()}
  return shown | {'centroids': half(np.asarray(state.params['centroids']))}


if __name__ == '__main__':
  commands.launch(main, 'workdir')
