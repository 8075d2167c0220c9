"""Checks of one step of every stage, and of its resources."""

import contextlib
import functools
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lt_jax import build, checkpoint, footprint, results, sharding, train
from lt_jax.config import stage_config
from lt_jax.data.reading import usable_cores
from lt_jax.data.streams import Pass, Split
from lt_jax.doctor.case import (
  Case,
  CheckSkipped,
  Findings,
  Step,
  Trial,
  odd,
  ok,
  one_line,
  sampled,
  skip,
  wrong,
)
from lt_jax.errors import UserError
from lt_jax.footprint import amount
from lt_jax.method import State

BY_HEART, BUDGET = 60, 60.0
"""Steps on one batch, and the time limit in seconds."""


# A step.


def compiles(case: Case) -> Findings:
  """Compiles the step of every stage that trains."""
  for name, stage in case.experiment.stages.items():
    if not stage.plan.steps:
      yield ok(f'{name}: has no steps')
    elif stage.reads:
      yield skip(f'{name}: needs what another stage has not saved yet')
    else:
      try:
        trial = case.trials[name] = _trial(case, stage)
      except (UserError, jax.errors.JaxRuntimeError) as error:
        yield wrong(f'{name}: {one_line(error)}')
      else:
        yield ok(f'{name}: compiled in {trial.compile_seconds:.1f} s')


def _trial(case: Case, stage: build.Stage) -> Trial:
  """Starts a stage and compiles its step, like the loop."""
  mesh, method, streams = case.experiment.mesh, stage.method, stage.streams
  arrays = {name: stream.arrays for name, stream in streams.items()}
  key = jax.random.key(case.config['seed'])
  state = train.initial_state(method, streams, key, mesh)
  if stage.start:
    state, _ = stage.start(state)
  period = math.lcm(*(stream.every for stream in streams.values()))
  clock = _warmed_up(case, stage)
  clock += -clock % period  # so that every stream is there
  state = state.replace(step=sharding.put_replicated(mesh, np.int32(clock)))
  zeros, bad = train.empty_totals(method, streams, state, mesh)
  batches = tuple(_placed(streams, step, mesh) for step in (clock, clock + period))
  began = time.perf_counter()
  program = train.make_update(method, streams, mesh, 1)
  compiled = program.lower(state, zeros, bad, arrays, batches[0]).compile()
  seconds = time.perf_counter() - began

  def update(state: State, payloads: Any) -> tuple[State, dict[str, Any], bool]:
    state, totals, first_bad = compiled(state, zeros, bad, arrays, payloads)
    means = {k: train.means(*v) for k, v in jax.device_get(totals).items()}
    return state, means, int(first_bad) < 0

  analysis = compiled.memory_analysis()
  memory = footprint.memory_of(analysis, state, arrays, batches[0], mesh.size)
  return Trial(stage, state, batches, update, seconds, memory)


def _warmed_up(case: Case, stage: build.Stage) -> int:
  """Returns the step at which a stage's warm-up ends, 0 without one."""
  schedule = stage_config(case.config, stage.name)['schedule']
  steps = math.ceil(schedule.get('warmup_epochs', 0) * stage.epoch_steps)
  return min(steps, stage.plan.steps - 1)


def _placed(streams: Mapping[str, Any], step: int, mesh: Any) -> Any:
  """Returns the payloads of a step on the devices."""
  one = jax.tree.map(lambda x: x[None], train.payloads_at(streams, step))
  return sharding.put_batch(mesh, one, leading=1)


def _copied(state: State) -> State:
  """Returns a copy of a state, which a step can consume."""
  return jax.tree.map(lambda x: x.copy(), state)


def one_step(case: Case) -> Findings:
  """Takes a step of every stage from fresh parameters."""
  for name, trial in _trials(case).items():
    step = case.steps[name] = _made(trial)
    length = trial.stage.plan.steps
    yield ok(
      f'{name}: a step takes {1e3 * step.seconds:,.4g} ms, {length:,} of them '
      f'{_duration(length * step.seconds)}, without evaluation'
    )


