"""Checks of the machine and of the folder of a run."""

import contextlib
import fcntl
import glob
import os
import pathlib
import shutil
import tempfile

import jax
from etils import epath

from lt_jax import files, footprint, results, run, train
from lt_jax.data import reading
from lt_jax.doctor.case import Case, Findings, odd, ok, wrong
from lt_jax.errors import UserError
from lt_jax.footprint import amount

NETWORKS = ('nfs', 'nfs4', 'cifs', 'smb3', 'lustre', 'ceph', '9p', 'gpfs', 'beegfs')
MEMORY = ('tmpfs', 'ramfs')
"""File systems by their names in /proc/mounts; those of FUSE have a prefix."""

SHARED_MEMORY = '/dev/shm'
"""The folder of shared memory on Linux."""


# The machine.


def versions(case: Case) -> Findings:
  """Reports what is installed, and where JAX runs."""
  yield ok(', '.join(f'{k} {v}' for k, v in results.versions().items()))
  yield ok(results.devices(jax.device_count()))


def accelerators(case: Case) -> Findings:
  """Looks for an accelerator that JAX does not use."""
  drivers = {'nvidia': 'cuda', 'accel': 'tpu'}
  for name, extra in drivers.items():
    if glob.glob(f'/dev/{name}[0-9]*') and jax.default_backend() == 'cpu':
      yield odd(
        f'/dev has {name} devices, but JAX runs on the CPU: install lt_jax[{extra}], '
        'or check whether another process holds them'
      )


def cores(case: Case) -> Findings:
  """Compares data workers with cores."""
  workers, found = case.config['data']['workers'], reading.usable_cores()
  if workers > found:
    yield odd(f'data.workers is {workers}, but this process can use only {found} cores')
  else:
    kinds = {-1: 'one data worker per core', 0: 'threads read the data'}
    yield ok(f'{found} cores; {kinds.get(workers, f"{workers} data workers")}')


def shared_memory(case: Case) -> Findings:
  """Compares shared memory with what data workers need."""
  stages, passes = case.experiment.stages.values(), case.experiment.passes.values()
  training = max(reading.shared_memory(stage.streams.values()) for stage in stages)
  evaluation = max(reading.shared_memory([one.stream]) for one in passes)
  if training + evaluation == 0 or not os.path.isdir(SHARED_MEMORY):
    return
  needed, free = training + evaluation, shutil.disk_usage(SHARED_MEMORY).free
  text = f'data workers keep up to {amount(needed)} in {SHARED_MEMORY}, '
  text += f'{amount(free)} are free'
  if needed > free:
    yield odd(f'{text}: enlarge it (docker run --shm-size), or lower data.workers')
  else:
    yield ok(text)


def idle_devices(case: Case) -> Findings:
  """Counts devices that the batches leave idle."""
  idle = jax.device_count() - case.experiment.mesh.size
  if idle:
    yield odd(f'{idle} of {jax.device_count()} devices idle: batches do not divide')


# The folder.


def writable(case: Case) -> Findings:
  """Writes, renames and locks files where the run will."""
  folder, content = case.folder, os.urandom(2**16)
  if files.is_remote(folder):
    probe = folder / '.doctor'
    files.write_atomically(probe, content)
    same = probe.read_bytes() == content
    probe.unlink()
  else:
    try:
      with tempfile.TemporaryDirectory(prefix='.doctor.', dir=_existing(folder)) as own:
        probe = epath.Path(own) / 'probe'
        for text in (b'', content):  # the second replaces the first
          files.write_atomically(probe, text)
        same = probe.read_bytes() == content
        yield from _locks(epath.Path(own))
    except OSError as error:
      yield wrong(f'workdir {folder} cannot be written: {error.strerror}')
      return
  yield (
    ok(f'{folder} can be written and read back')
    if same
    else wrong(f'{folder}: a file read back differs from what was written')
  )


def _existing(folder: epath.Path) -> epath.Path:
  """Returns a folder, or its nearest parent that exists."""
  return next(path for path in (folder, *folder.parents) if path.exists())


def _locks(folder: epath.Path) -> Findings:
  """Tries to take a lock that is held."""
  with files.locked(folder):
    try:
      with files.locked(folder):
        yield odd('locks do not work there: do not start a second run in this folder')
    except UserError:
      yield ok('locks work there')


def file_system(case: Case) -> Findings:
  """Reports whether the folder outlives the machine."""
  folder = case.folder
  if files.is_remote(folder):
    yield ok('the folder is in an object store')
    return
  kind = _file_system(os.fspath(_existing(folder)))
  if kind in MEMORY:
    yield odd(f'the folder is in memory ({kind}): it is lost when the machine stops')
  elif kind in NETWORKS or kind.startswith('fuse'):
    yield odd(f'the folder is on a network ({kind}): saving may be slow')
  else:
    yield ok(f'the folder is on {kind or "an unknown file system"}')


def _file_system(path: str) -> str:
  """Returns the kind of file system of a path; '' if unknown."""
  mounts = pathlib.Path('/proc/mounts')
  if not mounts.exists():
    return ''
  lines = [line.split() for line in mounts.read_text().splitlines()]
  path = os.path.realpath(path)
  above = [
    (len(at), index, kind)
    for index, (_, at, kind, *_) in enumerate(lines)
    if os.path.commonpath([at, path]) == at
  ]
  return max(above)[2] if above else ''


def begun(case: Case) -> Findings:
  """Compares the run with the one in the folder."""
  folder = case.folder
  if not files.is_remote(folder) and _held(folder / 'lock'):
    yield wrong('the folder is in use by a run')
  if (folder / 'config.json').exists():
    run.check_config(case.config, folder)
    run.check_data(case.experiment, folder)
    yield ok('the folder holds this run, which will resume')
  else:
    yield ok('the folder holds no run yet')


def _held(path: epath.Path) -> bool:
  """Returns whether a process holds a lock file."""
  with contextlib.suppress(FileNotFoundError, NotADirectoryError), path.open() as file:
    try:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
  return False


def space(case: Case) -> Findings:
  """Compares free space with the size of the checkpoints."""
  folder = case.folder
  if files.is_remote(folder):
    return
  keep = case.config['keep_checkpoints'] + 1
  stages = case.experiment.stages.values()
  one = [footprint.size(train.state_shapes(s.method, s.streams)) for s in stages]
  needed, free = keep * sum(one), shutil.disk_usage(_existing(folder)).free
  text = f'{keep} checkpoints per stage take {amount(needed)}, {amount(free)} are free'
  yield wrong(text) if needed > free else ok(text)
