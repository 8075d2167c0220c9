"""Faults injected into real runs of the command line, each in its own process.

The numbers F1 to F24 refer to the list in docs/reliability.md.
"""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath

from lt_jax import files
from lt_jax import run as run_module
from lt_jax.errors import UserError
from lt_jax.writers import JsonLines, read_rows
from tests import child

KILLED, TERMINATED = -signal.SIGKILL, 143
TIMING = ('images_per_second',)


def rows(workdir):
  """The metric rows of a run, without timing."""
  return [
    {k: v for k, v in row.items() if k not in TIMING}
    for row in read_rows(workdir / 'metrics.jsonl')
  ]


def result(workdir):
  return json.loads((workdir / 'result.json').read_text())


def events(workdir, name):
  return [r for r in read_rows(workdir / 'events.jsonl') if r['event'] == name]


def run(workdir, *overrides, fault='', output=None, **options):
  """Runs the command; returns its exit code and what it printed."""
  output = output or workdir.parent / f'{workdir.name}.log'
  code = child.run(child.command(workdir, *overrides, **options), output, fault)
  return code, output.read_text()


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
  """The folder of a run without any fault; the command got a relative path of it."""
  workdir = tmp_path_factory.mktemp('unbroken') / 'run'
  arguments = child.command(os.path.relpath(workdir, child.ROOT))
  code = child.run(arguments, workdir.parent / 'log')
  assert code == 0, (workdir.parent / 'log').read_text()
  return workdir


def assert_same_run(workdir, unbroken):
  assert result(workdir)['state_sha256'] == result(unbroken)['state_sha256']
  assert rows(workdir) == rows(unbroken)
  for path in (unbroken / 'stages' / 'train' / 'metrics').iterdir():
    here = workdir / 'stages' / 'train' / 'metrics' / path.name
    with np.load(path) as expected, np.load(here) as found:
      for name in expected.files:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.slow
