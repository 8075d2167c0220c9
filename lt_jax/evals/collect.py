"""One pass over a split, on all devices: what of the outputs is kept, for every image.

On the device a batch is reduced to what is wanted of it; the host puts the batches
together. Metrics are plain NumPy functions of these arrays.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lt_jax import sharding
from lt_jax.data.streams import Pass
from lt_jax.method import Batch, Outputs, State

Collected = dict[str, np.ndarray]
Collect = Callable[..., Collected | None]


def collector(
  predict: Callable[[State, jax.Array], Outputs],
  keep: Callable[[Outputs, Batch], dict[str, jax.Array]],
  mesh: Mesh,
  in_flight: int = 4,
) -> Collect:
  """Returns a function that runs one pass; passes of one shape share a program.

  Args:
    predict: a method's.
    keep: (outputs, batch) -> arrays with the batch first: the part that is wanted.
    mesh: the devices.
    in_flight: batches the host may be ahead of the device.

  Returns:
    (state, pass, stop) -> name -> (N, ...) NumPy, padding left out; None if `stop()`
    turned true on the way.
  """
  compiled: dict[Any, Callable] = {}

  def program(prepare: Callable) -> Callable:
    def evaluate(state, arrays, payload):
      batch = prepare(arrays, payload, jax.random.key(0))
      return keep(predict(state, batch['image']), batch)

    return jax.jit(evaluate, out_shardings=sharding.replicated(mesh))

  def collect(
    state: State, one_pass: Pass, stop: Callable[[], bool] = lambda: False
  ) -> Collected | None:
    stream = one_pass.stream
    if stream.prepare not in compiled:
      compiled[stream.prepare] = program(stream.prepare)
    evaluate = compiled[stream.prepare]
    waiting: collections.deque = collections.deque()
    batches = []
    for step in range(one_pass.batches):
      if stop():
        return None
      payload = sharding.put_batch(mesh, stream.payload(step))
      waiting.append(evaluate(state, stream.arrays, payload))
      if len(waiting) > in_flight:
        batches.append(jax.device_get(waiting.popleft()))
    batches += [jax.device_get(batch) for batch in waiting]
    return {
      name: np.concatenate([b[name] for b in batches])[: one_pass.examples]
      for name in batches[0]
    }

  return collect
