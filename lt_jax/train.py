"""The loop: payload -> steps -> log -> save -> evaluate. It knows no method.

Everything happens at fixed multiples of the absolute step, so that a resumed run does
what an uninterrupted one does. The caller decides how to save, log and evaluate.
"""

import collections
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from lt_jax import checkpoint, sharding
from lt_jax.data.reading import Read, reading
from lt_jax.data.streams import Stream
from lt_jax.method import Method, Metrics, State, named_key
from lt_jax.stopping import any_process

IN_FLIGHT = 4
"""How many calls the host may be ahead of the device.

On simulated CPU devices, more would deadlock in the all-reduce; elsewhere, four keep
the device busy and bound the memory of waiting payloads.
"""


class Plan(NamedTuple):
  """When things happen, all in steps.

  Attributes:
    first: the step at which this stage starts.
    steps: the step at which it ends.
    chunk: steps per compiled call; the intervals below are multiples of it.
    log_every: interval of log rows.
    save_every: interval of checkpoints, a multiple of `log_every`.
    evaluate_every: interval of evaluations.
    profile: (first, last) step of a profiler trace; None for no trace.
    profile_dir: where the trace goes.
    until: an earlier step at which the loop returns; None for the end.
  """

  first: int
  steps: int
  chunk: int
  log_every: int
  save_every: int
  evaluate_every: int
  profile: tuple[int, int] | None = None
  profile_dir: str = ''
  until: int | None = None

  def due(self, step: int, every: int) -> bool:
    """Returns whether something that happens every `every` steps is due."""
    return step > self.first and (step % every == 0 or step == self.steps)


class Unlogged(NamedTuple):
  """Partial sums of the next log row, when a run is asked to stop.

  With them, the resumed run writes the same row as an uninterrupted one.

  Attributes:
    step: the step of the saved State.
    logged: the step of the last row.
    seconds: how long the steps since then took.
    totals: metric -> (total, count).
  """

  step: int
  logged: int
  seconds: float
  totals: Metrics


class Hooks(NamedTuple):
  """Callbacks of the loop.

  Attributes:
    first_call: (seconds it took to compile); called after a program's first call.
    progress: (step); called after every call of a program, so it must be cheap.
    log: (step, metrics as means, steps since the last row, seconds they took).
    save: (step, state); starts to save a checkpoint.
    evaluate: (step, state); returns early, without a result, if `stop` turns true.
    stop: () -> whether the run must end at once.
    bad_images: (stream, positions in its source); called if images could not be read
      and others replaced them.
    hold: (partial sums); called after the last save of a run that was asked to stop.
  """

  first_call: Callable[[float], None]
  progress: Callable[[int], None]
  log: Callable[[int, dict[str, np.ndarray], int, float], None]
  save: Callable[[int, State], None]
  evaluate: Callable[[int, State], None]
  stop: Callable[[], bool]
  bad_images: Callable[[str, np.ndarray], None]
  hold: Callable[[Unlogged], None] = lambda unlogged: None


class Preempted(Exception):
  """The run was asked to stop, and its State was saved."""


class Diverged(Exception):
  """A metric or the state is not finite; that State was not saved.

  Attributes:
    step: the first step whose metrics or result were not finite.
    payload: what that step was given: stream -> name -> array.
  """

  def __init__(self, step: int, payload: Mapping[str, Mapping[str, np.ndarray]]):
    super().__init__(f'not finite at step {step}')
    self.step = step
    self.payload = payload


def batches_at(
  streams: Mapping[str, Stream], arrays: Any, payloads: Any, key: Any, step: Any
) -> dict[str, Any]:
  """Prepares the batch of every payload; each stream has its own random keys."""
  return {
    name: streams[name].prepare(arrays[name], payload, named_key(key, name, step))
    for name, payload in payloads.items()
  }


def initial_state(
  method: Method, streams: Mapping[str, Stream], key: jax.Array, mesh: Mesh
) -> State:
  """Makes the first state on the devices."""
  arrays = {name: stream.arrays for name, stream in streams.items()}
  init = jax.jit(_init(method, streams), out_shardings=sharding.replicated(mesh))
  return init(
    sharding.put_replicated(mesh, key),
    arrays,
    sharding.put_batch(mesh, payloads_at(streams, 0)),
  )


def state_shapes(method: Method, streams: Mapping[str, Stream]) -> State:
  """Returns the shapes of a state; nothing is computed or compiled.

  Arrays of a stream may be shapes too, if an earlier stage has yet to save them.
  """
  arrays = {name: stream.arrays for name, stream in streams.items()}
  payloads = _payload_shapes(streams)
  return jax.eval_shape(_init(method, streams), jax.random.key(0), arrays, payloads)


def _init(method: Method, streams: Mapping[str, Stream]) -> Callable:
  """Returns (key, arrays, payloads) -> the first state."""

  def init(key, arrays, payloads):
    return method.init(key, batches_at(streams, arrays, payloads, key, 0))

  return init


