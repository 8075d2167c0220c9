"""The cells of a sweep as one table on a terminal, refreshed in place."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

WAITING, RUNNING, FINISHED, FAILED = 'waiting', 'running', 'finished', 'failed'

BAR = 12
"""Characters of a bar."""

ROOM = 8
"""Lines of the terminal kept free for everything but cells."""


@dataclass
class Row:
  """The state of one cell.

  Attributes:
    method: recipe, and the values of a grid.
    seed: of the run.
    state: one of the four above.
    stage: the stage that runs; '' until the first one does.
    step: its current step.
    steps: its last step; 0 for a stage without steps.
    left: seconds until then; None while unknown.
    metric: the latest value, as text.
  """

  method: str
  seed: int
  state: str = WAITING
  stage: str = ''
  step: int = 0
  steps: int = 0
  left: float | None = None
  metric: str = ''

  @property
  def progress(self) -> str:
    """Its state, or how much of the stage is done."""
    if self.state != RUNNING:
      return self.state
    if not self.stage:
      return 'starting'
    if not self.steps:
      return self.stage
    share = min(self.step / self.steps, 1)
    done = round(BAR * share)
    bar = '━' * done + '─' * (BAR - done)
    return f'{bar} {self.stage} {self.step}/{self.steps}'

  @property
  def texts(self) -> tuple[str, ...]:
    """The texts of the columns `HEADINGS`."""
    left = '' if self.state != RUNNING or self.left is None else duration(self.left)
    return self.method, str(self.seed), self.progress, left, self.metric


HEADINGS = ('method', 'seed', 'progress', 'ETA', 'metric')


def duration(seconds: float) -> str:
  """Returns a time in its two largest units.

  Examples:
    >>> [duration(seconds) for seconds in (9.4, 75, 7260)]
    ['9 s', '1 min 15 s', '2 h 01 min']
  """
  seconds = round(seconds)
  if seconds < 60:
    return f'{seconds} s'
  minutes, seconds = divmod(seconds, 60)
  if minutes < 60:
    return f'{minutes} min {seconds:02} s'
  return f'{minutes // 60} h {minutes % 60:02} min'


def shown(rows: Sequence[Row], most: int) -> tuple[int, int]:
  """Returns the range of rows to show: the running ones and those around them."""
  busy = [i for i, row in enumerate(rows) if row.state in (RUNNING, WAITING)]
  first = busy[0] if busy else len(rows)
  begin = max(0, min(first - most // 2, len(rows) - most))
  return begin, min(begin + most, len(rows))


class LiveTable:
  """The table, below everything printed while it is open.

  A context manager; the last state of the table stays on the terminal.
  """

  def __init__(
    self,
    cells: Sequence[tuple[str, int]],
    console: Console,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Takes (method, seed) of every cell, the terminal and a clock in seconds."""
    self.rows = [Row(method, seed) for method, seed in cells]
    self._console = console
    self._clock = clock
    self._took: list[float] = []
    self._live = Live(
      get_renderable=self.table, console=console, refresh_per_second=4, transient=False
    )

  def __enter__(self) -> 'LiveTable':
    self._live.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._live.stop()

  def table(self) -> Group:
    """Returns the table as it is now, no longer than the terminal, and its caption."""
    begin, end = shown(self.rows, max(1, self._console.height - ROOM))
    table = Table(*HEADINGS, box=None, pad_edge=False)
    for row in self.rows[begin:end]:
      style = {WAITING: 'dim', FAILED: 'red', RUNNING: 'bold'}.get(row.state)
      table.add_row(*row.texts, style=style)
    return Group(table, self.caption)

  @property
  def caption(self) -> str:
    """How many cells are done, and how long the others will take at that rate."""
    states = [row.state for row in self.rows]
    done, failed = (states.count(state) for state in (FINISHED, FAILED))
    left = len(states) - done - failed
    summary = f'{done} of {len(states)} cells finished'
    summary += f', {failed} failed' * bool(failed)
    if left and self._took:
      mean = sum(self._took) / len(self._took)
      summary += f', about {duration(left * mean)} left'
    return summary

  def screen(self, number: int) -> 'CellScreen':
    """Returns the stand-in for a `screen.Screen` of a cell."""
    return CellScreen(self.rows[number], self._console, self._clock)

  def took(self, seconds: float, cells: int) -> None:
    """Records how long cells took together; the rest is estimated from it."""
    self._took += [seconds / cells] * cells


class CellScreen:
  """Shows a run in its row: a `screen.Screen` that prints only lines."""

  def __init__(self, row: Row, console: Console, clock: Callable[[], float]):
    self._row = row
    self._console = console
    self._clock = clock
    self._began: tuple[float, int] | None = None

  def begin(self) -> None:
    """Shows that the cell is next."""
    self._row.state = RUNNING

  def line(self, text: str) -> None:
    """Prints one line above the table."""
    cell = f'{self._row.method}, seed {self._row.seed}'
    self._console.print(f'{cell}: {text}', markup=False)

  def line_if_followed(self, text: str) -> None:
    """Leaves out a line that only reports progress."""

  def table(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Leaves out tables, which are in the files of the run."""

  def follow(self, stage: str, steps: int) -> None:
    """Every row is followed."""

  def start_bar(self, name: str, step: int, steps: int) -> None:
    """Begins a stage."""
    row = self._row
    row.state, row.stage, row.step, row.steps, row.left = (
      RUNNING,
      name,
      step,
      steps,
      None,
    )
    self._began = None

  def progress(self, step: int) -> None:
    """Moves the bar; the first call compiles, so it does not count in the speed."""
    now = self._clock()
    if self._began is None:
      self._began = now, step
    began, first = self._began
    if step > first:
      self._row.left = (self._row.steps - step) / (step - first) * (now - began)
    self._row.step = step

  def status(self, text: str, line: str) -> None:
    """Shows the loss until there is something better."""
    if not self._row.metric or self._row.metric.startswith('loss'):
      self._row.metric = text

  def evaluated(self, step: int, metric: str, values: Mapping[str, Any]) -> None:
    """Shows a metric on the split that matters most."""
    split = next((name for name in ('test', 'val') if name in values), None)
    if split:
      self._row.metric = f'{100 * values[split]:.1f} % {metric} on {split}'

  def stop_bar(self) -> None:
    """Ends a stage; the time left is unknown until the next one."""
    self._row.left = None

  def end(self, failed: bool, metric: str) -> None:
    """Shows how the cell ended, and the metric of its result if it has one."""
    self._row.state = FAILED if failed else FINISHED
    self._row.metric = metric
