"""Label maps: images in which every pixel has a class, in memory and in files.

On the host a map is uint8, with `VOID` for pixels to ignore; on the device it is int32
with -1 for them. Besides what every source has (see `lt_jax.data.sources`), a source of
such images has

  label_map(position)   the map of an image, (H, W) uint8
  has_map(position)     whether there is one; images of a target need none
  class_pixels(rows)    (n, C) int64, pixels per class of some images
  sizes(rows)           (n, 2) int, height and width of some images

and its `labels` are all -1, since images have no single label. Maps are only ever
resampled by nearest neighbour.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lt_jax.data import crops
from lt_jax.data.arrays import InMemory
from lt_jax.data.lists import read_file, read_lines
from lt_jax.data.palettes import of_colours
from lt_jax.errors import UserError
from lt_jax.files import read_npz, write_atomically

VOID = 255
"""The id of ignored pixels, on the host."""

_UNKNOWN = 254  # in a table: an id that is neither a class nor void

MEASURED = '.lt_jax-pixels-{}.npz'
"""File with the class counts of a folder's label maps, kept in that folder."""


class Ids(NamedTuple):
  """How the ids stored in a data set become classes.

  Attributes:
    class_names: names of the C classes.
    table: (256,) uint8: id -> class, `VOID`, or unknown.
  """

  class_names: tuple[str, ...]
  table: np.ndarray

  def classes(self, ids: np.ndarray, where: str) -> np.ndarray:
    """Returns (H, W) uint8 classes of stored ids.

    Raises:
      UserError: an unknown id; it names the file and the id.
    """
    found = self.table[np.minimum(ids, 255).astype(np.uint8)]
    wrong = (found == _UNKNOWN) | (ids > 255)
    if wrong.any():
      row, column = np.argwhere(wrong)[0]
      raise UserError(
        f'{where}: id {ids[row, column]} at row {row}, column {column} is neither one '
        f'of the {len(self.class_names)} classes nor void ({VOID})'
      )
    return found


def make_ids(
  class_names: Sequence[str],
  raw: Sequence[int] | None = None,
  void: Sequence[int] = (),
) -> Ids:
  """Returns the ids of a data set.

  Args:
    class_names: C names.
    raw: the stored id of each class, -1 if it has none; None: 0 to C - 1.
    void: further stored ids to ignore; 255 is always ignored.
  """
  table = np.full(256, _UNKNOWN, np.uint8)
  for number, stored in enumerate(range(len(class_names)) if raw is None else raw):
    if stored >= 0:
      table[stored] = number
  table[[*void, VOID]] = VOID
  return Ids(tuple(class_names), table)


def pixel_counts(maps: np.ndarray, num_classes: int) -> np.ndarray:
  """Returns (N, C) int64, pixels per class of maps (N, H, W) uint8."""
  counts = [np.bincount(one.ravel(), minlength=256)[:num_classes] for one in maps]
  return np.array(counts, np.int64).reshape(len(maps), num_classes)


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledArrays(InMemory):
  """A source in memory: images (N, H, W, channels) and maps (N, H, W), uint8."""

  images: np.ndarray
  maps: np.ndarray
  class_names: tuple[str, ...]
  passed_over: tuple[str, ...] = ()

  @property
  def labels(self) -> np.ndarray:
    """(N,) int32: no image has one label."""
    return np.full(len(self.images), -1, np.int32)

  def has_map(self, position: int) -> bool:
    """Returns whether an image has a label map: all have."""
    return True

  def label_map(self, position: int) -> np.ndarray:
    """Returns the (H, W) uint8 map of an image."""
    return self.maps[position]

  def class_pixels(self, rows: np.ndarray) -> np.ndarray:
    """Returns (n, C) int64, the pixels of each class in some images."""
    return pixel_counts(self.maps[rows], len(self.class_names))

  def sizes(self, rows: np.ndarray) -> np.ndarray:
    """Returns (n, 2) int, height and width of some images."""
    return np.tile(self.image_shape[:2], (len(rows), 1))

  def identity(self, rows: np.ndarray) -> bytes:
    """Returns the images and the maps themselves."""
    return self.images[rows].tobytes() + self.maps[rows].tobytes()


