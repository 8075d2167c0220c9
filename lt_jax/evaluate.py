"""Evaluates a finished or running run again: python -m lt_jax.evaluate --workdir=DIR.

It reads the config from DIR/config.json, and the newest checkpoint that passes every
check. It trains nothing, leaves the run's own files alone, and writes
DIR/evaluation.json.
"""

import contextlib
from collections.abc import Iterator

from absl import flags
from etils import epath

from lt_jax import (
  build,
  checkpoint,
  commands,
  files,
  provenance,
  results,
  trained,
)
from lt_jax.build import Experiment
from lt_jax.cautions import cautions
from lt_jax.config import CLOCK
from lt_jax.errors import UserError
from lt_jax.screen import Screen
from lt_jax.stage import BadImages
from lt_jax.surgeries import posthoc

WORKDIR = commands.workdir_flag()
WHICH = commands.which_flag('the last')
DATA_DIR = commands.data_dir_flag()
ADJUST = flags.DEFINE_float(
  'logit_adjustment', None, 'The multiple of the log prior to subtract from the logits.'
)
STAGE = flags.DEFINE_string(
  'stage', None, 'The stage to evaluate; by default the last.'
)


def main() -> None:
  """Evaluates the run that the flags name."""
  evaluate(
    files.absolute(WORKDIR.value),
    which=WHICH.value or 'last',
    stage_name=STAGE.value,
    logit_adjustment=ADJUST.value,
    data_dir=DATA_DIR.value,
  )


def evaluate(
  workdir: epath.Path,
  *,
  which: str = 'last',
  stage_name: str | None = None,
  logit_adjustment: float | None = None,
  data_dir: str | None = None,
) -> dict:
  """Evaluates a State of a run and writes evaluation.json.

  Args:
    workdir: the run's folder.
    which: 'last' or 'best'.
    stage_name: the stage; None for the last one.
    logit_adjustment: tau of `posthoc.adjust_logits`; None leaves the logits alone.
    data_dir: where the data are now, see `provenance.moved`; None: where the run found
      them, or else where its config says.

  Returns:
    What evaluation.json holds.

  Raises:
    UserError: there is no such run or State, it is damaged, its data are missing, or
      evaluation.json cannot be written (the numbers have been shown by then).
  """
  experiment = with_data(workdir, data_dir)
  config = experiment.config
  name = stage_name or config['stage_order'][-1]
  if name not in experiment.stages:
    raise UserError(f'no stage {name!r}; there are {", ".join(experiment.stages)}')
  stage = experiment.stages[name]
  restored = trained.restore(workdir, stage, experiment.mesh, which)
  if logit_adjustment is not None:
    learned = stage.images[stage.trained_on[CLOCK]]
    counts = learned.counts(len(stage.dataset.class_names))
    adjusted = posthoc.adjust_logits(stage.method, counts=counts, tau=logit_adjustment)
    stage = stage._replace(method=adjusted)
  screen = Screen()
  screen.line(
    f'evaluating the {which} checkpoint of stage {name!r}, step {restored.step}'
  )
  if len(experiment.domains) > 1:
    screen.line(f'images: {experiment.evaluates_by(stage)}')

  def tell(event: str, split: str, image: str) -> None:
    screen.line(f'{event.replace("_", " ")}: split {split}, image {image}')

  evaluated = results.evaluate(
    experiment,
    stage,
    restored.state,
    bad_images=BadImages(stage.images, tell, ()),
  )
  result = {
    'recipe': config['recipe'],
    'seed': config['seed'],
    'stage': name,
    'which': which,
    'logit_adjustment': logit_adjustment,
    'step': restored.step,
    'verified': restored.verified,
    **evaluated.metrics,
    'threshold': evaluated.threshold,
    'warnings': cautions(experiment),
    'state_sha256': checkpoint.digest(restored.state),
  }
  best_by = {'select': '/'.join(stage.select[:2])} if which == 'best' else {}
  results.show(result | best_by, screen)
  files.write_json(workdir / 'evaluation.json', results.jsonable(result))
  screen.line(f'file: {workdir / "evaluation.json"}')
  return result


def with_data(workdir: epath.Path, data_dir: str | None) -> Experiment:
  """Rebuilds a run with the data it was trained on.

  Args:
    workdir: the run's folder.
    data_dir: as for `evaluate`.

  Raises:
    UserError: there is no such run, or its data have changed.
  """
  config = trained.read_config(workdir)
  facts = trained.read_facts(workdir)
  with trained.building(), _naming(data_dir):
    placed = provenance.located(config, facts.get('found'), data_dir)
    experiment = build.build({**placed, 'device': 'any'})
  if facts['fingerprint'] != experiment.fingerprint:
    raise UserError(f'the data have changed since {workdir} was trained')
  return experiment


@contextlib.contextmanager
def _naming(data_dir: str | None) -> Iterator[None]:
  """Adds --data_dir, if it was given, to a `UserError` that does not name it."""
  try:
    yield
  except UserError as error:
    if data_dir is None or data_dir in str(error):
      raise
    raise UserError(f'--data_dir={data_dir}: {error}') from error


if __name__ == '__main__':
  commands.launch(main, 'workdir')
