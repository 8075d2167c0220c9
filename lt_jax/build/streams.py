"""From config keys to streams: which images, in which order, with which transforms.

Each row of `config.streams` names a batch and says which images it is drawn from. A row
gives images by default; its 'name' selects another kind from `STREAMS`, and its other
keys are options of that function. Only the row 'train' has a special name: its epochs
are the stage's clock.
"""

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lt_jax.build.domains import Domains
from lt_jax.build.experiment import Left, Stage
from lt_jax.config import CLOCK, OPEN, SOURCE, TARGET, Config
from lt_jax.data.dataset import Dataset
from lt_jax.data.episodes import episode_stream, episodes
from lt_jax.data.reading import usable_cores
from lt_jax.data.samplers import SAMPLERS, Sampler, deferred, instance
from lt_jax.data.streams import Split, Stream, Unlabelled, train_stream
from lt_jax.errors import UserError, class_names, construct, lookup, named_class
from lt_jax.evals.ordering import nearest_first
from lt_jax.evals.saved import saved_shape, split_and_name
from lt_jax.methods.translation import Pixels
from lt_jax.schedules import epoch_start
from lt_jax.train import state_shapes

ON_BAD_IMAGE = {'raise': False, 'skip': True}
"""Answer -> whether another image of the class replaces one that cannot be read."""


class Row(NamedTuple):
  """A stream of a stage, built.

  Attributes:
    stream: the stream.
    length: L, the length of an epoch; epoch e begins at step ceil(e L / B).
    batch: B.
    dataset: the data set with the training counts and classes of the stream.
    split: name of the split and its images; None if it has no images.
    left: what the stream reads from an earlier stage, if anything.
    uses_target_labels: whether it gives labels of a target domain.
    pixels: (mean, std) with which its images are normalised; None without images.
  """

  stream: Stream
  length: int
  batch: int
  dataset: Dataset
  split: tuple[str, Split | Unlabelled] | None = None
  left: Left | None = None
  uses_target_labels: bool = False
  pixels: Pixels | None = None

  def steps(self, epochs: float) -> int:
    """Returns the step at which an epoch begins."""
    return epoch_start(epochs, self.length, self.batch)


def make_rows(
  config: Config,
  domains: Domains,
  learned: np.ndarray,
  earlier: Mapping[str, Stage],
) -> dict[str, Row]:
  """Builds the streams of a stage.

  Args:
    config: config of the stage.
    domains: the data.
    learned: (C,) bool, the classes that are learned.
    earlier: name -> earlier stage.

  Raises:
    UserError: a row is not possible; the message names the stream.
  """
  if CLOCK not in config['streams']:
    raise UserError(f'streams has no {CLOCK!r}, whose epochs are the clock of a stage')

  def made(name: str, clock: Row | None) -> Row:
    row = config['streams'][name]
    return construct(
      STREAMS,
      'stream',
      row.get('name', 'images'),
      config,
      domains,
      options={key: value for key, value in row.items() if key != 'name'},
      stream=name,
      learned=learned,
      earlier=earlier,
      clock=clock,
    )

  clock = made(CLOCK, None)
  return {
    name: clock if name == CLOCK else made(name, clock) for name in config['streams']
  }


