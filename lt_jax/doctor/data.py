"""Checks of the images and of their labels."""

import collections
import functools
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lt_jax.build import streams
from lt_jax.config import Config
from lt_jax.data import augment, crops, longtail
from lt_jax.data.dataset import Dataset
from lt_jax.data.lists import Files, check_file, composed
from lt_jax.data.streams import Split, most_bad
from lt_jax.doctor.case import (
  Case,
  CheckSkipped,
  Finding,
  Findings,
  each,
  odd,
  ok,
  sampled,
  wrong,
)
from lt_jax.errors import UserError, named_class

HASHED = 50_000
"""The largest number of records to read for duplicates; files are compared by size."""

TOLERATED = 1e-3
"""The largest share of a split that can be duplicates and is odd rather than wrong."""

FEWEST_CLASSES = 10
"""With fewer, a tail has no shape to speak of."""

FAR = 0.5
"""Normalised pixels whose mean is farther from 0 are odd."""

FACTOR = 1.5
"""The factor by which their standard deviation can differ from 1."""


# The data.


def splits(case: Case) -> Findings:
  """Reports how many images there are, and what is passed over."""
  dataset = case.dataset
  for name, split in dataset.every.items():
    labels, classes = split.labels, len(dataset.class_names)
    if split.of_pixels:
      yield _of_pixels(name, split, classes)
      continue
    beyond = (labels < -1) | (labels >= classes)
    beyond |= (labels == -1) != name.startswith('open')
    if beyond.any():
      yield wrong(f'{name}: label {labels[beyond][0]} is not in [0, {classes})')
    there = len(np.unique(labels))
    of_classes = '' if name.startswith('open') else f' of {there} of {classes} classes'
    yield ok(f'{name}: {len(labels):,} images{of_classes}')
  for line in dataset.passed_over:
    yield odd(line)


def _of_pixels(name: str, split: Split, classes: int) -> Finding:
  """Reports how many images and labelled pixels there are."""
  counts = split.counts(classes)
  return ok(
    f'{name}: {len(split.rows):,} images, {counts.sum():,} labelled pixels of '
    f'{(counts > 0).sum()} of {classes} classes'
  )


def readable(case: Case) -> Findings:
  """Opens all image files; decodes those that look truncated, and a sample."""
  skips = streams.ON_BAD_IMAGE.get(case.config['data']['on_bad_image'], False)
  in_memory = []
  for name, split in case.real.every.items():
    source = split.source
    if not hasattr(source, 'encoded'):
      in_memory.append(name)
      continue
    found, bad = each(functools.partial(_opened, source), split.rows)
    case.sizes[name] = np.array([size for size, _ in found]).reshape(-1, 2)
    turned = [where for _, where in found if where]
    if turned:
      yield odd(
        f'{name}: images with an EXIF orientation, which is not applied: '
        f'{len(turned):,}, such as {turned[0]}; rotate the files, for example with '
        'jhead -autorot'
      )
    chosen = split.rows if case.thorough else sampled(split.rows)
    _, also = each(functools.partial(_decoded, source), chosen)
    messages = list(dict.fromkeys(map(str, (*bad, *also))))
    if messages:
      level = odd if skips and len(messages) <= most_bad(split) else wrong
      yield level(
        f'{name}: images that cannot be read: {len(messages):,}, such as {messages[0]}'
      )
    else:
      yield ok(f'{name}: {len(found):,} files open, {len(chosen):,} were decoded')
  if in_memory:
    yield ok(f'the images of {", ".join(in_memory)} are arrays in memory')


_ENDS = {'JPEG': b'\xff\xd9', 'PNG': b'IEND'}
"""What complete files of a format contain in their last `_TAIL` bytes."""

_TAIL = 1024

_ORIENTATION = 0x0112  # of EXIF; 1 is upright


def _opened(source: Any, row: int) -> tuple[tuple[int, int], str]:
  """Looks at the header of a file; decodes it if it looks truncated.

  Returns:
    (width, height), and the file's name if EXIF says to rotate it, else ''.
  """
  turned = ''
  try:
    with _file(source, row) as file, crops.open_image(file) as image:
      size = image.size
      if image.info.get('exif') and image.getexif().get(_ORIENTATION, 1) != 1:
        turned = source.where(row)
      file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
      whole = _ENDS.get(image.format, b'') in file.read()
    if whole and size[0] * size[1] <= crops.MAX_PIXELS:
      return size, turned
  except crops.DECODE_ERRORS:
    pass
  return _decoded(source, row), turned


