"""Writers besides files: rows sent to a tracker."""

import sys
import types

import numpy as np
import pytest
from etils import epath

from lt_jax import writers
from lt_jax.errors import UserError
from lt_jax.screen import terminal

CONFIG = {'name': 'digits_lt', 'recipe': 'ce', 'seed': 3, 'data': {'source': 'digits'}}


class Tracker(types.ModuleType):
  """Replaces wandb and trackio, and keeps what it receives."""

  def __init__(self):
    super().__init__('tracker')
    self.rows, self.finished, self.begun = [], 0, []

  def init(self, **options):
    self.begun.append(options)
    return self

  def log(self, row):
    self.rows.append(row)

  def finish(self, **options):
    self.finished += 1
    self.ended = options


@pytest.mark.parametrize('name', writers.TRACKERS)
def test_a_tracker_gets_every_row(monkeypatch, tmp_path, name):
  tracker, workdir = Tracker(), epath.Path(tmp_path)
  monkeypatch.setitem(sys.modules, name, tracker)
  for _ in range(2):  # the second continues
    with (
      pytest.raises(KeyError),
      writers.tracking(name, CONFIG, workdir) as track,
    ):
      writer = writers.MetricWriter(
        workdir, 'train', resume_step=0, vectors=workdir / 'metrics', track=track
      )
      values = {'loss': np.float32(0.5), 'by_class': np.ones(3)}
      writer.write('val', 10, 1.5, values, images_per_second=7.0)
      writer.close()
      raise KeyError
  row = {'stage': 'train', 'step': 10, 'epoch': 1.5}
  assert tracker.rows[0] == row | {'val/loss': 0.5, 'val/images_per_second': 7.0}
  assert tracker.finished == 2  # whatever happens
  first, second = tracker.begun
  assert first == second
  assert first['project'] == 'digits_lt' and first['resume'] == 'allow'
  assert first['config']['data.source'] == 'digits'
  assert ('id' in first) == (name == 'wandb')
  assert tracker.ended == ({'exit_code': 1} if name == 'wandb' else {})


def test_a_tracker_that_fails_during_a_run_is_reported_once(monkeypatch, tmp_path):
  tracker, events = Tracker(), []
  tracker.log = lambda row: 1 / 0
  monkeypatch.setitem(sys.modules, 'trackio', tracker)
  with writers.tracking(
    'trackio',
    CONFIG,
    epath.Path(tmp_path),
    lambda event, **v: events.append((event, v)),
  ) as track:
    track({'step': 1})
    track({'step': 2})
  values = {'tracker': 'trackio', 'error': 'division by zero'}
  assert events == [('tracker_failed', values)]


def test_an_unknown_tracker_is_reported(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  for name, message in (('wandb', 'pip install wandb'), ('mlflow', 'known: wandb')):
    with (
      pytest.raises(UserError, match=message),
      writers.tracking(name, CONFIG, epath.Path(tmp_path)),
    ):
      pass


def test_a_tracker_that_does_not_start_is_reported_in_a_line(monkeypatch, tmp_path):
  def init(**options):
    raise RuntimeError('no API key')

  tracker = types.ModuleType('wandb')
  tracker.init = init
  monkeypatch.setitem(sys.modules, 'wandb', tracker)
  with (
    pytest.raises(UserError, match='--tracker=wandb could not start: no API key'),
    writers.tracking('wandb', CONFIG, epath.Path(tmp_path)),
  ):
    pass


def test_without_a_tracker_nothing_is_reported(tmp_path):
  with writers.tracking('', CONFIG, epath.Path(tmp_path)) as track:
    track({'loss': 1.0})


def test_a_notebook_gets_plain_lines(monkeypatch):
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
  monkeypatch.setenv('TERM', 'xterm')
  assert terminal().is_terminal
  monkeypatch.setattr('rich.console._is_jupyter', lambda: True)
  console = terminal()
  assert not console.is_terminal and not console.is_jupyter