def _duration(seconds: float) -> str:
  units = {'days': 86400, 'h': 3600, 'min': 60, 's': 1}
  unit = next((name for name, size in units.items() if seconds > 2 * size), 's')
  return f'{seconds / units[unit]:,.1f} {unit}'


def _trials(case: Case) -> dict[str, Trial]:
  if not case.trials and case.experiment:  # otherwise that is why
    raise CheckSkipped('no step was compiled')
  return case.trials


def _steps(case: Case) -> dict[str, Step]:
  if not case.steps and case.experiment:  # otherwise that is why
    raise CheckSkipped('no step was taken')
  return case.steps


def _made(trial: Trial) -> Step:
  """Takes a step from the initial state, then another one on another batch."""
  before = jax.device_get(trial.state.params)
  after, values, finite = trial.update(_copied(trial.state), trial.batches[0])
  seconds = []
  for _ in range(3):  # the shortest one was disturbed least
    state = jax.block_until_ready(_copied(trial.state))
    began = time.perf_counter()
    other, _, _ = trial.update(state, trial.batches[1])
    jax.block_until_ready(other)
    seconds.append(time.perf_counter() - began)
  finite = finite and checkpoint.all_finite(after)
  after, other = jax.device_get((after.params, other.params))
  changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
  apart = jax.tree.map(lambda a, b: not np.array_equal(a, b), after, other)
  paths = jax.tree_util.tree_leaves_with_path(changed)
  return Step(
    loss=float(values.get('loss', np.nan)),
    finite=finite,
    moved={
      jax.tree_util.keystr(path, simple=True, separator='/'): v for path, v in paths
    },
    blind=not any(jax.tree.leaves(apart)),
    seconds=min(seconds),
  )


def loss_at_start(case: Case) -> Findings:
  """Compares the initial loss with that of guessing, if that is known."""
  for name, step in _steps(case).items():
    guess = _guess(case, name)
    text = f'{name}: the loss starts at {step.loss:.4g}'
    if not step.finite:
      yield wrong(f'{text}; it or the state after the step is not finite')
    elif guess is None:
      yield ok(text)
    elif 0.5 * guess < step.loss < 2 * guess:
      yield ok(f'{text}, near {guess:.4g}, that of guessing')
    else:
      yield odd(f'{text}, far from {guess:.4g}, that of guessing: see normalisation')


def _guess(case: Case, name: str) -> float | None:
  """Returns log C of plain cross-entropy; None for other objectives."""
  config = stage_config(case.config, name)
  plain = {
    'method': 'supervised',
    'loss': 'cross_entropy',
    'class_weights': 'uniform',
    'penalty': 'none',
  }
  others = any(config[key]['name'] != value for key, value in plain.items())
  if others or config['reduction'] != 'mean':
    return None
  stage = case.experiment.stages[name]
  learned = build.learned_classes(config['shot_groups'], stage.groups, stage.dataset)
  return math.log(max(learned.sum(), 2))


def learns(case: Case) -> Findings:
  """Reports whether parameters move, and whether the images affect how."""
  for name, step in _steps(case).items():
    still = [path for path, moved in step.moved.items() if not moved]
    text = f'{name}: a step changes {len(step.moved) - len(still)} of '
    text += f'{len(step.moved)} parameter arrays'
    if len(still) == len(step.moved):
      yield wrong(f'{name}: no parameter changes: see schedule.base and what is frozen')
    elif step.blind:
      yield wrong(f'{text}, but the same way for other images: no gradient arrives')
    else:
      yield ok(text + (f', and not {still[0]}' if still else ''))


