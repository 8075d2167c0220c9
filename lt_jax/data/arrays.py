"""What a source is: labelled images by position. `Arrays` is the one in memory."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class Source(Protocol):
  """What every source offers.

  A source in memory also has `images` and their `dtype`: uint8, or float32 for features
  and other arrays, where D features are D channels of one pixel. A source whose images
  differ in size has `encoded(position)`, the bytes of a file, and `where(position)`,
  its name. A source that leaves out part of its data says so in `passed_over`, a tuple
  of lines. If every pixel has a label, see also `lt_jax.data.masks`.

  Attributes:
    labels: (N,) int32; -1 for images without a known class.
    class_names: names of classes 0 ... C - 1.
    image_shape: (H, W, channels); H and W are None if images differ in size.
  """

  labels: np.ndarray
  class_names: tuple[str, ...]
  image_shape: tuple[int | None, int | None, int]

  def __len__(self) -> int:
    """Returns N."""

  def __getitem__(self, position: int) -> np.ndarray:
    """Returns one image, (H, W, channels) uint8, or of `dtype`."""

  def identity(self, rows: np.ndarray) -> bytes | np.ndarray:
    """Returns what represents the images at `rows` in a fingerprint."""


class InMemory:
  """Common part of sources that have all `images` (N, H, W, channels) in memory."""

  images: np.ndarray

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, channels)."""
    return self.images.shape[1:]

  @property
  def dtype(self) -> np.dtype:
    """The type of the images."""
    return self.images.dtype

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, position: int) -> np.ndarray:
    return self.images[position]


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays(InMemory):
  """A source in memory: images (N, H, W, channels) and labels (N,) int32.

  Images are uint8. Features and other arrays are float32 and used as they are. Images
  that show a world, such as a maze, may have it as `world`. `attributes` are further
  labels of each image, name -> (N, ...): whole numbers, where -1 is missing, or
  float32, where NaN is. Images with several classes have them as the attribute
  'classes' (N, C): 1 for a class of the image, 0 for others, -1 if unknown; their label
  is one of them, see `rarest`. If the files describe their classes and say which are
  unseen, `described` has the descriptions, see `attributes.Described`, and `unseen` the
  names of unseen classes.
  """

  images: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]
  passed_over: tuple[str, ...] = ()
  world: Any = None
  attributes: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  described: Any = None
  unseen: tuple[str, ...] = ()

  def identity(self, rows: np.ndarray) -> np.ndarray:
    """Returns the images themselves."""
    return self.images[rows]


def rarest(classes: np.ndarray) -> np.ndarray:
  """Returns (N,) int32: of each image's classes, the one that fewest images have.

  This is the label of an image with several classes, so that whatever selects images by
  label, such as a class-balanced sampler or a long-tailed subset, finds the images of
  rare classes. A class that is nowhere the rarest is still the label of one of its
  images.

  Args:
    classes: (N, C), 1 for each class of an image, 0 for others, -1 if unknown. An image
      without a class gets one that is unknown, or else -1.

  Examples:
    >>> rarest(np.array([[1, 1], [1, 0], [-1, 0], [0, 0]])).tolist()
    [1, 0, 0, -1]
  """
  order = np.argsort((classes == 1).sum(0), kind='stable')
  has = classes[:, order]
  has = np.where((has == 1).any(1, keepdims=True), has == 1, has == -1)
  label = np.where(has.any(1), order[has.argmax(1)], -1)
  for c in np.setdiff1d(order, label):
    own = np.flatnonzero(classes[:, c] == 1)
    if own.size:  # the image whose label is the most common one
      label[own[np.argmax((label[own][:, None] == label).sum(1))]] = c
  return label.astype(np.int32)
