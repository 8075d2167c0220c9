"""Descriptions of classes: attributes or word vectors that identify unseen classes.

A description is one vector per class. A file's extension selects its reader, see
`READERS`. The seven segments of a display describe digits without a download.
"""

import csv
import hashlib
import io
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lt_jax.data.mat import read_mat
from lt_jax.errors import UserError, named_class, suggest


class Described(NamedTuple):
  """Vectors of classes.

  Attributes:
    names: names of the C classes; empty: they are in the order of the data set.
    vectors: (C, A) float64.
    columns: names of the A attributes; () if they have none.
  """

  names: tuple[str, ...]
  vectors: np.ndarray
  columns: tuple[str, ...] = ()


class Block(NamedTuple):
  """A file's vectors for the requested classes.

  Attributes:
    vectors: (C, A) float64, in the order of the classes.
    columns: as in `Described`.
  """

  vectors: np.ndarray
  columns: tuple[str, ...]


def class_vectors(files: Sequence[str], class_names: Sequence[str]) -> Block:
  r"""Returns one vector per class, from one or more files.

  Several files are concatenated. Each row of each block is first divided by its norm,
  so that a block with many columns does not outweigh the others. A single file stays as
  it is.

  Args:
    files: paths, or keys of `EMBEDDED`.
    class_names: names of the classes. If a file has names they are matched to these,
      ignoring case and treating '+', '_', '-', '.' and spaces alike.

  Raises:
    UserError: a file that cannot be read, a class without a description, two with the
      same, or values that are not finite.
  """
  if isinstance(files, str):
    raise UserError(f'data.class_vectors is {files!r}; it must be a list of files')
  blocks = [_block(file, _read(file, class_names), class_names) for file in files]
  vectors = blocks[0].vectors
  if len(blocks) > 1:
    vectors = np.concatenate([unit_rows(block.vectors) for block in blocks], axis=1)
  check_distinct(vectors, class_names, ', '.join(files))
  columns = tuple(name for block in blocks for name in _columns(block))
  return Block(vectors, columns)


def checked(file: str, found: Described, class_names: Sequence[str]) -> Described:
  """Returns the descriptions of the classes in their order, checked like a file's.

  Args:
    file: where they are from, for messages.
    found: what it has.
    class_names: names of the classes, to which its own are matched.

  Raises:
    UserError: as for `class_vectors`.
  """
  block = _block(file, found, class_names)
  check_distinct(block.vectors, class_names, file)
  return Described(tuple(class_names), block.vectors, block.columns)


def read_descriptions(files: Sequence[str]) -> Described:
  """Returns the classes named in files, for classes that no data set has.

  Raises:
    UserError: a file without names, or files that name different classes.
  """
  first = _read(files[0], ())
  if not first.names:
    raise UserError(f'{files[0]} does not name its classes: give a CSV file, NAME,...')
  block = class_vectors(files, first.names)
  return Described(first.names, block.vectors, block.columns)


def unit_rows(vectors: np.ndarray) -> np.ndarray:
  """Returns (C, A) float64 rows divided by their norms; rows of zeros stay zero."""
  vectors = np.asarray(vectors, np.float64)
  norms = np.linalg.norm(vectors, axis=1, keepdims=True)
  return vectors / np.where(norms > 0, norms, 1)


def binary(vectors: np.ndarray) -> tuple[np.ndarray, float]:
  """Returns which attributes classes have, (C, A) bool, and the threshold.

  The threshold is the mean of the whole matrix, as in the predicate matrices of Animals
  with Attributes.
  """
  threshold = float(np.mean(vectors))
  return np.asarray(vectors) > threshold, threshold


def words_of(name: str) -> tuple[str, ...]:
  """Splits a class name into lower-case words at '+', '_', '-', '.' and ' '.

  A leading number with a dot, as in '002.Laysan_Albatross', is dropped.
  """
  plain = re.sub(r'^\d+\.(?=.*[^\W_])', '', name.lower())
  return tuple(word for word in re.split(r'[+_\-./\s]+', plain) if word)


def names_of_words(path: str) -> set[tuple[str, ...]]:
  """Returns the class names in a file, one per line, each as its `words_of`.

  A line can have several names of one class, separated by commas.
  """
  lines = _names('pretrain_classes', [f'@{path}'])
  return {words_of(name.strip()) for line in lines for name in line.split(',')}


def _columns(block: Block) -> Iterable[str]:
  return block.columns or map(str, range(block.vectors.shape[1]))


