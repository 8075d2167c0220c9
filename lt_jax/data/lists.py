"""Images in files: lists of their paths, and folders of classes.

Opening a source finds every mistake in names and labels, before any image is read.
"""

import dataclasses
import errno
import functools
import os
import pathlib
import posixpath
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lt_jax.data import crops, roles
from lt_jax.errors import UserError, suggest

SPLITS = ('train', 'val', 'test', 'open')
SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp')

MOST_BYTES = 2**29
"""A larger file is treated as a mistake: 200 megapixels need a third of that."""

NAMED = 3
"""How many of the unused files to name."""

# Errors that a rerun does not fix. Others are temporary, such as those of a network
# file system.
_LASTING = (
  errno.ENOENT,
  errno.ENOTDIR,
  errno.EISDIR,
  errno.EACCES,
  errno.EPERM,
  errno.ELOOP,
  errno.ENAMETOOLONG,
)


def check_file(path: str) -> None:
  """Refuses a file that is not regular or far too large.

  Reading from a pipe could block, and a device could be endless.

  Raises:
    UserError: it is missing, not regular, or larger than `MOST_BYTES`.
    OSError: it is temporarily unavailable.
  """
  try:
    found = os.stat(path)
  except OSError as error:
    raise _lasting(error, path) from None
  if not stat.S_ISREG(found.st_mode):
    raise UserError(f'{path}: not a regular file')
  if found.st_size > MOST_BYTES:
    raise UserError(
      f'{path}: {found.st_size:,} bytes, above the limit of {MOST_BYTES:,} for an image'
    )


def read_file(path: str) -> bytes:
  """Returns the bytes of an image file; raises the same errors as `check_file`."""
  check_file(path)
  try:
    return pathlib.Path(path).read_bytes()
  except OSError as error:
    raise _lasting(error, path) from None


def _lasting(error: OSError, path: str) -> Exception:
  """Returns a `UserError` if a rerun does not help, else the error itself."""
  if error.errno in _LASTING:
    return UserError(f'{path}: {error.strerror}')
  return error


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
  """A source of image files.

  Attributes:
    root: the folder that `files` are relative to.
    paths: their names in the list, which a fingerprint uses in place of the images.
    files: their actual paths.
    labels: (N,) int32, -1 for images of no known class.
    class_names: names of classes 0 ... C - 1.
    passed_over: lines about files and folders that are not used.
    image_shape: height and width differ between files.
    attributes: name -> (N,) int32, see `roles.attributes`.
  """

  root: str
  paths: Sequence[str]
  files: Sequence[str]
  labels: np.ndarray
  class_names: tuple[str, ...]
  passed_over: tuple[str, ...] = ()
  image_shape: tuple[None, None, int] = (None, None, 3)
  attributes: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, position: int) -> np.ndarray:
    return crops.pixels(self.encoded(position), self.where(position))

  def encoded(self, position: int) -> bytes:
    """Returns an image as stored; raises the same errors as `check_file`."""
    return read_file(self.where(position))

  def example(self, position: int) -> tuple[bytes, int]:
    """Returns (file, label) as stored."""
    return self.encoded(position), int(self.labels[position])

  def where(self, position: int) -> str:
    """Returns the path of an image."""
    return os.path.join(self.root, self.files[position])

  def identity(self, rows: np.ndarray) -> bytes:
    """Returns what a fingerprint uses for the images at `rows`: paths, attributes."""
    paths = '\0'.join(self.paths[row] for row in rows)
    told = (values[rows].astype('<i4').tobytes() for values in self.attributes.values())
    return paths.encode(errors='surrogateescape') + b''.join(told)


class ImageList(NamedTuple):
  """A list of images, with line i + 1 at index i.

  Attributes:
    file: the file it was read from.
    paths: paths relative to a root, which is not part of the list.
    labels: (N,) int32.
  """

  file: str
  paths: Sequence[str]
  labels: np.ndarray

  def place(self, index: int) -> str:
    """Returns FILE:LINE of an image."""
    return f'{self.file}:{index + 1}'