def make_update(
  method: Method,
  streams: Mapping[str, Stream],
  mesh: Mesh,
  length: int,
  placed: Any = None,
) -> Callable:
  """Returns jit(state, totals, bad, arrays, payloads) -> (state, totals, bad).

  Args:
    method: the method.
    streams: its streams; only their `prepare` is used here.
    mesh: the devices.
    length: steps per call. A single step uses the payloads it is given; several run in
      a `lax.scan`, where each step ignores the streams that are not due.
    placed: shardings of the state; None: every device has a copy.

  `totals` adds up the metrics; `bad` is the first step whose metrics were not finite,
  or -1; `payloads` has a leading axis of `length`.
  """
  every = {name: s.every for name, s in streams.items() if s.every > 1}

  def one(carry, payloads, arrays):
    state, totals, bad = carry
    batches = batches_at(streams, arrays, payloads, state.key, state.step)
    new, metrics = method.step(state, batches)
    finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(metrics)]
    broken = (bad < 0) & ~jnp.stack(finite).all()
    bad = jnp.where(broken, state.step, bad)
    return (new, jax.tree.map(jnp.add, totals, metrics), bad), None

  def one_of_many(carry, payloads, arrays):
    """Makes one step of a scan, which gets a payload from every stream."""
    if not every:
      return one(carry, payloads, arrays)
    (period,) = set(every.values())
    always = {name: p for name, p in payloads.items() if name not in every}
    return lax.cond(
      carry[0].step % period == 0,
      lambda: one(carry, payloads, arrays),
      lambda: one(carry, always, arrays),
    )

  def update(state, totals, bad, arrays, payloads):
    carry = (state, totals, bad)
    if length == 1:
      return one(carry, jax.tree.map(lambda x: x[0], payloads), arrays)[0]
    return lax.scan(lambda c, p: one_of_many(c, p, arrays), carry, payloads)[0]

  everywhere = sharding.replicated(mesh)
  return jax.jit(
    update,
    donate_argnums=0,
    out_shardings=(placed or everywhere, everywhere, everywhere),
    compiler_options=sharding.compiler_options(mesh),
  )


def train(
  method: Method,
  streams: Mapping[str, Stream],
  state: State,
  *,
  mesh: Mesh,
  plan: Plan,
  hooks: Hooks,
  unlogged: Unlogged | None = None,
) -> State:
  """Runs a method from the state's step to the plan's last step.

  Args:
    method: the method.
    streams: name -> stream, as the method's step expects them.
    state: where to start, on the devices; its buffers are donated.
    mesh: the devices.
    plan: when things happen.
    hooks: what happens.
    unlogged: what `hooks.hold` got at the state's step, if anything.

  Returns:
    The state after the last step, or at `plan.until`.

  Raises:
    Preempted: `hooks.stop()` returned True; the state was saved.
    Diverged: something is not finite.
  """
  arrays = {name: stream.arrays for name, stream in streams.items()}
  compiled: dict[tuple, Callable] = {}  # by length and by which streams are present
  in_flight: collections.deque = collections.deque()
  step = logged = begun = int(jax.device_get(state.step))
  zeros, bad = empty_totals(method, streams, state, mesh)
  totals, clock, profiler = zeros, time.perf_counter(), _Profiler(plan)
  seconds = 0.0  # of the steps since the last row, before this start
  if unlogged is not None and unlogged.step == step and _alike(unlogged.totals, zeros):
    totals = sharding.put_replicated(mesh, unlogged.totals)
    logged, seconds = unlogged.logged, unlogged.seconds

  def log() -> None:
    nonlocal totals, logged, seconds
    check_finite(bad, streams)
    values = {k: means(*v) for k, v in jax.device_get(totals).items()}
    hooks.log(step, values, step - logged, seconds + time.perf_counter() - clock)
    totals, logged, seconds = zeros, step, 0.0

  def check() -> None:
    check_finite(bad, streams)
    if not checkpoint.all_finite(state):
      raise Diverged(step - 1, payloads_at(streams, step - 1))

  def save() -> None:
    check()
    hooks.save(step, state)

  def preempt() -> None:
    save()
    if step > logged:
      elapsed = seconds + time.perf_counter() - clock
      hooks.hold(Unlogged(step, logged, elapsed, jax.device_get(totals)))
    raise Preempted

  def look() -> None:
    """Ends a waiting run that was asked to stop, if it is the only process."""
    if hooks.stop() and jax.process_count() == 1:
      preempt()

  with reading(streams, step, plan.steps, look) as read:
    while True:
      if step == plan.until:  # whoever continues does what else is due at this step
        if step > logged:
          log()
        return state
      if plan.due(step, plan.evaluate_every):
        check()  # also waits for the devices, so that the time below is evaluation only
        began = time.perf_counter()
        hooks.evaluate(step, state)
        clock += time.perf_counter() - began
      if _asked_to_stop(hooks, plan, step):
        preempt()
      if step == plan.steps:
        profiler.stop()
        return state
      if step in (logged, begun):
        clock = time.perf_counter()
      end = plan.steps if plan.until is None else plan.until
      length = min(plan.chunk - step % plan.chunk, end - step)
      rows = _stack(read, streams, step, length)
      for name, payload in rows.items():
        if payload.get('bad', np.False_).any():
          hooks.bad_images(name, payload['index'][payload['bad']])
      payloads = sharding.put_batch(mesh, rows, leading=1)
      program = (length, *payloads)
      fresh = program not in compiled
      if fresh:
        began = time.perf_counter()
        placed = jax.tree.map(lambda x: x.sharding, state)
        update = make_update(method, streams, mesh, length, placed)
        compiled[program] = update.lower(state, totals, bad, arrays, payloads).compile()
        compile_seconds = time.perf_counter() - began
        clock += compile_seconds
      profiler.before(step, length)
      with jax.transfer_guard('disallow'):
        state, totals, bad = compiled[program](state, totals, bad, arrays, payloads)
      if fresh:
        bad.block_until_ready()
        hooks.first_call(compile_seconds)
      step += length
      in_flight.append(bad)
      if len(in_flight) > IN_FLIGHT:
        in_flight.popleft().block_until_ready()
      hooks.progress(step)
      profiler.after(step)
      if plan.due(step, plan.log_every):
        log()
      if plan.due(step, plan.save_every):
        save()


