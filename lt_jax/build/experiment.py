"""What `build` returns: a run's data, devices and stages."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from lt_jax.config import CLOCK, SOURCE, TARGET, Config, domain_data
from lt_jax.data.dataset import Dataset
from lt_jax.data.streams import Pass, Split, Stream, Unlabelled
from lt_jax.evals.collect import Survey
from lt_jax.evals.tasks import Task
from lt_jax.method import Method, State
from lt_jax.models.layers import Layer
from lt_jax.optim import Optimizer
from lt_jax.pretrained import ours
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
"""Keys of `data` that data.json records for prediction."""


class Left(NamedTuple):
  """What an earlier stage saved for a stream.

  Attributes:
    stage: the stage that saved it.
    shapes: name in its arrays.npz -> shape.
    into: (stream, name -> array, function that puts arrays on devices) -> the stream
      with these arrays. Streams of several seeds must still share `prepare`.
    ordered_by: name in arrays.npz of the array that orders the images; empty for none.
  """

  stage: str
  shapes: dict[str, tuple[int, ...]]
  into: Callable[[Stream, Mapping[str, np.ndarray], Callable], Stream]
  ordered_by: str = ''


class Selection(NamedTuple):
  """The criterion that chooses the best State.

  Attributes:
    split: 'val', or 'target' for a criterion that needs no labels of a target.
    metric: name of the metric or criterion.
    better: 1 if higher is better, -1 if lower is.
  """

  split: str
  metric: str
  better: int


class Stage(NamedTuple):
  """One stage: an ordinary run that starts from the States of earlier ones.

  Attributes:
    name: name of the stage.
    method: the method to train.
    net: its network, for inspection.
    optimizer: its optimiser.
    layers: () -> the layers of its trunk, starting at the images.
    drawn: names of parameters of the trunk that are initialised anew.
    weigh: how it weights examples, see `Reweighted` of `lt_jax.methods.meta`; None if
      it does not learn weights.
    domain: the domain or role whose classes it learns.
    dataset: its data.
    task: its task, which defines the metrics.
    groups: 'many', 'medium' and 'few', strict, and '<group>_inclusive' -> (C,) bool,
      and those of the task.
    streams: the streams it trains on.
    trained_on: streams of images -> name of the split.
    images: the images of every pass and stream, by name of the split. Those of 'test'
      are from the target domains if there are any, otherwise from its own domain.
    uses_target_labels: whether a stream provides labels of a target domain, the stage
      learns the classes of one, or a labelled domain has images of one.
    passes: split -> evaluation pass; those of other domains are called DOMAIN/SPLIT.
    compared: its own domain and each target -> a pass over some training images without
      labels, to measure how far apart they are; empty without a target.
    survey: passes over what surgeries may learn from.
    reads: name of a stream -> what it reads that an earlier stage saved.
    save_outputs: outputs to save for later stages, see `evals.saved`.
    start: function that puts published weights into a fresh State and reports on it, or
      raises if such weights are required; None for random weights.
    surgeries: from a fresh State and earlier ones to the first State.
    plan: when things happen; `first` is set once the first State is known.
    epoch_steps: steps per epoch, fractional.
    batch: the largest batch in a step.
    select: how the best State is chosen; None for the last one.
    scores: (state, stop) -> split -> criteria of a State that need no labels of a
      target, or None if `stop()` turned true; None without a target to adapt to.
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
    domains: name -> data; only 'source' if the config names no domains.
    roles: 'source', 'target' and 'open' -> names of their domains.
    data: name of a domain or role -> its keys of `data`, with `mean` and `std` as
      fitted, if requested.
    fingerprint: SHA-256 of the training and evaluation data.
    mesh: the mesh of its devices.
    stages: the stages, in order.
    sharing: labelled domain -> how many images of a target it has too.
  """

  config: Config
  domains: dict[str, Dataset]
  roles: dict[str, tuple[str, ...]]
  data: dict[str, Config]
  fingerprint: str
  mesh: Mesh
  stages: dict[str, Stage]
  sharing: dict[str, int]

  @property
  def last(self) -> Stage:
    """The last stage, whose State is the run's result."""
    return [*self.stages.values()][-1]

  @property
  def deployed_in(self) -> str:
    """The domain that images to predict are assumed to be from: the first target.

    Without a target it is the domain whose classes the last stage learns.
    """
    own = self.last.domain
    return next(iter(self.roles[TARGET] or self.roles.get(own) or (own,)))

  @property
  def preprocessing(self) -> dict[str, Any]:
    """How prediction prepares an image: keys of the domain it is deployed in."""
    return {key: self.data[self.deployed_in][key] for key in PREPROCESSING}

  @property
  def predicts_by(self) -> str:
    """The normalisation and batch statistics that prediction uses, in words."""
    statistics = statistics_of(self.last, self.stages)
    return f'normalised as {self.deployed_in!r}; batch statistics: {statistics}'

  def evaluates_by(self, stage: Stage) -> str:
    """Returns the same for evaluation, which knows the domain of an image."""
    if len(self.domains) == 1:
      return self.predicts_by
    statistics = statistics_of(stage, self.stages)
    if statistics == TARGETS_OWN:
      statistics += f', for images of {stage.domain!r} its own'
    return f'each domain normalised as itself; batch statistics: {statistics}'

  @property
  def begins_with_target_labels(self) -> bool:
    """Whether its initial weights were trained with labels of a target."""
    names = self.roles[TARGET]
    targets = [domain_data(self.config, name) for name in names]
    return bool(names) and ours.used_target_labels(self.config['init'], targets)

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
  """Says where the batch statistics of the deployed network come from.

  Args:
    stage: the stage with that network.
    stages: the run's stages, in order.
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
