"""Reads untrusted MATLAB files: only arrays of numbers and cells of strings."""

import math
import os
import zlib
from collections.abc import Collection, Iterable, Iterator
from typing import BinaryIO, Literal

import numpy as np

from lt_jax.errors import UserError

NUMBERS = ('double', 'single', 'logical', 'char')
"""MATLAB classes that are plain arrays, besides the integer ones."""

MOST_PER_BYTE = 200
"""The largest ratio of unpacked to packed bytes."""

HEADER, COMPRESSED, PIECE = 128, 15, 2**14
"""Bytes of the header, the type of a packed variable, bytes to unpack at once."""

ORDERS: dict[bytes, Literal['little', 'big']] = {b'IM': 'little', b'MI': 'big'}
"""The last two bytes of the header -> the order of bytes in a number."""


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
      head = file.read(HEADER)
      if head.startswith(b'MATLAB 7.3') or head.startswith(b'\x89HDF'):
        raise UserError(
          f'{path} is a MATLAB file of version 7.3, which is not supported: save it in '
          "MATLAB with '-v7'"
        )
      _check_size(path, _unpacked(file, head))
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
        f'{path}: {name!r} is of the type {kind}; only arrays of numbers and cells of '
        'strings are read'
      )
  _check_size(path, (8 * math.prod(shape) for _, shape, _ in contents))


def _check_size(path: str, sizes: Iterable[int]) -> None:
  """Refuses a file that unpacks to far more than its size.

  Args:
    path: path of the file.
    sizes: bytes of the parts that it unpacks to.
  """
  size, packed = 0, os.path.getsize(path)
  for part in sizes:
    size += part
    if size > 2**24 and size > MOST_PER_BYTE * packed:
      raise UserError(f'{path} would unpack to over {MOST_PER_BYTE} times its size')


def _unpacked(file: BinaryIO, head: bytes) -> Iterator[int]:
  """Yields the bytes of packed variables, piece by piece, without keeping them.

  The table of contents does not tell what is inside a cell.

  Args:
    file: the file, behind its header.
    head: its header.
  """
  order = ORDERS.get(head[126:])
  if order is None:  # version 4, which packs nothing
    return
  while len(tag := file.read(8)) == 8:
    kind, left = (int.from_bytes(tag[i : i + 4], order) for i in (0, 4))
    if kind != COMPRESSED:
      file.seek(left, os.SEEK_CUR)
      continue
    unpacker = zlib.decompressobj()
    while left > 0 and (packed := file.read(min(left, PIECE))):
      left -= len(packed)
      while packed:
        yield len(unpacker.decompress(packed, 64 * PIECE))
        packed = unpacker.unconsumed_tail


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
