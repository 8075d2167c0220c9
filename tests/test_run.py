"""Runs of several stages, in their own processes, and the files they write."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest
from etils import epath

from lt_jax import build, checkpoint, report, results, train, trained
from lt_jax import run as run_module
from lt_jax.errors import UserError
from lt_jax.report import figures
from lt_jax.writers import read_rows
from tests import child, tiny
from tests.test_checkpoint import with_one_optimiser_state

TWO_STAGES = '''
from configs import digits_lt

def get_config(arg):
  """Trains, then goes on under the same clock, or starts the head afresh."""
  config = digits_lt.get_config('ce,epochs=20')
  surgeries = {
    'carry': (
      ('copy', {'pattern': '.*', 'stage': 'pretrain'}),
      ('carry', {'fields': ('opt', 'step'), 'stage': 'pretrain'}),
    ),
    'fresh': (('copy', {'pattern': 'net/trunk/.*', 'stage': 'pretrain'}),),
  }
  own_clock = {'schedule': {'name': 'constant', 'base': 0.1}}
  config.stages = {
    'pretrain': {'epochs': 8.0, **(own_clock if arg == 'fresh' else {})},
    'finetune': {'epochs': 20.0, 'surgeries': surgeries[arg]},
  }
  config.stage_order = ('pretrain', 'finetune')
  return config
'''


@pytest.fixture(scope='module')
def config_file(tmp_path_factory):
  path = tmp_path_factory.mktemp('config') / 'two_stages.py'
  path.write_text(TWO_STAGES)
  return path


def run(workdir, config, *overrides, fault=''):
  arguments = [f'--config={config}', f'--workdir={workdir}', *child.FAST, *overrides]
  output = workdir.parent / f'{workdir.name}.log'
  return child.run(arguments, output, fault), output.read_text()


def result(workdir):
  return json.loads((workdir / 'result.json').read_text())


@pytest.fixture(scope='module')
def carried(config_file, tmp_path_factory):
  """The folder of a run that was killed between its two stages, and started again."""
  workdir = tmp_path_factory.mktemp('carried') / 'run'
  config = f'{config_file}:carry'
  assert run(workdir, config, fault='kill_between_stages')[0] == -signal.SIGKILL
  code, output = run(workdir, config)
  assert code == 0, output
  assert 'stage pretrain: 29 steps' in output and 'resuming from 29' in output
  return workdir


def test_carried_stages_continue_as_one_run(carried, tmp_path):
  """Pre-training and continuing equals one stage: optimiser, clock and order."""
  workdir = tmp_path / 'run'
  one_stage = f'{child.ROOT}/configs/digits_lt.py:ce,epochs=20'
  code, output = run(workdir, one_stage)
  assert code == 0, output
  assert result(workdir)['state_sha256'] == result(carried)['state_sha256']
  rows = read_rows(carried / 'metrics.jsonl')
  assert {row['stage'] for row in rows} == {'pretrain', 'finetune'}
  assert [r['step'] for r in rows if r['stage'] == 'finetune'][0] > 29


@pytest.mark.slow  # tests/test_surgery.py checks what each surgery leaves
def test_leaves_not_carried_are_fresh(config_file, carried, tmp_path):
  workdir = tmp_path / 'run'
  code, output = run(workdir, f'{config_file}:fresh')
  assert code == 0, output
  assert result(workdir)['step'] == 71
  rows = read_rows(workdir / 'metrics.jsonl')
  assert [r['step'] for r in rows if r['stage'] == 'finetune'][0] == 5
  assert result(workdir)['state_sha256'] != result(carried)['state_sha256']


@pytest.mark.slow
def test_killed_in_the_second_stage(config_file, carried, tmp_path):
  workdir = tmp_path / 'run'
  fault = 'kill_at:45'
  assert run(workdir, f'{config_file}:carry', fault=fault)[0] == -signal.SIGKILL
  code, output = run(workdir, f'{config_file}:carry')
  assert code == 0, output
  assert 'stage pretrain: 29 steps' in output and 'resuming from 29' in output
  assert result(workdir)['state_sha256'] == result(carried)['state_sha256']


def test_a_run_leaves_everything_behind(carried):
  found = {path.name for path in carried.iterdir()}
  assert found >= {
    'config.json',
    'data.json',
    'metrics.jsonl',
    'events.jsonl',
    'tensorboard',
    'stages',
    'predictions.npz',
    'features.npz',
    'samples.npz',
    'result.json',
  }
  data = json.loads((carried / 'data.json').read_text())
  assert data['counts']['train'] == [90, 55, 34, 20, 12, 7, 4, 3]
  assert data['counts']['test'] == [50] * 8
  assert data['open_images'] == {'open_val': 40, 'open_test': 100}
  assert data['threshold']['chosen_by'].startswith('f_measure')
  found = result(carried)
  with np.load(carried / 'predictions.npz') as predictions:
    right = predictions['logits'].argmax(1) == predictions['label']
    assert predictions['logits'].dtype == np.float16
  assert right.mean() == pytest.approx(found['test']['accuracy'], abs=0.01)
  with np.load(carried / 'features.npz') as features:
    assert len(features['features']) == 400 and len(features['centroids']) == 8
  with np.load(carried / 'samples.npz') as samples:
    assert (samples['label'] != samples['prediction']).all()
    assert samples['image'].dtype == np.uint8
  assert found['best_on_test']['accuracy'] >= found['test']['accuracy'] - 1e-6
  assert {'jax', 'python', 'lt_jax'} <= found['versions'].keys()


def test_wall_time_is_that_of_all_starts(carried):
  rows = [
    ('started', 10.0),
    ('saved', 14.0),
    ('started', 100.0),  # killed before it logged anything
    ('started', 200.0),
    ('finished', 203.0),
    ('started', 300.0),
    ('saved', 301.0),
  ]
  events = [{'event': event, 'time': time} for event, time in rows]
  assert results.seconds_of_earlier_starts(events) == 7
  assert results.seconds_of_earlier_starts(events[:2]) == 0
  before = results.seconds_of_earlier_starts(read_rows(carried / 'events.jsonl'))
  assert before > 0
  assert result(carried)['wall_seconds'] > before - 0.05  # it is rounded


def test_selection_on_validation_data_feeds_the_result(tmp_path):
  workdir = tmp_path / 'run'
  config = f'{child.ROOT}/configs/digits_lt.py:ce,epochs=20'
  select = '--config.select=val/accuracy'
  code, output = run(workdir, config, select, '--config.evaluate_every_epochs=2')
  assert code == 0, output
  rows = [r for r in read_rows(workdir / 'metrics.jsonl') if r['split'] == 'val']
  best = max(rows, key=lambda row: row['accuracy'])  # max keeps the earlier of ties
  assert result(workdir)['step'] == best['step']
  assert result(workdir)['val']['accuracy'] == pytest.approx(best['accuracy'])
  log = tmp_path / 'evaluate.log'
  for which, step in (('best', best['step']), ('last', 71)):
    arguments = [f'--workdir={workdir}', f'--which={which}']
    assert child.run(arguments, log, module='lt_jax.evaluate') == 0, log.read_text()
    assert 'images: normalised as' not in log.read_text()  # there is only one domain
    assert f', checkpoint of step {step} (' in log.read_text()
    assert log.read_text().splitlines()[-1] == f'file: {workdir}/evaluation.json'
    evaluation = json.loads((workdir / 'evaluation.json').read_text())
    assert evaluation['step'] == step and evaluation['verified']
    if which == 'best':
      assert evaluation['test'] == result(workdir)['test']


def test_a_stop_in_the_only_evaluation_still_selects(tmp_path):
  workdir = tmp_path / 'run'
  config = f'{child.ROOT}/configs/digits_lt.py:ce,epochs=20'
  once = ('--config.select=val/loss', '--config.evaluate_every_epochs=20')
  assert run(workdir, config, *once, fault='term_in_evaluation:75')[0] == 143
  code, output = run(workdir, config, *once)
  assert code == 0, output
  manifest = workdir / 'stages' / 'train' / 'checkpoints' / 'manifests' / 'best.json'
  value = json.loads(manifest.read_text())['value']
  assert value == pytest.approx(-result(workdir)['val']['loss'])  # less is better


def test_averaged_weights_and_a_stage_without_steps(tmp_path):
  """Neither the average of the first stage nor random values leak into the second."""
  config = tmp_path / 'ema.py'
  config.write_text(
    'from configs import digits_lt\n'
    'def get_config(arg=None):\n'
    "  config = digits_lt.get_config('logit_adjust_posthoc,epochs=20')\n"
    "  config.wrappers = {'ema': {'decay': 0.5}}\n"
    '  return config\n'
  )
  workdir = tmp_path / 'run'
  code, output = run(workdir, config)
  assert code == 0, output
  rows = [r for r in read_rows(workdir / 'metrics.jsonl') if r['split'] == 'test']
  assert result(workdir)['test']['accuracy'] > rows[-1]['accuracy'] - 0.1
  log = tmp_path / 'log'
  arguments = [f'--workdir={workdir}', '--stage=train']
  assert child.run(arguments, log, module='lt_jax.evaluate') == 0, log.read_text()
  evaluation = json.loads((workdir / 'evaluation.json').read_text())
  assert evaluation['test']['accuracy'] == pytest.approx(rows[-1]['accuracy'])


def test_no_state_is_chosen_on_the_test_set(tmp_path):
  config = f'{child.ROOT}/configs/digits_lt.py:ce,epochs=20'
  select = '--config.select=test/accuracy'
  code, output = run(tmp_path / 'run', config, select)
  assert code == 2 and 'never chosen on a test set' in output


def test_a_profile_is_recorded_on_request(tmp_path):
  config = f'{child.ROOT}/configs/digits_lt.py:ce,epochs=20'
  wanted = '--profile_steps=4,8'
  code, output = run(tmp_path / 'run', config, wanted, fault='term_at:10')
  assert code == 143, output
  assert list((tmp_path / 'run').glob('stages/train/profile/**/*.xplane.pb'))


def test_cifar10_pool_trains(cifar10_npz, tmp_path):
  """Real images: one epoch of a small network with the config's settings."""
  arg = 'ldam_drw,imbalance=100,net=resnet8,epochs=0.2'
  config = f'{child.ROOT}/configs/cifar10_lt.py:{arg}'
  source = (f'--config.data.source=npz:{cifar10_npz}', '--config.data.subset=stored')
  arguments = [f'--config={config}', f'--workdir={tmp_path / "run"}', *source]
  code = child.run(arguments, tmp_path / 'log')
  assert code == 0, (tmp_path / 'log').read_text()
  data = json.loads((tmp_path / 'run' / 'data.json').read_text())
  assert sum(data['counts']['train']) == 12406


