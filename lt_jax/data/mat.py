"""Reads untrusted MATLAB files: only arrays of numbers and cells of strings."""

import math
import os
from collections.abc import Collection

import numpy as np

from lt_jax.errors import UserError

NUMBERS = ('double', 'single', 'logical', 'char')
"""MATLAB classes that are plain arrays; the integers are beside them."""

MOST_PER_BYTE = 200
"""How many bytes a byte of a file may unpack to."""


def read_mat(path: str, wanted: Collection[str]) -> dict[str, np.ndarray]:
  """Reads some variables of a MATLAB file up to version 7.2, without trusting it.

  The table of contents is read first. A file with structs, objects or functions
  anywhere is refused, whether or not they are wanted, and so is one that unpacks to far
  more than its size.

  Args:
    path: of the file.
    wanted: names of variables; those that are not there are left out.

  Returns:
    name -> array of numbers, or (n,) strings of a cell of strings.

  Raises:
    UserError: there is no such file, it is no such file, or it holds something else.
  """
  from scipy import io

  try:
    with open(path, 'rb') as file:
      head = file.read(128)
    if head.startswith(b'MATLAB 7.3') or head.startswith(b'\x89HDF'):
      raise UserError(
        f'{path} is a MATLAB file of version 7.3, which is not read: save it in MATLAB '
        "with '-v7'"
      )
    _check_contents(path, io.whosmat(path))
    found = io.loadmat(path, variable_names=list(wanted))
  except UserError:
    raise
  except OSError as error:
    raise UserError(f'{path}: {error.strerror or error}') from None
  except Exception as error:  # of damaged files SciPy raises whatever comes up
    told = ' '.join(str(error).split())[:200]
    raise UserError(f'{path} is no MATLAB file that can be read: {told}') from None
  return {
    name: _strings(path, name, found[name]) if found[name].dtype == object else value
    for name, value in found.items()
    if name in wanted
  }


def _check_contents(path: str, contents: list[tuple[str, tuple[int, ...], str]]):
  """Refuses a table of contents with anything but numbers, texts and cells."""
  for name, _, kind in contents:
    if kind != 'cell' and kind not in NUMBERS and 'int' not in kind:
      raise UserError(
        f'{path}: {name!r} is a {kind}; only arrays of numbers and cells of strings '
        'are read'
      )
  size = sum(8 * math.prod(shape) for _, shape, _ in contents)
  if size > 2**24 and size > MOST_PER_BYTE * os.path.getsize(path):
    raise UserError(
      f'{path} would unpack to {size} bytes, over {MOST_PER_BYTE} times its size'
    )


def _strings(path: str, name: str, cells: np.ndarray) -> np.ndarray:
  """Returns the strings of a cell array, in order."""
  texts = []
  for cell in cells.ravel():
    if not isinstance(cell, np.ndarray) or cell.dtype.kind != 'U' or cell.size != 1:
      raise UserError(
        f'{path}: cell {len(texts)} of {name!r} is no string; only cells of strings '
        'are read'
      )
    texts.append(str(cell.ravel()[0]))
  return np.array(texts)
