"""Replicas: each equals its run alone, whatever happens to the others."""

import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax import build, replicas, run, sharding, stage, train
from lt_jax.errors import UserError
from lt_jax.method import Method, State, mean_metric, named_key
from lt_jax.writers import read_rows
from tests import tiny

pytestmark = pytest.mark.usefixtures('one_device')

SEEDS = (3, 4)
STEPS = 3


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
  return tiny.write_npz(tmp_path_factory.mktemp('tiny') / 'tiny.npz')


def update_by(method, streams, state, mesh, steps=STEPS):
  """Returns the state and the totals after some steps of the loop's program."""
  placed = jax.tree.map(lambda x: x.sharding, state)
  update = train.make_update(method, streams, mesh, 1, placed)
  arrays = {name: stream.arrays for name, stream in streams.items()}
  totals, bad = train.empty_totals(method, streams, state, mesh)
  for step in range(int(state.step), int(state.step) + steps):
    rows = jax.tree.map(lambda x: x[None], train.payloads_at(streams, step))
    payload = sharding.put_batch(mesh, rows, leading=1)
    state, totals, bad = update(state, totals, bad, arrays, payload)
  assert int(bad) == -1
  return state, jax.device_get(totals)


def last_stage(npz, recipe, seed, **given):
  config = tiny.config(npz, f'{recipe},epochs=100.0', seed=seed)
  experiment = build.build(config, **given)
  stage = [s for s in experiment.stages.values() if s.plan.steps][-1]
  return experiment, stage


RECIPES = ('ldam_drw', 'balanced_softmax', 'meta_ce', 'l2rw', 'mwn', 'oltr')
"""One of every method; the `lax.cond` on the clock in `ldam_drw` stays a cond."""


OFTEN = (('meta_ce', 2),)


@pytest.mark.parametrize(
  ('recipe', 'devices'),
  [
    pytest.param(*pair, marks=() if pair in OFTEN else pytest.mark.slow)
    for pair in itertools.product(RECIPES, (1, 2))
  ],
)
def test_a_replica_is_its_run_alone(npz, recipe, devices):
  experiment, stage = last_stage(npz, recipe, SEEDS[0], devices=1)
  streams, states, alone = [], [], []
  for seed in SEEDS:
    _, own = last_stage(
      npz, recipe, seed, devices=1, datasets=experiment.domains
    )  # has its own order
    shared = {
      name: stage.streams[name]._replace(payload=stream.payload)
      for name, stream in own.streams.items()
    }
    streams.append(shared)
    key = jax.random.key(seed)
    states.append(train.initial_state(stage.method, shared, key, experiment.mesh))
    alone.append(
      update_by(
        stage.method,
        shared,
        train.initial_state(stage.method, shared, key, experiment.mesh),
        experiment.mesh,
      )
    )
  mesh = sharding.make_mesh(devices)
  for name in stage.streams:  # the images lie on all devices
    arrays = sharding.put_replicated(mesh, jax.device_get(stage.streams[name].arrays))
    streams = [s | {name: s[name]._replace(arrays=arrays)} for s in streams]
  joined = {
    name: replicas.together_streams([s[name] for s in streams], mesh)
    for name in stage.streams
  }
  states = [
    jax.tree.map(lambda x: jax.device_put(x, sharding.replicated(mesh)), s)
    for s in states
  ]
  state, totals = update_by(
    replicas.vectorise(stage.method, len(SEEDS), mesh),
    joined,
    replicas.together(states, mesh),
    mesh,
  )
  one = replicas.separator(mesh)
  del totals[replicas.DIED_AT]
  for i, (expected, expected_totals) in enumerate(alone):
    found = one(state, i)
    assert int(found.step) == STEPS
    np.testing.assert_array_equal(
      jax.random.key_data(found.key), jax.random.key_data(expected.key)
    )
    for field in ('params', 'stats', 'opt', 'memory'):
      chex.assert_trees_all_close(
        jax.device_get(getattr(found, field)),
        jax.device_get(getattr(expected, field)),
        rtol=2e-4,
        atol=2e-5,
      )
    own = {name: tuple(part[i] for part in value) for name, value in totals.items()}
    chex.assert_trees_all_close(own, expected_totals, rtol=2e-4, atol=2e-5)


