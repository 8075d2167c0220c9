"""The loop, with a method of three lines: what happens when, and that it resumes."""

import collections
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax import checkpoint, sharding, train
from lt_jax.data import reading
from lt_jax.data.streams import Stream
from lt_jax.method import Method, State, mean_metric, named_key

BATCH = 8


def toy_method():
  """Follows a running mean of noisy batches; the noise comes from the state's key."""

  def init(key, batches):
    w = 0.0 * batches['train']['x'][0]
    return State(jnp.int32(0), key, {'net': {'w': w}}, {}, {}, {})

  def step(state, batches):
    x = batches['train']['x']
    noise = jax.random.normal(named_key(state.key, 'noise', state.step), x.shape[1:])
    w = 0.9 * state.params['net']['w'] + 0.1 * x.mean(0) + 0.01 * noise
    metrics = {
      'loss': mean_metric(jnp.square(w).sum()),
      'class_loss': (x.sum(0), jnp.full(x.shape[1:], float(len(x)))),
    }
    return state.replace(step=state.step + 1, params={'net': {'w': w}}), metrics

  return Method(init, step, lambda state, images: {})


def toy_stream(bad_step=None):
  """Batches (B, 3) that are functions of the step; NaN at one of them."""

  def payload(step):
    x = np.random.default_rng(step).normal(size=(BATCH, 3)).astype(np.float32)
    x = np.where(step == bad_step, np.nan, x).astype(np.float32)
    return {'index': np.arange(BATCH, dtype=np.int32) + step, 'x': x}

  return Stream({'offset': jnp.ones(())}, payload, _prepare)


def _prepare(arrays, payload, key):
  jitter = jax.random.uniform(key, (BATCH, 1))
  return {'x': payload['x'] + arrays['offset'] + jitter}


class Recorder:
  """Hooks that write down what the loop did."""

  def __init__(self, stop_at=None):
    self.calls = []
    self.rows = {}
    self.saved = {}
    self.counts = collections.Counter()
    self.step = 0
    self.stop_at = stop_at

  def hooks(self):
    return train.Hooks(
      first_call=lambda seconds: self.counts.update(['compiled']),
      progress=lambda step: setattr(self, 'step', step),
      log=self._log,
      save=self._save,
      evaluate=lambda step, state: self.calls.append(('evaluate', step)),
      stop=lambda: self.stop_at is not None and self.step >= self.stop_at,
      bad_images=lambda name, positions: self.calls.append(('bad', name)),
      hold=lambda unlogged: self.calls.append(('hold', unlogged.step)),
    )

  def _log(self, step, values, steps, seconds):
    self.calls.append(('log', step))
    self.rows[step] = (steps, values)

  def _save(self, step, state):
    self.calls.append(('save', step))
    self.saved[step] = jax.device_get(state.params)


PLAN = train.Plan(
  first=0, steps=22, chunk=1, log_every=4, save_every=8, evaluate_every=12
)


def run(recorder, plan=PLAN, devices=1, stream=None, state=None):
  method, streams = toy_method(), {'train': stream or toy_stream()}
  mesh = sharding.make_mesh(devices)
  streams = {
    k: s._replace(arrays=sharding.put_replicated(mesh, s.arrays))
    for k, s in streams.items()
  }
  if state is None:
    state = train.initial_state(method, streams, jax.random.key(0), mesh)
  return train.train(
    method, streams, state, mesh=mesh, plan=plan, hooks=recorder.hooks()
  )


@pytest.fixture(scope='module')
def unbroken():
  recorder = Recorder()
  return recorder, run(recorder)


def test_everything_happens_at_multiples_of_the_step(unbroken):
  recorder, state = unbroken
  assert [s for what, s in recorder.calls if what == 'log'] == [4, 8, 12, 16, 20, 22]
  assert [s for what, s in recorder.calls if what == 'save'] == [8, 16, 22]
  assert [s for what, s in recorder.calls if what == 'evaluate'] == [12, 22]
  assert recorder.calls.index(('log', 8)) < recorder.calls.index(('save', 8))
  assert recorder.counts['compiled'] == 1
  assert int(state.step) == 22


def test_rows_are_means_over_their_interval(unbroken):
  recorder, _ = unbroken
  steps, values = recorder.rows[22]
  assert steps == 2
  key = jax.random.key(0)
  rows = []
  for step in (20, 21):
    jitter = jax.random.uniform(named_key(key, 'train', step), (BATCH, 1))
    rows.append(toy_stream().payload(step)['x'] + 1 + np.asarray(jitter))
  np.testing.assert_allclose(
    values['class_loss'], np.concatenate(rows).mean(0), rtol=1e-5
  )


@pytest.mark.parametrize('chunk', [2, 4])
def test_many_steps_a_call_are_the_same_run(unbroken, chunk):
  recorder = Recorder()
  state = run(recorder, PLAN._replace(chunk=chunk))
  assert recorder.calls == unbroken[0].calls
  np.testing.assert_allclose(
    state.params['net']['w'], unbroken[1].params['net']['w'], rtol=1e-6
  )
  assert recorder.counts['compiled'] == (1 if 22 % chunk == 0 else 2)


