"""How a command ends: one line for a person, an exit code for a launcher.

0    finished
2    something you gave is wrong: one line says what; running again will not help
3    diverged: a loss or parameter is not finite; no such State was saved
75   a temporary failure, such as a full disk: running again may help
130  interrupted from the keyboard: saved files are intact
143  asked to stop (SIGTERM, SIGUSR1, SIGHUP) and saved: run again to resume
"""

import os
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
"""Seconds that process 0 of several leaves the others to find the same mistake."""


def _shared(name: str, define: Callable[..., Flag], *options: Any) -> Flag:
  """Returns a flag that several commands have; one of all that a process imports."""
  if name not in flags.FLAGS:
    return define(name, *options)
  flags.declare_key_flag(name)
  return flags.FLAGS[name]


class _PathParser(flags.ArgumentParser):
  """Expands ~, which a shell leaves alone behind a =."""

  def parse(self, argument: str) -> str:
    return os.path.expanduser(argument)

  def flag_type(self) -> str:
    return 'path'


def path_flag(name: str, told: str) -> Flag:
  """Returns a flag that takes a path."""

  def define(name: str) -> Flag:
    return flags.DEFINE(_PathParser(), name, None, told)

  return _shared(name, define)


def workdir_flag() -> Flag:
  """Returns the flag --workdir."""
  told = 'The folder of the run, or runs, such as runs/digits.'
  return path_flag('workdir', told)


def config_flag() -> Flag:
  """Returns the flag --config."""
  told = 'FILE.py:ARGUMENT, or the NAME of a config that comes with lt_jax, such as '
  told += 'digits_lt:ldam_drw,epochs=40; --config.KEY=VALUE sets a key.'
  return _shared('config', config_file.define, None, told)


def data_dir_flag() -> Flag:
  """Returns the flag --data_dir."""
  told = 'Where the data are, if they have moved; see docs/tools.md.'
  return path_flag('data_dir', told)


def out_flag() -> Flag:
  """Returns the flag --out."""
  return path_flag('out', 'The file to write.')


def init_flag() -> Flag:
  """Returns the flag --init."""
  told = 'The network that computes features: a run folder, or published weights.'
  return _shared('init', flags.DEFINE_string, '', told)


def list_flag(name: str, told: str) -> Flag:
  """Returns a flag that takes several values, with commas between them."""
  return _shared(name, flags.DEFINE_list, [], told)


def tracker_flag() -> Flag:
  """Returns the flag --tracker."""
  told = 'Also logs to wandb or trackio.'
  return _shared('tracker', flags.DEFINE_string, '', told)


def which_flag() -> Flag:
  """Returns the flag --which."""
  told = 'The last State, or the one selected on val. By default the one in the '
  told += 'result; evaluate uses the last.'
  return _shared('which', flags.DEFINE_enum, None, ['last', 'best'], told)


def cause(error: flags.Error) -> Exception:
  """Returns the message that an error of a flag wraps, where it is clear without."""
  inner = error.__context__
  return inner if isinstance(inner, UserError) else error


def launch(
  command: Callable[..., None], *required: str, arguments: int | None = 0
) -> NoReturn:
  """Parses the flags, runs a command and exits with its code.

  Args:
    command: takes the arguments, reads its flags and raises what goes wrong.
    *required: names of the flags that must be given.
    arguments: how many arguments that are no flags it takes; None: any number.
  """

  def parse(given: Sequence[str]) -> list[str]:
    try:
      rest = flags.FLAGS(list(given))
    except SystemExit:  # of --help, which absl calls a failure
      sys.exit(0)
    except flags.Error as error:
      fail(cause(error), WRONG_INPUT)
    except (AttributeError, LookupError, TypeError, ValueError, OSError) as error:
      fail(f'--config: {error}', WRONG_INPUT)
    for name in required:
      if flags.FLAGS[name].value is None:
        fail(f'--{name} is missing', WRONG_INPUT)
    if arguments is not None and len(rest) - 1 != arguments:
      many = 'one argument is' if arguments == 1 else f'{arguments} arguments are'
      fail(f'{many} expected, got {rest[1:]}', WRONG_INPUT)
    logging.set_verbosity(logging.FATAL)  # what Orbax logs, it raises too
    sys.stdout.reconfigure(errors='backslashreplace')  # of paths that are no UTF-8
    return rest

  app.run(lambda rest: exit_code(lambda: command(*rest[1:])), flags_parser=parse)
  raise AssertionError('app.run returned')


def exit_code(command: Callable[[], None]) -> int:
  """Runs a command; returns its exit code, after saying what went wrong."""
  try:
    command()
  except KeyboardInterrupt:
    fail('interrupted; what was saved is whole', INTERRUPTED)
  except Exception as error:
    known = explained(error)
    if known is None:
      raise
    fail(*known)
  return 0


def explained(error: Exception) -> tuple[str, int] | None:
  """Returns a line for a person and the exit code of an error; None of a bug."""
  if isinstance(error, UserError):
    return str(error), WRONG_INPUT

  from lt_jax.checkpoint import SaveError
  from lt_jax.train import Diverged, Preempted

  if isinstance(error, Preempted):
    return 'stopped as asked, and saved: the same command goes on', PREEMPTED
  if isinstance(error, Diverged):
    told = 'nothing of it was saved, and the same command would diverge again: change '
    told += 'the config, in another workdir or with --allow_config_change'
    return f'diverged: {error}; {told}', DIVERGED
  if isinstance(error, SaveError):
    return f'a checkpoint could not be written: {error}', TRY_AGAIN
  if isinstance(error, IsADirectoryError | NotADirectoryError | FileExistsError):
    return f'{error}: a folder and a file have changed places; remove it', WRONG_INPUT
  if isinstance(error, OSError):
    return f'{error}; what was saved is whole', TRY_AGAIN
  return None


def fail(error: BaseException | str, code: int) -> NoReturn:
  """Ends the process with one line and an exit code."""
  if code == INTERRUPTED:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who is in a hurry sends two
  try:
    print(f'error: {one_line(error)}', file=sys.stderr, flush=True)
  except OSError:  # the terminal is closed
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
  if _one_of_several():
    # Not through JAX's farewell, which waits minutes for peers that wait for us. The
    # others end with process 0, which connects them, unless it leaves them some time.
    sys.stdout.flush()
    if sys.modules['jax'].process_index() == 0:
      time.sleep(GRACE)
    os._exit(code)
  if code == INTERRUPTED or _reads_still():  # not in wait of what was under way
    sys.stdout.flush()
    os._exit(code)
  sys.exit(code)


def _reads_still() -> bool:
  """Returns whether a read that hangs would keep this process from its end."""
  reading = sys.modules.get('lt_jax.data.reading')
  return bool(reading) and reading.is_stuck()


def _one_of_several() -> bool:
  """Returns whether this is a process of a run of several."""
  jax = sys.modules.get('jax')
  return bool(jax) and jax.distributed.is_initialized() and jax.process_count() > 1