def test_kill_9_by_the_shell_at_three_random_moments(tmp_path, unbroken):
  """F1: the command itself is killed from outside and started again."""
  workdir = tmp_path / 'run'
  command = [sys.executable, '-m', 'lt_jax.main', *child.command(workdir)]
  ends = []
  for wanted in sorted(random.sample(range(1, 66), 3)):  # no seed: any moment is fine
    process = subprocess.Popen(
      command,
      cwd=child.ROOT,
      env=os.environ | child.environment(),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    while process.poll() is None:
      if max((row['step'] for row in _rows_so_far(workdir)), default=0) >= wanted:
        process.kill()
      time.sleep(0.002)
    ends.append(process.returncode)
  assert KILLED in ends and set(ends) <= {KILLED, 0}, ends
  code, output = run(workdir)
  assert code == 0, output
  assert_same_run(workdir, unbroken)


def _rows_so_far(workdir):
  try:
    return read_rows(workdir / 'metrics.jsonl')
  except FileNotFoundError:
    return []


ONE_AFTER_ANOTHER = (
  ('term_while_compiling', TERMINATED, 'fresh start'),
  ('kill_in_save:1', KILLED, ''),
  ('kill_between:2', KILLED, ''),
  ('kill_at:31', KILLED, 'resuming from 20 (verified)'),
  ('file_size:9000', 75, 'could not be written'),
  ('term_at:45', TERMINATED, 'resuming from 20 (verified)'),
  ('', 0, 'resuming from 45 (verified)'),
)
"""(fault, exit code, what is printed) of each start of one run."""


def test_one_fault_after_another_ends_in_the_same_run(tmp_path, unbroken):
  """F1, F2, F3, F4, F8; alone, most of these faults are slow tests."""
  workdir = tmp_path / 'run'
  for fault, expected, printed in ONE_AFTER_ANOTHER:
    code, output = run(workdir, fault=fault)
    assert code == expected and printed in output, (fault, code, output)
    assert 'Traceback' not in output
    if fault.startswith('file_size'):
      last = output.splitlines()[-1]
      assert last.startswith('error: ') and str(workdir) in last
      read_rows(workdir / 'metrics.jsonl')  # whole lines
  assert_same_run(workdir, unbroken)
  rejected = events(workdir, 'checkpoint_rejected')
  assert 'no manifest' in rejected[0]['reason']


@pytest.mark.slow
@pytest.mark.parametrize(
  'fault',
  [
    'kill_at:31',
    'kill_in_save:1',
    'kill_in_save:2',
    'kill_between:2',
    'kill_in_evaluation:40',
    'kill_in_evaluation:81',
  ],
)
def test_kill_9_anywhere_ends_in_the_same_run(tmp_path, unbroken, fault):
  """F1, F2, F3."""
  workdir = tmp_path / 'run'
  assert run(workdir, fault=fault)[0] == KILLED
  code, output = run(workdir)
  assert code == 0, output
  assert_same_run(workdir, unbroken)
  if fault.startswith('kill_between'):
    assert 'no manifest' in events(workdir, 'checkpoint_rejected')[0]['reason']


@pytest.mark.slow  # tests/test_segmentation_recipes.py resumes one in this process
@pytest.mark.parametrize(
  ('recipe', 'fault', 'overrides'),
  [
    ('dann', 'kill_in_save:2', ()),
    ('cdan', 'kill_in_save:2', ('--config.method.largest=8',)),
    ('mcd', 'kill_in_save:2', ()),
    ('adda', 'kill_in_save:4', ()),  # second stage
    ('ocda', 'kill_in_save:9', ()),  # the last one
  ],
)
def test_kill_9_in_a_run_of_two_domains_and_players(tmp_path, recipe, fault, overrides):
  """F1: two streams, two optimisers, and arrays that a method draws once."""
  options = child.two_domains(recipe)
  unbroken, workdir = tmp_path / 'unbroken', tmp_path / 'run'
  code, output = run(unbroken, *overrides, **options)
  assert code == 0, output
  assert run(workdir, *overrides, fault=fault, **options)[0] == KILLED
  code, output = run(workdir, *overrides, **options)
  assert code == 0 and 'resuming from 10' in output, output
  assert result(workdir)['state_sha256'] == result(unbroken)['state_sha256']
  assert rows(workdir) == rows(unbroken)


@pytest.mark.slow
def test_kill_9_in_and_around_saves_at_eight_random_times(tmp_path, unbroken):
  """F2: each start dies up to 0.2 s after its first save begins."""
  workdir = tmp_path / 'run'
  codes = []
  for _ in range(8):  # no seed: any moment is fine
    codes.append(run(workdir, fault=f'kill_after_save:{random.uniform(0, 0.2)}')[0])
  assert KILLED in codes and set(codes) <= {KILLED, 0}, codes
  code, output = run(workdir)
  assert code == 0, output
  assert_same_run(workdir, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(
  'fault',
  [
    'term_at:31',
    'hup_at:8',
    'usr1_at:8',
    'term_twice_at:31',
    'term_in_evaluation:40',
    'term_in_evaluation:81',
    'term_while_compiling',
  ],
)
def test_a_signal_saves_and_the_run_resumes(tmp_path, unbroken, fault):
  """F4."""
  workdir = tmp_path / 'run'
  began = time.monotonic()
  code, output = run(workdir, fault=fault)
  assert code == TERMINATED, output
  assert time.monotonic() - began < 60
  code, output = run(workdir)
  assert code == 0, output
  assert 'resuming from' in output or fault == 'term_while_compiling'
  assert_same_run(workdir, unbroken)


def test_a_folder_that_cannot_be_written_is_reported_before_compiling(tmp_path):
  """F9: there is a file where the folder should be."""
  (tmp_path / 'file').write_text('')
  code, output = run(tmp_path / 'file' / 'run', output=tmp_path / 'log')
  assert code == 2
  assert 'cannot be written' in output and 'first step after' not in output


@pytest.mark.parametrize(
  'devices',
  [
    pytest.param(2, marks=pytest.mark.slow),
    4,  # for which tests/test_processes.py compiles the same programs
    pytest.param(8, marks=pytest.mark.slow),
  ],
)
def test_a_run_resumes_on_other_devices(tmp_path, unbroken, devices):
  """F10: started on one device; equal up to rounding, with the same order of images."""
  workdir = tmp_path / 'run'
  assert run(workdir, fault='kill_at:40')[0] == KILLED
  code, output = run(workdir, fault=f'devices:{devices}')
  assert code == 0, output
  assert 'resuming from 20 (verified)' in output
  for ours, theirs in zip(rows(workdir), rows(unbroken), strict=True):
    assert ours['step'] == theirs['step']
    if ours['split'] == 'train':
      np.testing.assert_allclose(ours['loss'], theirs['loss'], rtol=2e-2)


def test_another_config_is_rejected_by_key(tmp_path, unbroken):
  """F11."""
  workdir = shutil.copytree(unbroken, tmp_path / 'run')
  change = ('--config.schedule.base=0.5', '--config.optimizer.momentum=0.5')
  code, output = run(workdir, *change)
  assert code == 2
  assert 'schedule.base was 0.05 and is 0.5' in output
  assert 'optimizer.momentum was 0.9 and is 0.5' in output
  assert output.endswith('; give another workdir, or --allow_config_change\n')
  code, output = run(workdir, '--config.keep_checkpoints=5')  # makes no difference
  assert code == 0, output
  assert_same_run(workdir, unbroken)  # a finished run is not changed either
  (workdir / 'error.json').write_text('{}')  # left by a sweep; a new start removes it
  changed = ('--config.seed=1', '--allow_config_change')
  assert run(workdir, *changed, fault='kill_in_evaluation:1')[0] == KILLED
  assert not (workdir / 'result.json').exists()
  assert not (workdir / 'error.json').exists()
  code, output = run(workdir, *changed)
  assert code == 0 and result(workdir)['seed'] == 1
  before = contents(workdir)
  wider = ('--config.model.trunk=digits_cnn', '--allow_config_change')
  code, output = run(workdir, *wider)
  assert code == 2 and 'another network' in output
  assert contents(workdir) == before


def contents(workdir):
  """Returns name -> contents of what a run trained and found."""
  kept = ('config.json', 'data.json', 'result.json', 'metrics.jsonl')
  files = [*map(workdir.joinpath, kept), *workdir.glob('stages/**/*')]
  return {str(path): path.read_bytes() for path in files if path.is_file()}


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('data.known_classes', 7, 'data.known_classes was 8 and is 7'),
    ('model.trunk', 'digits_cnn', 'model.trunk was .tiny_cnn. and is .digits_cnn.'),
    ('optimizer.momentum', 0.5, 'optimizer.momentum was 0.9 and is 0.5'),
    ('epochs', 30.0, 'epochs was 20.0 and is 30.0'),
    ('schedule.boundaries', [1, 2], 'schedule.boundaries'),
  ],
)
def test_no_change_that_matters_goes_unnoticed(unbroken, key, value, message):
  """F11: classes, network, optimiser, lengths."""
  made = place = files.read_json(unbroken / 'config.json')
  run_module.check_config(made, epath.Path(unbroken))
  *above, last = key.split('.')
  for name in above:
    place = place[name]
  place[last] = value
  with pytest.raises(run_module.OtherConfig, match=message):
    run_module.check_config(made, epath.Path(unbroken))


