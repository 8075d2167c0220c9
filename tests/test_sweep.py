"""Sweeps: every cell is an ordinary run, none runs twice, and failures are isolated."""

import io
import json
import shutil

import pytest
from etils import epath
from rich.console import Console

from lt_jax import files, live, sweep
from lt_jax.errors import UserError
from lt_jax.report import runs
from lt_jax.run import OtherConfig
from tests import child
from tests.test_report import config, write_run


def run(workdir, *arguments, methods='ce,ldam_drw', seeds='0,1', fault='undrawn'):
  given = [
    f'--config={child.ROOT}/configs/digits_lt.py:epochs=6',
    f'--workdir={workdir}',
    f'--methods={methods}',
    f'--seeds={seeds}',
    '--config.model.trunk=tiny_cnn',
    *arguments,
  ]
  output = workdir.parent / f'{workdir.name}.log'
  code = child.run(given, output, fault, module='lt_jax.sweep')
  return code, output.read_text()


@pytest.fixture(scope='module')
def swept(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('sweep') / 'runs'
  code, output = run(workdir, methods='ce', fault='')
  assert code == 0, output
  return workdir, output


def result(workdir, method, seed):
  return json.loads((workdir / method / str(seed) / 'result.json').read_text())


def test_every_cell_is_an_ordinary_run(swept):
  workdir, output = swept
  for seed in (0, 1):
    found = result(workdir, 'ce', seed)
    assert (found['recipe'], found['seed']) == ('ce', seed)
    folder = workdir / 'ce' / str(seed)
    assert (folder / 'config.json').exists() and (folder / 'metrics.jsonl').exists()
  digests = {result(workdir, 'ce', seed)['config_digest'] for seed in (0, 1)}
  assert len(digests) == 1
  lines = output.strip().splitlines()
  assert lines[-1] == str(workdir / 'report.html')
  (head,) = (n for n, line in enumerate(lines) if line.startswith('method'))
  assert lines[head].split()[1:3] == ['accuracy', '(%)']  # as all have finished
  assert lines[head + 1].split()[0] == 'ce' and '±' in lines[head + 1]


def test_a_cell_is_the_run_that_its_command_makes(swept, tmp_path):
  workdir, _ = swept
  command = child.command(
    tmp_path / 'alone',
    '--config.model.trunk=tiny_cnn',
    '--config.seed=1',
    config='digits_lt.py:ce,epochs=6',
    fast=(),
  )
  assert child.run(command, tmp_path / 'log') == 0
  alone = json.loads((tmp_path / 'alone' / 'result.json').read_text())
  assert alone['state_sha256'] == result(workdir, 'ce', 1)['state_sha256']


def test_finished_cells_are_not_run_again(swept):
  workdir, _ = swept
  before = (workdir / 'ce' / '0' / 'events.jsonl').read_bytes()
  code, output = run(workdir, methods='ce,ce_drs', seeds='0')  # which share a program
  assert code == 0, output
  assert output.count('already finished: ') == 1
  assert result(workdir, 'ce_drs', 0)['recipe'] == 'ce_drs'
  assert (workdir / 'ce' / '0' / 'events.jsonl').read_bytes() == before


@pytest.mark.slow
def test_seeds_as_one_program_are_ordinary_runs(swept, tmp_path):
  workdir, _ = swept
  code, output = run(tmp_path / 'runs', '--vectorise', methods='ce')
  assert code == 0, output
  assert output.count(': first step after ') == 1
  for seed in (0, 1):
    found, alone = (
      result(folder, 'ce', seed) for folder in (tmp_path / 'runs', workdir)
    )
    assert (found['replicas'], alone['replicas']) == (2, 1)
    assert found['config_digest'] == alone['config_digest']
    assert found['test']['loss'] == pytest.approx(alone['test']['loss'], rel=1e-3)
  code, output = run(tmp_path / 'runs', '--vectorise', methods='ce')
  assert code == 0 and output.count('already finished: ') == 2


@pytest.mark.parametrize(
  'torn',
  [
    b'{"te',
    *(
      pytest.param(torn, marks=pytest.mark.slow)
      for torn in (b'{}', b'{"test": 1}', b'\xff\xfe')
    ),
  ],
)
def test_a_torn_result_is_written_anew(swept, tmp_path, torn):
  workdir = shutil.copytree(swept[0] / 'ce' / '0', tmp_path / 'runs' / 'ce' / '0')
  (workdir / 'result.json').write_bytes(torn)
  code, output = run(tmp_path / 'runs', methods='ce', seeds='0')
  assert code == 0 and 'already finished: ' not in output
  whole = result(swept[0], 'ce', 0)
  assert result(tmp_path / 'runs', 'ce', 0)['state_sha256'] == whole['state_sha256']


def test_a_torn_config_fails_in_one_line(swept, tmp_path):
  workdir = shutil.copytree(swept[0] / 'ce' / '0', tmp_path / 'runs' / 'ce' / '0')
  (workdir / 'config.json').write_text('{"se')
  code, output = run(tmp_path / 'runs', methods='ce', seeds='0')
  assert code == 2 and 'Traceback' not in output
  assert f'{workdir}/config.json is not valid JSON' in output.splitlines()[-1]


@pytest.mark.slow
def test_a_seed_that_cannot_be_among_them_fails_alone(tmp_path):
  code, output = run(tmp_path / 'runs', '--config.batch=32', methods='ce', seeds='1')
  assert code == 0, output
  code, output = run(tmp_path / 'runs', '--vectorise', methods='ce')
  assert code == 2 and 'cannot run as one program: ' in output
  (failed,) = [line for line in output.splitlines() if line.startswith('failed: ')]
  assert failed.startswith('failed: seed 1: OtherConfig: ') and 'batch was 32' in failed
  # A sweep has no --allow_config_change.
  assert failed.endswith('; give another workdir')
  assert result(tmp_path / 'runs', 'ce', 0)['replicas'] == 1


def test_a_failure_does_not_stop_the_rest(tmp_path):
  without = '--config.data.meta_per_class=0'
  code, output = run(tmp_path / 'runs', without, methods='l2rw,ce', seeds='0')
  assert code == 2
  assert output.splitlines()[-1].startswith('error: 1 of 2 cells failed: l2rw/0: ')
  assert 'set data.meta_per_class' in output.splitlines()[-1]
  assert result(tmp_path / 'runs', 'ce', 0)['recipe'] == 'ce'
  assert not (tmp_path / 'runs/ce/0/error.json').exists()
  (left,) = (tmp_path / 'runs/l2rw/0').glob('*.json')
  failure = json.loads(left.read_text())
  assert left.name == 'error.json'
  assert (failure['recipe'], failure['seed']) == ('l2rw', 0)
  error = failure['error']
  assert error.startswith('UserError: ') and 'meta_per_class' in error


def test_a_failure_that_cannot_be_recorded_is_still_reported(tmp_path, capsys):
  def wrong(recipe):
    raise UserError('a mistake')

  (tmp_path / 'ce').write_text('where the folder should be')
  (cell,) = sweep.cells(['ce'], ['0'], tmp_path)
  assert isinstance(sweep.sweep([cell], wrong)[cell], UserError)
  assert 'failed: seed 0: UserError: a mistake' in capsys.readouterr().out


@pytest.mark.parametrize('error', [files.InUse, OtherConfig])
def test_a_folder_of_another_run_is_left_alone(tmp_path, error):
  def other(recipe):
    raise error('of somebody else')

  (cell,) = sweep.cells(['ce'], ['0'], tmp_path)
  failed = sweep.sweep([cell], other)
  assert not cell.workdir.exists()
  assert sweep._code(failed.values()) == (75 if error is files.InUse else 2)


def test_an_interrupt_is_no_failure_of_a_cell(tmp_path):
  def interrupted(recipe):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):  # reported like the end of any command
    sweep.sweep(sweep.cells(['ce'], ['0', '1'], tmp_path), interrupted)
  assert not list(tmp_path.iterdir())


