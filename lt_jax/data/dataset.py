"""A data set as a run uses it: a source, divided into splits."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lt_jax.data import generated, keeping, longtail
from lt_jax.data.attributes import Block, chosen_classes, class_vectors
from lt_jax.data.crops import Crop
from lt_jax.data.keeping import class_list
from lt_jax.data.masks import Window, without_classes
from lt_jax.data.resizing import brought_to
from lt_jax.data.sources import fingerprint, load_source, passed_over
from lt_jax.data.streams import Split
from lt_jax.errors import UserError, class_names

RESIDENT_LIMIT = 4 * 2**30
"""The largest source, in bytes of images, to keep in device memory."""


TESTS = ('test', 'open_test')
"""Splits that are only used for evaluation."""


class Dataset(NamedTuple):
  """The splits of an experiment.

  Test sets are kept apart, so nothing that is fitted, chosen or calibrated can get one
  by mistake.

  Attributes:
    splits: what a run can learn from: 'train' and, if requested, 'val', 'meta' and
      'open_val'; open images have label -1.
    tests: what it is evaluated on: 'test' and optionally 'open_test'.
    counts: (C,) int, training images per known class; training pixels if labels are
      maps.
    class_names: names of the C known classes. A target whose images have no classes
      gets the names of its source's.
    image_shape: (H, W, channels).
    fingerprint: SHA-256 of the data trained and evaluated on.
    passed_over: lines about data of the source that the run does not use.
    dtype: of the images: 'uint8', or 'float32' for features and other arrays.
    described: descriptions of the C classes; None if there are none.
    unseen: (C,) bool, classes that have only test images; None if there are none.
    val_classes: (C,) bool, seen classes that play unseen ones for validation; None if
      there are none.
  """

  splits: dict[str, Split]
  tests: dict[str, Split]
  counts: np.ndarray
  class_names: tuple[str, ...]
  image_shape: tuple[int, ...]
  fingerprint: str
  passed_over: tuple[str, ...] = ()
  dtype: str = 'uint8'
  described: Block | None = None
  unseen: np.ndarray | None = None
  val_classes: np.ndarray | None = None

  @property
  def class_vectors(self) -> np.ndarray | None:
    """(C, A) float64, the descriptions of the classes; None if there are none."""
    return None if self.described is None else self.described.vectors

  @property
  def of_pixels(self) -> bool:
    """Whether every pixel has a label, rather than every image."""
    return self.splits['train'].of_pixels

  @property
  def counted(self) -> str:
    """What `counts` counts: 'images' or 'pixels'."""
    return 'pixels' if self.of_pixels else 'images'

  @property
  def has_labels(self) -> bool:
    """Whether any training image has a class."""
    return bool(self.counts.any())

  @property
  def every(self) -> dict[str, Split]:
    """All splits by name, for inspecting data rather than learning from them."""
    return {**self.splits, **self.tests}


def load_dataset(
  source: str,
  *,
  to_device: Callable[[np.ndarray], Any],
  dir: str = '',
  size: int = 0,
  channels: int = 0,
  seed: int = 0,
  subset: str = 'seeded',
  keep_classes: str = '',
  known_classes: int = 0,
  profile: str = 'original',
  n_max: int = 0,
  imbalance: float = 1.0,
  test_per_class: int = 0,
  val_per_class: int = 0,
  meta_per_class: int = 0,
  meta_in_train: bool = False,
  open_val_per_class: int = 0,
  open_test_per_class: int = 0,
  train_split: str = 'train',
  test_split: str = 'test',
  meta_split: str = 'train',
  fake: Mapping[str, int] | None = None,
  image_size: int = 0,
  resize: int = 0,
  crop_area: float = 0.08,
  class_vectors: Sequence[str] = (),
  unseen: Sequence[str | int] = (),
  val_classes: Sequence[str | int] = (),
  window: Sequence[int] = (),
  scale: Sequence[float] = (1.0, 1.0),
  resize_to: Sequence[int] = (),
) -> Dataset:
  """Opens a source and draws the splits of an experiment from it.

  Args:
    source: such as 'digits' or 'tfds:NAME', see `lt_jax.data.sources.load_source`.
    to_device: puts the images of a small source into device memory.
    dir: the folder of TFDS data sets, TFDS's default if empty; for listed images, the
      folder they are relative to, that of the lists if empty.
    size: side that images in memory are resized to, once; 0 keeps their own.
    channels: likewise; grey is repeated.
    seed: for splits and subset; the same in all runs of a table.
    subset: 'seeded' draws at random, 'stored' takes the first images of each class.
    keep_classes: the classes to use, as if there were no others: a file with one name
      per line, names joined by +, or '-NAME', all but this one; empty: all.
    known_classes: classes from this one on form the open set; 0: all are known.
    profile: a key of `longtail.PROFILES`.
    n_max: images of the largest class; never derived from the source.
    imbalance: n_max / n_min.
    test_per_class: test images per class, split off the training images first; 0: use
      the source's test split.
    val_per_class: validation images per class, split off next; 0: use the source's
      validation split, if it has one.
    meta_per_class: images per class of a balanced meta set, split off next.
    meta_in_train: puts these back into training, on top of the tail cut from the rest.
    open_val_per_class: open validation images per class.
    open_test_per_class: open test images per class. If the source has a split of open
      images, that is the open test set.
    train_split: the split of the source to train on.
    test_split: the split of the source to test on.
    meta_split: the split of the source to take the meta set from, 'train' or 'val'.
    fake: for the source 'fake', see `generated.sources`.
    image_size: side of the square that images of many sizes are cropped to on the host;
      0: they have one size.
    resize: their short side in evaluation, before the central square is taken.
    crop_area: smallest share of an image in a random crop for training.
    class_vectors: files that describe the known classes, see `attributes`; none: the
      source's own, if it has any.
    unseen: classes of which no image, or pixel, is trained or validated on, see
      `attributes.chosen_classes`; none: the classes that the source says are unseen. If
      training and test images come from the same split, only unseen classes are tested.
    val_classes: seen classes that play unseen ones for validation.
    window: (height, width) of the random windows to train on if labels are maps, see
      `masks.Window`; (): whole images.
    scale: smallest and largest factor to resize these images by first.
    resize_to: (height, width) to resize images with label maps to before that; ():
      their own size. Evaluation uses their maps as they are.

  Raises:
    UserError: the source cannot provide the splits; it names the class.
  """
  sources = _opened(source, dir, fake, size, channels)
  if keep_classes and any(hasattr(one, 'label_map') for one in sources.values()):
    raise UserError(f'data.keep_classes is for labels of images, unlike {source!r}')
  if keep_classes:
    sources = keeping.keep_classes(sources, class_list(keep_classes), source)
  pool = _pool(sources, train_split, source)
  by_class = {
    'known_classes': known_classes,
    'imbalance': imbalance - 1,
    'n_max': n_max,
    'val_per_class': val_per_class,
    'meta_per_class': meta_per_class,
    'open_val_per_class': open_val_per_class,
    'val_classes': len(val_classes),
  }
  if hasattr(pool, 'label_map'):
    _check_unset(
      f'for images of one class each, but {source!r} has label maps',
      **by_class,
      test_per_class=test_per_class,
      open_test_per_class=open_test_per_class,
      image_size=image_size,
      resize=resize,
    )
    made = functools.partial(_window, window=window, scale=scale, resize_to=resize_to)
    views = _views(pool, len(pool.class_names), class_vectors, unseen, (), seed)
    whole = _with_maps(sources, pool, source, test_split, made, to_device, views.unseen)
    return views.of(whole, len(pool.class_names))
  crop = _crop(pool, source, image_size, resize, crop_area)
  if not pool.class_names:
    _check_unset(
      f'for images with classes, but those of {source!r} have none',
      ', or choose a recipe that needs no labels of a target',
      **by_class,
      profile=profile != 'original',
      meta_in_train=meta_in_train,
      class_vectors=len(class_vectors),
      unseen=len(unseen),
    )
    splits = {'train': (pool, np.arange(len(pool)))}
    return _dataset(sources, splits, 0, crop, to_device)
  if window or tuple(scale) != (1, 1) or resize_to:
    raise UserError(
      'data.window, data.scale and data.resize_to are for label maps, which '
      f'{source!r} does not have'
    )
  known = _known(known_classes, pool, source)
  from_val = _is_from_val(meta_split, meta_per_class, meta_in_train)
  views = _views(pool, known, class_vectors, unseen, val_classes, seed)
  seen = ~views.unseen
  counts = _train_counts(pool, seen[:known], profile, n_max, imbalance)
  if counts is None and meta_in_train:  # the rest can be empty: they are put back
    taken = test_per_class + val_per_class + meta_per_class
    counts = np.maximum(np.bincount(pool.labels, minlength=known)[:known] - taken, 0)
    counts *= seen[:known]
  draw = functools.partial(
    longtail.draw_splits, subset=subset, seed=seed, class_names=pool.class_names
  )
  drawn = draw(
    pool.labels,
    num_classes=len(pool.class_names),
    known_classes=known,
    test_per_class=test_per_class,
    val_per_class=val_per_class,
    meta_per_class=0 if from_val else meta_per_class,
    train_counts=counts,
    unseen=views.unseen,
    open_val_per_class=open_val_per_class,
    open_test_per_class=open_test_per_class,
    source=source,
  )
  if meta_in_train:
    drawn = _with_meta(drawn)
  splits = _own_splits(sources, known, source, test_split, bool(test_per_class), seen)
  if test_split == train_split and not seen.all() and not test_per_class:
    test, rows = splits['test']
    splits['test'] = test, rows[~seen[test.labels[rows]]]
  if from_val:
    splits |= _meta_from_val(splits, known, meta_per_class, draw, source)
  splits |= {name: (pool, rows) for name, rows in drawn.items()}
  return views.of(_dataset(sources, splits, known, crop, to_device), known)


def _opened(
  source: str, data_dir: str, fake: Mapping[str, int] | None, size: int, channels: int
) -> dict[str, Any]:
  """Returns split -> source, with arrays of one size and number of channels."""
  if source == 'fake':
    sources = generated.sources(**(fake or {}))
  else:
    sources = load_source(source, data_dir or None)
  return {n: brought_to(s, size, channels, source) for n, s in sources.items()}


def _check_unset(use: str, otherwise: str = '', **options: float) -> None:
  """Refuses options that do not suit the data; `use` says what they are for."""
  for name, value in options.items():
    if value:
      raise UserError(f'data.{name} is {use}: leave it at its default{otherwise}')


def _with_maps(
  sources: Mapping[str, Any],
  pool: Any,
  name: str,
  test_split: str,
  window: Callable[[Any, np.ndarray, str], Window | None],
  to_device: Callable[[np.ndarray], Any],
  unseen: np.ndarray,
) -> Dataset:
  """Returns the data set of sources with label maps, with their splits unchanged.

  A source used only for training, like GTA5, needs no test split. Pixels of unseen
  classes (C,) are void except in test images.

  Raises:
    UserError: no pixel of a split has a class, or test images have no maps.
  """
  used = {'train': pool}
  if 'val' in sources and test_split != 'val':
    used['val'] = sources['val']
  if unseen.any():
    used = {split: without_classes(one, unseen) for split, one in used.items()}
  if test_split in sources:
    used['test'] = sources[test_split]
  splits = {split: (one, np.arange(len(one))) for split, one in used.items()}
  for split, (one, rows) in splits.items():
    labelled = [one.has_map(row) for row in rows]
    if split != 'train' and not all(labelled):
      one.label_map(labelled.index(False))  # raises an error that says what is missing
    if any(labelled) and not one.class_pixels(rows).any():
      raise UserError(f'{name}: every pixel of the split {split!r} is void')
  crops = {split: window(*part, split) for split, part in splits.items()}
  made = _dataset(sources, splits, len(pool.class_names), crops['train'], to_device)

  def cropped(parts: Mapping[str, Split]) -> dict[str, Split]:
    return {split: one._replace(crop=crops[split]) for split, one in parts.items()}

  return made._replace(splits=cropped(made.splits), tests=cropped(made.tests))


def _window(
  source: Any,
  rows: np.ndarray,
  split: str,
  *,
  window: Sequence[int],
  scale: Sequence[float],
  resize_to: Sequence[int],
) -> Window | None:
  """Returns how to crop images with label maps; None if they are in memory.

  Raises:
    UserError: impossible sizes.
  """
  for key, pair in (('window', window), ('resize_to', resize_to)):
    whole = all(isinstance(side, int) and side > 0 for side in pair)
    if len(pair) not in (0, 2) or not whole:
      raise UserError(f'data.{key} is {pair!r}; it must be () or (height, width)')
  if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
    raise UserError(f'data.scale is {scale!r}; it must be (smallest, largest)')
  if not window and tuple(scale) != (1, 1):
    raise UserError('data.scale needs data.window, the size of training windows')
  if getattr(source, 'images', None) is not None:
    if window or resize_to:
      raise UserError(
        'images in memory are trained on as they are: set data.window and '
        'data.resize_to to ()'
      )
    return None
  sizes = source.sizes(rows)
  canvas = tuple(int(side) for side in sizes.max(0))
  if (sizes != sizes[:1]).any():
    other = int(np.argmax((sizes != sizes[:1]).any(1)))
    told = f'{source.where(0)} and {source.where(other)} differ in size'
    if split == 'train' and not (window or resize_to):
      raise UserError(f'{told}: set data.window to (height, width)')
    if split != 'train' and resize_to:
      raise UserError(
        f'{told}, so they are tested on as large as they are: set data.resize_to to ()'
      )
  made = Window(*(window or (0, 0)), tuple(scale), tuple(resize_to), canvas)
  if split == 'train':
    for row, size in zip(rows, sizes.tolist(), strict=True):
      made.check_fits(source.where(row), size)
  return made


def _pool(sources: Mapping[str, Any], train_split: str, name: str) -> Any:
  """Returns the split to draw training images from."""
  if train_split not in sources:
    raise UserError(
      f'source {name!r} has no split named {train_split}, only {", ".join(sources)}: '
      'set data.train_split'
    )
  return sources[train_split]


def _known(known_classes: int, pool: Any, name: str) -> int:
  """Returns the number of known classes; these come first, the others are open."""
  num_classes = len(pool.class_names)
  known = known_classes or num_classes
  if not 1 <= known <= num_classes:
    raise UserError(
      f'data.known_classes is {known}, but {name} has {num_classes} classes'
    )
  return known


class _Views(NamedTuple):
  """What is known about classes apart from their images.

  Attributes:
    described: descriptions of the known classes; None if there are none.
    unseen: (C,) bool over all classes, including open ones.
    val_classes: likewise.
  """

  described: Block | None
  unseen: np.ndarray
  val_classes: np.ndarray

  def of(self, dataset: Dataset, known: int) -> Dataset:
    """Returns a data set with these views of its known classes."""
    if self.described is None and not self.unseen.any():
      return dataset
    told = f'{dataset.fingerprint} unseen {self.unseen} validated {self.val_classes}'
    digest = hashlib.sha256(told.encode())
    if self.described is not None:
      digest.update(self.described.vectors.tobytes())
    return dataset._replace(
      described=self.described,
      unseen=self.unseen[:known] if self.unseen.any() else None,
      val_classes=self.val_classes[:known] if self.val_classes.any() else None,
      fingerprint=digest.hexdigest(),
    )


def _views(
  pool: Any,
  known: int,
  vectors: Sequence[str],
  unseen: Sequence[str | int],
  val_classes: Sequence[str | int],
  seed: int,
) -> _Views:
  """Returns the views of classes from the config, or else from the source."""
  names = tuple(pool.class_names)
  is_known = np.arange(len(names)) < known
  own, block = getattr(pool, 'described', None), None
  if vectors:
    block = class_vectors(vectors, names[:known])
  elif own is not None:
    block = Block(own.vectors[:known], own.columns)
  unseen = unseen or getattr(pool, 'unseen', ())
  is_unseen = chosen_classes('unseen', unseen, names, is_known, seed)
  images = np.bincount(pool.labels[pool.labels >= 0], minlength=len(names)) > 0
  learnt = is_known & images & ~is_unseen
  return _Views(
    block, is_unseen, chosen_classes('val_classes', val_classes, names, learnt, seed)
  )


def _train_counts(
  pool: Any, seen: np.ndarray, profile: str, n_max: int, imbalance: float
) -> np.ndarray | None:
  """Returns (known,) training images by a profile over the seen classes."""
  with class_names([pool.class_names[c] for c in np.flatnonzero(seen)]):
    counts = longtail.class_counts(profile, int(seen.sum()), n_max, imbalance)
  if counts is None or seen.all():
    return counts
  of_all = np.zeros(len(seen), counts.dtype)
  of_all[seen] = counts
  return of_all


def _is_from_val(meta_split: str, meta_per_class: int, meta_in_train: bool) -> bool:
  """Returns whether meta images come from the validation images."""
  if meta_split not in ('train', 'val'):
    raise UserError(f"data.meta_split is {meta_split!r}; it must be 'train' or 'val'")
  from_val = meta_split == 'val' and bool(meta_per_class)
  if from_val and meta_in_train:
    raise UserError('data.meta_in_train: the meta images come from another split, val')
  return from_val


def _with_meta(drawn: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns drawn rows with the meta images added to the training images."""
  if 'meta' not in drawn:
    raise UserError('data.meta_in_train needs a meta set: set data.meta_per_class')
  return {**drawn, 'train': np.union1d(drawn['train'], drawn['meta'])}


