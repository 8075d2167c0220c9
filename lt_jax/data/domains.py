"""Joins several domains into one: images concatenated, classes unified."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.data.dataset import Dataset
from lt_jax.data.masks import Window
from lt_jax.data.streams import Split
from lt_jax.errors import UserError, lookup, suggest


class Joined:
  """Several sources concatenated into one; see `lt_jax.data.sources`.

  Attributes:
    parts: the sources.
    labels: (N,) int32.
    class_names: those of the first source, which all share.
    image_shape: likewise.
    dtype: of the images, likewise.
  """

  def __init__(self, parts: Sequence[Any]):
    self.parts = tuple(parts)
    self.labels = np.concatenate([part.labels for part in parts])
    self.class_names, self.image_shape = parts[0].class_names, parts[0].image_shape
    self.dtype = np.dtype(getattr(parts[0], 'dtype', np.uint8))
    self._starts = np.cumsum([0, *(len(part) for part in parts)])
    if all(hasattr(part, 'encoded') for part in parts):
      self.encoded, self.where = self._encoded, self._where
    if all(hasattr(part, 'label_map') for part in parts):
      self.label_map, self.class_pixels = self._label_map, self._class_pixels

  def __len__(self) -> int:
    """Returns the number of images of all parts."""
    return int(self._starts[-1])

  def _at(self, row: int) -> tuple[Any, int]:
    part = int(np.searchsorted(self._starts, row, side='right')) - 1
    return self.parts[part], int(row - self._starts[part])

  def __getitem__(self, row: int) -> np.ndarray:
    """Returns an image."""
    part, own = self._at(row)
    return part[own]

  def _encoded(self, row: int) -> bytes:
    """Returns the bytes of an image file."""
    part, own = self._at(row)
    return part.encoded(own)

  def _where(self, row: int) -> str:
    """Returns the name of an image for messages."""
    part, own = self._at(row)
    return part.where(own)

  def _label_map(self, row: int) -> np.ndarray:
    """Returns the label map of an image."""
    part, own = self._at(row)
    return part.label_map(own)

  def _class_pixels(self, rows: np.ndarray) -> np.ndarray:
    """Returns (n, C) pixels per class of some images."""
    every = [part.class_pixels(np.arange(len(part))) for part in self.parts]
    return np.concatenate(every)[rows]

  def has_map(self, row: int) -> bool:
    """Returns whether an image has a label map."""
    part, own = self._at(row)
    return part.has_map(own)

  def check_size(self, row: int, label: np.ndarray, size: tuple[int, int]) -> None:
    """Refuses a label map whose size differs from its image's."""
    part, own = self._at(row)
    part.check_size(own, label, size)


class _Places(NamedTuple):
  """Where the images of several concatenated sources are.

  Attributes:
    source: all of them as one.
    starts: id of a source -> the first row of its images.
    arrays: the images in device memory, or {}.
  """

  source: Any
  starts: dict[int, int]
  arrays: Any


def _places(splits: Sequence[Split]) -> _Places:
  """Concatenates the sources of splits, each source once."""
  of_source = {id(split.source): split for split in splits}
  sources = [split.source for split in of_source.values()]
  starts = np.cumsum([0, *(len(source) for source in sources)]).tolist()
  at = dict(zip(of_source, starts[:-1], strict=True))
  arrays = [split.arrays for split in of_source.values()]
  aligned = [split.offset for split in of_source.values()] == starts[:-1]
  if aligned and all(one is arrays[0] for one in arrays):  # see `seen_through`
    return _Places(Joined(sources), at, arrays[0])
  return _Places(Joined(sources), at, _concatenated(arrays) if all(arrays) else {})


def _compound(splits: Sequence[Split], places: _Places) -> Split:
  """Returns splits of several domains as one that knows each image's domain."""
  rows = [places.starts[id(split.source)] + split.rows for split in splits]
  return Split(
    source=places.source,
    rows=np.concatenate(rows),
    labels=np.concatenate([split.labels for split in splits]),
    arrays=places.arrays,
    crop=_one_crop([split.crop for split in splits]),
    domain=np.repeat(
      np.arange(len(splits), dtype=np.int32), [len(own) for own in rows]
    ),
  )


def _one_crop(crops: Sequence[Any]) -> Any:
  """Returns the crop of several domains; for label maps on the largest canvas."""
  if not isinstance(crops[0], Window):
    return crops[0]
  sides = zip(*(one.canvas for one in crops), strict=True)
  return crops[0]._replace(canvas=tuple(max(side) for side in sides))


