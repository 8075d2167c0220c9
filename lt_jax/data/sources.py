"""Sources: labelled images by position, wherever they are stored.

A specification names one: 'digits', 'npz:PATH', 'tfds:NAME', 'list:FOLDER' or
'folder:DIR'.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import os
import re
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from etils import epath

from lt_jax.data.arrays import Arrays, Source, rarest
from lt_jax.data.crops import DECODE_ERRORS
from lt_jax.data.digit_tasks import digit_task
from lt_jax.data.features import xlsa
from lt_jax.data.layouts import CITYSCAPES_IDS, LAYOUTS, ids_of, layout_source
from lt_jax.data.lists import (
  find_lists,
  folder_source,
  list_source,
  listed_class_names,
  names_pairs,
)
from lt_jax.data.masks import VOID, LabelledRecords, checked_arrays, paired_lists
from lt_jax.data.mazes import maze_images
from lt_jax.data.rendered import rendered_digits
from lt_jax.data.resizing import turned
from lt_jax.data.scenes import scenes
from lt_jax.errors import UserError, lookup, suggest
from lt_jax.files import read_json, write_atomically

T = TypeVar('T')

MEMORY_LIMIT = 2**30  # bytes of images up to which a TFDS split is read into memory
LABELS_FILE = 'lt_jax-labels-{}.npy'  # of a split, beside its records
UNFINISHED = '.unfinished'  # ends the folder of records that are being prepared


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
  """A source on disk: a split of a TFDS data set, its images encoded.

  Attributes:
    name: data set, version and split.
    size: bytes of its records, which change if the set is prepared again.
    records: random access to serialised tf.train.Example messages.
    class_names: names of classes 0 ... C - 1.
    image_shape: (H, W, channels); H and W are None if images differ in size.
    labels_file: where `write_labels` writes the labels.
  """

  name: str
  size: int
  records: Sequence[bytes]
  class_names: tuple[str, ...]
  image_shape: tuple[int | None, int | None, int]
  labels_file: epath.Path
  passed_over: tuple[str, ...] = ()

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """(N,) int32, from `labels_file`, which is written first if missing."""
    return _checked_labels(
      self._known_labels(),
      len(self),
      len(self.class_names),
      self.name,
      is_open=self.name.endswith('/open'),
    )

  def _known_labels(self) -> np.ndarray:
    """Returns what `read_labels` does, from `labels_file` if it is there."""
    if self.labels_file.exists():
      return _stored_labels(self.labels_file)
    labels = self.read_labels()
    with contextlib.suppress(OSError):  # of a folder that is not ours to write in
      write_labels(self.labels_file, labels)
    return labels

  def read_labels(self) -> np.ndarray:
    """Returns (N,) int64 labels from all records, -1 for an image without one."""
    from rich.progress import track

    positions = track(range(len(self)), f'labels of {self.name}', transient=True)
    return np.array([self.example(i)[1] for i in positions], np.int64)

  def example(self, position: int) -> tuple[bytes, Any]:
    """Returns (JPEG or PNG file, label) as stored.

    Raises:
      UserError: the record is damaged, or its file is missing.
      OSError: it is temporarily unreadable, for example if a disk or network fails.
    """
    return self._read(
      position,
      lambda feature: (feature['image'].bytes_list.value[0], self._label(feature)),
    )

  def label_name(self, position: int) -> str:
    """Returns the text beside a label, where a set has one; raises as `example`."""
    return self._read(
      position, lambda feature: feature['label_name'].bytes_list.value[0].decode()
    )

  def _read(self, position: int, read: Callable[[Mapping[str, Any]], T]) -> T:
    """Returns what a function reads from the features of a record."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    try:
      # Parsed here, because the decoders of TFDS take eight times as long.
      example = tf_example_pb2.Example.FromString(self.records[position])
      return read(example.features.feature)
    except (RuntimeError, ValueError, DecodeError, IndexError) as error:
      reason = ' '.join(str(error).split())[:200]
      passing = isinstance(error, RuntimeError) and not _LASTING.match(reason)
      raise (OSError if passing else UserError)(
        f'{self.where(position)}: a record that cannot be read: {reason}'
      ) from None

  def _label(self, feature: Mapping[str, Any]) -> Any:
    """Returns the label of a record."""
    return feature['label'].int64_list.value[0]

  def decode(self, position: int, encoded: bytes) -> np.ndarray:
    """Returns a stored image as (H, W, channels) uint8, whatever its colour model."""
    from PIL import Image

    try:
      with Image.open(io.BytesIO(encoded)) as image:
        pixels = np.asarray(image.convert(_PIL_MODES[self.image_shape[-1]]))
    except DECODE_ERRORS as error:
      raise UserError(f'{self.where(position)}: {error}') from None
    return pixels.reshape(*pixels.shape[:2], -1)

  def encoded(self, position: int) -> bytes:
    """Returns an image as stored."""
    return self.example(position)[0]

  def where(self, position: int) -> str:
    """Returns the name of an image."""
    return f'{self.name}: image {position}'

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, position: int) -> np.ndarray:
    return self.decode(position, self.example(position)[0])

  def identity(self, rows: np.ndarray) -> bytes:
    """Returns `size`, which identifies the images together with `name` and rows."""
    return str(self.size).encode()


