"""Images that lie in files: lists of their paths, and folders of classes.

Everything that can be wrong with names and labels is found when a source is opened,
before an image is read.
"""

import dataclasses
import functools
import os
import pathlib
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lt_jax.data import crops
from lt_jax.errors import UserError

SPLITS = ('train', 'val', 'test', 'open')
SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp')


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
  """A source of image files.

  Attributes:
    root: the folder that `files` are relative to.
    paths: their names in the list, which stand for the images in a fingerprint.
    files: where they lie.
    labels: (N,) int32, -1 for images of no known class.
    class_names: names of classes 0 ... C - 1.
    image_shape: height and width are those of each file.
  """

  root: str
  paths: Sequence[str]
  files: Sequence[str]
  labels: np.ndarray
  class_names: tuple[str, ...]
  image_shape: tuple[None, None, int] = (None, None, 3)

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, position: int) -> np.ndarray:
    return crops.pixels(self.encoded(position), self.where(position))

  def encoded(self, position: int) -> bytes:
    """Returns an image as it is stored."""
    try:
      return pathlib.Path(self.where(position)).read_bytes()
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
      # Others pass, such as those of a network file system: running again may help.
      raise UserError(f'{self.where(position)}: {error.strerror}') from None

  def example(self, position: int) -> tuple[bytes, int]:
    """Returns (file, label) as they are stored."""
    return self.encoded(position), int(self.labels[position])

  def where(self, position: int) -> str:
    """Returns the path of an image."""
    return os.path.join(self.root, self.files[position])

  def identity(self, rows: np.ndarray) -> bytes:
    """Returns what a fingerprint takes for the images at `rows`: their paths."""
    return '\0'.join(self.paths[row] for row in rows).encode(errors='surrogateescape')


class ImageList(NamedTuple):
  """A list of images, that of line i + 1 at index i.

  Attributes:
    file: where it was read.
    paths: relative to a root that the list does not know.
    labels: (N,) int32.
  """

  file: str
  paths: Sequence[str]
  labels: np.ndarray

  def place(self, index: int) -> str:
    """Returns FILE:LINE of an image."""
    return f'{self.file}:{index + 1}'


def list_source(folder: str, data_dir: str | None) -> dict[str, Files]:
  """Opens the images named by list files, as long-tailed benchmarks publish them.

  A line is a path, blanks and a label. The classes are 0 to the largest label of the
  training list; their names are the lines of classes.txt, if the folder has one. An
  image may be listed once, in one list. Where files are not under their own names, the
  names of `DIALECTS` are tried, then a folder called like the list.

  Args:
    folder: has train.txt and perhaps val.txt, test.txt and open.txt, or files whose
      names end in _train.txt and so on. In an open list all labels are -1.
    data_dir: the folder that paths are relative to; empty: the folder of the lists.

  Returns:
    split -> source.

  Raises:
    UserError: naming file and line, or the images that are missing.
  """
  lists = {
    split: read_list(file, is_open=split == 'open')
    for split, file in _find_lists(folder).items()
  }
  class_names = _class_names(folder, lists['train'])
  for one in lists.values():
    beyond = np.flatnonzero(one.labels >= len(class_names))
    if beyond.size:
      raise UserError(
        f'{one.place(beyond[0])}: label {one.labels[beyond[0]]}, but '
        f'{lists["train"].file} has labels up to {len(class_names) - 1}'
      )
  root = data_dir or folder
  files = locate(lists, root)
  check_listed_once(lists[split]._replace(paths=files[split]) for split in lists)
  return {
    split: Files(root, one.paths, files[split], one.labels, class_names)
    for split, one in lists.items()
  }


def _find_lists(folder: str) -> dict[str, str]:
  """Returns split -> list file, in the order of `SPLITS`."""
  try:
    names = sorted(name for name in os.listdir(folder) if not name.startswith('.'))
  except OSError as error:
    raise UserError(f'list:{folder}: {error.strerror}') from None
  found = {}
  for split in SPLITS:
    fitting = [name for name in names if f'_{name}'.endswith(f'_{split}.txt')]
    if len(fitting) > 1:
      raise UserError(
        f'list:{folder} has several {split} lists: {", ".join(fitting)}; leave one'
      )
    if fitting:
      found[split] = os.path.join(folder, fitting[0])
  if 'train' not in found:
    raise UserError(f'list:{folder} has neither train.txt nor a file *_train.txt')
  return found


