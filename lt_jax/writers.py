"""What a run writes as it goes: JSON lines, TensorBoard, a tracker.

Only process 0 writes. Files grow by whole lines. When a run resumes, it drops a line
torn by a crash, and all rows after the step it resumes from. Rows that are damaged or
missing cannot be recomputed: they are reported, and a damaged file is copied to
`NAME.damaged` before it is rewritten without them.
"""

import collections
import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from lt_jax import files
from lt_jax.config import flatten
from lt_jax.errors import UserError
from lt_jax.files import MAYBE, NUMBER
from lt_jax.screen import Screen

Row = dict[str, Any]
Tell = Callable[[str], None]
"""Reports, in one line, that a file is damaged."""

ROWS: dict[str, Any] = {
  'events.jsonl': {'event': str, 'time': NUMBER},
  'metrics.jsonl': {
    'step': int,
    **dict.fromkeys(('stage', 'split'), str),
    **dict.fromkeys(
      ('epoch', 'loss', 'accuracy', 'learning_rate', 'images_per_second'), MAYBE
    ),
  },
}
"""JSON lines file -> what its readers rely on in every row, see `files.fits`."""

EVENTS: dict[str, Any] = {
  'started': {'pid': int, 'host': str},
  'first_step': {'stage': str, 'seconds': NUMBER},
  'began_with_weights': {'source': str, 'revision': str, 'sha256': str},
  'saved': {'checkpoint': str, 'step': int},
  'checkpoint_rejected': {'step': int, 'reason': str},
  'bad_image': {'split': str, 'image': str},
  'diverged': {'stage': str, 'step': int, 'see': str},
  'finished': {'state_sha256': str},
}
"""event -> what its row in events.jsonl contains in every version."""


FIRST_STEP = (
  'stage {stage}: first step after {seconds} s, {compile_seconds} s of it compilation'
)


class Lines(NamedTuple):
  """The contents of a JSON lines file.

  Attributes:
    rows: the valid rows.
    damaged: how many lines are not valid rows.
    torn: whether the last line is incomplete, as after a crash.
  """

  rows: list[Row]
  damaged: int
  torn: bool


def read_lines(path: epath.PathLike) -> Lines:
  """Reads a file listed in `ROWS`; a missing file has no lines."""
  path = epath.Path(path)
  if not path.exists():
    return Lines([], 0, False)
  files.check_regular(path)
  *lines, rest = path.read_bytes().decode(errors='replace').split('\n')
  found = [_parsed(line) for line in lines]
  rows = [row for row in found if _is_row(row, path.name)]
  return Lines(rows, len(lines) - len(rows), bool(rest))


def _is_row(row: Any, name: str) -> bool:
  """Returns whether a row has what every row of its file must have."""
  if not files.fits(row, ROWS[name]):
    return False
  return name != 'events.jsonl' or files.fits(row, EVENTS.get(row['event'], {}))


def damaged_lines(path: epath.PathLike) -> list[str]:
  """Returns a message with the number of damaged lines of a file; [] if there are none.

  Args:
    path: a file listed in `ROWS`.
  """
  return _count_damaged(read_lines(path).damaged)


def _count_damaged(number: int) -> list[str]:
  return [f'{number} damaged line{"s" * (number > 1)}'] * bool(number)


def _parsed(line: str) -> Any:
  try:
    return json.loads(line)
  except (ValueError, RecursionError):
    return None


def read_rows(path: epath.PathLike) -> list[Row]:
  """Returns the valid rows of a file listed in `ROWS`."""
  return read_lines(path).rows


