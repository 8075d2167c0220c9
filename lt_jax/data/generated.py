"""Generated data with the shapes, counts and classes of a real data set.

For smoke tests, profiling and planning: any config runs on it with
--config.data.source=fake.
"""

import dataclasses
import functools
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from lt_jax.data import roles
from lt_jax.data.arrays import Arrays
from lt_jax.errors import UserError

PHOTOGRAPHS = 16
"""Number of distinct files that are used in turn as photographs."""


@dataclasses.dataclass(frozen=True, eq=False)
class Photographs:
  """A source of encoded images of many sizes; a few files repeat.

  Attributes:
    labels: (N,) int32.
    class_names: names of classes 0 ... C - 1.
    image_shape: each file has its own height and width.
    attributes: name -> (N, ...) int32, see `arrays.Arrays`.
  """

  labels: np.ndarray
  class_names: tuple[str, ...]
  image_shape: tuple[None, None, int] = (None, None, 3)
  attributes: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.labels)

  def encoded(self, position: int) -> bytes:
    """Returns a JPEG file."""
    return _photograph(position % PHOTOGRAPHS)

  def where(self, position: int) -> str:
    """Returns the name of an image."""
    return f'generated image {position}'

  def identity(self, rows: np.ndarray) -> bytes:
    """Returns nothing: the labels determine the images."""
    return b''


@functools.cache
def _photograph(number: int) -> bytes:
  """Returns a JPEG of about 500 x 375 pixels and 100 kB: clouds and some noise."""
  from PIL import Image

  generator = np.random.default_rng(number)
  width, height = generator.integers((480, 360), (520, 390))
  clouds = generator.integers(0, 256, (12, 16, 3)).astype(np.uint8)
  image = Image.fromarray(clouds).resize((width, height), Image.Resampling.BICUBIC)
  noisy = np.asarray(image) + generator.normal(0, 12, (height, width, 3))
  file = io.BytesIO()
  Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(
    file, 'JPEG', quality=90
  )
  return file.getvalue()


SIDES = (240, 320)
"""Height and width of generated images with label maps."""


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledPhotographs:
  """A source of identical images with label maps.

  Attributes:
    count: N.
    class_names: names of classes 0 ... C - 1.
    image_shape: each file has its own height and width.
  """

  count: int
  class_names: tuple[str, ...]
  image_shape: tuple[None, None, int] = (None, None, 3)
  passed_over = ()

  def __len__(self) -> int:
    return self.count

  @property
  def labels(self) -> np.ndarray:
    """(N,) int32, all -1: images have label maps, not labels."""
    return np.full(self.count, -1, np.int32)

  def __getitem__(self, position: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*SIDES, 3), np.uint8)

  def has_map(self, position: int) -> bool:
    """Returns True: every image has a label map."""
    return True

  def label_map(self, position: int) -> np.ndarray:
    """Returns bands of all classes, (H, W) uint8."""
    height, width = SIDES
    band = np.arange(height) * len(self.class_names) // height
    return np.repeat(band.astype(np.uint8)[:, None], width, axis=1)

  def class_pixels(self, rows: np.ndarray) -> np.ndarray:
    """Returns (n, C) int64: pixels of each class in the images `rows`."""
    pixels = np.bincount(self.label_map(0).reshape(-1), minlength=len(self.class_names))
    return np.repeat(pixels[None], len(rows), axis=0)

  def sizes(self, rows: np.ndarray) -> np.ndarray:
    """Returns (n, 2) int: height and width of the images `rows`."""
    return np.repeat(np.array([SIDES]), len(rows), axis=0)

  def where(self, position: int) -> str:
    """Returns the name of an image."""
    return f'generated image {position}'

  def identity(self, rows: np.ndarray) -> bytes:
    """Returns nothing: the number of images determines them."""
    return b''


