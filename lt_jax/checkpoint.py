"""Verified checkpoints: the only file that imports Orbax.

Orbax writes checkpoints atomically, but it does not notice later damage, and it does
not fall back to an older checkpoint. So there is more than a checkpoint per step:

  <directory>/<step>/                  written by Orbax, kept in the ladder
  <directory>/manifests/<step>.json    size and SHA-256 of every file, written last
  <directory>/best/<step>/             the selected state, outside the ladder
  <directory>/manifests/best.json      its manifest, with the value it was chosen by
  <directory>/quarantine/              what failed a check: moved aside, never deleted

If a checkpoint has no manifest, its save was interrupted. It is not trusted while a
verified one exists.

Arrays are stored under their paths in the state. `lt_jax.renamed` lists the paths that
have changed, so that older checkpoints can be read.
"""

import concurrent.futures
import functools
import hashlib
import sys
import time
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from lt_jax import files
from lt_jax.errors import UserError
from lt_jax.renamed import old_path
from lt_jax.stopping import agreed, any_process, wait_for_all

PyTree = Any
Log = Callable[..., None]


MANIFEST = {
  'step': int,
  'files': {str: {'bytes': int, 'sha256': str}},
  'first': (int, None),
  'value': (files.NUMBER, None),
  'rows': ({str: int}, None),
  **dict.fromkeys(('begun_from', 'config', 'data'), ({}, None)),
}
"""What readers rely on in a manifest, see `files.fits`; newer keys may be missing."""


class SaveError(RuntimeError):
  """A checkpoint could not be written, as on a full disk; older ones are intact."""


class Restored(NamedTuple):
  """A restored state.

  Attributes:
    state: the state.
    step: its step.
    manifest: its manifest; empty if it has none.
    verified: whether every file had the recorded size and digest.
  """

  state: PyTree
  step: int
  manifest: dict[str, Any]
  verified: bool