def counter():
  """Adds a batch to its sum; becomes infinite, in metric or State, on request."""

  def init(key, batches):
    w = 0.0 * batches['train']['x'].sum()
    return State(jnp.int32(0), key, {'net': {'w': w}}, {}, {}, {})

  def step(state, batches):
    x = batches['train']['x'].sum()
    noise = jax.random.uniform(named_key(state.key, 'noise', state.step))
    w = state.params['net']['w'] + x + noise
    loss = jnp.where(jnp.isneginf(x), 1.0, w)  # infinite only in the State
    new = state.replace(step=state.step + 1, params={'net': {'w': w}})
    return new, {'loss': mean_metric(loss)}

  return Method(init, step, lambda state, images: {'w': state.params['net']['w']})


@pytest.mark.parametrize('broken', [np.nan, -np.inf])
def test_one_that_is_not_finite_stays_and_the_others_continue(broken):
  mesh, method = sharding.make_mesh(1), counter()

  def stream(replica, poisoned):
    def payload(step):
      bad = poisoned and replica == 1 and step == 2
      x = np.full(2, broken if bad else 1.0 + replica, np.float32)
      return {'x': x}

    return train.Stream({}, payload, lambda arrays, payload, key: dict(payload))

  def trained(poisoned):
    joined = replicas.together_streams([stream(i, poisoned) for i in range(3)], mesh)
    vectorised = replicas.vectorise(method, 3, mesh)
    keys = jax.random.split(jax.random.key(0), 3)
    first = train.initial_state(vectorised, {'train': joined}, keys, mesh)
    assert first.step.shape == () and first.params['net']['w'].shape == (3,)
    state, totals = update_by(vectorised, {'train': joined}, first, mesh, steps=5)
    found = vectorised.predict(state, jnp.zeros((2, 8, 8, 1)))['w']
    np.testing.assert_array_equal(found, state.params['net']['w'])
    return state, totals

  state, totals = trained(poisoned=True)
  whole, whole_totals = trained(poisoned=False)
  np.testing.assert_array_equal(state.memory[replicas.ALIVE], [True, False, True])
  assert int(state.step) == 5
  found, expected = (np.asarray(s.params['net']['w']) for s in (state, whole))
  np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])
  two_steps = 2 * 4 + sum(
    float(jax.random.uniform(named_key(state.key[1], 'noise', step)))
    for step in range(2)
  )
  np.testing.assert_allclose(found[1], two_steps, rtol=1e-6)
  np.testing.assert_array_equal(totals['loss'][1], [5, 2, 5])
  np.testing.assert_array_equal(
    train.means(*totals[replicas.DIED_AT]), [np.nan, 2, np.nan]
  )
  np.testing.assert_array_equal(
    totals['loss'][0][[0, 2]], whole_totals['loss'][0][[0, 2]]
  )


def test_incompatible_options_are_reported():
  mesh = sharding.make_mesh(2)
  with pytest.raises(UserError, match='2 devices do not divide 3 replicas'):
    replicas.vectorise(counter(), 3, mesh)
  states = [
    State(jnp.int32(step), jax.random.key(0), {}, {}, {}, {}) for step in (4, 6)
  ]
  with pytest.raises(UserError, match=r'at the same step, not at \[4, 6\]'):
    replicas.together(states, mesh)
  streams = [train.Stream({}, lambda step: {}, lambda *a: {}, workers=0)] * 2
  with pytest.raises(UserError, match='not on images that the host decodes'):
    replicas.together_streams(streams, mesh)


# Whole runs.

HUGE = 1e30
"""A finite parameter, like every initial State, with a step that is not."""


def configs(npz, seeds=SEEDS, recipe='ce', **overrides):
  given = {'log_every_steps': 2, 'save_every_epochs': 4.0, **overrides}
  return [tiny.config(npz, f'{recipe},epochs=8.0', seed=s, **given) for s in seeds]


def result(folder):
  return json.loads((folder / 'result.json').read_text())