def without_classes(source: Any, hidden: np.ndarray) -> Any:
  """Returns a source of label maps with the pixels of some classes set to void.

  Args:
    source: any source of this module.
    hidden: (C,) bool, these classes.
  """
  table = np.arange(256, dtype=np.uint8)
  table[np.flatnonzero(hidden)] = VOID
  if isinstance(source, LabelledArrays):
    return dataclasses.replace(source, maps=table[source.maps])
  ids = source.ids._replace(table=table[source.ids.table])
  return dataclasses.replace(source, ids=ids)


def checked_arrays(
  images: np.ndarray,
  maps: np.ndarray,
  class_names: Sequence[str],
  where: str,
  passed_over: tuple[str, ...] = (),
) -> LabelledArrays:
  """Returns arrays as a source.

  Raises:
    UserError: the size of a map differs from its image's, or an id is unknown.
  """
  if images.dtype != np.uint8 or images.shape[:3] != maps.shape:
    raise UserError(
      f'{where}: label maps of {maps.shape} need uint8 images of '
      f'{(*maps.shape, 3)}, got {images.dtype} {images.shape}'
    )
  wrong = ((maps < 0) | (maps >= len(class_names))) & (maps != VOID) & (maps != -1)
  if wrong.any():
    image, row, column = np.argwhere(wrong)[0]
    raise UserError(
      f'{where}: image {image} has the id {maps[image, row, column]} at row {row}, '
      f'column {column}, which is neither one of the {len(class_names)} classes nor '
      f'void ({VOID})'
    )
  maps = np.where(maps < 0, VOID, maps).astype(np.uint8)
  return LabelledArrays(images, maps, tuple(class_names), passed_over)


def read_ids(encoded: bytes, where: str) -> np.ndarray:
  """Returns the (H, W) ids of a label image as stored.

  Args:
    encoded: usually a PNG file, with one channel or a palette.
    where: its name, for messages.

  Raises:
    UserError: it is damaged, or has colours instead of ids.
  """
  try:
    image = crops.open_image(io.BytesIO(encoded))
    image.load()
  except crops.DECODE_ERRORS as error:
    reason = ' '.join(str(error).split()) or 'not an image'
    raise UserError(f'{where}: a label map that cannot be read: {reason}') from None
  if image.mode in ('L', 'P', '1') or image.mode.startswith('I'):
    return np.asarray(image).astype(np.int64)
  colours = np.asarray(image.convert('RGB')).reshape(-1, 3)
  known = of_colours(colours)
  whose = f', those of {known}' if known else ''
  raise UserError(
    f'{where}: a label map in colours{whose} ({image.mode}); expected ids in a single '
    'channel'
  )


