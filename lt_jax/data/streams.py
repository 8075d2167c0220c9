"""Streams: from positions of an order to batches on the device.

The host decides which images to use (and decodes them if needed); cropping, flipping
and normalising happen on the device, inside the jitted step. A stream has no position:
its payload is a function of the step, so a resumed run needs no iterator.
"""

import contextlib
import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.data.crops import Crop
from lt_jax.data.longtail import label_counts
from lt_jax.data.masks import VOID, Window
from lt_jax.data.samplers import Sampler, batch_indices
from lt_jax.errors import UserError

PyTree = Any
Batch = dict[str, jax.Array]
Transform = Callable[[jax.Array, Batch], Batch]
"""(key, batch with stored images) -> batch with float32 ones: augmentation and
normalisation. Label maps move together with the pixels of images."""
Payload = Mapping[str, np.ndarray]
"""The host's part of a batch, batch first: the rows of this process."""


SMALL_PASS = 1000
"""The largest pass, in images, that threads decode: starting processes would take
longer than decoding it."""


class Stream(NamedTuple):
  """Batches as a function of the step.

  Attributes:
    arrays: a pytree on the device ({} for a host stream). It is an argument of the
      jitted step; as a closure it would become a constant of the program.
    payload: step -> a dict of NumPy arrays, batch first: this process's rows.
    prepare: (arrays, payload, key) -> batch; pure, inside jit.
    every: the stream is present in steps divisible by this; in other steps the method
      finds no batch with its name.
    workers: number of processes that make slow payloads ahead; 0: threads of this
      process. None: payloads are made on demand.
    shapes: shapes of the whole batch's payload; None: derived from a payload.
  """

  arrays: PyTree
  payload: Callable[[int], Payload]
  prepare: Callable[[PyTree, Mapping[str, jax.Array], jax.Array], Batch]
  every: int = 1
  workers: int | None = None
  shapes: Mapping[str, jax.ShapeDtypeStruct] | None = None

  def payload_shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a payload with the rows of all processes."""
    if self.shapes is not None:
      return self.shapes
    return {
      name: jax.ShapeDtypeStruct((len(x) * jax.process_count(), *x.shape[1:]), x.dtype)
      for name, x in self.payload(0).items()
    }


class Split(NamedTuple):
  """Some images of a source.

  Attributes:
    source: random access: `len(source)`, and `source[i]` is an image; it has `dtype` if
      that is not uint8.
    rows: (N,) int, positions in the source.
    labels: (N,) int32, -1 for images of no known class, and for all images if labels
      are maps (`of_pixels`).
    arrays: the source's images in device memory, with their label maps if there are
      any; or {} to stream them from the host.
    crop: crops encoded images of any size to one; a `Window` if they have label maps;
      None if they have one size.
    domain: (N,) int32, the domain of each image; None if there is only one.
    offset: the position of the source's first image in `arrays`.
  """

  source: Any
  rows: np.ndarray
  labels: np.ndarray
  arrays: PyTree
  crop: Crop | Window | None = None
  domain: np.ndarray | None = None
  offset: int = 0

  labelled = True

  @property
  def of_pixels(self) -> bool:
    """Whether every pixel has a label, rather than every image."""
    return hasattr(self.source, 'label_map') or 'label' in self.arrays

  def numbers(self) -> dict[str, np.ndarray]:
    """Returns the per-image values of a batch: name -> (N, ...).

    These are the label if images have one, the domain if there are several, and the
    attributes of the source.
    """
    attributes = getattr(self.source, 'attributes', {})
    own = {name: values[self.rows] for name, values in attributes.items()}
    if not self.of_pixels:
      own['label'] = self.labels.astype(np.int32)
    return own | _domains(self)

  def counts(self, num_classes: int) -> np.ndarray:
    """Returns (C,) int, images per class, or pixels per class if these have labels.

    An image with several classes counts for each of them. Those of label maps in files
    are counted when they are first asked for.
    """
    if self.of_pixels:
      return self.class_pixels(num_classes).sum(0)
    several = self.numbers().get('classes')
    if several is not None:
      return (several == 1).sum(0)
    return label_counts(self.labels, num_classes)

  def class_pixels(self, num_classes: int) -> np.ndarray:
    """Returns (N, C) int64, the pixels of each class in each image; 0 without a map.

    A split that only has shapes, of a run that is opened without its data, has a pixel
    of every class in every image.
    """
    if self.source is None:
      return np.ones((len(self.rows), num_classes), np.int64)
    return self.source.class_pixels(self.rows)

  def at(self, positions: np.ndarray) -> 'Split':
    """Returns the images at (M,) positions of this split, in that order."""
    domain = None if self.domain is None else self.domain[positions]
    return self._replace(
      rows=self.rows[positions], labels=self.labels[positions], domain=domain
    )

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, channels) of images in training, and in evaluation without label maps."""
    return self.shapes(training=True)['image'].shape

  def shapes(self, training: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and types of the values of `example`."""
    height, width, channels = self.source.image_shape
    canvas = height, width
    if isinstance(self.crop, Window):
      height, width = self.crop.shape(training)
      canvas = (height, width) if training else self.crop.canvas
    elif self.crop:
      height = width = self.crop.size
    found = {'image': jax.ShapeDtypeStruct((height, width, channels), self.dtype)}
    if self.labelled and self.of_pixels:
      found['label'] = jax.ShapeDtypeStruct(canvas, np.uint8)
    return found

  @property
  def dtype(self) -> np.dtype:
    """The type of the images: uint8, or float32 of features and other arrays."""
    return np.dtype(getattr(self.source, 'dtype', np.uint8))

  def image(self, row: int) -> np.ndarray:
    """Returns the image at a position of the source, as used in evaluation."""
    return self.example(row)['image']

  def example(
    self, row: int, generator: np.random.Generator | None = None
  ) -> dict[str, np.ndarray]:
    """Returns an image, and its label map if there is one.

    Args:
      row: position in the source.
      generator: random numbers for the part of augmentation that the host does. None:
        the image is as in evaluation.

    Returns:
      'image' (H, W, channels) and optionally 'label' (H, W) uint8.
    """
    row, source, crop = int(row), self.source, self.crop
    with_map = self.labelled and self.of_pixels
    if isinstance(crop, Window):
      if generator is None:
        return crop.evaluation(source, row, with_map)
      return crop.training(source, row, generator, with_map)
    if crop is None:
      label = {'label': source.label_map(row)} if with_map else {}
      return {'image': source[row]} | label
    encoded, where = source.encoded(row), source.where(row)
    if generator is None:
      return {'image': crop.evaluation(encoded, where)}
    return {'image': crop.training(encoded, where, generator)}


class Unlabelled:
  """A split without its labels: it only has images in an order."""

  def __init__(self, split: Split):
    self.source = split.source
    self.rows, self.domain = split.rows, split.domain
    self.arrays = {k: v for k, v in split.arrays.items() if k == 'image'}
    self.crop, self.offset = split.crop, split.offset

  labelled = False

  def numbers(self) -> dict[str, np.ndarray]:
    """Returns the per-image values of a batch, without labels: name -> (N,) int32."""
    return _domains(self)

  of_pixels = Split.of_pixels
  image_shape = Split.image_shape
  shapes = Split.shapes
  dtype = Split.dtype
  image = Split.image
  example = Split.example


def _domains(split: Split | Unlabelled) -> dict[str, np.ndarray]:
  return {} if split.domain is None else {'domain': split.domain}


class Pass(NamedTuple):
  """One finite pass over a split, in stored order, the last batch padded.

  Attributes:
    stream: its batches; 'mask' is false for padding.
    batches: number of batches.
    examples: number of examples, without padding.
    view: a State -> the State that predicts these images, with the same shapes. They
      only differ if each domain has its own statistics.
  """

  stream: Stream
  batches: int
  examples: int
  view: Callable[[Any], Any] = lambda state: state


def process_rows(
  rows: Sequence[int], process: int | None = None, processes: int | None = None
) -> Sequence[int]:
  """Returns the rows of a global batch (B, ...) that this process owns."""
  process = jax.process_index() if process is None else process
  processes = jax.process_count() if processes is None else processes
  share = len(rows) // processes
  return rows[process * share : (process + 1) * share]


@functools.cache
def _prepare(transform: Transform) -> Callable[[PyTree, Mapping, jax.Array], Batch]:
  """Returns the `prepare` for a transform; cached, so that passes share programs."""

  def prepare(arrays, payload, key):
    stored = {name: values[payload['index']] for name, values in arrays.items()}
    batch = {**payload, **stored}
    if 'label' in batch and batch['label'].dtype == jnp.uint8:  # a map
      label = batch['label']
      batch['label'] = jnp.where(label == VOID, -1, label.astype(jnp.int32))
    return transform(key, batch)

  return prepare


Read = Callable[[int, int], tuple[Mapping[str, np.ndarray], bool]]
"""(place in the stream, position in the split) -> (the values of `Split.example`,
whether it is a stand-in)."""


def _stream(
  split: Split | Unlabelled,
  positions: Callable[[int], np.ndarray],
  read: Read,
  *,
  batch: int,
  transform: Transform,
  workers: int,
  training: bool,
  beside: Mapping[str, np.ndarray] | None = None,
) -> Stream:
  """Returns the stream of the examples at some positions.

  Args:
    split: the images.
    positions: step -> (B,) int, positions in the split.
    read: how a host stream reads an image.
    batch: B.
    transform: what is done on the device.
    workers: for a host stream.
    training: whether examples are for training.
    beside: name -> (N, ...), further per-image values of batches.
  """
  # Find our rows here: Grain's workers have no device to ask.
  ours = process_rows(range(batch))
  resident, known = bool(split.arrays), split.numbers() | dict(beside or {})

  def payload(step: int) -> dict[str, np.ndarray]:
    places = np.arange(ours.start, ours.stop)
    chosen = positions(step)[places]
    rows = split.rows[chosen].astype(np.int32)
    made = {'index': rows + np.int32(split.offset)} | {
      name: of_all[chosen] for name, of_all in known.items()
    }
    if resident:
      return made
    where = zip(step * batch + places, chosen, strict=True)
    examples, stand_ins = zip(*(read(*at) for at in where), strict=True)
    stacked = {
      name: _stacked([one[name] for one in examples], rows) for name in examples[0]
    }
    return {**made, **stacked, 'bad': np.array(stand_ins)}

  shapes = {'index': jax.ShapeDtypeStruct((batch,), np.int32)} | {
    name: jax.ShapeDtypeStruct((batch, *of_all.shape[1:]), of_all.dtype)
    for name, of_all in known.items()
  }
  if resident:
    return Stream(split.arrays, payload, _prepare(transform), shapes=shapes)
  shapes |= {
    name: jax.ShapeDtypeStruct((batch, *one.shape), one.dtype)
    for name, one in split.shapes(training).items()
  }
  shapes['bad'] = jax.ShapeDtypeStruct((batch,), np.bool_)
  return Stream({}, payload, _prepare(transform), workers=workers, shapes=shapes)


def most_bad(split: Split | Unlabelled) -> int:
  """Returns how many damaged images of a split can be replaced by stand-ins.

  0.1 % of the split, or ten if that is more, but at most a tenth; at least one.
  """
  images = len(split.rows)
  return max(1, images // 1000, min(10, images // 10))


def _or_stand_in(split: Split | Unlabelled, read: Read) -> Read:
  """Returns a `Read` that replaces a damaged image by the next one of its class.

  Without labels it is the next image of any class.
  """
  labels = split.numbers().get('label', np.zeros(len(split.rows), np.int32))

  def safe(place: int, position: int) -> tuple[np.ndarray, bool]:
    try:
      return read(place, position)
    except UserError as error:
      same = np.flatnonzero(labels == labels[position])
      after = np.searchsorted(same, position, side='right')
      for stand_in in np.roll(same, -after)[:-1]:
        with contextlib.suppress(UserError):
          return read(place, stand_in)[0], True
      raise error

  return safe


def _stacked(images: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
  """Returns images of one shape as (B, H, W, channels)."""
  for row, image in zip(rows, images, strict=True):
    if image.shape != images[0].shape:
      raise UserError(
        f'image {row} has shape {image.shape}, image {rows[0]} {images[0].shape}: set '
        'data.image_size for images of many sizes'
      )
  return np.stack(images)


def train_stream(
  split: Split | Unlabelled,
  sampler: Sampler,
  *,
  seed: int,
  batch: int,
  transform: Transform,
  workers: int = 0,
  stand_in: bool = False,
  name: str = 'train',
  beside: Mapping[str, np.ndarray] | None = None,
) -> Stream:
  """Returns the endless stream of a sampler's order over a split.

  Args:
    split: the training images; the sampler gives positions in it. Random numbers for
      the host's augmentation are a function of the seed, the name and the place in the
      stream.
    sampler: the order, one epoch after the other.
    seed: of the order.
    batch: global batch size.
    transform: augmentation and normalisation on the device.
    workers: processes that decode images, if these are not on the device; 0: threads.
    stand_in: whether to replace an unreadable image by the next one of its class;
      payload['bad'] marks it, and 'index' remains that of the bad one.
    name: name of the stream; different names have different random numbers.
    beside: name -> (N, ...), further per-image values of batches.
  """
  drawn_by = (seed, zlib.crc32(name.encode()))

  def read(place: int, position: int) -> tuple[np.ndarray, bool]:
    generator = np.random.default_rng((*drawn_by, int(place)))
    return split.example(split.rows[position], generator), False

  return _stream(
    split,
    lambda step: batch_indices(sampler, seed, batch, step),
    _or_stand_in(split, read) if stand_in else read,
    batch=batch,
    transform=transform,
    workers=workers,
    training=True,
    beside=beside,
  )


def evaluation_pass(
  split: Split | Unlabelled,
  *,
  batch: int,
  transform: Transform,
  workers: int = 0,
  stand_in: bool = False,
  view: Callable[[Any], Any] = lambda state: state,
  beside: Mapping[str, np.ndarray] | None = None,
) -> Pass:
  """Returns one pass over a split, with as many batches in every process.

  Args:
    split: the images.
    batch: global batch size.
    transform: normalisation on the device; its random key is constant.
    workers: as for `train_stream`; threads read up to `SMALL_PASS` images.
    stand_in: as for `train_stream`.
    view: see `Pass`.
    beside: as for `train_stream`.
  """

  def read(place: int, position: int) -> tuple[np.ndarray, bool]:
    del place
    return split.example(split.rows[position]), False

  examples = len(split.rows)
  ours = process_rows(range(batch))
  workers = workers if examples > SMALL_PASS else 0
  stream = _stream(
    split,
    lambda step: np.minimum(step * batch + np.arange(batch), examples - 1),
    _or_stand_in(split, read) if stand_in else read,
    batch=batch,
    transform=transform,
    workers=workers,
    training=False,
    beside=beside,
  )

  def payload(step: int) -> dict[str, np.ndarray]:
    places = np.arange(ours.start, ours.stop)
    return {**stream.payload(step), 'mask': step * batch + places < examples}

  shapes = {**stream.shapes, 'mask': jax.ShapeDtypeStruct((batch,), np.bool_)}
  return Pass(
    stream._replace(payload=payload, shapes=shapes),
    batches=math.ceil(examples / batch),
    examples=examples,
    view=view,
  )