def by_heart(case: Case) -> Findings:
  """Trains the first stage on a single batch, at a single learning rate."""
  trial = next(iter(_trials(case).values()))
  state, losses = _copied(trial.state), []
  clock, until = trial.state.step, time.monotonic() + BUDGET
  while len(losses) < BY_HEART and time.monotonic() < until:
    state, values, finite = trial.update(
      state.replace(step=clock.copy()), trial.batches[0]
    )
    losses.append(float(values.get('loss', np.nan)))
    if not finite:
      break
  rate = f'learning rate of step {int(clock)}, where the warm-up ends'
  rate = rate if int(clock) else 'initial learning rate'
  text = f'{trial.stage.name}: in {len(losses)} steps on one batch, at the {rate}, '
  text += f'the loss goes from {losses[0]:.4g} to {losses[-1]:.4g}'
  if not (finite and checkpoint.all_finite(state)):
    yield wrong(f'{text}, not finite: try a smaller schedule.base, or a warm-up')
  elif losses[-1] < 0.5 * losses[0]:
    yield ok(text)
  elif len(losses) < BY_HEART:
    yield skip(f'{text}; there was no time for more in {BUDGET:g} s')
  else:
    yield odd(
      f'{text}, more than half: check the learning rate, the labels, what trains'
    )


def evaluates(case: Case) -> Findings:
  """Evaluates a batch of every split, and computes the metrics of all classes."""
  for name, trial in _trials(case).items():
    passes = trial.stage.passes
    share = np.mean([one.batches for one in passes.values()])
    stage = trial.stage._replace(
      passes={split: _first_batch(one) for split, one in passes.items()}
    )
    results.evaluate(case.experiment, stage, trial.state)  # compiles it
    began = time.perf_counter()
    results.evaluate(case.experiment, stage, trial.state)
    seconds = (time.perf_counter() - began) * share
    plan = trial.stage.plan
    times = -(-plan.steps // plan.evaluate_every)
    yield ok(
      f'{name}: an evaluation takes about {_duration(seconds)}, {times:,} of them '
      f'{_duration(times * seconds)}'
    )


def _first_batch(one: Pass) -> Pass:
  """Returns a pass's first batch, decoded without processes, which start slowly."""
  workers = None if one.stream.workers is None else 0
  return one._replace(stream=one.stream._replace(workers=workers), batches=1)


# What it takes.


def memory(case: Case) -> Findings:
  """Compares the memory that a step needs with what there is."""
  device = case.experiment.mesh.devices.flat[0]
  for name, trial in _trials(case).items():
    needed, there = sum(trial.memory.values()), footprint.free_memory(device)
    if device.platform == 'cpu':  # all devices share the memory of the host
      needed *= case.experiment.mesh.size
    largest = max(trial.memory, key=trial.memory.get)
    text = f'{name}: a step needs {amount(needed)} of memory, the largest part '
    text += f'({amount(trial.memory[largest])} per device) for {largest}'
    if there is None:
      yield ok(text)
    else:
      text += f'; {amount(there)} are available'
      level = wrong if needed > there else odd if needed > 0.9 * there else ok
      yield level(text)


def decoding(case: Case) -> Findings:
  """Compares how fast images are decoded with how fast they are needed."""
  rate = functools.cache(lambda: _decode_rate(case.dataset.splits['train']))
  for name, step in _steps(case).items():
    stage = case.trials[name].stage
    workers = stage.streams['train'].workers
    if workers is None:
      yield ok(f'{name}: the images are in the memory of the devices')
      continue
    made = rate() * min(workers or usable_cores(), usable_cores())
    used = stage.batch / step.seconds
    text = f'{name}: about {made:,.0f} images/s can be decoded, {used:,.0f} are used'
    yield odd(f'{text}: the devices will wait for data') if made < used else ok(text)


def _decode_rate(split: Split) -> float:
  """Returns how many training images one core decodes per second."""
  generator, rows = np.random.default_rng(0), sampled(split.rows)

  def make(row: int) -> None:
    with contextlib.suppress(UserError):  # other checks report damaged ones
      split.example(row, generator)

  for row in rows[:16]:  # the first ones import the decoders
    make(row)
  timed = rows[-32:]
  began = time.perf_counter()
  for row in timed:
    make(row)
  return len(timed) / (time.perf_counter() - began)