def read_list(file: str, *, is_open: bool = False) -> ImageList:
  """Reads a list of images; the images need not exist.

  Args:
    file: lines of a relative path, blanks or tabs, and a label. The path may have
      blanks in it, and is UTF-8.
    is_open: all labels are -1; otherwise none is negative.

  Raises:
    UserError: a line that is not so, naming FILE:LINE.
  """
  lines = _read_lines(file)
  paths, labels = [], np.empty(len(lines), np.int32)
  one = ImageList(file, paths, labels)
  for i, line in enumerate(lines):
    match = _LINE.fullmatch(line)
    if not match:
      raise UserError(
        f'{one.place(i)}: must be a path, a blank and a whole number, is {line[:200]!r}'
      )
    path, labels[i] = posixpath.normpath(match[1]), int(match[2])
    if path.startswith('/') or path.split('/')[0] in ('.', '..') or '\0' in path:
      raise UserError(f'{one.place(i)}: {path!r} is not the relative path of a file')
    paths.append(path)
    if is_open != (labels[i] == -1) or labels[i] < -1:
      rule = 'in an open list all are -1' if is_open else 'it must not be negative'
      raise UserError(f'{one.place(i)}: label {labels[i]}: {rule}')
  return one


_LINE = re.compile(r'(.*[^ \t])[ \t]+(-?[0-9]{1,9})')


def _read_lines(file: str) -> list[str]:
  """Returns the lines of a text file, none of them empty."""
  try:
    encoded = pathlib.Path(file).read_bytes()
    text = encoded.decode('utf-8-sig')
  except OSError as error:
    raise UserError(f'{file}: {error.strerror}') from None
  except UnicodeDecodeError as error:
    line = encoded.count(b'\n', 0, error.start) + 1
    raise UserError(f'{file}:{line}: not UTF-8') from None
  # Not splitlines: it would cut a path at characters that are no ends of lines.
  lines = [line.rstrip(' \t\r') for line in text.rstrip().split('\n')]
  if '' in lines:
    raise UserError(f'{file}:{lines.index("") + 1}: an empty line')
  return lines


def _class_names(folder: str, train: ImageList) -> tuple[str, ...]:
  """Returns the lines of classes.txt, or else the numbers of the classes."""
  largest = int(train.labels.max())
  if largest >= len(train.labels):
    raise UserError(
      f'{train.place(train.labels.argmax())}: label {largest}, but there are only '
      f'{len(train.labels)} images'
    )
  file = os.path.join(folder, 'classes.txt')
  if not os.path.exists(file):
    return tuple(str(label) for label in range(largest + 1))
  names = tuple(_read_lines(file))
  if len(names) != largest + 1:
    raise UserError(
      f'{file} names {len(names)} classes, but the largest label of {train.file} is '
      f'{largest}; labels start at 0'
    )
  return names


def locate(lists: Mapping[str, ImageList], root: str) -> dict[str, Sequence[str]]:
  """Finds the files of all lists; reads folders, so that no file costs a call.

  Args:
    lists: split -> list, 'train' among them.
    root: the folder that paths are relative to.

  Returns:
    split -> a path relative to `root` for each image: its own, or that of a dialect.

  Raises:
    UserError: with the number of missing files and the first of them.
  """
  if not os.path.isdir(root):
    raise UserError(f'the folder of images {root} does not exist')
  train = lists['train']
  examples = dict(zip(train.labels.tolist(), train.paths, strict=True))
  names = functools.cache(functools.partial(_file_names, root))

  def absent(paths: Sequence[str]) -> list[str]:
    parts = ((path, *posixpath.split(path)) for path in paths)
    return [path for path, folder, name in parts if name not in names(folder)]

  found, missing = {}, []
  for split, one in lists.items():
    # The first spelling without a gap, or else the one with the fewest.
    gaps = None
    for paths in _spellings(one, examples):
      now = absent(paths)
      if gaps is None or len(now) < len(gaps):
        found[split], gaps = paths, now
      if not gaps:
        break
    missing += gaps
  if missing:
    more = f' and {len(missing) - 20} more' if len(missing) > 20 else ''
    first = ', '.join(missing[:20])
    raise UserError(f'{root} lacks {len(missing)} of the listed images: {first}{more}')
  return found


def _file_names(root: str, folder: str) -> set[str]:
  """Returns the names of the files in a folder; none where there is no folder."""
  path = os.path.join(root, folder)
  try:
    with os.scandir(path) as entries:
      return {entry.name for entry in entries if entry.is_file()}
  except (FileNotFoundError, NotADirectoryError):
    return set()
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from None


def _spellings(one: ImageList, examples: Mapping[int, str]) -> Iterator[Sequence[str]]:
  """Yields the paths of a list as they are, in every dialect, and in its own folder."""
  yield one.paths
  for spell in DIALECTS.values():
    yield [
      spell(path, examples.get(label, ''))
      for path, label in zip(one.paths, one.labels.tolist(), strict=True)
    ]
  folder = pathlib.PurePath(one.file).stem
  yield [f'{folder}/{path}' for path in one.paths]


def _places365_standard(path: str, example: str) -> str:
  """Returns train/a-b/1 for data_256/a/a/b/1, and val/a-b/2 for val_256/2."""
  if match := re.fullmatch(r'data_256/[a-z]/(.+)/([^/]+)', path):
    return f'train/{match[1].replace("/", "-")}/{match[2]}'
  match = re.fullmatch(r'val_256/([^/]+)', path)
  standard = _places365_standard(example, '') if match else ''
  # The class is not in the path, but a training image of it tells its folder.
  if inner := re.fullmatch(r'train/([^/]+)/[^/]+', standard):
    return f'val/{inner[1]}/{match[1]}'
  return path


