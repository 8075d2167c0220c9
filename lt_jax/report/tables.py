"""Tables of a report: numbers over seeds, beside published ones, as Markdown and LaTeX.

Means are of the runs that `Group.counted` holds; standard deviations are of the sample
(n - 1), and there is none of one run.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from lt_jax.evals import TITLES
from lt_jax.report import published
from lt_jax.report.runs import Group, Run, printable

UNITS = 'Test metrics in %; of several seeds mean ± standard deviation.'
BY_CLASS = 'Test IoU in %, of several targets the mean.'
PUBLISHED = (
  'Most authors report the best epoch on the test set; ours is the State that the run '
  'selected.'
)


class Table(NamedTuple):
  """Text in rows and columns.

  Attributes:
    headings: of the columns.
    rows: of texts, as many each.
    links: where the first cell of each row leads; '' for nowhere.
    faint: (row, column) of the cells that are grey.
    runs: of each row, (text, address) of single runs, which its second cell links to.
  """

  headings: list[str]
  rows: list[list[str]]
  links: list[str]
  faint: Collection[tuple[int, int]] = ()
  runs: Sequence[Sequence[tuple[str, str]]] = ()


def percent(values: Sequence[float | None]) -> str:
  """Returns mean ± standard deviation in %, or n/a where a run has no such number."""
  if not values or None in values:
    return 'n/a'
  scaled = 100 * np.array(values, np.float64)
  deviation = f' ± {scaled.std(ddof=1):.1f}' if len(scaled) > 1 else ''
  # Of a number between two tenths, what it is and not how it is stored decides.
  return f'{round(scaled.mean(), 6):.1f}{deviation}'


def results_table(
  groups: Sequence[Group],
  within_noise: Collection[tuple[str, str]] = (),
  address: Callable[[Run], str] = lambda run: '',
) -> Table:
  """Returns a row a group, with the test metrics that any of them has, in %.

  Args:
    groups: of runs.
    within_noise: (anchor of a group, metric) of what is grey.
    address: where a run has a page or a folder; '' for nowhere.
  """
  columns = _columns(run for group in groups for run in group.runs)
  return Table(
    ['method', 'runs', *columns.values()],
    [
      [
        group.label,
        _states(group),
        *(
          percent([run.result['test'].get(name) for run in group.counted])
          if group.counted
          else '-'
          for name in columns
        ),
      ]
      for group in groups
    ],
    [f'#{group.anchor}' for group in groups],
    {
      (row, 2 + column)
      for row, group in enumerate(groups)
      for column, name in enumerate(columns)
      if (group.anchor, name) in within_noise
    },
    [
      [(str(run.seed), address(run)) for run in group.runs if address(run)]
      for group in groups
    ],
  )


def runs_table(runs: Sequence[Run], links: Sequence[str]) -> Table:
  """Returns a row a run; what has not finished says so."""
  columns = _columns(runs)
  return Table(
    ['run', 'seed', 'state', *columns.values(), 'wall time (s)', 'device'],
    [
      [
        run.name,
        str(run.seed),
        run.state,
        *(
          percent([run.result['test'].get(name)]) if run.result else '-'
          for name in columns
        ),
        str(run.result.get('wall_seconds', '-')),
        printable(str(run.result.get('device', '-'))),
      ]
      for run in runs
    ],
    list(links),
  )


def classes_table(groups: Sequence[Group]) -> Table:
  """Returns a row a method with the test IoU of each class in %, where pixels have one.

  Of several seeds it is the mean; a class that is nowhere in a run has none there.
  """
  found = [
    group for group in groups if group.counted and group.counted[0].task.per_pixel
  ]
  names = found[0].counted[0].class_names if found else []
  rows, links = [], []
  for group in found:
    runs = [run for run in group.counted if run.class_names == names]
    values = [run.result['test'][run.task.by_class] for run in runs]
    if len(runs) == len(group.counted):
      shown = [percent([one[c] for one in values]) for c in range(len(names))]
      rows.append([group.label, *shown])
      links.append(f'#{group.anchor}')
  return Table(['IoU by class', *names], rows, links)


def _columns(runs: Sequence[Run]) -> dict[str, str]:
  """Returns the metrics that any run has, with their titles."""
  there = {name for run in runs if run.result for name in run.result['test']}
  return {name: title for name, title in TITLES.items() if name in there}


def _states(group: Group) -> str:
  """Says how many runs the means are over, and what became of the others."""
  told = Counter(
    'repeated'
    if run.result and run not in group.counted
    else re.split(', | at |: ', run.state)[0]
    for run in group.runs
  )
  return ', '.join(f'{count} {state}' for state, count in told.items())


def published_table(groups: Sequence[Group]) -> Table:
  """Returns our numbers beside published ones, where a group has their setting."""
  rows, links = [], []
  for group in groups:
    test = [run.result['test'] for run in group.counted]
    for row in published.beside(group.counted[0].config) if test else []:
      values = [_value(metrics, row['metric']) for metrics in test]
      if None in values:
        continue
      best = [_best(run) for run in group.counted] if row['metric'] == 'error' else []
      rows.append(
        [
          group.label,
          _METRICS.get(row['metric'], TITLES.get(row['metric'], row['metric'])),
          percent(values),
          percent(best) if best else '-',
          _published(row),
          row['source'],
        ]
      )
      links.append(f'#{group.anchor}')
  headings = [
    'method',
    'metric (%)',
    'ours',
    'ours, best on test',
    'published',
    'source',
  ]
  return Table(headings, rows, links)


def _published(row: published.Row) -> str:
  """Returns a published number, with what sets it apart from ours."""
  mark = f' ({row["mark"]})' if 'mark' in row else ''
  return f'{row["value"]:.1f}{mark}'


_METRICS = {
  'error': 'top-1 error',
  'f_measure_oltr2019_at_0.1': 'open-set F (oltr2019) at 0.1',
  **{
    f'known_{group}{suffix}': f'{group}-shot beside the open set{told}'
    for group in ('many', 'medium', 'few')
    for suffix, told in (
      ('_at_0.1', ' at 0.1'),
      ('_own_rule', ', own rule'),
    )
  },
}


def _value(test: dict[str, Any], metric: str) -> float | None:
  return 1 - test['accuracy'] if metric == 'error' else test.get(metric)


def _best(run: Run) -> float | None:
  best = run.result.get('best_on_test')
  return 1 - best['accuracy'] if best else None


def markdown(table: Table) -> str:
  """Returns a table as Markdown, its text escaped."""
  head, *body = ([*map(markdown_text, r)] for r in [table.headings, *table.rows])
  widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
  lines = [head, ['-' * max(3, width) for width in widths], *body]
  padded = ([t.ljust(w) for t, w in zip(r, widths, strict=True)] for r in lines)
  return ''.join(f'| {" | ".join(row)} |\n' for row in padded)


def markdown_text(text: str) -> str:
  """Returns text that Markdown shows as it is."""
  for special in '\\`*_[]<>|':
    text = text.replace(special, f'\\{special}')
  return text


def latex(table: Table) -> str:
  """Returns a table as LaTeX with booktabs, its text escaped."""
  head, *body = (
    ' & '.join(map(_latex_text, line)) + r' \\'
    for line in [table.headings, *table.rows]
  )
  columns = 'l' * len(table.headings)
  begin, end = rf'\begin{{tabular}}{{{columns}}}', r'\end{tabular}'
  lines = [begin, r'\toprule', head, r'\midrule', *body, r'\bottomrule', end]
  return '\n'.join(lines) + '\n'


_LATEX = {
  '\\': r'\textbackslash{}',
  '~': r'\textasciitilde{}',
  '^': r'\textasciicircum{}',
  '<': r'\textless{}',
  '>': r'\textgreater{}',
  '|': r'\textbar{}',
  '±': r'$\pm$',
} | {special: f'\\{special}' for special in '&%$#_{}'}


def _latex_text(text: str) -> str:
  return ''.join(_LATEX.get(character, character) for character in text)