def _dataset(
  sources: Mapping[str, Any],
  splits: Mapping[str, tuple[Any, np.ndarray]],
  known: int,
  crop: Crop | Window | None,
  to_device: Callable[[np.ndarray], Any],
) -> Dataset:
  """Makes a data set from (source, rows) by split, and puts its images in place.

  Args:
    sources: all sources, by their own names.
    splits: split -> (source, rows), the ones in use.
    known: number of known classes.
    crop: how images are cropped on the host; None if they have one size.
    to_device: puts the images of a small source into device memory.
  """
  arrays = {id(s): {} if crop else _resident(s, to_device) for s, _ in splits.values()}
  prints = [f'{n}:{fingerprint(s, rows)}' for n, (s, rows) in sorted(splits.items())]
  cut = {
    name: Split(
      source=origin,
      rows=np.asarray(rows),
      labels=np.where(origin.labels[rows] < known, origin.labels[rows], -1),
      arrays=arrays[id(origin)],
      crop=crop,
    )
    for name, (origin, rows) in splits.items()
  }
  for name, split in cut.items():
    _check_classes(split, known, name)
  train = cut['train']
  return Dataset(
    splits={name: split for name, split in cut.items() if name not in TESTS},
    tests={name: split for name, split in cut.items() if name in TESTS},
    counts=train.counts(known),
    class_names=tuple(train.source.class_names[:known]),
    image_shape=train.image_shape,
    fingerprint=hashlib.sha256(' '.join(prints).encode()).hexdigest(),
    passed_over=_passed_over(sources, [origin for origin, _ in splits.values()]),
    dtype=train.dtype.name,
  )


