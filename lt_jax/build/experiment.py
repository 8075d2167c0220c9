"""What a run needs, built: its data, its devices and its stages."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from lt_jax.config import Config
from lt_jax.data.dataset import Dataset
from lt_jax.data.streams import Pass, Stream
from lt_jax.evals.collect import Survey
from lt_jax.method import Method, State
from lt_jax.surgery import Surgery
from lt_jax.train import Plan


class Stage(NamedTuple):
  """One stage: an ordinary run, which begins from the States of earlier ones.

  Attributes:
    name: of the stage.
    method: what is trained.
    streams: what it is trained on.
    reads: streams whose arrays an earlier stage leaves: name of the stream -> stage.
    save_outputs: outputs of each training image that it saves for later stages.
    start: what puts published weights into a fresh State, and tells of it, or refuses
      to do without; None: they are random.
    surgeries: from a fresh State and earlier ones to the first State.
    plan: when things happen; `first` is set when the first State is known.
    epoch_steps: steps an epoch, fractional.
    batch: global batch size.
    select: (split, metric) by which the State that counts is chosen; None: the last.
  """

  name: str
  method: Method
  streams: dict[str, Stream]
  reads: dict[str, str]
  save_outputs: tuple[str, ...]
  start: Callable[[State], tuple[State, dict[str, Any]]] | None
  surgeries: tuple[Surgery, ...]
  plan: Plan
  epoch_steps: float
  batch: int
  select: tuple[str, str] | None


class Experiment(NamedTuple):
  """Everything a run needs.

  Attributes:
    config: the resolved configuration.
    dataset: its data.
    mesh: its devices.
    passes: split -> evaluation pass.
    survey: a method's `predict` -> its passes over all splits, those of training too.
    groups: 'many', 'medium' and 'few', strict, and '<group>_inclusive' -> (C,) bool.
    stages: in order.
  """

  config: Config
  dataset: Dataset
  mesh: Mesh
  passes: dict[str, Pass]
  survey: Callable[[Callable], Survey]
  groups: dict[str, np.ndarray]
  stages: dict[str, Stage]
