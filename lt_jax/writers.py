"""What a run says while it runs: JSON lines, TensorBoard, a tracker, a person's screen.

Only process 0 writes. Files grow by whole lines; a line torn by a crash is dropped
when the run goes on, and so is every row after the step that it goes on from.
"""

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
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lt_jax import files
from lt_jax.errors import UserError

Row = dict[str, Any]


def read_rows(path: epath.PathLike) -> list[Row]:
  """Reads a file of JSON lines, leaving out what is none: a line that a crash tore."""
  path = epath.Path(path)
  if not path.exists():
    return []
  rows = []
  for line in path.read_bytes().decode(errors='replace').split('\n')[:-1]:
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return [row for row in rows if isinstance(row, dict)]


class JsonLines:
  """A file of JSON objects, one a line, that survives a crash."""

  def __init__(self, path: epath.PathLike, keep: Callable[[Row], bool] | None = None):
    """Opens the file for appending, after dropping what `keep` refuses."""
    self._path = epath.Path(path)
    self._write = jax.process_index() == 0
    if self._write and self._path.exists():
      rows = [r for r in read_rows(self._path) if keep is None or keep(r)]
      text = ''.join(json.dumps(row) + '\n' for row in rows)
      if text.encode() != self._path.read_bytes():
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
  """events.jsonl: starts, saves, preemptions, fallbacks; appended to for ever."""

  def __init__(self, workdir: epath.Path, screen: 'Screen'):
    self._lines = JsonLines(workdir / 'events.jsonl')
    self._screen = screen

  def __call__(self, event: str, **values: Any) -> None:
    """Records an event, and shows it if a person should know."""
    self._lines.append({'event': event, 'time': time.time(), **values})
    if event not in ('saved', 'started', 'finished'):
      told = ', '.join(f'{k} {v}' for k, v in values.items())
      show = self._screen.detail if event == 'first_step' else self._screen.line
      show(f'{event.replace("_", " ")}: {told}')


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
    raise UserError(f'--tracker={name} needs it: pip install {name}') from None
  if jax.process_index():
    yield lambda row: None
    return
  known_by = hashlib.sha256(os.fspath(workdir).encode()).hexdigest()[:16]
  try:
    run = module.init(
      project=config['name'],
      name=f'{config["recipe"]}-{config["seed"]}-{known_by[:6]}',
      config=files.flatten(config),
      resume='allow',
      **({'id': known_by} if name == 'wandb' else {}),
    )
  except Exception as error:  # of its own kinds: no account, no network
    raise UserError(f'--tracker={name} does not start: {error}') from None
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
    track: Track = lambda row: None,
  ):
    """Opens the files for a stage that goes on from `resume_step`.

    Rows that the run will write again are dropped: training rows after that step, and
    evaluations at it or after it.
    """
    self._stage = stage
    self._vectors_dir = vectors
    self._track = track

    def keep(row: Row) -> bool:
      if row.get('stage') != stage:
        return True
      last = resume_step if row.get('split') == 'train' else resume_step - 1
      return row.get('step', 0) <= last

    self._lines = JsonLines(workdir / 'metrics.jsonl', keep)
    self._vectors = _read_vectors(vectors, resume_step)
    self._board = None
    if jax.process_index() == 0:
      from tensorboardX import SummaryWriter  # draws in protobuf

      board = str(workdir / 'tensorboard' / stage)
      self._board = SummaryWriter(board, purge_step=resume_step + 1)

  def write(
    self, split: str, step: int, epoch: float, values: Mapping[str, Any], **timing: Any
  ) -> None:
    """Writes one row; vectors among `values` are kept for `flush`."""
    arrays = {k: np.asarray(v) for k, v in values.items() if v is not None}
    scalars = {k: float(v) for k, v in arrays.items() if v.ndim == 0}
    place = {'stage': self._stage, 'split': split, 'step': step}
    self._lines.append({**place, 'epoch': round(epoch, 4), **scalars, **timing})
    told = {f'{split}/{key}': value for key, value in {**scalars, **timing}.items()}
    self._track({'stage': self._stage, 'step': step, 'epoch': epoch, **told})
    for name, value in arrays.items():
      if value.ndim:
        self._vectors.setdefault(name, {})[step] = value
    if self._board is not None:
      for name, value in {**scalars, **timing}.items():
        self._board.add_scalar(f'{split}/{name}', value, step)

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
    """Ends TensorBoard's thread, which else stumbles over files that are closed."""
    if self._board is not None:
      with contextlib.suppress(OSError):
        self._board.close()
      self._board = None


def _read_vectors(folder: epath.Path, last: int) -> dict[str, dict[int, np.ndarray]]:
  """Reads the vectors written up to step `last`."""
  found: dict[str, dict[int, np.ndarray]] = {}
  for path in folder.glob('*.npz') if folder.exists() else []:
    with np.load(path, allow_pickle=False) as stored:
      pairs = zip(stored['step'].tolist(), stored['value'], strict=True)
      found[path.name.removesuffix('.npz')] = {s: v for s, v in pairs if s <= last}
  return {name: rows for name, rows in found.items() if rows}


def write_npz(path: epath.PathLike, **arrays: np.ndarray) -> None:
  """Writes a compressed .npz atomically."""
  import io

  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  files.write_atomically(path, buffer.getvalue())


class Screen:
  """A person's terminal: a progress bar there, plain lines anywhere else."""

  def __init__(self, name: str = '', beside: 'Screen | None' = None):
    """Opens it for a run, or for one of several that train together.

    Args:
      name: what its lines begin with.
      beside: the screen of the run whose progress is shown instead of this one's.
    """
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    self._console = beside._console if beside else console
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

  def stop_bar(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.stop()
      self._bar = None