def _check_classes(split: Split, known: int, name: str) -> None:
  """Refuses several classes an image that are not those of the data set."""
  classes = split.numbers().get('classes')
  if classes is None:
    return
  if classes.shape != (len(split.rows), known):
    raise UserError(
      f"split {name!r}: the attribute 'classes' has the shape {classes.shape}, but "
      f'there are {len(split.rows)} images and {known} classes: images with several '
      'classes are used with all classes'
    )
  if not np.isin(classes, (-1, 0, 1)).all():
    raise UserError(
      f"split {name!r}: the attribute 'classes' must be 1, 0, or -1 where it is not "
      'known'
    )


def _passed_over(sources: Mapping[str, Any], used: Sequence[Any]) -> tuple[str, ...]:
  """Returns lines about data of the source that the run does not use."""
  ids = {id(one) for one in used}
  unused = [name for name, one in sources.items() if id(one) not in ids]
  told = passed_over({n: one for n, one in sources.items() if n not in unused})
  return told + tuple(f'{n}: the split {n!r} of the source is not used' for n in unused)


def _own_splits(
  sources: dict[str, Any],
  known: int,
  name: str,
  test_split: str,
  cut: bool,
  seen: np.ndarray,
) -> dict[str, Any]:
  """Returns the source's splits other than 'train', with open classes separate.

  Args:
    sources: split -> source.
    known: number of known classes; the others are open.
    name: name of the source.
    test_split: the split to test on.
    cut: the test set is split off the training images instead.
    seen: (C,) bool; other classes only have test images.

  Returns:
    'val', 'test' and 'open_test', if they exist -> (source, rows).
  """
  splits = {}
  if 'val' in sources and (cut or test_split != 'val'):
    val = sources['val']
    splits['val'] = (val, np.flatnonzero((val.labels < known) & seen[val.labels]))
  if not cut:
    if test_split not in sources:
      has_val = 'val' in sources
      instead = ", or data.test_split to 'val' to test on that" if has_val else ''
      raise UserError(
        f'source {name!r} has no {test_split} split, only {", ".join(sources)}: set '
        f'data.test_per_class to split one off{instead}'
      )
    test = sources[test_split]
    is_known = test.labels < known
    if not is_known.any():
      raise UserError(
        f'source {name!r}: no image of the split {test_split} is of a known class, so '
        'there is nothing to classify: add some, such as in a list test.txt'
      )
    splits['test'] = (test, np.flatnonzero(is_known))
    if not is_known.all():
      splits['open_test'] = (test, np.flatnonzero(~is_known))
  if 'open' in sources:
    if known < len(sources['open'].class_names):
      raise UserError(
        f'source {name!r} has open images of its own: set data.known_classes to 0'
      )
    splits['open_test'] = (sources['open'], np.arange(len(sources['open'])))
  return splits


