"""Which values of config keys are best for a recipe, by validation.

A recipe that was run with several configs on the same data is a grid. Its cells are
groups of seeds. The chosen cell has the best mean on validation images, of the metric
that `config.select` names or else of the headline. Test metrics are only reported.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lt_jax.config import trained_by
from lt_jax.evals import TASKS
from lt_jax.report.drawing import (
  CYCLE,
  Drawn,
  legend,
  mean_and_deviation,
  over_seeds,
  plot,
)
from lt_jax.report.runs import Group, NotApplicable, Run, printable
from lt_jax.report.tables import Table, percent


class Grid(NamedTuple):
  """A recipe's runs with several configs.

  Attributes:
    recipe: its name.
    keys: config keys in which the cells differ.
    cells: finished groups.
    values: for each cell, the values of the keys.
    metric: the one by which a cell is chosen.
    chosen: the index of the best cell; None without validation images.
  """

  recipe: str
  keys: list[str]
  cells: list[Group]
  values: list[tuple[Any, ...]]
  metric: str
  chosen: int | None


def grids(groups: Sequence[Group]) -> list[Grid]:
  """Returns the grids among groups of runs."""
  kinds: dict[tuple[str, str], list[Group]] = {}
  for group in groups:
    if group.counted:
      run = group.counted[0]
      key = (f'{run.config["name"]}: {run.recipe}', run.kind[1])
      kinds.setdefault(key, []).append(group)
  return [
    _grid(printable(name.partition(': ')[2]), cells)
    for (name, _), cells in kinds.items()
    if len(cells) > 1
  ]


def _grid(recipe: str, cells: list[Group]) -> Grid:
  configs = [trained_by(group.counted[0].config) for group in cells]
  keys = _distinguishing(configs)
  values = [tuple(config.get(key) for key in keys) for config in configs]
  split, _, metric = str(configs[0].get('select', '')).partition('/')
  headline = cells[0].counted[0].headline
  metric = metric if split == 'val' else headline
  means = [_validated(group, metric) for group in cells]
  known = [task.metrics[metric] for task in TASKS.values() if metric in task.metrics]
  better = known[0].better if known else 1
  whole = None not in means
  best = int(np.argmax([better * mean for mean in means])) if whole else None
  return Grid(recipe, keys, cells, values, metric, best)


def _distinguishing(configs: Sequence[dict[str, Any]]) -> list[str]:
  """Returns the keys in which configurations differ, one of those that vary together.

  It is the one with the shortest name: keys derived from another have longer names.
  """
  found: dict[str, str] = {}
  differing = {k for config in configs for k in config if k != 'seed'}
  for key in sorted(differing, key=lambda key: (key.count('.'), len(key), key)):
    values = [json.dumps(config.get(key)) for config in configs]
    parts = json.dumps([values.index(value) for value in values])
    if len(set(values)) > 1:
      found.setdefault(parts, key)
  return sorted(found.values())


def _validated(group: Group, metric: str) -> float | None:
  """Returns the mean of a metric on validation images; None if a run lacks it."""
  values = [(run.result.get('val') or {}).get(metric) for run in group.counted]
  return None if None in values else float(np.mean(values))


def choices(found: Sequence[Grid]) -> list[str]:
  """Says in a line for each grid which cell was chosen, if any was."""
  return [
    f'Chosen on validation images: {grid.recipe} with {_setting(grid, grid.chosen)}'
    for grid in found
    if grid.chosen is not None
  ]


def _setting(grid: Grid, place: int) -> str:
  """Returns the keys and values of a cell."""
  pairs = zip(grid.keys, grid.values[place], strict=True)
  return printable(', '.join(f'{key}={_as_text(value)}' for key, value in pairs))


def remark(found: Sequence[Grid]) -> str:
  """Returns what stands above the table."""
  if all(grid.chosen is None for grid in found):
    return 'Values in %; without validation images, none is chosen.'
  return 'Values in %; the chosen one has the best mean on validation images.'


def grids_table(found: Sequence[Grid]) -> Table:
  """Returns one row per cell: its values, the metric on validation and test images."""
  rows, links = [], []
  for grid in found:
    for place, cell in enumerate(grid.cells):
      setting = _setting(grid, place)
      val, test = (
        percent(
          [(run.result.get(split) or {}).get(grid.metric) for run in cell.counted]
        )
        for split in ('val', 'test')
      )
      mark = 'yes' if place == grid.chosen else ''
      row = [grid.recipe, setting, str(len(cell.counted)), val, test, mark]
      rows.append(row)
      links.append(f'#{cell.anchor}')
  headings = ['method', 'values', 'seeds', 'on validation', 'on test', 'chosen']
  return Table(headings, rows, links)


def _as_text(value: Any) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)


def error_by_value(found: Sequence[Grid]) -> Drawn:
  """Draws the error against a numeric key, one line per setting of the other keys.

  The key is the one with the most values; all recipes that vary it share the plot.
  """
  key, shown = _number(found)
  places = sorted({grid.values[i][grid.keys.index(key)] for grid, i in _cells(shown)})
  recipes = {grid.recipe for grid in shown}
  lines: dict[str, list[tuple[Any, Group, bool]]] = {}
  for grid, i in _cells(shown):
    values = dict(zip(grid.keys, grid.values[i], strict=True))
    x = values.pop(key)
    parts = [
      f'{name}={_as_text(v)}'
      for name, v in zip(_short(values), values.values(), strict=True)
    ]
    label = ', '.join([grid.recipe] * (len(recipes) > 1 or not parts) + parts)
    lines.setdefault(label, []).append((x, grid.cells[i], i == grid.chosen))
  columns = 4 if max(map(len, lines)) < 20 else 2 if max(map(len, lines)) < 40 else 1
  figure, axes = plot(size=(5.6, 3.2 + 0.2 * math.ceil(len(lines) / columns)))
  for number, (name, points) in enumerate(lines.items()):
    colour = CYCLE[number % len(CYCLE)]
    points.sort(key=lambda point: point[0])
    x = [places.index(value) for value, _, _ in points]
    marker = 'os^D'[number // len(CYCLE) % 4]  # once the colours repeat
    for split, style in SPLITS.items():
      values = [_errors(group.counted, split) for _, group, _ in points]
      if any(None in seeds for seeds in values):
        continue
      pairs = [mean_and_deviation(seeds) for seeds in values]
      mean = [mean for mean, _ in pairs]
      spread = [0 if deviation is None else deviation for _, deviation in pairs]
      label = printable(name) if split == 'test' else None
      axes.errorbar(
        x,
        mean,
        spread,
        color=colour,
        label=label,
        capsize=2,
        markersize=4,
        marker=marker if split == 'test' else '.',
        **style,
      )
      for place, value, (_, _, best) in zip(x, mean, points, strict=True):
        if best and split == 'test':
          axes.plot(place, value, 'o', color='none', mec=colour, markersize=11)
  axes.set_xticks(range(len(places)), [_as_text(value) for value in places])
  axes.set(xlabel=key, ylabel='error (%)')
  legend(figure, axes, columns)
  spread = over_seeds([cell for grid in shown for cell in grid.cells])
  return figure, (
    f'Error against {key} on test images (solid) and on validation images (dashed), '
    f'which chose the circled cells{spread}.'
  )


def _short(keys: Iterable[str]) -> list[str]:
  """Returns the last parts of keys, or the whole keys if these are not unique."""
  keys = list(keys)
  last = [key.rpartition('.')[2] for key in keys]
  return last if len(set(last)) == len(last) else keys


SPLITS = {
  'test': {'linestyle': '-', 'elinewidth': 1},
  'val': {'linestyle': '--', 'elinewidth': 0, 'alpha': 0.5},
}


def _cells(found: Sequence[Grid]) -> list[tuple[Grid, int]]:
  return [(grid, i) for grid in found for i in range(len(grid.cells))]


def _number(found: Sequence[Grid]) -> tuple[str, list[Grid]]:
  """Returns the numeric key with the most values, and the grids that have it.

  Raises:
    NotApplicable: there is none.
  """
  counts: dict[str, int] = {}
  for grid in found:
    for key, values in zip(grid.keys, zip(*grid.values, strict=True), strict=True):
      if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        counts[key] = max(counts.get(key, 0), len(set(values)))
  if not counts:
    raise NotApplicable('the runs of a recipe do not differ in a number')
  key = max(counts, key=lambda name: counts[name])
  return key, [
    grid
    for grid in found
    if key in grid.keys
    and all(isinstance(v[grid.keys.index(key)], int | float) for v in grid.values)
  ]


def _errors(runs: Sequence[Run], split: str) -> list[float | None]:
  """Returns 1 - accuracy, or 1 - mIoU, in %, of each run."""
  found = [(run.result.get(split) or {}).get(run.headline) for run in runs]
  return [None if value is None else 100 * (1 - value) for value in found]
