r"""Trains several methods with several seeds, and compares them.

  python -m lt_jax.sweep --config=configs/digits_lt.py --methods=ce,ldam_drw,oltr \
    --seeds=0,1,2 --workdir=runs/digits [--config.KEY=VALUE ...]

A cell is an ordinary run in DIR/METHOD/SEED, which resumes if it was interrupted.
--grid=loss.gamma=0.5,1,2 --grid=class_weights.beta=0.9,0.99 also crosses values of
config keys, with a folder for each combination between METHOD and SEED; the report then
chooses among them on validation images. Repeating the command runs the cells that have
not finished. If a cell fails, the failure is reported, the other cells run, and
error.json in its folder says why until it starts again. A terminal shows all cells in
one table. DIR/report.html is updated after each cell.

Options after the colon of --config apply to all methods
(--config=configs/cifar10_lt.py:net=resnet8,epochs=40). --cell=I runs only cell I: under
SLURM, use `--array=0-8` and `--cell=$SLURM_ARRAY_TASK_ID`. --list lists the cells.
"""

import ast
import contextlib
import functools
import itertools
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from lt_jax import allocator, commands, config_file, files, live
from lt_jax.config import check_set_domains, resolve
from lt_jax.errors import TRY_AGAIN, WRONG_INPUT, UserError, one_line
from lt_jax.screen import terminal

CONFIG = commands.config_flag()
WORKDIR = commands.workdir_flag('The folder for all runs and their report.')
TRACKER = commands.tracker_flag()
METHODS = flags.DEFINE_list('methods', None, 'Recipes to train, such as ce,ldam_drw.')
SEEDS = flags.DEFINE_list(
  'seeds', ['0'], 'Seeds to train each of them with, such as 0,1,2.'
)
CELL = flags.DEFINE_integer('cell', None, 'Run only this cell, counted from 0.')
VECTORISE = flags.DEFINE_bool(
  'vectorise',
  False,
  'Train the seeds of a method as one program: for small networks on accelerators.',
)
GRID = flags.DEFINE_multi_string(
  'grid',
  [],
  'KEY=VALUE,VALUE,...: values of a config key to cross with everything else',
)
LIST = flags.DEFINE_bool('list', False, 'List the cells and run nothing.')


MOST_SEED = 2**31 - 1

LONG_CELL = 60.0
"""Seconds; after a cell that took longer, the time to draw figures does not matter."""


class Cell(NamedTuple):
  """One run of a sweep.

  Attributes:
    method: name of the recipe.
    seed: its seed.
    workdir: its folder.
    point: (config key, value) of a grid, as given; empty without one.
  """

  method: str
  seed: int
  workdir: epath.Path
  point: tuple[tuple[str, str], ...] = ()

  @property
  def label(self) -> str:
    """The method and its point in the grid."""
    return ', '.join([self.method, *(f'{key}={value}' for key, value in self.point)])


Grid = Mapping[str, Sequence[str]]
"""Config key -> its values, as given."""


def parse_grid(given: Sequence[str]) -> dict[str, list[str]]:
  """Returns key -> values from the values of --grid.

  Raises:
    UserError: one is not KEY=VALUE,VALUE, or a key or value occurs twice.
  """
  grid: dict[str, list[str]] = {}
  for one in given:
    key, equals, text = one.removeprefix('config.').partition('=')
    values = text.split(',')
    if not (key and equals and all(values)):
      raise UserError(f'--grid={one}: must be KEY=VALUE,VALUE, such as loss.gamma=1,2')
    if key in grid or len(set(values)) < len(values):
      raise UserError(f'--grid={one}: name each key and each value only once')
    if key in ('seed', 'recipe'):
      raise UserError(f'--grid={one}: use --seeds and --methods instead')
    grid[key] = values
  return grid


