"""Lists the commands: python -m lt_jax; or the recipes: python -m lt_jax recipes."""

import sys
from typing import NoReturn

from lt_jax.errors import WRONG_INPUT, suggest

COMMANDS = {
  'main': 'train one run, or resume it',
  'sweep': 'train several methods and seeds, and compare them',
  'doctor': 'look for problems before a long run',
  'plan': 'estimate memory, time and cost of a run without starting it',
  'report': 'write a page about a run, or about several',
  'evaluate': 'evaluate a run again',
  'predict': 'predict the classes of images',
  'export': 'write the network of a run to a single file',
  'probe': 'measure how useful each layer of a network is',
  'similarity': 'find out which source suits a target',
  'inside': 'look into a finished run: weights of examples, attention, memory',
  'prepare': 'prepare a data set once, so that it loads fast',
  'convert': 'convert PyTorch weights to .safetensors',
}
"""Module -> what it does."""


def main(arguments: list[str]) -> None:
  """Prints the commands, or the recipes; exits with `WRONG_INPUT` otherwise."""
  if arguments[:1] == ['recipes']:
    from lt_jax.recipes import RECIPES

    print('\n'.join(sorted(RECIPES)))
    return
  if arguments and arguments[0] not in ('-h', '--help'):
    _refuse(arguments[0])
  print('Commands, each with its own --help:\n')
  for name, what in COMMANDS.items():
    print(f'  python -m lt_jax.{name:<10}  {what}')
  print(
    '\n  python -m lt_jax recipes     list the recipes, which docs/methods.md explains'
  )


def _refuse(name: str) -> NoReturn:
  """Says how a command is run, or that there is none of this name, and exits."""
  from lt_jax.commands import fail

  if name in COMMANDS:
    fail(f'write a dot before the command: python -m lt_jax.{name}', WRONG_INPUT)
  near = suggest(name, [*COMMANDS, 'recipes'])
  fail(f'there is no command {name!r}{near}', WRONG_INPUT)


if __name__ == '__main__':
  main(sys.argv[1:])
