"""How a command ends: one line for a person, an exit code for a launcher.

0    finished
2    something given is wrong: one line says what; running again will not help
3    diverged: a loss or parameter is not finite; nothing of it was saved
75   a passing failure, such as a full disk: running again may help
130  interrupted from the keyboard: what was saved is whole
143  asked to stop (SIGTERM, SIGUSR1, SIGHUP) and saved: run again to go on
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from lt_jax.errors import (
  DIVERGED,
  INTERRUPTED,
  PREEMPTED,
  TRY_AGAIN,
  WRONG_INPUT,
  UserError,
)

Flag = flags.Flag | flags.FlagHolder

GRACE = 3.0
"""Seconds that process 0 of several leaves the others to find the same mistake."""


def _shared(name: str, define: Callable[..., Flag], *options: Any) -> Flag:
  """Returns a flag that several commands have; one of all that a process imports."""
  return flags.FLAGS[name] if name in flags.FLAGS else define(name, *options)


def workdir_flag() -> Flag:
  """Returns the flag --workdir."""
  return _shared(
    'workdir', flags.DEFINE_string, None, 'The folder of the run, or runs.'
  )


def config_flag() -> Flag:
  """Returns the flag --config."""
  told = 'FILE.py:ARGUMENT; overrides as --config.KEY=VALUE.'
  return _shared('config', config_flags.DEFINE_config_file, None, told)


def out_flag() -> Flag:
  """Returns the flag --out."""
  return _shared('out', flags.DEFINE_string, None, 'The file to write.')


def tracker_flag() -> Flag:
  """Returns the flag --tracker."""
  told = 'Logs to wandb or trackio as well.'
  return _shared('tracker', flags.DEFINE_string, '', told)


def which_flag() -> Flag:
  """Returns the flag --which."""
  told = 'The last State, or the one selected on val. By default the one that the '
  told += 'result is of; evaluate takes the last.'
  return _shared('which', flags.DEFINE_enum, None, ['last', 'best'], told)


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
      for name in required:
        value = flags.FLAGS[name].value
        if value is None:
          raise UserError(f'--{name} is missing')
        hasattr(value, 'to_dict')  # a config file that failed to load says so here
    except (AttributeError, KeyError) as error:  # of a config, with the near miss
      told = str(error).replace('\\n', '; ')
      told = told.replace('"', '').replace("'", '').replace('\\', '')
      fail(f'unknown config key {told}', WRONG_INPUT)
    except (flags.Error, ValueError, OSError) as error:
      fail(error, WRONG_INPUT)
    if arguments is not None and len(rest) - 1 != arguments:
      fail(f'{arguments} arguments are expected, got {rest[1:]}', WRONG_INPUT)
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
  if isinstance(error, OSError):
    return f'{error}; what was saved is whole', TRY_AGAIN
  return None


def fail(error: BaseException | str, code: int) -> NoReturn:
  """Ends the process with one line and an exit code."""
  if code == INTERRUPTED:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who is in a hurry sends two
  text = str(error).replace('\\n', '; ').replace("\\'", "'").strip()
  if 'Traceback (most recent call last)' in text:  # config_flags quotes a whole one
    text = text.splitlines()[-1].partition(': ')[2] or text.splitlines()[-1]
  text = ' '.join(text.strip('"').split())
  try:
    print(f'error: {text}', file=sys.stderr, flush=True)
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
