"""Several seeds of one method, trained as one program.

A small network leaves an accelerator idle most of the time, so more seeds cost little.
Replicas share the clock, the data and the program; everything else in the State, and
every payload, batch and metric, has a leading axis of replicas. With several devices,
each has its own replicas, and they exchange nothing.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lt_jax import sharding
from lt_jax.data.streams import Stream
from lt_jax.errors import UserError
from lt_jax.method import Method, State

PyTree = Any

ALIVE = 'alive'
"""Name in `State.memory`: (S,) bool, which replicas have always been finite."""

DIED_AT = 'died_at'
"""Name of a metric: the step at which a replica stopped being finite."""


def vectorise(method: Method, replicas: int, mesh: Mesh) -> Method:
  """Returns a method that trains S replicas of another one, each as if alone.

  `init` takes (S,) keys. In its State only `step`, the common clock, has no leading
  axis. A replica whose metrics or next State are not finite stays at the State before
  that step, and its metrics are 0 from then on, while the others continue; the metric
  'died_at' records the step.

  Args:
    method: the method.
    replicas: S, a multiple of the number of devices.
    mesh: the devices; each has S / devices replicas.

  Raises:
    UserError: the devices do not divide S.
  """
  if replicas % mesh.size:
    raise UserError(f'{mesh.size} devices do not divide {replicas} replicas')

  def each(function: Callable, arguments: tuple, results: PyTree) -> Callable:
    """Applies a function to every replica on its device; 0 marks the replica axis."""
    mapped = jax.vmap(function, in_axes=arguments, out_axes=results)
    if mesh.size == 1:
      return mapped
    return jax.shard_map(
      mapped,
      mesh=mesh,
      in_specs=_specs(arguments),
      out_specs=_specs(results),
      check_vma=False,  # constants inside a method are the same everywhere
    )

  def init(keys, batches):
    state = each(method.init, (0, 0), _AXES)(keys, batches)
    return _with_alive(state, jnp.ones(replicas, bool))

  def step(state, batches):
    alive, old = state.memory[ALIVE], _without_alive(state)
    new, metrics = each(method.step, (_AXES, 0), (_AXES, 0))(old, batches)
    well = alive & _finite((new.replace(step=()), metrics), replicas)
    new = jax.tree.map(
      functools.partial(_where, well), new.replace(step=()), old.replace(step=())
    )
    metrics = jax.tree.map(lambda x: _where(well, x, jnp.zeros_like(x)), metrics)
    died = (alive & ~well).astype(jnp.float32)
    metrics[DIED_AT] = (died * state.step, died)
    return _with_alive(new.replace(step=state.step + 1), well), metrics

  def predict(state, images):
    return each(method.predict, (_AXES, None), 0)(_without_alive(state), images)

  return Method(init, step, predict)


_AXES = State(step=None, key=0, params=0, stats=0, opt=0, memory=0)
"""The replica axis of the leaves of a State."""


def _specs(axes: PyTree) -> PyTree:
  """Returns partition specs for these axes: each device holds its own replicas."""
  own = {0: PartitionSpec(sharding.AXIS), None: PartitionSpec()}
  return jax.tree.map(own.get, axes, is_leaf=lambda axis: axis is None)


def _where(chosen: jax.Array, ours: jax.Array, theirs: jax.Array) -> jax.Array:
  """Selects between two arrays by replica."""
  return jnp.where(chosen.reshape(-1, *[1] * (ours.ndim - 1)), ours, theirs)


def _finite(tree: PyTree, replicas: int) -> jax.Array:
  """Returns (S,) bool, whether all numbers of a replica are finite."""
  leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
  each = [jnp.isfinite(x).reshape(replicas, -1).all(axis=1) for x in leaves]
  return jnp.stack(each).all(axis=0)


def _with_alive(state: State, alive: jax.Array) -> State:
  return state.replace(memory={**state.memory, ALIVE: alive})


def _without_alive(state: State) -> State:
  return state.replace(memory={k: v for k, v in state.memory.items() if k != ALIVE})


def together(states: Sequence[State], mesh: Mesh) -> State:
  """Stacks States at the same step into the State of a vectorised method.

  Args:
    states: the States of single runs, on the devices.
    mesh: the devices.

  Raises:
    UserError: they are not at the same step.
  """
  steps = {int(jax.device_get(state.step)) for state in states}
  if len(steps) > 1:
    raise UserError(f'replicas must be at the same step, not at {sorted(steps)}')

  def join(*states: State) -> State:
    own = [state.replace(step=()) for state in states]
    joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
    alive = jnp.ones(len(states), bool)
    return _with_alive(joined.replace(step=states[0].step), alive)

  placed = jax.tree.map(functools.partial(NamedSharding, mesh), _specs(_AXES))
  return jax.jit(join, out_shardings=placed)(*states)


def separator(mesh: Mesh) -> Callable[[State, int], State]:
  """Returns (State of all replicas, index) -> State of that one, on all devices."""

  def one(state: State, replica: jax.Array) -> State:
    own = jax.tree.map(lambda x: x[replica], _without_alive(state).replace(step=()))
    return own.replace(step=state.step)

  return jax.jit(one, out_shardings=sharding.replicated(mesh))


def together_streams(streams: Sequence[Stream], mesh: Mesh) -> Stream:
  """Returns the stream of a vectorised method: each replica has its own batches.

  Args:
    streams: one per replica; they differ in their order and in arrays that an earlier
      stage saved.
    mesh: the devices.

  Raises:
    UserError: the images are not on the devices.
  """
  first = streams[0]
  if first.workers is not None:
    raise UserError(
      'replicas can train together only on images that are on the devices, not on '
      'images that the host decodes'
    )
  shared = all(stream.arrays is first.arrays for stream in streams)
  arrays = first.arrays
  if not shared:
    own = NamedSharding(mesh, PartitionSpec(sharding.AXIS))
    join = jax.jit(
      lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees), out_shardings=own
    )
    arrays = join(*(stream.arrays for stream in streams))

  def payload(step: int) -> dict[str, np.ndarray]:
    return jax.tree.map(lambda *x: np.stack(x), *(s.payload(step) for s in streams))

  prepare = jax.vmap(first.prepare, in_axes=(None if shared else 0, 0, 0))
  shapes = first.shapes and {
    name: jax.ShapeDtypeStruct((len(streams), *one.shape), one.dtype)
    for name, one in first.shapes.items()
  }
  return first._replace(arrays=arrays, payload=payload, prepare=prepare, shapes=shapes)