class RecordsOfSeveral(Records):
  """Records of images with the classes of all their objects, as in VOC.

  If all objects of a class in an image are marked as difficult, the class is unknown
  there, as in VOC's own image lists.
  """

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """(N,) int32, the rarest class of each image."""
    return rarest(self.attributes['classes'])

  @functools.cached_property
  def attributes(self) -> dict[str, np.ndarray]:
    """'classes' (N, C) int32: 1, 0, or -1 if all its objects are difficult."""
    return {'classes': self._known_labels().astype(np.int32)}

  def _label(self, feature: Mapping[str, Any]) -> np.ndarray:
    """Returns the classes (C,) of a record."""
    classes = np.zeros(len(self.class_names), np.int64)
    classes[list(feature['labels'].int64_list.value)] = -1
    plain = 'labels_no_difficult' if 'labels_no_difficult' in feature else 'labels'
    classes[list(feature[plain].int64_list.value)] = 1
    return classes


_PIL_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # by the number of channels

# How array_record's messages begin for damage (for a truncated shard they are empty)
# and for missing files; it has no error types. Its other errors, such as failed system
# calls or those of a bucket, can be temporary.
_LASTING = re.compile(
  r'$|Corrupted|Invalid|Truncated|Riegeli|ArrayRecord|Could not parse|'
  r'\w+\(\) failed: (No such file|Is a directory|Permission denied)'
)


