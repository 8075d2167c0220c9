"""The report by domain: a table, and where adaptation goes wrong."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lt_jax.evals.domains import gap_coverage
from lt_jax.report.runs import Group, Run, printable
from lt_jax.report.tables import Table, headline_title, percent

DISTANCE = (
  'A-distance: how well a linear classifier separates features of training images of '
  'source and target, from 0 (no better than chance) to 2 (no errors).'
)


ROLES = ('source', 'target', 'open')


class Domain(NamedTuple):
  """A domain that runs are tested on.

  Attributes:
    name: its name in the config.
    role: one of `ROLES`.
  """

  name: str
  role: str

  @property
  def title(self) -> str:
    """Its name in tables and figures."""
    title = self.name if self.name == self.role else f'{self.name} ({self.role})'
    return printable(title)


def domains(run: Run) -> list[Domain]:
  """Returns the domains that a run was tested on: sources, targets, open ones."""
  roles = {name: 'target' for name in run.config.get('target', ())}
  roles |= {name: 'open' for name in run.config.get('open_domains', ())}
  there = [Domain(n, roles.get(n, 'source')) for n in run.result.get('domains') or ()]
  return sorted(there, key=lambda domain: ROLES.index(domain.role))


def domains_table(groups: Sequence[Group]) -> Table:
  """Returns one row per method with its test accuracy in each domain.

  With several targets, or with open domains, also the means over them. If the control
  `source_only` has been run, a last column says how much of its gap to `target_only` a
  method covers or, without `target_only`, how many points it is above `source_only`; a
  negative number is negative transfer. A control must have the same data and targets,
  and be the only one.
  """
  found = [group for group in groups if any(map(domains, group.counted))]
  names = list(dict.fromkeys(d for g in found for r in g.counted for d in domains(r)))
  columns = {
    **{domain.title: [_accuracies(g, domain) for g in found] for domain in names},
    **_means(found, names),
    **_distances(found),
    **_gaps(found),
  }
  return Table(
    ['method', *columns],
    [[g.label, *cells] for g, *cells in zip(found, *columns.values(), strict=True)],
    [f'#{group.anchor}' for group in found],
  )


def remarks(table: Table, groups: Sequence[Group]) -> list[str]:
  """Returns the remarks on the table of domains; none for an empty table."""
  if not table.rows:
    return []
  measured = [r for g in groups for r in g.counted if r.measures_targets]
  targets = max((len(run.config.get('target', ())) for run in measured), default=0)
  others = {0: '', 1: '; other test metrics are those of the target'}.get(
    targets, '; other test metrics are means over targets'
  )
  apart = any(heading.startswith('A-distance') for heading in table.headings)
  lines = [f'Test {headline_title(groups)} in % in each domain{others}.']
  blind = [g.label for g in groups if g.counted and not _is_measured(g)]
  if blind:
    lines.append(
      f'The target of {", ".join(blind)} has no labels: other test metrics are those '
      'of the source.'
    )
  return [*lines, *[DISTANCE] * apart]


def _is_measured(group: Group) -> bool:
  """Returns whether the test metrics of a group are those of its targets."""
  return all(run.measures_targets for run in group.counted)


def _accuracies(group: Group, domain: Domain) -> str:
  return percent(
    [
      _accuracy(run, domain.name) if domain in domains(run) else None
      for run in group.counted
    ]
  )


def _accuracy(run: Run, name: str) -> float | None:
  return (run.result['domains'].get(name) or {}).get(run.headline)


def _means(groups: Sequence[Group], names: Sequence[Domain]) -> Mapping[str, list[str]]:
  """Returns columns of means over domains, if there is more than one to average."""
  roles = [domain.role for domain in names]
  tested = 'targets' if 'target' in roles else 'source'
  titles = {
    'compound': 'mean of targets' * (roles.count('target') > 1),
    'compound_open': f'mean of {tested} and open' * ('open' in roles),
  }
  return {
    title: [
      percent(
        [
          ((run.result.get('domain_means') or {}).get(key) or {}).get(run.headline)
          for run in group.counted
        ]
      )
      for group in groups
    ]
    for key, title in titles.items()
    if title
  }


def _distances(groups: Sequence[Group]) -> Mapping[str, list[str]]:
  """Returns a column for the A-distance of each target that any run has."""
  there = {}
  runs = [run for group in groups for run in group.counted]
  for name in dict.fromkeys(n for run in runs for n in run.config.get('target', ())):
    rows = [
      [(run.result.get('a_distance') or {}).get(name) for run in group.counted]
      for group in groups
    ]
    if any(value is not None for row in rows for value in row):
      there[name] = rows
  return {
    'A-distance' + printable(f' of {name}') * (len(there) > 1): [
      _plain(values) for values in rows
    ]
    for name, rows in there.items()
  }


def _plain(values: Sequence[float | None]) -> str:
  """Returns mean ± standard deviation, or n/a if a run lacks the number."""
  if not values or None in values:
    return 'n/a'
  deviation = f' ± {np.std(values, ddof=1):.2f}' if len(values) > 1 else ''
  return f'{np.mean(values):.2f}{deviation}'


def _gaps(groups: Sequence[Group]) -> Mapping[str, list[str]]:
  """Returns the column that compares with the controls, if there are any."""
  pairs = [[_control(g, groups, name) for g in groups] for name in CONTROLS]
  sources, targets = pairs
  if not any(s and _is_measured(g) for g, s in zip(groups, sources, strict=True)):
    return {}
  title = 'gap covered' if any(targets) else 'points above source_only'
  rows = zip(groups, sources, targets, strict=True)
  return {title: [_beside(*row, shares=any(targets)) for row in rows]}


CONTROLS = ('source_only', 'target_only')


def _control(group: Group, groups: Sequence[Group], recipe: str) -> Group | None:
  """Returns the group of a control with the data and targets of another group."""
  setting = group.counted[0].setting
  found = [
    other
    for other in groups
    if other.counted[0].recipe == recipe and other.counted[0].setting == setting
  ]
  return found[0] if len(found) == 1 else None


def _beside(
  group: Group, source: Group | None, target: Group | None, *, shares: bool
) -> str:
  """Says how a method compares with its controls, and marks negative transfer."""
  if not _is_measured(group):
    return 'n/a'
  if group is source:
    return '0 %' if shares else '0'
  if source is None or (shares and target is None):
    return 'n/a'
  ours, below = _headline(group), _headline(source)
  if shares:
    share = gap_coverage(ours, below, _headline(target))
    text = 'n/a' if share is None else f'{100 * share:.1f} %'
  else:
    text = f'{100 * (ours - below):+.1f}'
  if ours < below:
    return f'{text} (negative transfer)'
  worse = _worse(group, source) if group is not target else []
  return f'{text} (negative transfer on {", ".join(worse)})' if worse else text


def _headline(group: Group) -> float:
  return float(np.mean([run.result['test'][run.headline] for run in group.counted]))


def _worse(group: Group, control: Group) -> list[str]:
  """Returns the targets on which a method is below a control."""

  def mean(group: Group, name: str) -> float:
    return float(np.mean([_accuracy(run, name) for run in group.counted]))

  return [
    printable(domain.name)
    for domain in domains(group.counted[0])
    if domain.role == 'target' and mean(group, domain.name) < mean(control, domain.name)
  ]


WINS, CHANCE = 0.98, 0.55
FEWEST_ROWS = 4
"""Rows of the log without which a discriminator is not judged."""


def discriminator_notes(groups: Sequence[Group]) -> list[str]:
  """Names the runs whose domain discriminator always wins, or always loses."""
  found: dict[str, list[str]] = {}
  for group in groups:
    for run in group.runs:
      if line := _of_discriminator(run):
        found.setdefault(f'{group.label}: {line}', []).append(str(run.seed))
  return [
    f'Warning of {line} ({"seed" if len(seeds) == 1 else "seeds"} {", ".join(seeds)}).'
    for line, seeds in found.items()
  ]


def _of_discriminator(run: Run) -> str:
  """Says whether a discriminator always wins or always loses; '' if neither.

  It wins if it is right for nearly all images in the second half of training, and loses
  if it is never clearly better than chance in the log.
  """
  rows = [row for row in run.rows if isinstance(row.get('domain_accuracy'), float)]
  right = [row['domain_accuracy'] for row in rows if row.get('split') == 'train']
  if len(right) < FEWEST_ROWS:
    return ''
  if np.mean(right[len(right) // 2 :]) >= WINS:
    return (
      'the discriminator always wins, so the features of the domains have not moved '
      'closer'
    )
  if max(right) <= CHANCE:
    return (
      'the discriminator always loses, so the features learn nothing about the domains'
    )
  return ''
