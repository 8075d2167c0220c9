"""Damage to a run's files is repaired, reported or rejected, with no traceback."""

import functools
import io
import json
import os
import pathlib
import re
import shutil
import signal

import numpy as np
import pytest
from etils import epath
from PIL import Image

from lt_jax import (
  build,
  commands,
  evaluate,
  export,
  files,
  predict,
  provenance,
  report,
  run,
  stopping,
  train,
  trained,
)
from lt_jax.config import ADDED, RENAMED
from lt_jax.errors import UserError
from lt_jax.report import figures, runs
from lt_jax.screen import Screen
from lt_jax.writers import read_rows
from tests import tiny

pytestmark = pytest.mark.usefixtures('one_device')


class Built:
  """A finished run of two stages that select their States, and its config."""

  def __init__(self, folder):
    Image.new('L', (8, 8), 90).save(folder / 'image.png')
    npz = tiny.write_npz(folder / 'tiny.npz', (12, 12, 12, 12))
    often = {'log_every_steps': 2, 'save_every_epochs': 2.0, 'select': 'val/loss'}
    self.config = tiny.config(npz, 'crt,epochs=4.0', **often)
    self.config['data']['val_per_class'] = 2
    self.folder, self.image = folder / 'run', str(folder / 'image.png')
    self.result = run.run(self.config, self.folder)

  def copy(self, path):
    return pathlib.Path(shutil.copytree(self.folder, path))

  def main(self, workdir):
    """Runs the command again; its State must be the same."""
    assert run.run(self.config, workdir)['state_sha256'] == self.result['state_sha256']

  def evaluate(self, workdir):
    for which in ('last', 'best'):
      evaluate.evaluate(epath.Path(workdir), which=which)

  def report(self, workdir):
    report.write(workdir)

  def predict(self, workdir):
    out = workdir.parent / 'out.csv'
    predict.predict(epath.Path(workdir), [self.image], str(out))

  def export(self, workdir):
    out = workdir.parent / 'out.safetensors'
    export.export(epath.Path(workdir), 'safetensors', out)


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """The run; whatever a config builds is built and compiled only once."""
  with pytest.MonkeyPatch.context() as patch:
    for module, name in ((run, 'build'), (build, 'build'), (run, 'rehearsed')):
      patch.setattr(module, name, _once(getattr(module, name)))
    patch.setattr(trained, 'build_without_data', _once(trained.build_without_data))
    patch.setattr(figures, 'FIGURES', {})
    patch.setattr(figures, 'OF_ONE_RUN', {})
    yield Built(tmp_path_factory.mktemp('damage'))


def _once(make):
  """Returns a cached version of a function, keyed by config."""
  made = {}

  @functools.wraps(make)
  def wrapped(config, *rest, **options):
    plain = [v for v in (*rest, *options.values()) if isinstance(v, dict | int)]
    key = json.dumps([config, plain], sort_keys=True, default=str)
    if key not in made:
      made[key] = make(config, *rest, **options)
    return made[key]

  return wrapped


def damages(path, every_key):
  """Yields (description, bytes) for damaged versions of a file; JSON keys change too.

  Args:
    path: path of the file.
    every_key: whether to change each key or only one.
  """
  data = path.read_bytes()
  middle = len(data) // 2
  yield 'truncate', data[:middle]
  yield 'empty', b''
  if data:
    yield 'flip', data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
  if path.suffix in ('.json', '.jsonl'):
    *before, last = (
      data.decode().strip().split('\n') if path.suffix == '.jsonl' else [data]
    )
    content, head = json.loads(last), '\n'.join([*before, ''])
    named = sorted(content) if isinstance(content, dict) else []
    keys = named[:: 1 if every_key else len(named) - 1]
    for key in keys:
      for what, made in (('rename', _renamed), ('retype', _retyped)):
        yield f'{what} {key}', (head + json.dumps(made(content, key)) + '\n').encode()
  if path.suffix == '.npz':
    content = dict(np.load(path))
    for key in sorted(content)[: None if every_key else 1]:
      text = {key: content[key].astype(str)}
      for what, made in (
        ('rename', _renamed(content, key)),
        ('retype', content | text),
      ):
        buffer = io.BytesIO()
        np.savez(buffer, **made)
        yield f'{what} {key}', buffer.getvalue()