def test_failures_alone_have_a_report_too(tmp_path):
  key = '--config.data.meta_per_class=0'
  code, output = run(tmp_path / 'runs', key, methods='l2rw', seeds='0')
  assert code == 2 and f'{tmp_path}/runs/report.html' in output.splitlines()
  assert 'l2rw' in (tmp_path / 'runs/report.md').read_text()


def test_the_methods_run_whatever_recipe_the_config_names(tmp_path):
  key = '--config.stages.meta.method.eps_lr=0.5'
  given = [f'--config={child.ROOT}/configs/digits_lt.py:meta_ce', '--methods=meta_ldam']
  given += [f'--workdir={tmp_path}/runs', '--list', key]
  assert child.run(given, tmp_path / 'log', module='lt_jax.sweep') == 0
  make = sweep.loader(f'{child.ROOT}/configs/digits_lt.py', 'meta_ce,epochs=6', {})
  made = make('meta_ldam')
  assert (made.recipe, made.loss.name, made.epochs) == ('meta_ldam', 'ldam', 6)
  code, output = run(tmp_path / 'runs', key, methods='meta_ldam')  # ldam_drw has none
  assert code == 2 and 'unknown config key' in output.splitlines()[-1]
  assert 'Traceback' not in output


def test_it_ends_by_saying_whether_to_run_it_again(tmp_path):
  code, output = run(
    tmp_path / 'runs', '--config.schedule.base=1e25', methods='ce', seeds='0'
  )
  assert code == 3, output
  assert 'Traceback' not in output
  assert 'error: 1 of 1 cells failed: ce/0: Diverged: not finite' in output
  passing, wrong, lost = OSError('a disk'), UserError('a mistake'), KeyError('a bug')
  assert sweep._code([wrong, passing, lost]) == 75
  assert sweep._code([wrong]) == sweep._code([lost]) == 2


