"""Streams: from positions of an order to batches on the device.

The host decides which images (and decodes them, where it must); cropping, flipping
and normalising happen on the device, inside the jitted step. A stream keeps no
position: its payload is a function of the step, so a resumed run needs no iterator.
"""

import contextlib
import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lt_jax.data.crops import Crop
from lt_jax.data.samplers import Sampler, batch_indices
from lt_jax.errors import UserError

PyTree = Any
Batch = dict[str, jax.Array]
Transform = Callable[[jax.Array, jax.Array], jax.Array]
"""(key, images as they are stored) -> float32: augmentation and normalisation."""
Payload = Mapping[str, np.ndarray]
"""What the device is given of a batch, batch first: the rows of this process."""


SMALL_PASS = 1000
"""Images of a pass up to which threads decode them: processes would take longer to
start than to decode them."""


class Stream(NamedTuple):
  """Batches as a function of the step.

  Attributes:
    arrays: a pytree that lives on the device ({} for a host stream). It is an argument
      of the jitted step: closed over, it would be a constant of the program.
    payload: step -> a dict of NumPy arrays, batch first: this process's rows.
    prepare: (arrays, payload, key) -> batch; pure, inside jit.
    every: the stream is there in steps that it divides; in the others the method finds
      no batch of its name.
    workers: of a stream whose payloads take time, the processes that make them ahead;
      0: threads of this one. None: a payload is made when it is asked for.
    shapes: of the payload of the whole batch; None: they are those of a payload.
  """

  arrays: PyTree
  payload: Callable[[int], Payload]
  prepare: Callable[[PyTree, Mapping[str, jax.Array], jax.Array], Batch]
  every: int = 1
  workers: int | None = None
  shapes: Mapping[str, jax.ShapeDtypeStruct] | None = None

  def payload_shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a payload, the rows of all processes together."""
    if self.shapes is not None:
      return self.shapes
    return {
      name: jax.ShapeDtypeStruct((len(x) * jax.process_count(), *x.shape[1:]), x.dtype)
      for name, x in self.payload(0).items()
    }


class Split(NamedTuple):
  """Some images of a source.

  Attributes:
    source: random access: `len(source)`, `source[i]` an image; of another type than
      uint8 it says so as `dtype`.
    rows: (N,) int, their positions in the source.
    labels: (N,) int32, -1 for images of no known class.
    arrays: the source's images in device memory, or {} to stream them from the host.
    crop: what brings encoded images of any size to one; None where they have one size.
    domain: (N,) int32, which of several domains each is of; None: they are of one.
    offset: where in `arrays` the first image of the source is.
  """

  source: Any
  rows: np.ndarray
  labels: np.ndarray
  arrays: PyTree
  crop: Crop | None = None
  domain: np.ndarray | None = None
  offset: int = 0

  def numbers(self) -> dict[str, np.ndarray]:
    """Returns what a batch tells of each image: name -> (N, ...).

    The label, the domain where there are several, and attributes of the source.
    """
    attributes = getattr(self.source, 'attributes', {})
    return {
      **{name: values[self.rows] for name, values in attributes.items()},
      'label': self.labels.astype(np.int32),
      **_domains(self),
    }

  def at(self, positions: np.ndarray) -> 'Split':
    """Returns some of its images: those at (M,) positions, in that order."""
    domain = None if self.domain is None else self.domain[positions]
    return self._replace(
      rows=self.rows[positions], labels=self.labels[positions], domain=domain
    )

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, channels) of what evaluation and training see."""
    height, width, channels = self.source.image_shape
    return (
      (*(self.crop.size,) * 2, channels) if self.crop else (height, width, channels)
    )

  @property
  def dtype(self) -> np.dtype:
    """The type of the images: uint8, or float32 of features and other arrays."""
    return np.dtype(getattr(self.source, 'dtype', np.uint8))

  def image(self, row: int) -> np.ndarray:
    """Returns the image at a position of the source as evaluation sees it."""
    row = int(row)
    if self.crop is None:
      return self.source[row]
    return self.crop.evaluation(self.source.encoded(row), self.source.where(row))

  def augmented(self, row: int, generator: np.random.Generator) -> np.ndarray:
    """Returns it as training sees it, as far as that is done on the host."""
    row = int(row)
    if self.crop is None:
      return self.source[row]
    return self.crop.training(
      self.source.encoded(row), self.source.where(row), generator
    )


