"""Where the data of a run lie: recorded when it begins, found again when they move."""

import os
from collections.abc import Mapping

from lt_jax.errors import UserError
from lt_jax.files import is_remote

Place = dict[str, str]
"""The config keys data.source and data.dir, as 'source' and 'dir'."""


def place(data: Mapping[str, str]) -> Place:
  """Returns where data lie, whatever the current folder is later.

  Args:
    data: has 'source' and 'dir' as in a config, where paths may be relative.
  """
  kind, colon, path = data['source'].partition(':')
  if kind in ('npz', 'list', 'folder'):
    path = _absolute(path)
  return {'source': f'{kind}{colon}{path}', 'dir': _absolute(data['dir'])}


def moved(data: Mapping[str, str], data_dir: str) -> Place:
  """Returns where data lie that have moved.

  Args:
    data: has 'source' and 'dir', where they were.
    data_dir: of 'folder:' and 'npz:' the path; of 'tfds:' the folder of data sets; of
      'list:' the folder that paths are relative to, with the lists in it if they are
      no longer where they were.

  Raises:
    UserError: the source has no files.
  """
  kind, _, path = data['source'].partition(':')
  data_dir = _absolute(data_dir)
  match kind:
    case 'folder' | 'npz':
      return {'source': f'{kind}:{data_dir}', 'dir': ''}
    case 'tfds':
      return {'source': data['source'], 'dir': data_dir}
    case 'list':
      lists = path if data['dir'] and os.path.isdir(path) else data_dir
      return {'source': f'list:{lists}', 'dir': data_dir}
  raise UserError(f'--data_dir: the source {data["source"]!r} has no files')


def is_there(data: Mapping[str, str]) -> bool:
  """Returns whether all paths of a place are there."""
  kind, _, path = data['source'].partition(':')
  paths = [data['dir'], path if kind != 'tfds' else '']
  return all(is_remote(p) or os.path.exists(p) for p in paths if p)


def _absolute(path: str) -> str:
  if not path or is_remote(path):
    return path
  return os.path.abspath(os.path.expanduser(path))
