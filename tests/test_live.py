"""The table of a sweep: the contents of its rows, and how a terminal shows it."""

import io

import pytest
from rich.console import Console

from lt_jax import live
from lt_jax.screen import Screen

CELLS = [('ce', 0), ('ce', 1), ('ldam_drw', 0)]


class Clock:
  """A clock that moves only when told to."""

  now = 100.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return Clock()


@pytest.fixture
def output():
  return io.StringIO()


@pytest.fixture
def table(clock, output):
  console = Console(file=output, width=100, height=30, highlight=False)
  return live.LiveTable(CELLS, console, clock)


def test_a_row_shows_what_a_run_reports(table, clock):
  screen, row = table.screen(1), table.rows[1]
  assert row.texts == ('ce', '1', 'waiting', '', '')
  screen.begin()
  assert row.progress == 'starting'
  screen.start_bar('plain', 100, 400)
  screen.status('loss 0.5000  800 images/s', 'a line')
  assert row.texts[2:] == (
    '━━━───────── plain 100/400',
    '',
    'loss 0.5000  800 images/s',
  )
  clock.now += 50  # the time of compiling
  screen.progress(110)
  assert row.left is None
  clock.now += 10
  screen.progress(130)
  assert row.left == pytest.approx((400 - 130) / 20 * 10)
  assert row.texts[3] == '2 min 15 s'
  screen.evaluated(130, 'accuracy', {'val': 0.5, 'test': 0.625})
  screen.status('loss 0.4000  800 images/s', 'a line')
  assert row.metric == '62.5 % accuracy on test'
  screen.stop_bar()
  screen.start_bar('second', 0, 50)
  screen.progress(0)
  assert row.texts[2:4] == ('──────────── second 0/50', '')
  screen.stop_bar()
  screen.start_bar('posthoc', 0, 0)  # has no steps, but has started
  assert row.progress == 'posthoc' and row.metric == '62.5 % accuracy on test'
  screen.end(False, '63.0 % accuracy')
  assert row.texts[2:] == ('finished', '', '63.0 % accuracy')


def test_the_rest_is_estimated_from_cells_that_have_ended(table):
  assert table.caption == '0 of 3 cells finished'
  table.screen(0).end(True, '')
  table.took(90, 1)
  assert table.caption == '0 of 3 cells finished, 1 failed, about 3 min 00 s left'
  for number in (1, 2):
    table.screen(number).end(False, '')
  table.took(20, 2)
  assert table.caption == '2 of 3 cells finished, 1 failed'


def test_a_long_table_shows_what_runs_and_what_is_near():
  rows = [live.Row('ce', seed) for seed in range(50)]
  assert live.shown(rows, 10) == (0, 10)
  for row in rows[:30]:
    row.state = live.FINISHED
  rows[30].state = live.RUNNING
  assert live.shown(rows, 10) == (25, 35)
  assert live.shown(rows, 80) == (0, 50)
  for row in rows:
    row.state = live.FAILED
  assert live.shown(rows, 10) == (40, 50)


def test_a_cell_has_every_method_of_a_screen():
  public = {name for name in vars(Screen) if not name.startswith('_')}
  assert public <= {*vars(live.CellScreen)}


def test_only_what_must_be_known_is_printed(table, output):
  screen = table.screen(2)
  screen.table('a banner', [('name', 'value')])
  screen.line_if_followed('step 5: accuracy')
  screen.follow('plain', 10)
  screen.line('warning: [an untrained network]')
  assert output.getvalue() == 'ldam_drw, seed 0: warning: [an untrained network]\n'


def test_a_terminal_is_refreshed_in_place(clock, output, capsys):
  console = Console(file=output, force_terminal=True, width=100, height=30)
  with live.LiveTable(CELLS, console, clock) as table:
    table.screen(1).start_bar('plain', 5, 10)
    table._live.refresh()
    print('printed meanwhile')
    table.screen(1).end(False, '50.0 % accuracy')
  assert capsys.readouterr().out == ''
  first, last = output.getvalue().split('printed meanwhile')
  assert '━━━━━━────── plain 5/10' in first
  assert '\x1b[1A\x1b[2K' in first  # moves up a line and clears it
  assert 'finished' in last and '50.0 % accuracy' in last
