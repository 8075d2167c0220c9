"""Tables of a report: numbers over seeds, and published ones, as Markdown and LaTeX.

Means are over the runs in `Group.counted`; standard deviations are those of a sample
(n - 1), and a single run has none.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from lt_jax.evals import titles
from lt_jax.evals.classification import CLASSIFICATION
from lt_jax.evals.closed_set import SHOTS, told_apart
from lt_jax.report import published
from lt_jax.report.runs import Group, Run, printable

PUBLISHED = (
  'Most authors report the best epoch on the test set; ours is the checkpoint that the '
  'run selected.'
)


class Table(NamedTuple):
  """Text in rows and columns.

  Attributes:
    headings: of the columns.
    rows: of text, one cell per heading.
    links: for each row, where its first cell links to; '' for nowhere.
    faint: (row, column) of grey cells.
    runs: for each row, (text, address) of the runs that its second cell links to.
  """

  headings: list[str]
  rows: list[list[str]]
  links: list[str]
  faint: Collection[tuple[int, int]] = ()
  runs: Sequence[Sequence[tuple[str, str]]] = ()


def percent(values: Sequence[float | None]) -> str:
  """Returns mean ± standard deviation in %, or n/a if a run lacks the number."""
  if not values or None in values:
    return 'n/a'
  scaled = 100 * np.array(values, np.float64)
  deviation = f' ± {scaled.std(ddof=1):.1f}' if len(scaled) > 1 else ''
  # A number halfway between two tenths is not rounded by its float representation.
  return f'{round(scaled.mean(), 6):.1f}{deviation}'


def units(groups: Sequence[Group]) -> str:
  """Returns the remark on the table of results."""
  several = any(len(group.counted) > 1 for group in groups)
  spread = '; over several seeds, mean ± standard deviation' if several else ''
  return f'Test metrics in %{spread}.'


def by_class(groups: Sequence[Group]) -> str:
  """Returns the remark on the table by class."""
  several = any(
    len(run.config.get('target', ())) > 1 for g in groups for run in g.counted
  )
  return 'On test images in %' + ', the mean over targets' * several + '.'


def headline_title(groups: Sequence[Group]) -> str:
  """Returns the title of the headline metric of some finished runs."""
  names = dict.fromkeys(run.headline for group in groups for run in group.counted)
  return ' or '.join(titles()[name] for name in names)


def metrics_table(run: Run) -> Table:
  """Returns the test metrics of one run, a row each."""
  columns = _columns([run])
  rows = [[title, percent([run.result['test'][n]])] for n, title in columns.items()]
  return Table(['metric', 'test (%)'], rows, [])


def short_table(groups: Sequence[Group]) -> Table:
  """Returns what a terminal shows of several methods: the headline and shot groups.

  There is a column of states only if some run has not finished.
  """
  counted = [run for group in groups for run in group.counted]
  headlines = {run.headline for run in counted}
  columns = _columns(counted)
  columns = {n: title for n, title in columns.items() if n in (*headlines, *SHOTS)}
  partial = any(group.runs != group.counted for group in groups)
  rows = [
    [
      group.label,
      *[_states(group)] * partial,
      *(
        percent([run.result['test'].get(name) for run in group.counted])
        if group.counted
        else '-'
        for name in columns
      ),
    ]
    for group in groups
  ]
  headings = ['method', *['runs'] * partial, *(f'{t} (%)' for t in columns.values())]
  return Table(headings, rows, [])


def plain(table: Table) -> str:
  """Returns a table as text for a terminal, all columns but the first aligned right."""
  rows = [table.headings, *table.rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows
  ]
  return ''.join(f'{"  ".join(line).rstrip()}\n' for line in lines)


def results_table(
  groups: Sequence[Group],
  within_noise: Collection[tuple[str, str]] = (),
  address: Callable[[Run], str] = lambda run: '',
) -> Table:
  """Returns one row per group with the test metrics that any group has, in %.

  Args:
    groups: of runs.
    within_noise: (a group's anchor, metric) of the cells to grey.
    address: returns the page or folder of a run; '' for none.
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
  """Returns one row per run; unfinished runs say so."""
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
  """Returns one row per method: the metric of each class in %, unless it is accuracy.

  For instance the IoU of pixels, or the average precision of images with several
  classes. It is the mean over seeds; a class that does not occur in a run has no value.
  """
  found = [
    group
    for group in groups
    if group.counted and group.counted[0].measure != CLASSIFICATION.of_class
  ]
  measure = found[0].counted[0].measure if found else ''
  found = [group for group in found if group.counted[0].measure == measure]
  names = found[0].counted[0].class_names if found else []
  rows, links = [], []
  for group in found:
    runs = [run for run in group.counted if run.class_names == names]
    values = [run.result['test'][run.task.by_class] for run in runs]
    if len(runs) == len(group.counted):
      shown = [percent([one[c] for one in values]) for c in range(len(names))]
      rows.append([group.label, *shown])
      links.append(f'#{group.anchor}')
  return Table([f'{measure} by class', *names], rows, links)


def _columns(runs: Sequence[Run]) -> dict[str, str]:
  """Returns the metrics that any run has -> their titles.

  Shot groups without classes are left out, as is a group that has all of them.
  """
  tested = [run.result['test'] for run in runs if run.result]
  groups = told_apart(n for n in SHOTS for test in tested if test.get(n) is not None)
  there = {name for test in tested for name in test} - {*SHOTS} | {*groups}
  return {name: title for name, title in titles().items() if name in there}


def _states(group: Group) -> str:
  """Says how many runs the means are over, and the state of the others."""
  states = Counter(
    'repeated'
    if run.result and run not in group.counted
    else re.split(', | at |: ', run.state)[0]
    for run in group.runs
  )
  return ', '.join(f'{count} {state}' for state, count in states.items())


def published_table(groups: Sequence[Group]) -> Table:
  """Returns our numbers beside published ones with the same setting."""
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
          _METRICS.get(row['metric'], titles().get(row['metric'], row['metric'])),
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
  """Returns a published number, with its mark if its setting differs from ours."""
  mark = f' ({row["mark"]})' if 'mark' in row else ''
  return f'{row["value"]:.1f}{mark}'


_METRICS = {
  'error': 'top-1 error',
  'f_measure_oltr2019_at_0.1': 'open-set F (oltr2019) at 0.1',
  **{
    f'known_{group}{suffix}': f'{group}-shot beside the open set{rule}'
    for group in SHOTS
    for suffix, rule in (
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
  """Returns text escaped for Markdown."""
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