INTERRUPTED = """
import os, signal
from lt_jax import commands

def command():
  print('at work')
  os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
commands.exit_code(command)
"""


def test_ctrl_c_is_one_line():
  command = [sys.executable, '-c', INTERRUPTED]
  done = subprocess.run(command, cwd=child.ROOT, capture_output=True, text=True)
  expected = (130, 'at work\n', 'error: interrupted; saved files are intact\n')
  assert (done.returncode, done.stdout, done.stderr) == expected


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
  def full(number):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match='No space left'):
    files.write_atomically(tmp_path / 'a.json', '{}')
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize('name', ['a\\b', os.fsdecode(b'a\xff')])
def test_a_folder_that_checkpoints_cannot_have(tmp_path, name):
  with pytest.raises(UserError, match='checkpoints cannot be stored there'):
    files.make_workdir(tmp_path / name)


def test_a_mistake_does_not_stand_in_the_way_of_the_corrected_command(tmp_path):
  workdir = tmp_path / 'run'
  for mistake in (
    '--config.optimizer.weight_decay=(("net/nix", 0.1),)',
    '--config.model.dtype=float33',
    '--config.select=val/loss_of_life',
  ):
    code, output = run(workdir, mistake)
    assert code == 2, output
    assert 'Traceback' not in output
  code, output = run(workdir, fault='term_at:2')
  assert code == TERMINATED, output
  assert (workdir / 'stages/train/checkpoints/2').exists()


def test_a_folder_in_use_is_rejected_and_a_dead_owner_is_not_in_the_way(tmp_path):
  """F12."""
  with (
    files.locked(tmp_path),
    pytest.raises(UserError, match=f'in use by process {os.getpid()}'),
    files.locked(tmp_path),
  ):
    pass
  with files.locked(tmp_path):
    pass
  code, output = None, ''
  with files.locked(files.make_workdir(tmp_path / 'run')):
    code, output = run(tmp_path / 'run')
  assert code == 2 and 'in use by process' in output


