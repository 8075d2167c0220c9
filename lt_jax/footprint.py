"""How many bytes of memory a step needs, for its arrays and its program."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from lt_jax.data.streams import Stream
from lt_jax.method import Batch, Method, State

LIMITS = ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes')
"""Files with the memory limit of a container, for cgroup versions 2 and 1."""


def size(tree: Any) -> int:
  """Returns the bytes of all leaves."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def amount(size: float) -> str:
  """Returns a number of bytes in a readable unit."""
  return f'{size / 1e9:,.2f} GB' if size >= 1e8 else f'{size / 1e6:,.2f} MB'


def memory_of(
  analysis: Any, state: Any, arrays: Any, payloads: Any, devices: int
) -> dict[str, float]:
  """Returns component -> bytes per device; their sum is what the program needs.

  Args:
    analysis: `memory_analysis()` of a compiled step.
    state: its State or the shapes of it, replicated.
    arrays: arrays that its streams keep on the devices, replicated.
    payloads: payloads of one step, split over the devices.
    devices: number of devices.
  """
  sizes = {
    'parameters': size(state.params),
    'optimiser state': size(state.opt),
    'batch statistics': size(state.stats),
    'other state': size(state.memory),
    'images on the device': size(arrays),
    'batch': size(payloads) / devices,
  }
  held = analysis.argument_size_in_bytes - analysis.alias_size_in_bytes
  rest = held + analysis.output_size_in_bytes - sum(sizes.values())
  return {
    **sizes,
    'activations, temporaries': analysis.temp_size_in_bytes,
    'program': analysis.generated_code_size_in_bytes,
    'metrics, padding': rest,
  }


def least_of_step(
  state: State, streams: Mapping[str, Stream], devices: int
) -> dict[str, float]:
  """Returns the least that a step needs, from shapes alone: part -> bytes per device.

  That is the State and the images of the batches; activations come on top.

  Args:
    state: the shapes of the State.
    streams: the streams of the stage.
    devices: number of devices, over which the batches are split.
  """
  batches = {
    f'the images of a {name} batch': size(_prepared(stream)) / devices
    for name, stream in streams.items()
  }
  return _parts(state) | batches


def least_of_evaluation(
  method: Method, state: State, stream: Stream, devices: int
) -> dict[str, float]:
  """Returns the same for one batch of an evaluation, including its outputs."""
  batch = _prepared(stream)
  outputs = jax.eval_shape(method.predict, state, batch['image'])
  return _parts(state.replace(opt={})) | {
    'the images of an evaluation batch': size(batch) / devices,
    'the outputs of an evaluation batch': size(outputs) / devices,
  }


def _prepared(stream: Stream) -> Batch:
  """Returns the shapes of a batch as the network reads it."""
  key = jax.random.key(0)
  return jax.eval_shape(stream.prepare, stream.arrays, stream.payload_shapes(), key)


def _parts(state: State) -> dict[str, float]:
  """Returns the bytes of each leaf by its path, such as 'params/net/head/kernel'."""
  leaves = jax.tree_util.tree_leaves_with_path(state.replace(key=None))
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): size(leaf)
    for path, leaf in leaves
  }


def machine_memory(device: jax.Device) -> float | None:
  """Returns a device's memory in bytes, for a CPU the machine's; None if unknown."""
  if device.platform != 'cpu':
    return (device.memory_stats() or {}).get('bytes_limit')
  found = [
    int(text)
    for text in (_read(path).strip() for path in LIMITS)
    if text.isdigit()  # it is 'max' if there is no limit
  ]
  return min([*found, *_meminfo('MemTotal')], default=None)


def free_memory(device: jax.Device) -> float | None:
  """Returns a device's memory in bytes, for a CPU what is free; None if unknown."""
  if device.platform != 'cpu':
    return machine_memory(device)
  return next(iter(_meminfo('MemAvailable')), None)


def _meminfo(key: str) -> list[float]:
  """Returns the bytes that /proc/meminfo has under a key, or []."""
  lines = (line.split() for line in _read('/proc/meminfo').splitlines())
  return [1024 * float(words[1]) for words in lines if words[0] == f'{key}:']


def _read(path: str) -> str:
  try:
    return pathlib.Path(path).read_text()
  except OSError:
    return ''
