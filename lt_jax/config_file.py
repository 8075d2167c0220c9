"""The flag --config: a Python file, its argument, and single keys to set.

  --config=digits_lt:ldam_drw,epochs=40 --config.optimizer.name=adam

The configs that come with the package are found by name from any folder.
ml_collections parses the values of keys. Mistakes in a file are reported with file and
line.
"""

import contextlib
import importlib.machinery
import importlib.util
import itertools
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from lt_jax.errors import UserError, suggest

flags.disclaim_key_flags()  # --help shows those of a command

SHIPPED = pathlib.Path(__file__).parent / 'configs'
"""The folder of the configs that come with the package."""


def define(name: str, default: str | None, help: str) -> flags.FlagHolder:
  """Defines the flag."""
  holder = config_flags.DEFINE_config_file(name, default, help)
  flags.FLAGS[name].parser = _Parser()
  flags.FLAGS[name].default_as_str = default  # --help would show "None"
  return holder


class _Parser(flags.ArgumentParser):
  """Makes a locked config that has every key that the command line sets."""

  def parse(self, argument: str) -> ConfigDict:
    config = make(argument)
    prepare(
      config, _given(flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False))
    )
    config.lock()
    return config

  def flag_type(self) -> str:
    return 'config'


def _given(arguments: Sequence[str]) -> dict[str, str]:
  """Returns the keys that --config.KEY=VALUE and --config.KEY VALUE set."""
  given = {}
  for argument, following in itertools.zip_longest(arguments, arguments[1:]):
    if match := re.match(r'--?(?:no)?config\.([^=]+)(=.*)?', argument, re.DOTALL):
      given[match[1]] = match[2][1:] if match[2] else following
  return given


def overrides() -> dict[str, Any]:
  """Returns key -> value as --config.KEY=VALUE sets them."""
  return config_flags.get_override_values(flags.FLAGS['config'])


def prepare(config: ConfigDict, given: Mapping[str, Any]) -> None:
  """Prepares a config for keys that are about to be set, see `options.prepare`."""
  if given:
    from lt_jax import options  # imports JAX

    options.prepare(config, given)


def make(path_and_argument: str) -> ConfigDict:
  """Returns the config of FILE.py:ARGUMENT or NAME:ARGUMENT.

  Raises:
    UserError: there is no such file, or it raises an error.
  """
  name, colon, argument = path_and_argument.partition(':')
  return loader(name)(*[argument] * bool(colon))


def loader(name: str) -> Callable[..., ConfigDict]:
  """Loads a config file and returns its `get_config`.

  Args:
    name: a path, or the name of a config that comes with the package.

  Raises:
    UserError: there is no such file, or it raises an error. The returned function
      raises the same if the file's `get_config` fails.
  """
  path = os.fspath(find(name))
  file = importlib.machinery.SourceFileLoader('lt_jax_config', path)
  module = importlib.util.module_from_spec(
    importlib.util.spec_from_loader(file.name, file)
  )
  with errors_name_the_line(path):
    sys.modules[file.name] = module  # dataclasses look it up
    file.exec_module(module)
  if not callable(getattr(module, 'get_config', None)):
    raise UserError(f'{path} defines no function get_config')

  def get_config(*argument: str) -> ConfigDict:
    with errors_name_the_line(path):
      config = module.get_config(*argument)
    if not isinstance(config, ConfigDict):
      found = type(config).__name__
      raise UserError(
        f'{path}: get_config must return a ConfigDict; it returns {found}'
      )
    return config

  return get_config


def find(name: str) -> pathlib.Path:
  """Returns the path of a config file.

  Args:
    name: a path, or the name of a config that comes with the package.

  Raises:
    UserError: there is no such file.
  """
  path = pathlib.Path(name).expanduser()
  if path.is_file():
    return path
  shipped = {file.stem: file for file in sorted(SHIPPED.glob('*.py'))}
  if name in shipped:
    return shipped[name]
  near = suggest(path.stem, shipped)
  if not name:
    raise UserError('--config is empty: name a config, such as digits_lt:ldam_drw')
  raise UserError(
    f'there is no config file {name}{near}{"" if near.endswith("?") else "."} Give a '
    'config that comes with lt_jax by its name, without folder and .py, such as '
    '--config=digits_lt'
  )


@contextlib.contextmanager
def errors_name_the_line(path: str) -> Iterator[None]:
  """Turns errors in a user's file into a `UserError` with file and line."""
  try:
    yield
  except UserError:
    raise
  except (Exception, SystemExit) as error:
    if isinstance(error, SyntaxError):
      file = error.filename or ''  # it may be one that the user's file imports
      path = file if os.path.isfile(file) else path
      place = f'{path}:{error.lineno}' if error.lineno else path
    else:
      frames = traceback.extract_tb(error.__traceback__)
      lines = [frame.lineno for frame in frames if frame.filename == path]
      place = f'{path}:{lines[-1]}' if lines else path
    # The text of a syntax error would repeat the place.
    text = getattr(error, 'msg', error)
    raise UserError(f'{place}: {type(error).__name__}: {text}') from error
