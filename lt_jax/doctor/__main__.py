"""Finds problems before a long run.

  python -m lt_jax.doctor --config=configs/digits_lt.py:ldam_drw [--workdir=DIR]

It checks the machine, the folder, the images and their labels, takes a step of every
stage, overfits one batch, and prints one line per check: ok, odd (it runs, but have a
look), wrong (it would fail, or its numbers would be meaningless) or skip. It exits with
2 if something is wrong, else with 0, and leaves nothing in the folder.
"""

import collections

from absl import flags

from lt_jax import allocator, commands, config_file, doctor
from lt_jax.config import resolve
from lt_jax.errors import WRONG_INPUT

CONFIG = commands.config_flag()
WORKDIR = commands.workdir_flag('The folder that the run will have; by default none.')
THOROUGH = flags.DEFINE_bool(
  'thorough', False, 'Decode every image and hash every record, not a sample.'
)


MOST_NAMED = 4
"""Checks that are skipped for the same reason are named if there are no more."""


def main() -> None:
  """Prints the findings; exits with `WRONG_INPUT` if something is wrong."""
  config = resolve(CONFIG.value, config_file.overrides())
  allocator.keep_pages(config)  # as the run will
  case = doctor.Case(config, WORKDIR.value, THOROUGH.value)
  counts, section = collections.Counter(), ''
  skipped: dict[str, list[str]] = {}
  for now, finding in doctor.examine(case):
    counts[finding.level] += 1
    if finding.level == 'skip':
      check, _, why = finding.text.partition(': ')
      skipped.setdefault(why, []).append(check)
      continue
    if now != section:
      print(now)
    section = now
    print(f'  {finding.level:5}  {finding.text}', flush=True)
  if skipped:
    print('skipped')
  for why, checks in skipped.items():
    named = ', '.join(checks) if len(checks) <= MOST_NAMED else f'{len(checks)} checks'
    print(f'  skip   {named}: {why}')
  levels = ('wrong', 'odd', 'ok', 'skip')
  summary = ', '.join(f'{counts[level]} {level}' for level in levels)
  print(f'found {summary}')
  if counts['wrong']:
    commands.end(WRONG_INPUT)


if __name__ == '__main__':
  commands.launch(main, 'config')
