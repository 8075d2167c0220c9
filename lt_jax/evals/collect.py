"""One pass over a split, on all devices, which keeps outputs or adds them up.

The device reduces each batch to what is needed. The host joins the batches, or a
running total stays on the device. Metrics are plain NumPy functions of the result.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lt_jax import sharding
from lt_jax.data.reading import reading
from lt_jax.data.streams import Pass
from lt_jax.errors import UserError
from lt_jax.method import Batch, Outputs, State

Collected = dict[str, np.ndarray]
Collect = Callable[..., Collected | None]
PyTree = Any


class Survey(NamedTuple):
  """Passes over data with a stage's own network in evaluation mode, for surgeries.

  They cover training and validation images; a target domain's come without labels.
  Test images are not available.

  Attributes:
    outputs: (state, split) -> Outputs of one batch as shapes; computes nothing, so the
      state can be shapes too.
    collect: (state, split, keep) -> name -> (N, ...) NumPy, for `keep` (outputs, batch)
      -> arrays with the batch first.
    total: (state, split, fold, apply) -> a pytree of NumPy arrays, for `fold` (outputs,
      batch) -> sums over the batch. It must leave out rows where batch['mask'] is
      false. `apply`, (state, images) -> outputs, replaces the method's `predict` if
      given.
  """

  outputs: Callable[[State, str], Outputs]
  collect: Callable[[State, str, Callable], Collected]
  total: Callable[..., PyTree]


@functools.lru_cache(maxsize=8)
def collector(
  predict: Callable[[State, jax.Array], Outputs],
  keep: Callable[[Outputs, Batch], dict[str, jax.Array]],
  mesh: Mesh,
  in_flight: int = 4,
) -> Collect:
  """Returns a function that runs one pass; passes of the same shape share a program.

  The same arguments return the same function, so runs can share programs.

  Args:
    predict: that of a method.
    keep: (outputs, batch) -> the arrays to keep, with the batch first.
    mesh: the devices.
    in_flight: how many batches the host can be ahead of the device.

  Returns:
    (state, pass, stop) -> name -> (N, ...) NumPy without padding; None if `stop()`
    became true during the pass.
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
    evaluate, state = compiled[stream.prepare], one_pass.view(state)
    waiting: collections.deque = collections.deque()
    batches = []

    def look() -> None:
      if stop():
        raise _Stopped

    try:
      for payload in _payloads(one_pass, mesh, look):
        waiting.append(evaluate(state, stream.arrays, payload))
        if len(waiting) > in_flight:
          batches.append(jax.device_get(waiting.popleft()))
    except _Stopped:
      return None
    batches += [jax.device_get(batch) for batch in waiting]
    return {
      name: np.concatenate([b[name] for b in batches])[: one_pass.examples]
      for name in batches[0]
    }

  return collect


def total(
  predict: Callable[[State, jax.Array], Outputs],
  fold: Callable[[Outputs, Batch], PyTree],
  mesh: Mesh,
  state: State,
  one_pass: Pass,
  look: Callable[[], None] = lambda: None,
  in_flight: int = 4,
) -> PyTree:
  """Returns sums over a split, NumPy; they stay on the devices until the end.

  Args:
    predict: that of a method.
    fold: (outputs, batch) -> sums over the batch, without the rows where batch['mask']
      is false.
    mesh: the devices.
    state: that of the method.
    one_pass: the pass over the split.
    look: called before every batch, and while waiting for one; it can raise to end the
      pass.
    in_flight: how many batches the host can be ahead of the device.
  """
  stream, state = one_pass.stream, one_pass.view(state)

  def summed(state, arrays, payload):
    batch = stream.prepare(arrays, payload, jax.random.key(0))
    return fold(predict(state, batch['image']), batch)

  def add(sums, state, arrays, payload):
    new = jax.tree.map(jnp.add, sums, summed(state, arrays, payload))
    return new, jnp.int32(0)  # not donated, so one can wait for it

  compiled = jax.jit(add, donate_argnums=0, out_shardings=sharding.replicated(mesh))
  shapes = jax.eval_shape(summed, state, stream.arrays, stream.payload_shapes())
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  sums = sharding.put_replicated(mesh, zeros)
  waiting: collections.deque = collections.deque()
  for payload in _payloads(one_pass, mesh, look):
    sums, done = compiled(sums, state, stream.arrays, payload)
    waiting.append(done)
    if len(waiting) > in_flight:
      waiting.popleft().block_until_ready()
  return jax.device_get(sums)


class _Stopped(Exception):
  """Raised to end a pass early."""


def _payloads(one_pass: Pass, mesh: Mesh, look: Callable[[], None]) -> Iterator[PyTree]:
  """Yields a pass's payloads, on the devices; calls `look` before each, and waiting."""
  with reading({'': one_pass.stream}, 0, one_pass.batches, look) as read:
    for step in range(one_pass.batches):
      look()
      yield sharding.put_batch(mesh, read('', step))


def survey(
  predict: Callable[[State, jax.Array], Outputs],
  passes: Mapping[str, Pass],
  mesh: Mesh,
  look: Callable[[], None] = lambda: None,
) -> Survey:
  """Returns the passes that a surgery can make over data.

  Args:
    predict: that of a method.
    passes: split -> evaluation pass.
    mesh: the devices.
    look: called before every batch; it can raise to end the pass.
  """

  def find(split: str) -> Pass:
    if split in passes:
      return passes[split]
    if split == 'val':
      raise UserError(
        'a surgery needs validation images, and there are none: set data.val_per_class '
        "to split some off, or use another split for the surgery, such as 'meta'"
      )
    raise UserError(
      f'a surgery cannot see the split {split!r}; it can see {", ".join(passes)}'
    )

  def outputs(state: State, split: str) -> Outputs:
    stream = find(split).stream  # the view of a State has its shapes

    def one(state, arrays, payload):
      batch = stream.prepare(arrays, payload, jax.random.key(0))
      return predict(state, batch['image'])

    return jax.eval_shape(one, state, stream.arrays, stream.payload_shapes())

  def collect(state: State, split: str, keep: Callable) -> Collected:
    return collector(predict, keep, mesh)(state, find(split), lambda: bool(look()))

  def totals(
    state: State, split: str, fold: Callable, apply: Callable = predict
  ) -> PyTree:
    return total(apply, fold, mesh, state, find(split), look)

  return Survey(outputs, collect, totals)