def list_source(folder: str, data_dir: str | None) -> dict[str, Files]:
  """Opens the images named in list files, as long-tailed benchmarks publish them.

  A line has a path, blanks and a label. The classes are 0 to the largest label of the
  training list; their names are the lines of classes.txt, if the folder has one. An
  image must be listed only once over all lists. If files are not found under their own
  names, we try the names of `DIALECTS`, then a folder named like the list.

  The images of gallery.txt, probe.txt and distractors.txt are test images too, which
  the task `identification` compares. Labels of the first two can exceed those of the
  classes; such identities are zero-shot. Distractors have label -1.

  Args:
    folder: has train.txt and optionally val.txt, test.txt and open.txt, or files whose
      names end in _train.txt and so on. In an open list all labels are -1.
    data_dir: the folder that paths are relative to; empty: the folder of the lists.

  Returns:
    split -> source.

  Raises:
    UserError: it names the file and line, or the missing images.
  """
  lists = {
    split: read_list(file, is_open=split in ('open', 'distractors'))
    for split, file in find_lists(folder).items()
  }
  class_names = _class_names(folder, lists['train'])
  for split, one in lists.items():
    beyond = np.flatnonzero(one.labels >= len(class_names))
    if beyond.size and split not in roles.ROLES:
      raise UserError(
        f'{one.place(beyond[0])}: label {one.labels[beyond[0]]}, but '
        f'{lists["train"].file} has labels up to {len(class_names) - 1}'
      )
  _check_roles(lists)
  root = data_dir or folder
  files = locate(lists, root)
  check_listed_once(lists[split]._replace(paths=files[split]) for split in lists)
  return _with_roles(
    {
      split: Files(root, one.paths, files[split], one.labels, class_names)
      for split, one in lists.items()
    }
  )


def _check_roles(lists: Mapping[str, ImageList]) -> None:
  """Refuses probes without an image in the gallery, and lists that do not combine."""
  there = [name for name in roles.ROLES if name in lists]
  if not there:
    return
  for name in ('gallery', 'probe'):
    if name not in lists:
      raise UserError(
        f'{lists[there[0]].file}: {name}.txt is missing next to it; identification '
        'needs a gallery and probes'
      )
  if 'open' in lists:
    raise UserError(
      f'{lists["open"].file}: with a gallery, images of no known class are '
      'distractors: rename it to distractors.txt'
    )
  probe, gallery = lists['probe'], lists['gallery']
  alone = np.flatnonzero(~np.isin(probe.labels, gallery.labels))
  if alone.size:
    raise UserError(
      f'{probe.place(alone[0])}: identity {probe.labels[alone[0]]} has no image in '
      f'{gallery.file}'
    )


def _with_roles(sources: Mapping[str, Files]) -> dict[str, Files]:
  """Returns sources with gallery, probes and distractors among the test images.

  Distractors share one more identity above all others, since labels from C on are
  unknown.
  """
  if 'probe' not in sources:
    return dict(sources)
  parts = {name: sources[name] for name in ('test', *roles.ROLES) if name in sources}
  nobody = max(int(one.labels.max()) for one in sources.values()) + 1
  identities = {
    name: np.where(one.labels < 0, np.int32(nobody), one.labels)
    for name, one in parts.items()
  }
  attributes = roles.attributes(identities)
  test = dataclasses.replace(
    parts['probe'],
    paths=[path for one in parts.values() for path in one.paths],
    files=[file for one in parts.values() for file in one.files],
    labels=attributes['identity'],
    attributes=attributes,
  )
  others = {name: one for name, one in sources.items() if name not in roles.ROLES}
  return others | {'test': test}


