"""Output of a run while it runs: JSON lines, TensorBoard, a tracker, the screen.

Only process 0 writes. Files grow by whole lines; a line torn by a crash is dropped
when the run goes on, and so is every row after the step that it goes on from. Rows that
are damaged or missing cannot be made anew: they are told, and a damaged file is copied
to `NAME.damaged` before it is written without them.
"""

import collections
import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lt_jax import files
from lt_jax.config import flatten
from lt_jax.errors import UserError
from lt_jax.files import MAYBE, NUMBER

Row = dict[str, Any]
Tell = Callable[[str], None]
"""Takes a line about a file that is damaged."""

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
"""file of JSON lines -> what its readers rely on in every row, see `files.fits`."""

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
"""event -> what its row in events.jsonl has had in every version."""


class Lines(NamedTuple):
  """A file of JSON lines, as it was read.

  Attributes:
    rows: those that are whole.
    damaged: how many lines are no such row.
    torn: whether the last line has no end, as a crash can leave it.
  """

  rows: list[Row]
  damaged: int
  torn: bool


def read_lines(path: epath.PathLike) -> Lines:
  """Reads a file of `ROWS`; one that is not there has no lines."""
  path = epath.Path(path)
  if not path.exists():
    return Lines([], 0, False)
  files.check_regular(path)
  *lines, rest = path.read_bytes().decode(errors='replace').split('\n')
  found = [_parsed(line) for line in lines]
  rows = [row for row in found if _is_row(row, path.name)]
  return Lines(rows, len(lines) - len(rows), bool(rest))


def _is_row(row: Any, name: str) -> bool:
  """Returns whether a row has what the rows of a file have."""
  if not files.fits(row, ROWS[name]):
    return False
  return name != 'events.jsonl' or files.fits(row, EVENTS.get(row['event'], {}))


def damaged_lines(path: epath.PathLike) -> list[str]:
  """Says how many lines of a file of `ROWS` are damaged, in a line or none."""
  return _count_damaged(read_lines(path).damaged)


def _count_damaged(number: int) -> list[str]:
  return [f'{number} damaged line{"s" * (number > 1)}'] * bool(number)


def _parsed(line: str) -> Any:
  try:
    return json.loads(line)
  except (ValueError, RecursionError):
    return None


def read_rows(path: epath.PathLike) -> list[Row]:
  """Returns the rows of a file of `ROWS`, leaving out what is damaged or torn."""
  return read_lines(path).rows


class JsonLines:
  """A file of JSON objects, one a line, that survives a crash.

  Attributes:
    rows: those that it held when it was opened, and kept.
  """

  def __init__(
    self,
    path: epath.PathLike,
    keep: Callable[[Row], bool] = lambda row: True,
    missing: Callable[[list[Row]], str] = lambda rows: '',
    tell: Tell = lambda line: None,
  ):
    """Opens the file for appending, without damaged lines and what `keep` refuses.

    Args:
      path: of the file, whose name is among `ROWS`.
      keep: whether a row stays.
      missing: says which rows are not among those that stay; '' if there are all.
      tell: takes a line where rows are damaged or missing.
    """
    self._path = epath.Path(path)
    self._write = jax.process_index() == 0
    before = read_lines(self._path)
    self.rows = [row for row in before.rows if keep(row)]
    if not self._write:
      return
    lost = missing(self.rows)
    told = _count_damaged(before.damaged) + [lost] * bool(lost)
    if before.damaged or (before.torn and lost):
      told.append(f'the file as it was is {files.set_aside(self._path).name}')
    if told:
      tell(f'{self._path.name}: {"; ".join(told)}')
    text = ''.join(json.dumps(row) + '\n' for row in self.rows)
    if self._path.exists() and text.encode() != self._path.read_bytes():
      files.write_atomically(self._path, text)

  def append(self, row: Mapping[str, Any]) -> None:
    """Adds a row; a number that is not finite becomes null, as JSON has none."""
    if self._write:
      with self._path.open('a') as file:
        file.write(json.dumps({k: _plain(v) for k, v in row.items()}) + '\n')


def _plain(value: Any) -> Any:
  """Returns a value JSON can hold."""
  value = value.item() if isinstance(value, np.generic | np.ndarray) else value
  return None if isinstance(value, float) and not math.isfinite(value) else value


class Events:
  """events.jsonl: starts, saves, preemptions, fallbacks; append-only."""

  def __init__(self, workdir: epath.Path, screen: 'Screen'):
    self._screen = screen
    self._lines = JsonLines(workdir / 'events.jsonl', tell=self._tell_damage)

  def __call__(self, event: str, **values: Any) -> None:
    """Records an event, and shows it if a person should know."""
    self._record(event, values)
    if event not in ('saved', 'started', 'finished'):
      told = ', '.join(f'{k} {v}' for k, v in values.items())
      show = self._screen.detail if event == 'first_step' else self._screen.line
      show(f'{event.replace("_", " ")}: {told}')

  def damaged(self, line: str) -> None:
    """Records that a file of the run is damaged, and shows it."""
    self._record('damaged', {'told': line})
    self._tell_damage(line)

  def _record(self, event: str, values: Mapping[str, Any]) -> None:
    self._lines.append({'event': event, 'time': time.time(), **values})

  def _tell_damage(self, line: str) -> None:
    self._screen.line(f'damaged: {line}')


