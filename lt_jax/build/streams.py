"""From config keys to streams: which images, in which order, transformed how.

Each row of `config.streams` names a batch and says which images it is drawn from. A row
gives images by default; its 'name' selects another kind from `STREAMS`, and its other
keys are options of that function. Only the row 'train' is known by name: its epochs are
the stage's clock.
"""

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

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
"""Whether another image of the class stands in for one that cannot be read."""


class Row(NamedTuple):
  """A stream of a stage, built.

  Attributes:
    stream: the stream.
    length: L of an epoch: it begins at every step ceil(e L / B).
    batch: B.
    sizes: what it is -> the first axes of what a step is given, which devices divide.
    split: the images, and the name of their split; None: there are none.
    left: what an earlier stage leaves for the stream, if it reads any.
    dataset: the data set whose training counts and classes are those of the stream.
    uses_target_labels: whether it gives labels of a target domain.
    pixels: (mean, std) by which its images are normalised; None: it has none.
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
    config: of the stage.
    domains: the data.
    learned: (C,) bool, the classes that are learned.
    earlier: the stages before.

  Raises:
    UserError: a row that cannot be, by the name of the stream.
  """
  if CLOCK not in config['streams']:
    raise UserError(f'streams has no {CLOCK!r}, whose epochs the stage is counted in')

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
  """Returns the stream of a split's images, by a sampler.

  Args:
    config: of the stage.
    domains: the data.
    stream: the name of the row.
    learned: (C,) bool, the classes that are learned; images of others are left out.
    earlier: the stages before.
    clock: the stream whose epochs are those of the stage; None: this one.
    domain: whose images, a domain or a role; empty: the stage's.
    split: which of them, 'train' or 'meta' (of a source).
    batch: images a step; 0: `config.batch`.
    sampler: its name and options; None: `config.sampler` for the stage's own images,
      every image once an epoch for others.
    every: steps from one batch to the next.
    labels: whether batches have labels; None: those of a source have.
    domain_labels: whether batches tell which of several domains an image is of; None:
      those of several sources do, those of a compound target do not.
    stage: an earlier stage, which saves something of these images (`save_outputs`).
    arrays: name in the batch -> name of what it saves, such as {'label': 'prediction'}
      of images without labels.
    order: the name of numbers that it saves, one an image: the sampler is given the
      images from the least to the greatest.

  Raises:
    UserError: there is no such split, it is too small, or the sampler needs labels.
  """
  domain, batch = domain or config['domain'], batch or config['batch']
  if isinstance(every, bool) or not isinstance(every, int) or every < 1:
    raise UserError(f'streams.{stream}.every is {every!r}; it must be 1 or more')
  if domain == OPEN or domain in domains.roles[OPEN]:
    raise UserError(
      f'streams.{stream}: domain {domain!r} is open, which training never sees'
    )
  of_target = domains.is_target(domain)
  labelled = not of_target if labels is None else labels
  if of_target and split == 'meta' and not labelled:
    raise UserError(
      f'streams.{stream}: the meta set of a target is drawn by its labels: set '
      'labels to True, or split to train'
    )
  dataset = domains.dataset(domain)
  if dataset.class_names != domains.dataset(config['domain']).class_names:
    learned = np.ones(len(dataset.class_names), bool)  # of classes of its own, all
  images = _split(dataset, stream, split, domain, batch)
  places, total = np.arange(len(images.rows)), len(images.rows)
  if labelled and images.of_pixels:
    unseen = dataset.unseen if dataset.unseen is not None else ~learned & learned
    _check_maps(images, stream, learned | unseen)
  elif labelled:
    kept = learned[images.labels]
    places = places[kept]
    images = images._replace(rows=images.rows[kept], labels=images.labels[kept])
    if images.domain is not None:
      images = images._replace(domain=images.domain[kept])
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
  # So many as the stage reads in one of its epochs.
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