class Checkpoints:
  """The ladder of checkpoints of one stage.

  Saving is asynchronous: the state is copied to the host, then written, hashed and
  given its manifest in the background. The next call raises an error that occurs there.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    keep: int = 3,
    facts: Mapping[str, Any] | None = None,
    log: Log = lambda event, **values: None,
  ):
    """Opens a ladder; nothing is created before the first save.

    Args:
      directory: the folder of the ladder.
      keep: how many verified checkpoints to keep.
      facts: written into every manifest: config digest, versions, devices.
      log: called with an event name and its values.
    """
    self._directory = epath.Path(directory)
    self._keep = keep
    self._facts = dict(facts or {})
    self._log = log
    self._checkpointer = ocp.StandardCheckpointer()
    self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    self._pending: concurrent.futures.Future | None = None
    self.last_saved: int | None = None

  def save(self, step: int, state: PyTree, **facts: Any) -> None:
    """Starts to save a state; first raises the error of the save before, if any.

    Raises:
      SaveError: this save, or the one before it, failed.
    """
    self._start(str(step), step, state, facts, self._prune)
    self.last_saved = step

  def save_best(self, step: int, state: PyTree, **facts: Any) -> None:
    """Starts to save the selected state, replacing the one before.

    Raises:
      SaveError: this save, or the one before it, failed.
    """
    self._start('best', step, state, facts, lambda: self._prune_best(step))

  def wait(self) -> None:
    """Waits until the last save is on disk with its manifest.

    Raises:
      SaveError: it failed.
    """
    if self._pending is not None:
      pending, self._pending = self._pending, None
      try:
        pending.result()
      except Exception as error:
        raise SaveError(_one_line(error)) from error

  def close(self) -> None:
    """Waits for the background work and ends its threads.

    Raises:
      SaveError: the last save failed.
    """
    failure = None
    for finish in (self.wait, self._checkpointer.close):
      try:
        finish()
      except Exception as error:  # Orbax raises a failed save's error again
        failure = failure or error
    self._thread.shutdown()
    if failure is not None:
      raise SaveError(str(failure)) from failure

  def steps(self) -> list[int]:
    """Returns the steps with a finished checkpoint, oldest first."""
    if not self._directory.exists():
      return []
    return sorted(int(p.name) for p in self._directory.iterdir() if p.name.isdigit())

  def restore(self, target: PyTree, *, quarantine: bool = True) -> Restored | None:
    """Restores the newest checkpoint that passes every check.

    From the newest to the oldest, checks manifest, sizes, digests, structure, and that
    values are finite. A checkpoint that fails is moved aside and logged, so that its
    step can be saved again. One that merely lacks a manifest is used, and given one, if
    no verified checkpoint is left.

    Args:
      target: a tree of `jax.ShapeDtypeStruct` with shardings.
      quarantine: False leaves the folder as it is, for readers other than the run.

    Returns:
      What was restored, or None if there is no checkpoint at all.

    Raises:
      UserError: there are checkpoints, but none is usable.
    """
    manifests = dict(agreed([[s, self._manifest(str(s))] for s in self.steps()]))
    trusted_first = sorted(
      manifests, key=lambda step: (manifests[step] is not None, step), reverse=True
    )
    rejected: dict[int, str] = {}
    for step in trusted_first:
      manifest = manifests[step]
      state, reason = self._attempt(step, manifest, target)
      if state is not None:
        newer = [s for s in manifests if s > step and s not in rejected]
        rejected |= dict.fromkeys(newer, 'no manifest: its save was interrupted')
        self._set_aside(rejected, quarantine)
        if manifest is None and quarantine and jax.process_index() == 0:
          self._write_manifest(str(step), self._directory / str(step), {'step': step})
        self.last_saved = step
        return Restored(state, step, manifest or {}, manifest is not None)
      rejected[step] = reason
    folder = self._directory / 'manifests'
    stray = [p.name for p in folder.glob('[0-9]*.json')] if folder.exists() else []
    if not rejected and not agreed(stray):
      return None
    reasons = '; '.join(f'{step}: {reason}' for step, reason in rejected.items())
    raise UserError(
      f'no usable checkpoint in {self._directory} '
      f'({reasons or "only manifests are left"}); {self.how_to_retrain()}'
    )

  def restore_best(self, target: PyTree) -> Restored | None:
    """Restores the selected state, or None if none was selected.

    Raises:
      UserError: it is damaged.
    """
    manifest = agreed(self._manifest('best'))
    if manifest is None:
      return None
    directory = self._directory / 'best' / str(manifest.get('step'))
    reason = _damage(directory, manifest) if jax.process_index() == 0 else None
    if any_process(reason is not None):
      raise UserError(
        f'the selected checkpoint {directory} is damaged: {reason}; '
        f'{self.how_to_retrain()}'
      )
    state = self._read(directory, target)
    return Restored(state, manifest['step'], manifest, True)

  def arrays(self, prefixes: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns arrays of the selected State, or else of the newest intact one.

    They are returned by their paths, without the structure of the State.

    Args:
      prefixes: what the paths to return start with, such as 'params.net.'.

    Raises:
      UserError: no State is intact.
    """
    best, places = self._manifest('best'), []
    if best:
      places.append((self._directory / 'best' / str(best['step']), best))
    for step in reversed(self.steps()):
      places.append((self._directory / str(step), self._manifest(str(step))))
    for directory, manifest in places:
      if manifest and _damage(directory, manifest) is None:
        stored = self._checkpointer.metadata(directory).item_metadata.tree
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {
          name: jax.ShapeDtypeStruct(tuple(x.shape), x.dtype, sharding=here)
          for name, x in stored.items()
        }
        leaves = self._checkpointer.restore(directory, wanted)
        return {
          name: np.asarray(leaf)
          for name, leaf in leaves.items()
          if name.startswith(tuple(prefixes))
        }
    raise UserError(f'{self._directory} holds no intact checkpoint')

  def amend(self, step: int, **facts: Any) -> None:
    """Changes facts in the manifests of a step and of the selected state.

    For runs that resume with another config, on request, and for runs of versions that
    did not record these facts.
    """
    for name in (str(step), 'best'):
      manifest = self._manifest(name)
      if manifest and any(manifest.get(key) != fact for key, fact in facts.items()):
        path = self._directory / 'manifests' / f'{name}.json'
        files.write_json(path, manifest | facts)

  def best(self) -> dict[str, Any] | None:
    """Returns the manifest of the selected state, or None.

    Raises:
      UserError: it is damaged.
    """
    manifest = self._manifest('best')
    if manifest == {}:
      path = self._directory / 'manifests' / 'best.json'
      raise UserError(f'{path} is damaged; {self.how_to_retrain()}')
    return manifest

  def how_to_retrain(self) -> str:
    """Says how to retrain a stage whose checkpoints are lost."""
    return (
      f'delete {self._directory.parent} and run the training command again to retrain '
      'this stage'
    )

  def _start(self, name, step, state, facts, prune) -> None:
    """Copies a state to the host; the background thread does the rest."""
    self.wait()
    _hush_closed_loops()
    directory = self._directory / name / (str(step) if name == 'best' else '')
    try:
      (self._directory / 'manifests').mkdir(parents=True, exist_ok=True)
      if name == 'best' and agreed(directory.exists()):  # its save was interrupted
        if jax.process_index() == 0:
          directory.rmtree()
        wait_for_all('an interrupted save is removed')
      self._checkpointer.save(directory, _to_leaves(state))
    except Exception as error:
      raise SaveError(_one_line(error)) from error
    self._pending = self._thread.submit(
      self._finish, name, directory, {'step': step, **self._facts, **facts}, prune
    )

  def _finish(self, name, directory, manifest, prune) -> None:
    """Waits for Orbax, then writes the manifest, which makes the save valid."""
    self._checkpointer.wait_until_finished()
    if jax.process_index() == 0:
      self._write_manifest(name, directory, manifest)
      self._log('saved', checkpoint=name, step=manifest['step'])
      prune()

  def _write_manifest(self, name, directory, manifest) -> None:
    manifest |= {'time': time.time(), 'files': _digests(directory)}
    files.write_json(self._directory / 'manifests' / f'{name}.json', manifest)

  def _manifest(self, name: str) -> dict[str, Any] | None:
    """Returns a manifest; None if there is none, {} if it is damaged."""
    path = self._directory / 'manifests' / f'{name}.json'
    if not path.exists():
      return None
    try:
      manifest = files.read_json(path)
    except UserError:
      return {}
    return manifest if files.fits(manifest, MANIFEST) else {}

  def _attempt(
    self, step: int, manifest: Mapping[str, Any] | None, target: PyTree
  ) -> tuple[PyTree | None, str]:
    """Returns (state, '') or (None, why this checkpoint cannot be used)."""
    directory = self._directory / str(step)
    # One process reads and hashes; all of them do what follows, together.
    damage = None
    if manifest is not None and jax.process_index() == 0:
      damage = _damage(directory, manifest)
    if any_process(damage is not None):
      return None, damage or 'process 0 found it damaged'
    try:
      state = self._read(directory, target)
    except UserError:
      raise
    except Exception as error:
      if manifest is None:
        return None, f'not readable: {_one_line(error)}'
      if isinstance(error, OSError):  # the disk or network failed, not the checkpoint
        raise
      # Intact files that do not load were written by another version: older checkpoints
      # would not load either, and none is damaged.
      raise UserError(
        f'checkpoint {directory} is intact, but not readable: {_one_line(error)}'
      ) from error
    return (state, '') if all_finite(state) else (None, 'it holds non-finite values')

  def _prune(self) -> None:
    """Deletes checkpoints that are older than the newest `keep` verified ones."""
    steps = self.steps()
    verified = [s for s in steps if self._manifest(str(s)) is not None]
    for step in steps:
      if len(verified) > self._keep and step < verified[-self._keep]:
        (self._directory / 'manifests' / f'{step}.json').unlink(missing_ok=True)
        (self._directory / str(step)).rmtree()

  def _prune_best(self, step: int) -> None:
    for path in (self._directory / 'best').iterdir():
      if path.name != str(step):
        path.rmtree()

  def _set_aside(self, reasons: Mapping[int, str], quarantine: bool) -> None:
    """Moves checkpoints that failed a check into quarantine, and logs why."""
    for step, reason in reasons.items():
      self._log('checkpoint_rejected', step=step, reason=reason)
      if quarantine and jax.process_index() == 0:
        aside = self._directory / 'quarantine' / f'{step}-{time.time_ns()}'
        aside.mkdir(parents=True)
        (self._directory / str(step)).rename(aside / 'checkpoint')
        manifest = self._directory / 'manifests' / f'{step}.json'
        if manifest.exists():
          manifest.rename(aside / 'manifest.json')

  def _read(self, directory: epath.Path, target: PyTree) -> PyTree:
    """Reads a checkpoint into the structure and shardings of `target`.

    Raises:
      UserError: the checkpoint has another structure.
      OSError: reading failed for a reason that may pass.
    """
    files.seen(directory)
    stored = self._checkpointer.metadata(directory).item_metadata.tree
    shapes = {name: tuple(leaf.shape) for name, leaf in stored.items()}
    here = _to_leaves(target)
    names = {path: _stored_name(path, shapes) for path in here}
    wanted = {names[path]: leaf for path, leaf in here.items()}
    differing = sorted(
      name
      for name in shapes.keys() | wanted.keys()
      if name not in wanted or shapes.get(name) != wanted[name].shape
    )
    if differing:
      name = differing[0]
      here = wanted[name].shape if name in wanted else 'absent'
      raise UserError(
        f'checkpoint {directory} belongs to another network or method: {name} is '
        f'{shapes.get(name, "absent")} there and {here} here '
        f'({len(differing)} leaves differ)'
      )
    try:
      leaves = self._checkpointer.restore(directory, wanted)
    except ValueError as error:  # the only type that TensorStore raises
      if 'Error reading' not in str(error):
        raise
      raise OSError(f'{directory} could not be read: {_one_line(error)}') from error
    # Several renamed paths may share an array, but no two leaves may share a buffer.
    found = {
      path: leaves[name] if path == name else jnp.copy(leaves[name])
      for path, name in names.items()
    }
    return _from_leaves(found, target)


