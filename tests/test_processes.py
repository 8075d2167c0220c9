"""One run in two processes, with real `jax.distributed` on this machine."""

import json
import shutil
import signal
import time

import numpy as np
import pytest

from lt_jax.files import read_npz
from lt_jax.writers import read_rows
from tests import child, mini

BOTH = (0, 0)


def run(workdir, *overrides, faults=('', ''), **options):
  """Returns the exit codes and outputs of two processes with two devices each."""
  outputs = [workdir.parent / f'{workdir.name}.{i}.log' for i in range(2)]
  arguments = child.command(workdir, *overrides, **options)
  codes = child.run_together(arguments, outputs, faults)
  return tuple(codes), [output.read_text() for output in outputs]


def result(workdir):
  return json.loads((workdir / 'result.json').read_text())


def losses(workdir):
  rows = read_rows(workdir / 'metrics.jsonl')
  return {row['step']: row['loss'] for row in rows if row['split'] == 'train'}


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """The folder of the same run in one process with four devices."""
  workdir = tmp_path_factory.mktemp('alone') / 'run'
  output = workdir.parent / 'log'
  assert child.run(child.command(workdir), output, 'devices:4') == 0, output.read_text()
  return workdir


@pytest.fixture(scope='module')
def together(tmp_path_factory):
  """A run in two processes, on a mesh that lists their devices alternately.

  Process 1 is killed, meets a mistake after a second start, and ends after a third.

  Returns:
    The folder and, for each start, how long it took, the exit codes and the outputs.
  """
  workdir, starts = tmp_path_factory.mktemp('together') / 'run', []
  for fault in ('kill_at:32', 'mistake_at:46', ''):
    began = time.monotonic()
    faults = ('in_turns', '+'.join(filter(None, ['in_turns', fault])))
    starts.append((*run(workdir, faults=faults), time.monotonic() - began))
  return workdir, starts


def assert_same(workdir, alone):
  """Equal up to the order of sums across processes, an error that grows over time."""
  ours, theirs = losses(workdir), losses(alone)
  assert ours.keys() == theirs.keys()
  for step in ours:
    tolerance = 1e-5 if step <= 30 else 1e-2
    np.testing.assert_allclose(ours[step], theirs[step], tolerance, err_msg=str(step))
  ours, theirs = result(workdir)['test'], result(alone)['test']
  np.testing.assert_allclose(ours['loss'], theirs['loss'], rtol=1e-2)
  assert abs(ours['accuracy'] - theirs['accuracy']) <= 0.03


def test_two_processes_are_one_run(together, alone):
  workdir, (*_, (codes, words, _)) = together
  assert codes == BOTH, '\n'.join(words)
  assert_same(workdir, alone)
  ours, theirs = (read_npz(at / 'predictions.npz') for at in (workdir, alone))
  np.testing.assert_array_equal(ours['label'], theirs['label'])
  assert result(workdir)['device'].startswith('4 x')
  assert '4 x cpu' in words[0]
  assert 'step' not in words[1]  # process 0 prints and writes for all
  steps = [
    row['step']
    for row in read_rows(workdir / 'metrics.jsonl')
    if row['split'] == 'train'
  ]
  assert len(steps) == len(set(steps))


@pytest.mark.slow
def test_two_processes_are_one_run_of_two_domains_and_players(tmp_path):
  """Each has its share of both batches; they share one discriminator."""
  options = child.two_domains('dann')
  alone, workdir, output = tmp_path / 'alone', tmp_path / 'run', tmp_path / 'log'
  arguments = child.command(alone, **options)
  assert child.run(arguments, output, 'devices:4') == 0, output.read_text()
  codes, words = run(workdir, **options)
  assert codes == BOTH, '\n'.join(words)
  found = {}
  for at in (alone, workdir):
    rows = [r for r in read_rows(at / 'metrics.jsonl') if r['split'] == 'train']
    found[at] = [[r[k] for k in ('step', 'loss', 'domain_loss')] for r in rows]
  assert len(found[alone]) == 4
  np.testing.assert_allclose(found[workdir], found[alone], rtol=1e-3)
  ours, theirs = result(workdir)['domains'], result(alone)['domains']
  for name, domain in theirs.items():
    assert abs(ours[name]['accuracy'] - domain['accuracy']) <= 0.03


@pytest.mark.slow
def test_asking_one_process_stops_both_and_another_number_resumes(tmp_path, alone):
  workdir = tmp_path / 'run'
  codes, words = run(workdir, faults=('', 'term_at:32'))
  assert codes == (143, 143), '\n'.join(words)
  saved = {int(p.name) for p in (workdir / 'stages/train/checkpoints').glob('[0-9]*')}
  assert max(saved) == 35  # the next row of the log
  output = tmp_path / 'log'
  assert child.run(child.command(workdir), output) == 0, output.read_text()
  assert 'resuming from 35' in output.read_text()
  assert_same(workdir, alone)