def class_counts(total: int, classes: int, largest: int, smallest: int) -> np.ndarray:
  r"""Returns class counts from the largest to the smallest, with a given sum.

  .. math:: n_c = s + (l - s) (1 - c / (C - 1))^p

  rounded, with p such that the sum is N. What rounding adds or removes is corrected in
  the classes between the first and the last.

  Args:
    total: N.
    classes: C.
    largest: l.
    smallest: s.

  Raises:
    UserError: no such counts have this sum.
  """
  mean = total / max(classes, 1)
  if not 1 <= smallest <= mean <= largest or (smallest < largest and classes < 3):
    raise UserError(
      f'data.fake: {total} images cannot have {classes} classes of {smallest} to '
      f'{largest} images'
    )
  if smallest == largest:
    return np.full(classes, smallest)
  power = (largest - smallest) / max(mean - smallest, 1e-9) - 1
  place = 1 - np.arange(classes) / (classes - 1)
  counts = np.round(smallest + (largest - smallest) * place**power).astype(int)
  inner = counts[1:-1]
  while missing := total - counts.sum():
    step = int(np.sign(missing))
    room = (inner < largest) if step > 0 else (inner > smallest)
    if not room.any():
      raise UserError(f'data.fake: {classes} classes cannot have {total} images')
    inner[np.flatnonzero(room)[: abs(missing)]] += step
  return counts


def sources(
  *,
  classes: int,
  train: int,
  largest: int,
  smallest: int,
  val: int = 0,
  test: int = 0,
  open: int = 0,
  gallery: int = 0,
  probe: int = 0,
  distractors: int = 0,
  image_size: int = 0,
  label_maps: bool = False,
  several: bool = False,
) -> dict[str, Any]:
  """Returns generated splits.

  Args:
    classes: C.
    train: training images.
    largest: training images of the first class, the largest.
    smallest: training images of the last class.
    val: validation images, spread evenly over the classes.
    test: test images, likewise.
    open: images without a known class.
    gallery: identities with an image in a gallery, among the test images. Three
      quarters are classes, evenly from head to tail; the others are zero-shot.
    probe: images of these identities to look up.
    distractors: images of other identities.
    image_size: side of the images; 0 for photographs of many sizes.
    label_maps: gives images a label map instead of a label, and every split at least
      one image.
    several: gives each image a second class, the one after its own.

  Returns:
    split -> source.

  Raises:
    UserError: the counts are impossible.
  """
  names = tuple(str(c) for c in range(classes))
  if label_maps:
    numbers = {'train': train, 'val': val or 1, 'test': test or 1}
    return {k: LabelledPhotographs(count, names) for k, count in numbers.items()}
  counts = class_counts(train, classes, largest, smallest)
  labels = {
    'train': np.repeat(np.arange(classes), counts),
    'val': np.arange(val) % classes,
    'test': np.arange(test) % classes,
    'open': np.full(open, -1),
  }
  attributes: dict[str, dict[str, np.ndarray]] = {}
  if several:
    both = np.eye(classes, dtype=np.int32)
    both |= np.roll(both, 1, axis=1)
    attributes = {split: {'classes': both[y]} for split, y in labels.items()}
  if gallery:
    known = min(classes, -(-3 * gallery // 4))
    spread = np.linspace(0, classes - 1, known).astype(int)
    identities = np.append(spread, classes + np.arange(gallery - known))
    attributes['test'] = roles.attributes(
      {
        'test': labels['test'],
        'gallery': identities,
        'probe': np.resize(identities, probe),
        'distractors': np.full(distractors, classes + gallery),
      }
    )
    labels['test'] = attributes['test']['identity']
  return {
    split: _source(y.astype(np.int32), names, image_size, attributes.get(split, {}))
    for split, y in labels.items()
    if y.size
  }


def _source(
  labels: np.ndarray,
  names: tuple[str, ...],
  image_size: int,
  attributes: Mapping[str, np.ndarray],
) -> Any:
  """Returns one split: images in memory, or files."""
  if not image_size:
    return Photographs(labels, names, attributes=attributes)
  shape = (len(labels), image_size, image_size, 3)
  images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  return Arrays(images, labels, names, attributes=attributes)