def _meta_from_val(
  splits: dict[str, Any],
  known: int,
  meta_per_class: int,
  draw: Callable[..., dict[str, np.ndarray]],
  name: str,
) -> dict[str, Any]:
  """Returns 'meta', and 'val' without its images, as (source, rows)."""
  if 'val' not in splits:
    raise UserError(f'source {name!r} has no val images to take a meta set from')
  val, rows = splits['val']
  drawn = draw(
    val.labels[rows],
    num_classes=known,
    meta_per_class=meta_per_class,
    source=f'{name}, split val',
  )
  return {'meta': (val, rows[drawn['meta']]), 'val': (val, rows[drawn['train']])}


def _crop(
  pool: Any, name: str, image_size: int, resize: int, area: float
) -> Crop | None:
  """Returns how to crop images; None if they have one size and keep it."""
  if not image_size:
    if None in pool.image_shape:
      raise UserError(f'the images of {name!r} differ in size: set data.image_size')
    return None
  if not hasattr(pool, 'encoded'):
    raise UserError(
      f'the images of {name!r} are in memory as {pool.image_shape}: set '
      'data.image_size to 0, which is for files of many sizes'
    )
  if resize < image_size:
    raise UserError(f'data.resize is {resize}, less than data.image_size {image_size}')
  return Crop(image_size, resize, area)


def _resident(source: Any, to_device: Callable[[np.ndarray], Any]) -> Any:
  """Returns a small source's images on the device; {} streams them from the host."""
  images = getattr(source, 'images', None)
  if images is None or images.nbytes > RESIDENT_LIMIT:
    return {}
  maps = getattr(source, 'maps', None)
  arrays = {'image': images} if maps is None else {'image': images, 'label': maps}
  return {name: to_device(values) for name, values in arrays.items()}
