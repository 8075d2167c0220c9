"""Compares rules for choosing a checkpoint with the last and the best checkpoint."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lt_jax.evals.label_free import CRITERIA, centroid_rule
from lt_jax.report.runs import Group, Run
from lt_jax.report.tables import Table, headline_title, percent

CENTROIDS, ORACLE = 'centroid rule', 'oracle'

MEANINGS = {
  'last': 'the end of training',
  'target/entropy': 'the most confident predictions on the target',
  'target/information': 'confident and diverse predictions on the target',
  'target/soft_neighbours': 'neighbours in the target that are predicted alike',
  'target/deep_embedded': 'the lowest validation error, each image weighted by how '
  'much it looks like the target',
  'target/centroid_distance': 'the nearest class centroids of source and target',
  CENTROIDS: 'near centroids among the checkpoints with a low validation error',
  ORACLE: 'the best on the test images, which is not a valid choice',
}
"""Rule -> which checkpoint it chooses."""


def remark(groups: Sequence[Group]) -> str:
  """Returns what stands above the table."""
  return (
    f'Test {headline_title(groups)} in % of the checkpoint that each rule chooses '
    f'among those evaluated; {USED.strip()} marks the rule of the run. No rule but '
    f'{ORACLE} reads a label of the target.'
  )


def rules(table: Table) -> list[str]:
  """Returns a line for each rule of the table."""
  return [
    f'{rule}: {MEANINGS.get(rule, "the best on validation images of the source")}.'
    for rule in table.headings[1:]
  ]


USED = ' (used)'


def selection_table(groups: Sequence[Group]) -> Table:
  """Returns one row per method: the test metric of what each rule chooses.

  In %, among the checkpoints evaluated in training. The first rule takes the last one;
  `oracle` takes the best on test images, which is not a valid choice. The rules between
  them need no label of the target. A rule that chooses for no method is left out.
  """
  counted = [run for group in groups for run in group.counted]
  headline = counted[0].headline if counted else 'accuracy'
  rules = {'last': _last, f'val/{headline}': _best_by('val', headline, 1)}
  rules |= {
    f'target/{name}': _best_by('target', name, criterion.better)
    for name, criterion in CRITERIA.items()
  }
  rules |= {
    CENTROIDS: functools.partial(_by_centroids, headline),
    ORACLE: _best_by('test', headline, 1),
  }
  found = {
    group.anchor: [_chosen(run, rules) for run in group.counted] for group in groups
  }
  shown = [
    group for group in groups if found[group.anchor] and all(found[group.anchor])
  ]
  chose = [one for group in shown for one in found[group.anchor]]
  rules = [rule for rule in rules if any(one[rule] is not None for one in chose)]
  rows = []
  for group in shown:
    used = group.counted[0].result.get('select')
    cells = [
      percent([one[rule] for one in found[group.anchor]]) + USED * (rule == used)
      for rule in rules
    ]
    rows.append([group.label, *cells])
  return Table(['method', *rules], rows, [f'#{group.anchor}' for group in shown])


Rows = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Split -> step -> row of metrics.jsonl."""


def _chosen(
  run: Run, rules: Mapping[str, Callable[[Rows], int | None]]
) -> dict[str, float | None]:
  """Returns rule -> test accuracy; {} without a target, or without its labels."""
  if not run.measures_targets:
    return {}
  stage = run.result.get('stage')
  rows: dict[str, dict[int, Any]] = {'val': {}, 'target': {}, 'test': {}}
  for row in run.rows:
    if row.get('stage') == stage and row.get('split') in rows:
      rows[row['split']][row['step']] = row
  if not rows['target'] or not rows['test']:
    return {}
  steps = {rule: choose(rows) for rule, choose in rules.items()}
  return {
    rule: rows['test'].get(step, {}).get(run.headline) for rule, step in steps.items()
  }


def _last(rows: Rows) -> int:
  return max(rows['test'])


def _best_by(split: str, metric: str, better: int) -> Callable[[Rows], int | None]:
  """Returns a rule: the first step at which a metric is best."""

  def choose(rows: Rows) -> int | None:
    values = {s: r[metric] for s, r in rows[split].items() if r.get(metric) is not None}
    return max(values, key=lambda step: better * values[step], default=None)

  return choose


def _by_centroids(headline: str, rows: Rows) -> int | None:
  """The rule of Sun et al., see `lt_jax.evals.label_free.centroid_rule`."""
  both = {
    step: (1 - rows['val'][step][headline], row['centroid_distance'])
    for step, row in rows['target'].items()
    if headline in rows['val'].get(step, {}) and 'centroid_distance' in row
  }
  if not both:
    return None
  error, distance = np.array([*both.values()], np.float64).T
  return [*both][centroid_rule(error, distance)]
