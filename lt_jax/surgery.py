"""From the finished States of earlier stages to the first State of this one.

A surgery is a function (fresh, earlier) -> state, `earlier` being a dict of States by
stage. Nothing is carried over silently: what no surgery names stays fresh.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lt_jax.errors import UserError, suggest
from lt_jax.method import State

PyTree = Any
Surgery = Callable[[State, Mapping[str, State]], State]


def copy(*, pattern: str, stage: str) -> Surgery:
  """Takes parameters and batch statistics from an earlier stage.

  Args:
    pattern: a regular expression for whole paths: 'net/trunk/.*'. It names
      parameters and statistics alike, and must match something.
    stage: the stage they come from.

  Raises:
    UserError: nothing matches, or a leaf that matches is absent there or has another
      shape.
  """

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    origin = _stage(earlier, stage)
    params, found = _replace(fresh.params, origin.params, pattern, stage)
    stats, found_stats = _replace(fresh.stats, origin.stats, pattern, stage)
    if not found + found_stats:
      raise UserError(f'copy: {pattern!r} matches no parameter of stage {stage!r}')
    return fresh.replace(params=params, stats=stats)

  return surgery


def carry(*, fields: Sequence[str], stage: str) -> Surgery:
  """Goes on with optimiser state, clock or memory of an earlier stage.

  Args:
    fields: names of State's fields: 'opt', 'step', 'memory'.
    stage: the stage they come from.

  Raises:
    UserError: a leaf of one is absent in the other, or has another shape.
  """
  carried = ('opt', 'step', 'memory')
  for field in fields:
    if field not in carried:
      raise UserError(f'carry has no field {field!r}{suggest(field, carried)}')

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    origin = _stage(earlier, stage)
    for field in fields:
      ours, theirs = getattr(fresh, field), getattr(origin, field)
      missing = _by_path(theirs).keys() - _by_path(ours).keys()
      if missing:
        raise UserError(
          f'carry: {field} {min(missing)!r} of stage {stage!r} has no place here'
        )
      taken, _ = _replace(ours, theirs, '.*', stage)
      fresh = fresh.replace(**{field: taken})
    return fresh

  return surgery


SURGERIES = {'copy': copy, 'carry': carry}


def operate(
  fresh: State, earlier: Mapping[str, State], surgeries: Sequence[Surgery]
) -> State:
  """Applies surgeries in order, and copies every leaf once.

  Copied, because a leaf that this state shares with another would be lost with it
  when the training step consumes its buffers.
  """
  for surgery in surgeries:
    fresh = surgery(fresh, earlier)
  return jax.jit(lambda state: jax.tree.map(jnp.copy, state))(fresh)


def _stage(earlier: Mapping[str, State], stage: str) -> State:
  if stage not in earlier:
    known = earlier or ['no stage before this one']
    raise UserError(f'no finished stage {stage!r}{suggest(stage, known)}')
  return earlier[stage]


def _path(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _by_path(tree: PyTree) -> dict[str, jax.Array]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {_path(path): leaf for path, leaf in leaves}


def _replace(
  tree: PyTree, origin: PyTree, pattern: str, stage: str
) -> tuple[PyTree, int]:
  """Returns the tree with matching leaves taken from `origin`, and their number."""
  leaves = _by_path(origin)
  taken = 0

  def leaf(path, ours):
    nonlocal taken
    name = _path(path)
    if not re.fullmatch(pattern, name):
      return ours
    theirs = leaves.get(name)
    if theirs is None or theirs.shape != ours.shape:
      there = 'absent' if theirs is None else theirs.shape
      raise UserError(f'{name} is {ours.shape} here and {there} in stage {stage!r}')
    taken += 1
    return theirs

  return jax.tree_util.tree_map_with_path(leaf, tree), taken