class _Encoded:
  """Base of sources of encoded images with maps; maps are read when needed."""

  ids: Ids
  passed_over: tuple[str, ...] = ()
  image_shape: tuple[None, None, int] = (None, None, 3)

  @property
  def class_names(self) -> tuple[str, ...]:
    """Names of classes 0 ... C - 1."""
    return self.ids.class_names

  @property
  def labels(self) -> np.ndarray:
    """(N,) int32: no image has one label."""
    return np.full(len(self), -1, np.int32)

  def __getitem__(self, position: int) -> np.ndarray:
    return crops.pixels(self.encoded(position), self.where(position))

  def label_map(self, position: int) -> np.ndarray:
    """Returns the (H, W) uint8 map of an image.

    Raises:
      UserError: there is none, it is damaged, or has an unknown id.
    """
    if not self.has_map(position):
      raise UserError(f'{self.where(position)}: an image without a label map')
    where = self.where_map(position)
    return self.ids.classes(read_ids(self.encoded_map(position), where), where)

  def class_pixels(self, rows: np.ndarray) -> np.ndarray:
    """Returns (n, C) int64, pixels per class of some images; 0 without a map.

    This reads all maps once, and keeps the counts next to the data.
    """
    return self._measured['pixels'][rows]

  def sizes(self, rows: np.ndarray) -> np.ndarray:
    """Returns (n, 2) int, height and width of some images."""
    return self._measured['sizes'][rows]

  @functools.cached_property
  def _measured(self) -> dict[str, np.ndarray]:
    """'pixels' (N, C) and 'sizes' (N, 2), read from the folder or measured.

    Raises:
      UserError: a map cannot be read, or its size differs from its image's.
    """
    digest = hashlib.sha256(self.stamp())
    digest.update(repr(self.ids.class_names).encode() + self.ids.table.tobytes())
    path = os.path.join(self.home(), MEASURED.format(digest.hexdigest()[:16]))
    shapes = {'pixels': (len(self), len(self.class_names)), 'sizes': (len(self), 2)}
    with contextlib.suppress(OSError, UserError):
      stored = read_npz(path)
      if {name: stored[name].shape for name in stored} == shapes:
        return stored
    found = self._measure()
    with contextlib.suppress(OSError, UserError):  # the folder can be read-only
      stored = io.BytesIO()
      np.savez_compressed(stored, **found)
      write_atomically(path, stored.getvalue())
    return found

  def _measure(self) -> dict[str, np.ndarray]:
    """Reads every map, and the header of every image."""
    from rich.progress import track

    with concurrent.futures.ThreadPoolExecutor() as pool:
      rows = pool.map(self._measured_or_fault, range(len(self)))
      told = f'label maps of {self.home()}'
      found = [*track(rows, told, total=len(self), transient=True)]
    faults = [str(row) for row in found if isinstance(row, UserError)]
    if faults:
      others = f' (and {len(faults) - 1} more are at fault)'
      raise UserError(faults[0] + others * (len(faults) > 1))
    pixels, sizes = zip(*found, strict=True) if found else ((), ())
    classes = len(self.class_names)
    return {
      'pixels': np.array(pixels, np.int64).reshape(-1, classes),
      'sizes': np.array(sizes, np.int64).reshape(-1, 2),
    }

  def _measured_or_fault(
    self, position: int
  ) -> tuple[np.ndarray, tuple[int, int]] | UserError:
    """Returns what is wrong with a map, so that all of them are looked at."""
    try:
      return self._measure_one(position)
    except UserError as error:
      return error

  def _measure_one(self, position: int) -> tuple[np.ndarray, tuple[int, int]]:
    try:
      image = crops.open_image(io.BytesIO(self.encoded(position)))
    except crops.DECODE_ERRORS as error:
      raise UserError(f'{self.where(position)}: {error or "not an image"}') from None
    size = image.size[::-1]
    classes = len(self.class_names)
    if not self.has_map(position):
      return np.zeros(classes, np.int64), size
    label = self.label_map(position)
    self.check_size(position, label, size)
    return pixel_counts(label[None], classes)[0], size

  def check_size(self, position: int, label: np.ndarray, size: tuple[int, int]) -> None:
    """Refuses a map whose size differs from its image's."""
    if label.shape != tuple(size):
      raise UserError(
        f'{self.where_map(position)}: a label map of {_told(label.shape)} pixels, but '
        f'the image {self.where(position)} has {_told(size)}'
      )


