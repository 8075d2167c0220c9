"""Several tasks at once: each task beside the network that learned it alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lt_jax.evals.multitask import relative_gain
from lt_jax.report.runs import Group, Run
from lt_jax.report.tables import Table, percent

REMARK = (
  'Accuracy or mean average precision on test images in %, of a regression the root '
  'mean squared error times 100; the gain is the mean over tasks of the relative '
  'difference to networks that learned one task alone (method.only) on the same data.'
)

OWN = 'label'
"""The task of the network's own head."""

MEASURE = {
  'softmax': ('accuracy', 1),
  'sigmoid': ('map', 1),
  'regression': ('rmse', -1),
}
"""Kind -> (the measure that is shown, whether more of it is better or less)."""


def multitask_table(groups: Sequence[Group]) -> Table:
  """Returns a row a method of several tasks, with the relative gain over controls.

  A control is a run that learned one task alone (`method.only`), on the same data.
  Measures are in %, of a regression the root mean squared error. The last column is the
  mean relative gain, '-' where a control is missing.
  """
  shown = [group for group in groups if group.counted and _tasks(group.counted[0])]
  tasks = list(dict.fromkeys(t for group in shown for t in _tasks(group.counted[0])))
  alone: dict[tuple[str, str], float] = {}
  for group in shown:
    if only := _only(group):
      alone[_data(group), only] = np.mean(_values(group, only))
  rows = []
  for group in shown:
    own = _tasks(group.counted[0])
    gain = None
    if not _only(group) and all((_data(group), task) in alone for task in own):
      together = {task: float(np.mean(_values(group, task))) for task in own}
      single = {task: alone[_data(group), task] for task in own}
      gain = relative_gain(together, single, {k: sign for k, (_, sign) in own.items()})
    rows.append(
      [
        group.label,
        *(percent(_values(group, task)) if task in own else '-' for task in tasks),
        '-' if gain is None else f'{100 * gain:+.1f}',
      ]
    )
  return Table(
    ['method', *tasks, 'gain over single tasks'],
    rows,
    [f'#{group.anchor}' for group in shown],
  )


def _tasks(run: Run) -> dict[str, tuple[str, int]]:
  """Returns task -> (its measure, the sign of better); {} of a run of one task."""
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