def _images(
  config: Config,
  domains: Domains,
  *,
  stream: str,
  learned: np.ndarray,
  earlier: Mapping[str, Stage],
  clock: Row | None,
  domain: str = '',
  split: str = 'train',
  batch: int = 0,
  sampler: Config | None = None,
  every: int = 1,
  labels: bool | None = None,
  domain_labels: bool | None = None,
  stage: str = '',
  arrays: Config | None = None,
  order: str = '',
) -> Row:
  """Returns the stream that a sampler draws from a split's images.

  Args:
    config: config of the stage.
    domains: the data.
    stream: the name of the row.
    learned: (C,) bool, the classes that are learned; images of others are left out.
    earlier: name -> earlier stage.
    clock: the stream whose epochs are the stage's clock; None if it is this one.
    domain: the domain or role with the images; empty for the stage's own.
    split: 'train', or the 'meta' set of a source.
    batch: images per step; 0 for `config.batch`.
    sampler: its name and options; None for `config.sampler` if this is the clock, else
      every image once per epoch.
    every: steps from one batch to the next.
    labels: whether batches have labels; by default those of a source do.
    domain_labels: whether batches say which of several domains an image is from; by
      default those of several sources do, those of a compound target do not.
    stage: an earlier stage that saves outputs for these images (`save_outputs`).
    arrays: name in the batch -> name of a saved output, such as {'label': 'prediction'}
      for images without labels.
    order: name of a saved output with one number per image: the sampler gets the images
      sorted by it, smallest first.

  Raises:
    UserError: there is no such split, it is too small, or the sampler needs labels.
  """
  domain, batch = domain or config['domain'], batch or config['batch']
  of_target = domains.is_target(domain)
  labelled = not of_target if labels is None else labels
  _check_row(stream, every, domain, domains, split, hidden=of_target and not labelled)
  dataset = domains.dataset(domain)
  if labelled and not dataset.has_labels:
    raise UserError(
      f'streams.{stream}: the images of {domain!r} have no labels, which this recipe '
      'learns from: sort them into class folders, or choose another recipe'
    )
  if dataset.class_names != domains.dataset(config['domain']).class_names:
    # It has its own classes and learns them all.
    learned = np.ones(len(dataset.class_names), bool)
  images = _split(dataset, stream, split, domain, batch)
  places, total = np.arange(len(images.rows)), len(images.rows)
  if labelled and images.of_pixels:
    unseen = dataset.unseen if dataset.unseen is not None else ~learned & learned
    _check_maps(images, stream, learned | unseen)
  elif labelled:
    places = np.flatnonzero(learned[images.labels])
    images = _taken(images, places)
  if not (domain_labels if domain_labels is not None else not of_target):
    images = images._replace(domain=None)
  drawn = images if labelled else Unlabelled(images)
  reads = None
  if stage or arrays or order:
    reads = _Reads(
      lookup(earlier, f'earlier stage of streams.{stream}', stage),
      _seen_as(domains, domain, split, earlier[stage], stream),
      dict(arrays or {}),
      order,
      places,
      total,
    )
    reads.check(stream, {'image', 'index', 'bad', *drawn.numbers()})
  own = sampler or (config['sampler'] if stream == CLOCK else {'name': 'instance'})
  data = domains.data[domain]
  # As many as the stage reads in one of its epochs.
  positions = math.ceil(clock.length * batch / (clock.batch * every)) if clock else 0

  def make(beside: Mapping[str, np.ndarray], order: np.ndarray | None):
    there = learned if labelled and not images.of_pixels else np.ones_like(learned)
    with class_names([dataset.class_names[c] for c in np.flatnonzero(there)]):
      sampling = _sampler(
        own, drawn, there, order, batch, config['epochs'], positions, stream
      )
    return sampling.length, train_stream(
      drawn,
      sampling,
      seed=config['seed'],
      batch=batch,
      transform=domains.transforms[domain][0],
      workers=workers(data['workers']),
      stand_in=lookup(ON_BAD_IMAGE, 'answer to a bad image', data['on_bad_image']),
      name=stream,
      beside=beside,
    )

  length, made = make(*(reads.stand_ins() if reads else ({}, None)))

  def into(before: Stream, found: Mapping[str, np.ndarray], put: Callable) -> Stream:
    return before._replace(payload=make(*reads.taken(found))[1].payload)

  named = split if domain == SOURCE else f'{domain}/{split}'
  return Row(
    made._replace(every=every),
    length,
    batch,
    dataset if labelled else _without_counts(dataset),
    (named, drawn),
    left=reads and Left(stage, reads.shapes(), into, reads.ordered_by()),
    uses_target_labels=of_target and labelled,
    pixels=(data['mean'], data['std']),
  )


def _check_row(
  stream: str, every: Any, domain: str, domains: Domains, split: str, hidden: bool
) -> None:
  """Rejects a row that draws too rarely, from an open domain, or by hidden labels."""
  if isinstance(every, bool) or not isinstance(every, int) or every < 1:
    raise UserError(f'streams.{stream}.every is {every!r}; it must be 1 or more')
  if domain == OPEN or domain in domains.roles[OPEN]:
    raise UserError(
      f'streams.{stream}: domain {domain!r} is open, so training must not use it'
    )
  if split == 'meta' and hidden:
    raise UserError(
      f'streams.{stream}: the meta set of a target is drawn by its labels: set labels '
      'to True, or split to train'
    )


def _taken(images: Split, places: np.ndarray) -> Split:
  """Returns some images of a split, by their places (n,) in it."""
  taken = {
    name: array[places]
    for name in ('rows', 'labels', 'domain')
    if (array := getattr(images, name)) is not None
  }
  return images._replace(**taken)


def _check_maps(images: Split, stream: str, learned: np.ndarray) -> None:
  """Rejects images without a label map, and learning only some of the classes.

  Args:
    images: the images of the stream.
    stream: its name.
    learned: (C,) bool, the classes that are learned or have no pixels.
  """
  if not learned.all():
    raise UserError('shot_groups is for labels of whole images: set it to ()')
  source = images.source
  for row in () if source is None else images.rows:
    if not source.has_map(row):
      raise UserError(
        f'streams.{stream}: {source.where(row)} is an image without a label map'
      )