def load_source(spec: str, data_dir: str | None = None) -> dict[str, Source]:
  """Opens a data set.

  Args:
    spec: one of

      - 'digits';
      - 'digits_domains:RENDERING', see `rendered`;
      - 'digits_tasks:TASK', see `digit_tasks`;
      - 'npz:PATH', an archive of x_SPLIT and y_SPLIT, usually for train and test:
        images (N, H, W) or (N, H, W, channels) uint8, float arrays of these shapes, or
        features (N, D) of any type, with labels (N,) int. Optional: class_names (C,)
        str, and further labels y_SPLIT.NAME, whole numbers where -1 is missing or
        floats where NaN is. y_SPLIT.classes (N, C) are the classes of images with
        several. Label maps are y_SPLIT (N, H, W), with 255 for void;
      - 'tfds:NAME', a prepared TFDS data set;
      - 'list:FOLDER', lists of image files, see `lists.list_source`, or lists with two
        paths per line, an image and its label map, see `masks.paired_lists`;
      - 'folder:DIR', image files in one folder per class, see `lists.folder_source`;
      - 'xlsa:PATH', features with unseen classes, see `features.xlsa`;
      - 'mazes:DOMAIN', see `mazes.maze_images`;
      - 'scenes:DOMAIN', see `scenes.scenes`;
      - 'rotated:DEGREES:SOURCE', the images of another source in memory, rotated
        anticlockwise;
      - a key of `layouts.LAYOUTS` with a folder, for label maps.
    data_dir: the folder of TFDS data sets; None for TFDS's default, the environment
      variable TFDS_DATA_DIR or else ~/tensorflow_datasets. For lists, the folder their
      paths are relative to; None for that of the lists. For 'xlsa:', the att_splits.mat
      if it is not beside the features.

  Returns:
    split -> source.

  Raises:
    UserError: the specification is unknown, or files are missing or wrong.
  """
  kind, _, argument = spec.partition(':')
  argument, data_dir = (
    path and os.path.expanduser(path) for path in (argument, data_dir)
  )
  if os.path.exists(os.path.expanduser(spec)) and spec not in SOURCES:
    raise UserError(
      f'source {spec!r} is a path; write folder:{spec}, list:{spec} or npz:{spec}'
    )
  return lookup(SOURCES, 'source', kind)(argument, data_dir)


def passed_over(sources: Mapping[str, Source]) -> tuple[str, ...]:
  """Returns lines about the parts of a data set that are not used, by split."""
  return tuple(
    f'{split}: {line}'
    for split, one in sources.items()
    for line in getattr(one, 'passed_over', ())
  )


def store_labels(sources: dict[str, Source]) -> None:
  """Writes the labels of sources next to them, so that runs need not read all records.

  Args:
    sources: split -> source, from `load_source`; those in memory are skipped.
  """
  for source in sources.values():
    if isinstance(source, Records):
      write_labels(source.labels_file, source.read_labels())


def write_labels(file: epath.Path, labels: Sequence[int]) -> None:
  """Writes the labels of a split, -1 for an image without one."""
  stored = io.BytesIO()
  np.save(stored, np.asarray(labels, np.int64))
  write_atomically(file, stored.getvalue())


def fingerprint(source: Source, *indices: np.ndarray) -> str:
  """Returns the SHA-256 of the data, which shows whether they have changed.

  It covers labels, attributes, class names, the length, and what `identity` returns for
  the images: images in memory byte for byte, images in files by their paths, and a TFDS
  data set by its name, version and number of bytes.

  Args:
    source: any source.
    *indices: positions in it, one array per split; without any, the whole source.

  Returns:
    64 hexadecimal digits.
  """
  name = getattr(source, 'name', '')
  header = (name, len(source), tuple(source.image_shape), tuple(source.class_names))
  digest = hashlib.sha256(repr(header).encode())
  for rows in indices or (np.arange(len(source)),):
    digest.update(f'split of {len(rows)}'.encode())
    digest.update(np.ascontiguousarray(rows, '<i8'))
    digest.update(source.labels[rows].astype('<i4'))
    for name, values in sorted(getattr(source, 'attributes', {}).items()):
      digest.update(f'{name} {values.dtype} {values.shape[1:]}'.encode())
      digest.update(np.ascontiguousarray(values[rows]))
    digest.update(source.identity(rows))
  return digest.hexdigest()


def _stored_labels(file: epath.Path) -> np.ndarray:
  """Reads what `write_labels` wrote."""
  stored = io.BytesIO(file.read_bytes())
  try:
    labels = np.lib.format.read_array(stored, allow_pickle=False)
    return labels.astype(np.int64, casting='same_kind')
  except _NPY_ERRORS as error:
    raise UserError(f'{file} is damaged; delete it: {error}') from None


# The header of an array is Python code; a changed bit in it can raise any of these.
_NPY_ERRORS = (ValueError, TypeError, SyntaxError, tokenize.TokenError, MemoryError)


