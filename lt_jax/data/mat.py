"""Reads untrusted MATLAB files: only arrays of numbers and cells of strings."""

import math
import os
from collections.abc import Collection

import numpy as np

from lt_jax.errors import UserError

NUMBERS = ('double', 'single', 'logical', 'char')
"""MATLAB classes that are plain arrays, besides the integer ones."""

MOST_PER_BYTE = 200
"""The largest ratio of unpacked to packed bytes."""


def read_mat(path: str, wanted: Collection[str]) -> dict[str, np.ndarray]:
  """Reads some variables of a MATLAB file up to version 7.2, without trusting it.

  It reads the table of contents first. It refuses a file that contains structs, objects
  or functions anywhere, even if they are not wanted, and one that unpacks to far more
  than its size.

  Args:
    path: path of the file.
    wanted: names of variables; missing ones are left out.

  Returns:
    name -> array of numbers, or (n,) strings for a cell of strings.

  Raises:
    UserError: the file does not exist, is not a MATLAB file, or has other contents.
  """
  from scipy import io

  try:
    with open(path, 'rb') as file:
      head = file.read(128)
    if head.startswith(b'MATLAB 7.3') or head.startswith(b'\x89HDF'):
      raise UserError(
        f'{path} is a MATLAB file of version 7.3, which is not supported: save it in '
        "MATLAB with '-v7'"
      )
    _check_contents(path, io.whosmat(path))
    found = io.loadmat(path, variable_names=list(wanted))
  except UserError:
    raise
  except OSError as error:
    raise UserError(f'{path}: {error.strerror or error}') from None
  except Exception as error:  # SciPy raises many kinds of errors for damaged files
    reason = ' '.join(str(error).split())[:200]
    raise UserError(f'{path} is not a readable MATLAB file: {reason}') from None
  return {
    name: _strings(path, name, found[name]) if found[name].dtype == object else value
    for name, value in found.items()
    if name in wanted
  }


def _check_contents(path: str, contents: list[tuple[str, tuple[int, ...], str]]):
  """Refuses a file that contains anything but numbers, texts and cells."""
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
        f'{path}: cell {len(texts)} of {name!r} is not a string; only cells of strings '
        'are read'
      )
    texts.append(str(cell.ravel()[0]))
  return np.array(texts)