def test_each_leaves_an_ordinary_run(npz, tmp_path):
  folders = [tmp_path / str(seed) for seed in SEEDS]
  ends = run.run_seeds(configs(npz, recipe='crt'), folders)
  for folder, end in zip(folders, ends, strict=True):
    assert result(folder)['state_sha256'] == end['state_sha256']
  both = list(zip(SEEDS, folders, configs(npz, recipe='crt'), strict=True))
  for seed, folder, config in both[1:]:
    alone = run.run(config, tmp_path / f'alone{seed}')
    found = result(folder)
    assert (found['seed'], found['replicas'], alone['replicas']) == (seed, 2, 1)
    assert found['config_digest'] == alone['config_digest']
    assert found['test']['accuracy'] == alone['test']['accuracy']
    np.testing.assert_allclose(found['test']['loss'], alone['test']['loss'], rtol=1e-3)
    assert sorted(p.name for p in folder.iterdir()) == sorted(
      p.name for p in (tmp_path / f'alone{seed}').iterdir()
    )
    rows, rows_alone = (
      read_rows(where / 'metrics.jsonl')
      for where in (folder, tmp_path / f'alone{seed}')
    )
    assert [(r['stage'], r['split'], r['step']) for r in rows] == [
      (r['stage'], r['split'], r['step']) for r in rows_alone
    ]
    assert not any('died_at' in row for row in rows)
    for row, other in zip(rows, rows_alone, strict=True):
      np.testing.assert_allclose(row['loss'], other['loss'], rtol=1e-3)
    run.run(config, folder)  # resumes where it is: at its end
    assert result(folder)['state_sha256'] == found['state_sha256']


def test_one_that_diverges_is_reported_and_the_others_end(npz, tmp_path, monkeypatch):
  real = replicas.together

  def poisoned(states, mesh):
    state = real(states, mesh)
    return state.replace(params=jax.tree.map(lambda x: x.at[1].set(HUGE), state.params))

  monkeypatch.setattr(replicas, 'together', poisoned)
  folders = [tmp_path / str(seed) for seed in (0, 1, 2)]
  ends = run.run_seeds(configs(npz, seeds=(0, 1, 2)), folders)
  assert [type(end) for end in ends] == [dict, train.Diverged, dict]
  assert str(ends[1]) == 'not finite at step 0'
  assert not (folders[1] / 'result.json').exists()
  report = json.loads((folders[1] / 'stages/train/not_finite.json').read_text())
  assert report['step'] == 0 and len(report['examples']['train']['label']) == 8
  assert read_rows(folders[1] / 'events.jsonl')[-1]['event'] == 'diverged'
  assert not read_rows(folders[1] / 'metrics.jsonl')
  assert not [*(folders[1] / 'stages/train/checkpoints').glob('[0-9]*')]
  for folder in (folders[0], folders[2]):
    assert np.isfinite(result(folder)['test']['loss'])


@pytest.mark.slow
def test_when_all_diverge_it_ends(npz, tmp_path, monkeypatch):
  real = replicas.together

  def poisoned(states, mesh):
    state = real(states, mesh)
    return state.replace(params=jax.tree.map(lambda x: 0.0 * x + HUGE, state.params))

  monkeypatch.setattr(replicas, 'together', poisoned)
  ends = run.run_seeds(configs(npz), [tmp_path / str(seed) for seed in SEEDS])
  assert [str(end) for end in ends] == ['not finite at step 0'] * 2