def _renamed(content, key):
  return {(f'x{k[1:]}' if k == key else k): value for k, value in content.items()}


def _retyped(content, key):
  return content | {key: 5 if isinstance(content[key], str | list | dict) else 'five'}


KINDS = (
  r'(config|data|result)\.json',
  r'(events|metrics)\.jsonl',
  r'(predictions|features|samples)\.npz',
  r'stages/\w+/metrics/\w+\.npz',
  r'stages/\w+/parameters\.json',
  r'stages/\w+/checkpoints/manifests/(\d+|best)\.json',
  r'stages/\w+/checkpoints/(best/)?\d+/.*',
  r'tensorboard/\w+/events\.out\.tfevents\..*',
  'lock',
)
"""Files of a run; the suite damages one of each kind, `slow` tests all of them."""


def test_all_files_of_a_run_are_known(built):
  found = [str(p.relative_to(built.folder)) for p in _all_files(built.folder)]
  assert all(any(re.fullmatch(kind, name) for kind in KINDS) for name in found)


def _all_files(folder):
  return sorted(path for path in folder.rglob('*') if path.is_file())


def check(act, workdir):
  """Runs a command on a damaged folder: it succeeds, or gives one line and code 2."""
  try:
    act(workdir)
  except Exception as error:
    assert commands.explained(error) is not None, repr(error)
    message, code = commands.explained(error)
    assert code == 2 and '\n' not in message, message
    assert str(workdir) in message or '.json' in message, message


IN_SUITE = {
  'config.json': ('main', 'report'),
  'data.json': ('predict',),
  'result.json': ('report', 'predict'),
  'events.jsonl': ('main',),
  'metrics.jsonl': ('main',),
  'samples.npz': ('report',),
  'stages/train/metrics/class_loss.npz': ('main',),
  'stages/classifier/checkpoints/manifests/3.json': ('main',),
  'stages/classifier/checkpoints/manifests/best.json': ('main',),
  'stages/classifier/checkpoints/3/_METADATA': ('main',),
}


@pytest.mark.parametrize('name', IN_SUITE)
def test_damage_is_reported(built, tmp_path, name):
  for number, (what, data) in enumerate(damages(built.folder / name, False)):
    print(name, what)
    for command in IN_SUITE[name]:
      workdir = built.copy(tmp_path / f'{command}{number}')
      (workdir / name).write_bytes(data)
      check(getattr(built, command), workdir)


@pytest.mark.slow
@pytest.mark.parametrize('command', ['main', 'evaluate', 'report', 'predict', 'export'])
def test_any_damage_to_any_file_is_reported_by_every_command(built, tmp_path, command):
  workdir = tmp_path / 'run'
  for path in _all_files(built.folder):
    for what, data in damages(path, True):
      print(path, what)
      built.copy(workdir)
      (workdir / path.relative_to(built.folder)).write_bytes(data)
      check(getattr(built, command), workdir)
      shutil.rmtree(workdir)


# Lost rows.


