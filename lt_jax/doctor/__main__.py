"""Finds problems before a long run.

  python -m lt_jax.doctor --config=configs/digits_lt.py:ldam_drw [--workdir=DIR]

Looks at the machine, the folder, the images and their labels, takes a step of every
stage, overfits one batch, and prints one line per check: ok, odd (runs, but look at
it), wrong (would fail, or its numbers would mean nothing) or skip. Exits with 2 if
something is wrong, else with 0. Leaves nothing in the folder.
"""

import collections

from absl import flags

from lt_jax import allocator, commands, config_file, doctor
from lt_jax.config import resolve
from lt_jax.errors import UserError

CONFIG, WORKDIR = commands.config_flag(), commands.workdir_flag()
THOROUGH = flags.DEFINE_bool(
  'thorough', False, 'Decode every image and hash every record, not a sample.'
)


def main() -> None:
  """Prints what is found.

  Raises:
    UserError: something is wrong.
  """
  config = resolve(CONFIG.value, config_file.overrides())
  allocator.keep_pages(config)  # as the run will
  case = doctor.Case(config, WORKDIR.value, THOROUGH.value)
  counts, section = collections.Counter(), ''
  for now, finding in doctor.examine(case):
    if now != section:
      print(now)
    section = now
    counts[finding.level] += 1
    print(f'  {finding.level:5}  {finding.text}', flush=True)
  levels = ('wrong', 'odd', 'ok', 'skip')
  told = ', '.join(f'{counts[level]} {level}' for level in levels)
  if counts['wrong']:
    raise UserError(f'found {told}')
  print(f'found {told}')


if __name__ == '__main__':
  commands.launch(main, 'config')