@pytest.mark.parametrize('devices', [2, 8])
def test_devices_agree(unbroken, devices):
  state = run(Recorder(), devices=devices)
  assert len(state.params['net']['w'].devices()) == devices
  np.testing.assert_allclose(
    state.params['net']['w'], unbroken[1].params['net']['w'], rtol=1e-5
  )


@pytest.mark.parametrize('stop_at', [3, 8, 12, 22])
def test_stopping_saves_and_resuming_equals_the_unbroken_run(unbroken, stop_at):
  recorder = Recorder(stop_at=stop_at)
  states = {}
  recorder._save = lambda step, state: states.update(
    {step: jax.tree.map(jnp.copy, state)}
  )
  with pytest.raises(train.Preempted):
    run(recorder)
  state = run(Recorder(), state=states[stop_at])
  assert checkpoint.digest(state) == checkpoint.digest(unbroken[1])


def test_a_resumed_run_evaluates_again_where_it_stopped(unbroken):
  """The evaluation at that step may have been the one that was interrupted."""
  recorder = Recorder(stop_at=12)
  states = {}
  recorder._save = lambda step, state: states.update(
    {step: jax.tree.map(jnp.copy, state)}
  )
  with pytest.raises(train.Preempted):
    run(recorder)
  resumed = Recorder()
  run(resumed, state=states[12])
  assert resumed.calls[0] == ('evaluate', 12)


def test_a_run_that_is_asked_to_stop_while_it_waits_for_a_batch_saves(monkeypatch):
  monkeypatch.setattr(reading, 'LOOKING_EVERY', 0.1)
  plain, recorder, let_go = toy_stream(), Recorder(), threading.Event()

  def payload(step):
    if step == 6:
      recorder.stop_at = 0  # from now on it is asked to
      let_go.wait(30)
    return plain.payload(step)

  monkeypatch.setattr(recorder, '_save', lambda *at: (record(*at), let_go.set()))
  record = Recorder._save.__get__(recorder)
  with pytest.raises(train.Preempted):
    run(recorder, stream=plain._replace(payload=payload, workers=0))
  step = recorder.step
  last = [name for name, at in recorder.calls[-3:] if at == step]
  assert 'save' in last and 0 < step <= 6  # and 'hold', unless all is logged


@pytest.mark.parametrize('chunk', [1, 4])
def test_a_step_that_is_not_finite_is_named_and_not_saved(chunk):
  recorder = Recorder()
  with pytest.raises(train.Diverged) as error:
    run(recorder, PLAN._replace(chunk=chunk), stream=toy_stream(bad_step=13))
  assert error.value.step == 13
  np.testing.assert_array_equal(
    error.value.payload['train']['index'], np.arange(BATCH) + 13
  )
  assert [s for what, s in recorder.calls if what == 'save'] == [8]
  assert 16 not in recorder.rows


def test_a_stage_that_starts_late_is_not_evaluated_at_its_start():
  first = Recorder()
  method, streams = toy_method(), {'train': toy_stream()}
  mesh = sharding.make_mesh(1)
  state = train.initial_state(method, streams, jax.random.key(0), mesh)
  run(first, PLAN._replace(first=12), state=state.replace(step=jnp.int32(12)))
  assert first.calls[0] == ('log', 16)


def test_means_of_nothing_are_nan_without_a_warning():
  value = train.means(np.array([2.0, 0.0]), np.array([4.0, 0.0]))
  assert value[0] == 0.5 and np.isnan(value[1])


def test_devices_that_divide_every_batch():
  usable = sharding.usable_devices
  assert usable({'train': 64, 'meta': 100}, 8, 1) == 4
  assert usable({'train': 7}, 8, 1) == 7
  assert usable({'train': 64}, 8, 2) == 8
  with pytest.raises(sharding.UserError, match="60 of stream 'train'.*56 or 64"):
    usable({'train': 60}, 8, 2)


def test_replaced_images_are_reported():
  plain = toy_stream()

  def payload(step):
    return {**plain.payload(step), 'bad': np.arange(BATCH) < (step == 5)}

  recorder = Recorder()
  run(recorder, stream=plain._replace(payload=payload))
  assert [call for call in recorder.calls if call[0] == 'bad'] == [('bad', 'train')]


def test_devices_of_a_process_are_neighbours_whatever_the_machine_calls_first(
  monkeypatch,
):
  """As each process owns consecutive rows of a batch; a TPU counts along its torus."""

  class Device(NamedTuple):
    process_index: int
    id: int

  torus = [Device(i // 2 % 4, i) for i in range(16)]
  monkeypatch.setattr(jax, 'devices', lambda: torus)
  monkeypatch.setattr(sharding, 'Mesh', lambda devices, *names, **options: devices)
  found = [int(device[0]) for device in sharding.make_mesh(16)]
  assert found == sorted(found)