def _block(file: str, found: Described, class_names: Sequence[str]) -> Block:
  """Returns a file's vectors in the order of the classes."""
  vectors, classes = found.vectors, len(class_names)
  if vectors.ndim != 2 or not vectors.size:
    raise UserError(f'{file}: class vectors must be (classes, attributes)')
  if not found.names:
    _check_rows(file, vectors.shape, classes)
    names = tuple(class_names)
  else:
    names = found.names
    if len(names) != len(vectors):
      raise UserError(
        f'{file}: {len(names)} classes are named, but there are {len(vectors)} rows of '
        f'class vectors{_transposed(vectors.shape, len(names))}'
      )
  if set(class_names) <= set(found.columns):
    raise UserError(f'{file}: the classes are columns, so it seems to be transposed')
  if not np.isfinite(vectors).all():
    row = int(np.argmin(np.isfinite(vectors).all(1)))
    column = int(np.argmin(np.isfinite(vectors[row])))
    raise UserError(
      f'{file}: attribute {_named_column(found, column)} of {names[row]!r} is '
      f'{vectors[row, column]}'
    )
  return Block(vectors[_places(file, names, class_names)], found.columns)


def _named_column(found: Described, column: int) -> str:
  return repr(found.columns[column]) if found.columns else str(column)


def _check_rows(file: str, shape: tuple[int, ...], classes: int) -> None:
  if shape[0] != classes:
    raise UserError(
      f'{file}: class vectors are {shape[0]} x {shape[1]}, but there are {classes} '
      f'classes{_transposed(shape, classes)}'
    )


def _transposed(shape: tuple[int, ...], classes: int) -> str:
  return '; they seem to be transposed' if shape[1] == classes else ''


def _places(file: str, names: Sequence[str], class_names: Sequence[str]) -> np.ndarray:
  """Returns the row of each class, found by name."""
  find = _finder(names)
  rows = []
  for label, name in enumerate(class_names):
    found = find(name)
    if len(found) != 1:
      told = 'several descriptions' if found else 'no description'
      several = ': ' + ', '.join(repr(names[row]) for row in found)
      hint = several if found else suggest(name, names)
      raise UserError(f'{file} has {told} of {named_class(label, class_names)}{hint}')
    rows += found
  return np.array(rows, np.int64)


def _finder(names: Sequence[str]) -> Callable[[str], list[int]]:
  """Returns the function that finds the places of a name, or else of its words."""
  exact: dict[str, list[int]] = {}
  loose: dict[tuple[str, ...], list[int]] = {}
  for place, name in enumerate(names):
    exact.setdefault(name, []).append(place)
    loose.setdefault(words_of(name), []).append(place)
  return lambda name: exact.get(name) or loose.get(words_of(name), [])


def check_distinct(vectors: np.ndarray, class_names: Sequence[str], file: str) -> None:
  """Refuses two classes with the same description."""
  seen: dict[bytes, int] = {}
  for label, row in enumerate(vectors):
    first = seen.setdefault(hashlib.sha256(row.tobytes()).digest(), label)
    if first != label:
      one, other = (named_class(c, class_names) for c in (first, label))
      raise UserError(f'{file}: {one} and {other} have the same description')


# Readers: (path, names of the wanted classes) -> the contents of the file.


def _read(file: str, class_names: Sequence[str]) -> Described:
  if file in EMBEDDED:
    return EMBEDDED[file]
  path = os.path.expanduser(file)
  ending = os.path.splitext(path)[1].lower()
  if ending not in READERS:
    raise UserError(
      f'{file}: class vectors end in {", ".join(READERS)}, or are one of '
      f'{", ".join(EMBEDDED)}'
    )
  if not os.path.isfile(path):
    raise UserError(f'data.class_vectors: there is no file {path}')
  return READERS[ending](path, class_names)


def _read_npz(path: str, class_names: Sequence[str]) -> Described:
  """Reads 'class_vectors' (C, A), and optional 'class_names' and 'attribute_names'."""
  del class_names
  try:
    with open(path, 'rb') as file, np.load(file, allow_pickle=False) as archive:
      members = {name: archive[name] for name in archive.files if name in _MEMBERS}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise UserError(f'{path}: {" ".join(str(error).split())}') from None
  vectors = members.get('class_vectors', members.get('attributes'))
  if vectors is None or vectors.dtype.kind not in 'iufb':
    raise UserError(f"{path} needs the array 'class_vectors' (classes, attributes)")
  names = members.get('class_names', members.get('classes', np.array([], 'U1')))
  columns = members.get('attribute_names', np.array([], 'U1'))
  return Described(tuple(map(str, names)), filled(vectors), tuple(map(str, columns)))


_MEMBERS = (
  'class_vectors',
  'class_names',
  'attribute_names',
  'attributes',
  'classes',
)
"""Array names; the last two are those of Animals with Attributes files."""


