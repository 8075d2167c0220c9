"""Records where a run's data are, and finds them again if they move."""

import os
from collections.abc import Mapping

from lt_jax.data.layouts import LAYOUTS
from lt_jax.errors import UserError
from lt_jax.files import is_remote

Place = dict[str, str]
"""The config keys data.source and data.dir, as 'source' and 'dir'."""

IN_FILES = ('npz', 'list', 'folder', 'xlsa', *LAYOUTS)
"""Kinds of sources with a path after the colon."""


def kind(source: str) -> str:
  """Returns the part of a source without its path: 'folder' for 'folder:DIR'."""
  first = source.partition(':')[0]
  return first if first in IN_FILES else source


def place(data: Mapping[str, str]) -> Place:
  """Returns where data are, independent of the working directory.

  Args:
    data: has 'source' and 'dir' as in a config, where paths can be relative.
  """
  first, colon, path = data['source'].partition(':')
  if first in IN_FILES:
    path = _absolute(path)
  return {'source': f'{first}{colon}{path}', 'dir': _absolute(data['dir'])}


def moved(data: Mapping[str, str], data_dir: str) -> Place:
  """Returns the new place of data that have moved.

  Args:
    data: has 'source' and 'dir', where they were.
    data_dir: for 'folder:', 'npz:', 'xlsa:' and layouts, the path; for 'tfds:', the
      folder of data sets; for 'list:', the folder that paths are relative to, which has
      the lists too if these have moved.

  Raises:
    UserError: the source has no files.
  """
  first, _, path = data['source'].partition(':')
  data_dir = _absolute(data_dir)
  match first:
    case 'folder' | 'npz':
      return {'source': f'{first}:{data_dir}', 'dir': ''}
    case 'xlsa':
      return {'source': f'xlsa:{data_dir}', 'dir': _absolute(data['dir'])}
    case 'tfds':
      return {'source': data['source'], 'dir': data_dir}
    case 'list':
      lists = path if data['dir'] and os.path.isdir(path) else data_dir
      return {'source': f'list:{lists}', 'dir': data_dir}
    case _ if first in IN_FILES:
      return {'source': f'{first}:{data_dir}', 'dir': ''}
  raise UserError(f'--data_dir: the source {data["source"]!r} has no files')


def gone(data: Mapping[str, str]) -> str:
  """Returns the first missing path of a place; '' if none is missing."""
  first, _, path = data['source'].partition(':')
  paths = [path if first in IN_FILES else '', data['dir']]
  return next((p for p in paths if p and not _exists(p)), '')


def told(data: Mapping[str, str]) -> str:
  """Returns a place in words."""
  return f'{data["source"]} in {data["dir"]}' if data['dir'] else data['source']


def _exists(path: str) -> bool:
  return is_remote(path) or os.path.exists(path)


def _absolute(path: str) -> str:
  if not path or is_remote(path):
    return path
  return os.path.abspath(os.path.expanduser(path))