def _file(source: Any, row: int) -> BinaryIO:
  """Opens an image as a file, which need not be read completely."""
  if isinstance(source, Files):
    check_file(source.where(row))
    return open(source.where(row), 'rb')
  return io.BytesIO(source.encoded(row))


def _decoded(source: Any, row: int) -> tuple[int, int]:
  """Returns (width, height) of an image that can be decoded.

  Raises:
    UserError: it cannot.
  """
  return crops.measured(source.encoded(row), source.where(row))[0]


class Picture(NamedTuple):
  """An image to compare with others.

  Attributes:
    split: name of its split.
    label: its class, -1 if open.
    source: its source.
    row: its position in the source.
  """

  split: str
  label: int
  source: Any
  row: int

  def __str__(self) -> str:
    """Returns its name for messages."""
    where = getattr(self.source, 'where', '#{}'.format)(self.row)
    return f'{where} ({self.split})'

  def is_record(self) -> bool:
    """Returns whether its size is only known after reading it."""
    return hasattr(self.source, 'encoded') and not isinstance(self.source, Files)

  def size(self) -> int:
    """Returns a number that is cheap to get and the same for equal images."""
    if not isinstance(self.source, Files):
      return 0
    try:
      return os.stat(self.source.where(self.row)).st_size
    except OSError as error:
      raise UserError(f'{self.source.where(self.row)}: {error.strerror}') from None

  def digest(self) -> bytes:
    """Returns the SHA-256 of the file, or of the pixels."""
    if hasattr(self.source, 'encoded'):
      return hashlib.sha256(self.source.encoded(self.row)).digest()
    return hashlib.sha256(np.ascontiguousarray(self.source[self.row])).digest()


def duplicates(case: Case) -> Findings:
  """Looks for duplicates: in two splits, with two labels, or within training."""
  pictures = _pictures(case)
  records = [p for p in pictures if p.is_record()]
  if len(records) > HASHED and not case.thorough:
    raise CheckSkipped(f'{len(records):,} records would be read: give --thorough')
  alike = [p for group in equal(pictures, Picture.size) for p in group]
  same = equal(alike, Picture.digest)
  if not same:
    text = f'no image occurs twice: {len(alike):,} of {len(pictures):,} were hashed'
    fewer = len(alike) < len(pictures)
    yield ok(text + (', because the others differ in size' if fewer else ''))
  data = case.config['data']
  stated = data['train_split'] == data['test_split'] and not data['test_per_class']
  yield from _across(case.dataset.every, same, {'train', 'test'} if stated else set())
  yield from _within(same)
  yield from _two_labels(case.dataset, same, len(pictures))


def _pictures(case: Case) -> list[Picture]:
  """Returns all images, except those of a meta set that is part of training."""
  return [
    Picture(name, label, split.source, row)
    for name, split in case.real.every.items()
    if name != 'meta' or not case.config['data']['meta_in_train']
    for label, row in zip(split.labels.tolist(), split.rows.tolist(), strict=True)
  ]


def equal(
  pictures: Sequence[Picture], key: Callable[[Picture], Any]
) -> list[list[Picture]]:
  """Returns groups of two or more with the same key, without unreadable images."""
  groups = collections.defaultdict(list)
  found, _ = each(lambda i: (key(pictures[i]), pictures[i]), range(len(pictures)))
  for value, picture in found:
    groups[value].append(picture)
  return [group for group in groups.values() if len(group) > 1]


def _level(count: int, of: int) -> Callable[[str], Finding]:
  """Returns `odd` for a few, `wrong` for many."""
  return wrong if count > TOLERATED * of else odd


def _across(
  splits: Mapping[str, Split], same: Sequence[Sequence[Picture]], stated: Set[str]
) -> Findings:
  """Reports images in two splits, which the config can intend."""
  for a, b in itertools.combinations(splits, 2):
    both = [group for group in same if {a, b} <= {picture.split for picture in group}]
    if both:
      one, two = (next(p for p in both[0] if p.split == name) for name in (a, b))
      fewer = min(len(splits[a].rows), len(splits[b].rows))
      level = odd if {a, b} == stated else _level(len(both), fewer)
      yield level(f'images in {a} and in {b}: {len(both):,}, such as {one} = {two}')