def find_lists(folder: str) -> dict[str, str]:
  """Returns split or role -> list file, in the order of `SPLITS` and `ROLES`."""
  try:
    names = sorted(name for name in os.listdir(folder) if not name.startswith('.'))
  except OSError as error:
    raise UserError(f'list:{folder}: {error.strerror}') from None
  found = {}
  for name in names:
    stem = name[:-4] if name.casefold().endswith('.txt') else ''
    split = near_split(re.split('[-_. ]', stem)[-1])
    if split and not f'_{name}'.endswith(f'_{split}.txt'):
      raise UserError(
        f'list:{folder}: {name} looks like the list of the split {split!r}: rename it '
        f'to {split}.txt or *_{split}.txt, or move it away'
      )
  for split in (*SPLITS, *roles.ROLES):
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


def near_split(name: str) -> str | None:
  """Returns the split meant by a name like 'Training', 'valid' or 'test2017'."""
  words = re.findall('[a-z]+', name.casefold())
  meant = ''.join(word for word in words if word not in _FILLERS)
  return next((split for split, names in _MEANT.items() if meant in names), None)


def _pairs_of_splits(folder: str, names: Sequence[str]) -> list[str]:
  """Returns folders with the same classes and names such as X_train and X_test.

  The name alone is not enough: a class can be called 'train' or 'test_tube'.
  """
  named = [name for name in names if re.search('train|val|test', name.casefold())]
  inside = {name: _content(os.path.join(folder, name))[0] for name in named}
  held = [frozenset(classes) for classes in inside.values() if classes]
  return [n for n, classes in inside.items() if held.count(frozenset(classes)) > 1]


_FILLERS = ('set', 'split', 'data', 'images', 'image', 'imgs', 'img')
_MEANT = {
  'train': ('train', 'training', 'trainset', 'trn'),
  'val': (
    'val',
    'valid',
    'validation',
    'validate',
    'valset',
    'dev',
    'devel',
    'eval',
    'evaluation',
  ),
  'test': ('test', 'testing', 'testset', 'tests', 'tst'),
  'open': ('open', 'openset'),
}