def _told(size: Sequence[int]) -> str:
  """Returns (height, width) as a text, the width first."""
  return f'{size[1]} x {size[0]}'


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledFiles(_Encoded):
  """A source of image files, each with a label map in a file.

  Attributes:
    root: the folder that paths are relative to.
    images_at: paths of the images.
    maps_at: paths of their label maps; '' for an image that has none.
    ids: how the stored ids become classes.
    passed_over: lines about files that are not used.
  """

  root: str
  images_at: Sequence[str]
  maps_at: Sequence[str]
  ids: Ids
  passed_over: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.images_at)

  def encoded(self, position: int) -> bytes:
    """Returns an image as it is stored."""
    return read_file(self.where(position))

  def encoded_map(self, position: int) -> bytes:
    """Returns a label map as it is stored."""
    return read_file(self.where_map(position))

  def where(self, position: int) -> str:
    """Returns the path of an image."""
    return os.path.join(self.root, self.images_at[position])

  def where_map(self, position: int) -> str:
    """Returns the path of the label map of an image."""
    return os.path.join(self.root, self.maps_at[position])

  def has_map(self, position: int) -> bool:
    """Returns whether an image has a label map."""
    return bool(self.maps_at[position])

  def identity(self, rows: np.ndarray) -> bytes:
    """Returns what a fingerprint uses for images: their paths, and those of maps."""
    names = [f'{self.images_at[row]}\0{self.maps_at[row]}' for row in rows]
    return '\0'.join(names).encode(errors='surrogateescape')

  def home(self) -> str:
    """Returns the folder of the data."""
    return self.root

  def stamp(self) -> bytes:
    """Returns bytes that change if a file does: paths, sizes and times."""
    lines = []
    for image, label in zip(self.images_at, self.maps_at, strict=True):
      found = os.stat(os.path.join(self.root, label or image))
      lines.append(f'{image}\0{label}\0{found.st_size}\0{found.st_mtime_ns}')
    return '\n'.join(lines).encode(errors='surrogateescape')


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledRecords(_Encoded):
  """A split of a TFDS data set whose records have an image and a label map.

  Attributes:
    name: data set, version and split.
    size: bytes of its records.
    folder: their folder.
    features: (position) -> the features of a record.
    keys: names of the features with the image and the map.
    count: N.
    ids: how the stored ids become classes.
  """

  name: str
  size: int
  folder: str
  features: Callable[[int], Mapping[str, Any]]
  keys: tuple[str, str]
  count: int
  ids: Ids

  def __len__(self) -> int:
    return self.count

  def _stored(self, position: int, key: str) -> bytes:
    return self.features(position)[key].bytes_list.value[0]

  def encoded(self, position: int) -> bytes:
    """Returns an image as it is stored."""
    return self._stored(position, self.keys[0])

  def encoded_map(self, position: int) -> bytes:
    """Returns a label map as it is stored."""
    return self._stored(position, self.keys[1])

  def where(self, position: int) -> str:
    """Returns the name of an image."""
    return f'{self.name}: image {position}'

  def where_map(self, position: int) -> str:
    """Returns the name of a label map."""
    return f'{self.name}: the label map of image {position}'

  def has_map(self, position: int) -> bool:
    """Returns whether an image has a label map: all have."""
    return True

  def identity(self, rows: np.ndarray) -> bytes:
    """Returns `size`, which identifies the images together with `name` and rows."""
    return str(self.size).encode()

  def home(self) -> str:
    """Returns the folder of the data."""
    return self.folder

  def stamp(self) -> bytes:
    """Returns bytes that change if the data do."""
    return f'{self.name} {self.size}'.encode()


def paired_lists(
  lists: Mapping[str, str], root: str, class_names: Sequence[str]
) -> dict[str, LabelledFiles]:
  """Opens lists of images and their label maps.

  Args:
    lists: split -> file of lines: the path of an image, a blank or tab, and the path of
      its label map, or '-' if it has none. If paths contain blanks, use a tab.
    root: the folder that paths are relative to.
    class_names: names of the ids 0 to C - 1; 255 is void.

  Raises:
    UserError: a malformed line, or a missing file.
  """
  ids, found = make_ids(class_names), {}
  for split, file in lists.items():
    images, maps = [], []
    for number, line in enumerate(read_lines(file), 1):
      place = f'{file}:{number}'
      parts = line.split('\t') if '\t' in line else line.split(' ')
      parts = [part.strip() for part in parts if part.strip()]
      if len(parts) != 2:
        raise UserError(
          f'{place}: expected the path of an image, a blank, and the path of its label '
          f"map or '-', got {line[:200]!r}"
        )
      for path in parts:
        if path != '-' and not os.path.isfile(os.path.join(root, path)):
          raise UserError(f'{place}: {os.path.join(root, path)} does not exist')
      images.append(parts[0])
      maps.append('' if parts[1] == '-' else parts[1])
    found[split] = LabelledFiles(root, images, maps, ids)
  return found


