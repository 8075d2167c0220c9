"""A run: its folder, its stages one after the other, and what they leave behind."""

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from lt_jax import files, results
from lt_jax.build import Config, Experiment, build, config_digest
from lt_jax.errors import UserError
from lt_jax.method import State
from lt_jax.stage import StageRunner
from lt_jax.stopping import (
  StopRequest,
  agreed_numbers,
  any_process,
  wait_for_all,
  watched,
)
from lt_jax.train import metric_shapes, state_shapes
from lt_jax.writers import Events, Screen, tracking

MAY_CHANGE = frozenset(
  {
    'data.workers',
    'device',
    'keep_checkpoints',
    'log_every_steps',
    'save_every_epochs',
  }
)
"""Keys a resumed run may change, because the training does not depend on them."""


def run(
  config: Config,
  workdir: epath.PathLike,
  *,
  allow_config_change: bool = False,
  profile: tuple[int, int] | None = None,
  tracker: str = '',
) -> dict[str, Any]:
  """Trains every stage, from where an interrupted run left off, and sums up.

  Args:
    config: the resolved configuration.
    workdir: the run's folder.
    allow_config_change: goes on although the configuration differs from the one the
      folder was begun with.
    profile: (first, last) step of a profiler trace of each stage.
    tracker: where metrics go besides, see `writers.tracking`.

  Returns:
    What result.json holds.

  Raises:
    UserError: the configuration, the data or the folder is wrong.
    Preempted: it was asked to stop and saved itself.
    Diverged: something was not finite; nothing of it was saved.
    SaveError: a checkpoint could not be written.
  """
  began = time.time()
  workdir = files.make_workdir(workdir)
  screen = Screen()
  with files.locked(workdir), StopRequest() as stop:
    if not allow_config_change:
      check_config(config, workdir)
    experiment = rehearsed(config, workdir)
    _check_peers(experiment)
    check_data(experiment, workdir)
    events = Events(workdir, screen)
    stop()  # from here on there are signs of life
    with (
      watched(lambda: stop.last_look),
      _claimed(experiment, workdir),
      tracking(tracker, config, workdir) as track,
    ):
      events('started', pid=os.getpid(), host=platform.node())
      _banner(experiment, workdir, screen)
      earlier: dict[str, State] = {}
      for stage in experiment.stages.values():
        runner = StageRunner(
          experiment, stage, workdir, screen, events, stop, profile, track
        )
        earlier[stage.name] = runner.run(earlier)
    result = results.write_results(
      experiment,
      workdir,
      stage,
      earlier[stage.name],
      stop=stop.alone,
      wall_seconds=time.time() - began,
    )
    events('finished', state_sha256=result['state_sha256'])
    results.show(result, workdir, screen)
    return result