class Unlabelled:
  """A split without its labels: images in an order, and nothing else to give."""

  def __init__(self, split: Split):
    self.source = split.source
    self.rows, self.domain = split.rows, split.domain
    self.arrays, self.crop = split.arrays, split.crop
    self.offset = split.offset

  def numbers(self) -> dict[str, np.ndarray]:
    """Returns what a batch tells of each image: name -> (N,) int32; no label."""
    return _domains(self)

  image_shape = Split.image_shape
  dtype = Split.dtype
  image = Split.image
  augmented = Split.augmented


def _domains(split: Split | Unlabelled) -> dict[str, np.ndarray]:
  return {} if split.domain is None else {'domain': split.domain}


class Pass(NamedTuple):
  """One finite pass over a split, in stored order, the last batch padded.

  Attributes:
    stream: its batches; 'mask' is false where they are padded.
    batches: how many there are.
    examples: how many examples, padding left out.
    view: a State -> the State that predicts these images, of the same shapes. It is the
      same but where each domain has statistics of its own.
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
  """Returns the `prepare` of a transform; cached, so that passes share programs."""

  def prepare(arrays, payload, key):
    images = arrays['image'][payload['index']] if arrays else payload['image']
    return {**payload, 'image': transform(key, images)}

  return prepare


Read = Callable[[int, int], tuple[np.ndarray, bool]]
"""(place in the stream, position in the split) -> (image, whether it is a stand-in)."""


def _stream(
  split: Split | Unlabelled,
  positions: Callable[[int], np.ndarray],
  read: Read,
  *,
  batch: int,
  transform: Transform,
  workers: int,
  beside: Mapping[str, np.ndarray] | None = None,
) -> Stream:
  """Returns the stream of the examples at some positions.

  Args:
    split: the images.
    positions: step -> (B,) int, positions in the split.
    read: how a host stream reads an image.
    batch: B.
    transform: what is done on the device.
    workers: of a host stream.
    beside: name -> (N, ...), what batches tell besides of each image.
  """
  # Which rows are ours is found out here: where Grain makes the payloads, there is no
  # device to ask.
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
    images, stand_ins = zip(*(read(*at) for at in where), strict=True)
    return {**made, 'image': _stacked(images, rows), 'bad': np.array(stand_ins)}

  shapes = {'index': jax.ShapeDtypeStruct((batch,), np.int32)} | {
    name: jax.ShapeDtypeStruct((batch, *of_all.shape[1:]), of_all.dtype)
    for name, of_all in known.items()
  }
  if resident:
    return Stream(split.arrays, payload, _prepare(transform), shapes=shapes)
  shapes |= {
    'image': jax.ShapeDtypeStruct((batch, *split.image_shape), split.dtype),
    'bad': jax.ShapeDtypeStruct((batch,), np.bool_),
  }
  return Stream({}, payload, _prepare(transform), workers=workers, shapes=shapes)


def most_bad(split: Split | Unlabelled) -> int:
  """Returns how many images of a split may be damaged where others stand in for them.

  0.1 % of them, or ten if that is more, but not over a tenth; at least one.
  """
  images = len(split.rows)
  return max(1, images // 1000, min(10, images // 10))


def _or_stand_in(split: Split | Unlabelled, read: Read) -> Read:
  """Returns a `Read` that gives the next image of a class for one that is damaged.

  Without labels that is the next image of any class.
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
    split: the training images; the sampler speaks of positions in it. What is done to
      them on the host takes random numbers that are a function of the seed, the name
      and the place in the stream.
    sampler: the order, one epoch after the other.
    seed: of the order.
    batch: global batch size.
    transform: augmentation and normalisation on the device.
    workers: processes that decode images, if they are not on the device; 0: threads.
    stand_in: takes the next image of its class for one that cannot be read, and says
      so in payload['bad']; 'index' stays that of the bad one.
    name: of the stream; another one has other random numbers.
    beside: name -> (N, ...), what batches tell besides of each image of the split.
  """
  drawn_by = (seed, zlib.crc32(name.encode()))

  def read(place: int, position: int) -> tuple[np.ndarray, bool]:
    generator = np.random.default_rng((*drawn_by, int(place)))
    return split.augmented(split.rows[position], generator), False

  return _stream(
    split,
    lambda step: batch_indices(sampler, seed, batch, step),
    _or_stand_in(split, read) if stand_in else read,
    batch=batch,
    transform=transform,
    workers=workers,
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
) -> Pass:
  """Returns one pass over a split; every process makes the same number of batches.

  Args:
    split: the images.
    batch: global batch size.
    transform: normalisation on the device; its random key is constant.
    workers: as for `train_stream`; up to `SMALL_PASS` images are read by threads.
    stand_in: as for `train_stream`.
    view: see `Pass`.
  """

  def read(place: int, position: int) -> tuple[np.ndarray, bool]:
    del place
    return split.image(split.rows[position]), False

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