def read_list(file: str, *, is_open: bool = False) -> ImageList:
  """Reads a list of images; the images need not exist.

  Args:
    file: lines of a relative path, blanks or tabs, and a label. The path can contain
      blanks and is UTF-8.
    is_open: whether all labels are -1; otherwise none is negative.

  Raises:
    UserError: a malformed line; it names FILE:LINE.
  """
  lines = read_lines(file)
  paths, labels = [], np.empty(len(lines), np.int32)
  one = ImageList(file, paths, labels)
  for i, line in enumerate(lines):
    match = _LINE.fullmatch(line)
    if not match:
      raise UserError(
        f'{one.place(i)}: expected a path, a blank and an integer, got {line[:200]!r}'
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


def read_lines(file: str) -> list[str]:
  """Returns the lines of a text file; refuses empty ones."""
  try:
    encoded = pathlib.Path(file).read_bytes()
    text = encoded.decode('utf-8-sig')
  except OSError as error:
    raise UserError(f'{file}: {error.strerror}') from None
  except UnicodeDecodeError as error:
    line = encoded.count(b'\n', 0, error.start) + 1
    raise UserError(f'{file}:{line}: not UTF-8') from None
  # Not splitlines, which also splits at characters that can be part of a path.
  lines = [line.rstrip(' \t\r') for line in text.rstrip().split('\n')]
  if '' in lines:
    raise UserError(f'{file}:{lines.index("") + 1}: an empty line')
  return lines


def names_pairs(file: str) -> bool:
  """Returns whether a list has two paths per line: an image and its label map."""
  first = read_lines(file)[0]
  parts = (first.split('\t') if '\t' in first else first.split(' '))[-2:]
  return (
    len(parts) == 2
    and is_image_name(parts[0])
    and (is_image_name(parts[1]) or parts[1] == '-')
  )


def listed_class_names(folder: str) -> tuple[str, ...]:
  """Returns the lines of classes.txt, which lists of label maps require."""
  file = os.path.join(folder, 'classes.txt')
  if not os.path.exists(file):
    raise UserError(
      f'{file} is missing: lists of label maps need the names of the classes, one per '
      'line, in the order of their ids'
    )
  return tuple(read_lines(file))


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
    if train.labels.min() == 1:
      raise UserError(f'{train.file}: labels must start at 0; these start at 1')
    return tuple(str(label) for label in range(largest + 1))
  names = tuple(read_lines(file))
  if len(names) != largest + 1:
    raise UserError(
      f'{file} names {len(names)} classes, but the largest label of {train.file} is '
      f'{largest}; labels start at 0'
    )
  return names


def locate(lists: Mapping[str, ImageList], root: str) -> dict[str, Sequence[str]]:
  """Finds the files of all lists; reads whole folders rather than check each file.

  Args:
    lists: split -> list, including 'train'.
    root: the folder that paths are relative to.

  Returns:
    split -> a path relative to `root` for each image: its own, or that of a dialect.

  Raises:
    UserError: it says how many files are missing and names the first ones.
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
    # Use the first spelling with no missing files, or else the one with the fewest.
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
  """Returns the names of the files in a folder; none if it does not exist."""
  path = os.path.join(root, folder)
  try:
    with os.scandir(path) as entries:
      return {entry.name for entry in entries if _is_file(entry)}
  except (FileNotFoundError, NotADirectoryError):
    return set()
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from None


def _spellings(one: ImageList, examples: Mapping[int, str]) -> Iterator[Sequence[str]]:
  """Yields the paths of a list as they are, and in other possible spellings."""
  yield one.paths
  for spell in DIALECTS.values():
    yield [
      spell(path, examples.get(label, ''))
      for path, label in zip(one.paths, one.labels.tolist(), strict=True)
    ]
  folder = pathlib.PurePath(one.file).stem
  yield [f'{folder}/{path}' for path in one.paths]
  for form in ('NFC', 'NFD'):  # some file systems and archives compose letters
    yield [unicodedata.normalize(form, path) for path in one.paths]


def _places365_standard(path: str, example: str) -> str:
  """Returns train/a-b/1 for data_256/a/a/b/1, and val/a-b/2 for val_256/2."""
  if match := re.fullmatch(r'data_256/[a-z]/(.+)/([^/]+)', path):
    return f'train/{match[1].replace("/", "-")}/{match[2]}'
  match = re.fullmatch(r'val_256/([^/]+)', path)
  standard = _places365_standard(example, '') if match else ''
  # The class is not in the path, but a training image of it has its folder.
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

# Places365 comes as two archives with different folders, and lists exist for both.
DIALECTS: dict[str, Dialect] = {
  'places365_standard': _places365_standard,
  'places365_256': _places365_256,
}


def check_listed_once(lists: Iterable[ImageList]) -> None:
  """Raises a `UserError` if a path is listed twice, whatever the labels and lists."""
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
  """Opens folders of images, one per class.

  Args:
    folder: has train/CLASS/.../*.jpg, optionally val and test in the same form, and
      open with images anywhere; or else CLASS/.../*.jpg, which are the split 'train'.
      Classes are the sorted folder names of train. Without folders, its images have no
      class; only a target can be made of them. Links are followed. Files with
      extensions other than `SUFFIXES` and folders next to the splits are passed over;
      the source reports them, except hidden ones.
    data_dir: not used.

  Returns:
    split -> source.

  Raises:
    UserError: a class has no images, or train does not have it; the name of a folder
      is nearly that of a split; an image is not a regular file; or links make two
      classes or splits share a folder.
  """
  splits, beside = _layout(folder)
  home = _join(folder, splits['train'])
  class_names, _ = _content(home)
  if not class_names:
    return {'train': _without_classes(folder, splits, beside)}
  known = _labels(home, class_names)
  sources, owners = {}, {}
  for split, below in splits.items():
    paths, labels, others = [], [], []
    if split != 'open':
      loose = _content(_join(folder, below))[1]
      others += _regular(folder, [posixpath.join(below, name) for name in loose])
    for path, label in _class_folders(folder, split, below, known):
      found = find_images(os.path.join(folder, path))
      _check_unshared(found, owners)
      paths += [f'{path}/{name}' for name in found.images]
      labels += [label] * len(found.images)
      others += _regular(folder, [f'{path}/{name}' for name in found.others])
      if not found.images:
        raise UserError(
          f'{os.path.join(folder, path)} has no images ({" ".join(SUFFIXES)})'
        )
    if not paths:
      raise UserError(f'{_join(folder, below)} has no folders of classes')
    lines = (passed_over_line(others),) if others else ()
    if split == 'train' and beside:
      lines += (f'not used, next to the splits: {_first_names(beside)}',)
    y = np.array(labels, np.int32)
    sources[split] = Files(folder, paths, paths, y, class_names, lines)
  return sources


def _without_classes(
  folder: str, splits: Mapping[str, str], beside: Sequence[str]
) -> Files:
  """Returns the images of a folder without class folders; they have no labels.

  Raises:
    UserError: there are none, or images to test on, whose class nobody knows.
  """
  home = _join(folder, splits['train'])
  found = find_images(home)
  others = _regular(home, found.others)
  if not found.images:
    raise UserError(
      f'folder:{folder} must have CLASS/*.jpg or train/CLASS/*.jpg, but {home} has no '
      'folders'
    )
  if len(splits) > 1:
    more = next(name for name in splits if name != 'train')
    raise UserError(
      f'{home} has images but no folders of classes, so nothing is known about the '
      f'classes in {_join(folder, more)}: sort the images into class folders, or move '
      f'{more!r} elsewhere'
    )
  paths = [posixpath.join(splits['train'], name) for name in found.images]
  lines = (passed_over_line(others),) if others else ()
  if beside:
    lines += (f'not used, next to the splits: {_first_names(beside)}',)
  labels = np.full(len(paths), -1, np.int32)
  return Files(folder, paths, paths, labels, (), lines)


def _join(folder: str, below: str) -> str:
  return os.path.join(folder, below) if below else folder


def _layout(folder: str) -> tuple[dict[str, str], list[str]]:
  """Returns split -> its folder in a tree, and what else is there but not used.

  Raises:
    UserError: a folder could be a split or a class, or there is no train.
  """
  names, files = _content(folder)
  for name in names:
    split = near_split(name)
    if split and name not in SPLITS:
      raise UserError(
        f'{os.path.join(folder, name)} looks like the split {split!r}: rename it to '
        f'{split!r}, or, if it is a class, move all classes into '
        f'{os.path.join(folder, "train")}'
      )
  present = [split for split in SPLITS if split in names]
  others = [name for name in names if name not in SPLITS]
  if splits := _pairs_of_splits(folder, others):
    raise UserError(
      f'{os.path.join(folder, splits[0])} and {splits[1]} have the same classes and '
      f'look like splits: rename them to two of {", ".join(SPLITS)}'
    )
  if not present:
    return {'train': ''}, []
  if 'train' in present and (_content(os.path.join(folder, 'train'))[0] or not others):
    return {split: split for split in present}, [f'{name}/' for name in others] + files
  if others:
    raise UserError(
      f'{os.path.join(folder, present[0])} has the name of a split, but is next to '
      f'folders of classes, such as {others[0]!r}: move all classes (and '
      f'{present[0]!r}, if it is one) into a new folder, and name that one '
      f'{os.path.join(folder, "train")}'
    )
  raise UserError(f'folder:{folder} has {", ".join(present)} but no train')


def _labels(folder: str, class_names: Sequence[str]) -> dict[str, int]:
  """Returns the composed name of each class -> its label."""
  known: dict[str, int] = {}
  for label, name in enumerate(class_names):
    if composed(name) in known:
      raise UserError(
        f'{folder} has two folders called {name!r}, which only differ in their Unicode '
        'form: merge them'
      )
    known[composed(name)] = label
  return known


def composed(name: str) -> str:
  """Returns a name in Unicode's NFC form, in which names are compared."""
  return unicodedata.normalize('NFC', name)


def _class_folders(
  root: str, split: str, below: str, known: Mapping[str, int]
) -> Iterator[tuple[str, int]]:
  """Yields the folders of a split, relative to `root`, with their labels."""
  names, _ = _content(_join(root, below))
  if split == 'open':
    for name in names:
      if composed(name) in known:
        path = os.path.join(root, below, name)
        raise UserError(f'{path}: {name!r} is a class of train, so it is not open')
    yield below, -1
    return
  for name in names:
    path = posixpath.join(below, name)
    if composed(name) not in known:
      near = suggest(name, known).partition('; known')[0]
      raise UserError(f'{os.path.join(root, path)}: train has no class {name!r}{near}')
    yield path, known[composed(name)]


def _content(folder: str) -> tuple[tuple[str, ...], list[str]]:
  """Returns the sorted names of folders and of files in a folder, without hidden ones.

  Links count as what they point to.
  """
  try:
    with os.scandir(folder) as entries:
      found = [(e.name, _is_folder(e)) for e in entries if not e.name.startswith('.')]
  except OSError as error:
    raise UserError(f'folder:{folder}: {error.strerror}') from None
  folders = tuple(sorted(name for name, is_folder in found if is_folder))
  return folders, sorted(name for name, is_folder in found if not is_folder)


def _is_folder(entry: os.DirEntry) -> bool:
  try:
    return entry.is_dir()
  except OSError:  # a link to itself
    return False


def _is_file(entry: os.DirEntry) -> bool:
  try:
    return entry.is_file()
  except OSError:
    return False


class Found(NamedTuple):
  """The contents of a folder without hidden files: sorted paths relative to it.

  Attributes:
    images: regular files with an image's extension.
    others: all other files, and links to folders already found.
    folders: real path -> path of each folder.
  """

  images: list[str]
  others: list[str]
  folders: dict[str, str]


def find_images(folder: str) -> Found:
  """Finds images below a folder; follows links, but enters no folder twice.

  Raises:
    UserError: a folder cannot be read.
    OSError: it is temporarily unavailable.
  """
  found = Found([], [], {})
  waiting = [(folder, '')]
  while waiting:
    path, below = waiting.pop()
    real = os.path.realpath(path)
    if real in found.folders:
      found.others.append(below)
      continue
    found.folders[real] = path
    try:
      with os.scandir(path) as entries:
        shown = [entry for entry in entries if not entry.name.startswith('.')]
    except OSError as error:
      raise _lasting(error, path) from None
    for entry in shown:
      name = posixpath.join(below, entry.name)
      if _is_folder(entry):
        waiting.append((entry.path, name))
      elif is_image_name(entry.name) and _is_file(entry):
        found.images.append(name)
      else:
        found.others.append(name)
  found.images.sort()
  found.others.sort()
  return found


def is_image_name(name: str) -> bool:
  """Returns whether a file name has an image's extension."""
  return name.lower().endswith(SUFFIXES)


def passed_over_line(paths: Sequence[str]) -> str:
  """Returns a line about files that are not used."""
  files = 'file' if len(paths) == 1 else 'files'
  return f'{len(paths):,} {files} passed over: {_first_names(paths)}'


def _first_names(paths: Sequence[str]) -> str:
  more = len(paths) - NAMED
  return ', '.join(paths[:NAMED]) + (f' and {more:,} more' if more > 0 else '')


def _regular(root: str, others: Sequence[str]) -> Sequence[str]:
  """Returns unused paths; refuses broken links, and images that are not files."""
  for name in others:
    path = os.path.join(root, name)
    if (is_image_name(name) or os.path.islink(path)) and not os.path.isdir(path):
      check_file(path)
  return others


def _check_unshared(found: Found, owners: dict[str, str]) -> None:
  """Refuses folders that belong to two classes or splits through links.

  Args:
    found: the contents of a class's folder.
    owners: real path -> path of the folders of earlier classes; this class's are added.
  """
  for real, folder in found.folders.items():
    if real in owners:
      raise UserError(
        f'{folder} and {owners[real]} are the same folder, but an image belongs to one '
        'class of one split: remove the link'
      )
  owners |= found.folders