def rehearsed(config: Config, workdir: epath.Path) -> Experiment:
  """Builds the experiment and goes through its stages without computing anything.

  Shapes tell most of what can be wrong, and tell it before the first stage has been
  trained for days: networks, optimisers, augmentation, surgeries.
  """
  try:
    experiment = build(config)
    shapes: dict[str, State] = {}
    for name, stage in experiment.stages.items():
      # Of the clock there is more to know than its shape.
      state = state_shapes(stage.method, stage.streams).replace(step=np.int32(0))
      if stage.start and not (workdir / 'stages' / name).exists():
        stage.start(state)  # a run that goes on needs the file no more
      for surgery in stage.surgeries:
        state = surgery(state, shapes)
      begin, end = state.step, stage.plan.steps
      if begin > end:
        raise UserError(f'stage {name!r} ends at step {end}, but begins at {begin}')
      metric_shapes(stage.method, stage.streams, state, experiment.mesh)
      shapes[name] = state.replace(step=np.int32(end))
  except (TypeError, ValueError, LookupError, ZeroDivisionError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(
      f'the configuration cannot be built: {type(error).__name__}: {error}'
    ) from error
  return experiment


@contextlib.contextmanager
def _claimed(experiment: Experiment, workdir: epath.Path) -> Iterator[None]:
  """Writes config.json and data.json; a start that fails puts back what was there.

  So that a mistake does not stand in the way of the corrected command.
  """
  facts = {
    'config.json': experiment.config,
    'data.json': _data_facts(experiment, workdir),
  }
  paths = {name: workdir / name for name in facts}
  before = {n: p.read_text() if p.exists() else None for n, p in paths.items()}
  if jax.process_index() == 0:
    for name, path in paths.items():
      files.write_json(path, facts[name])
  wait_for_all('claimed')
  try:
    yield
  except UserError:
    if jax.process_index() == 0:
      for name, path in paths.items():
        if before[name] is not None:
          files.write_atomically(path, before[name])
        elif not (workdir / 'stages').exists():
          path.unlink()
    raise


def _check_peers(experiment: Experiment) -> None:
  """Refuses to run beside a process that has another configuration or other data."""
  digests = (config_digest(experiment.config), experiment.dataset.fingerprint)
  ours = [int(digest[:7], 16) for digest in digests]  # of 28 bits
  ours.append(experiment.config['seed'])
  if any_process(agreed_numbers(ours) != ours):
    raise UserError(
      'the processes of this run have not all the same configuration, data and seed: '
      f'here they are {digests[0]}, {digests[1][:12]} and {ours[-1]}'
    )


def check_config(config: Config, workdir: epath.Path) -> None:
  """Refuses a configuration other than the one the folder was begun with."""
  path = workdir / 'config.json'
  if not path.exists():
    return
  before, now = files.flatten(files.read_json(path)), files.flatten(config)
  told = [
    f'{key} was {before.get(key)!r} and is {now.get(key)!r}'
    for key in sorted(before.keys() | now.keys())
    if key not in MAY_CHANGE and before.get(key) != now.get(key)
  ]
  if told:
    raise UserError(
      f'{workdir} was begun with another configuration: {", ".join(told)}; give '
      'another workdir, or --allow_config_change'
    )


def check_data(experiment: Experiment, workdir: epath.Path) -> None:
  """Refuses data other than those the run was begun with."""
  path, now = workdir / 'data.json', experiment.dataset.fingerprint
  before = files.read_json(path)['fingerprint'] if path.exists() else now
  if before != now:
    raise UserError(
      f'the data have changed since {workdir} was begun: fingerprint {before[:12]} '
      f'then, {now[:12]} now; give another workdir'
    )


def _data_facts(experiment: Experiment, workdir: epath.Path) -> dict[str, Any]:
  """Returns what data.json tells; what else is in it already stays."""
  path, dataset = workdir / 'data.json', experiment.dataset
  classes = len(dataset.class_names)
  data = experiment.config['data']
  keys = ('mean', 'std', 'pad', 'pad_mode', 'flip', 'jitter', 'image_size', 'resize')
  return (files.read_json(path) if path.exists() else {}) | {
    'class_names': list(dataset.class_names),
    'counts': {
      name: [int((split.labels == c).sum()) for c in range(classes)]
      for name, split in dataset.splits.items()
      if not name.startswith('open')
    },
    'open_images': {
      name: len(split.labels)
      for name, split in dataset.splits.items()
      if name.startswith('open')
    },
    'fingerprint': dataset.fingerprint,
    'image_shape': list(dataset.image_shape),
    'preprocessing': {key: data[key] for key in keys},
  }


def _banner(experiment: Experiment, workdir: epath.Path, screen: Screen) -> None:
  """Says what is about to run, before anything is compiled."""
  config, dataset, mesh = experiment.config, experiment.dataset, experiment.mesh
  counts = dataset.counts
  stage = next(iter(experiment.stages.values()))
  state = state_shapes(stage.method, stage.streams)
  params = sum(x.size for x in jax.tree.leaves(state.params))
  idle = jax.device_count() - mesh.size
  idle_note = f' ({idle} idle: they do not divide the batches)' if idle else ''
  sizes = ', '.join(f'{name} {len(s.rows)}' for name, s in dataset.splits.items())
  kind = jax.devices()[0].device_kind
  imbalance = counts.max() / max(counts.min(), 1)
  screen.table(
    f'{config["name"]}: {config["recipe"]}, seed {config["seed"]}',
    [
      ('devices', f'{mesh.size} x {jax.default_backend()} {kind}{idle_note}'),
      ('batch', f'{config["batch"]} ({config["batch"] // mesh.size} a device)'),
      ('images', sizes),
      ('classes', f'{len(counts)}, {_some(counts)} images, imbalance {imbalance:.4g}'),
      ('network', f'{config["model"]["trunk"]}, {params:,} parameters'),
      ('config', f'{config_digest(config)} (seed left out)'),
      ('workdir', os.fspath(workdir)),
    ],
  )


def _some(counts: np.ndarray) -> str:
  numbers = [str(n) for n in counts]
  return ' '.join(
    numbers if len(numbers) <= 10 else [*numbers[:5], '...', *numbers[-3:]]
  )