def _checked_labels(
  labels: np.ndarray, length: int, num_classes: int, where: str, is_open: bool = False
) -> np.ndarray:
  """Returns labels as (length,) int32, all in [0, num_classes), or all -1 if open."""
  if labels.shape != (length,):
    raise UserError(f'{where}: {length} images, but labels of shape {labels.shape}')
  if is_open and (labels == -1).all():
    return labels.astype(np.int32)
  wrong = (labels < 0) | (labels >= num_classes)
  if wrong.any():
    i = np.argmax(wrong)
    raise UserError(
      f'{where}: label {labels[i]} at index {i} is not in [0, {num_classes})'
    )
  return labels.astype(np.int32)


def _digits(argument: str, data_dir: str | None) -> dict[str, Source]:
  """Loads 1,797 handwritten digits, 8x8 grey, bundled with scikit-learn."""
  from sklearn.datasets import load_digits

  if argument:
    raise UserError(f"source 'digits' takes no argument, got {argument!r}")
  data = load_digits()
  images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
  names = tuple(str(name) for name in data.target_names)
  return {'train': Arrays(images, data.target.astype(np.int32), names)}


def _fake(argument: str, data_dir: str | None) -> dict[str, Source]:
  """Refuses an argument: 'fake' takes its counts from the config."""
  raise UserError(
    f"source 'fake' takes no argument, got {argument!r}: data.fake says what to "
    'generate, such as --config.data.fake.classes=10'
  )


def _npz(path: str, data_dir: str | None) -> dict[str, Source]:
  """Loads an archive of NumPy arrays; checks all headers before reading any array."""
  try:
    with zipfile.ZipFile(path) as archive:
      present = {name.removesuffix('.npy') for name in archive.namelist()}
      splits = _npz_splits(present)
      keys = [f'{kind}_{split}' for split in splits for kind in 'xy']
      keys += [key for key in _CLASS_NAMES if key in present][:1]
      keys += [
        key for split in splits for key in present if key.startswith(f'y_{split}.')
      ]
      _check_members(splits, {key: _npz_header(archive, key) for key in keys})
    with np.load(path, allow_pickle=False) as archive:
      arrays = {key: archive[key] for key in keys}
  except _NPZ_ERRORS as error:
    reason = str(getattr(error, 'strerror', None) or error)
    raise UserError(f'npz:{path}: {" ".join(reason.split())}') from None

  # Without names, the largest label gives the number of classes; a label beyond the
  # number of images is an error.
  first = arrays[f'y_{splits[0]}']
  if first.ndim > 1:
    known = first[first != VOID]
    count = int(known.max()) + 1 if known.size else 0
  else:
    count = min(int(first.max()) + 1, len(first))
  names = next((arrays[key] for key in _CLASS_NAMES if key in arrays), range(count))
  names = tuple(str(name) for name in names)
  others = sorted(present.difference(keys))
  ignored = (f'members passed over: {", ".join(others)}',) if others else ()
  sources = {}
  for split in splits:
    y, images = arrays[f'y_{split}'], arrays[f'x_{split}']
    own = ignored if split == splits[0] else ()
    if y.ndim > 1:
      images = images[..., None] if images.ndim == 3 else images
      sources[split] = checked_arrays(images, y, names, f'npz:{path}: y_{split}', own)
      continue
    y = _checked_labels(
      y, len(y), len(names), f'npz:{path}: y_{split}', is_open=split == 'open'
    )
    images = _checked_arrays(images, f'npz:{path}: x_{split}')
    attributes = _attributes(arrays, split, len(y), path)
    sources[split] = Arrays(images, y, names, own, attributes=attributes)
  return sources


