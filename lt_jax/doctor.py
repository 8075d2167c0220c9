"""What is wrong with a run, before it is long.

  python -m lt_jax.doctor --config=configs/digits_lt.py:ldam_drw [--workdir=DIR]

Looks at the machine, the folder, the images and their labels, makes a step of every
stage, learns one batch by heart, and says a line of each thing: ok, odd (runs, but look
at it), wrong (would fail, or its numbers would mean nothing) or skip. Ends with 2 if
something is wrong, else with 0. Nothing stays in the folder.
"""

import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import glob
import hashlib
import inspect
import io
import itertools
import math
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath

from lt_jax import build, checkpoint, commands, files, results, run, sharding, train
from lt_jax.data import crops, longtail
from lt_jax.data.dataset import Dataset, load_dataset
from lt_jax.data.lists import Files
from lt_jax.data.reading import usable_cores
from lt_jax.data.streams import Split
from lt_jax.errors import UserError
from lt_jax.method import State
from lt_jax.stage import MOST_BAD

CONFIG, WORKDIR = commands.config_flag(), commands.workdir_flag()
THOROUGH = flags.DEFINE_bool(
  'thorough', False, 'Decode every image and hash every record, not a sample.'
)

SAMPLE = 256
"""Images of a split that are decoded."""

HASHED = 50_000
"""Records up to which all are read for duplicates; files are told apart by size."""

TOLERATED = 1e-3
"""Share of a split up to which images that are there twice are odd and not wrong."""

FAR = 0.5
"""Mean of the normalised pixels, from 0, that is odd."""

FACTOR = 1.5
"""By which their standard deviation may differ from 1."""

BY_HEART, BUDGET = 60, 60.0
"""Steps on one batch, and seconds after which no more are made."""

NETWORKS = ('nfs', 'nfs4', 'cifs', 'smb3', 'lustre', 'ceph', '9p', 'gpfs', 'beegfs')
MEMORY = ('tmpfs', 'ramfs')
"""File systems by their names in /proc/mounts; those of fuse are known by a prefix."""


class Finding(NamedTuple):
  """What a check says.

  Attributes:
    level: 'ok', 'odd', 'wrong' or 'skip'.
    text: one line.
  """

  level: str
  text: str


ok, odd, wrong, skip = (
  functools.partial(Finding, level) for level in ('ok', 'odd', 'wrong', 'skip')
)
Findings = Iterator[Finding]


class Missing(Exception):
  """A check cannot be made, for want of what an earlier one did not find."""


class Trial(NamedTuple):
  """A stage whose step is compiled.

  Attributes:
    stage: of the run.
    state: where it begins, with the clock at the end of the warm-up.
    batches: payloads of two steps, placed on the devices.
    update: (state, payloads) -> (state, metrics, whether they are finite); consumes the
      state.
    compile_seconds: what compiling took.
    memory: component -> bytes on a device.
  """

  stage: build.Stage
  state: State
  batches: tuple[Any, Any]
  update: Callable[[State, Any], tuple[State, dict[str, np.ndarray], bool]]
  compile_seconds: float
  memory: dict[str, float]


class Step(NamedTuple):
  """What one step from the first state came to.

  Attributes:
    loss: before it.
    finite: whether metrics and the state after it are.
    moved: of each array of parameters, whether it changed.
    blind: whether another batch gave the very same parameters.
    seconds: of a step that is compiled.
  """

  loss: float
  finite: bool
  moved: dict[str, bool]
  blind: bool
  seconds: float


