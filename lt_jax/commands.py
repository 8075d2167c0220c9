"""How a command ends: one line for a person, an exit code for a launcher.

0    finished
2    something you gave is wrong: one line says what; running again will not help
3    diverged: a loss or parameter is not finite; no such State was saved
75   a temporary failure, such as a full disk: running again may help
130  interrupted from the keyboard: saved files are intact
143  asked to stop (SIGTERM, SIGUSR1, SIGHUP) and saved: run again to resume
"""

import importlib
import importlib.util
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from lt_jax import config_file
from lt_jax.errors import (
  DIVERGED,
  INTERRUPTED,
  PREEMPTED,
  TRY_AGAIN,
  WRONG_INPUT,
  UserError,
  one_line,
)

flags.disclaim_key_flags()  # so that --help of a command shows those defined here

Flag = flags.Flag | flags.FlagHolder

GRACE = 3.0
"""Seconds that process 0 of several gives the others to end."""


def _shared(name: str, define: Callable[..., Flag], *options: Any) -> Flag:
  """Returns a flag that several commands share; a process defines it only once."""
  if name not in flags.FLAGS:
    return define(name, *options)
  flags.declare_key_flag(name)
  return flags.FLAGS[name]


class _PathParser(flags.ArgumentParser):
  """Expands ~, which a shell does not expand after an equals sign."""

  def parse(self, argument: str) -> str:
    return os.path.expanduser(argument)

  def flag_type(self) -> str:
    return 'path'


def path_flag(name: str, help: str) -> Flag:
  """Returns a flag that takes a path."""

  def define(name: str) -> Flag:
    return flags.DEFINE(_PathParser(), name, None, help)

  return _shared(name, define)


class _ModuleParser(flags.ArgumentParser):
  """Imports a module by its name."""

  def parse(self, argument: str) -> str:
    sys.path.insert(0, os.getcwd())  # installed commands lack it
    if argument.endswith('.py'):
      raise UserError(f'--import={argument}: give the name of the module, without .py')
    try:
      spec = importlib.util.find_spec(argument.partition('.')[0])  # imports nothing
    except ValueError:  # the name is empty
      spec = None
    if spec is None:
      raise UserError(
        f'--import={argument}: there is no such module in this folder or on PYTHONPATH'
      )
    with config_file.errors_name_the_line(spec.origin or argument):
      importlib.import_module(argument)
    return argument

  def flag_type(self) -> str:
    return 'module'


def import_flag() -> Flag:
  """Returns the flag --import, which every command has."""
  help = 'A Python module of yours to import first, such as one that adds a loss.'

  def define(name: str) -> Flag:
    return flags.DEFINE(_ModuleParser(), name, None, help)

  return _shared('import', define)


def _imports_first(arguments: Sequence[str]) -> list[str]:
  """Puts --import before --config, whose file may use what the module adds."""
  first, others, left = [], [], iter(arguments)
  for one in left:
    if one == '--':  # what follows are no flags
      others += [one, *left]
    elif re.match('--?import(=|$)', one):
      first += [one, *itertools.islice(left, '=' not in one)]
    else:
      others.append(one)
  return first + others


def workdir_flag(help: str = 'The folder of the run.') -> Flag:
  """Returns the flag --workdir."""
  return path_flag('workdir', help)


def config_flag() -> Flag:
  """Returns the flag --config."""
  help = 'FILE.py:ARGUMENT, or the NAME of a config that comes with lt_jax, such as '
  help += 'digits_lt:ldam_drw,epochs=40; --config.KEY=VALUE sets a key.'
  return _shared('config', config_file.define, None, help)


def data_dir_flag() -> Flag:
  """Returns the flag --data_dir."""
  help = 'Where the data are, if they have moved; see docs/tools.md.'
  return path_flag('data_dir', help)


def out_flag(help: str = 'The file to write.') -> Flag:
  """Returns the flag --out."""
  return path_flag('out', help)


def init_flag() -> Flag:
  """Returns the flag --init."""
  help = 'The network that computes features: a run folder, or published weights.'
  return _shared('init', flags.DEFINE_string, '', help)


def list_flag(name: str, help: str) -> Flag:
  """Returns a flag that takes several values, separated by commas."""
  return _shared(name, flags.DEFINE_list, [], help)


def tracker_flag() -> Flag:
  """Returns the flag --tracker."""
  return _shared(
    'tracker', flags.DEFINE_string, '', 'Where to log too: wandb or trackio.'
  )


def which_flag(default: str = 'the one that result.json describes') -> Flag:
  """Returns the flag --which.

  Args:
    default: which checkpoint the command uses without it, in words.
  """
  help = f'The last checkpoint, or the best by config.select; by default {default}.'
  return _shared('which', flags.DEFINE_enum, None, ['last', 'best'], help)


def cause(error: flags.Error) -> Exception:
  """Returns the `UserError` that a flag's error wraps, or the error itself."""
  inner = error.__context__
  return inner if isinstance(inner, UserError) else error