META = f'{child.ROOT}/configs/digits_lt.py:meta_ce,epochs=20'


@pytest.fixture(scope='module')
def learned(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('learned') / 'run'
  code, output = run(workdir, META)
  assert code == 0, output
  return workdir


def test_learned_weights_are_reported_and_drawn(learned):
  with np.load(learned / 'weights.npz') as stored:
    found = dict(stored)
  rows = [r for r in read_rows(learned / 'metrics.jsonl') if 'meta_loss' in r]
  assert found['step'].tolist() == [r['step'] for r in rows]
  assert found['counts'].tolist() == [90, 55, 34, 20, 12, 7, 4, 3]
  for name in ('prior', 'mean', 'spread', 'negative', 'ratio'):
    assert found[name].shape == (len(rows), 8)
  seen = np.isfinite(found['mean'])
  assert seen.any(axis=0).all()
  np.testing.assert_allclose(
    found['ratio'][seen], (found['mean'] / found['prior'])[seen]
  )
  assert (found['spread'][seen] >= 0).all() and found['spread'][seen].max() > 0


def test_a_run_has_its_report(learned):
  assert str(report.write(learned)) == f'{learned}/report.html'
  drawn = {path.stem for path in (learned / 'figures').iterdir()}
  assert drawn == {*figures.FIGURES, *figures.OF_ONE_RUN}


@pytest.mark.slow
def test_a_kill_while_weights_are_learned_ends_in_the_same_run(learned, tmp_path):
  workdir = tmp_path / 'run'
  assert run(workdir, META, fault='kill_at:66')[0] == -signal.SIGKILL
  code, output = run(workdir, META)
  assert code == 0, output
  assert result(workdir)['state_sha256'] == result(learned)['state_sha256']
  with (
    np.load(workdir / 'weights.npz') as ours,
    np.load(learned / 'weights.npz') as theirs,
  ):
    for name in theirs.files:
      np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.fixture(scope='module')
def two_trainings(tmp_path_factory):
  """Returns (config, workdir) of a finished run, and its stages' initial States."""
  folder = tmp_path_factory.mktemp('crt')
  config = tiny.config(tiny.write_npz(folder / 'tiny.npz'), 'crt', epochs=2.0)
  begun, real = [], train.train

  def spy(method, streams, state, **rest):
    begun.append(jax.device_get(state))
    return real(method, streams, state, **rest)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, 'train', spy)
    run_module.run(config, folder / 'run')
  return config, folder / 'run', begun


