"""Initial weights from an earlier lt_jax run, or from an export of one.

The whole trunk is taken. The head is taken if its classes have the same names in the
same order; otherwise it keeps its initial values. The earlier run is not built: arrays
are found by their paths.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from lt_jax import files
from lt_jax.checkpoint import Checkpoints
from lt_jax.errors import UserError
from lt_jax.pretrained.ours import Origin
from lt_jax.pretrained.published import load

PyTree = Any

FIELDS = ('params', 'stats')


class Taken(NamedTuple):
  """What was taken, for result.json, with the same names as `published.Report`.

  Attributes:
    source: the run or file.
    revision: empty.
    sha256: digest of its network's arrays.
    loaded: number of arrays taken.
    fresh: paths in the new network that kept their initial values.
    dropped: paths in the earlier network that were not used.
    mean: mean with which the weights expect pixels to be normalised.
    std: likewise, the standard deviation.
    head: why the head is taken or fresh.
  """

  source: str
  revision: str
  sha256: str
  loaded: int
  fresh: tuple[str, ...]
  dropped: tuple[str, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  head: str


def inherit(
  origin: Origin, params: PyTree, stats: PyTree, class_names: Sequence[str]
) -> tuple[PyTree, PyTree, Taken]:
  """Puts the weights of a run into a network.

  Args:
    origin: the run or export.
    params: parameters of the new network, or shapes, which are then only checked.
    stats: likewise.
    class_names: names of the new run's classes.

  Returns:
    (params, stats, what was taken).

  Raises:
    UserError: the run has no State, or a different trunk.
  """
  found = _arrays(origin)
  same = tuple(class_names) == origin.class_names
  ours = {
    _name(field, keys): leaf
    for field, tree in zip(FIELDS, (params, stats), strict=True)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }
  trunk = [name for name in ours if '.net.trunk.' in name]
  for name in [*trunk, *(name for name in found if '.net.trunk.' in name)]:
    here, there = (of[name].shape if name in of else None for of in (ours, found))
    if here != there:
      raise UserError(
        f'{origin.source} is of another network, with the trunk {origin.trunk!r}: '
        f'{name.partition(".net.")[2].replace(".", "/")} is {there or "absent"} there '
        f'and {here or "absent"} here'
      )
  head = [name for name in ours if '.net.head.' in name]
  fits = all(name in found and found[name].shape == ours[name].shape for name in head)
  taken = set(trunk) | (set(head) if same and fits else set())

  def put(field: str):
    def leaf(keys: tuple, own: Any) -> Any:
      name = _name(field, keys)
      if name not in taken or isinstance(own, jax.ShapeDtypeStruct):
        return own
      return found[name].astype(own.dtype)

    return leaf

  moved = (
    jax.tree_util.tree_map_with_path(put(field), tree)
    for field, tree in zip(FIELDS, (params, stats), strict=True)
  )
  taken_from = Taken(
    source=origin.source,
    revision='',
    sha256=_digest(found),
    loaded=len(taken),
    fresh=tuple(sorted(_path(name) for name in ours.keys() - taken)),
    dropped=tuple(sorted(_path(name) for name in found.keys() - taken)),
    mean=tuple(origin.pixels.get('mean', ())),
    std=tuple(origin.pixels.get('std', ())),
    head=_why(origin, class_names, same, fits),
  )
  return *moved, taken_from


def _why(origin: Origin, class_names: Sequence[str], same: bool, fits: bool) -> str:
  if same and fits:
    return 'taken: the classes are the same'
  if same:
    return 'fresh: the weights have a different kind of head'
  here, there = len(class_names), len(origin.class_names)
  counts = (
    f'{here} classes here and {there} there' if here != there else 'different classes'
  )
  return f'fresh: {counts}'


def _arrays(origin: Origin) -> dict[str, np.ndarray]:
  """Returns the arrays of a run's network, by path."""
  if origin.is_file:
    every: Mapping[str, np.ndarray] = load(origin.source).tensors
  else:
    folder = (
      files.absolute(epath.Path(origin.source).expanduser()) / 'stages' / origin.stage
    )
    ladder = Checkpoints(folder / 'checkpoints')
    try:
      every = ladder.arrays([f'{field}.net.' for field in FIELDS])
    finally:
      ladder.close()
  found = {k: v for k, v in every.items() if k.split('.')[:2] in _NETWORK}
  for name, value in found.items():
    if not np.isfinite(value).all():
      raise UserError(f'{origin.source}: {_path(name)} has values that are not finite')
  return found


_NETWORK = [[field, 'net'] for field in FIELDS]


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
  total = hashlib.sha256()
  for name, value in sorted(tensors.items()):
    total.update(f'{name} {value.shape} {value.dtype}\n'.encode())
    total.update(np.ascontiguousarray(value).tobytes())
  return total.hexdigest()


def _name(field: str, keys: tuple) -> str:
  path = jax.tree_util.keystr(keys, simple=True, separator='.')
  return f'{field}.net.{path}'


def _path(name: str) -> str:
  return '/'.join(name.split('.')[2:])