class Window(NamedTuple):
  """Crops and resizes images and their label maps to one size.

  Attributes:
    height: of the random training window; 0 trains on whole images.
    width: likewise.
    scale: smallest and largest factor to resize an image by first.
    resize: (height, width) to resize images to before that; () leaves them. The maps
      used in evaluation are never resized.
    canvas: (height, width) of the largest image to evaluate. Smaller ones are placed in
      its upper left corner, and the rest is void.
  """

  height: int
  width: int
  scale: tuple[float, float]
  resize: tuple[int, ...]
  canvas: tuple[int, int]

  def shape(self, training: bool) -> tuple[int, int]:
    """Returns height and width of the images that the network sees."""
    if training and self.height:
      return self.height, self.width
    return tuple(self.resize) or self.canvas

  def training(
    self, source: Any, row: int, generator: np.random.Generator, labelled: bool
  ) -> dict[str, np.ndarray]:
    """Returns a random window: 'image' (h, w, 3) and, if labelled, 'label' (h, w).

    Raises:
      UserError: the window does not fit into the image.
    """
    image, label = _pair(source, row, labelled)
    base = tuple(self.resize) or image.shape[:2]
    factor = generator.uniform(*self.scale)
    size = tuple(round(side * factor) for side in base)
    wanted = (self.height, self.width) if self.height else base
    self.check_fits(source.where(row), image.shape[:2], size)
    corner = [
      int(generator.integers(side - part + 1))
      for side, part in zip(size, wanted, strict=True)
    ]
    found = {'image': resized(image, size, corner, wanted)}
    if labelled:
      found['label'] = nearest(label, size, corner, wanted)
    return found

  def check_fits(
    self, where: str, image: Sequence[int], size: Sequence[int] | None = None
  ) -> None:
    """Refuses a window that is larger than an image is.

    Args:
      where: name of the image.
      image: its (height, width).
      size: (height, width) after resizing; None for the smallest that `scale` allows.
    """
    if not self.height:
      return
    if size is None:
      size = [round(side * self.scale[0]) for side in self.resize or image]
    if self.height > size[0] or self.width > size[1]:
      raise UserError(
        f'{where}: a window of {_told((self.height, self.width))} pixels does not fit '
        f'into the image of {_told(image)}, of which {_told(size)} are left: lower '
        'data.window, or raise data.scale or data.resize_to'
      )

  def evaluation(self, source: Any, row: int, labelled: bool) -> dict[str, np.ndarray]:
    """Returns 'image' (h, w, 3) and, if labelled, 'label', the whole map.

    The map keeps its stored size; the image can be resized.
    """
    image, label = _pair(source, row, labelled)
    if self.resize:
      size = tuple(self.resize)
      image = resized(image, size, (0, 0), size)
    else:
      image = _placed(image, self.canvas, 0)
    found = {'image': image}
    if labelled:
      found['label'] = _placed(label, self.canvas, VOID)
    return found


def _pair(
  source: Any, row: int, labelled: bool
) -> tuple[np.ndarray, np.ndarray | None]:
  """Reads an image, and its map if labelled."""
  image = source[row]
  if not labelled:
    return image, None
  label = source.label_map(row)
  if label.shape != image.shape[:2]:
    source.check_size(row, label, image.shape[:2])
  return image, label


def _placed(values: np.ndarray, size: tuple[int, int], fill: int) -> np.ndarray:
  """Returns an image or a map placed in the upper left of a larger one."""
  if values.shape[:2] == tuple(size):
    return values
  made = np.full((*size, *values.shape[2:]), fill, values.dtype)
  made[: values.shape[0], : values.shape[1]] = values
  return made


def resized(
  image: np.ndarray,
  size: tuple[int, int],
  corner: Sequence[int],
  window: tuple[int, int],
) -> np.ndarray:
  """Returns a window of a resized image, bilinear and antialiased.

  Args:
    image: (H, W, 3) uint8.
    size: (height, width) of the whole image after resizing.
    corner: row and column where the window begins.
    window: its height and width.
  """
  from PIL import Image

  (rows, columns), (top, left) = image.shape[:2], corner
  if tuple(size) == (rows, columns):
    return image[top : top + window[0], left : left + window[1]]
  y, x = rows / size[0], columns / size[1]
  box = (left * x, top * y, (left + window[1]) * x, (top + window[0]) * y)
  box = (*box[:2], min(box[2], columns), min(box[3], rows))
  made = Image.fromarray(image).resize(window[::-1], Image.Resampling.BILINEAR, box=box)
  return np.asarray(made)


def nearest(
  label: np.ndarray,
  size: tuple[int, int],
  corner: Sequence[int],
  window: tuple[int, int],
) -> np.ndarray:
  """Returns the same window of a label map, by nearest neighbour.

  Pixel i of n comes from pixel floor((i + 1/2) N / n) of N, which contains its centre.
  """
  rows, columns = (
    np.minimum(((start + np.arange(part)) * 2 + 1) * old // (2 * new), old - 1)
    for old, new, start, part in zip(label.shape, size, corner, window, strict=True)
  )
  return label[rows[:, None], columns]
