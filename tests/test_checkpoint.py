"""Checkpoints: what is saved comes back, and damage is seen, told and set aside."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax import checkpoint, sharding
from lt_jax.errors import UserError
from lt_jax.method import State, first_state, tick, update
from lt_jax.optim import OPTIMIZERS, make_optimizer
from lt_jax.renamed import old_path


def make_state(step=3, devices=1, scale=1.0):
  """A small state on some devices, with a typed key and empty parts."""
  state = State(
    step=jnp.int32(step),
    key=jax.random.key(1),
    params={'net': {'kernel': scale * jnp.arange(12.0).reshape(4, 3), 'empty': {}}},
    stats={'net': {}},
    opt={'net': ()},
    memory={},
  )
  return sharding.put_replicated(sharding.make_mesh(devices), state)


def target(devices=1):
  mesh = sharding.make_mesh(devices)
  return checkpoint.abstract(make_state(), sharding.replicated(mesh))


class Ladder:
  """A ladder in a folder, and what it logged."""

  def __init__(self, folder, **options):
    self.folder = folder
    self.events = []
    self.checkpoints = checkpoint.Checkpoints(
      folder, log=lambda event, **v: self.events.append((event, v)), **options
    )

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.checkpoints.close()


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A folder with the checkpoints of steps 1, 2 and 3."""
  folder = tmp_path_factory.mktemp('written')
  with Ladder(folder) as ladder:
    for step in (1, 2, 3):
      ladder.checkpoints.save(step, make_state(step, scale=step))
  return folder


@pytest.fixture
def folder(written, tmp_path):
  """A copy of it, to be damaged."""
  import shutil

  return shutil.copytree(written, tmp_path / 'ladder')


def largest_file(folder):
  files = [os.path.join(d, f) for d, _, names in os.walk(folder) for f in names]
  return max(files, key=os.path.getsize)


@pytest.mark.parametrize('devices', [1, 2, 8])
def test_restores_bit_for_bit_on_any_number_of_devices(tmp_path, devices):
  saved = make_state(devices=4)
  with Ladder(tmp_path) as ladder:
    ladder.checkpoints.save(3, saved)
  with Ladder(tmp_path) as ladder:
    restored = ladder.checkpoints.restore(target(devices))
  assert restored.step == 3 and restored.verified
  assert checkpoint.digest(restored.state) == checkpoint.digest(saved)
  assert jax.tree.structure(restored.state) == jax.tree.structure(saved)
  assert len(restored.state.params['net']['kernel'].devices()) == devices
  jax.random.normal(restored.state.key)  # a key again, not its raw data


def test_nothing_there_is_a_fresh_start(tmp_path):
  with Ladder(tmp_path / 'absent') as ladder:
    assert ladder.checkpoints.restore(target()) is None
    assert ladder.checkpoints.restore_best(target()) is None


def test_keeps_the_newest(tmp_path):
  with Ladder(tmp_path, keep=2) as ladder:
    for step in range(5):
      ladder.checkpoints.save(step, make_state(step))
  assert sorted(os.listdir(tmp_path / 'manifests')) == ['3.json', '4.json']
  assert ladder.checkpoints.steps() == [3, 4]


def test_best_is_outside_the_ladder(tmp_path):
  with Ladder(tmp_path, keep=1) as ladder:
    ladder.checkpoints.save_best(1, make_state(1, scale=1.0), value=0.5)
    ladder.checkpoints.save_best(2, make_state(2, scale=2.0), value=0.7)
    ladder.checkpoints.save(9, make_state(9))
  with Ladder(tmp_path) as ladder:
    best = ladder.checkpoints.restore_best(target())
    assert (best.step, best.manifest['value']) == (2, 0.7)
    assert ladder.checkpoints.restore(target()).step == 9
  np.testing.assert_array_equal(best.state.params['net']['kernel'][0], [0, 2, 4])
  os.truncate(largest_file(tmp_path / 'best'), 1)
  with Ladder(tmp_path) as ladder, pytest.raises(UserError, match='damaged'):
    ladder.checkpoints.restore_best(target())


