"""Streams: from positions of an order to batches on the device.

The host decides which images (and decodes them, where it must); cropping, flipping
and normalising happen on the device, inside the jitted step. A stream keeps no
position: its payload is a function of the step, so a resumed run needs no iterator.
"""

import concurrent.futures
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lt_jax.data.samplers import Sampler, batch_indices
from lt_jax.errors import UserError

PyTree = Any
Batch = dict[str, jax.Array]
Transform = Callable[[jax.Array, jax.Array], jax.Array]
"""(key, uint8 images) -> float32 images: augmentation and normalisation."""
Crop = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""(uint8 image of any size, random numbers) -> uint8 image of the one size."""


class Stream(NamedTuple):
  """Batches as a function of the step.

  Attributes:
    arrays: a pytree that lives on the device ({} for a host stream). It is an argument
      of the jitted step: closed over, it would be a constant of the program.
    payload: step -> a dict of NumPy arrays, batch first: this process's rows.
    prepare: (arrays, payload, key) -> batch; pure, inside jit.
    every: the stream is there in steps that it divides; in the others the method finds
      no batch of its name.
  """

  arrays: PyTree
  payload: Callable[[int], Mapping[str, np.ndarray]]
  prepare: Callable[[PyTree, Mapping[str, jax.Array], jax.Array], Batch]
  every: int = 1


class Split(NamedTuple):
  """Some images of a source.

  Attributes:
    source: random access: `len(source)`, `source[i]` a uint8 image.
    rows: (N,) int, their positions in the source.
    labels: (N,) int32, -1 for images of no known class.
    arrays: the source's images in device memory, or {} to stream them from the host.
    crop: what brings an image of any size to the one that evaluation sees; None where
      images have one size.
  """

  source: Any
  rows: np.ndarray
  labels: np.ndarray
  arrays: PyTree
  crop: Callable[[np.ndarray], np.ndarray] | None = None

  def image(self, row: int) -> np.ndarray:
    """Returns the image at a position of the source as evaluation sees it."""
    image = self.source[int(row)]
    return self.crop(image) if self.crop else image


class Pass(NamedTuple):
  """One finite pass over a split, in stored order, the last batch padded.

  Attributes:
    stream: its batches; 'mask' is false where they are padded.
    batches: how many there are.
    examples: how many examples, padding left out.
  """

  stream: Stream
  batches: int
  examples: int


def process_rows(
  rows: np.ndarray, process: int | None = None, processes: int | None = None
) -> np.ndarray:
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


def _payload(
  split: Split,
  positions: np.ndarray,
  read: Callable[[np.ndarray], Sequence[np.ndarray]],
) -> dict[str, np.ndarray]:
  """Returns what the device needs to know of the examples at `positions`.

  `read` takes the places in the global batch of the images that are read here.
  """
  places = process_rows(np.arange(len(positions)))
  positions = positions[places]
  rows = split.rows[positions].astype(np.int32)
  payload = {'index': rows, 'label': split.labels[positions].astype(np.int32)}
  if not split.arrays:
    payload['image'] = _stacked(read(places), rows)
  return payload


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
  """Returns the threads that read images; decoders do not hold the interpreter."""
  return concurrent.futures.ThreadPoolExecutor(os.cpu_count())


def _stacked(images: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
  """Returns images of one shape as (B, H, W, channels) uint8."""
  for row, image in zip(rows, images, strict=True):
    if image.shape != images[0].shape:
      raise UserError(
        f'image {row} has shape {image.shape}, image {rows[0]} {images[0].shape}: set '
        'data.image_size for images of many sizes'
      )
  return np.stack(images)


def train_stream(
  split: Split,
  sampler: Sampler,
  *,
  seed: int,
  batch: int,
  transform: Transform,
  crop: Crop | None = None,
) -> Stream:
  """Returns the endless stream of a sampler's order over a split.

  Args:
    split: the training images; the sampler speaks of positions in it.
    sampler: the order, one epoch after the other.
    seed: of the order.
    batch: global batch size.
    transform: augmentation and normalisation on the device.
    crop: augmentation on the host, of images of many sizes; its random numbers are a
      function of the seed and the position in the stream.
  """

  def payload(step: int) -> dict[str, np.ndarray]:
    positions = batch_indices(sampler, seed, batch, step)

    def read(place: int) -> np.ndarray:
      image = split.source[int(split.rows[positions[place]])]
      if crop is None:
        return image
      return crop(image, np.random.default_rng((seed, step * batch + int(place))))

    return _payload(split, positions, lambda p: list(_threads().map(read, p)))

  return Stream(split.arrays, payload, _prepare(transform))


def evaluation_pass(split: Split, *, batch: int, transform: Transform) -> Pass:
  """Returns one pass over a split; every process makes the same number of batches.

  Args:
    split: the images.
    batch: global batch size.
    transform: normalisation on the device; its random key is constant.
  """
  examples = len(split.rows)
  batches = math.ceil(examples / batch)

  def payload(step: int) -> dict[str, np.ndarray]:
    positions = np.arange(step * batch, (step + 1) * batch)
    mask = process_rows(positions < examples)
    positions = np.minimum(positions, examples - 1)
    rows = split.rows[positions]

    def read(places: np.ndarray) -> list[np.ndarray]:
      return list(_threads().map(split.image, rows[places]))

    return {**_payload(split, positions, read), 'mask': mask}

  return Pass(Stream(split.arrays, payload, _prepare(transform)), batches, examples)
