"""A run's log as curves over all its stages."""

import numpy as np

from lt_jax.report.runs import Run, printable


def stages_of(run: Run) -> dict[str, tuple[int, int]]:
  """Returns stage -> (where it begins, what to add to its steps), in order.

  Each stage counts its steps from 0, unless it continues the clock of the one before.
  """
  found, end = {}, 0
  for stage in dict.fromkeys(row.get('stage') for row in run.rows):
    surgeries = run.config.get('stages', {}).get(stage, {}).get('surgeries', ())
    goes_on = any(
      name == 'carry' and 'step' in options.get('fields', ())
      for name, options in surgeries
    )
    offset = 0 if goes_on else end
    found[printable(str(stage))] = (end, offset)
    steps = (row.get('step', 0) for row in run.rows if row.get('stage') == stage)
    end = offset + max(steps)
  return found


def curve(
  run: Run, split: str, name: str, scale: float = 1
) -> tuple[list[float], list[float]]:
  """Returns steps and values of a metric, NaN where it was not finite."""
  stages = stages_of(run)
  points = [
    (row['step'] + stages[printable(str(row.get('stage')))][1], row[name])
    for row in run.rows
    if row.get('split') == split and name in row and 'step' in row
  ]
  values = [np.nan if value is None else scale * value for _, value in points]
  return [step for step, _ in points], values