class Case:
  """A configuration, and what the checks have found out about it.

  Attributes:
    config: resolved.
    workdir: the folder of the run, or None.
    thorough: whether to look at all images.
    sizes: split -> (N, 2) widths and heights of those images that are files.
    trials: stage -> its compiled step.
    steps: stage -> what it came to.
  """

  def __init__(
    self, config: build.Config, workdir: str | None = None, thorough: bool = False
  ):
    self.config = config
    self.workdir = files.absolute(workdir) if workdir else None
    self.thorough = thorough
    self.sizes: dict[str, np.ndarray] = {}
    self.trials: dict[str, Trial] = {}
    self.steps: dict[str, Step] = {}
    self._experiment: build.Experiment | None = None
    self._dataset: Dataset | None = None

  def open(self) -> Findings:
    """Builds everything, or at least opens the data."""
    # Without a folder there is no stage that was begun.
    workdir = self.workdir or epath.Path(os.devnull)
    try:
      self._experiment = run.rehearsed(self.config, workdir)
      self._dataset = self._experiment.dataset
    except UserError as error:
      yield wrong(str(error))
      yield from self._open_data(str(error))
      return
    stages = self._experiment.stages.values()
    told = ', '.join(f'{s.name} {s.plan.steps:,}' for s in stages)
    yield ok(f'networks, methods and surgeries fit together; steps: {told}')

  def _open_data(self, told: str) -> Findings:
    """Opens the data alone; says what is wrong with them unless that was told."""
    keys = inspect.signature(load_dataset).parameters
    options = {k: v for k, v in self.config['data'].items() if k in keys}
    try:
      self._dataset = load_dataset(**options, to_device=lambda images: images)
    except UserError as error:
      if str(error) != told:
        yield wrong(str(error))

  @property
  def experiment(self) -> build.Experiment:
    """The objects of the run."""
    if self._experiment is None:
      raise Missing('the configuration cannot be built')
    return self._experiment

  @property
  def dataset(self) -> Dataset:
    """Its data."""
    if self._dataset is None:
      raise Missing('the data cannot be opened')
    return self._dataset

  @property
  def real(self) -> Dataset:
    """Its data, if they are anything to look at."""
    if self.config['data']['source'] == 'fake':
      raise Missing('the images are generated')
    return self.dataset

  @property
  def folder(self) -> epath.Path:
    """The folder of the run."""
    if self.workdir is None:
      raise Missing('no --workdir is given')
    return self.workdir

  @functools.cached_property
  def sample(self) -> np.ndarray:
    """(n, H, W, channels) uint8, training images as evaluation sees them."""
    split = self.real.splits['train']
    images, _ = _each(split.image, _some(split.rows))
    if len({image.shape for image in images}) != 1:
      raise Missing('no training images of one size can be read')
    return np.stack(images)


# The machine.


def versions(case: Case) -> Findings:
  """Says what is installed, and where JAX runs."""
  yield ok(', '.join(f'{k} {v}' for k, v in results.versions().items()))
  kind = jax.devices()[0].device_kind
  yield ok(f'{jax.device_count()} x {jax.default_backend()} {kind}')


def accelerators(case: Case) -> Findings:
  """Looks for an accelerator that JAX passes over."""
  drivers = {'nvidia': 'cuda', 'accel': 'tpu'}
  for name, extra in drivers.items():
    if glob.glob(f'/dev/{name}[0-9]*') and jax.default_backend() == 'cpu':
      yield odd(
        f'/dev has {name} devices, but JAX runs on the CPU: install lt_jax[{extra}], '
        'or see whether another process holds them'
      )


def cores(case: Case) -> Findings:
  """Compares data workers with cores."""
  workers, found = case.config['data']['workers'], usable_cores()
  if workers > found:
    yield odd(f'data.workers is {workers}, but this process may use {found} cores')
  else:
    yield ok(f'{found} cores, data.workers {workers}')


def idle_devices(case: Case) -> Findings:
  """Counts devices that the batches leave out."""
  idle = jax.device_count() - case.experiment.mesh.size
  if idle:
    yield odd(f'{idle} of {jax.device_count()} devices idle: batches do not divide')


# The folder.


def writable(case: Case) -> Findings:
  """Writes, renames and locks beside where the run will."""
  folder, content = case.folder, os.urandom(2**16)
  if files.is_remote(folder):
    probe = folder / '.doctor'
    files.write_atomically(probe, content)
    same = probe.read_bytes() == content
    probe.unlink()
  else:
    try:
      with tempfile.TemporaryDirectory(prefix='.doctor.', dir=_existing(folder)) as own:
        probe = epath.Path(own) / 'probe'
        for text in (b'', content):  # the second replaces the first
          files.write_atomically(probe, text)
        same = probe.read_bytes() == content
        yield from _locks(epath.Path(own))
    except OSError as error:
      yield wrong(f'workdir {folder} cannot be written: {error.strerror}')
      return
  yield (
    ok(f'{folder} can be written and read back')
    if same
    else wrong(f'{folder}: what was written is not what is read')
  )


def _existing(folder: epath.Path) -> epath.Path:
  """Returns a folder, or the first of those it lies in that is there."""
  return next(path for path in (folder, *folder.parents) if path.exists())