def _stored_name(path: str, stored: Container[str]) -> str:
  """Returns the name of an array in a checkpoint: its path today, or an older one."""
  before = old_path(path)
  return before if path not in stored and before in stored else path


def _to_leaves(tree: PyTree) -> dict[str, Any]:
  """Returns {path: array}, with random keys as raw data: no classes on disk."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): _raw(leaf)
    for path, leaf in leaves
  }


def _from_leaves(leaves: Mapping[str, Any], target: PyTree) -> PyTree:
  """Inverts `_to_leaves` for the structure of `target`."""

  def leaf(path, like):
    value = leaves[jax.tree_util.keystr(path, simple=True, separator='.')]
    if not _is_key(like):
      return value
    return jax.random.wrap_key_data(value)

  return jax.tree_util.tree_map_with_path(leaf, target)


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Any) -> Any:
  """Returns the raw data of a random key, abstract or not; others as they are."""
  if not _is_key(leaf):
    return leaf
  if isinstance(leaf, jax.Array):
    return jax.random.key_data(leaf)
  raw = jax.eval_shape(jax.random.key_data, leaf)
  return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=leaf.sharding)


def _digests(directory: epath.Path) -> dict[str, dict[str, Any]]:
  """Returns relative path -> size in bytes and SHA-256, for every file."""
  found = {}
  for path in sorted(directory.iterdir()) if directory.exists() else []:
    if path.is_dir():
      found |= {f'{path.name}/{name}': entry for name, entry in _digests(path).items()}
    else:
      with path.open('rb') as file:
        sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
      found[path.name] = {'bytes': path.stat().length, 'sha256': sha256}
  return found


def _damage(directory: epath.Path, manifest: Mapping[str, Any]) -> str | None:
  """Returns what is wrong with a checkpoint's files, or None."""
  if 'files' not in manifest:
    return 'its manifest is damaged'
  found = _digests(directory)
  for name, recorded in manifest['files'].items():
    if name not in found:
      return f'{name} is missing'
    if found[name]['bytes'] != recorded['bytes']:
      return f'{name} has {found[name]["bytes"]} bytes, not {recorded["bytes"]}'
    if found[name]['sha256'] != recorded['sha256']:
      return f'{name} does not have its SHA-256: it changed after it was saved'
  return None


