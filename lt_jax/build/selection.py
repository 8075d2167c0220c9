"""Selects the best State, never by test images or target labels."""

from collections.abc import Callable, Mapping

import numpy as np
from jax.sharding import Mesh

from lt_jax.build.experiment import Selection
from lt_jax.config import TARGET
from lt_jax.data.dataset import Dataset
from lt_jax.data.streams import Pass
from lt_jax.errors import UserError, lookup
from lt_jax.evals import label_free
from lt_jax.evals.collect import collector
from lt_jax.evals.tasks import Task
from lt_jax.method import Method, State

Scores = Callable[[State, Callable[[], bool]], dict[str, dict[str, float]] | None]


def selection(
  select: str,
  task: Task,
  dataset: Dataset,
  groups: Mapping[str, np.ndarray],
  adapts: bool,
) -> Selection | None:
  """Returns the criterion that selects the best State; None to take the last one.

  Args:
    select: 'last', 'val/METRIC' or 'target/CRITERION'.
    task: the task, which has the metrics.
    dataset: data of the stage.
    groups: its shot groups.
    adapts: whether it adapts to a target, whose images it may then use.

  Raises:
    UserError: it names a test set, labels of a target, or something that does not
      exist.
  """
  if select == 'last':
    return None
  split, _, metric = str(select).partition('/')
  if split.endswith('test'):
    raise UserError('select: a checkpoint is never chosen on a test set')
  if split == 'oracle':
    raise UserError(
      'select: a checkpoint is never chosen by labels of a target, as oracle/ would be'
    )
  if split == TARGET and metric:
    criteria = {
      name: one
      for name, one in label_free.CRITERIA.items()
      if not (task.per_pixel and name in label_free.OF_IMAGES)
    }
    criterion = lookup(criteria, 'criterion to select by', metric)
    if not adapts:
      raise UserError(f'select is {select!r}, but no target is adapted to')
    if metric in label_free.NEED_VAL and 'val' not in dataset.splits:
      raise UserError(
        f'select is {select!r}, but there are no validation images: set '
        'data.val_per_class above 0'
      )
    return Selection(split, metric, criterion.better)
  if split != 'val' or not metric:
    raise UserError(
      f"select is {select!r}; use 'last', or a form like 'val/accuracy' or "
      "'target/entropy'"
    )
  choices = {name: one for name, one in task.metrics.items() if one.better}
  better = lookup(choices, 'metric to select by', metric).better
  if split not in dataset.splits:
    raise UserError(
      f'select is {select!r}, but there are no validation images: set '
      'data.val_per_class above 0'
    )
  if metric in groups and not groups[metric].any():
    raise UserError(f'select is {select!r}, but no class is {metric}-shot')
  return Selection(split, metric, better)


def label_free_scores(
  method: Method, task: Task, passes: Mapping[str, Pass], mesh: Mesh
) -> Scores | None:
  """Returns the label-free criteria of a State; None without a target to adapt to.

  Args:
    method: method of the stage.
    task: its task.
    passes: 'target/train', 'train' and optionally 'val', over a few images each; empty
      without a target to adapt to.
    mesh: the devices.

  Returns:
    (state, stop) -> {'target': criterion -> value}; None if `stop()` turned true
    meanwhile.
  """
  if not passes:
    return None
  names = {f'{TARGET}/train': 'target', 'train': 'train', 'val': 'val'}
  collect = collector(method.predict, task.criteria, mesh)

  def scores(
    state: State, stop: Callable[[], bool]
  ) -> dict[str, dict[str, float]] | None:
    seen = {names[split]: collect(state, one, stop) for split, one in passes.items()}
    if None in seen.values():
      return None
    return {TARGET: label_free.scores(label_free.Seen(**({'val': None} | seen)))}

  return scores
