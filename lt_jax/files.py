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
"""Seconds within which a file system shows a new file to every host; NFS takes 60."""

NUMBER = int | float
MAYBE = NUMBER | None  # null is what is not finite, or was not measured

LARGEST = 1e15
"""Nothing that a run counts or measures is larger."""


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
  """Writes a file so that a reader, or a crash, sees the old or the new one whole.

  Raises:
    UserError: it may not be written, as on a read-only file system.
    OSError: writing failed, which may pass, as on a full disk.
  """
  with _may_be_written(path):
    _write_atomically(epath.Path(path), data)


def make_folder(path: epath.Path) -> None:
  """Creates a folder that may be there; raises as `write_atomically`."""
  with _may_be_written(path):
    path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _may_be_written(path: epath.PathLike) -> Iterator[None]:
  """Turns an error that will not pass into a `UserError`."""
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
    temporary.unlink(missing_ok=True)  # where the disk is full it would hold the rest
    raise


def set_aside(path: epath.Path) -> epath.Path:
  """Copies a damaged file to a name beside it; returns that name."""
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
    UserError: it is damaged, or no such file.
    OSError: it is not there, or reading failed.
  """
  data = epath.Path(path).read_bytes()
  try:
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
      return dict(stored)
  except Exception as error:  # there is no list of what a damaged archive raises
    told = ' '.join(str(error).split()) or type(error).__name__
    raise UserError(f'{path} is damaged: {told}') from None


def write_json(path: epath.PathLike, value: Any) -> None:
  """Writes JSON atomically; non-finite numbers are refused, as JSON has none."""
  text = json.dumps(value, indent=1, allow_nan=False, default=_plain)
  write_atomically(path, text + '\n')


def _plain(value: Any) -> Any:
  """Turns NumPy numbers and arrays into plain ones for JSON."""
  return value.tolist()


def check_regular(path: epath.PathLike) -> None:
  """Raises a `UserError` for a pipe or a device, which may never end."""
  path = os.fspath(path)
  if not is_remote(path) and os.path.exists(path):
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
      raise UserError(f'{path} is not a regular file')


def read_json(path: epath.PathLike) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    UserError: the file is missing or damaged; it names the file.
  """
  check_regular(path)
  try:
    value = json.loads(epath.Path(path).read_text())
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from None
  except (ValueError, RecursionError) as error:  # of JSON, or of the encoding
    raise UserError(f'{path} is not valid JSON: {error}') from None
  if not isinstance(value, dict):
    raise UserError(f'{path} does not hold a JSON object')
  return value


def fits(value: Any, shape: Any) -> bool:
  """Returns whether JSON is of a shape.

  Args:
    value: as `json.loads` returns it; a key that is missing counts as null.
    shape: a type, or None; [the shape of each element]; {key: its shape}, which allows
      other keys; {str: the shape of each value}; or a tuple of shapes, of which it is
      one.
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
  moderate = not isinstance(value, NUMBER) or abs(value) <= LARGEST  # and no NaN
  return isinstance(value, shape) and moderate


def check_fits(
  found: Mapping[str, Any], shapes: Mapping[str, Any], path: epath.PathLike
) -> None:
  """Refuses what a file of JSON holds unless all that is relied on is there.

  Args:
    found: what it holds.
    shapes: key -> the shape of what must stand there, see `fits`.
    path: of the file, for the message.

  Raises:
    UserError: a key is missing, or holds something else.
  """
  for key, shape in shapes.items():
    if not fits(found.get(key), shape):
      wrong = 'has an unexpected value for' if key in found else 'lacks'
      raise UserError(
        f'{path} {wrong} {key!r}: another version wrote it, or it is damaged'
      )


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns the folder of a run as an absolute path, which Orbax asks for.

  Raises:
    UserError: the path is empty, or in a store that nothing installed can read.
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
  """Creates the folder of a run and proves that it can be written.

  Returns:
    Its absolute path.

  Raises:
    UserError: it cannot be written; with the path and the system's reason.
  """
  path = absolute(path)
  # TensorStore begins a new folder at the first, and takes no text with the others.
  if re.search(r'[\\\ud800-\udfff]', os.fspath(path)):
    raise UserError(
      f'{path} has a backslash, or bytes that are no UTF-8, as no checkpoint may'
    )
  probe = path / f'.probe.{uuid.uuid4().hex}'  # containers share process numbers
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
  """Refuses an --out that cannot be written, or would replace what it must not.

  Raises:
    UserError: its folder is not there; it is a folder, a link or a device; or it has
      the place of a file of a run.
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
  """Returns whether a folder is that of a run, even if one of its files is lost."""
  both = (folder / 'config.json').exists() and (folder / 'data.json').exists()
  return both or (folder / 'stages').is_dir()


def seen(path: epath.Path) -> bool:
  """Returns whether a file is there; one of several processes waits for it to appear.

  A network file system shows a new file to other hosts late.
  """
  until = time.monotonic() + (SEEN_WITHIN if jax.process_count() > 1 else 0)
  while not path.exists() and time.monotonic() < until:
    time.sleep(1)
  return path.exists()


class InUse(UserError):
  """Another process holds a folder."""


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
  """Holds a run's folder for this process; a second process is refused at once.

  The kernel holds the lock, so it ends with the process, however that dies: there is
  no stale lock to judge. The file only names the owner for the message. Taken by
  process 0 alone, since the others work in the same folder. Object stores and some
  network file systems have no locks; there the launcher must not start twice.

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