class JsonLines:
  """A file of JSON objects, one per line, that survives a crash.

  Attributes:
    rows: the rows it held when it was opened, except those that were dropped.
  """

  def __init__(
    self,
    path: epath.PathLike,
    keep: Callable[[Row], bool] = lambda row: True,
    missing: Callable[[list[Row]], str] = lambda rows: '',
    tell: Tell = lambda line: None,
  ):
    """Opens the file for appending; drops damaged lines and rows that `keep` rejects.

    Args:
      path: the file, whose name is listed in `ROWS`.
      keep: returns whether a row stays.
      missing: describes which rows are missing among those that stay; '' if none are.
      tell: called with a message if rows are damaged or missing.
    """
    self._path = epath.Path(path)
    self._write = jax.process_index() == 0
    before = read_lines(self._path)
    self.rows = [row for row in before.rows if keep(row)]
    if not self._write:
      return
    lost = missing(self.rows)
    problems = _count_damaged(before.damaged) + [lost] * bool(lost)
    if before.damaged or (before.torn and lost):
      problems.append(f'the damaged file is kept as {files.set_aside(self._path).name}')
    if problems:
      tell(f'{self._path.name}: {"; ".join(problems)}')
    text = ''.join(json.dumps(row) + '\n' for row in self.rows)
    if self._path.exists() and text.encode() != self._path.read_bytes():
      files.write_atomically(self._path, text)

  def append(self, row: Mapping[str, Any]) -> None:
    """Adds a row; numbers that are not finite become null, as JSON has none."""
    if self._write:
      with self._path.open('a') as file:
        file.write(json.dumps({k: _plain(v) for k, v in row.items()}) + '\n')


def _plain(value: Any) -> Any:
  """Returns a value as JSON can hold it."""
  value = value.item() if isinstance(value, np.generic | np.ndarray) else value
  return None if isinstance(value, float) and not math.isfinite(value) else value


class Events:
  """events.jsonl: starts, saves, preemptions, fallbacks; append-only."""

  def __init__(self, workdir: epath.Path, screen: Screen):
    self._screen = screen
    self._lines = JsonLines(workdir / 'events.jsonl', tell=self._tell_damage)

  def __call__(self, event: str, **values: Any) -> None:
    """Records an event, and shows it unless it is routine."""
    self._record(event, values)
    if event == 'first_step':
      self._screen.line_if_followed(FIRST_STEP.format(**values))
    elif event not in ('saved', 'started', 'finished'):
      details = ', '.join(f'{k} {v}' for k, v in values.items())
      self._screen.line(f'{event.replace("_", " ")}: {details}')

  def damaged(self, line: str) -> None:
    """Records that a file of the run is damaged, and shows it."""
    self._record('damaged', {'told': line})
    self._tell_damage(line)

  def _record(self, event: str, values: Mapping[str, Any]) -> None:
    self._lines.append({'event': event, 'time': time.time(), **values})

  def _tell_damage(self, line: str) -> None:
    self._screen.line(f'damaged: {line}')


Track = Callable[[Row], None]
"""Sends metrics, by name, to a tracker."""

TRACKERS = ('wandb', 'trackio')
"""Packages that share an interface: `init`, `log`, `finish`."""


@contextlib.contextmanager
def tracking(
  name: str,
  config: Mapping[str, Any],
  workdir: epath.Path,
  tell: Callable[..., None] = lambda event, **values: None,
) -> Iterator[Track]:
  """Opens the run in a tracker, and resumes it there if it exists.

  If the tracker fails later, as without a network, that is reported once and the
  tracker is not used again: metrics.jsonl has every row.

  Args:
    name: one of `TRACKERS`; '' for none.
    config: the resolved config.
    workdir: the run's folder, which identifies the run in the tracker.
    tell: called with an event and its values if the tracker fails.

  Yields:
    A `Track`.

  Raises:
    UserError: there is no such tracker, it is not installed, or it does not start.
  """
  if not name:
    yield lambda row: None
    return
  if name not in TRACKERS:
    raise UserError(f'unknown tracker {name!r}; known: {", ".join(TRACKERS)}')
  try:
    module = importlib.import_module(name)
  except ImportError:
    raise UserError(f'--tracker={name} needs a package: pip install {name}') from None
  if jax.process_index():
    yield lambda row: None
    return
  run_id = hashlib.sha256(os.fspath(workdir).encode()).hexdigest()[:16]
  try:
    run = module.init(
      project=config['name'],
      name=f'{config["recipe"]}-{config["seed"]}-{run_id[:6]}',
      config=flatten(config),
      resume='allow',
      **({'id': run_id} if name == 'wandb' else {}),
    )
  except Exception as error:  # of the tracker's own types: no account, no network
    raise UserError(f'--tracker={name} could not start: {error}') from None
  failed = False

  def attempt(act: Callable[..., None], *values: Any, **options: Any) -> None:
    nonlocal failed
    try:
      if not failed:
        act(*values, **options)
    except Exception as error:
      failed = True
      tell('tracker_failed', tracker=name, error=' '.join(str(error).split()))

  end = {}
  try:
    yield functools.partial(attempt, run.log)
  except BaseException:
    end = {'exit_code': 1} if name == 'wandb' else {}
    raise
  finally:
    attempt(run.finish, **end)


