"""The list of commands."""

import importlib.util
import pathlib

import pytest

import lt_jax
from lt_jax import __main__ as listing
from lt_jax.recipes import RECIPES

FOLDER = pathlib.Path(lt_jax.__file__).parent


def test_every_command_is_listed(capsys):
  """A command is a module that ends by launching itself."""
  launching = {
    path.parent.name if path.stem == '__main__' else path.stem
    for path in [*FOLDER.glob('*.py'), *FOLDER.glob('*/__main__.py')]
    if '\n  commands.launch(' in path.read_text()
  }
  assert launching == {*listing.COMMANDS}
  listing.main(['--help'])
  lines = capsys.readouterr().out.splitlines()
  for name, what in listing.COMMANDS.items():
    assert any(f'lt_jax.{name} ' in line and what in line for line in lines)
    assert importlib.util.find_spec(f'lt_jax.{name}')


def test_what_is_no_command_is_refused(capsys):
  for given, message in (
    ('report', 'write a dot before the command: python -m lt_jax.report'),
    ('reprot', "there is no command 'reprot'; did you mean 'report'?"),
  ):
    with pytest.raises(SystemExit) as ended:
      listing.main([given])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f'error: {message}\n'


def test_the_recipes_are_listed(capsys):
  listing.main(['recipes'])
  assert set(capsys.readouterr().out.split()) == set(RECIPES)
