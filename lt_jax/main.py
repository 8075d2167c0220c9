"""Trains: python -m lt_jax.main --config=digits_lt:ldam_drw --workdir=runs/digits.

The config comes with lt_jax, or is a file: --config=configs/digits_lt.py:ce. Run the
same command again to resume. `lt_jax.commands` lists the exit codes.
"""

import os

from absl import flags

from lt_jax import allocator, commands, config_file
from lt_jax.errors import UserError

CONFIG, WORKDIR = commands.config_flag(), commands.workdir_flag()
TRACKER = commands.tracker_flag()
ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
  'allow_config_change', False, 'Resume although the config differs from the saved one.'
)
DATA_DIR = commands.data_dir_flag()
PROFILE_STEPS = flags.DEFINE_string(
  'profile_steps', None, 'FIRST,LAST: record a profiler trace of these steps.'
)
DISTRIBUTED = flags.DEFINE_bool(
  'distributed', False, 'Start jax.distributed, for a run of several processes.'
)


def main() -> None:
  """Runs the configured training."""
  allocator.keep_pages(CONFIG.value)  # before anything imports JAX

  from lt_jax import provenance, run
  from lt_jax.config import resolve

  given = config_file.overrides()
  if 'recipe' in given:
    raise UserError('a recipe is chosen after the colon: --config=FILE.py:RECIPE')
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

  Cloud TPU, SLURM, Open MPI and Kubernetes tell JAX who is who; elsewhere the variables
  JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID
  do.
  """
  import jax

  told = {'num_processes': 'JAX_NUM_PROCESSES', 'process_id': 'JAX_PROCESS_ID'}
  numbers = {key: os.environ[name] for key, name in told.items() if name in os.environ}
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