class MetricWriter:
  """The metrics of one stage: metrics.jsonl, TensorBoard, and one file per vector.

  A row is `{stage, split, step, epoch, <name>: value, ...}`. Vectors, with one value
  per class, go to `<name>.npz` in the stage's folder: 'step' (T,) and 'value' (T, C).
  """

  def __init__(
    self,
    workdir: epath.Path,
    stage: str,
    *,
    resume_step: int,
    vectors: epath.Path,
    expected: Mapping[str, int] | None = None,
    track: Track = lambda row: None,
    tell: Tell = lambda line: None,
  ):
    """Opens the files for a stage that resumes at `resume_step`.

    Rows after that step are dropped. An evaluation at that step is repeated, but its
    rows are not written twice, so that rows of later stages stay after them.

    Args:
      workdir: the run's folder.
      stage: the name of the stage.
      resume_step: the step at which it resumes.
      vectors: the folder of the vector files.
      expected: what `counts` returned when the checkpoint was saved.
      track: called with every row.
      tell: called with a message if rows are damaged or missing.
    """
    self._stage = stage
    self._vectors_dir = vectors
    self._track = track
    expected = expected or {}

    def keep(row: Row) -> bool:
      return row['stage'] != stage or row['step'] <= resume_step

    def missing(rows: list[Row]) -> str:
      found = count_rows(places(rows, stage), resume_step)
      return missing_rows(expected, found, stage, resume_step)

    self._lines = JsonLines(workdir / 'metrics.jsonl', keep, missing, tell)
    self._places = places(self._lines.rows, stage)
    self._vectors = {}
    for path in vectors.glob('*.npz') if vectors.exists() else []:
      rows = _open_vectors(path, resume_step, tell)
      self._vectors |= {path.name.removesuffix('.npz'): rows} if rows else {}
    for line in missing_vectors(expected, self._found(resume_step), vectors):
      tell(line)
    self._lost = collections.Counter(expected)
    self._lost.subtract(self._found(resume_step))
    self._lost = +self._lost  # drops counts of 0 and below
    self._board = None
    if jax.process_index() == 0:
      self._board = _Board(workdir / 'tensorboard' / stage, resume_step + 1)

  def counts(self, step: int) -> dict[str, int]:
    """Returns how many rows a run that resumes at a step should find.

    By split for metrics.jsonl, by file for vectors. Rows already known to be lost are
    included.
    """
    return dict(self._found(step) + self._lost)

  def _found(self, step: int) -> collections.Counter:
    vectors = {f'{name}.npz': len(rows) for name, rows in self._vectors.items()}
    return count_rows(self._places, step) + collections.Counter(vectors)

  def write(
    self, split: str, step: int, epoch: float, values: Mapping[str, Any], **timing: Any
  ) -> None:
    """Writes one row; `flush` writes the vectors among `values`."""
    arrays = {k: np.asarray(v) for k, v in values.items() if v is not None}
    scalars = {k: float(v) for k, v in arrays.items() if v.ndim == 0}
    for name, value in arrays.items():
      if value.ndim:
        self._vectors.setdefault(name, {})[step] = value
    if (split, step) in self._places:
      return
    self._places.add((split, step))
    place = {'stage': self._stage, 'split': split, 'step': step}
    self._lines.append({**place, 'epoch': round(epoch, 4), **scalars, **timing})
    named = {f'{split}/{key}': value for key, value in {**scalars, **timing}.items()}
    self._track({'stage': self._stage, 'step': step, 'epoch': epoch, **named})
    if self._board is not None:
      for name, value in named.items():
        self._board.add(name, value, step)

  def flush(self) -> None:
    """Writes the vectors and what TensorBoard has buffered; called at every save."""
    if self._board is None:
      return
    self._board.flush()
    self._vectors_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in self._vectors.items():
      write_npz(
        self._vectors_dir / f'{name}.npz',
        step=np.asarray(list(rows)),
        value=np.stack(list(rows.values())),
      )

  def close(self) -> None:
    """Writes what is left."""
    self.flush()
    self.abandon()

  def abandon(self) -> None:
    """Closes TensorBoard's file."""
    if self._board is not None:
      with contextlib.suppress(OSError):
        self._board.close()
      self._board = None