def filled(vectors: np.ndarray) -> np.ndarray:
  """Returns attributes in float64; missing values become the attribute's mean.

  -1 means missing if all other values are at least 0, as in the matrices of Animals
  with Attributes; but not in a matrix of 1 and -1 alone.
  """
  vectors = np.array(vectors, np.float64)
  missing = vectors == -1
  others = vectors[~missing]
  if not missing.any() or (others < 0).any() or (others == 1).all():
    return vectors
  there = (~missing).sum(0)
  mean = np.where(missing, 0, vectors).sum(0) / np.maximum(there, 1)
  return np.where(missing, mean[None], vectors)


def _read_csv(path: str, class_names: Sequence[str]) -> Described:
  """Reads rows of a name and numbers; a first row without numbers names the columns."""
  del class_names
  try:
    with open(path, newline='', encoding='utf-8-sig') as file:
      rows = [row for row in csv.reader(file) if row]
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise UserError(f'{path}: {error}') from None
  columns: tuple[str, ...] = ()
  if rows and not any(map(_is_number, rows[0][1:])):
    columns, rows = tuple(rows[0][1:]), rows[1:]
  widths = {len(row) for row in rows}
  if len(widths) != 1 or widths == {1}:
    raise UserError(f'{path}: rows must be NAME,NUMBER,..., as many numbers in each')
  for number, row in enumerate(rows):
    for text in row[1:]:
      if not _is_number(text):
        raise UserError(f'{path}: {row[0]!r} (row {number + 1}) has {text!r}')
  vectors = np.array([[float(x) for x in row[1:]] for row in rows])
  return Described(tuple(row[0] for row in rows), filled(vectors), columns)


def _is_number(text: str) -> bool:
  try:
    float(text)
  except ValueError:
    return False
  return True


def _read_att_splits(path: str, class_names: Sequence[str]) -> Described:
  """Reads att_splits.mat of Xian et al.: (A, C), preferably the original matrix."""
  del class_names
  return described_by(path, read_mat(path, ATT_SPLITS))


ATT_SPLITS = (
  'att',
  'original_att',
  'allclasses_names',
  'trainval_loc',
  'test_seen_loc',
  'test_unseen_loc',
)
"""Variables of an att_splits.mat."""


def described_by(path: str, variables: Mapping[str, np.ndarray]) -> Described:
  """Returns the class vectors of an att_splits.mat.

  'att' has vectors of unit norm. 'original_att' is the matrix before normalisation; we
  prefer it, because `binary` needs it to decide which attributes a class has.
  """
  att = variables.get('original_att', variables.get('att'))
  if att is None or att.ndim != 2 or att.dtype.kind not in 'iuf':
    raise UserError(f"{path} needs 'att' (attributes, classes)")
  names = variables.get('allclasses_names', np.array([], 'U1'))
  if names.dtype.kind != 'U':
    raise UserError(f"{path}: 'allclasses_names' must be a cell of strings")
  return Described(tuple(map(str, names)), filled(att.T))


def _read_words(path: str, class_names: Sequence[str]) -> Described:
  """Reads word vectors as text, from GloVe (without a header line) or word2vec.

  The vector of a class is the mean over the words of its name, see `words_of`, scaled
  to unit norm.
  """
  for name in class_names:
    if not words_of(name):
      raise UserError(f'{path}: the class name {name!r} has no words')
  wanted = {word for name in class_names for word in words_of(name)}
  if not wanted:
    raise UserError(f'{path}: of word vectors, the names of the classes must be known')
  found: dict[str, np.ndarray] = {}
  try:
    with open(path, encoding='utf-8', errors='replace') as file:
      for number, line in enumerate(file):
        word, _, rest = line.rstrip().partition(' ')
        if number == 0 and len(rest.split()) == 1:  # word2vec: WORDS WIDTH
          continue
        key = word.lower()
        # Use the first of several spellings: files are sorted by frequency.
        if key in wanted and key not in found:
          found[key] = np.array(rest.split(), np.float64)
  except (OSError, ValueError) as error:
    raise UserError(f'{path}: line {number + 1}: {error}') from None
  unknown = sorted(wanted - found.keys())
  if unknown:
    raise UserError(
      f'{path} has no vector of {len(unknown)} words of class names: '
      f'{", ".join(unknown)}'
    )
  if len({len(vector) for vector in found.values()}) > 1:
    raise UserError(f'{path}: word vectors differ in length')
  vectors = np.stack(
    [np.mean([found[word] for word in words_of(name)], 0) for name in class_names]
  )
  return Described(tuple(class_names), unit_rows(vectors))