def cells(
  methods: Sequence[str],
  seeds: Sequence[str],
  workdir: epath.Path,
  grid: Grid | None = None,
) -> list[Cell]:
  """Returns all cells, with the seeds of a method next to each other.

  Raises:
    UserError: a seed is not a number, or a method or seed is named twice.
  """
  grid = grid or {}
  for name, values in (('methods', methods), ('seeds', seeds)):
    if not values or len(set(values)) < len(values):
      raise UserError(
        f'--{name}: name at least one, and each only once: {",".join(values)}'
      )
  for seed in seeds:
    if not (seed.isascii() and seed.isdecimal() and str(int(seed)) == seed):
      raise UserError(f'--seeds: {seed!r} is not a whole number')
    if int(seed) > MOST_SEED:
      raise UserError(f'--seeds: {seed} is larger than {MOST_SEED}')
  points = [
    tuple(zip(grid, values, strict=True))
    for values in itertools.product(*grid.values())
  ]
  return [
    Cell(method, int(seed), workdir.joinpath(method, *_folder(point), seed), point)
    for method, point, seed in itertools.product(methods, points, seeds)
  ]


def _folder(point: Sequence[tuple[str, str]]) -> list[str]:
  """Returns the folder of a point of the grid; none without a grid."""
  name = ','.join(f'{key}={value}' for key, value in point)
  return [name.replace('/', '%')] if name else []


Board = Mapping[Cell, live.CellScreen]
"""The row of each cell in the table on a terminal; empty for plain lines."""


def sweep(
  chosen: Sequence[Cell],
  make_config: Callable[[str], ConfigDict],
  vectorise: bool = False,
  table: live.LiveTable | None = None,
  after: Callable[[float], None] = lambda seconds: None,
) -> dict[Cell, Exception]:
  """Runs the unfinished cells; a failure ends only its own cell.

  Args:
    chosen: the cells.
    make_config: recipe -> config.
    vectorise: whether to train the seeds of a method as one program.
    table: shows the cells, in this order; None for plain lines.
    after: called with the seconds taken whenever cells have ended and others follow.

  Returns:
    cell -> its error; empty if there was none.

  Raises:
    Preempted: it was asked to stop; the running cell has been saved.
  """
  failed: dict[Cell, Exception] = {}
  board = {cell: table.screen(i) for i, cell in enumerate(chosen)} if table else {}
  done = 0
  for _, group in itertools.groupby(
    chosen, key=lambda cell: (cell.method, cell.point) if vectorise else cell
  ):
    members, began = list(group), time.monotonic()
    seeds = ', '.join(str(cell.seed) for cell in members)
    done += len(members)
    if not table:
      print(f'\ncell {done} of {len(chosen)}: {members[0].label}, seed {seeds}')
    for cell in set(members) & set(board):
      board[cell].begin()
    ended = _attempt(members, make_config, board)
    wrong = {cell: error for cell, error in ended.items() if error is not None}
    for cell, error in wrong.items():
      place = f'{cell.label}, ' if table else ''
      print(f'failed: {place}seed {cell.seed}: {_line(error)}')
      _leave(cell, error)
    failed |= wrong
    for cell in set(members) & set(board):
      board[cell].end(cell in wrong, _headline(cell))
    if ended:
      seconds = time.monotonic() - began
      if table and not wrong:
        table.took(seconds, len(ended))
      if done < len(chosen):
        after(seconds)
  return failed


def _headline(cell: Cell) -> str:
  """Returns the first test metric of a result; '' without one."""
  from lt_jax.evals import titles

  try:
    test = files.read_json(cell.workdir / 'result.json')['test']
    name = next(name for name in titles() if test.get(name) is not None)
    return f'{100 * test[name]:.1f} % {titles()[name]}'
  except (UserError, LookupError, TypeError, AttributeError, StopIteration):
    return ''


def _line(error: Exception) -> str:
  return f'{type(error).__name__}: {one_line(error)}'


def _leave(cell: Cell, error: Exception) -> None:
  """Writes error.json: a cell that fails to start leaves no other trace.

  If the folder belongs to another run, nothing is written.
  """
  from lt_jax.run import OtherConfig

  if isinstance(error, files.InUse | OtherConfig):
    return
  record = {'recipe': cell.method, 'seed': cell.seed, 'error': _line(error)}
  with contextlib.suppress(OSError):  # which may be why the cell failed
    cell.workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(cell.workdir / 'error.json', record)