def test_truncated_falls_back_and_the_step_can_be_saved_again(folder):
  """F5."""
  path = largest_file(folder / '3')
  os.truncate(path, os.path.getsize(path) // 2)
  with Ladder(folder) as ladder:
    restored = ladder.checkpoints.restore(target())
    assert restored.step == 2 and restored.verified
    ladder.checkpoints.save(3, make_state(3, scale=30.0))
  ((event, values),) = [e for e in ladder.events if e[0] == 'checkpoint_rejected']
  assert values['step'] == 3 and 'bytes' in values['reason']
  assert any(p.name.startswith('3-') for p in (folder / 'quarantine').iterdir())
  with Ladder(folder) as ladder:
    again = ladder.checkpoints.restore(target())
  assert again.step == 3 and again.state.params['net']['kernel'][0, 1] == 30.0


def test_one_flipped_bit_is_caught(folder):
  """F6."""
  path = largest_file(folder / '3')
  with open(path, 'r+b') as file:
    file.seek(os.path.getsize(path) // 2)
    byte = file.read(1)[0]
    file.seek(-1, os.SEEK_CUR)
    file.write(bytes([byte ^ 4]))
  with Ladder(folder) as ladder:
    assert ladder.checkpoints.restore(target()).step == 2
  assert 'SHA-256' in ladder.events[0][1]['reason']


def test_all_damaged_is_no_fresh_start(folder):
  """F7."""
  for step in (1, 2, 3):
    os.truncate(largest_file(folder / str(step)), 0)
  with Ladder(folder) as ladder, pytest.raises(UserError, match='no usable') as message:
    ladder.checkpoints.restore(target())
  assert all(f'{step}:' in str(message.value) for step in (1, 2, 3))


def test_without_its_manifest_a_checkpoint_is_not_trusted(folder):
  """F3."""
  (folder / 'manifests' / '3.json').unlink()
  with Ladder(folder) as ladder:
    restored = ladder.checkpoints.restore(target())
  assert restored.step == 2 and restored.verified
  assert 'no manifest' in ladder.events[0][1]['reason']


def test_a_first_save_without_manifest_is_used_and_reported(tmp_path):
  with Ladder(tmp_path) as ladder:
    ladder.checkpoints.save(1, make_state(1))
  (tmp_path / 'manifests' / '1.json').unlink()
  with Ladder(tmp_path) as ladder:
    restored = ladder.checkpoints.restore(target())
  assert restored.step == 1 and not restored.verified


def test_a_reader_beside_the_run_moves_nothing(folder):
  os.truncate(largest_file(folder / '3'), 0)
  with Ladder(folder) as ladder:
    assert ladder.checkpoints.restore(target(), quarantine=False).step == 2
  assert (folder / '3').exists() and not (folder / 'quarantine').exists()


def test_unfinished_saves_are_ignored(folder):
  (folder / '4.orbax-checkpoint-tmp').mkdir()
  with Ladder(folder) as ladder:
    assert ladder.checkpoints.restore(target()).step == 3


def test_another_network_is_rejected_by_name(folder):
  other = target()
  other.params['net']['kernel'] = jax.ShapeDtypeStruct((4, 5), jnp.float32)
  with Ladder(folder) as ladder, pytest.raises(UserError, match='kernel is .4, 3.'):
    ladder.checkpoints.restore(other)
  assert (folder / '3').exists()


@pytest.mark.parametrize(
  'error',
  [OSError(5, 'Input/output error'), ValueError('NOT_FOUND: Error reading "x"')],
)
def test_a_read_that_fails_may_pass_and_moves_nothing(folder, monkeypatch, error):
  def fails(*arguments):
    raise error

  with Ladder(folder) as ladder:
    monkeypatch.setattr(ladder.checkpoints._checkpointer, 'restore', fails)
    with pytest.raises(OSError, match=r'Input/output error|could not be read: .*NOT_F'):
      ladder.checkpoints.restore(target())
  assert not (folder / 'quarantine').exists() and not ladder.events


def test_a_failed_write_is_reported_and_older_steps_stay(tmp_path, monkeypatch):
  """The manifest cannot be written: the error comes with the next call."""
  ladder = Ladder(tmp_path)
  ladder.checkpoints.save(1, make_state(1))
  ladder.checkpoints.wait()

  def full(path, value):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(checkpoint.files, 'write_json', full)
  ladder.checkpoints.save(2, make_state(2))
  with pytest.raises(checkpoint.SaveError, match='No space left'):
    ladder.checkpoints.save(3, make_state(3))
  monkeypatch.undo()
  ladder.checkpoints.close()
  with Ladder(tmp_path) as ladder:
    assert ladder.checkpoints.restore(target()).step == 1


def test_digest_sees_every_bit_and_every_name():
  state = make_state()
  assert checkpoint.digest(state) == checkpoint.digest(make_state(devices=8))
  kernel = state.params['net']['kernel']
  nudged = state.replace(params={'net': {'kernel': kernel.at[0, 0].set(1e-45)}})
  renamed = state.replace(params={'net': {'weight': kernel}})
  digests = {checkpoint.digest(s) for s in (state, nudged, renamed)}
  assert len(digests) == 3


def test_non_finite_is_seen_anywhere():
  state = make_state()
  assert checkpoint.all_finite(state)
  broken = state.replace(memory={'ema': jnp.array([0.0, jnp.nan])})
  assert not checkpoint.all_finite(broken)


# Checkpoints from before every player had an optimiser state of its own.


def with_one_optimiser_state(state):
  """Returns a State as it was when `opt.net` held the state of all players."""
  inner = state.opt['net'].inner_state
  by_player = {
    field: {
      player: getattr(own.inner_state, field) for player, own in state.opt.items()
    }
    for field in inner._fields
    if field != 'count'
  }
  whole = state.opt['net']._replace(inner_state=inner._replace(**by_player))
  return state.replace(opt={'net': whole})


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_an_older_checkpoint_is_read_and_resumes_bit_for_bit(tmp_path, name):
  optimizer = make_optimizer(name, lambda step: jnp.float32(0.1))
  params = {'net': {'head': {'bias': jnp.ones(3)}}, 'centroids': jnp.ones((2, 3))}
  first = first_state(jax.random.key(0), params, {'net': {}}, optimizer.init(params))

  def step(state):
    grads = jax.tree.map(lambda p: p + state.step, state.params)
    return tick(update(state, grads, optimizer)[0])

  step = jax.jit(step, donate_argnums=0)
  half = step(sharding.put_replicated(sharding.make_mesh(1), first))
  like = checkpoint.abstract(half, sharding.replicated(sharding.make_mesh(1)))
  older = with_one_optimiser_state(half)
  with Ladder(tmp_path) as ladder:
    ladder.checkpoints.save(1, older)
    ladder.checkpoints.wait()
  with Ladder(tmp_path) as ladder:
    restored = ladder.checkpoints.restore(like)
  assert restored.verified
  assert checkpoint.digest(restored.state) == checkpoint.digest(half)
  old_digest = checkpoint.digest(restored.state, old_paths=True)
  assert old_digest == checkpoint.digest(older) != checkpoint.digest(half)
  assert checkpoint.digest(step(restored.state)) == checkpoint.digest(step(half))


@pytest.mark.parametrize(
  ('now', 'before'),
  [
    ('opt.net.inner_state.trace.head.bias', 'opt.net.inner_state.trace.net.head.bias'),
    ('opt.centroids.inner_state.mu', 'opt.net.inner_state.mu.centroids'),
    ('opt.centroids.inner_state.count', 'opt.net.inner_state.count'),
    *[
      (same, same)
      for same in (
        'opt.net.inner_state.count',
        'opt.weight_net.inner_state.nu.hidden.bias',
        'opt.weight_net.inner_state.count',
        'params.net.head.bias',
        'memory.ema.sum.params.head.bias',
      )
    ],
  ],
)
def test_renamed_paths(now, before):
  assert old_path(now) == before


def test_leaves_missing_from_older_checkpoints_too_are_named(folder):
  other, message = target(), 'opt.net.inner_state.trace.kernel is absent there'
  trace = {'kernel': other.params['net']['kernel']}
  other.opt['net'] = {'inner_state': {'trace': trace}}
  with Ladder(folder) as ladder, pytest.raises(UserError, match=message):
    ladder.checkpoints.restore(other)