def _without_counts(dataset: Dataset) -> Dataset:
  """Returns the data set with equal counts, as its true counts must stay unknown."""
  each = max(1, int(dataset.counts.mean()))
  return dataset._replace(counts=np.full_like(dataset.counts, each))


class _Reads(NamedTuple):
  """What a stream of images reads from an earlier stage.

  Attributes:
    origin: the stage.
    split: the name that the stage uses for the split of the images.
    arrays: name in the batch -> name of an output.
    order: the name of the output that orders the images; empty for none.
    places: (n,) positions in the split of the stream's images.
    total: N, the number of images in the split.
  """

  origin: Stage
  split: str
  arrays: dict[str, str]
  order: str
  places: np.ndarray
  total: int

  def check(self, stream: str, taken: Collection[str]) -> None:
    """Rejects names that the batch already has, and an order with several numbers."""
    for name in self.arrays:
      if name in taken:
        raise UserError(f'streams.{stream}.arrays: the batch already has {name!r}')
    for key, one in self._saved().items():
      if split_and_name(key)[1] == self.order and one.ndim != 1:
        raise UserError(
          f'streams.{stream}.order: {self.order!r} has {one.shape[1:]} numbers per '
          'image; it must have one'
        )

  def ordered_by(self) -> str:
    """Returns the name under which the stage saves the order; empty for none."""
    return self._key(self.order) if self.order else ''

  def _key(self, output: str) -> str:
    """Returns the name under which the stage saves an output for these images."""
    for saved in self.origin.save_outputs:
      if split_and_name(saved) == (self.split, output):
        return saved
    name = output if self.split == 'train' else f'{self.split}/{output}'
    raise UserError(
      f'stage {self.origin.name!r} does not save {name!r}; add it to its save_outputs'
    )

  def _saved(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns name in arrays.npz -> shape and type for a batch."""
    state = state_shapes(self.origin.method, self.origin.streams)
    outputs = [*self.arrays.values(), *([self.order] if self.order else [])]
    keys = dict.fromkeys(self._key(output) for output in outputs)
    return {key: saved_shape(self.origin.survey, state, key) for key in keys}

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Returns name in arrays.npz -> shape of the whole array."""
    return {key: (self.total, *one.shape[1:]) for key, one in self._saved().items()}

  def stand_ins(self) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Returns placeholders for the result of `taken`, before the stage has run."""
    return self.taken(
      {
        key: np.broadcast_to(np.zeros((), one.dtype), (self.total, *one.shape[1:]))
        for key, one in self._saved().items()
      }
    )

  def taken(
    self, found: Mapping[str, np.ndarray]
  ) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Returns (name in the batch -> array (n, ...), order (n,) or None)."""
    beside = {
      name: found[self._key(output)][self.places]
      for name, output in self.arrays.items()
    }
    if not self.order:
      return beside, None
    return beside, nearest_first(found[self._key(self.order)][self.places])


def _seen_as(
  domains: Domains, domain: str, split: str, origin: Stage, stream: str
) -> str:
  """Returns the name of a split of images in the passes of an earlier stage."""
  # By name first: if a run is opened without its data, all domains share a data set.
  if domain == TARGET and not domains.is_target(origin.domain):
    return f'{TARGET}/{split}'
  if domain == origin.domain or domains.dataset(domain) is origin.dataset:
    return split
  if domains.roles[TARGET] and domains.dataset(domain) is domains.dataset(TARGET):
    return f'{TARGET}/{split}'
  raise UserError(
    f'streams.{stream}: stage {origin.name!r} does not use images of domain {domain!r}'
  )


def _split(dataset: Dataset, stream: str, name: str, domain: str, batch: int) -> Split:
  """Returns a split to train on; a meta set must have an image of every class."""
  where = '' if domain == SOURCE else f' of {domain}'
  if name == 'meta' and name not in dataset.splits:
    raise UserError(
      f'streams.{stream} reads the meta set{where}, but there is none: set '
      'data.meta_per_class'
    )
  trainable = {n: s for n, s in dataset.splits.items() if n in ('train', 'meta')}
  split = lookup(trainable, f'split to train on{where}', name)
  if name == 'meta':
    missing = np.setdiff1d(np.arange(len(dataset.class_names)), split.labels)
    if missing.size:
      name = named_class(missing[0], dataset.class_names)
      raise UserError(f'the meta set has no image of {name}')
  if batch > len(split.rows) and stream != CLOCK:
    raise UserError(
      f'streams.{stream}.batch is {batch}, but {name}{where} has {len(split.rows)} '
      'images'
    )
  return split


def _episodes(
  config: Config,
  domains: Domains,
  *,
  learned: np.ndarray,
  earlier: Mapping[str, Stage],
  stage: str,
  per_epoch: int,
  novel: int,
  queries_novel: int,
  queries_base: int,
) -> Row:
  """Returns the stream of few-shot tasks on features that a stage saves.

  An epoch has `per_epoch` tasks; the other arguments are those of `episodes`.
  """
  origin = lookup(earlier, 'earlier stage', stage)
  if 'features' not in origin.save_outputs:
    raise UserError(
      f"stage {stage!r} must save its features: save_outputs = ('features',)"
    )

  def into(before: Stream, found: Mapping[str, np.ndarray], put: Callable) -> Stream:
    return before._replace(arrays=put({'features': found['features']}))

  dataset = domains.dataset(config['domain'])
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
  left = Left(stage, {'features': features.shape}, into)
  return Row(stream, per_epoch, 1, dataset, left=left)


STREAMS = {'images': _images, 'episodes': _episodes}
"""Kind of a row -> function (config, domains, ...) that builds it."""


def batch_sizes(config: Config) -> dict[str, int]:
  """Returns the batch sizes of a step, which the number of devices must divide.

  Raises:
    UserError: a batch is not a positive whole number.
  """
  sizes = {}
  for name, row in config['streams'].items():
    if not isinstance(row, Mapping):
      raise UserError(f'streams.{name} is {row!r}; it must be a dict')
    if row.get('name') == 'episodes':
      sizes[f'novel classes of {name}'] = row.get('novel', 0)
      sizes[f'queries of {name}'] = sum(
        row.get(f'queries_{kind}', 0) for kind in ('novel', 'base')
      )
    else:
      batch = row.get('batch') or config['batch']
      if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise UserError(f'streams.{name}.batch is {batch!r}; it must be 1 or more')
      sizes[f'batch of {name}'] = batch
  return {name: size for name, size in sizes.items() if size}


def workers(number: int) -> int:
  """Returns how many processes decode images; -1 means one per core."""
  return usable_cores() if number == -1 else number


def _sampler(
  options: Config,
  split: Split | Unlabelled,
  learned: np.ndarray,
  order: np.ndarray | None,
  batch: int,
  epochs: float,
  positions: int,
  stream: str,
) -> Sampler:
  """Builds a sampler; before its start epoch, rounded up, instance sampling is used.

  A curriculum follows the epochs of the stage, however many images the stream has. A
  sampler that draws by class only sees the learned classes (C,) bool.
  """
  if not isinstance(options, Mapping) or 'name' not in options:
    raise UserError(
      f"streams.{stream}.sampler is {options!r}; it must be a dict with a 'name'"
    )
  options = dict(options)
  start, name = options.pop('start_epoch', 0), options.pop('name')
  stored = images = np.arange(len(split.rows))
  asked = inspect.signature(lookup(SAMPLERS, 'sampler', name)).parameters
  if ('order' in asked) != (order is not None):
    raise UserError(
      f'streams.{stream}: sampler {name!r} '
      + ('does not use an order' if order is not None else 'needs an order')
    )
  if order is not None:
    images = order
  elif {'labels', 'class_pixels'} & {*asked}:
    images = _labels_for(name, 'class_pixels' in asked, split, learned, stream)
  sampler = construct(
    SAMPLERS,
    'sampler',
    name,
    images,
    options=options,
    batch=batch,
    epochs=epochs,
    positions=positions,
  )
  if not start:
    return sampler
  return deferred(instance(stored), sampler, switch_epoch=math.ceil(start))


def _labels_for(
  name: str,
  by_pixels: bool,
  split: Split | Unlabelled,
  learned: np.ndarray,
  stream: str,
) -> np.ndarray:
  """Returns the labels that a sampler draws by.

  Args:
    name: name of the sampler.
    by_pixels: whether it draws by the pixels of each class, (N, C), and not by one
      label per image, (N,).
    split: the images.
    learned: (C,) bool, the classes that are learned.
    stream: its name.

  Raises:
    UserError: the images have no labels, or the other kind of labels.
  """
  if isinstance(split, Unlabelled):
    raise UserError(
      f'sampler {name!r} needs labels, which the stream {stream!r} does not have'
    )
  if by_pixels != split.of_pixels:
    raise UserError(
      f'sampler {name!r} does not fit the stream {stream!r}, whose images have '
      + ("label maps; use 'rare_class'" if split.of_pixels else 'one label each')
    )
  if by_pixels:
    return split.class_pixels(len(learned))
  return split.labels if learned.all() else (np.cumsum(learned) - 1)[split.labels]
