"""Compares rules for choosing a State with the last and the best State."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lt_jax.evals.label_free import CRITERIA, centroid_rule
from lt_jax.report.runs import Group, Run
from lt_jax.report.tables import Table, percent

REMARK = (
  'Test accuracy in % of the State that each rule chooses among those evaluated. '
  'oracle is the best State on test images, which is not a valid choice; no other rule '
  'reads a label of the target.'
)


def selection_table(groups: Sequence[Group]) -> Table:
  """Returns one row per method: the test accuracy of the State that each rule chooses.

  In %, among the States evaluated in training. The first rule takes the last State;
  `oracle` takes the best on test images, which is not a valid choice. The rules between
  them need no label of the target.
  """
  counted = [run for group in groups for run in group.counted]
  headline = counted[0].headline if counted else 'accuracy'
  rules = {'last': _last, f'val/{headline}': _best_by('val', headline, 1)}
  rules |= {
    f'target/{name}': _best_by('target', name, criterion.better)
    for name, criterion in CRITERIA.items()
  }
  rules |= {
    'centroid rule': functools.partial(_by_centroids, headline),
    'oracle': _best_by('test', headline, 1),
  }
  rows, links = [], []
  for group in groups:
    chosen = [_chosen(run, rules) for run in group.counted]
    if chosen and all(chosen):
      rows.append(
        [group.label, *(percent([c[rule] for c in chosen]) for rule in rules)]
      )
      links.append(f'#{group.anchor}')
  return Table(['method', *rules], rows, links)


Rows = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Split -> step -> row of metrics.jsonl."""


def _chosen(
  run: Run, rules: Mapping[str, Callable[[Rows], int | None]]
) -> dict[str, float | None]:
  """Returns rule -> test accuracy; {} for a run without a target."""
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