def _within(same: Sequence[Sequence[Picture]]) -> Findings:
  """Reports images that occur more than once in training."""
  trained = [[p for p in group if p.split == 'train'] for group in same]
  twice = [group for group in trained if len(group) > 1]
  if twice:
    extra, first = sum(len(group) - 1 for group in twice), twice[0]
    yield odd(
      f'images more than once in train: {extra:,}, such as {first[0]} = {first[1]}'
    )


def _two_labels(
  dataset: Dataset, same: Sequence[Sequence[Picture]], total: int
) -> Findings:
  """Reports images with two labels."""
  torn = [group for group in same if len({picture.label for picture in group}) > 1]
  if torn:
    one = torn[0][0]
    two = next(picture for picture in torn[0] if picture.label != one.label)
    names = [
      repr(dataset.class_names[p.label]) if p.label >= 0 else 'open' for p in (one, two)
    ]
    yield _level(len(torn), total)(
      f'images with two labels: {len(torn):,}, such as {one}: {names[0]} = {two}: '
      f'{names[1]}'
    )


def classes(case: Case) -> Findings:
  """Looks for classes without images, and for names shared by two classes."""
  dataset = case.dataset
  names = collections.Counter(map(composed, dataset.class_names))
  doubled = [name for name, number in names.items() if number > 1]
  if doubled:
    yield odd(f'names shared by two classes: {len(doubled)}, such as {doubled[0]!r}')
  for name in ('train', 'test'):
    expected = (
      ~dataset.unseen if name == 'train' and dataset.unseen is not None else True
    )
    empty = np.flatnonzero((_per_class(dataset, name) == 0) & expected)
    if empty.size:
      first = dataset.class_names[empty[0]]
      level = wrong if name == 'train' else odd
      text = f'classes without {dataset.counted} in {name}'
      yield level(f'{text}: {empty.size}, such as {first!r}')


def _per_class(dataset: Dataset, name: str) -> np.ndarray:
  """Returns (C,) images, or pixels, per class in a split; 0 if it does not exist."""
  classes = len(dataset.class_names)
  if name not in dataset.every:
    return np.zeros(classes, int)
  return dataset.every[name].counts(classes)


def tail(case: Case) -> Findings:
  """Describes the long tail, and compares it with the config."""
  counts, data = case.dataset.counts, case.config['data']
  ordered = np.sort(counts)[::-1]
  yield ok(
    f'training {case.dataset.counted} per class: most {ordered[0]:,}, median '
    f'{np.median(ordered):,g}, fewest {ordered[-1]:,}; imbalance '
    f'{ordered[0] / max(ordered[-1], 1):,.4g}, Gini coefficient {_gini(counts):.3f}'
    + (f'; the tail is {_shape(ordered)}' if len(ordered) >= FEWEST_CLASSES else '')
  )
  stated = longtail.class_counts(
    data['profile'], len(counts), data['n_max'], data['imbalance']
  )
  if stated is None:
    return
  stated = stated + data['meta_per_class'] * data['meta_in_train']
  if (stated == counts).all():
    yield ok(f'the counts are those of data.profile {data["profile"]!r}')
  else:
    off = np.flatnonzero(stated != counts)[0]
    yield odd(
      f'data.profile {data["profile"]!r} states {stated[off]} images of '
      f'{named_class(off, case.dataset.class_names)}, '
      f'there are {counts[off]}'
    )


def _gini(counts: np.ndarray) -> float:
  """Returns the Gini coefficient: 0 for equal counts, near 1 if one class has all.

  It is sum_i (2 i - C - 1) n_i / (C sum_i n_i), n ascending, i from 1.
  """
  n, total = len(counts), counts.sum()
  ranks = 2 * np.arange(1, n + 1) - n - 1
  return float(ranks @ np.sort(counts) / (n * max(total, 1)))


def _shape(ordered: np.ndarray) -> str:
  """Returns a description of the shape of counts, sorted from most to fewest."""
  logs = np.log(np.maximum(ordered, 1))
  if np.ptp(ordered) <= 0.05 * ordered[0]:
    return 'balanced'
  if len(np.unique(ordered)) == 2:
    return 'a step'
  fit = np.corrcoef(np.arange(len(logs)), logs)[0, 1] ** 2
  if fit > 0.98:
    return 'exponential'
  return f'neither exponential nor a step (R^2 of log n by rank {fit:.2f})'


