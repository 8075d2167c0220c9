"""Published numbers, each with the digest of the config that has its setting.

A row of published.json names that config as --config does, CONFIG:ARGUMENT, with
optional keys to `set` on top of it. `measured` lists what the source says about the
setting, as names in `facts`: config keys and their values. A number that was measured
differently, or whose source does not say how, has a `mark`: a few words printed with
it. After a config has changed on purpose, renew the digests:

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
"""Keys of a run or stage that are not part of its setting."""

Row = dict[str, Any]
Facts = dict[str, dict[str, Any]]


def setting(config: Config) -> str:
  """Returns a digest of the keys of a resolved config that make up its setting.

  It does not matter where images and initial weights are stored, but it does matter
  whether images are generated, and whether there are initial weights.
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
  """Returns the rows of published.json and the facts that they refer to."""
  stored = json.loads(PATH.read_text())
  return stored['rows'], stored['facts']


def beside(config: Config) -> list[Row]:
  """Returns the rows of published.json that have a config's setting."""
  own = setting(config)
  return [row for row in read()[0] if row['setting'] == own]


def configuration(row: Row, configs: str) -> dict[str, Any]:
  """Returns the resolved config of a row.

  Args:
    row: of published.json.
    configs: the folder of the configs.
  """
  name, _, argument = row['config'].partition(':')
  config = runpy.run_path(f'{configs}/{name}.py')['get_config'](argument)
  config.init = row.get('init', '')
  config.update_from_flattened_dict(row.get('set', {}))
  return resolve(config)


def differences(row: Row, facts: Facts, config: Config) -> Mapping[str, Any]:
  """Returns where a config differs from the setting of a published number.

  Args:
    row: of published.json.
    facts: name -> key -> value, as measured; None if there is no such key.
    config: resolved; its last stage is compared.

  Returns:
    key -> value in the config, where it differs.
  """
  found = flatten(stage_config(config, config['stage_order'][-1]))
  measured = {k: v for name in row.get('measured', ()) for k, v in facts[name].items()}
  return {
    key: found.get(key) for key, value in measured.items() if found.get(key) != value
  }


def made(configs: str) -> str:
  """Returns the contents that published.json should have, given a folder of configs.

  Raises:
    ValueError: a number without a mark has another setting than its config.
  """
  rows, facts = read()
  for row in rows:
    config = configuration(row, configs)
    row['setting'] = setting(config)
    other = differences(row, facts, config)
    if 'mark' not in row and (other or not row.get('measured')):
      raise ValueError(f'{row["config"]}, {row["value"]}: not as measured: {other}')
  entries = [f'{json.dumps(name)}: {json.dumps(facts[name])}' for name in facts]
  return (
    f'{{\n "facts": {{\n  {_lines(entries)}\n }},\n'
    f' "rows": [\n  {_lines(map(json.dumps, rows))}\n ]\n}}\n'
  )


def _lines(entries: Iterable[str]) -> str:
  return ',\n  '.join(entries)


def renew(configs: str) -> None:
  """Renews the digests in published.json."""
  files.write_atomically(PATH, made(configs))