@pytest.mark.slow  # tests/test_posthoc.py ends such a pass in this process
def test_a_signal_in_the_pass_of_a_surgery(tmp_path):
  """F4: the run does not wait for the pass to end."""
  options = {'config': 'digits_lt.py:ncm,epochs=4', 'fast': child.FAST[:1]}
  workdir = tmp_path / 'run'
  arguments = child.command(workdir, **options)
  code = child.run(arguments, tmp_path / 'log', 'term_in_surgery')
  assert code == TERMINATED, (tmp_path / 'log').read_text()
  assert (workdir / 'stages/train/checkpoints').exists()
  assert not (workdir / 'stages/ncm').exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
  def refuse(*args):
    raise OSError(errno.ENOLCK, 'no locks available')

  monkeypatch.setattr('fcntl.flock', refuse)
  with files.locked(tmp_path):
    assert 'a file system without locks: do not start two runs' in (
      capsys.readouterr().err
    )


@pytest.mark.parametrize(
  ('fault', 'overrides'),
  [
    ('nan_at:23', ()),
    pytest.param('', ('--config.schedule.base=1e20',), marks=pytest.mark.slow),
  ],
)
def test_divergence_stops_the_run_before_anything_is_saved(tmp_path, fault, overrides):
  """F13."""
  workdir = tmp_path / 'run'
  code, output = run(workdir, *overrides, fault=fault)
  assert code == 3, output
  assert re.search(
    r'error: diverged: not finite at step \d+; that step was not saved, and the same '
    r'command would diverge again: change the config, in another workdir or with '
    r'--allow_config_change$',
    output.strip(),
  )
  folder = workdir / 'stages' / 'train'
  report = json.loads((folder / 'not_finite.json').read_text())
  if fault:
    assert report['step'] == 23
    assert len(report['examples']['train']['index']) == 64
    assert sorted(os.listdir(folder / 'checkpoints' / 'manifests')) == ['20.json']
  else:
    assert not (folder / 'checkpoints' / 'manifests').exists()


def test_a_class_without_images_is_reported(tmp_path):
  """F18: the training counts are of n_max = 90 at imbalance 1000."""
  code, output = run(
    tmp_path / 'run', config='digits_lt.py:balanced_softmax,imbalance=1000,epochs=20'
  )
  assert code == 2
  assert 'class 5 without images' in output


def test_data_that_changed_are_rejected(tmp_path, unbroken):
  """F20; tests/test_sources.py checks that a fingerprint sees every change."""
  workdir = shutil.copytree(unbroken, tmp_path / 'run')
  code, output = run(workdir, fault='other_data')
  assert code == 2 and 'data have changed' in output
  assert_same_run(workdir, unbroken)


def test_a_torn_last_line_is_dropped_and_nothing_is_written_twice(tmp_path):
  """F24."""
  path = tmp_path / 'metrics.jsonl'
  rows = [{'stage': 'train', 'split': 'train', 'step': step} for step in (1, 2, 3)]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows) + '{"st')
  assert read_rows(path) == rows
  lines = JsonLines(path, keep=lambda row: row['step'] <= 2)
  lines.append({**rows[2], 'loss': float('nan')})
  assert read_rows(path) == [*rows[:2], {**rows[2], 'loss': None}]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('--config.epoch=3',), "unknown config key epoch; did you mean 'epochs'"),
    (('--config.data.sourse=digits',), "data.sourse; did you mean 'source'"),
    (('--config.loss.name=ladm',), "unknown loss 'ladm'; did you mean 'ldam'"),
    (('--config.data.source=npz:/nowhere/x.npz',), '/nowhere/x.npz'),
    (('--config.data.n_max=900',), 'class 0'),
    (('--config.data.image_size=6',), "the images of 'digits' are in memory"),
    (('--config.device=tpu',), "config.device is 'tpu'"),
    (('--confg=x',), 'Did you mean'),
  ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, arguments, message):
  code, output = run(tmp_path / 'run', *arguments)
  assert code == 2
  errors = [line for line in output.splitlines() if line.startswith('error: ')]
  assert len(errors) == 1 and message in errors[0]
  assert 'Traceback' not in output
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_an_unknown_method_is_reported_with_the_near_miss(tmp_path):
  code, output = run(tmp_path / 'run', config='digits_lt.py:ldam_drx')
  assert code == 2 and "unknown recipe 'ldam_drx'; did you mean 'ldam_drw'" in output