class _Board:
  """The TensorBoard file of a stage.

  Written here rather than by the thread of `SummaryWriter`, which would die with a
  traceback on a full disk.
  """

  FLUSH_AFTER = 60.0  # seconds

  def __init__(self, folder: epath.Path, purge_step: int):
    """Opens a file that supersedes earlier ones from `purge_step` on."""
    from tensorboardX import event_file_writer, summary  # import protobuf
    from tensorboardX.proto import event_pb2

    event_file_writer.directory_check(os.fspath(folder))
    self._file = event_file_writer.EventsWriter(os.fspath(folder / 'events'))
    self._scalar, self._event = summary.scalar, event_pb2.Event
    self._flushed = time.monotonic()
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._file.write_event(
      self._event(wall_time=time.time(), step=purge_step, session_log=start)
    )

  def add(self, name: str, value: float, step: int) -> None:
    """Adds a number to a curve."""
    summary = self._scalar(name, value)
    event = self._event(wall_time=time.time(), step=step, summary=summary)
    self._file.write_event(event)
    if time.monotonic() - self._flushed > self.FLUSH_AFTER:
      self.flush()

  def flush(self) -> None:
    """Writes what is buffered to the file."""
    self._file.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    """Flushes and closes the file."""
    self._file.close()


def places(rows: Iterable[Row], stage: str) -> set[tuple[str, int]]:
  """Returns the (split, step) of every row of a stage in metrics.jsonl."""
  return {(row['split'], row['step']) for row in rows if row['stage'] == stage}


def count_rows(there: Iterable[tuple[str, int]], step: int) -> collections.Counter:
  """Counts rows by split up to a step; evaluations at that step do not count yet."""
  return collections.Counter(
    split for split, at in there if at < step or (at == step and split == 'train')
  )


def missing_rows(
  expected: Mapping[str, int], found: Mapping[str, int], stage: str, step: int
) -> str:
  """Describes which rows of metrics.jsonl are missing; '' if none are.

  Args:
    expected: what `MetricWriter.counts` returned for that stage and step.
    found: what `count_rows` returns for the rows that are there.
    stage: the stage.
    step: the step up to which rows are expected.
  """
  lost = {
    split: count - found.get(split, 0)
    for split, count in expected.items()
    if not split.endswith('.npz') and count > found.get(split, 0)
  }
  if not lost:
    return ''
  counts = ', '.join(f'{s} {count} of {expected[s]}' for s, count in lost.items())
  return f'rows of stage {stage!r} up to step {step} are missing: {counts}'


def missing_vectors(
  expected: Mapping[str, int], found: Mapping[str, int], folder: epath.Path
) -> list[str]:
  """Describes, in one line per file, which vector files lack rows.

  Args:
    expected: what `MetricWriter.counts` returned.
    found: file -> number of rows.
    folder: the folder of the files.
  """
  return [
    f'{folder / name}: rows are missing: {count - found.get(name, 0)} of {count}'
    for name, count in expected.items()
    if name.endswith('.npz') and count > found.get(name, 0)
  ]


def read_vectors(path: epath.Path) -> dict[int, np.ndarray]:
  """Reads a vector file: step -> (C,).

  Raises:
    UserError: it is damaged, or not a vector file.
  """
  stored = files.read_npz(path)
  step, value = (stored.get(name, np.array('')) for name in ('step', 'value'))
  fits = step.dtype.kind in 'iu' and value.dtype.kind in 'fiub' and step.ndim == 1
  if not fits or value.shape[:1] != step.shape:
    raise UserError(f'{path} is damaged: it has no vector for each step')
  return dict(zip(step.tolist(), value, strict=True))


def _open_vectors(path: epath.Path, last: int, tell: Tell) -> dict[int, np.ndarray]:
  """Reads the vectors up to step `last`; sets a damaged file aside."""
  try:
    found = read_vectors(path)
  except UserError as error:
    if jax.process_index() == 0:
      tell(f'{error}; the damaged file is kept as {files.set_aside(path).name}')
      path.unlink()
    return {}
  return {step: value for step, value in found.items() if step <= last}


def write_npz(path: epath.PathLike, **arrays: np.ndarray) -> None:
  """Writes a compressed .npz atomically."""
  import io

  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  files.write_atomically(path, buffer.getvalue())