READERS: dict[str, Callable[[str, Sequence[str]], Described]] = {
  '.npz': _read_npz,
  '.csv': _read_csv,
  '.mat': _read_att_splits,
  '.txt': _read_words,
  '.vec': _read_words,
}
"""Extension of a file -> its reader."""

SEGMENTS = ('top', 'upper right', 'lower right', 'bottom', 'lower left', 'upper left')
SEGMENTS += ('middle',)

LIT = ('abcdef', 'bc', 'abdeg', 'abcdg', 'bcfg', 'acdfg', 'acdefg', 'abc', 'abcdefg')
LIT += ('abcdfg',)
"""Segments a to g that a seven-segment display lights for the digits 0 to 9."""

WORDS = ('blue', 'green', 'red', 'grey', 'light', 'high up', 'on the ground')
WORDS += ('large', 'thin', 'round', 'built', 'alive', 'moves')

SCENES = {
  'sky': 'blue, light, high up, large',
  'road': 'grey, on the ground, large, built',
  'building': 'red, high up, large, built',
  'vegetation': 'green, high up, on the ground, large, round, alive',
  'car': 'red, on the ground, built, moves',
  'pole': 'grey, light, high up, on the ground, thin, built',
  'person': 'red, light, on the ground, thin, round, alive, moves',
}
"""Our own descriptions of things in streets, in `WORDS`; nobody measured them."""

EMBEDDED = {
  'street_words': Described(
    tuple(SCENES),
    np.array(
      [[float(w in said.split(', ')) for w in WORDS] for said in SCENES.values()]
    ),
    WORDS,
  ),
  'seven_segments': Described(
    tuple(map(str, range(10))),
    np.array([[float(segment in lit) for segment in 'abcdefg'] for lit in LIT]),
    SEGMENTS,
  ),
}
"""Descriptions that need no file."""


# Which classes are unseen.


def chosen_classes(
  key: str,
  given: Sequence[str | int],
  class_names: Sequence[str],
  among: np.ndarray,
  seed: int,
) -> np.ndarray:
  """Returns the classes that a key of `data` selects.

  Args:
    key: for messages.
    given: names; '@FILE' with one name per line; or one number: that many classes are
      drawn at random.
    class_names: names of all C classes.
    among: (C,) bool, the classes that can be named or drawn.
    seed: of the draw.

  Returns:
    (C,) bool.

  Raises:
    UserError: a class does not exist or cannot be selected, or all are selected.
  """
  mask = np.zeros(len(class_names), bool)
  if isinstance(given, str | int):
    raise UserError(
      f'data.{key} is {given!r}; it must be a list of names, or (NUMBER,)'
    )
  match list(given):
    case [int() as number] if not isinstance(number, bool):
      places = np.flatnonzero(among)
      if not 0 <= number < len(places):
        raise UserError(f'data.{key} asks for {number} of {len(places)} classes')
      draw = np.random.default_rng((seed, zlib.crc32(key.encode())))
      mask[draw.permutation(places)[:number]] = True
    case names:
      find = _finder(class_names)
      for name in _names(key, names):
        mask[_place(key, name, class_names, among, find(name))] = True
  if mask.any() and not (among & ~mask).any():
    raise UserError(f'data.{key} names every class, and none is left to learn from')
  return mask


def _names(key: str, given: Sequence[str | int]) -> Iterable[str]:
  """Yields the names in a list, including those in its files."""
  for name in given:
    if not isinstance(name, str):
      raise UserError(f'data.{key} has {name!r}; it must be names, or one number')
    if not name.startswith('@'):
      yield name
      continue
    try:
      with open(os.path.expanduser(name[1:]), encoding='utf-8-sig') as file:
        lines = io.StringIO(file.read())
    except (OSError, UnicodeDecodeError) as error:
      told = getattr(error, 'strerror', None) or error
      raise UserError(f'data.{key}: {name[1:]}: {told}') from None
    yield from filter(None, (line.strip() for line in lines))


def _place(
  key: str,
  name: str,
  class_names: Sequence[str],
  among: np.ndarray,
  found: Sequence[int],
) -> int:
  """Returns the number of the class that was found for a name."""
  if not found:
    raise UserError(f'data.{key}: no class {name!r}{suggest(name, class_names)}')
  if len(found) > 1:
    several = ' or '.join(named_class(label, class_names) for label in found)
    raise UserError(f'data.{key}: {name!r} can be {several}')
  (label,) = found
  if not among[label]:
    raise UserError(
      f'data.{key}: {named_class(label, class_names)} is unseen, or has no images to '
      'learn from'
    )
  return label