def _concatenated(arrays: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns the concatenated arrays, or their shapes if they are shapes."""

  def concatenate(*parts: Mapping[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

  shapes = isinstance(jax.tree.leaves(arrays)[0], jax.ShapeDtypeStruct)
  return jax.eval_shape(concatenate, *arrays) if shapes else concatenate(*arrays)


def joined(domains: Mapping[str, Dataset]) -> Dataset:
  """Returns several labelled domains as one data set, whose batches have the domain.

  A split is joined if every domain has it. If all images are in device memory, so are
  those of the result. `seen_through` then makes the domains share these arrays.

  Raises:
    UserError: their classes or image shapes differ.
  """
  check_alike(domains)
  sets = [*domains.values()]
  made: dict[tuple[int, ...], _Places] = {}  # splits of the same sources share them

  def join(which: str) -> dict[str, Split]:
    parts = [getattr(dataset, which) for dataset in sets]
    found = {}
    for name in (name for name in parts[0] if all(name in part for part in parts)):
      splits = [part[name] for part in parts]
      key = tuple(id(split.source) for split in splits)
      if key not in made:
        made[key] = _places(splits)
      found[name] = _compound(splits, made[key])
    return found

  return sets[0]._replace(
    splits=join('splits'),
    tests=join('tests'),
    counts=sum(dataset.counts for dataset in sets),
    fingerprint=fingerprint(domains),
  )


def seen_through(dataset: Dataset, joint: Dataset, number: int) -> Dataset:
  """Returns a domain that shares the arrays of the joint data, to save memory.

  Args:
    dataset: the domain.
    joint: what `joined` made of it and others.
    number: the position of the domain among them.
  """

  def through(own: Mapping[str, Split], whole: Mapping[str, Split]) -> dict[str, Split]:
    found = dict(own)
    for name, split in whole.items():
      if split.arrays and len(own[name].rows):
        first = int(split.rows[split.domain == number][0] - own[name].rows[0])
        found[name] = own[name]._replace(arrays=split.arrays, offset=first)
    return found

  return dataset._replace(
    splits=through(dataset.splits, joint.splits),
    tests=through(dataset.tests, joint.tests),
  )


def have_one_label_space(domains: Mapping[str, Dataset]) -> bool:
  """Returns whether the classes of all domains are the same, in the same order."""
  return len({dataset.class_names for dataset in domains.values()}) == 1


def united(
  domains: Mapping[str, Dataset],
  sources: Sequence[str],
  same: Mapping[str, Mapping[str, str]],
) -> dict[str, Dataset]:
  """Returns domains with labels in the union of the classes of several sources.

  In the union a class is called DOMAIN/NAME, or as `same` says, so classes of two
  sources are only merged if you say so. They are in the order of the sources. Other
  domains add no classes: each of theirs must be in the union.

  Args:
    domains: name -> data.
    sources: names of the domains whose classes make the union.
    same: domain -> {name of a class there: its name in the union}.

  Raises:
    UserError: a name that a domain does not have, or that is not in the union.
  """
  of_sources = [
    name for one in sources for name in _union_names(one, domains[one], same[one], True)
  ]
  union = {name: place for place, name in enumerate(dict.fromkeys(of_sources))}
  found = {}
  for name, dataset in domains.items():
    if dataset.class_names != (*union,):
      names = _union_names(name, dataset, same[name], name in sources)
      dataset = _relabelled(name, dataset, names, union)
    found[name] = dataset
  return found


def _union_names(
  name: str, dataset: Dataset, same: Mapping[str, str], prefixed: bool
) -> list[str]:
  """Returns the names of a domain's classes in the union."""
  for ours in same:
    lookup(dict.fromkeys(dataset.class_names), f'class of domain {name!r}', ours)
  return [
    same.get(ours, f'{name}/{ours}' if prefixed else ours)
    for ours in dataset.class_names
  ]


def _relabelled(
  domain: str, dataset: Dataset, names: Sequence[str], union: Mapping[str, int]
) -> Dataset:
  """Returns a data set with its labels moved to their classes in a union."""
  if dataset.described is not None or dataset.unseen is not None:
    raise UserError(
      f'domain {domain!r}: class_vectors and unseen need a single set of classes, but '
      'the sources have several'
    )
  for ours, name in zip(dataset.class_names, names, strict=True):
    if name not in union:
      raise UserError(
        f'domain {domain!r}: its class {ours!r} is none of the {len(union)} of the '
        f'sources: name it in same_classes of the domain{suggest(name, union)}'
      )
  places = np.array([union[name] for name in names], np.int32)
  counts = np.zeros(len(union), dataset.counts.dtype)
  np.add.at(counts, places, dataset.counts)

  def moved(splits: Mapping[str, Split]) -> dict[str, Split]:
    return {
      name: split._replace(labels=np.where(split.labels < 0, -1, places[split.labels]))
      for name, split in splits.items()
    }

  told = f'{dataset.fingerprint} as {[*union]} at {places.tolist()}'
  return dataset._replace(
    splits=moved(dataset.splits),
    tests=moved(dataset.tests),
    counts=counts,
    class_names=(*union,),
    fingerprint=hashlib.sha256(told.encode()).hexdigest(),
  )


def fingerprint(domains: Mapping[str, Dataset]) -> str:
  """Returns a SHA-256 over the fingerprints of domains; for one, its own."""
  if len(domains) == 1:
    return next(iter(domains.values())).fingerprint
  told = ' '.join(f'{name}:{domains[name].fingerprint}' for name in sorted(domains))
  return hashlib.sha256(told.encode()).hexdigest()


def shared(split: Split, others: Sequence[Split]) -> int:
  """Returns how many images of a split are images of some others, too.

  Images in memory are compared byte by byte, files and records by where they are.
  """
  in_memory = hasattr(split.source, 'images')
  others = [one for one in others if hasattr(one.source, 'images') == in_memory]
  if not in_memory:
    known = {one.source.where(row) for one in others for row in one.rows.tolist()}
    return sum(split.source.where(row) in known for row in split.rows.tolist())
  # A few values of each image settle it for data that differ.
  likely = np.zeros(len(split.rows), bool)
  known = set()
  for one in others:
    images, theirs = split.source.images, one.source.images
    if (images.shape[1:], images.dtype) != (theirs.shape[1:], theirs.dtype):
      continue
    ours, found = _samples(split), _samples(one)
    likely |= np.isin(ours, found)
    known |= _digests(theirs, one.rows[np.isin(found, ours)])
  return sum(
    digest in known
    for row in split.rows[likely]
    for digest in _digests(split.source.images, [row])
  )


COMPARED = 64
"""Values of an image that are compared before all of them are."""


def _samples(split: Split) -> np.ndarray:
  """Returns a few values of each image (N,) as one item of bytes."""
  shape = split.source.images.shape[1:]
  some = np.unique(np.linspace(0, np.prod(shape) - 1, COMPARED).astype(int))
  values = split.source.images[(split.rows[:, None], *np.unravel_index(some, shape))]
  values = np.ascontiguousarray(values)
  return values.view(np.dtype((np.void, values.dtype.itemsize * len(some))))[:, 0]


def _digests(images: np.ndarray, rows: Sequence[int]) -> set[bytes]:
  """Returns a digest of each image at `rows`."""
  return {hashlib.blake2b(images[row].tobytes()).digest() for row in rows}


def check_of_pixels(domains: Mapping[str, Dataset]) -> None:
  """Refuses a mix of domains with label maps and domains with one label per image.

  Raises:
    UserError: it names one of each.
  """
  maps = [name for name, dataset in domains.items() if dataset.of_pixels]
  others = [name for name in domains if name not in maps]
  if others:
    raise UserError(
      f'domain {maps[0]!r} has label maps, but {others[0]!r} has one label per image'
    )


def check_alike(domains: Mapping[str, Dataset], sizes: bool = True) -> None:
  """Refuses domains used in the same step that differ in classes or image shape.

  Args:
    domains: name -> data.
    sizes: whether height and width must be the same too.

  Raises:
    UserError: it names the first class, or the shapes, that differ.
  """
  (first, one), *others = domains.items()
  for name, other in others:
    pairs = zip(one.class_names, other.class_names, strict=False)
    for number, (ours, theirs) in enumerate(pairs):
      if ours != theirs:
        raise UserError(
          f'domains {first!r} and {name!r} must have the same classes in the same '
          f'order, but class {number} is {ours!r} in one and {theirs!r} in the other'
        )
    classes = len(one.class_names), len(other.class_names)
    if classes[0] != classes[1]:
      longer = max(one.class_names, other.class_names, key=len)
      raise UserError(
        f'domains {first!r} and {name!r} must have the same classes, but they have '
        f'{classes[0]} and {classes[1]}: {longer[min(classes)]!r} is in one only'
      )
    if one.dtype != other.dtype:
      raise UserError(
        f'the images of domain {first!r} are {one.dtype}, those of {name!r} '
        f'{other.dtype}'
      )
    first_size = one.image_shape[0 if sizes else 2 :]
    if first_size != other.image_shape[0 if sizes else 2 :]:
      raise UserError(
        f'the images of domain {first!r} are {_size(one)}, those of {name!r} '
        f'{_size(other)}: set data.size and data.channels'
      )


def _size(dataset: Dataset) -> str:
  return 'x'.join(map(str, dataset.image_shape))