def _attributes(
  arrays: Mapping[str, np.ndarray], split: str, length: int, path: str
) -> dict[str, np.ndarray]:
  """Returns the further labels of a split, y_SPLIT.NAME."""
  found = {}
  for key, values in arrays.items():
    if key.startswith(f'y_{split}.'):
      kind = {'i': np.int32, 'u': np.int32, 'b': np.int32, 'f': np.float32}.get(
        values.dtype.kind
      )
      if kind is None or values.shape[:1] != (length,) or values.ndim > 2:
        raise UserError(
          f'npz:{path}: {key} must be numbers ({length},) or ({length}, K), got '
          f'{values.dtype} {values.shape}'
        )
      found[key.partition('.')[2]] = values.astype(kind)
  return found


def _npz_splits(present: Collection[str]) -> list[str]:
  """Returns the splits of an archive, 'train' first: pairs of x_SPLIT and y_SPLIT.

  Raises:
    ValueError: there is none, or train or test is incomplete.
  """
  splits = {name[2:] for name in present if name[:2] in ('x_', 'y_')}
  pairs = {split for split in splits if {f'x_{split}', f'y_{split}'} <= {*present}}
  wanted = pairs or {'train', 'test'}
  if wanted & {'train', 'test'}:
    wanted |= {'train', 'test'}
  for split in sorted(wanted, reverse=True):  # report train first
    for key in (f'x_{split}', f'y_{split}'):
      if key not in present:
        raise ValueError(
          f'{key} is missing, the archive has {", ".join(sorted(present)) or "nothing"}'
        )
  return sorted(pairs, key=lambda split: (split != 'train', split))


def _checked_arrays(values: np.ndarray, where: str) -> np.ndarray:
  """Returns (N, H, W, channels) uint8 or finite float32; (N, D) as (N, 1, 1, D)."""
  if values.dtype == np.uint8 and values.ndim > 2:
    return values if values.ndim == 4 else values[..., None]
  shape = {2: (1, 1, values.shape[-1]), 3: (*values.shape[1:], 1)}
  with np.errstate(over='ignore'):  # reported below
    values = values.astype(np.float32)
  values = values.reshape(len(values), *shape.get(values.ndim, values.shape[1:]))
  if not np.isfinite(values).all():
    row = int(np.argmin(np.isfinite(values).all((1, 2, 3))))
    raise UserError(f'{where}: row {row} has values that are not finite in float32')
  return values


_CLASS_NAMES = ('class_names', 'classes')
_NPZ_ERRORS = (*_NPY_ERRORS, OSError, EOFError, zipfile.BadZipFile, zlib.error)
_NPZ_ERRORS += (RuntimeError,)  # unsupported or encrypted archives


def _npz_header(archive: zipfile.ZipFile, key: str) -> tuple[tuple[int, ...], np.dtype]:
  """Returns (shape, dtype) of a member; refuses one whose size is not as stated."""
  member = archive.getinfo(f'{key}.npy')
  if member.file_size > 2**24 and member.file_size > 100 * member.compress_size:
    raise ValueError(
      f'{key} unpacks to {member.file_size} bytes, over 100 times its size'
    )
  with archive.open(member) as file:
    version = np.lib.format.read_magic(file)
    read_header = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
      raise ValueError(f'{key} has array format {version}; known are 1.0 and 2.0')
    shape, _, dtype = read_header(file)
    size = file.tell() + math.prod(shape) * dtype.itemsize
  if size != member.file_size:
    raise ValueError(f'{key} should be {size} bytes but has {member.file_size}')
  return shape, dtype