@pytest.mark.slow
def test_those_behind_come_up_to_the_others(npz, tmp_path, monkeypatch):
  """As after a kill: each has its own last checkpoint."""
  given = configs(npz, seeds=(0, 1, 2), evaluate_every_epochs=4.0)
  for config in given:
    run.run(config, tmp_path / f'alone{config["seed"]}')
  folders = [tmp_path / str(config['seed']) for config in given]
  with monkeypatch.context() as stopped:
    for config, folder, after in zip(given, folders, (4, 6, 4), strict=True):
      asked = iter([False] * after + [True] * 10)
      stopped.setattr(run.StopRequest, '__call__', lambda self, a=asked: next(a))
      with pytest.raises(train.Preempted):
        run.run(config, folder)
  steps = [
    max(int(p.name) for p in (f / 'stages/train/checkpoints').glob('[0-9]*'))
    for f in folders
  ]
  assert len(set(steps)) == 2 and max(steps) < 8
  run.run_seeds(given, folders)
  for folder in folders:
    alone = tmp_path / f'alone{folder.name}'
    np.testing.assert_allclose(
      result(folder)['test']['loss'], result(alone)['test']['loss'], rtol=1e-3
    )
    rows, others = (
      [(r['split'], r['step']) for r in read_rows(f / 'metrics.jsonl')]
      for f in (folder, alone)
    )
    assert set(rows) >= set(others)
    assert len(rows) == len(set(rows))


@pytest.mark.slow
def test_seeds_that_the_devices_do_not_divide(npz, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 4)
  given = configs(npz, seeds=(0, 1, 2, 3, 4), eval_batch=8)
  folders = [tmp_path / str(config['seed']) for config in given]
  run.run_seeds(given, folders)
  assert all(result(folder)['device'].startswith('4 x ') for folder in folders)
  alone = run.run(given[-1], tmp_path / 'alone')  # shares its device with a filler
  np.testing.assert_allclose(
    result(folders[-1])['test']['loss'], alone['test']['loss'], rtol=1e-3
  )
  config = configs(npz)[0]
  config['model']['batch_norm'] = 'per_device'
  with pytest.raises(UserError, match='when seeds train together each device has'):
    run.run_seeds([config, config | {'seed': 9}], [tmp_path / 'a', tmp_path / 'b'])


def test_one_that_starts_without_being_finite_ends_alone(npz, tmp_path, monkeypatch):
  real = stage.StageRunner.begin

  def begin(self, earlier):
    state = real(self, earlier)
    if self._experiment.config['seed'] == SEEDS[0]:
      state = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    return state

  monkeypatch.setattr(stage.StageRunner, 'begin', begin)
  ends = run.run_seeds(configs(npz), [tmp_path / str(seed) for seed in SEEDS])
  assert str(ends[0]) == 'not finite at step 0'
  assert np.isfinite(ends[1]['test']['loss'])


def test_the_screen_follows_one_and_shows_the_end_of_all(npz, tmp_path, capsys):
  run.run_seeds(configs(npz), [tmp_path / str(seed) for seed in SEEDS])
  output = capsys.readouterr().out
  assert 'ce, seeds 3, 4 as one program' in output
  assert output.count('seed 3: step 8/8') == 1 and 'seed 4: step 8/8' not in output
  for seed in SEEDS:
    assert f'test, ce, seed {seed}, checkpoint of step 8 (last)\n' in output


@pytest.mark.slow
def test_after_a_stop_they_resume_together(npz, tmp_path, monkeypatch):
  folders = [tmp_path / str(seed) for seed in SEEDS]
  run.run_seeds(configs(npz), [tmp_path / f'whole{seed}' for seed in SEEDS])

  def stop_at(step):
    real = run.StopRequest.__call__
    seen = []

    def asked(self):
      seen.append(1)
      return real(self) or len(seen) > step

    monkeypatch.setattr(run.StopRequest, '__call__', asked)

  stop_at(6)
  with pytest.raises(train.Preempted):
    run.run_seeds(configs(npz), folders)
  monkeypatch.undo()
  steps = {
    max(int(p.name) for p in (f / 'stages/train/checkpoints').glob('[0-9]*'))
    for f in folders
  }
  assert len(steps) == 1 and 0 < steps.pop() < 8
  run.run_seeds(configs(npz), folders)
  for seed, folder in zip(SEEDS, folders, strict=True):
    whole = result(tmp_path / f'whole{seed}')
    assert result(folder)['state_sha256'] == whole['state_sha256']
    assert result(folder)['starts'] == 2


def test_only_the_seed_may_differ(npz, tmp_path):
  first, second = configs(npz)
  with pytest.raises(UserError, match='may differ only in the seed'):
    run.run_seeds([first, second | {'batch': 16}], [tmp_path / 'a', tmp_path / 'b'])
