"""Everything a run needs, built: its data, its devices and its stages."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from lt_jax.config import CLOCK, SOURCE, TARGET, Config
from lt_jax.data.dataset import Dataset
from lt_jax.data.streams import Pass, Split, Stream, Unlabelled
from lt_jax.evals.collect import Survey
from lt_jax.evals.tasks import Task
from lt_jax.method import Method, State
from lt_jax.models.layers import Layer
from lt_jax.optim import Optimizer
from lt_jax.surgery import Surgery
from lt_jax.train import Plan, state_shapes

PREPROCESSING = (
  'mean',
  'std',
  'unit',
  'pad',
  'pad_mode',
  'flip',
  'jitter',
  'image_size',
  'resize',
)
"""Keys of `data` that data.json records of the images that are predicted."""


class Left(NamedTuple):
  """What an earlier stage leaves for a stream.

  Attributes:
    stage: the stage that leaves it.
    shapes: name in its arrays.npz -> shape.
    into: (stream, name -> array, puts arrays on the devices) -> the stream with them;
      the streams of several seeds must go on sharing `prepare`.
    ordered_by: name in its arrays.npz of what orders the images; empty for none.
  """

  stage: str
  shapes: dict[str, tuple[int, ...]]
  into: Callable[[Stream, Mapping[str, np.ndarray], Callable], Stream]
  ordered_by: str = ''


class Selection(NamedTuple):
  """By what the State that counts is chosen.

  Attributes:
    split: 'val', or 'target' for a criterion that needs no label of a target.
    metric: its name.
    better: 1 if more is better, -1 if less is.
  """

  split: str
  metric: str
  better: int


class Stage(NamedTuple):
  """One stage: an ordinary run, which begins from the States of earlier ones.

  Attributes:
    name: of the stage.
    method: what is trained.
    net: its network, for who looks into it.
    optimizer: what trains it.
    layers: () -> the layers of its trunk, from the images on.
    drawn: names of parameters of the trunk that are drawn anew in the beginning.
    weigh: how it weighs examples, see `Reweighted` of `lt_jax.methods.meta`; None if it
      does not learn to.
    domain: a domain or role whose classes it learns.
    dataset: its data.
    task: what is measured.
    groups: 'many', 'medium' and 'few', strict, and '<group>_inclusive' -> (C,) bool,
      and those of the task.
    streams: what it is trained on.
    trained_on: streams of images -> name of the split.
    images: the images of every pass and stream, by the name of the split. Those of
      'test' are of the target domains where there are any, else of its own domain.
    uses_target_labels: whether a stream gives labels of a target domain, or the stage
      learns the classes of one.
    passes: split -> evaluation pass; those of other domains are called DOMAIN/SPLIT.
    compared: its own domain and each target -> a pass over some training images without
      labels, which tells how far they are apart; empty without a target.
    survey: its passes over what it may learn from, for surgeries.
    reads: streams that read what an earlier stage leaves: name of the stream -> what.
    save_outputs: what it saves of images for later stages, see `evals.saved`.
    start: what puts published weights into a fresh State, and tells of it, or refuses
      to do without; None: they are random.
    surgeries: from a fresh State and earlier ones to the first State.
    plan: when things happen; `first` is set when the first State is known.
    epoch_steps: steps an epoch, fractional.
    batch: the largest batch of a step.
    select: by what the State that counts is chosen; None: it is the last.
    scores: (state, stop) -> split -> criteria of a State that need no label of a
      target, None if `stop()` turned true; None where no target is adapted to.
  """

  name: str
  method: Method
  net: nn.Module
  optimizer: Optimizer
  layers: Callable[[], tuple[Layer, ...]]
  drawn: tuple[str, ...]
  weigh: Callable[..., Any] | None
  domain: str
  dataset: Dataset
  task: Task
  groups: dict[str, np.ndarray]
  streams: dict[str, Stream]
  trained_on: dict[str, str]
  images: dict[str, Split | Unlabelled]
  uses_target_labels: bool
  passes: dict[str, Pass]
  compared: dict[str, Pass]
  survey: Survey
  reads: dict[str, Left]
  save_outputs: tuple[str, ...]
  start: Callable[[State], tuple[State, dict[str, Any]]] | None
  surgeries: tuple[Surgery, ...]
  plan: Plan
  epoch_steps: float
  batch: int
  select: Selection | None
  scores: Callable[[State, Callable[[], bool]], dict[str, Any] | None] | None


class Experiment(NamedTuple):
  """Everything a run needs.

  Attributes:
    config: the resolved config.
    domains: name -> data; 'source' alone where no other is named.
    roles: 'source', 'target' and 'open' -> names of their domains.
    data: name of a domain or role -> its keys of `data`, `mean` and `std` as they were
      fitted where that was asked for.
    fingerprint: SHA-256 of what is trained and evaluated on.
    mesh: its devices.
    stages: in order.
  """

  config: Config
  domains: dict[str, Dataset]
  roles: dict[str, tuple[str, ...]]
  data: dict[str, Config]
  fingerprint: str
  mesh: Mesh
  stages: dict[str, Stage]

  @property
  def last(self) -> Stage:
    """The last stage, whose State is the run's result."""
    return [*self.stages.values()][-1]

  @property
  def deployed_in(self) -> str:
    """The domain that prediction takes images for: the first target.

    Without a target, the domain whose classes the last stage learns.
    """
    own = self.last.domain
    return next(iter(self.roles[TARGET] or self.roles.get(own) or (own,)))

  @property
  def preprocessing(self) -> dict[str, Any]:
    """What prediction does with an image: keys of the domain it is deployed in."""
    return {key: self.data[self.deployed_in][key] for key in PREPROCESSING}

  @property
  def predicts_by(self) -> str:
    """By whose normalisation and batch statistics images are predicted, in words."""
    told = statistics_of(self.last, self.stages)
    return f'normalised as {self.deployed_in!r}; batch statistics: {told}'

  def evaluates_by(self, stage: Stage) -> str:
    """Returns the same of evaluation, which knows the domain of an image."""
    if len(self.domains) == 1:
      return self.predicts_by
    told = statistics_of(stage, self.stages)
    if told == TARGETS_OWN:
      told += f', for images of {stage.domain!r} its own'
    return f'each domain normalised as itself; batch statistics: {told}'

  @property
  def dataset(self) -> Dataset:
    """The data of the last stage."""
    return self.last.dataset

  @property
  def groups(self) -> dict[str, np.ndarray]:
    """The shot groups of the last stage."""
    return self.last.groups

  @property
  def passes(self) -> dict[str, Pass]:
    """The evaluation passes of the last stage."""
    return self.last.passes


TARGETS_OWN = "the target's own"


def statistics_of(stage: Stage, stages: Mapping[str, Stage]) -> str:
  """Says where the batch statistics come from that the network is deployed with.

  Args:
    stage: whose network it is.
    stages: of the run, in order.
  """
  stats = state_shapes(stage.method, stage.streams).stats
  if not jax.tree.leaves(stats['net']):
    return 'none'
  if 'net_source' in stats:
    return TARGETS_OWN
  names: dict[str, None] = {}
  for name, one in stages.items():
    streams = sorted(one.trained_on, key=lambda stream: stream != CLOCK)
    for stream in streams if one.plan.steps else ():
      names[one.trained_on[stream].rpartition('/')[0] or SOURCE] = None
    if name == stage.name:
      break
  return f'left by training on {" and ".join(names)}' if names else 'inherited'
