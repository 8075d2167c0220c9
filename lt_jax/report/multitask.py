"""Multi-task results: each task compared with a network that learned it alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lt_jax.evals.multitask import relative_gain
from lt_jax.report.runs import Group, Run
from lt_jax.report.tables import Table, percent

REMARK = (
  'Accuracy or mean average precision on test images in %; for a regression, the root '
  'mean squared error times 100. The gain is the mean over tasks of the relative '
  'difference from networks that learned one task alone (method.only) on the same data.'
)

OWN = 'label'
"""The task of the network's own head."""

MEASURE = {
  'softmax': ('accuracy', 1),
  'sigmoid': ('map', 1),
  'regression': ('rmse', -1),
}
"""Kind -> (the measure shown, 1 if more is better or -1 if less is)."""

ALONE, EQUAL, FIXED = 'one task alone', 'equal', 'fixed'


def multitask_table(groups: Sequence[Group]) -> Table:
  """Returns one row per multi-task method, with the relative gain over the controls.

  A control is a run that learned one task alone (`method.only`) on the same data.
  Measures are in %; for a regression, the root mean squared error times 100. The last
  column is the mean relative gain, '-' if a control is missing. The fixed weights with
  the best mean over tasks on validation images are marked.
  """
  shown = _of_several(groups)
  tasks = list(dict.fromkeys(t for group in shown for t in _tasks(group.counted[0])))
  alone: dict[tuple[str, str], float] = {}
  for group in shown:
    if only := _only(group):
      alone[_data(group), only] = np.mean(_values(group, only))
  best = _best_fixed(shown)
  rows = []
  for group in shown:
    own = _tasks(group.counted[0])
    gain = None
    if not _only(group) and all((_data(group), task) in alone for task in own):
      together = {task: float(np.mean(_values(group, task))) for task in own}
      single = {task: alone[_data(group), task] for task in own}
      gain = relative_gain(together, single, {k: sign for k, (_, sign) in own.items()})
    chosen = any(group is one for one in best)
    rows.append(
      [
        group.label,
        _weights(group) + ', best on validation' * chosen,
        *(percent(_values(group, task)) if task in own else '-' for task in tasks),
        '-' if gain is None else f'{100 * gain:+.1f}',
      ]
    )
  return Table(
    ['method', 'weights', *tasks, 'gain over single tasks'],
    rows,
    [f'#{group.anchor}' for group in shown],
  )


def remarks(groups: Sequence[Group]) -> list[str]:
  """Returns a line for every control that the multi-task table lacks."""
  shown, lines = _of_several(groups), []
  for data in dict.fromkeys(map(_data, shown)):
    own = [group for group in shown if _data(group) == data]
    if all(_only(group) for group in own):
      continue
    tasks = dict.fromkeys(task for group in own for task in _tasks(group.counted[0]))
    kinds, controls = (
      {_weights(group) for group in own},
      {_only(group) for group in own},
    )
    if missing := [task for task in tasks if task not in controls]:
      lines.append(
        f'No network learned {", ".join(missing)} alone, so there is no gain over '
        f'single tasks; run --grid=method.only={",".join(tasks)}.'
      )
    if EQUAL not in kinds:
      lines.append('No run has equal weights; run --methods=multitask.')
    if not _best_fixed(own):
      lines.append(
        'The best fixed weights are not known; run several fixed weights, '
        '--grid=method.weights.TASK=..., on data with validation images.'
      )
  return lines


def _of_several(groups: Sequence[Group]) -> list[Group]:
  """Returns the finished groups with several tasks."""
  return [group for group in groups if group.counted and _tasks(group.counted[0])]


def _weights(group: Group) -> str:
  """Says how the tasks are weighted."""
  if only := _only(group):
    return f'{ALONE}: {only}'
  run = group.counted[0]
  method = run.config['method']
  kind = method.get('weighting') or FIXED
  if kind != FIXED:
    return kind
  tasks = _tasks(run)
  given = method.get('weights') or {}
  values = [given.get(task, 1 / len(tasks)) for task in tasks]
  if len(set(values)) == 1:
    return EQUAL
  return f'{FIXED} ({", ".join(f"{value:.3g}" for value in values)})'


def _best_fixed(groups: Sequence[Group]) -> list[Group]:
  """Returns the fixed weights that are best on validation images, for each data set.

  A data set is left out if fewer than two were tried, or if a run has no validation
  images.
  """
  found = []
  for data in dict.fromkeys(map(_data, groups)):
    fixed = [
      group
      for group in groups
      if _data(group) == data and _weights(group).startswith((EQUAL, FIXED))
    ]
    means = [_validated(group) for group in fixed]
    if len(fixed) > 1 and None not in means:
      found.append(fixed[int(np.argmax(means))])
  return found


def _validated(group: Group) -> float | None:
  values = [(run.result.get('val') or {}).get('task_mean') for run in group.counted]
  return None if None in values else float(np.mean(values))


def _tasks(run: Run) -> dict[str, tuple[str, int]]:
  """Returns task -> (its measure, 1 if more is better, else -1); {} for one task."""
  method: Mapping[str, Any] = run.config.get('method') or {}
  if method.get('name') != 'multitask':
    return {}
  found = {OWN: ('accuracy', 1)}
  for name, head in (run.config.get('heads') or {}).items():
    measure, sign = MEASURE.get(head.get('kind'), ('accuracy', 1))
    found[name] = f'{name}_{measure}', sign
  return found


def _only(group: Group) -> str:
  return str(group.counted[0].config['method'].get('only') or '')


def _data(group: Group) -> str:
  return group.counted[0].kind[1]


def _values(group: Group, task: str) -> list[float]:
  measure, _ = _tasks(group.counted[0])[task]
  found = [run.result['test'].get(measure) for run in group.counted]
  return [np.nan if value is None else value for value in found]
