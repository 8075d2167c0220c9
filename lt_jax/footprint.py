"""What arrays, and the program of a step, take of memory: bytes."""

from typing import Any

import jax


def size(tree: Any) -> int:
  """Returns the bytes of all leaves."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory_of(
  analysis: Any, state: Any, arrays: Any, payloads: Any, devices: int
) -> dict[str, float]:
  """Returns component -> bytes on a device; their sum is what the program takes.

  Args:
    analysis: `memory_analysis()` of a compiled step.
    state: that it takes, replicated; a State, or its shapes.
    arrays: that its streams keep there, replicated.
    payloads: of one step, split over the devices.
    devices: how many.
  """
  sizes = {
    'parameters': size(state.params),
    'optimiser state': size(state.opt),
    'batch statistics': size(state.stats),
    'other state': size(state.memory),
    'images kept there': size(arrays),
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
