"""From config keys to streams: which images, in which order, transformed how."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lt_jax.build.experiment import Stage
from lt_jax.config import Config
from lt_jax.data import augment
from lt_jax.data.dataset import Dataset
from lt_jax.data.episodes import episode_stream, episodes
from lt_jax.data.reading import usable_cores
from lt_jax.data.samplers import SAMPLERS, Sampler, deferred, instance
from lt_jax.data.streams import Split, Stream
from lt_jax.errors import UserError, construct, lookup, named_class
from lt_jax.optim import epoch_start
from lt_jax.train import state_shapes

ON_BAD_IMAGE = {'raise': False, 'skip': True}
"""Whether another image of the class stands in for one that cannot be read."""


class Training(NamedTuple):
  """The stream that a stage is trained on.

  Attributes:
    stream: the stream.
    length: L of an epoch: it begins at every step ceil(e L / B).
    batch: B.
    origin: the stage that leaves the stream's arrays; empty if none does.
  """

  stream: Stream
  length: int
  batch: int
  origin: str = ''

  def steps(self, epochs: float) -> int:
    """Returns the step at which an epoch begins."""
    return epoch_start(epochs, self.length, self.batch)


def _images(
  config: Config, dataset: Dataset, learned: np.ndarray, *, images: Callable
) -> Training:
  """Returns the stream of a split's images of the learned classes, by the sampler."""
  split = lookup(_trainable(dataset), 'split to train on', config['train_split'])
  kept = learned[split.labels]
  split = split._replace(rows=split.rows[kept], labels=split.labels[kept])
  batch = config['batch']
  sampler = _sampler(config['sampler'], split.labels, batch, config['epochs'])
  return Training(images(split, sampler, batch=batch), sampler.length, batch)


def _episodes(
  config: Config,
  dataset: Dataset,
  learned: np.ndarray,
  *,
  earlier: Mapping[str, Stage],
  stage: str,
  per_epoch: int,
  novel: int,
  queries_novel: int,
  queries_base: int,
) -> Training:
  """Returns the stream of few-shot tasks on the features that a stage leaves.

  An epoch is `per_epoch` tasks; the others are options of `episodes`.
  """
  origin = lookup(earlier, 'earlier stage', stage)
  if 'features' not in origin.save_outputs:
    raise UserError(
      f"stage {stage!r} must save its features: save_outputs = ('features',)"
    )
  labels = dataset.splits['train'].labels
  tasks = episodes(
    labels,
    learned,
    novel=novel,
    queries_novel=queries_novel,
    queries_base=queries_base,
  )
  state = state_shapes(origin.method, origin.streams)
  image = jax.ShapeDtypeStruct((1, *dataset.image_shape), np.float32)
  width = jax.eval_shape(origin.method.predict, state, image)['features'].shape[-1]
  features = jax.ShapeDtypeStruct((len(labels), width), np.float32)
  stream = episode_stream(tasks, features, seed=config['seed'])
  return Training(stream, per_epoch, 1, stage)


STREAMS = {'images': _images, 'episodes': _episodes}
"""name -> (config, dataset, learned classes, ...) -> what a stage is trained on."""


def batch_sizes(config: Config) -> dict[str, int]:
  """Returns the first axes of what a step is given, which devices must divide."""
  sizes = {'batch': config['batch'], 'meta batch': config['meta_batch']}
  stream = config['stream']
  if stream['name'] == 'episodes':
    queries = stream.get('queries_novel', 0) + stream.get('queries_base', 0)
    sizes = {'novel classes': stream.get('novel', 0), 'queries': queries}
  return {name: size for name, size in sizes.items() if size}


def workers(number: int) -> int:
  """Returns how many processes decode images; -1 means one a core."""
  return usable_cores() if number == -1 else number


def _trainable(dataset: Dataset) -> dict[str, Split]:
  """Returns the splits that a stage may train on."""
  return {n: s for n, s in dataset.splits.items() if n in ('train', 'meta')}


def meta_split(dataset: Dataset, batch: int) -> Split:
  """Returns the balanced set of the meta stream, which must have every class."""
  if 'meta' not in dataset.splits:
    raise UserError(
      f'meta_batch is {batch}, but there is no meta set: set data.meta_per_class'
    )
  meta = dataset.splits['meta']
  missing = np.setdiff1d(np.arange(len(dataset.class_names)), meta.labels)
  if missing.size:
    told = named_class(missing[0], dataset.class_names)
    raise UserError(f'the meta set has no image of {told}')
  if batch > len(meta.rows):
    raise UserError(
      f'meta_batch is {batch}, but the meta set has {len(meta.rows)} images'
    )
  return meta


def _sampler(options: Config, labels: np.ndarray, batch: int, epochs: float) -> Sampler:
  """Builds a sampler; before its start, a whole epoch, instance sampling serves."""
  options = dict(options)
  start = options.pop('start_epoch', 0)
  name = options.pop('name')
  sampler = construct(
    SAMPLERS, 'sampler', name, labels, options=options, batch=batch, epochs=epochs
  )
  if not start:
    return sampler
  return deferred(instance(labels), sampler, switch_epoch=math.ceil(start))


def transforms(data: dict[str, Any]) -> tuple[Callable, Callable]:
  """Takes the keys of augmentation out of `data`; returns (training, evaluation)."""
  mean, std = data.pop('mean'), data.pop('std')
  pad, pad_mode, flip = data.pop('pad'), data.pop('pad_mode'), data.pop('flip')
  jitter = data.pop('jitter')
  lookup(augment.PAD_MODES, 'pad_mode', pad_mode)

  def plain(key, images):
    del key
    return augment.normalise(images, mean, std)

  def augmented(key, images):
    crop_key, flip_key = jax.random.split(key)
    jitter_key = jax.random.fold_in(key, 1)
    if pad:
      images = augment.pad_crop(crop_key, images, pad=pad, mode=pad_mode)
    if flip:
      images = augment.flip(flip_key, images)
    if jitter:
      images = augment.colour_jitter(jitter_key, images, strength=jitter)
    return augment.normalise(images, mean, std)

  return augmented, plain
