"""The config and data a run was trained with, as its folder records them.

Commands read config.json and data.json. The manifest of every checkpoint repeats the
config and holds digests of the data, so that an edited, damaged or lost file does not
silently change results.
"""

import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from lt_jax import files
from lt_jax.config import SOURCE, Config, domain_data, trained_by, upgraded
from lt_jax.data import places
from lt_jax.errors import UserError, lookup

DATA_KEYS = (
  'class_names',
  'counts',
  'open_images',
  'fingerprint',
  'image_shape',
  'image_dtype',
  'preprocessing',
  'label_maps',
  'unseen',
  'val_classes',
  'class_vectors',
)
"""Keys of data.json that describe the data; others are their places, or results."""

RECORD = {'config': {}, 'data': {str: str}, 'time': files.NUMBER}


def read_config(workdir: epath.Path) -> dict[str, Any]:
  """Reads config.json, with the keys of today.

  Raises:
    UserError: it is missing or damaged.
  """
  return upgraded(read_json(workdir / 'config.json'))


def read_json(path: epath.Path) -> dict[str, Any]:
  """Reads a file of a run that the training command can write again.

  Raises:
    UserError: it is missing or damaged; the message says what to do.
  """
  if not path.exists():
    raise UserError(f'{path} is missing: run the training command to write it again')
  try:
    return files.read_json(path)
  except UserError as error:
    advice = 'delete it and run the training command to write it again'
    raise UserError(f'{error}; {advice}') from None


