"""The files of a run: written atomically, and owned by one process."""

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import socket
import stat
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from etils import epath

from lt_jax.errors import UserError, lookup

SEEN_WITHIN = 90.0
"""Seconds that a file system may take to show a new file to all hosts; NFS takes 60."""

NUMBER = int | float
MAYBE = NUMBER | None  # null: not finite, or not measured

LARGEST = 1e15
"""No number that a run counts or measures is larger."""


STORES = {
  'gs': ('gcsfs', 'tensorflow'),
  's3': ('s3fs',),
  'az': ('adlfs',),
  'hf': ('huggingface_hub',),
}
"""Scheme of an object store -> the packages that can read it."""


def is_remote(path: epath.PathLike) -> bool:
  """Returns whether a path names an object store, such as gs://bucket/run."""
  return '://' in os.fspath(path)


def write_atomically(path: epath.PathLike, data: str | bytes) -> None:
  """Writes a file so that readers see the old or the new one whole, even after a crash.

  Raises:
    UserError: the file cannot be written, as on a read-only file system.
    OSError: writing failed for a reason that may pass, such as a full disk.
  """
  with _may_be_written(path):
    _write_atomically(epath.Path(path), data)


def make_folder(path: epath.Path) -> None:
  """Creates a folder if it does not exist; raises what `write_atomically` does."""
  with _may_be_written(path):
    path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _may_be_written(path: epath.PathLike) -> Iterator[None]:
  """Turns a permanent error into a `UserError`."""
  try:
    yield
  except OSError as error:
    if error.errno not in _FORBIDDEN:
      raise
    raise UserError(f'{path} cannot be written: {error.strerror}') from None


def _write_atomically(path: epath.Path, data: str | bytes) -> None:
  data = data.encode() if isinstance(data, str) else data
  if is_remote(path):  # an object store writes whole objects
    path.write_bytes(data)
    return
  temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}.tmp')
  try:
    with open(temporary, 'wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)  # it would take space on a full disk
    raise


def set_aside(path: epath.Path) -> epath.Path:
  """Copies a damaged file to a new name beside it and returns the new path."""
  aside = path.with_name(f'{path.name}.damaged')
  number = 1
  while aside.exists():
    number += 1
    aside = path.with_name(f'{path.name}.damaged.{number}')
  write_atomically(aside, path.read_bytes())
  return aside


def read_npz(path: epath.PathLike) -> dict[str, np.ndarray]:
  """Reads all arrays of a .npz file.

  Raises:
    UserError: it is damaged, or not a .npz file.
    OSError: it does not exist, or reading failed.
  """
  data = epath.Path(path).read_bytes()
  try:
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
      return dict(stored)
  except Exception as error:  # damaged archives raise errors of many types
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise UserError(f'{path} is damaged: {reason}') from None


def write_json(path: epath.PathLike, value: Any) -> None:
  """Writes JSON atomically; rejects non-finite numbers, which JSON does not have."""
  text = json.dumps(value, indent=1, allow_nan=False, default=_plain)
  write_atomically(path, text + '\n')


def _plain(value: Any) -> Any:
  """Turns NumPy numbers and arrays into plain ones for JSON."""
  return value.tolist()


def check_regular(path: epath.PathLike) -> None:
  """Raises a `UserError` for a pipe or a device, since reading it may never end."""
  path = os.fspath(path)
  if not is_remote(path) and os.path.exists(path):
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
      raise UserError(f'{path} is not a regular file')


def read_json(path: epath.PathLike) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    UserError: the file is missing or damaged; the message names it.
  """
  check_regular(path)
  try:
    value = json.loads(epath.Path(path).read_text())
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from None
  except (ValueError, RecursionError) as error:  # bad JSON, or a bad encoding
    raise UserError(f'{path} is not valid JSON: {error}') from None
  if not isinstance(value, dict):
    raise UserError(f'{path} does not hold a JSON object')
  return value


def fits(value: Any, shape: Any) -> bool:
  """Returns whether a JSON value has a given shape.

  Args:
    value: as `json.loads` returns it; a missing key counts as null.
    shape: a type; None; [shape of each element]; {key: shape of its value}, where other
      keys are allowed; {str: shape of each value}; or a tuple of alternatives.
  """
  match shape:
    case tuple():
      return any(fits(value, one) for one in shape)
    case dict() if str in shape:
      is_dict = isinstance(value, dict)
      return is_dict and all(fits(one, shape[str]) for one in value.values())
    case dict():
      entries = shape.items()
      return isinstance(value, dict) and all(fits(value.get(k), s) for k, s in entries)
    case [element]:
      return isinstance(value, list) and all(fits(one, element) for one in value)
    case None:
      return value is None
  moderate = not isinstance(value, NUMBER) or abs(value) <= LARGEST  # False for NaN
  return isinstance(value, shape) and moderate


def check_fits(
  found: Mapping[str, Any], shapes: Mapping[str, Any], path: epath.PathLike
) -> None:
  """Checks that a JSON file holds everything that its readers rely on.

  Args:
    found: what the file holds.
    shapes: key -> the shape that its value must have, see `fits`.
    path: the path of the file, for the message.

  Raises:
    UserError: a key is missing, or its value has another shape.
  """
  for key, shape in shapes.items():
    if not fits(found.get(key), shape):
      wrong = 'has an unexpected value for' if key in found else 'lacks'
      raise UserError(
        f'{path} {wrong} {key!r}: another version wrote it, or it is damaged'
      )


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns the folder of a run as an absolute path, which Orbax requires.

  Raises:
    UserError: the path is empty, or in an object store that no installed package reads.
  """
  text = os.fspath(path)
  if not text:
    raise UserError('--workdir is empty')
  if is_remote(text):
    scheme = text.partition('://')[0]
    packages = lookup(STORES, 'object store', scheme)
    if not any(map(find_spec, packages)):
      raise UserError(f'{text} needs a package: pip install {packages[0]}')
  return epath.Path(text if is_remote(text) else os.path.abspath(text))


def make_workdir(path: epath.PathLike) -> epath.Path:
  """Creates the folder of a run and checks that it is writable.

  Returns:
    Its absolute path.

  Raises:
    UserError: it cannot be written; the message has the path and the system's reason.
  """
  path = absolute(path)
  # TensorStore treats a backslash as a separator, and rejects what is not UTF-8.
  if re.search(r'[\\\ud800-\udfff]', os.fspath(path)):
    raise UserError(
      f'{path} has a backslash, or bytes that are not UTF-8: checkpoints cannot be '
      'stored there'
    )
  probe = path / f'.probe.{uuid.uuid4().hex}'  # containers can share a process ID
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe.write_text('')
    probe.unlink()
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror}') from None
  return path