Track = Callable[[Row], None]
"""Takes metrics by name, and shows them elsewhere."""

TRACKERS = ('wandb', 'trackio')
"""Packages with one interface: `init`, `log`, `finish`."""


@contextlib.contextmanager
def tracking(
  name: str,
  config: Mapping[str, Any],
  workdir: epath.Path,
  tell: Callable[..., None] = lambda event, **values: None,
) -> Iterator[Track]:
  """Opens the run in a tracker, where it goes on if it is there.

  A tracker that fails on the way, as without a network, is told once and asked no more:
  metrics.jsonl has every row.

  Args:
    name: of `TRACKERS`; '' for none.
    config: the resolved configuration.
    workdir: the run's folder, by which the run is known there.
    tell: called with an event and its values, if the tracker fails.

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
  known_by = hashlib.sha256(os.fspath(workdir).encode()).hexdigest()[:16]
  try:
    run = module.init(
      project=config['name'],
      name=f'{config["recipe"]}-{config["seed"]}-{known_by[:6]}',
      config=flatten(config),
      resume='allow',
      **({'id': known_by} if name == 'wandb' else {}),
    )
  except Exception as error:  # of its own kinds: no account, no network
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
  """The metrics of one stage: metrics.jsonl, TensorBoard, and a file a vector.

  A row is `{stage, split, step, epoch, <name>: value, ...}`. Vectors, one a class,
  go to `<name>.npz` in the stage's folder: 'step' (T,) and 'value' (T, C).
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
    """Opens the files for a stage that goes on from `resume_step`.

    Rows after that step are dropped. An evaluation at it is made again, but its rows
    are not written twice, so that rows of later stages stay behind them.

    Args:
      workdir: the run's folder.
      stage: its name.
      resume_step: the step it goes on from.
      vectors: the folder of the files of vectors.
      expected: what `counts` has returned when the checkpoint was saved.
      track: takes every row.
      tell: takes a line where rows are damaged or missing.
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
    self._lost = +self._lost  # without those of which there are enough
    self._board = None
    if jax.process_index() == 0:
      self._board = _Board(workdir / 'tensorboard' / stage, resume_step + 1)

  def counts(self, step: int) -> dict[str, int]:
    """Returns how many rows a run that goes on from a step ought to find.

    By split for metrics.jsonl, by file for vectors; those that are lost count, too.
    """
    return dict(self._found(step) + self._lost)

  def _found(self, step: int) -> collections.Counter:
    vectors = {f'{name}.npz': len(rows) for name, rows in self._vectors.items()}
    return count_rows(self._places, step) + collections.Counter(vectors)

  def write(
    self, split: str, step: int, epoch: float, values: Mapping[str, Any], **timing: Any
  ) -> None:
    """Writes one row; vectors among `values` are kept for `flush`."""
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
    told = {f'{split}/{key}': value for key, value in {**scalars, **timing}.items()}
    self._track({'stage': self._stage, 'step': step, 'epoch': epoch, **told})
    if self._board is not None:
      for name, value in {**scalars, **timing}.items():
        self._board.add(f'{split}/{name}', value, step)

  def flush(self) -> None:
    """Writes the vectors, and what TensorBoard holds back; called at every save."""
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
  """TensorBoard's file of a stage.

  Written here and not in the thread of `SummaryWriter`, which a full disk would end
  with a traceback.
  """

  FLUSH_AFTER = 60.0  # seconds

  def __init__(self, folder: epath.Path, purge_step: int):
    """Begins a file, which replaces what others say of `purge_step` and later steps."""
    from tensorboardX import event_file_writer, summary  # draw in protobuf
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
    """Hands to the file what is held back."""
    self._file.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    """Flushes and closes the file."""
    self._file.close()


def places(rows: Iterable[Row], stage: str) -> set[tuple[str, int]]:
  """Returns {(split, step)} of the rows of a stage in metrics.jsonl."""
  return {(row['split'], row['step']) for row in rows if row['stage'] == stage}


def count_rows(there: Iterable[tuple[str, int]], step: int) -> collections.Counter:
  """Counts rows by split, up to a step; evaluations at that step are yet to come."""
  return collections.Counter(
    split for split, at in there if at < step or (at == step and split == 'train')
  )


def missing_rows(
  expected: Mapping[str, int], found: Mapping[str, int], stage: str, step: int
) -> str:
  """Says which rows of metrics.jsonl are missing; '' if none is.

  Args:
    expected: what `MetricWriter.counts` returned for that stage and step.
    found: what `count_rows` returns of the rows that are there.
    stage: the stage.
    step: up to which they are expected.
  """
  lost = {
    split: count - found.get(split, 0)
    for split, count in expected.items()
    if not split.endswith('.npz') and count > found.get(split, 0)
  }
  if not lost:
    return ''
  told = ', '.join(f'{s} {count} of {expected[s]}' for s, count in lost.items())
  return f'rows of stage {stage!r} up to step {step} are missing: {told}'


def missing_vectors(
  expected: Mapping[str, int], found: Mapping[str, int], folder: epath.Path
) -> list[str]:
  """Says in which files of vectors rows are missing, a line each.

  Args:
    expected: what `MetricWriter.counts` returned.
    found: file -> number of rows.
    folder: of the files.
  """
  return [
    f'{folder / name}: rows are missing: {count - found.get(name, 0)} of {count}'
    for name, count in expected.items()
    if name.endswith('.npz') and count > found.get(name, 0)
  ]


def read_vectors(path: epath.Path) -> dict[int, np.ndarray]:
  """Reads a file of vectors: step -> (C,).

  Raises:
    UserError: it is damaged, or holds something else.
  """
  stored = files.read_npz(path)
  step, value = (stored.get(name, np.array('')) for name in ('step', 'value'))
  fits = step.dtype.kind in 'iu' and value.dtype.kind in 'fiub' and step.ndim == 1
  if not fits or value.shape[:1] != step.shape:
    raise UserError(f'{path} is damaged: it has no vector for each step')
  return dict(zip(step.tolist(), value, strict=True))


def _open_vectors(path: epath.Path, last: int, tell: Tell) -> dict[int, np.ndarray]:
  """Reads the vectors up to step `last`; puts a damaged file aside."""
  try:
    found = read_vectors(path)
  except UserError as error:
    if jax.process_index() == 0:
      tell(f'{error}; the file as it was is {files.set_aside(path).name}')
      path.unlink()
    return {}
  return {step: value for step, value in found.items() if step <= last}


def write_npz(path: epath.PathLike, **arrays: np.ndarray) -> None:
  """Writes a compressed .npz atomically."""
  import io

  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  files.write_atomically(path, buffer.getvalue())


class _Output:
  """Standard output; where its terminal or pipe is closed, the run goes on without."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    with self._closed_is_nowhere():
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    with self._closed_is_nowhere():
      self._stream.flush()

  @contextlib.contextmanager
  def _closed_is_nowhere(self) -> Iterator[None]:
    try:
      yield
    except OSError:
      with open(os.devnull, 'w') as nowhere:
        os.dup2(nowhere.fileno(), self._stream.fileno())


