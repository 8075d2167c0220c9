"""The only mesh: data parallelism over one axis, declared once.

The state is replicated and every batch is split along its first axis. One program
runs on a laptop, on eight GPUs and on a TPU pod; XLA places the all-reduces.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lt_jax.errors import UserError

PyTree = Any
AXIS = 'data'


def usable_devices(batches: Mapping[str, int], available: int, processes: int) -> int:
  """Returns how many devices a run can use, given the batch size of every stream.

  A single process uses the largest number that divides every batch. Several processes
  must use all devices, because each owns its rows.

  Args:
    batches: stream name -> global batch size.
    available: number of devices in all processes.
    processes: number of processes.

  Raises:
    UserError: there are several processes, and the devices do not divide a batch.
  """
  if processes > 1:
    for name, batch in batches.items():
      if batch % available:
        below = batch // available * available
        nearest = ' or '.join(str(b) for b in (below, below + available) if b)
        raise UserError(
          f'batch {batch} of stream {name!r} does not divide over {available} devices'
          f'; the nearest that do: {nearest}'
        )
    return available
  return max(
    n for n in range(1, available + 1) if all(b % n == 0 for b in batches.values())
  )


def round_up(batch: int, devices: int) -> int:
  """Returns a batch size rounded up to a multiple of the number of devices."""
  return -(-batch // devices) * devices


def make_mesh(devices: int) -> Mesh:
  """Returns a mesh of the first `devices` devices along the axis 'data'.

  Devices are sorted by process, because each process owns consecutive rows of a batch.
  `jax.make_mesh` would follow the torus of a TPU, where the devices of a process are
  not neighbours.

  The axis has type Auto: with type Explicit, everyday operations of this field
  (`weights[labels]`, `segment_sum` over a sharded batch) raise errors.
  """
  ordered = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
  return Mesh(np.array(ordered[:devices]), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of states, metrics and resident arrays: a copy everywhere."""
  return NamedSharding(mesh, PartitionSpec())


def put_replicated(mesh: Mesh, tree: PyTree) -> PyTree:
  """Returns a tree with every leaf copied to all devices of the mesh."""
  sharding = replicated(mesh)
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)

  def put(x: Any) -> jax.Array:
    if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim):
      return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(put(jax.random.key_data(x)))
    return jax.make_array_from_process_local_data(sharding, np.asarray(x))

  return jax.tree.map(put, tree)


def put_batch(mesh: Mesh, tree: PyTree, *, leading: int = 0) -> PyTree:
  """Returns this process's rows as global arrays, split over the devices.

  With a single process, a batch that the devices do not divide is copied to each of
  them. That happens if one of several replicas runs alone, since each device trains
  whole batches of its replicas.

  Args:
    mesh: the mesh.
    tree: NumPy arrays of this process, with the batch on axis `leading`.
    leading: number of axes before the batch axis: 1 if several steps are stacked.
  """
  sharding = NamedSharding(mesh, PartitionSpec(*[None] * leading, AXIS))
  if jax.process_count() == 1:
    divides = all(x.shape[leading] % mesh.size == 0 for x in jax.tree.leaves(tree))
    return jax.device_put(tree, sharding if divides else replicated(mesh))
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), tree
  )


def compiler_options(mesh: Mesh | None = None) -> dict[str, str]:
  """Returns XLA's options for programs that train; there are some only for CPUs.

  By default XLA:CPU uses a library for convolutions. For kernel gradients, where the
  kernel is as large as an image, that is several times slower than XLA's own code.
  """
  platform = mesh.devices.flat[0].platform if mesh else jax.default_backend()
  if platform != 'cpu':
    return {}
  return {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'}