def facts(config: Config, data: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what a manifest records about a run.

  Args:
    config: the resolved config.
    data: the contents of data.json.
  """
  return {
    'config': config,
    'data': {key: _digest(data[key]) for key in DATA_KEYS if key in data},
  }


def _digest(value: Any) -> str:
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def recorded(workdir: epath.Path) -> dict[str, Any] | None:
  """Returns what the newest checkpoint of a run records, see `facts`.

  None if there is no checkpoint; older versions recorded nothing.
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


def changes(before: Config, now: Config, *, same_place: bool = False) -> list[str]:
  """Returns the config keys that affect training and differ, with both values.

  Args:
    before: a config.
    now: another config.
    same_place: whether a changed path of the data counts. By default it does not, since
      data may move, and their fingerprint says whether they are the same.
  """
  before, now = trained_by(upgraded(before)), trained_by(upgraded(now))

  def differs(key: str) -> bool:
    values = before.get(key), now.get(key)
    if not same_place and (match := _PLACE.fullmatch(key)):
      return match[1] == 'source' and len(set(map(_kind, values))) > 1
    return values[0] != values[1]

  return [
    f'{key} was {before.get(key)!r} and is {now.get(key)!r}'
    for key in sorted(before.keys() | now.keys())
    if differs(key)
  ]


MOST_LISTED = 5
"""How many changed keys a message names."""


def listed(changes: Sequence[str]) -> str:
  """Returns what `changes` found for a message, the first few of them."""
  more = len(changes) - MOST_LISTED
  shown = ', '.join(changes[:MOST_LISTED])
  return f'{shown} and {more} more' if more > 0 else shown


def command() -> str:
  """Returns the command line of this process; '' unless it is a command of lt_jax."""
  spec = getattr(sys.modules['__main__'], '__spec__', None)
  if spec is None or spec.name.partition('.')[0] != 'lt_jax':
    return ''
  name = spec.name.removesuffix('.__main__')
  return shlex.join(['python', '-m', name, *sys.argv[1:]])


_PLACE = re.compile(r'(?:data|domains\..+)\.(source|dir)')


def _kind(source: Any) -> str:
  return places.kind(source) if isinstance(source, str) else repr(source)


def found(config: Config) -> dict[str, Any]:
  """Returns where the data are, as data.json records it, with absolute paths.

  Args:
    config: the resolved config.
  """
  at = {name: places.place(data) for name, data in _with_files(config).items()}
  return at.pop(SOURCE) | {'domains': at}


def moved_since(before: Any, now: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns (old place, new place) of data that have moved.

  Args:
    before: what data.json recorded, see `found`; ignored if it is damaged.
    now: what it would record now.
  """
  then = _recorded(before)
  return [
    (places.told(then[name]), places.told(at))
    for name, at in _recorded(now).items()
    if name in then and places.told(then[name]) != places.told(at)
  ]


def moved(config: Config, data_dir: str) -> Config:
  """Returns a config whose data have moved.

  Args:
    config: the resolved config.
    data_dir: where the data are now, see `places.moved`. For domains NAME=PATH,
      separated by commas; 'source' is the name of `data`.

  Raises:
    UserError: there is no such domain, or its source has no files.
  """
  return _placed(config, _moved(config, data_dir))


def located(config: Config, recorded: Any, data_dir: str | None = None) -> Config:
  """Returns a config with the paths where the data are.

  These come from `data_dir`, or else from where the run found the data, or else from
  its config.

  Args:
    config: the resolved config of a run.
    recorded: what its data.json recorded, see `found`; older runs did not record it.
    data_dir: as for `moved`; None if the data have not moved.

  Raises:
    UserError: the data are not there; or as for `moved`.
  """
  at = _moved(config, data_dir) if data_dir else {}
  then = _recorded(recorded)
  for name, data in _with_files(config).items():
    if name in at:
      continue
    tried = [*filter(None, [then.get(name)]), places.place(data)]
    there = [place for place in tried if not places.gone(place)]
    if not there:
      give = 'PATH' if name == SOURCE else f'{name}=PATH'
      raise UserError(
        f'the data are not where they were, {places.gone(tried[0])}: give '
        f'--data_dir={give}'
      )
    at[name] = there[0]
  return _placed(config, at)


def _with_files(config: Config) -> dict[str, Config]:
  """Returns domain -> its `data`: the config's own, and domains with other files."""
  own = [name for name, keys in config['domains'].items() if keys.keys() & {*_WHERE}]
  return {SOURCE: config['data'], **{name: domain_data(config, name) for name in own}}


_WHERE = {'source': str, 'dir': str}


def _recorded(recorded: Any) -> dict[str, places.Place]:
  """Returns the recorded place of each domain, leaving out damaged records."""
  if not files.fits(recorded, _WHERE):
    return {}
  domains = recorded.get('domains')
  return {SOURCE: recorded, **(domains if files.fits(domains, {str: _WHERE}) else {})}


def _moved(config: Config, data_dir: str) -> dict[str, places.Place]:
  """Returns domain -> where its data are now."""
  every = _with_files(config)
  paths = {SOURCE: data_dir}
  if len(every) > 1 and '=' in data_dir and not os.path.exists(data_dir):
    paths = dict(part.partition('=')[::2] for part in data_dir.split(','))
  return {
    name: places.moved(lookup(every, 'domain', name), path)
    for name, path in paths.items()
  }


def _placed(config: Config, at: Mapping[str, places.Place]) -> Config:
  domains = {n: {**keys, **at.get(n, {})} for n, keys in config['domains'].items()}
  here = {key: at.get(SOURCE, config['data'])[key] for key in _WHERE}
  return {**config, 'data': config['data'] | here, 'domains': domains}


_RESTORE = 'undo that, or delete the file and run the training command again'


def check_config(workdir: epath.Path, config: Config) -> dict[str, Any] | None:
  """Refuses a config.json that the newest checkpoint contradicts.

  Args:
    workdir: the run's folder.
    config: the contents of config.json.

  Returns:
    What it was compared with, see `recorded`.

  Raises:
    UserError: they differ; the message names the keys.
  """
  record = recorded(workdir)
  if record and (differing := changes(record['config'], config)):
    path, keys = workdir / 'config.json', listed(differing)
    raise UserError(f'{path} was changed after training: {keys}; {_RESTORE}')
  return record


def check_data(workdir: epath.Path, data: Mapping[str, Any]) -> None:
  """Refuses a data.json that the newest checkpoint contradicts.

  Args:
    workdir: the run's folder.
    data: the contents of data.json.

  Raises:
    UserError: they differ; the message names the keys.
  """
  record, now = recorded(workdir), facts({}, data)['data']
  then = record['data'] if record else {}
  if differing := [key for key, digest in then.items() if now.get(key) != digest]:
    path, keys = workdir / 'data.json', ', '.join(differing)
    raise UserError(f'{path} was changed after training: {keys}; {_RESTORE}')