def terminal(soft_wrap: bool = True) -> Console:
  """Returns the terminal, or whatever else standard output is.

  Args:
    soft_wrap: leaves it to the terminal to break long lines.
  """
  return Console(file=_Output(sys.stdout), highlight=False, soft_wrap=soft_wrap)


class Screen:
  """A person's terminal: a progress bar there, plain lines anywhere else."""

  def __init__(self, name: str = '', beside: 'Screen | None' = None):
    """Opens it for a run, or for one of several that train together.

    Args:
      name: what its lines begin with.
      beside: the screen of the run whose progress is shown instead of this one's.
    """
    self._console = beside._console if beside else terminal()
    self._show = jax.process_index() == 0
    self._name = name
    self._followed = beside is None
    self._bar: Progress | None = None
    self._task: Any = None

  def follow(self, stage: str, steps: int) -> None:
    """Shows the progress of this run, if it has not been shown so far."""
    if not self._followed:
      self._followed = True
      self.start_bar(stage, 0, steps)

  def line(self, text: str) -> None:
    """Prints one line."""
    self._print(f'{self._name}{text}')

  def _print(self, text: str) -> None:
    if self._show:
      self._console.print(text, markup=False)

  def detail(self, text: str) -> None:
    """Prints one line of a run that is followed."""
    if self._followed:
      self.line(text)

  def table(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Prints names and values under a title."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    self._print(f'\n{title}')
    for name, value in rows:
      self._print(f'  {name:<{width}}  {value}')

  def start_bar(self, name: str, step: int, steps: int) -> None:
    """Begins the progress bar of a stage, on a terminal."""
    if self._show and self._followed and self._console.is_terminal:
      self._bar = Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        TextColumn('{task.completed}/{task.total}'),
        TimeRemainingColumn(),
        TextColumn('{task.fields[note]}'),
        console=self._console,
      )
      self._task = self._bar.add_task(name, total=steps, completed=step, note='')
      self._bar.start()

  def progress(self, step: int) -> None:
    """Moves the bar."""
    if self._bar is not None:
      self._bar.update(self._task, completed=step)

  def note(self, text: str, line: str) -> None:
    """Shows news of the training: beside the bar, or as a plain line."""
    if self._bar is not None:
      self._bar.update(self._task, note=text)
    else:
      self.detail(line)

  def evaluated(self, step: int, metric: str, values: Mapping[str, float]) -> None:
    """Prints a metric of each split, of a run that is followed."""
    told = ', '.join(f'{split} {value:.4f}' for split, value in values.items())
    self.detail(f'step {step}: {metric} on {told}')

  def stop_bar(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.stop()
      self._bar = None