def _locks(folder: epath.Path) -> Findings:
  """Takes a lock that is held."""
  with files.locked(folder):
    try:
      with files.locked(folder):
        yield odd('locks do not hold there: start no second run in this folder')
    except UserError:
      yield ok('locks hold there')


def file_system(case: Case) -> Findings:
  """Tells whether the folder outlives the machine."""
  folder = case.folder
  if files.is_remote(folder):
    yield ok('the folder is in an object store')
    return
  kind = _file_system(os.fspath(_existing(folder)))
  if kind in MEMORY:
    yield odd(f'the folder is in memory ({kind}): it is gone when the machine is')
  elif kind in NETWORKS or kind.startswith('fuse'):
    yield odd(f'the folder is on a network ({kind}): saving may be slow')
  else:
    yield ok(f'the folder is on {kind or "an unknown file system"}')


def _file_system(path: str) -> str:
  """Returns the kind of file system a path is on; '' where that is not to be known."""
  mounts = pathlib.Path('/proc/mounts')
  if not mounts.exists():
    return ''
  lines = [line.split() for line in mounts.read_text().splitlines()]
  path = os.path.realpath(path)
  above = [
    (len(at), index, kind)
    for index, (_, at, kind, *_) in enumerate(lines)
    if os.path.commonpath([at, path]) == at
  ]
  return max(above)[2] if above else ''


def begun(case: Case) -> Findings:
  """Compares the run with the one that the folder holds."""
  folder = case.folder
  if not files.is_remote(folder) and _held(folder / 'lock'):
    yield wrong('the folder is in use by a run')
  if (folder / 'config.json').exists():
    run.check_config(case.config, folder)
    run.check_data(case.experiment, folder)
    yield ok('the folder holds this run: it will go on')
  else:
    yield ok('the folder holds no run yet')


def _held(path: epath.Path) -> bool:
  """Returns whether a process holds a lock file."""
  with contextlib.suppress(FileNotFoundError, NotADirectoryError), path.open() as file:
    try:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
  return False


def space(case: Case) -> Findings:
  """Compares free space with that of the checkpoints."""
  folder = case.folder
  if files.is_remote(folder):
    return
  keep = case.config['keep_checkpoints'] + 1
  stages = case.experiment.stages.values()
  one = [_size(train.state_shapes(s.method, s.streams)) for s in stages]
  needed, free = keep * sum(one), shutil.disk_usage(_existing(folder)).free
  told = f'{keep} checkpoints a stage take {_bytes(needed)}, {_bytes(free)} are free'
  yield wrong(told) if needed > free else ok(told)