def _alike(one: Any, other: Any) -> bool:
  """Returns whether two trees of arrays have the same structure, shapes and types."""
  shapes = [
    jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree) for tree in (one, other)
  ]
  return shapes[0] == shapes[1]


def _asked_to_stop(hooks: Hooks, plan: Plan, step: int) -> bool:
  """Returns whether the run must end here, in all processes alike."""
  asked = hooks.stop()
  if jax.process_count() == 1:
    return asked
  # At log rows all processes wait for each other anyway.
  return plan.due(step, plan.log_every) and any_process(asked)


def means(total: np.ndarray, count: np.ndarray) -> np.ndarray:
  """Returns total / count, or NaN where the count is 0 (a class without images)."""
  total, count = np.asarray(total, np.float64), np.asarray(count, np.float64)
  return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def check_finite(bad: jax.Array, streams: Mapping[str, Stream]) -> None:
  """Raises `Diverged` if a step since the last check was not finite."""
  step = int(jax.device_get(bad))
  if step >= 0:
    raise Diverged(step, payloads_at(streams, step))


def payloads_at(streams: Mapping[str, Stream], step: int) -> dict[str, Any]:
  """Returns the payloads of the streams that are due at a step."""
  return {n: s.payload(step) for n, s in streams.items() if step % s.every == 0}


def _payload_shapes(streams: Mapping[str, Stream]) -> dict[str, Any]:
  """Returns the shapes of the payloads of a step at which all streams are due."""
  return {name: stream.payload_shapes() for name, stream in streams.items()}


def _stack(read: Read, streams: Mapping[str, Stream], step: int, length: int) -> Any:
  """Returns the payloads of `length` steps with a leading axis.

  A single step has the payloads of the streams that are due; several have all of them.
  """
  if length > 1:
    payloads = [
      {n: s.payload(step + i) for n, s in streams.items()} for i in range(length)
    ]
  else:
    due = [name for name, stream in streams.items() if step % stream.every == 0]
    payloads = [{name: read(name, step) for name in due}]
  # A single one is not stacked, as that would copy its images.
  stack = (lambda *rows: np.stack(rows)) if length > 1 else (lambda row: row[None])
  return jax.tree.map(stack, *payloads)


def metric_shapes(
  method: Method, streams: Mapping[str, Stream], state: State, mesh: Mesh
) -> Any:
  """Returns the shapes of a step's metrics; nothing is computed or compiled.

  The step is traced on the mesh, so that compiling need not trace it again.
  """
  arrays = {name: stream.arrays for name, stream in streams.items()}
  given = (state, arrays, _payload_shapes(streams))
  return jax.eval_shape(
    lambda s, a, p: method.step(s, batches_at(streams, a, p, s.key, s.step))[1],
    *checkpoint.abstract(given, sharding.replicated(mesh)),
  )


def empty_totals(
  method: Method, streams: Mapping[str, Stream], state: State, mesh: Mesh
) -> tuple[Metrics, jax.Array]:
  """Returns zero metrics, in the shapes that a step returns, and -1: no bad step."""
  metrics = metric_shapes(method, streams, state, mesh)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), metrics)
  return sharding.put_replicated(mesh, (zeros, np.int32(-1)))


class _Profiler:
  """Records a profiler trace of the calls that `plan.profile` touches."""

  def __init__(self, plan: Plan):
    self._first, self._last = plan.profile or (0, -1)
    self._folder = plan.profile_dir
    self._on = False

  def before(self, step: int, length: int) -> None:
    """Starts at the first call that contains a step of the range."""
    if not self._on and step <= self._last and step + length > self._first:
      jax.profiler.start_trace(self._folder)
      self._on = True

  def after(self, step: int) -> None:
    """Stops once the range is over."""
    if self._on and step > self._last:
      self.stop()

  def stop(self) -> None:
    """Writes the trace, if one is being recorded."""
    if self._on:
      jax.profiler.stop_trace()
      self._on = False