def _check_maps(images: Split, stream: str, learned: np.ndarray) -> None:
  """Refuses images without a label map, and to learn only some of the classes.

  Args:
    images: of the stream.
    stream: its name.
    learned: (C,) bool, the classes that are learned, or have no pixel.
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
  """Returns a data set whose classes seem equally frequent, as no label tells more."""
  each = max(1, int(dataset.counts.mean()))
  return dataset._replace(counts=np.full_like(dataset.counts, each))


class _Reads(NamedTuple):
  """What a stream of images reads of an earlier stage.

  Attributes:
    origin: the stage.
    split: what the stage calls the split of the images.
    arrays: name in the batch -> name of an output.
    order: the name of the output that orders the images; empty for none.
    places: (n,) places in the split of the images that the stream has.
    total: N, the images of the split.
  """

  origin: Stage
  split: str
  arrays: dict[str, str]
  order: str
  places: np.ndarray
  total: int

  def check(self, stream: str, taken: Collection[str]) -> None:
    """Refuses names in the batch that are taken, and an order that is no number."""
    for name in self.arrays:
      if name in taken:
        raise UserError(f'streams.{stream}.arrays: the batch has {name!r} already')
    for key, one in self._saved().items():
      if split_and_name(key)[1] == self.order and one.ndim != 1:
        raise UserError(
          f'streams.{stream}.order: {self.order!r} has {one.shape[1:]} numbers an '
          'image; it must have one'
        )

  def ordered_by(self) -> str:
    """Returns under which name the stage saves the order; empty for none."""
    return self._key(self.order) if self.order else ''

  def _key(self, output: str) -> str:
    """Returns under which name the stage saves an output of these images."""
    for saved in self.origin.save_outputs:
      if split_and_name(saved) == (self.split, output):
        return saved
    name = output if self.split == 'train' else f'{self.split}/{output}'
    raise UserError(
      f'stage {self.origin.name!r} does not save {name!r}: add it to its save_outputs'
    )

  def _saved(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns name in arrays.npz -> shape and type of a batch of it."""
    state = state_shapes(self.origin.method, self.origin.streams)
    outputs = [*self.arrays.values(), *([self.order] if self.order else [])]
    keys = dict.fromkeys(self._key(output) for output in outputs)
    return {key: saved_shape(self.origin.survey, state, key) for key in keys}

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Returns name in arrays.npz -> shape of all of it."""
    return {key: (self.total, *one.shape[1:]) for key, one in self._saved().items()}

  def stand_ins(self) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Returns what `taken` will, before the stage has left anything."""
    return self.taken(
      {
        key: np.broadcast_to(np.zeros((), one.dtype), (self.total, *one.shape[1:]))
        for key, one in self._saved().items()
      }
    )

  def taken(
    self, found: Mapping[str, np.ndarray]
  ) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Returns (name in the batch -> (n, ...), the (n,) order or None)."""
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
  """Returns what an earlier stage calls a split of images in its passes."""
  # First by name: where a run is opened without its data, all domains have the same.
  if domain == TARGET and not domains.is_target(origin.domain):
    return f'{TARGET}/{split}'
  if domain == origin.domain or domains.dataset(domain) is origin.dataset:
    return split
  if domains.roles[TARGET] and domains.dataset(domain) is domains.dataset(TARGET):
    return f'{TARGET}/{split}'
  raise UserError(
    f'streams.{stream}: stage {origin.name!r} sees no images of domain {domain!r}'
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
      told = named_class(missing[0], dataset.class_names)
      raise UserError(f'the meta set has no image of {told}')
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
  """Returns the stream of few-shot tasks on the features that a stage saves.

  An epoch is `per_epoch` tasks; the others are options of `episodes`.
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
"""Kind of a row -> (config, domains, ...) -> the row, built."""


def batch_sizes(config: Config) -> dict[str, int]:
  """Returns the first axes of what a step is given, which devices must divide.

  Raises:
    UserError: a batch is no positive whole number.
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
  """Returns how many processes decode images; -1 means one a core."""
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
  """Builds a sampler; before its start, a whole epoch, instance sampling serves.

  A curriculum goes by the epochs of the stage, however many images the stream has. One
  that draws by class is told of the learned classes (C,) bool alone, as if there were
  no others.
  """
  options = dict(options)
  start = options.pop('start_epoch', 0)
  name = options.pop('name')
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
    name: of the sampler.
    by_pixels: whether it draws by the pixels of each class, (N, C), and not by one
      label an image, (N,).
    split: the images.
    learned: (C,) bool, the classes that are learned.
    stream: its name.

  Raises:
    UserError: the images have no labels, or labels of the other kind.
  """
  if isinstance(split, Unlabelled):
    raise UserError(
      f'sampler {name!r} needs labels, which the stream {stream!r} does not have'
    )
  if by_pixels != split.of_pixels:
    raise UserError(
      f'sampler {name!r} does not fit the stream {stream!r}, whose images have '
      + ("label maps: use 'rare_class'" if split.of_pixels else 'one label each')
    )
  if by_pixels:
    return split.class_pixels(len(learned))
  return split.labels if learned.all() else (np.cumsum(learned) - 1)[split.labels]