OF_A_RUN = frozenset(
  (
    *('config.json', 'data.json', 'result.json', 'error.json', 'evaluation.json'),
    *('metrics.jsonl', 'events.jsonl', 'lock', 'stages', 'tensorboard'),
    *('predictions.npz', 'features.npz', 'samples.npz', 'open_set.npz', 'weights.npz'),
    'translations.npz',
    *('report.html', 'report.md', 'report.tex', 'figures'),
  )
)
"""Files and folders that a run and its report write into the folder of the run."""


def check_out(path: epath.PathLike) -> None:
  """Rejects an --out that cannot be written, or that would replace a file of a run.

  Raises:
    UserError: its folder does not exist; it is a folder, a link or a device; or its
      path is that of a file of a run.
  """
  path = epath.Path(path)
  if not path.parent.is_dir():
    raise UserError(f'--out is {path}, in a folder that does not exist')
  if os.path.islink(path) or (path.exists() and not path.is_file()):
    raise UserError(f'--out is {path}, which exists but is not a regular file')
  real = path if is_remote(path) else epath.Path(os.path.realpath(path))
  for folder in real.parents:
    name = real.relative_to(folder).parts[0].partition('.damaged')[0]
    if name in OF_A_RUN and is_run(folder):
      raise UserError(
        f'--out is {path}, the place of a file of the run in {folder}: give another '
        'name'
      )


def is_run(folder: epath.Path) -> bool:
  """Returns whether a folder belongs to a run, even if one of its files is lost."""
  both = (folder / 'config.json').exists() and (folder / 'data.json').exists()
  return both or (folder / 'stages').is_dir()


def seen(path: epath.Path) -> bool:
  """Returns whether a file exists; if there are several processes, first waits for it.

  Network file systems show new files to other hosts with a delay.
  """
  until = time.monotonic() + (SEEN_WITHIN if jax.process_count() > 1 else 0)
  while not path.exists() and time.monotonic() < until:
    time.sleep(1)
  return path.exists()


class InUse(UserError):
  """Another process holds a folder."""


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
  """Locks a run's folder for this process; a second process fails at once.

  The kernel drops the lock when the process ends, however it dies, so there are no
  stale locks. The file only names the owner, for the message. In a run of several
  processes only process 0 takes the lock, since all work in the same folder. Object
  stores and some network file systems have no locks; there, never start a run twice.

  Raises:
    InUse: another process holds the folder.
  """
  if is_remote(workdir) or jax.process_index() > 0:
    yield
    return
  path = os.path.join(workdir, 'lock')
  file = open(path, 'a+')  # noqa: SIM115 (held until the run ends)
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in _IN_USE:
      file.seek(0)
      owner = file.read().strip() or 'another process'
      file.close()
      raise InUse(f'{workdir} is in use by {owner}') from None
    if error.errno not in _NO_LOCKS:
      raise
    print(
      f'note: {workdir} is on a file system without locks: do not start two runs there',
      file=sys.stderr,
    )
  try:
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    yield
  finally:
    file.close()


_FORBIDDEN = (
  *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST),
  *(errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG),
)
_IN_USE = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
