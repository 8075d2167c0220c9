"""Published numbers, each beside the digest of the configuration of its setting.

A row of published.json names that configuration as --config does, CONFIG:ARGUMENT. When
a configuration has changed on purpose, the digests are made anew:

  python -c "from lt_jax.report import published; published.renew('configs')"
"""

import json
import pathlib
import runpy
from typing import Any

from lt_jax import files
from lt_jax.config import Config, config_digest, flatten, resolve

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


def beside(config: Config) -> list[dict[str, Any]]:
  """Returns the rows of published.json that are of a configuration's setting."""
  own = setting(config)
  return [row for row in json.loads(PATH.read_text()) if row['setting'] == own]


def made(configs: str) -> str:
  """Returns what published.json must hold, by the configurations in a folder."""
  rows = json.loads(PATH.read_text())
  for row in rows:
    name, _, argument = row['config'].partition(':')
    config = runpy.run_path(f'{configs}/{name}.py')['get_config'](argument)
    config.init = row.get('init', '')
    row['setting'] = setting(resolve(config))
  return '[\n ' + ',\n '.join(map(json.dumps, rows)) + '\n]\n'


def renew(configs: str) -> None:
  """Makes the digests of published.json anew."""
  files.write_atomically(PATH, made(configs))
