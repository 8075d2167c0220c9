"""What a run was trained with, as its folder records it: config and data.

Commands read config.json and data.json. The manifest of every checkpoint repeats the
config and holds digests of the data, so that a file that was edited, damaged or lost
does not silently lead to other numbers.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from lt_jax import files
from lt_jax.config import Config, trained_by, upgraded
from lt_jax.errors import UserError

DATA_KEYS = (
  'class_names',
  'counts',
  'open_images',
  'fingerprint',
  'image_shape',
  'image_dtype',
  'preprocessing',
)
"""Keys of data.json that describe the data; others say where they lie, or results."""

RECORD = {'config': {}, 'data': {str: str}, 'time': files.NUMBER}


def read_config(workdir: epath.Path) -> dict[str, Any]:
  """Reads config.json, with the keys of today.

  Raises:
    UserError: it is missing or damaged.
  """
  return upgraded(read_json(workdir / 'config.json'))


def read_json(path: epath.Path) -> dict[str, Any]:
  """Reads a file of a run that its training command writes anew.

  Raises:
    UserError: it is missing or damaged; says what to do.
  """
  if not path.exists():
    raise UserError(f'{path} is missing: the training command writes it anew')
  try:
    return files.read_json(path)
  except UserError as error:
    told = 'delete it, and the training command writes it anew'
    raise UserError(f'{error}; {told}') from None


def facts(config: Config, data: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what a manifest records of a run.

  Args:
    config: the resolved config.
    data: what data.json tells.
  """
  return {
    'config': config,
    'data': {key: _digest(data[key]) for key in DATA_KEYS if key in data},
  }


def _digest(value: Any) -> str:
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def recorded(workdir: epath.Path) -> dict[str, Any] | None:
  """Returns what the newest checkpoint of a run records; None if there is none.

  Runs of older versions have no record.
  """
  found = [
    manifest
    for path in (workdir / 'stages').glob('*/checkpoints/manifests/*.json')
    if files.fits(manifest := _read_or_none(path), RECORD)
  ]
  return max(found, key=lambda manifest: manifest['time'], default=None)


def _read_or_none(path: epath.Path) -> dict[str, Any] | None:
  try:
    return files.read_json(path)
  except UserError:
    return None


def changes(before: Config, now: Config) -> list[str]:
  """Returns which config keys that affect training differ, with both values."""
  before, now = trained_by(upgraded(before)), trained_by(upgraded(now))
  return [
    f'{key} was {before.get(key)!r} and is {now.get(key)!r}'
    for key in sorted(before.keys() | now.keys())
    if before.get(key) != now.get(key)
  ]


_RESTORE = 'undo that, or delete it and give the training command again'


def check_config(workdir: epath.Path, config: Config) -> dict[str, Any] | None:
  """Refuses a config.json that the newest checkpoint contradicts.

  Args:
    workdir: the run's folder.
    config: what config.json holds.

  Returns:
    What it was compared with, see `recorded`.

  Raises:
    UserError: they differ, with the keys.
  """
  record = recorded(workdir)
  if record and (told := changes(record['config'], config)):
    path = workdir / 'config.json'
    told = ', '.join(told)
    raise UserError(f'{path} was changed after training: {told}; {_RESTORE}')
  return record


def check_data(workdir: epath.Path, data: Mapping[str, Any]) -> None:
  """Refuses a data.json that the newest checkpoint contradicts.

  Args:
    workdir: the run's folder.
    data: what data.json holds.

  Raises:
    UserError: they differ, with the keys.
  """
  record, now = recorded(workdir), facts({}, data)['data']
  then = record['data'] if record else {}
  if told := [key for key, digest in then.items() if now.get(key) != digest]:
    path = workdir / 'data.json'
    told = ', '.join(told)
    raise UserError(f'{path} was changed after training: {told}; {_RESTORE}')