def shots(case: Case) -> Findings:
  """Counts many-, medium- and few-shot classes."""
  many, few = (case.config['data'][f'{name}_shot'] for name in ('many', 'few'))
  counts = case.dataset.counts
  groups = longtail.shot_groups(counts, many, few)
  many, few = longtail.shot_bounds(counts, many, few).values()
  numbers = ', '.join(f'{mask.sum()} {name}' for name, mask in groups.items())
  noun = case.dataset.counted
  yield ok(f'classes with over {many:g}, between, and under {few:g} {noun}: {numbers}')
  for name, mask in groups.items():
    if not mask.any():
      yield odd(f'no class is {name}-shot: metrics of that group will be empty')


def balanced_test(case: Case) -> Findings:
  """Reports whether accuracy over images equals that over classes."""
  if case.dataset.of_pixels:
    raise CheckSkipped('every pixel has a label, and classes are measured by their IoU')
  counts = _per_class(case.dataset, 'test')
  there = counts[counts > 0]
  if there.size and there.max() > 1.1 * there.min():
    yield odd(
      f'test has {there.min():,} to {there.max():,} images per class: accuracy over '
      'images and over classes (macro_accuracy) differ'
    )
  else:
    yield ok('test is balanced')


# The images.


def normalisation(case: Case) -> Findings:
  """Compares data.mean and data.std with the pixels of a sample."""
  data = case.config['data']
  if data['standardise']:
    yield ok('mean and deviation come from the training images (data.standardise)')
    return
  if case.sample.dtype != np.uint8:
    yield _scale(case.sample, data)
    return
  pixels = case.sample.reshape(-1, case.sample.shape[-1]) / 255
  seen = (pixels.mean(0), pixels.std(0))
  normal = (pixels - np.array(data['mean'])) / np.array(data['std'])
  mean, std = normal.mean(0), normal.std(0)
  text = (
    f'the normalised pixels of {len(case.sample)} training images have mean '
    f'{_numbers(mean)} and deviation {_numbers(std)}'
  )
  if far := _far(mean, std):
    yield odd(
      f'{text}: {far}; see data.mean {_numbers(data["mean"])} and data.std '
      f'{_numbers(data["std"])}, which are {_numbers(seen[0])} and {_numbers(seen[1])} '
      'in these images'
    )
  else:
    yield ok(text)


def _scale(arrays: np.ndarray, data: Config) -> Finding:
  """Reports the mean and deviation of all values of float arrays, normalised."""
  values = np.asarray(augment.unit(arrays, data['unit']), np.float64)
  normal = (values - np.array(data['mean'])) / np.array(data['std'])
  text = (
    f'the values of {len(arrays)} training arrays have mean {normal.mean():.3g} and '
    f'deviation {normal.std():.3g}'
  )
  if far := _far(normal.mean(), normal.std()):
    return odd(f'{text}: {far}; --config.data.standardise fits both')
  return ok(text)


def _far(mean: np.ndarray, std: np.ndarray) -> str:
  """Says which of the two is far from what normalisation aims at; '' if neither is."""
  far = ['the mean is far from 0'] * bool(np.abs(mean).max() > FAR)
  if np.max(std) > FACTOR or np.min(std) < 1 / FACTOR:
    far.append('the deviation is far from 1')
  return ' and '.join(far)


def _numbers(values: Iterable[float]) -> str:
  return ' '.join(f'{value:.3g}' for value in values)


def constant(case: Case) -> Findings:
  """Counts images of one colour."""
  if case.sample.dtype != np.uint8:
    raise CheckSkipped('the data are float arrays')
  flat = np.ptp(case.sample.reshape(len(case.sample), -1, case.sample.shape[-1]), 1)
  blank = int((flat.max(1) == 0).sum())
  if blank:
    level = wrong if 2 * blank > len(flat) else odd
    yield level(f'images of one colour: {blank} of {len(flat)}')
  else:
    yield ok(f'none of {len(flat)} images is of one colour')


def sizes(case: Case) -> Findings:
  """Describes sizes and shapes of image files."""
  side = case.config['data']['image_size']
  for name, found in case.sizes.items():
    if not len(found):
      continue
    short, long = found.min(1), found.max(1)
    yield ok(
      f'{name}: short sides of {short.min()} to {short.max()} pixels, median '
      f'{np.median(short):g}'
    )
    strips, small = int((long > 5 * short).sum()), int((short < side).sum())
    if strips:
      yield odd(f'{name}: images with an aspect ratio above five: {strips:,}')
    if 2 * small > len(found):
      yield odd(f'{name}: images smaller than data.image_size {side}: {small:,}')