def _check_members(
  splits: Sequence[str], headers: Mapping[str, tuple[tuple[int, ...], np.dtype]]
) -> None:
  """Raises a ValueError for the first member with a wrong shape or type.

  Args:
    splits: the splits that have x and y, 'train' first.
    headers: member -> (shape, type).
  """
  for split in splits:
    (x_shape, x_dtype), (y_shape, y_dtype) = (headers[f'{k}_{split}'] for k in 'xy')
    kinds = {2: 'iuf', 3: 'f', 4: 'f'}.get(len(x_shape), '')
    image = x_dtype == np.uint8 and len(x_shape) in (3, 4)
    if not (image or x_dtype.kind in kinds) or not math.prod(x_shape):
      raise ValueError(
        f'x_{split} must be uint8 or float images (N, H, W) or (N, H, W, channels), or '
        f'features (N, D), got {x_dtype} {x_shape}'
      )
    if len(x_shape) == 4 and y_shape[:1] == x_shape[3:] != x_shape[:1]:
      raise ValueError(
        f'x_{split} has the shape {x_shape}, images last: store '
        f'x_{split}.transpose(3, 0, 1, 2), which is (N, H, W, channels)'
      )
    if _channels_first(x_shape, image):
      raise ValueError(
        f'x_{split} has the shape {x_shape}, channels first: store '
        f'x_{split}.transpose(0, 2, 3, 1), which is (N, H, W, channels)'
      )
    if len(y_shape) > 2 and y_dtype.kind in 'iu':
      _check_maps(split, x_shape, y_shape)
    elif y_dtype.kind not in 'iu' or y_shape != x_shape[:1]:
      remedy = ''
      if len(y_shape) == 2 and y_shape[0] == x_shape[0]:
        remedy = f'; if they are one-hot, store y_{split}.argmax(1)'
        if y_shape[1] == 1:
          remedy = f'; store y_{split}.ravel()'
      raise ValueError(
        f'y_{split} must be whole numbers ({x_shape[0]},), got {y_dtype} '
        f'{y_shape}{remedy}'
      )
  of_pixels = {len(headers[f'y_{split}'][0]) > 1 for split in splits}
  if len(of_pixels) > 1:
    raise ValueError('some splits have label maps and others one label per image')
  first, *others = (f'x_{split}' for split in splits)
  for other in others:
    one, two = headers[first], headers[other]
    if one[0][1:] != two[0][1:]:
      raise ValueError(
        f'{first} has images of shape {one[0][1:]}, {other} of {two[0][1:]}'
      )
    if (one[1] == np.uint8) != (two[1] == np.uint8):
      raise ValueError(f'{first} is {one[1]}, {other} {two[1]}')
  for key in _CLASS_NAMES:
    shape, dtype = headers.get(key, ((1,), np.dtype('U')))
    if dtype.kind != 'U' or len(shape) != 1 or not shape[0]:
      raise ValueError(f'{key} must be strings (C,), got {dtype} {shape}')


def _channels_first(shape: tuple[int, ...], image: bool) -> bool:
  """Returns whether an array seems to be images (N, channels, H, W).

  Args:
    shape: shape of the array.
    image: whether it is uint8; other arrays only count if they are square.
  """
  if len(shape) != 4 or shape[3] <= 4:
    return False
  few = shape[1] in _PIL_MODES or shape[1] < min(shape[2:]) / 2
  return few and (image or shape[2] == shape[3] or shape[1] in (1, 3))


def _rotated(argument: str, data_dir: str | None) -> dict[str, Source]:
  """Loads another source in memory with its images rotated: '30:npz:mnist.npz'."""
  degrees, _, spec = argument.partition(':')
  if not re.fullmatch(r'-?\d{1,3}', degrees) or not spec:
    raise UserError(
      f"source 'rotated:{argument}' must be degrees and a source, such as "
      "'rotated:30:npz:mnist.npz'"
    )
  sources = load_source(spec, data_dir)
  return {name: turned(one, int(degrees), spec) for name, one in sources.items()}