def _code(failed: Iterable[Exception]) -> int:
  """Returns the exit code of a sweep, which says whether running it again may help."""
  codes = {
    TRY_AGAIN  # once the other sweep is done
    if isinstance(error, files.InUse)
    else (commands.explained(error) or ('', WRONG_INPUT))[1]
    for error in failed
  }
  return TRY_AGAIN if TRY_AGAIN in codes else min(codes)


def _attempt(
  cells: Sequence[Cell], make_config: Callable[[str], ConfigDict], board: Board
) -> dict[Cell, Exception | None]:
  """Runs cells of one method, one by one if they cannot run together.

  Returns:
    cell -> its error or None, without cells that had already finished.
  """
  from lt_jax.train import Preempted

  try:
    return _run(cells, make_config, board)
  except (Preempted, KeyboardInterrupt):
    raise
  except Exception as error:  # of any kind: the other cells must run
    if commands.explained(error) is None:
      traceback.print_exc()
    if len(cells) == 1:
      return {cells[0]: error}
    print(f'cannot run as one program: {error}')
  alone = [_attempt([cell], make_config, board) for cell in cells]
  return {cell: error for ended in alone for cell, error in ended.items()}


def _run(
  cells: Sequence[Cell], make_config: Callable[[str], ConfigDict], board: Board
) -> dict[Cell, Exception | None]:
  """Runs the unfinished cells of one method, as one program if there are several.

  Returns:
    cell -> None, or its error if it diverged while others went on.
  """
  from lt_jax import run

  configs = {}
  for cell in cells:
    config = at_point(make_config(cell.method), cell.point)
    config.seed = cell.seed
    configs[cell] = resolve(config)
    if _finished(cell, configs[cell]):
      if not board:
        print(f'already finished: {cell.workdir}')
      del configs[cell]
  if not configs:
    return {}
  if len(configs) == 1:
    ((cell, config),) = configs.items()
    tracker = TRACKER.value
    run.run(config, cell.workdir, tracker=tracker, screen=board.get(cell))
    return {cell: None}
  screens = [board[cell] for cell in configs if board]
  workdirs = [cell.workdir for cell in configs]
  ends = run.run_seeds([*configs.values()], workdirs, screens)
  pairs = zip(configs, ends, strict=True)
  return {cell: end if isinstance(end, Exception) else None for cell, end in pairs}


def at_point(config: ConfigDict, point: Sequence[tuple[str, str]]) -> ConfigDict:
  """Sets the keys of a point of the grid, each with its own type.

  Raises:
    UserError: there is no such key, or it does not take the value.
  """
  if not point:
    return config
  try:
    config_file.prepare(config, dict(point))
    config.update_from_flattened_dict({key: _value(text) for key, text in point})
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    setting = ','.join(f'{key}={text}' for key, text in point)
    raise UserError(f'--grid: {setting}: {one_line(error)}') from None
  return config