def test_one_cell_for_a_scheduler(tmp_path):
  code, output = run(tmp_path / 'runs', '--cell=1', seeds='3,4')
  assert code == 0, output
  assert [p.parent.name for p in (tmp_path / 'runs').glob('*/*/result.json')] == ['4']
  code, output = run(tmp_path / 'runs', '--list', seeds='3,4')
  assert output.splitlines()[3].startswith('3  ldam_drw, seed 4: ')
  code, output = run(tmp_path / 'runs', '--cell=4', seeds='3,4')
  assert code == 2 and '--cell is 4; cells are 0 to 3' in output


@pytest.mark.slow
def test_asked_to_stop_it_saves_and_ends(tmp_path):
  code, output = run(tmp_path / 'runs', fault='term_at:10')
  assert code == 143, output
  assert not list((tmp_path / 'runs').glob('*/*/result.json'))
  code, output = run(tmp_path / 'runs', methods='ce', seeds='0')
  assert code == 0 and 'resuming from 10' in output


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'methods': 'ce,nope'}, "unknown recipe 'nope'; known: "),
    ({'methods': 'ce,epochs=7'}, "'epochs=7' is not a recipe; options go after the"),
    ({'methods': 'ce,ce'}, '--methods: name at least one, and each only once: ce,ce'),
    ({'seeds': '0,x'}, "--seeds: 'x' is not a whole number"),
    ({'seeds': '1,1'}, '--seeds: name at least one, and each only once'),
    ({'seeds': '1,01'}, "--seeds: '01' is not a whole number"),
    ({'seeds': '\u00b2'}, "--seeds: '\u00b2' is not a whole number"),
    ({'seeds': '0,3000000000'}, '--seeds: 3000000000 is larger than 2147483647'),
  ],
)
def test_mistakes_are_reported_before_anything_runs(tmp_path, options, message):
  code, output = run(tmp_path / 'runs', **options)
  assert code == 2 and message in output
  assert not list((tmp_path / 'runs').glob('*/*'))


def test_the_seed_is_not_for_all(tmp_path):
  code, output = run(tmp_path / 'runs', '--config.seed=3')
  assert code == 2 and '--config.seed: a sweep sets this' in output


def test_cells_come_seed_after_seed(tmp_path):
  found = sweep.cells(['a', 'b'], ['0', '1'], tmp_path)
  assert [(c.method, c.seed) for c in found] == [('a', 0), ('a', 1), ('b', 0), ('b', 1)]
  with pytest.raises(UserError, match='--methods: name at least one'):
    sweep.cells([], ['0'], tmp_path)


