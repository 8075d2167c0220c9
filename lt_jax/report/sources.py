"""How well networks that train on sources first have learned each source."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lt_jax.report.runs import Group, Run, printable
from lt_jax.report.tables import Table, headline_title, percent


def remark(table: Table, groups: Sequence[Group]) -> str:
  """Returns what stands above the table."""
  if not table.rows:
    return ''
  union = any(' + ' in row[0] for row in table.rows)
  return (
    f'Test {headline_title(groups)} in % at the end of the stage that trains on a '
    'source, before the target is used.'
    + ' A union is tested on the images of each of its sources, with the classes of '
    'all of them.' * union
  )


def sources_table(groups: Sequence[Group]) -> Table:
  """Returns one row per source, or union of sources, that a stage was trained on.

  The columns are the sources with test images. Runs with the same stage share a row,
  whatever they do on the target; over several seeds it has the mean.
  """
  found: dict[str, tuple[str, dict[int | str, dict[str, float | None]]]] = {}
  for group in groups:
    for run in group.counted:
      for name, stage in (run.config.get('stages') or {}).items():
        domain = stage.get('domain')
        if domain and name != run.result.get('stage'):
          key = json.dumps([run.config['name'], run.config['data'], stage])
          label = f'{name} on {_union(run, domain)}'
          values = found.setdefault(key, (label, {}))[1]
          values[run.seed] = _last(run, name, domain)
  rows = [(label, [*values.values()]) for label, values in found.values()]
  rows = [(label, seeds) for label, seeds in rows if any(seeds)]
  names = list(dict.fromkeys(n for _, seeds in rows for one in seeds for n in one))
  return Table(
    ['trained on', *map(printable, names)],
    [
      [
        printable(label),
        *(_cell([one.get(name) for one in seeds]) for name in names),
      ]
      for label, seeds in rows
    ],
    [''] * len(rows),
  )


def _union(run: Run, domain: str) -> str:
  """Returns the name of a domain; a union has the names of its parts."""
  return ' + '.join(run.config.get('sources') or ()) if domain == 'source' else domain


def _cell(values: Sequence[float | None]) -> str:
  return '-' if None in values else percent(values)


def _last(run: Run, stage: str, domain: str) -> dict[str, float | None]:
  """Returns source -> the last headline that was logged for its test images."""
  rows: dict[str, Mapping[str, Any]] = {}
  for row in run.rows:
    split = str(row.get('split'))
    if row.get('stage') == stage and split.rpartition('/')[2] == 'test':
      rows[split.rpartition('/')[0]] = row
  whole = rows.pop('', None)
  rows = rows or ({domain: whole} if whole else {})
  return {name: row.get(run.headline) for name, row in rows.items()}
