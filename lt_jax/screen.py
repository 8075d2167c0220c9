"""What the user sees: a progress bar on a terminal, plain lines anywhere else."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class _Output:
  """Standard output; the run continues if its terminal or pipe is closed."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    with self._discarding_if_closed():
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    with self._discarding_if_closed():
      self._stream.flush()

  @contextlib.contextmanager
  def _discarding_if_closed(self) -> Iterator[None]:
    try:
      yield
    except OSError:
      with open(os.devnull, 'w') as nowhere:
        os.dup2(nowhere.fileno(), self._stream.fileno())


def terminal(soft_wrap: bool = True) -> Console:
  """Returns a console for standard output, be it a terminal or not.

  A notebook gets plain lines: it says that it is a terminal, but cannot redraw a bar.

  Args:
    soft_wrap: let the terminal break long lines.
  """
  return Console(
    file=_Output(sys.stdout),
    highlight=False,
    soft_wrap=soft_wrap,
    force_jupyter=False,
    force_terminal=False if Console().is_jupyter else None,
  )


def checkpoint_of(result: Mapping[str, Any]) -> str:
  """Says which checkpoint a result is of.

  It names the stage unless that is called 'train', as the only stage of a run is.

  Args:
    result: what result.json or evaluation.json holds; any key may be missing.

  Examples:
    >>> checkpoint_of({'step': 189, 'select': 'val/macro_accuracy'})
    'checkpoint of step 189 (best val/macro_accuracy)'
    >>> checkpoint_of({'stage': 'plain', 'step': 40, 'which': 'last'})
    'checkpoint of stage plain, step 40 (last)'
  """
  by = result.get('select') or result.get('which')
  rule = f'best {by}' if by and '/' in by else by
  stage = result.get('stage', 'train')
  of_stage = '' if stage == 'train' else f'stage {stage}, '
  because = f' ({rule})' if rule else ''
  return f'checkpoint of {of_stage}step {result.get("step")}{because}'


class Screen:
  """What the user sees: a progress bar on a terminal, plain lines anywhere else."""

  def __init__(self, name: str = '', beside: 'Screen | None' = None):
    """Opens it for a run, or for one of several that train together.

    Args:
      name: prefix of its lines.
      beside: the screen of the run whose progress is shown instead of this one's.
    """
    self._console = beside._console if beside else terminal()
    self._show = jax.process_index() == 0
    self._name = name
    self._followed = beside is None
    self._bar: Progress | None = None
    self._task: Any = None

  def follow(self, stage: str, steps: int) -> None:
    """Starts to show the progress of this run, unless it is shown already."""
    if not self._followed:
      self._followed = True
      self.start_bar(stage, 0, steps)

  def line(self, text: str) -> None:
    """Prints one line."""
    self._print(f'{self._name}{text}')

  def _print(self, text: str) -> None:
    if self._show:
      self._console.print(text, markup=False)

  def line_if_followed(self, text: str) -> None:
    """Prints one line if this is the run whose progress is shown."""
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
    """Starts the progress bar of a stage, on a terminal."""
    if self._show and self._followed and self._console.is_terminal:
      self._bar = Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        TextColumn('{task.completed}/{task.total}'),
        TimeRemainingColumn(),
        TextColumn('{task.fields[status]}'),
        console=self._console,
      )
      self._task = self._bar.add_task(name, total=steps, completed=step, status='')
      self._bar.start()

  def progress(self, step: int) -> None:
    """Moves the bar."""
    if self._bar is not None:
      self._bar.update(self._task, completed=step)

  def status(self, text: str, line: str) -> None:
    """Shows how training is going: `text` beside the bar, or else a plain `line`."""
    if self._bar is not None:
      self._bar.update(self._task, status=text)
    else:
      self.line_if_followed(line)

  def evaluated(self, step: int, metric: str, values: Mapping[str, float]) -> None:
    """Prints a metric on every split if this is the run whose progress is shown."""
    summary = ', '.join(f'{split} {value:.4f}' for split, value in values.items())
    self.line_if_followed(f'step {step}: {metric} on {summary}')

  def stop_bar(self) -> None:
    """Removes the bar."""
    if self._bar is not None:
      self._bar.stop()
      self._bar = None