def test_a_grid_crosses_values_of_keys(tmp_path):
  grid = sweep.parse_grid(['loss.gamma=0.5,1', 'config.class_weights.beta=0.9,0.99'])
  found = sweep.cells(['cb_focal'], ['0', '1'], tmp_path, grid)
  assert len(found) == 8 and len({cell.workdir for cell in found}) == 8
  assert found[1].workdir.name == '1' and found[1].point == found[0].point
  assert found[-1].label == 'cb_focal, loss.gamma=1, class_weights.beta=0.99'
  make = sweep.loader(f'{child.ROOT}/configs/digits_lt.py', 'epochs=6', {})
  made = sweep.at_point(make('cb_focal'), found[-1].point)
  assert (made.loss.gamma, made.class_weights.beta) == (1.0, 0.99)
  point = (('stages.meta.method.clip', 'True'), ('stages.meta.method.prior', 'none'))
  method = sweep.at_point(make('meta_ce'), point).stages.meta.method
  assert method.clip is True and method.prior == 'none'


@pytest.mark.parametrize(
  ('grid', 'message'),
  [
    ('loss.gamma', 'must be KEY=VALUE,VALUE, such as loss.gamma=1,2'),
    ('loss.gamma=1,,2', 'must be KEY=VALUE,VALUE'),
    ('loss.gamma=1,1', 'name each key and each value only once'),
    ('seed=1,2', 'use --seeds and --methods'),
  ],
)
def test_mistakes_in_a_grid_are_reported(grid, message):
  with pytest.raises(UserError, match=message):
    sweep.parse_grid([grid])


@pytest.mark.parametrize(
  ('key', 'message'),
  [('loss.gama', "did you mean 'gamma'"), ('loss.gamma', 'loss.gamma=none')],
)
def test_a_grid_of_a_key_that_does_not_fit_is_reported(key, message):
  make = sweep.loader(f'{child.ROOT}/configs/digits_lt.py', '', {})
  with pytest.raises(UserError, match=message):
    sweep.at_point(make('cb_focal'), ((key, 'none'),))


def test_a_sweep_over_a_grid_leaves_a_run_a_cell(tmp_path):
  options = ('--grid=optimizer.momentum=0.9,0.5', '--grid=schedule.base=0.05')
  code, output = run(tmp_path / 'runs', *options, methods='ce', seeds='0')
  assert code == 0, output
  folders = {
    path.parent.parent.name for path in tmp_path.glob('runs/*/*/*/result.json')
  }
  assert folders == {f'optimizer.momentum={m},schedule.base=0.05' for m in (0.9, 0.5)}
  assert 'Chosen on validation images: ce with optimizer.momentum=0.' in output


def test_every_cell_that_ends_is_shown_and_reported(tmp_path, monkeypatch):
  """Of a run there is what it leaves; of another one that it failed."""
  pages = []

  def run_cells(cells, make_config, board):
    (cell,) = cells
    if cell.seed == 1:
      raise UserError('a mistake')
    if cell.seed == 2:
      return {}  # finished before
    board[cell].start_bar('plain', 5, 10)
    write_run(cell.workdir, config(cell.method, cell.seed), 0.625)
    return {cell: None}

  def after(seconds):
    sweep._write_page(tmp_path, seconds)
    pages.append((tmp_path / 'report.html').read_text())

  monkeypatch.setattr(sweep, '_run', run_cells)
  found = sweep.cells(['ce'], ['0', '1', '2', '3'], tmp_path)
  shown = [(cell.label, cell.seed) for cell in found]
  table = live.LiveTable(shown, Console(file=io.StringIO()))
  assert list(sweep.sweep(found, None, table=table, after=after)) == [found[1]]
  states = [live.FINISHED, live.FAILED, live.FINISHED, live.FINISHED]
  assert [row.state for row in table.rows] == states
  assert table.rows[3].metric == '62.5 % accuracy'
  states = ('1 finished', '1 finished, 1 failed')  # and for the last `main` writes it
  for page, state in zip(pages, states, strict=True):
    assert state in page
  assert 'Figures are drawn when the sweep ends' in page and '<svg' not in page


def test_a_sweep_adds_its_methods_to_those_of_earlier_ones(tmp_path):
  workdir = epath.Path(tmp_path)
  for given in (['zebra', 'ldam'], ['ce', 'ldam']):
    sweep._remember(given, workdir)
  assert runs.methods(workdir) == ['zebra', 'ldam', 'ce']
