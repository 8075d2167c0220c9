"""A config under test: findings, and what several checks share."""

import concurrent.futures
import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lt_jax import build, files, run
from lt_jax.cautions import cautions, check_memory
from lt_jax.config import Config
from lt_jax.data.dataset import Dataset, load_dataset
from lt_jax.data.reading import usable_cores
from lt_jax.errors import UserError
from lt_jax.method import State

SAMPLE = 256
"""How many images of a split to decode."""


class Finding(NamedTuple):
  """The result of one check.

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


class CheckSkipped(Exception):
  """A check is impossible because an earlier one failed to provide its input."""


class Trial(NamedTuple):
  """A stage with its compiled step.

  Attributes:
    stage: the stage of the run.
    state: its initial state, with the clock at the end of the warm-up.
    batches: payloads of two steps, placed on the devices.
    update: (state, payloads) -> (state, metrics, whether they are finite); consumes the
      state.
    compile_seconds: compilation time.
    memory: component -> bytes per device.
  """

  stage: build.Stage
  state: State
  batches: tuple[Any, Any]
  update: Callable[[State, Any], tuple[State, dict[str, np.ndarray], bool]]
  compile_seconds: float
  memory: dict[str, float]


class Step(NamedTuple):
  """The result of one step from the initial state.

  Attributes:
    loss: the loss before the step.
    finite: whether the metrics and the new state are finite.
    moved: array of parameters -> whether it changed.
    blind: whether another batch gave exactly the same parameters.
    seconds: time of a compiled step.
  """

  loss: float
  finite: bool
  moved: dict[str, bool]
  blind: bool
  seconds: float


class Case:
  """A config, and what the checks have found out about it.

  Attributes:
    config: the resolved config.
    workdir: the folder of the run, or None.
    thorough: whether to look at all images.
    sizes: split -> (N, 2) widths and heights of the images that are files.
    trials: stage -> its compiled step.
    steps: stage -> the result of that step.
  """

  def __init__(
    self, config: Config, workdir: str | None = None, thorough: bool = False
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
    # Without a folder no stage has started.
    workdir = self.workdir or epath.Path(os.devnull)
    try:
      experiment = run.rehearsed(self.config, workdir)
      check_memory(experiment)
    except UserError as error:
      yield wrong(str(error))
      self._open_data()
      return
    self._experiment, self._dataset = experiment, experiment.dataset
    steps = ', '.join(f'{s.name} {s.plan.steps:,}' for s in experiment.stages.values())
    yield ok(f'the config can be built; steps: {steps}')
    yield from map(odd, cautions(experiment))

  def _open_data(self) -> None:
    """Opens only the data, if they can be opened.

    Their error is not reported: it is that of building, or follows from it.
    """
    keys = inspect.signature(load_dataset).parameters
    options = {k: v for k, v in self.config['data'].items() if k in keys}
    with contextlib.suppress(UserError):
      self._dataset = load_dataset(**options, to_device=lambda images: images)

  @property
  def experiment(self) -> build.Experiment:
    """The objects of the run."""
    if self._experiment is None:
      raise CheckSkipped('the config cannot be built')
    return self._experiment

  @property
  def dataset(self) -> Dataset:
    """Its data."""
    if self._dataset is None:
      raise CheckSkipped('the data cannot be opened')
    return self._dataset

  @property
  def real(self) -> Dataset:
    """Its data, unless they are generated."""
    if self.config['data']['source'] == 'fake':
      raise CheckSkipped('the images are generated')
    return self.dataset

  @property
  def folder(self) -> epath.Path:
    """The folder of the run."""
    if self.workdir is None:
      raise CheckSkipped('no --workdir is given')
    return self.workdir

  @functools.cached_property
  def sample(self) -> np.ndarray:
    """(n, H, W, channels) uint8, training images cropped as in evaluation."""
    split = self.real.splits['train']
    images, _ = each(split.image, sampled(split.rows))
    if len({image.shape for image in images}) != 1:
      raise CheckSkipped('no training images of one size can be read')
    return np.stack(images)


def each(
  function: Callable[[int], Any], rows: Iterable[int]
) -> tuple[list[Any], list[UserError]]:
  """Applies a function to rows in threads; returns its results and its errors."""

  def safe(row: int) -> Any:
    try:
      return function(int(row))
    except UserError as error:
      return error

  with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
    found = list(pool.map(safe, rows))
  bad = [one for one in found if isinstance(one, UserError)]
  return [one for one in found if not isinstance(one, UserError)], bad


def sampled(rows: np.ndarray) -> np.ndarray:
  """Returns `SAMPLE` rows, always the same ones, or all if there are fewer."""
  few = min(SAMPLE, len(rows))
  return np.sort(np.random.default_rng(0).choice(rows, few, replace=False))


def one_line(error: Exception) -> str:
  """Returns the message of an error on one line."""
  return ' '.join(str(error).split())[:500]  # XLA lists every buffer