@functools.cache
def _hush_closed_loops() -> None:
  """Keeps a failed save from printing tracebacks; its error is raised anyway.

  If a save fails, Orbax closes its event loop while TensorStore still reports to it on
  every array, and Python prints a traceback for each report.
  """
  before = sys.unraisablehook

  def hook(raised):
    if str(raised.exc_value) != 'Event loop is closed':
      before(raised)

  sys.unraisablehook = hook


def _one_line(error: BaseException) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'


@jax.jit
def _finite(leaves: list[jax.Array]) -> jax.Array:
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def all_finite(state: PyTree) -> bool:
  """Returns whether every floating-point leaf is finite."""
  leaves = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
  return bool(jax.device_get(_finite(leaves))) if leaves else True


def digest(state: PyTree, *, old_paths: bool = False) -> str:
  """Returns the SHA-256 of every leaf of a state, with paths, shapes and types.

  Two runs with the same digest are the same run, bit for bit.

  Args:
    state: the state.
    old_paths: return the digest that the state had before its paths were renamed.
  """
  leaves = _to_leaves(state)
  if old_paths:
    leaves = {old_path(path): leaf for path, leaf in leaves.items()}
  total = hashlib.sha256()
  for path, leaf in sorted(leaves.items()):
    value = np.asarray(jax.device_get(leaf))
    total.update(f'{path} {value.shape} {value.dtype}\n'.encode())
    total.update(np.ascontiguousarray(value).tobytes())
  return total.hexdigest()


def abstract(state: PyTree, sharding: Any) -> PyTree:
  """Returns the shapes and types of a state, all leaves with one sharding."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
  )