def test_one_is_killed_and_the_other_ends(together):
  """Started again, they resume from what was saved, and end as an unbroken run."""
  _, ((codes, words, seconds), (_, again, _), _) = together
  assert codes[1] == -signal.SIGKILL
  assert codes[0] not in (0, 2, 3), words[0]  # a launcher runs it again
  assert seconds < 60
  assert 'resuming from 20 (verified)' in again[0]


@pytest.mark.slow
def test_one_hangs_and_the_other_gives_up(tmp_path):
  codes, words = run(tmp_path / 'run', faults=('give_up_after:5', 'hang_at:32'))
  assert codes[0] == 75
  assert codes[1] not in (0, 2, 3), words[1]  # it lost its peer and JAX ends it
  assert 'process 0 made no step for 5 s: another one is stuck' in words[0]
  assert 'most recent call first' in words[0]  # its stack traces


def test_other_data_in_one_process_are_rejected(tmp_path):
  codes, words = run(tmp_path / 'run', faults=('', 'other_data'))
  assert codes == (2, 2), '\n'.join(words)
  assert 'differ in config, data or seed' in words[1]
  assert not (tmp_path / 'run' / 'stages').exists()


def test_a_folder_that_is_not_shared_is_rejected(tmp_path, alone):
  (tmp_path / 'run.elsewhere').mkdir()
  # Left by an old run.
  shutil.copy(alone / 'config.json', tmp_path / 'run.elsewhere')
  codes, words = run(tmp_path / 'run', faults=('', 'elsewhere'))
  assert codes == (2, 2), '\n'.join(words)
  for text in words:
    assert 'the workdir must be one folder for all of them' in text
  assert not [*(tmp_path / 'run').glob('*.json')]  # nothing is in the way


@pytest.mark.slow
def test_a_damaged_image_of_either_process_is_reported(tmp_path):
  lists, root = mini.write_lists(tmp_path, np.random.default_rng(0))
  # Eleven of 1,015 are one too many. Each class keeps an image that replaces them.
  files = [
    root / f'train/n{label:08d}/train_{i}.JPEG'
    for label, damaged in enumerate((5, 4, 2))
    for i in range(damaged)
  ]
  for file in files:
    file.write_bytes(file.read_bytes()[:400])
  options = {
    'data.source': f'list:{lists}',
    'data.dir': root,
    'data.on_bad_image': 'skip',
    'data.image_size': 16,
    'data.resize': 18,
    'data.known_classes': 0,
    'data.profile': 'original',
    'data.test_per_class': 0,
    'data.val_per_class': 0,
    'data.meta_per_class': 0,
    'data.open_val_per_class': 0,
    'data.open_test_per_class': 0,
    'data.workers': 0,
    'select': 'last',
  }
  given = [f'--config.{key}={value}' for key, value in options.items()]
  codes, words = run(tmp_path / 'run', *given, config='digits_lt.py:ce,epochs=1')
  decoded = [
    row['image']
    for row in read_rows(tmp_path / 'run' / 'events.jsonl')
    if row['event'] == 'bad_image'
  ]
  assert codes == (2, 2), '\n'.join(words)
  assert sorted(decoded) == sorted(map(str, files))
  message = '11 images of train cannot be read, but at most 10 of 1015 may be replaced'
  assert all(message in text for text in words)


def test_a_mistake_in_one_process_ends_both(together):
  """It ends at once with its own code; the other one soon after, never successfully."""
  _, (_, (codes, words, seconds), _) = together
  assert codes[1] == 2 and 'error: bad.jpg: the file is empty' in words[1]
  assert codes[0] not in (0, 2, 3), words[0]
  assert seconds < 60


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_rejected(tmp_path):
  codes, words = run(tmp_path / 'run', '--config.batch=62')
  assert codes == (2, 2), '\n'.join(words)
  assert 'does not divide over 4 devices; the nearest that do: 60 or 64' in words[0]


@pytest.mark.slow
def test_later_stages_read_what_another_process_wrote(tmp_path):
  """Features in arrays.npz, class means, a selected State and its manifest."""
  config = 'digits_lt.py:fslwf,epochs=2'
  options = (
    '--config.stages.generator.streams.train.novel=4',
    '--config.stages.generator.streams.train.per_epoch=1',
    '--config.evaluate_every_epochs=1',
  )
  late = ('slow_manifest:1', '')
  codes, words = run(
    tmp_path / 'run', *options, config=config, fast=child.FAST[:1], faults=late
  )
  assert codes == BOTH, '\n'.join(words)
  assert result(tmp_path / 'run')['stage'] == 'novel'
