"""Trains one run: python -m lt_jax.main --config=digits_lt:ldam_drw --workdir=runs/one.

The config is one that comes with lt_jax, or a file: --config=configs/digits_lt.py:ce.
Run the same command again to resume.

Exit codes: 0 finished; 2 something you gave is wrong; 3 diverged; 75 a temporary
failure, such as a full disk; 130 interrupted from the keyboard; 143 asked to stop, and
saved. docs/reliability.md says more.
"""

import os

from absl import flags

from lt_jax import allocator, commands, config_file
from lt_jax.errors import UserError

CONFIG = commands.config_flag()
WORKDIR = commands.workdir_flag('The folder of the run, which is made if need be.')
TRACKER = commands.tracker_flag()
ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
  'allow_config_change', False, 'Resume although the config differs from the saved one.'
)
DATA_DIR = commands.data_dir_flag()
PROFILE_STEPS = flags.DEFINE_string(
  'profile_steps', None, 'FIRST,LAST: the steps of which to record a profiler trace.'
)
DISTRIBUTED = flags.DEFINE_bool(
  'distributed', False, 'Start jax.distributed: this is one of several processes.'
)


def main() -> None:
  """Runs the configured training."""
  allocator.keep_pages(CONFIG.value)  # before anything imports JAX

  from lt_jax import provenance, run
  from lt_jax.config import resolve

  given = config_file.overrides()
  if 'recipe' in given:
    raise UserError('choose a recipe after the colon: --config=FILE.py:RECIPE')
  if DISTRIBUTED.value:
    _start_distributed()
  config = resolve(CONFIG.value, given)
  if DATA_DIR.value:
    config = provenance.moved(config, DATA_DIR.value)
  try:
    run.run(
      config,
      WORKDIR.value,
      allow_config_change=ALLOW_CONFIG_CHANGE.value,
      profile=_profile_steps(PROFILE_STEPS.value),
      tracker=TRACKER.value,
    )
  except run.OtherConfig as error:
    raise UserError(f'{error}, or --allow_config_change') from None


def _start_distributed() -> None:
  """Connects this process to the others of the run.

  JAX finds them by itself on Cloud TPU, SLURM, Open MPI and Kubernetes. Elsewhere, set
  JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and
  JAX_PROCESS_ID.
  """
  import jax

  names = {'num_processes': 'JAX_NUM_PROCESSES', 'process_id': 'JAX_PROCESS_ID'}
  numbers = {key: os.environ[name] for key, name in names.items() if name in os.environ}
  try:
    jax.distributed.initialize(**{key: int(text) for key, text in numbers.items()})
  except ValueError as error:
    raise UserError(f'--distributed: {error}; {_start_distributed.__doc__}') from None


def _profile_steps(text: str | None) -> tuple[int, int] | None:
  """Parses 'FIRST,LAST'."""
  if text is None:
    return None
  first, _, last = text.partition(',')
  if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
    raise UserError(f'--profile_steps is {text!r}; give two steps such as 100,110')
  return int(first), int(last)


if __name__ == '__main__':
  commands.launch(main, 'config', 'workdir')