def _flip_a_quote(data):
  at = data.index(b'"step"', len(data) // 2)
  return data[:at] + b'#' + data[at + 1 :]


@pytest.mark.parametrize(
  ('damage', 'aside'),
  [
    (_flip_a_quote, True),
    (lambda data: data[: len(data) // 2], True),
    (lambda _: b'', False),
  ],
)
def test_lost_rows_of_metrics_are_reported(built, tmp_path, capsys, damage, aside):
  workdir = built.copy(tmp_path / 'run')
  path = workdir / 'metrics.jsonl'
  damaged = damage(path.read_bytes())
  path.write_bytes(damaged)
  warning = re.compile(
    r"metrics\.jsonl: .*rows of stage 'train' up to step 20 are missing: \w+ \d+ of \d+"
  )
  for _ in range(2):  # nor later
    built.main(workdir)
    assert warning.search(capsys.readouterr().out)
    built.report(workdir)
    page = (workdir / 'report.html').read_text().replace('&#39;', "'")
    assert warning.search(page)
  left = [p.read_bytes() for p in workdir.glob('metrics.jsonl.damaged*')]
  assert left == [damaged] * aside


@pytest.mark.parametrize('left', [b'', None])
def test_lost_vectors_are_reported(built, tmp_path, capsys, left):
  workdir = built.copy(tmp_path / 'run')
  path = workdir / 'stages/train/metrics/class_loss.npz'
  path.write_bytes(left) if left is not None else path.unlink()
  built.main(workdir)
  built.report(workdir)
  warning = f'{path}: rows are missing: 10 of 10'
  assert warning in capsys.readouterr().out
  assert warning in (workdir / 'report.html').read_text()
  assert path.with_name('class_loss.npz.damaged').exists() == (left is not None)


@pytest.mark.parametrize(
  ('was', 'now'), [(b'"event"', b'"evemt"'), (b'"step"', b'"stpe"')]
)
def test_a_damaged_event_is_reported_and_kept(built, tmp_path, capsys, was, now):
  workdir = built.copy(tmp_path / 'run')
  path = workdir / 'events.jsonl'
  damaged = path.read_bytes().replace(was, now, 1)
  path.write_bytes(damaged)
  warning = 'events.jsonl: 1 damaged line'
  built.report(workdir)
  assert warning in (workdir / 'report.html').read_text()
  built.main(workdir)
  assert f'{warning};' in capsys.readouterr().out
  assert path.with_name('events.jsonl.damaged').read_bytes() == damaged


def test_rows_stay_in_the_order_of_an_unbroken_run(built, tmp_path):
  """Each start evaluates the end of a stage again, before later stages write rows."""
  workdir = built.copy(tmp_path / 'run')
  before = (workdir / 'metrics.jsonl').read_text()
  built.main(workdir)
  assert (workdir / 'metrics.jsonl').read_text() == before
  lines = before.splitlines(keepends=True)
  of_train = [line for line in lines if '"stage": "train"' in line]
  shutil.rmtree(workdir / 'stages' / 'classifier')
  (workdir / 'metrics.jsonl').write_text(''.join(of_train[:-1]))  # killed in between
  built.main(workdir)
  places = [
    (r['stage'], r['split'], r['step']) for r in read_rows(workdir / 'metrics.jsonl')
  ]
  assert places == [
    tuple(json.loads(line)[k] for k in ('stage', 'split', 'step')) for line in lines
  ]


@pytest.mark.parametrize(
  ('name', 'figure'), [('result.json', 'confusion'), ('data.json', 'features')]
)
def test_a_figure_says_that_its_file_is_damaged(built, tmp_path, name, figure):
  workdir = built.copy(tmp_path / 'run')
  (workdir / name).write_text('')
  with pytest.raises(runs.NoData, match=f'{name} is damaged'):
    getattr(figures, figure)([runs.Run(epath.Path(workdir), 'run')])


# The recorded config and data.


def edit(path, **changes):
  """Changes keys of a JSON file; 'data.mean' is written data__mean."""
  content = json.loads(path.read_text())
  for name, value in changes.items():
    *above, key = name.split('__')
    place = content
    for step in above:
      place = place[step]
    place[key] = value
  path.write_text(json.dumps(content))


@pytest.mark.parametrize('command', ['evaluate', 'predict', 'export', 'report'])
def test_an_edited_config_is_rejected(built, tmp_path, command):
  workdir = built.copy(tmp_path / 'run')
  edit(workdir / 'config.json', data__mean=[0.1])
  if command == 'report':
    built.report(workdir)
    for page in ('report.html', 'report.md'):
      warning = 'config.json was changed after training'
      assert warning in (workdir / page).read_text()
    return
  with pytest.raises(
    UserError, match=r'data.mean was \[0.5\] and is \[0.1\]; undo that'
  ):
    getattr(built, command)(workdir)


def test_a_value_of_another_type_is_reported_by_its_readers(built, tmp_path):
  workdir = built.copy(tmp_path / 'run')
  edit(workdir / 'config.json', open_domains=5)
  built.report(workdir)
  assert 'config.json is damaged' in (workdir / 'report.html').read_text()
  edit(workdir / 'data.json', label_maps='five')
  with pytest.raises(UserError, match=r"data\.json has an unexpected .* 'label_maps'"):
    built.predict(workdir)


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('preprocessing__mean', [0.1]),
    ('class_names', list('abcd')),
    ('counts__train', [9, 9, 9, 9]),
  ],
)
def test_edited_data_are_rejected(built, tmp_path, key, value):
  workdir = built.copy(tmp_path / 'run')
  edit(workdir / 'data.json', **{key: value})
  for command in (built.evaluate, built.predict, built.export):
    with pytest.raises(
      UserError, match=f'data.json was changed .*: {key.split("__")[0]}; '
    ):
      command(workdir)


def test_a_run_with_an_edited_config_resumes_with_its_own(built, tmp_path):
  workdir = built.copy(tmp_path / 'run')
  edit(workdir / 'config.json', data__mean=[0.1])
  with pytest.raises(
    UserError, match=r'with the config of this command, so delete .*config'
  ):
    built.main(workdir)
  (workdir / 'config.json').unlink()
  built.main(workdir)
  assert json.loads((workdir / 'config.json').read_text())['data']['mean'] == [0.5]


def test_lost_files_do_not_permit_changes(built, tmp_path):
  """The checkpoints still have the config and data."""
  workdir = built.copy(tmp_path / 'run')
  (workdir / 'config.json').unlink()
  (workdir / 'data.json').unlink()
  other = built.config | {'seed': 1}
  with pytest.raises(run.OtherConfig, match='seed was 0 and is 1; give another'):
    run.run(other, workdir)
  experiment = build.build(built.config)
  with pytest.raises(UserError, match='were trained on other data'):
    run.check_data(experiment._replace(fingerprint='f' * 64), epath.Path(workdir))
  built.main(workdir)


def _with_old_keys(config):
  """Returns a config as earlier versions wrote it, with old names of keys."""
  older = json.loads(json.dumps(config))
  for part in (older, *older['stages'].values()):
    for old, new in RENAMED.items():
      if new in part:
        part[old] = part.pop(new)
  for key in ADDED:
    older.pop(key)
  del older['streams']
  return older | {'train_split': 'train', 'meta_batch': 0, 'meta_every': 1}


@pytest.mark.parametrize('recorded', [True, False])
def test_a_run_with_old_keys_is_used_by_every_command(built, tmp_path, recorded):
  """Whether its manifests repeat the config under the old keys, or don't have it."""
  workdir = built.copy(tmp_path / 'run')
  older = _with_old_keys(built.config)
  (workdir / 'config.json').write_text(json.dumps(older))
  for path in workdir.glob('stages/*/checkpoints/manifests/*.json'):
    manifest = json.loads(path.read_text())
    manifest = manifest | {'config': older} if recorded else _without(manifest)
    path.write_text(json.dumps(manifest))
  found = {}
  for name, folder in (('old', workdir), ('new', built.copy(tmp_path / 'new'))):
    built.predict(folder)
    found[name] = (tmp_path / 'out.csv').read_text()
  assert found['old'] == found['new']
  for command in (built.export, built.evaluate, built.report, built.main):
    command(workdir)
  assert runs.Run(epath.Path(workdir), 'run').state == 'finished'


def _without(manifest):
  return {k: v for k, v in manifest.items() if k not in ('config', 'data', 'rows')}


def test_a_config_may_change_on_request(built, tmp_path):
  workdir = built.copy(tmp_path / 'run')
  other = built.config | {'name': 'other'}
  run.run(other, workdir, allow_config_change=True)
  assert provenance.recorded(epath.Path(workdir))['config']['name'] == 'other'
  run.run(other, workdir)
  built.evaluate(workdir)


def test_a_run_of_an_earlier_version_is_read(built, tmp_path, capsys):
  workdir = built.copy(tmp_path / 'run')
  for path in workdir.glob('stages/*/checkpoints/manifests/*.json'):
    path.write_text(json.dumps(_without(json.loads(path.read_text()))))
  evaluate.evaluate(epath.Path(workdir))
  printed = capsys.readouterr().out
  assert printed.count(f'{workdir} is of an earlier version') == 1
  built.main(workdir)  # from now on it is recorded
  built.evaluate(workdir)
  assert 'earlier version' not in capsys.readouterr().out


# Advice.


@pytest.mark.parametrize('place', ['checkpoints/3', 'checkpoints/best'])
def test_a_damaged_stage_is_deleted_and_trained_again(built, tmp_path, place):
  workdir = built.copy(tmp_path / 'run')
  folder = workdir / 'stages' / 'classifier'
  for path in _all_files(folder / place):
    path.write_bytes(b'')
  with pytest.raises(UserError, match=f'; delete {folder} and run the training '):
    built.main(workdir)
  shutil.rmtree(folder)
  built.main(workdir)


@pytest.mark.parametrize('name', ['config.json', 'data.json'])
def test_a_torn_file_is_deleted_and_written_anew(built, tmp_path, name):
  workdir = built.copy(tmp_path / 'run')
  whole = (workdir / name).read_bytes()
  (workdir / name).write_bytes(whole[:99])
  with pytest.raises(UserError, match=f'{name} is not valid JSON: .*; delete it and'):
    built.main(workdir)
  (workdir / name).unlink()
  built.main(workdir)
  assert (workdir / name).read_bytes() == whole


@pytest.mark.parametrize(
  ('command', 'name'), [('evaluate', 'evaluation.json'), ('report', 'report.html')]
)
def test_numbers_are_shown_where_they_cannot_be_written(
  built, tmp_path, capsys, command, name
):
  workdir = built.copy(tmp_path / 'run')
  (workdir / name).mkdir()
  with pytest.raises(UserError, match=f'{name} cannot be written: Is a directory'):
    getattr(built, command)(workdir)
  assert 'accuracy' in capsys.readouterr().out


# Signals.


def test_a_closed_terminal_asks_to_stop_unless_nohup():
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
  try:
    with stopping.StopRequest() as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      assert stop()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stopping.StopRequest() as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      assert not stop()
  finally:
    signal.signal(signal.SIGHUP, before)


def test_unlogged_metrics_are_kept(built, tmp_path, monkeypatch):
  """For a run that is stopped between two log rows."""
  workdir = tmp_path / 'run'
  looks = iter([*[False] * 9, *[True] * 2])
  with monkeypatch.context() as patch:
    patch.setattr(run.StopRequest, '__call__', lambda self: next(looks, False))
    with pytest.raises(train.Preempted):
      run.run(built.config, workdir)
  (held,) = workdir.glob('stages/train/unlogged.npz')
  assert int(files.read_npz(held)['step']) % 2 == 1
  built.main(workdir)
  assert _untimed(workdir) == _untimed(built.folder)


def _untimed(workdir):
  return [
    {k: v for k, v in row.items() if k != 'images_per_second'}
    for row in read_rows(workdir / 'metrics.jsonl')
  ]


def test_a_closed_terminal_is_not_written_to(monkeypatch):
  reader, writer = os.pipe()
  os.close(reader)
  with open(writer, 'w', buffering=1) as stdout:
    monkeypatch.setattr('sys.stdout', stdout)
    screen = Screen()
    screen.line('nobody reads this')
    screen.line('nor this')