def _size(state: State) -> int:
  """Returns the bytes of what a checkpoint holds."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def _bytes(size: float) -> str:
  return f'{size / 1e9:,.2f} GB' if size >= 1e8 else f'{size / 1e6:,.2f} MB'


# The data.


def splits(case: Case) -> Findings:
  """Says how many images there are."""
  dataset = case.dataset
  for name, split in dataset.splits.items():
    labels, classes = split.labels, len(dataset.class_names)
    beyond = (labels < -1) | (labels >= classes)
    beyond |= (labels == -1) != name.startswith('open')
    if beyond.any():
      yield wrong(f'{name}: label {labels[beyond][0]} is none of {classes} classes')
    there = len(np.unique(labels))
    told = '' if name.startswith('open') else f' of {there} of {classes} classes'
    yield ok(f'{name}: {len(labels):,} images{told}')


def readable(case: Case) -> Findings:
  """Opens all image files, and decodes those that look cut off and a sample."""
  skips = build.ON_BAD_IMAGE.get(case.config['data']['on_bad_image'], False)
  in_memory = []
  for name, split in case.real.splits.items():
    source = split.source
    if not hasattr(source, 'encoded'):
      in_memory.append(name)
      continue
    found, bad = _each(functools.partial(_opened, source), split.rows)
    case.sizes[name] = np.array(found).reshape(-1, 2)
    chosen = split.rows if case.thorough else _some(split.rows)
    _, also = _each(functools.partial(_decoded, source), chosen)
    told = list(dict.fromkeys(map(str, (*bad, *also))))
    if told:
      replaced = skips and name in ('train', 'meta')
      few = len(told) <= max(1, MOST_BAD * len(split.rows))
      level = odd if replaced and few else wrong
      yield level(
        f'{name}: images that cannot be read: {len(told):,}, such as {told[0]}'
      )
    else:
      yield ok(f'{name}: {len(found):,} files open, {len(chosen):,} were decoded')
  if in_memory:
    yield ok(f'the images of {", ".join(in_memory)} are arrays in memory')


def _each(
  function: Callable[[int], Any], rows: Iterable[int]
) -> tuple[list[Any], list[UserError]]:
  """Returns what a function gives of rows, in threads, and what it refuses."""

  def safe(row: int) -> Any:
    try:
      return function(int(row))
    except UserError as error:
      return error

  with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
    found = list(pool.map(safe, rows))
  bad = [one for one in found if isinstance(one, UserError)]
  return [one for one in found if not isinstance(one, UserError)], bad


def _some(rows: np.ndarray) -> np.ndarray:
  """Returns `SAMPLE` rows, the same ones each time, or all."""
  few = min(SAMPLE, len(rows))
  return np.sort(np.random.default_rng(0).choice(rows, few, replace=False))


_ENDS = {'JPEG': b'\xff\xd9', 'PNG': b'IEND'}
"""What whole files of a format have within their last `_TAIL` bytes."""

_TAIL = 1024


def _opened(source: Any, row: int) -> tuple[int, int]:
  """Returns (width, height) by the header of a file; decodes one that looks cut off."""
  from PIL import Image

  errors = (*crops.DECODE_ERRORS, Image.DecompressionBombError)
  try:
    with (
      _file(source, row) as file,
      Image.open(file, formats=crops.FORMATS) as image,
    ):
      file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
      if _ENDS.get(image.format, b'') in file.read():
        return image.size
  except errors:
    pass
  return _decoded(source, row)


def _file(source: Any, row: int) -> BinaryIO:
  """Opens an image as a file, of which perhaps not all is read."""
  if isinstance(source, Files):
    return open(source.where(row), 'rb')
  return io.BytesIO(source.encoded(row))


def _decoded(source: Any, row: int) -> tuple[int, int]:
  """Returns (width, height) of an image that can be decoded.

  Raises:
    UserError: it cannot.
  """
  height, width, _ = crops.pixels(source.encoded(row), source.where(row)).shape
  return width, height


class Picture(NamedTuple):
  """An image among those that may be the same.

  Attributes:
    split: name of its split.
    label: its class, -1 if open.
    source: where it is.
    row: there.
  """

  split: str
  label: int
  source: Any
  row: int

  def __str__(self) -> str:
    """Returns its name for a person."""
    where = getattr(self.source, 'where', '#{}'.format)(self.row)
    return f'{where} ({self.split})'

  def is_record(self) -> bool:
    """Returns whether all of it must be read to know its size."""
    return hasattr(self.source, 'encoded') and not isinstance(self.source, Files)

  def size(self) -> int:
    """Returns a number that is the same of equal images, and costs nothing."""
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
  """Looks for the same image twice: in two splits, with two labels, in training."""
  pictures = _pictures(case)
  records = [p for p in pictures if p.is_record()]
  if len(records) > HASHED and not case.thorough:
    raise Missing(f'{len(records):,} records would be read: give --thorough')
  alike = [p for group in _equal(pictures, Picture.size) for p in group]
  same = _equal(alike, Picture.digest)
  if not same:
    told = f'no image is there twice: {len(alike):,} of {len(pictures):,} were hashed'
    fewer = len(alike) < len(pictures)
    yield ok(told + (', as the others differ in size' if fewer else ''))
  yield from _across(case.dataset.splits, same)
  yield from _within(same)
  yield from _two_labels(case.dataset, same, len(pictures))


def _pictures(case: Case) -> list[Picture]:
  """Returns all images but those of a meta set that is part of training."""
  return [
    Picture(name, label, split.source, row)
    for name, split in case.real.splits.items()
    if name != 'meta' or not case.config['data']['meta_in_train']
    for label, row in zip(split.labels.tolist(), split.rows.tolist(), strict=True)
  ]


def _equal(
  pictures: Sequence[Picture], key: Callable[[Picture], Any]
) -> list[list[Picture]]:
  """Returns the groups of two and more with one key; what cannot be read is in none."""
  groups = collections.defaultdict(list)
  found, _ = _each(lambda i: (key(pictures[i]), pictures[i]), range(len(pictures)))
  for value, picture in found:
    groups[value].append(picture)
  return [group for group in groups.values() if len(group) > 1]


def _level(count: int, of: int) -> Callable[[str], Finding]:
  """Returns `odd` for a few, `wrong` for many."""
  return wrong if count > TOLERATED * of else odd


def _across(splits: Mapping[str, Split], same: Sequence[Sequence[Picture]]) -> Findings:
  """Tells of images in two splits."""
  for a, b in itertools.combinations(splits, 2):
    both = [group for group in same if {a, b} <= {picture.split for picture in group}]
    if both:
      one, two = (next(p for p in both[0] if p.split == name) for name in (a, b))
      fewer = min(len(splits[a].rows), len(splits[b].rows))
      yield _level(len(both), fewer)(
        f'images in {a} and in {b}: {len(both):,}, such as {one} = {two}'
      )


def _within(same: Sequence[Sequence[Picture]]) -> Findings:
  """Tells of images that are trained on more than once."""
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
  """Tells of images with two labels."""
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
  """Looks for classes without images, and for names of two classes."""
  dataset = case.dataset
  doubled = [n for n, k in collections.Counter(dataset.class_names).items() if k > 1]
  if doubled:
    yield odd(f'names of two classes: {len(doubled)}, such as {doubled[0]!r}')
  for name in ('train', 'test'):
    empty = np.flatnonzero(_per_class(dataset, name) == 0)
    if empty.size:
      first = dataset.class_names[empty[0]]
      level = wrong if name == 'train' else odd
      yield level(f'classes without images in {name}: {empty.size}, such as {first!r}')


def _per_class(dataset: Dataset, name: str) -> np.ndarray:
  """Returns (C,) the images of each class in a split."""
  labels = dataset.splits[name].labels
  return np.bincount(labels[labels >= 0], minlength=len(dataset.class_names))


def tail(case: Case) -> Findings:
  """Describes the long tail, and compares it with what the configuration states."""
  counts, data = case.dataset.counts, case.config['data']
  ordered = np.sort(counts)[::-1]
  yield ok(
    f'training images a class: most {ordered[0]:,}, median {np.median(ordered):,g}, '
    f'fewest {ordered[-1]:,}; imbalance {ordered[0] / max(ordered[-1], 1):,.4g}, Gini '
    f'coefficient {_gini(counts):.3f}; the tail is {_shape(ordered)}'
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
      f'data.profile {data["profile"]!r} states {stated[off]} images of class {off}, '
      f'there are {counts[off]}'
    )


def _gini(counts: np.ndarray) -> float:
  """Returns the Gini coefficient of counts: 0 if they are equal, near 1 if one has all.

  It is sum_i (2 i - C - 1) n_i / (C sum_i n_i), n ascending, i from 1.
  """
  n, total = len(counts), counts.sum()
  ranks = 2 * np.arange(1, n + 1) - n - 1
  return float(ranks @ np.sort(counts) / (n * max(total, 1)))


def _shape(ordered: np.ndarray) -> str:
  """Returns what counts from the most to the fewest look like."""
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
  groups = longtail.shot_groups(case.dataset.counts, many, few)
  told = ', '.join(f'{mask.sum()} {name}' for name, mask in groups.items())
  yield ok(f'classes with over {many}, between, and under {few} images: {told}')
  for name, mask in groups.items():
    if not mask.any():
      yield odd(f'no class is {name}-shot: metrics of that group will be empty')


def balanced_test(case: Case) -> Findings:
  """Tells whether accuracy over images is that over classes."""
  counts = _per_class(case.dataset, 'test')
  there = counts[counts > 0]
  if there.size and there.max() > 1.1 * there.min():
    yield odd(
      f'test has {there.min():,} to {there.max():,} images a class: accuracy over '
      'images and over classes (macro_accuracy) differ'
    )
  else:
    yield ok('test is balanced')


# The images.


def normalisation(case: Case) -> Findings:
  """Compares data.mean and data.std with the pixels of a sample."""
  data, channels = case.config['data'], case.sample.reshape(-1, case.sample.shape[-1])
  pixels = channels / 255
  seen = (pixels.mean(0), pixels.std(0))
  normal = (pixels - np.array(data['mean'])) / np.array(data['std'])
  mean, std = normal.mean(0), normal.std(0)
  told = (
    f'the pixels of {len(case.sample)} training images have mean {_numbers(seen[0])} '
    f'and deviation {_numbers(seen[1])}, normalised {_numbers(mean)} and '
    f'{_numbers(std)}'
  )
  if np.abs(mean).max() > FAR or std.max() > FACTOR or std.min() < 1 / FACTOR:
    yield odd(
      f'{told}, far from 0 and 1: see data.mean {_numbers(data["mean"])} and data.std '
      f'{_numbers(data["std"])}'
    )
  else:
    yield ok(told)


def _numbers(values: Iterable[float]) -> str:
  return ' '.join(f'{value:.3g}' for value in values)


def constant(case: Case) -> Findings:
  """Counts images of one colour."""
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
      yield odd(f'{name}: images over five times as long as wide: {strips:,}')
    if 2 * small > len(found):
      yield odd(f'{name}: images smaller than data.image_size {side}: {small:,}')


# A step.


def compiles(case: Case) -> Findings:
  """Compiles the step of every stage that trains."""
  for name, stage in case.experiment.stages.items():
    if not stage.plan.steps:
      yield ok(f'{name}: makes no steps')
    elif stage.reads:
      yield skip(f'{name}: learns from what another stage is yet to leave')
    else:
      try:
        trial = case.trials[name] = _trial(case, stage)
      except (UserError, jax.errors.JaxRuntimeError) as error:
        yield wrong(f'{name}: {_line(error)}')
      else:
        yield ok(f'{name}: compiled in {trial.compile_seconds:.1f} s')


def _trial(case: Case, stage: build.Stage) -> Trial:
  """Begins a stage and compiles its step, as the loop does."""
  from lt_jax import plan  # whose flags are not those of this command

  mesh, method, streams = case.experiment.mesh, stage.method, stage.streams
  arrays = {name: stream.arrays for name, stream in streams.items()}
  key = jax.random.key(case.config['seed'])
  state = train.initial_state(method, streams, key, mesh)
  if stage.start:
    state, _ = stage.start(state)
  period = math.lcm(*(stream.every for stream in streams.values()))
  clock = _warmed_up(case, stage)
  clock += -clock % period  # so that every stream is there
  state = state.replace(step=sharding.put_replicated(mesh, np.int32(clock)))
  zeros, bad = train.empty_totals(method, streams, state, mesh)
  batches = tuple(_placed(streams, step, mesh) for step in (clock, clock + period))
  began = time.perf_counter()
  program = train.make_update(method, streams, mesh, 1)
  compiled = program.lower(state, zeros, bad, arrays, batches[0]).compile()
  seconds = time.perf_counter() - began

  def update(state: State, payloads: Any) -> tuple[State, dict[str, Any], bool]:
    state, totals, first_bad = compiled(state, zeros, bad, arrays, payloads)
    means = {k: train.means(*v) for k, v in jax.device_get(totals).items()}
    return state, means, int(first_bad) < 0

  analysis = compiled.memory_analysis()
  memory = plan.memory_of(analysis, state, arrays, batches[0], mesh.size)
  return Trial(stage, state, batches, update, seconds, memory)


def _warmed_up(case: Case, stage: build.Stage) -> int:
  """Returns the step at which the learning rate of a stage has risen, if it has one."""
  schedule = build.stage_config(case.config, stage.name)['schedule']
  steps = math.ceil(schedule.get('warmup_epochs', 0) * stage.epoch_steps)
  return min(steps, stage.plan.steps - 1)


def _placed(streams: Mapping[str, Any], step: int, mesh: Any) -> Any:
  """Returns the payloads of a step on the devices."""
  one = jax.tree.map(lambda x: x[None], train.payloads_at(streams, step))
  return sharding.put_batch(mesh, one, leading=1)


def _copied(state: State) -> State:
  """Returns a state that a step may consume."""
  return jax.tree.map(lambda x: x.copy(), state)


def one_step(case: Case) -> Findings:
  """Makes a step of every stage from fresh parameters."""
  for name, trial in _trials(case).items():
    step = case.steps[name] = _made(trial)
    length = trial.stage.plan.steps
    yield ok(
      f'{name}: a step takes {1e3 * step.seconds:,.4g} ms, {length:,} of them '
      f'{_duration(length * step.seconds)}, evaluation apart'
    )


def _duration(seconds: float) -> str:
  units = {'days': 86400, 'h': 3600, 'min': 60, 's': 1}
  unit = next((name for name, size in units.items() if seconds > 2 * size), 's')
  return f'{seconds / units[unit]:,.1f} {unit}'


def _trials(case: Case) -> dict[str, Trial]:
  if not case.trials:
    raise Missing('no step was compiled')
  return case.trials


def _steps(case: Case) -> dict[str, Step]:
  if not case.steps:
    raise Missing('no step was made')
  return case.steps


def _made(trial: Trial) -> Step:
  """Makes a step from the first state, then another one on another batch."""
  before = jax.device_get(trial.state.params)
  after, values, finite = trial.update(_copied(trial.state), trial.batches[0])
  seconds = []
  for _ in range(3):  # of which the shortest was disturbed least
    state = jax.block_until_ready(_copied(trial.state))
    began = time.perf_counter()
    other, _, _ = trial.update(state, trial.batches[1])
    jax.block_until_ready(other)
    seconds.append(time.perf_counter() - began)
  finite = finite and checkpoint.all_finite(after)
  after, other = jax.device_get((after.params, other.params))
  changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
  apart = jax.tree.map(lambda a, b: not np.array_equal(a, b), after, other)
  paths = jax.tree_util.tree_leaves_with_path(changed)
  return Step(
    loss=float(values.get('loss', np.nan)),
    finite=finite,
    moved={
      jax.tree_util.keystr(path, simple=True, separator='/'): v for path, v in paths
    },
    blind=not any(jax.tree.leaves(apart)),
    seconds=min(seconds),
  )


def loss_at_start(case: Case) -> Findings:
  """Compares the first loss with that of a guess, where that is known."""
  for name, step in _steps(case).items():
    guess = _guess(case, name)
    told = f'{name}: the loss begins at {step.loss:.4g}'
    if not step.finite:
      yield wrong(f'{told}; it or what it led to is not finite')
    elif guess is None:
      yield ok(told)
    elif 0.5 * guess < step.loss < 2 * guess:
      yield ok(f'{told}, near {guess:.4g}, that of a guess')
    else:
      yield odd(f'{told}, far from {guess:.4g}, that of a guess: see normalisation')


def _guess(case: Case, name: str) -> float | None:
  """Returns log C of plain cross-entropy; None for other objectives."""
  config = build.stage_config(case.config, name)
  plain = {
    'method': 'supervised',
    'loss': 'cross_entropy',
    'class_weights': 'uniform',
    'penalty': 'none',
  }
  others = any(config[key]['name'] != value for key, value in plain.items())
  if others or config['reduction'] != 'mean':
    return None
  learned = build.learned_classes(config['classes'], case.experiment.groups)
  return math.log(max(learned.sum(), 2))


def learns(case: Case) -> Findings:
  """Tells whether parameters move, and by the images."""
  for name, step in _steps(case).items():
    still = [path for path, moved in step.moved.items() if not moved]
    told = f'{name}: {len(step.moved) - len(still)} of {len(step.moved)} arrays of '
    told += 'parameters move'
    if len(still) == len(step.moved):
      yield wrong(f'{name}: no parameter moves: see schedule.base and what is frozen')
    elif step.blind:
      yield wrong(f'{told}, but the same way for other images: no gradient arrives')
    else:
      yield ok(told + (f'; {still[0]} is one that does not' if still else ''))


def by_heart(case: Case) -> Findings:
  """Trains the first stage on one batch only, at one learning rate."""
  trial = next(iter(_trials(case).values()))
  state, losses = _copied(trial.state), []
  clock, until = trial.state.step, time.monotonic() + BUDGET
  while len(losses) < BY_HEART and time.monotonic() < until:
    state, values, finite = trial.update(
      state.replace(step=clock.copy()), trial.batches[0]
    )
    losses.append(float(values.get('loss', np.nan)))
    if not finite:
      break
  told = f'{trial.stage.name}: {len(losses)} steps on one batch, at the learning rate '
  told += (
    f'of step {int(clock)}: the loss goes from {losses[0]:.4g} to {losses[-1]:.4g}'
  )
  if not (finite and checkpoint.all_finite(state)):
    yield wrong(f'{told}, not finite: a smaller schedule.base, or a warm-up')
  elif losses[-1] < 0.5 * losses[0]:
    yield ok(told)
  elif len(losses) < BY_HEART:
    yield skip(f'{told}; that is as many as {BUDGET:g} s allow')
  else:
    yield odd(f'{told}, not below the half: see the learning rate, labels, what learns')


# What it takes.


def memory(case: Case) -> Findings:
  """Compares what a step takes with what there is."""
  device = case.experiment.mesh.devices.flat[0]
  for name, trial in _trials(case).items():
    needed, there = sum(trial.memory.values()), _device_memory(device)
    if device.platform == 'cpu':  # all devices share the memory of the host
      needed *= case.experiment.mesh.size
    largest = max(trial.memory, key=trial.memory.get)
    told = f'{name}: a step takes {_bytes(needed)}, most of it {largest} '
    told += f'({_bytes(trial.memory[largest])} a device)'
    if there is None:
      yield ok(told)
    else:
      told += f'; there are {_bytes(there)}'
      level = wrong if needed > there else odd if needed > 0.9 * there else ok
      yield level(told)


def _device_memory(device: Any) -> float | None:
  """Returns the bytes of a device, of a CPU those that are free; None: unknown."""
  statistics = device.memory_stats() or {}
  if 'bytes_limit' in statistics:
    return statistics['bytes_limit']
  table = pathlib.Path('/proc/meminfo')
  if device.platform != 'cpu' or not table.exists():
    return None
  lines = dict(line.split(':') for line in table.read_text().splitlines())
  return 1024 * float(lines['MemAvailable'].split()[0])


def decoding(case: Case) -> Findings:
  """Compares how fast images are decoded with how fast they are used."""
  rate = functools.cache(lambda: _decode_rate(case.dataset.splits['train']))
  for name, step in _steps(case).items():
    stage = case.trials[name].stage
    workers = stage.streams['train'].workers
    if workers is None:
      yield ok(f'{name}: the images are in the memory of the devices')
      continue
    made = rate() * min(workers or usable_cores(), usable_cores())
    used = stage.batch / step.seconds
    told = f'{name}: about {made:,.0f} images/s can be decoded, {used:,.0f} are used'
    yield odd(f'{told}: the devices will wait for data') if made < used else ok(told)


def _decode_rate(split: Split) -> float:
  """Returns the training images that one core makes a second."""
  generator, rows = np.random.default_rng(0), _some(split.rows)

  def make(row: int) -> None:
    with contextlib.suppress(UserError):  # of damaged ones others tell
      split.augmented(row, generator)

  for row in rows[:16]:  # the first ones import decoders
    make(row)
  timed = rows[-32:]
  began = time.perf_counter()
  for row in timed:
    make(row)
  return len(timed) / (time.perf_counter() - began)


Check = Callable[[Case], Findings]

SECTIONS: dict[str, tuple[Check, ...]] = {
  'machine': (versions, accelerators, cores),
  'configuration': (Case.open, idle_devices),
  'folder': (writable, file_system, begun, space),
  'data': (splits, readable, duplicates, classes, tail, shots, balanced_test),
  'images': (normalisation, constant, sizes),
  'one step': (compiles, one_step, loss_at_start, learns, by_heart),
  'what it takes': (memory, decoding),
}
"""What is checked, in this order: later checks use what earlier ones leave."""


def examine(
  case: Case, sections: Mapping[str, Sequence[Check]] = SECTIONS
) -> Iterator[tuple[str, Finding]]:
  """Yields (section, finding) as checks make them.

  What a check stumbles over is a finding, and does not keep the others from being made.
  """
  for section, checks in sections.items():
    for check in checks:
      try:
        for finding in check(case):
          yield section, finding
      except Missing as missing:
        yield section, skip(f'{check.__name__.replace("_", " ")}: {missing}')
      except (UserError, OSError, jax.errors.JaxRuntimeError) as error:
        yield section, wrong(_line(error))


def _line(error: Exception) -> str:
  return ' '.join(str(error).split())[:500]  # XLA tells of every buffer


def main() -> None:
  """Prints what is found.

  Raises:
    UserError: something is wrong.
  """
  case = Case(build.resolve(CONFIG.value), WORKDIR.value, THOROUGH.value)
  counts, section = collections.Counter(), ''
  for now, finding in examine(case):
    if now != section:
      print(now)
    section = now
    counts[finding.level] += 1
    print(f'  {finding.level:5}  {finding.text}', flush=True)
  levels = ('wrong', 'odd', 'ok', 'skip')
  told = ', '.join(f'{counts[level]} {level}' for level in levels)
  if counts['wrong']:
    raise UserError(f'found {told}')
  print(f'found {told}')


if __name__ == '__main__':
  commands.launch(main, 'config')