def _places365_256(path: str, example: str) -> str:
  """Returns data_256/a/a/b/1 for train/a-b/1, and val_256/2 for val/a-b/2."""
  if match := re.fullmatch(r'train/([^/]+)/([^/]+)', path):
    return f'data_256/{match[1][0]}/{match[1].replace("-", "/")}/{match[2]}'
  if match := re.fullmatch(r'val/[^/]+/([^/]+)', path):
    return f'val_256/{match[1]}'
  return path


Dialect = Callable[[str, str], str]
"""(path, path of a training image of the same class or '') -> path in the dialect."""

# Places365 comes as two archives with other folders, and lists exist for both.
DIALECTS: dict[str, Dialect] = {
  'places365_standard': _places365_standard,
  'places365_256': _places365_256,
}


def check_listed_once(lists: Iterable[ImageList]) -> None:
  """Raises a `UserError` if a path is listed twice, with any labels, in any lists."""
  seen: dict[str, tuple[ImageList, int]] = {}
  for one in lists:
    for i, path in enumerate(one.paths):
      if path in seen:
        first, j = seen[path]
        raise UserError(
          f'{path} is listed twice: {first.place(j)} with label {first.labels[j]}, '
          f'{one.place(i)} with label {one.labels[i]}'
        )
      seen[path] = (one, i)


def folder_source(folder: str, data_dir: str | None) -> dict[str, Files]:
  """Opens folders of images, one a class.

  Args:
    folder: has train/CLASS/.../*.jpg and perhaps val and test like it, and open with
      images anywhere; or else CLASS/.../*.jpg, which are the split 'train'. Classes are
      the sorted folder names of train. Files with other endings than `SUFFIXES`, and
      hidden ones, are passed over.
    data_dir: not used.

  Returns:
    split -> source.

  Raises:
    UserError: naming a class without images, or one that train does not have.
  """
  present = _subfolders(folder)
  splits = {split: split for split in SPLITS if split in present} or {'train': ''}
  if 'train' not in splits:
    raise UserError(f'folder:{folder} has {", ".join(splits)} but no train')
  class_names = _subfolders(os.path.join(folder, splits['train']))
  if not class_names:
    raise UserError(
      f'folder:{folder} must have CLASS/*.jpg or train/CLASS/*.jpg, but '
      f'{os.path.join(folder, splits["train"])} has no folders'
    )
  known = {name: label for label, name in enumerate(class_names)}
  sources = {}
  for split, below in splits.items():
    paths, labels = [], []
    for path, label in _class_folders(folder, split, below, known):
      images = _images(folder, path)
      paths += images
      labels += [label] * len(images)
    if not paths:
      raise UserError(f'{os.path.join(folder, below)} has no folders of classes')
    y = np.array(labels, np.int32)
    sources[split] = Files(folder, paths, paths, y, class_names)
  return sources


def _class_folders(
  root: str, split: str, below: str, known: Mapping[str, int]
) -> Iterator[tuple[str, int]]:
  """Yields the folders of a split, relative to `root`, with their labels."""
  if split == 'open':
    _check_open_apart(root, below, known)
    yield below, -1
    return
  for name in _subfolders(os.path.join(root, below)):
    path = posixpath.join(below, name)
    if name not in known:
      raise UserError(f'{os.path.join(root, path)}: train has no class {name!r}')
    yield path, known[name]


def _check_open_apart(root: str, below: str, known: Mapping[str, int]) -> None:
  """Raises a `UserError` if images of a known class lie among the open ones."""
  for name in _subfolders(os.path.join(root, below)):
    if name in known:
      path = os.path.join(root, below, name)
      raise UserError(f'{path}: {name!r} is a class of train, so it is not open')


def _subfolders(folder: str) -> tuple[str, ...]:
  """Returns the sorted names of the folders in a folder, hidden ones left out."""
  try:
    with os.scandir(folder) as entries:
      names = [entry.name for entry in entries if entry.is_dir()]
  except OSError as error:
    raise UserError(f'folder:{folder}: {error.strerror}') from None
  return tuple(sorted(name for name in names if not name.startswith('.')))


def _images(root: str, folder: str) -> list[str]:
  """Returns the sorted paths, relative to `root`, of the images beneath a folder."""
  paths = []
  for base, folders, files in os.walk(os.path.join(root, folder)):
    folders[:] = [name for name in folders if not name.startswith('.')]
    below = os.path.relpath(base, root).replace(os.sep, '/')
    paths += [
      f'{below}/{name}'
      for name in files
      if name.lower().endswith(SUFFIXES) and not name.startswith('.')
    ]
  if not paths:
    raise UserError(
      f'{os.path.join(root, folder)} has no images ({" ".join(SUFFIXES)})'
    )
  return sorted(paths)
