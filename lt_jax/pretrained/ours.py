"""What an lt_jax run, or an export of it, says about its weights.

A source of weights is ours if it is the folder of a run, or a .safetensors file written
by `lt_jax.export`. Such weights know their preprocessing and classes.
`lt_jax.pretrained.inherited` takes the weights themselves.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from lt_jax.errors import UserError

PIXELS = ('mean', 'std', 'unit')
"""Keys of data that belong to weights: how they expect pixels to be prepared."""

MOST_HEADER = 2**24
"""Largest header of an export in bytes; it holds every class name."""


class Origin(NamedTuple):
  """What a run, or an export of it, says about its weights.

  Attributes:
    source: the folder or file.
    trunk: the name of the trunk.
    class_names: class names of the last stage.
    pixels: the keys `PIXELS` of its data.
    stage: the last stage, which the State is from.
    is_file: whether it is an export.
  """

  source: str
  trunk: str
  class_names: tuple[str, ...]
  pixels: dict[str, Any]
  stage: str
  is_file: bool


def origin(source: str) -> Origin | None:
  """Returns what a source of weights says about itself; None if it is not ours.

  Args:
    source: a folder, a file, or a model such as 'timm/resnet18.tv_in1k'.

  Raises:
    UserError: it is a damaged run, or one that does not exist yet.
  """
  path = epath.Path(source).expanduser()
  try:
    if path.is_dir():
      return _of_run(source, path)
    if source.endswith('.safetensors') and path.is_file():
      return _of_export(source, _header(path))
  except OSError as error:
    raise UserError(f'{source} cannot be read: {error.strerror or error}') from None
  return None


def used_target_labels(source: str, targets: Sequence[Mapping[str, Any]] = ()) -> bool:
  """Returns whether labels of a target were read on the way to some weights of ours.

  So says the run, finished or not, or the export, or what the run itself began with. A
  run that learned the labels of a target's data set as its own had no target, so it is
  known by the place and the split of its data.

  Args:
    source: as for `origin`.
    targets: the `data` of each target.

  Raises:
    UserError: a file of a run on the way is damaged.
  """
  from lt_jax.writers import read_rows  # imports `config`, which imports this file

  seen: set[str] = set()
  while source and source not in seen:
    seen.add(source)
    path = epath.Path(source).expanduser()
    if source.endswith('.safetensors') and path.is_file():
      header = _header(path)
      rows = [{'uses_target_labels': header.get('uses_target_labels') == 'true'}]
      config = _config_of(source, header)
    elif (path / 'config.json').is_file():
      result, events = path / 'result.json', path / 'events.jsonl'
      rows = [_json(result, source)] if result.is_file() else []
      rows += read_rows(events) if events.is_file() else []
      config = _json(path / 'config.json', source)
    else:
      return False
    if any(row.get('uses_target_labels') for row in rows):
      return True
    if targets and _learned(source, config, targets):
      return True
    source = str(config.get('init', ''))
  return False


def _learned(
  source: str, config: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]
) -> bool:
  """Returns whether a run learned labels of a target's images as those of its own.

  One place may hold several domains as splits, as an .npz of Office-31 does. Generated
  images are exempt, as they are within a run.
  """
  from lt_jax.config import labelled_data  # imports this file
  from lt_jax.data import places

  try:
    return any(
      own['source'] != 'fake'
      and places.place(own) == places.place(target)
      and own['train_split'] in (target['train_split'], target['test_split'])
      for own in labelled_data(config)
      for target in targets
    )
  except (UserError, TypeError, LookupError, AttributeError) as error:
    raise UserError(f'the config of {source} is damaged: {error}') from None


def adopted(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a resolved config with the preprocessing that its initial weights expect.

  Only our own weights know it; for others, and without weights, the config decides.

  Raises:
    UserError: as for `origin`.
  """
  found = origin(config['init']) if config['init'] else None
  pixels = found.pixels if found else {}
  return {**config, 'data': {**config['data'], **pixels}}


def _of_run(source: str, path: epath.Path) -> Origin:
  """Returns what a run's files say."""
  config, facts = (_json(path / name, source) for name in ('config.json', 'data.json'))
  return _origin(source, config, facts, is_file=False)


def _of_export(source: str, header: Mapping[str, str]) -> Origin | None:
  """Returns what an export's header says; None for other files."""
  if not _is_export(header):
    return None
  try:
    recorded = {
      key: json.loads(header[key]) for key in ('class_names', 'preprocessing')
    }
    return _origin(source, json.loads(header['config']), recorded, is_file=True)
  except ValueError as error:
    raise UserError(f'{source}: its header is damaged: {error}') from None


def _is_export(header: Mapping[str, str]) -> bool:
  """Returns whether `lt_jax.export` wrote a header, rather than another library."""
  return {'config', 'class_names', 'preprocessing'} <= header.keys()


def _config_of(source: str, header: Mapping[str, str]) -> dict[str, Any]:
  """Returns the config in an export's header; {} for other files."""
  if not _is_export(header):
    return {}
  try:
    found = json.loads(header['config'])
  except ValueError as error:
    raise UserError(f'{source}: its header is damaged: {error}') from None
  if not isinstance(found, dict):
    raise UserError(f'{source}: its header is damaged')
  return found


def _origin(
  source: str, config: Mapping[str, Any], facts: Mapping[str, Any], is_file: bool
) -> Origin:
  try:
    stage = config['stage_order'][-1]
    own = config['stages'].get(stage, {}).get('model', {})
    return Origin(
      source=source,
      trunk=own.get('trunk') or config['model']['trunk'],
      class_names=tuple(facts['class_names']),
      pixels={
        k: facts['preprocessing'][k] for k in PIXELS if k in facts['preprocessing']
      },
      stage=stage,
      is_file=is_file,
    )
  except (KeyError, TypeError, IndexError, AttributeError) as error:
    raise UserError(f'{source} is not a complete run: {error!r} is missing') from None


def _json(path: epath.Path, source: str) -> dict[str, Any]:
  if not path.exists():
    raise UserError(f'{source} is a folder but not a run: it has no {path.name}')
  try:
    found = json.loads(path.read_text())
  except ValueError as error:
    raise UserError(f'{path} is damaged: {error}') from None
  if not isinstance(found, dict):
    raise UserError(f'{path} is damaged')
  return found


def _header(path: epath.Path) -> dict[str, str]:
  """Returns the metadata of a .safetensors file; {} for other files."""
  with path.open('rb') as file:
    size = int.from_bytes(file.read(8), 'little')
    text = file.read(size) if size <= MOST_HEADER else b''
  try:
    return json.loads(text or b'{}').get('__metadata__', {})
  except (ValueError, AttributeError):
    return {}
