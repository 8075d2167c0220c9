"""Trains one stage of several runs as one program."""

import collections
import contextlib
import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from lt_jax import checkpoint, replicas, train
from lt_jax.method import State
from lt_jax.stage import StageRunner


def run_together(
  runners: Sequence[StageRunner], earlier: Sequence[Mapping[str, State]], mesh: Mesh
) -> list[State | train.Diverged]:
  """Trains a stage of several runs that differ only in the seed as one program.

  Runs that are behind, as after a crash, first catch up with the others.

  Args:
    runners: one per run.
    earlier: for each run, the States of its earlier stages.
    mesh: the devices.

  Returns:
    For each run, the State that `StageRunner.end` returns, or how it diverged.
  """
  with contextlib.ExitStack() as stack:
    for runner in runners:
      stack.callback(runner.close)
    now: list[State | train.Diverged] = [
      runner.begin(states) for runner, states in zip(runners, earlier, strict=True)
    ]
    for i, runner in enumerate(runners):
      if not checkpoint.all_finite(now[i]):
        now[i] = runner.diverged(int(jax.device_get(now[i].step)))
    while True:
      places = collections.defaultdict(list)
      for i, state in enumerate(now):
        if not isinstance(state, train.Diverged):
          places[int(jax.device_get(state.step))].append(i)
      if not places:
        return now
      step, *ahead = sorted(places)
      members, until = places[step], min(ahead, default=None)
      group = _Together([runners[i] for i in members], mesh, until)
      for i, state in zip(members, group.run([now[i] for i in members]), strict=True):
        now[i] = state
      if until is None:
        return [
          state if isinstance(state, train.Diverged) else runner.end(state)
          for runner, state in zip(runners, now, strict=True)
        ]


class _Together:
  """Runs at the same step of one stage, and their hooks while they train together."""

  def __init__(self, runners: Sequence[StageRunner], mesh: Mesh, until: int | None):
    self._runners = runners
    self._until = until
    self._hooks = [runner.hooks() for runner in runners]
    self._mesh = mesh
    self._one = replicas.separator(mesh)
    self._ends: list[train.Diverged | None] = [None] * len(runners)

  def run(self, states: Sequence[State]) -> list[State | train.Diverged]:
    """Returns, for each run, its last State or how it diverged."""
    first, missing = self._runners[0], -len(states) % self._mesh.size
    first.follow()
    if len(states) == self._mesh.size == 1:
      return [self._alone(first, states[0])]
    # Every device needs equally many, even if some are gone; the extra ones are unused.
    runners = [*self._runners, *[first] * missing]
    states = [*states, *[states[0]] * missing]
    streams = {
      name: replicas.together_streams(
        [runner.stage.streams[name] for runner in runners], self._mesh
      )
      for name in first.stage.streams
    }
    try:
      state = train.train(
        replicas.vectorise(first.stage.method, len(states), self._mesh),
        streams,
        replicas.together(states, self._mesh),
        mesh=self._mesh,
        plan=first.plan._replace(until=self._until),
        hooks=self._all_hooks(),
      )
    except train.Diverged:
      if None in self._ends:
        raise
      return self._ends
    return [self._one(state, i) if e is None else e for i, e in enumerate(self._ends)]

  def _alone(self, runner: StageRunner, state: State) -> State | train.Diverged:
    """Trains one run exactly as without the others, bit for bit."""
    try:
      return train.train(
        runner.stage.method,
        runner.stage.streams,
        state,
        mesh=self._mesh,
        plan=runner.plan._replace(until=self._until),
        hooks=runner.hooks(),
      )
    except train.Diverged as diverged:
      return runner.diverged(diverged.step)

  def _all_hooks(self) -> train.Hooks:
    return train.Hooks(
      first_call=lambda seconds: self._for_all('first_call', seconds),
      progress=lambda step: self._for_all('progress', step),
      log=self._log,
      save=functools.partial(self._with_state, 'save'),
      evaluate=functools.partial(self._with_state, 'evaluate'),
      stop=self._hooks[0].stop,
      bad_images=lambda stream, positions: None,  # all images are on the devices
    )

  def _alive(self) -> list[int]:
    return [i for i, end in enumerate(self._ends) if end is None]

  def _for_all(self, name: str, value: float) -> None:
    for i in self._alive():
      getattr(self._hooks[i], name)(value)

  def _with_state(self, name: str, step: int, state: State) -> None:
    """Saves or evaluates every replica that has been finite so far."""
    finite = jax.device_get(state.memory[replicas.ALIVE])
    for i in self._alive():
      if finite[i]:
        getattr(self._hooks[i], name)(step, self._one(state, i))

  def _log(
    self, step: int, values: dict[str, np.ndarray], steps: int, seconds: float
  ) -> None:
    """Logs the values of each replica, and ends those that diverged."""
    died_at = values.pop(replicas.DIED_AT)
    for i in self._alive():
      runner = self._runners[i]
      if np.isnan(died_at[i]):
        own = {name: value[i] for name, value in values.items()}
        self._hooks[i].log(step, own, steps, seconds)
        continue
      self._ends[i] = runner.diverged(int(died_at[i]))
    if not self._alive():
      raise self._ends[0]
    self._runners[self._alive()[0]].follow()
