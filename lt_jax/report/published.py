"""Published numbers, each beside the digest of the configuration of its setting.

A row of published.json names that configuration as --config does, CONFIG:ARGUMENT, and
perhaps keys that are `set` on top of it. What its source tells of the setting is
`measured`, names in `facts`: keys of the configuration and their values. A number that
was measured otherwise, or of which the source does not tell, has a `mark`, a few words
that are printed with it. When a configuration has changed on purpose, the digests are
made anew:

  python -c "from lt_jax.report import published; published.renew('configs')"
"""

import json
import pathlib
import runpy
from collections.abc import Iterable, Mapping
from typing import Any

from lt_jax import files
from lt_jax.config import Config, config_digest, flatten, resolve, stage_config

PATH = pathlib.Path(__file__).with_name('published.json')

ASIDE = frozenset(
  {
    'seed',
    'source',
    'dir',
    'eval_batch',
    'evaluate_every_epochs',
    'log_every_steps',
    'save_every_epochs',
  }
)
"""Keys, of a run or a stage, in which runs of one setting may differ."""

Row = dict[str, Any]
Facts = dict[str, dict[str, Any]]


def setting(config: Config) -> str:
  """Returns a digest of what of a resolved configuration makes its setting.

  The images may lie anywhere, but generated ones are others; so are weights to begin
  with, whose place does not count either.
  """
  flat = flatten(config)
  kept = {
    key: value
    for key, value in flat.items()
    if key.rpartition('.')[2] not in ASIDE and not key.startswith('data.fake.')
  }
  kept |= {
    'init': bool(flat.get('init')),
    'generated': flat.get('data.source') == 'fake',
  }
  return config_digest(kept)


def read() -> tuple[list[Row], Facts]:
  """Returns the rows of published.json, and the facts that they refer to."""
  stored = json.loads(PATH.read_text())
  return stored['rows'], stored['facts']


def beside(config: Config) -> list[Row]:
  """Returns the rows of published.json that are of a configuration's setting."""
  own = setting(config)
  return [row for row in read()[0] if row['setting'] == own]


def configuration(row: Row, configs: str) -> dict[str, Any]:
  """Returns the resolved configuration of a row.

  Args:
    row: of published.json.
    configs: the folder of the configurations.
  """
  name, _, argument = row['config'].partition(':')
  config = runpy.run_path(f'{configs}/{name}.py')['get_config'](argument)
  config.init = row.get('init', '')
  config.update_from_flattened_dict(row.get('set', {}))
  return resolve(config)


def differences(row: Row, facts: Facts, config: Config) -> Mapping[str, Any]:
  """Returns what of a number's setting is other in a configuration.

  Args:
    row: of published.json.
    facts: name -> key -> value, as it was measured; None: there is no such key.
    config: resolved; its last stage is what is compared.

  Returns:
    key -> value of the configuration.
  """
  found = flatten(stage_config(config, config['stage_order'][-1]))
  told = {k: v for name in row.get('measured', ()) for k, v in facts[name].items()}
  return {key: found.get(key) for key, value in told.items() if found.get(key) != value}


def made(configs: str) -> str:
  """Returns what published.json must hold, by the configurations in a folder.

  Raises:
    ValueError: a number without a mark would stand beside another setting.
  """
  rows, facts = read()
  for row in rows:
    config = configuration(row, configs)
    row['setting'] = setting(config)
    other = differences(row, facts, config)
    if 'mark' not in row and (other or not row.get('measured')):
      raise ValueError(f'{row["config"]}, {row["value"]}: not as measured: {other}')
  told = [f'{json.dumps(name)}: {json.dumps(facts[name])}' for name in facts]
  return (
    f'{{\n "facts": {{\n  {_lines(told)}\n }},\n'
    f' "rows": [\n  {_lines(map(json.dumps, rows))}\n ]\n}}\n'
  )


def _lines(entries: Iterable[str]) -> str:
  return ',\n  '.join(entries)


def renew(configs: str) -> None:
  """Makes the digests of published.json anew."""
  files.write_atomically(PATH, made(configs))