def test_a_retrained_classifier_starts_from_other_weights(two_trainings):
  _, _, (first, second) = two_trainings
  one, other = (np.asarray(s.params['net']['head']['kernel']) for s in (first, second))
  assert one.shape == other.shape and (one != other).all()
  np.testing.assert_array_equal(
    *(jax.random.key_data(s.key) for s in (first, second))  # for augmentation
  )


def test_a_stage_resumes_only_from_the_states_it_started_with(two_trainings):
  """If the first training is extended, the second is not silently the old one."""
  config, workdir, _ = two_trainings
  before = (workdir / 'result.json').read_bytes()
  longer = {**config, 'epochs': 4.0}
  with pytest.raises(UserError, match=r"'classifier' started from another .*delete"):
    run_module.run(longer, workdir, allow_config_change=True)
  assert (workdir / 'result.json').read_bytes() == before
  shutil.rmtree(workdir / 'stages' / 'classifier')
  run_module.run(longer, workdir, allow_config_change=True)
  assert (workdir / 'result.json').read_bytes() != before


def test_a_run_from_before_paths_were_renamed_resumes(two_trainings, tmp_path):
  """Its stages still started from the States they say they started from."""
  _, workdir, _ = two_trainings
  older = epath.Path(shutil.copytree(workdir, tmp_path / 'run'))
  config = trained.read_config(older)
  experiment, begun_from = build.build(config), {}
  for name, stage in experiment.stages.items():
    found = trained.restore(older, stage, experiment.mesh, 'last')
    state = with_one_optimiser_state(found.state)
    folder = older / 'stages' / name / 'checkpoints'
    folder.rmtree()
    ladder = checkpoint.Checkpoints(folder)
    ladder.save(found.step, state, first=0, begun_from=begun_from)
    ladder.close()
    begun_from = {**begun_from, name: checkpoint.digest(state)[:16]}
  before = result(workdir)['state_sha256']
  assert run_module.run(config, older)['state_sha256'] == before