def _value(text: str) -> Any:
  """Returns a number or boolean if the text is one, else the text."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _finished(cell: Cell, config: Mapping[str, Any]) -> bool:
  """Returns whether a cell has finished, with this config."""
  from lt_jax import provenance

  try:
    result = files.read_json(cell.workdir / 'result.json')
    before = provenance.read_config(cell.workdir)
  except UserError:  # missing or damaged; the run writes the result again
    return False
  whole = isinstance(result.get('test'), Mapping)
  return whole and not provenance.changes(before, config, same_place=True)


def loader(
  path: str, options: str, overrides: Mapping[str, Any]
) -> Callable[[str], ConfigDict]:
  """Returns the function that makes the config of a recipe.

  Args:
    path: of the config file, or the name of one in the package.
    options: for all recipes, such as 'net=resnet8,epochs=40'. They may name a recipe,
      to have its keys, but it is not the one that runs.
    overrides: key -> value, for all recipes.
  """
  get_config = config_file.loader(path)

  def make(recipe: str) -> ConfigDict:
    config = get_config(','.join(filter(None, (options, recipe))))
    if config.recipe != recipe:
      raise UserError(
        f'--methods: {recipe!r} is not a recipe; options go after the colon of '
        f'--config, as in --config=FILE.py:{recipe}'
      )
    try:
      config_file.prepare(config, overrides)
      config.update_from_flattened_dict(overrides)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise UserError(f'{recipe}: {one_line(error)}') from None
    check_set_domains(config, overrides)
    return config

  return make


@contextlib.contextmanager
def _table(cells: Sequence[Cell]) -> Iterator[live.LiveTable | None]:
  """Opens the table of the cells if output goes to a terminal."""
  console = terminal(soft_wrap=False)
  if not console.is_terminal:
    yield None
    return
  with live.LiveTable([(cell.label, cell.seed) for cell in cells], console) as table:
    yield table


def _write_page(workdir: epath.Path, seconds: float) -> None:
  """Writes the report while the sweep goes on, with figures after a long cell."""
  from lt_jax import report

  try:
    report.write(workdir, draw=seconds >= LONG_CELL)
  except (OSError, UserError) as error:
    print(f'the report was not written: {error}')


def _remember(methods: Sequence[str], workdir: epath.Path) -> None:
  """Writes the methods of a folder in the order in which they were given.

  Those of an earlier sweep in the same folder come first.
  """
  from lt_jax.report import runs

  every = dict.fromkeys([*runs.methods(workdir), *methods])
  files.write_json(workdir / runs.ORDER, {'methods': [*every]})


def main() -> None:
  """Runs the sweep that the flags name."""
  import jax

  from lt_jax import report

  if METHODS.value is None:
    raise UserError('--methods is missing: names of recipes, such as ce,ldam_drw')
  flag = flags.FLAGS['config']
  path, _, options = flag.config_filename.partition(':')
  overrides = config_file.overrides()
  for key in ('seed', 'recipe'):
    if key in overrides:
      raise UserError(
        f'--config.{key}: a sweep sets this; use --methods and --seeds instead'
      )
  grid = parse_grid(GRID.value)
  if twice := sorted(set(grid) & set(overrides)):
    raise UserError(f'{twice[0]} is set by both --grid and --config.{twice[0]}')
  every = cells(METHODS.value, SEEDS.value, files.absolute(WORKDIR.value), grid)
  make_config = loader(path, options, overrides)
  for cell in every:  # wrong names are reported before anything runs
    if cell.seed == every[0].seed:
      at_point(make_config(cell.method), cell.point)
  if LIST.value:
    for number, cell in enumerate(every):
      print(f'{number}  {cell.label}, seed {cell.seed}: {cell.workdir}')
    return
  if CELL.value is not None and not 0 <= CELL.value < len(every):
    raise UserError(f'--cell is {CELL.value}; cells are 0 to {len(every) - 1}')
  allocator.keep_pages(make_config(METHODS.value[0]))  # methods share data and batch
  workdir = files.make_workdir(WORKDIR.value)
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:  # seeds share their programs
    jax.config.update('jax_compilation_cache_dir', os.fspath(workdir / '.compiled'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  if VECTORISE.value and TRACKER.value:
    raise UserError('--vectorise: a tracker takes one run at a time; omit --tracker')
  _remember(METHODS.value, workdir)
  chosen = every if CELL.value is None else [every[CELL.value]]
  whole = CELL.value is None  # a single cell, as on a cluster, does not write the page
  after = functools.partial(_write_page, workdir) if whole else lambda seconds: None
  with _table(chosen) as table:
    failed = sweep(chosen, make_config, VECTORISE.value, table, after)
  left = [c.workdir / name for c in every for name in ('config.json', 'error.json')]
  if whole and any(path.exists() for path in left):
    try:
      page = report.write(workdir)
      print(f'\n{report.summary(workdir)}\n\n{page}')
    except (OSError, UserError) as error:
      if not failed:
        raise
      print(f'the report was not written: {error}')  # the failures follow
  if failed:
    errors = '; '.join(f'{c.label}/{c.seed}: {_line(e)}' for c, e in failed.items())
    text = f'{len(failed)} of {len(chosen)} cells failed: {errors}'
    commands.fail(text, _code(failed.values()))


if __name__ == '__main__':
  commands.launch(main, 'config', 'workdir')