def _check_maps(split: str, x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> None:
  """Raises a ValueError for label maps whose size differs from their images'."""
  if len(y_shape) == 4 and y_shape[-1] in (3, 4):
    raise ValueError(
      f'y_{split} has the shape {y_shape}, colours: store the ids of classes with '
      f'shape {x_shape[:3]}'
    )
  if y_shape != x_shape[:3]:
    raise ValueError(
      f'y_{split} has the shape {y_shape}, but label maps must be as large as the '
      f'images: {x_shape[:3]}'
    )


def _list(folder: str, data_dir: str | None) -> dict[str, Source]:
  """Opens lists of images with labels, or with label maps."""
  lists = find_lists(folder)
  if not names_pairs(lists['train']):
    return list_source(folder, data_dir)
  return paired_lists(lists, data_dir or folder, listed_class_names(folder))


def _tfds(name: str, data_dir: str | None) -> dict[str, Source]:
  """Opens a prepared TFDS data set, without TensorFlow."""
  import tensorflow_datasets as tfds

  builder = tfds_builder(name, data_dir=data_dir)
  if not builder.is_prepared():
    _check_metadata(name, data_dir)
    where = f' --data_dir={data_dir}' if data_dir else ''
    raise UserError(
      f'tfds:{name} is not in {builder.data_path}; run: python -m lt_jax.prepare '
      f'{name}{where}'
    )
  features = dict(builder.info.features)
  if 'segmentation_label' in features:
    return _tfds_maps(builder)
  image, label, kind = features.get('image'), features.get('label'), Records
  if label is None:  # images with several have a sequence of them
    label, kind = getattr(features.get('labels'), 'feature', None), RecordsOfSeveral
  if not (
    isinstance(image, tfds.features.Image)
    and image.np_dtype == np.uint8
    and image.shape[-1] in _PIL_MODES
    and isinstance(label, tfds.features.ClassLabel)
  ):
    raise UserError(
      f"tfds:{name} needs the features 'image' (uint8) and 'label' (a class) or "
      f"'labels' (several), but has {', '.join(sorted(features))}"
    )
  raw = tfds.decode.DeserializeMethod.RAW_BYTES
  try:
    splits = builder.as_data_source(deserialize_method=raw)
  except NotImplementedError:
    raise UserError(
      f'tfds:{name} is in {builder.data_path} as {builder.info.file_format.value}, '
      'which has no random access; prepare it as array_record in another folder'
    ) from None
  sources = {
    _SPLIT_NAMES.get(str(split), str(split)): kind(
      name=f'tfds:{builder.info.full_name}/{split}',
      size=builder.info.splits[split].num_bytes,
      records=data.data_source,
      class_names=tuple(label.names),
      image_shape=image.shape,
      labels_file=builder.data_path / LABELS_FILE.format(split),
    )
    for split, data in splits.items()
  }
  is_numbered = list(label.names) == [str(c) for c in range(label.num_classes)]
  if is_numbered and isinstance(features.get('label_name'), tfds.features.Text):
    names = _label_names(sources, label.names)
    sources = {
      split: dataclasses.replace(source, class_names=names)
      for split, source in sources.items()
    }
  return {split: _in_memory_if_small(source) for split, source in sources.items()}


def _label_names(
  sources: Mapping[str, Records], numbers: Sequence[str]
) -> tuple[str, ...]:
  """Returns the names of classes that the set itself only numbers, as Caltech's birds.

  Each is read from a record of the class; one without records keeps its number.
  """
  names = list(numbers)
  for source in reversed(sources.values()):
    classes, rows = np.unique(source.labels, return_index=True)
    for label, row in zip(classes.tolist(), rows.tolist(), strict=True):
      if label >= 0:
        names[label] = source.label_name(row)
  return tuple(names)


def _tfds_maps(builder: Any) -> dict[str, Source]:
  """Opens a prepared TFDS data set of label maps; only Cityscapes is supported.

  Its maps have the ids of the label files, not the train ids.
  """
  import tensorflow_datasets as tfds
  from tensorflow_datasets.proto import tf_example_pb2

  if builder.info.name != 'cityscapes':
    raise UserError(
      f'tfds:{builder.info.name}: the only TFDS set with label maps is cityscapes'
    )
  raw = tfds.decode.DeserializeMethod.RAW_BYTES
  ids = ids_of(tuple(CITYSCAPES_IDS), CITYSCAPES_IDS, 34)
  sources = {}
  for split, data in builder.as_data_source(deserialize_method=raw).items():
    records = data.data_source

    def features(position: int, records: Any = records) -> Mapping[str, Any]:
      example = tf_example_pb2.Example.FromString(records[position])
      return example.features.feature

    if str(split) != 'test':  # its maps are blank
      sources[_SPLIT_NAMES.get(str(split), str(split))] = LabelledRecords(
        name=f'tfds:{builder.info.full_name}/{split}',
        size=builder.info.splits[split].num_bytes,
        folder=str(builder.data_path),
        features=features,
        keys=('image_left', 'segmentation_label'),
        count=len(records),
        ids=ids,
      )
  return sources


def tfds_builder(name: str, **options: Any) -> Any:
  """Returns `tfds.builder(name, **options)`.

  Raises:
    UserError: the data set does not exist, or is incomplete.
  """
  import tensorflow_datasets as tfds
  from google.protobuf.json_format import ParseError

  unread = (ParseError, tfds.core.dataset_info.DatasetInfoFileError)
  try:
    try:
      return tfds.builder(name, **options)
    except (ValueError, *unread):
      _check_metadata(name, options.get('data_dir'))
      raise
  except tfds.core.DatasetNotFoundError:
    known = tfds.list_builders(with_community_datasets=False)
    near = suggest(name, known).partition('; known')[0]  # there are hundreds
    raise UserError(f'unknown TFDS data set {name!r}{near}') from None
  except (ValueError, AssertionError, ImportError, *unread) as error:  # of a bucket too
    raise UserError(f'tfds:{name}: {str(error).splitlines()[0]}') from None


def _check_metadata(name: str, data_dir: str | None) -> None:
  """Raises a `UserError` for an incomplete data set.

  If one of its own files is missing or not JSON, or if its preparation did not finish,
  TFDS only says that the data set does not exist or that something cannot be parsed.
  """
  import tensorflow_datasets as tfds

  data_dir = epath.Path(data_dir or tfds.core.constants.DATA_DIR)
  folder = data_dir / name.partition(':')[0]
  files = ('dataset_info.json', 'features.json')
  found = {path.parent for file in files for path in folder.glob(f'*[0-9]/{file}')}
  for home in sorted(found):
    for file in files:
      read_json(home / file)
  for left in folder.glob(f'*{UNFINISHED}'):
    raise UserError(f'{left} is not finished; run python -m lt_jax.prepare again')


def _in_memory_if_small(source: Records) -> Source:
  """Reads a source into memory if its images have one size and fit `MEMORY_LIMIT`.

  A source with several classes per image stays on disk.
  """
  shape = (len(source), *source.image_shape)
  several = isinstance(source, RecordsOfSeveral)
  if several or None in shape or math.prod(shape) > MEMORY_LIMIT:
    return source
  images, labels = np.empty(shape, np.uint8), np.empty(len(source), np.int64)
  for i in range(len(source)):
    encoded, labels[i] = source.example(i)
    images[i] = source.decode(i, encoded)
  classes = len(source.class_names)
  labels = _checked_labels(labels, len(source), classes, source.name)
  return Arrays(images, labels, source.class_names)


_SPLIT_NAMES = {'validation': 'val'}  # names in TFDS that differ from ours

SOURCES = {
  'digits': _digits,
  'digits_domains': rendered_digits,
  'digits_tasks': digit_task,
  'mazes': maze_images,
  'npz': _npz,
  'rotated': _rotated,
  'tfds': _tfds,
  'scenes': scenes,
  'list': _list,
  'folder': folder_source,
  'xlsa': xlsa,
  **{name: functools.partial(layout_source, one) for name, one in LAYOUTS.items()},
  'fake': _fake,
}