def launch(
  command: Callable[..., None],
  *required: str,
  arguments: int | None = 0,
  wanted: str = 'one argument',
) -> NoReturn:
  """Parses the flags, runs a command and exits with its code.

  Args:
    command: takes the positional arguments and reads its flags.
    *required: names of the flags that must be given.
    arguments: how many positional arguments it takes: 0 or 1; None: any number.
    wanted: what a single one is, such as 'the folder of a run'.
  """
  import_flag()

  def parse(given: Sequence[str]) -> list[str]:
    try:
      rest = flags.FLAGS([given[0], *_imports_first(given[1:])])
    except SystemExit:  # from --help, which absl treats as a failure
      sys.exit(0)
    except flags.Error as error:
      fail(cause(error), WRONG_INPUT)
    except (AttributeError, LookupError, TypeError, ValueError, OSError) as error:
      fail(f'--config: {error}', WRONG_INPUT)
    for name in required:
      if flags.FLAGS[name].value is None:
        fail(f'--{name} is missing', WRONG_INPUT)
    if arguments == 0 and rest[1:]:
      fail(f'{rest[1]!r} is not an option: options are --NAME=VALUE', WRONG_INPUT)
    if arguments == 1 and len(rest) != 2:
      many = f', not {len(rest) - 1} arguments' if rest[1:] else ''
      fail(f'give {wanted}{many}', WRONG_INPUT)
    logging.set_verbosity(logging.FATAL)  # Orbax also raises what it logs
    sys.stdout.reconfigure(errors='backslashreplace')  # for paths that are not UTF-8
    return rest

  app.run(lambda rest: exit_code(lambda: command(*rest[1:])), flags_parser=parse)
  raise AssertionError('app.run returned')


def exit_code(command: Callable[[], None]) -> int:
  """Runs a command and returns 0; if it fails, says why and exits with its code."""
  try:
    command()
    if _one_of_several():
      _leave_together()
  except KeyboardInterrupt:
    fail('interrupted; saved files are intact', INTERRUPTED)
  except Exception as error:
    known = explained(error)
    if known is None:
      raise
    fail(*known)
  return 0


def explained(error: Exception) -> tuple[str, int] | None:
  """Returns the message and exit code for an error; None if it is a bug of ours."""
  if isinstance(error, UserError):
    return str(error), WRONG_INPUT

  from lt_jax.checkpoint import SaveError
  from lt_jax.train import Diverged, Preempted

  if isinstance(error, Preempted):
    return 'stopped on request and saved: run the same command to resume', PREEMPTED
  if isinstance(error, Diverged):
    advice = 'that step was not saved, and the same command would diverge again: '
    advice += 'change the config, in another workdir or with --allow_config_change'
    return f'diverged: {error}; {advice}', DIVERGED
  if isinstance(error, SaveError):
    return f'a checkpoint could not be written: {error}', TRY_AGAIN
  if isinstance(error, IsADirectoryError | NotADirectoryError | FileExistsError):
    return f'{error}: a file is where a folder should be, or vice versa', WRONG_INPUT
  if isinstance(error, OSError):
    return f'{error}; saved files are intact', TRY_AGAIN
  return None


def fail(error: BaseException | str, code: int) -> NoReturn:
  """Ends the process with one line and an exit code."""
  if code == INTERRUPTED:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # impatient users press Ctrl-C twice
  try:
    print(f'error: {one_line(error)}', file=sys.stderr, flush=True)
  except OSError:  # the terminal is closed
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
  end(code)


def end(code: int) -> NoReturn:
  """Ends the process with an exit code other than 0."""
  if _one_of_several():
    # JAX's shutdown would wait minutes for peers that are waiting for us.
    _leave(code)
  if code == INTERRUPTED or _read_is_stuck():  # does not wait for unfinished work
    sys.stdout.flush()
    os._exit(code)
  sys.exit(code)


def _leave_together() -> NoReturn:
  """Ends this process successfully once the others have finished, too.

  JAX's own shutdown sometimes aborts a process that has finished: process 0 stops the
  service that connects them before the others have let go of it.
  """
  from lt_jax import stopping

  stopping.wait_for_all('finished')
  _leave(0)


def _leave(code: int) -> NoReturn:
  """Ends this process, one of several, without JAX's shutdown.

  Process 0 connects the others, which die with it, so it leaves last.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  if sys.modules['jax'].process_index() == 0:
    time.sleep(GRACE)
  os._exit(code)


def _read_is_stuck() -> bool:
  """Returns whether a read that hangs would keep this process from exiting."""
  reading = sys.modules.get('lt_jax.data.reading')
  return bool(reading) and reading.is_stuck()


def _one_of_several() -> bool:
  """Returns whether this is one of several processes of a run."""
  jax = sys.modules.get('jax')
  return bool(jax) and jax.distributed.is_initialized() and jax.process_count() > 1
