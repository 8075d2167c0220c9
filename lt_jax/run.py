"""A run: its folder, its stages in order, and its results."""

import contextlib
import functools
import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from lt_jax import files, provenance, results, train
from lt_jax.build import Experiment, Stage, build
from lt_jax.cautions import cautions, check_memory
from lt_jax.config import SOURCE, Config, config_digest
from lt_jax.data import longtail
from lt_jax.data.dataset import Dataset
from lt_jax.errors import UserError
from lt_jax.evals.saved import saved_shape
from lt_jax.method import State
from lt_jax.screen import Screen
from lt_jax.stage import BadImages, StageRunner
from lt_jax.stopping import (
  StopRequest,
  agreed,
  any_process,
  wait_for_all,
  watched,
)
from lt_jax.together import run_together
from lt_jax.train import metric_shapes, state_shapes
from lt_jax.writers import Events, Track, read_rows, tracking


def run(
  config: Config,
  workdir: epath.PathLike,
  *,
  allow_config_change: bool = False,
  profile: tuple[int, int] | None = None,
  tracker: str = '',
  screen: Screen | None = None,
) -> dict[str, Any]:
  """Trains every stage, resuming an interrupted run, and writes the results.

  Args:
    config: the resolved config.
    workdir: the run's folder.
    allow_config_change: resume although the config differs from the saved one.
    profile: (first, last) step of a profiler trace of each stage.
    tracker: where metrics are also sent, see `writers.tracking`; '' for nowhere.
    screen: where output is shown; None for the terminal.

  Returns:
    What result.json holds.

  Raises:
    UserError: the config, the data or the folder is wrong.
    Preempted: the run was asked to stop, and was saved.
    Diverged: something was not finite; that State was not saved.
    SaveError: a checkpoint could not be written.
  """
  began = time.time()
  with (
    StopRequest() as stop,
    _opened(
      config,
      workdir,
      stop,
      lambda: rehearsed(config, workdir, stop),
      allow_config_change=allow_config_change,
      tracker=tracker,
      screen=screen,
    ) as opened,
  ):
    earlier: dict[str, State] = {}
    for name in opened.experiment.stages:
      runner = opened.runner(name, stop, profile)
      earlier[name] = runner.run(earlier)
    return _finish(opened, earlier[name], stop, began)


def run_seeds(
  configs: Sequence[Config],
  workdirs: Sequence[epath.PathLike],
  screens: Sequence[Screen] = (),
) -> list[dict[str, Any] | train.Diverged]:
  """Trains runs that differ only in the seed as one program.

  At every moment, the folder of each is like that of any other run, so that any of them
  can be resumed alone.

  Args:
    configs: the resolved configs.
    workdirs: one folder for each.
    screens: one for each; () for the terminal, which shows the progress of one run.

  Returns:
    For each run, what result.json holds, or how the run diverged.

  Raises:
    UserError: as for `run`; or the runs differ in more than the seed, there are several
      processes, or the images are not on the devices.
    Preempted: the runs were asked to stop, and all were saved.
    SaveError: a checkpoint could not be written.

  Any of these, in one run, ends all of them; saved files are intact.
  """
  began = time.time()
  if len({config_digest(config) for config in configs}) > 1:
    raise UserError('runs that train together may differ only in the seed')
  if jax.process_count() > 1:
    raise UserError('runs train together in one process, not in several')
  seeds = [config['seed'] for config in configs]
  runs: list[_Run] = []
  with StopRequest() as stop, contextlib.ExitStack() as stack:
    for config, workdir in zip(configs, workdirs, strict=True):
      if runs:
        make = functools.partial(
          reseeded, runs[0].experiment, config, replicas=len(configs)
        )
      else:
        make = functools.partial(rehearsed, config, workdir, stop, len(configs))
      screen = (
        screens[len(runs)]
        if screens
        else Screen(f'seed {config["seed"]}: ', beside=runs[0].screen if runs else None)
      )
      context = _opened(config, workdir, stop, make, screen=screen, seeds=seeds)
      runs.append(stack.enter_context(context))
    states: list[dict[str, State]] = [{} for _ in runs]
    outcomes: list[Any] = [None] * len(runs)
    for name in runs[0].experiment.stages:
      alive = [i for i in range(len(runs)) if outcomes[i] is None]
      runners = [runs[i].runner(name, stop) for i in alive]
      mesh = runs[0].experiment.mesh
      ends = run_together(runners, [states[i] for i in alive], mesh)
      for i, end in zip(alive, ends, strict=True):
        if isinstance(end, train.Diverged):
          outcomes[i] = end
        else:
          states[i][name] = end
    for i, opened in enumerate(runs):
      if outcomes[i] is None:
        outcomes[i] = _finish(opened, states[i][name], stop, began, len(runs))
    return outcomes


class _Run(NamedTuple):
  """A run whose folder is open."""

  experiment: Experiment
  workdir: epath.Path
  screen: Screen
  events: Events
  track: Track
  origin: dict[str, Any]

  def runner(
    self, stage: str, stop: StopRequest, profile: tuple[int, int] | None = None
  ) -> StageRunner:
    """Returns the runner of one of its stages."""
    return StageRunner(
      self.experiment,
      self.experiment.stages[stage],
      self.workdir,
      self.screen,
      self.events,
      stop,
      profile,
      self.track,
      self.origin,
    )


@contextlib.contextmanager
def _opened(
  config: Config,
  workdir: epath.PathLike,
  stop: StopRequest,
  make: Callable[[], Experiment],
  *,
  screen: Screen | None = None,
  seeds: Sequence[int] = (),
  allow_config_change: bool = False,
  tracker: str = '',
) -> Iterator[_Run]:
  """Opens the folder of a run, after checking that everything is in order.

  Args:
    config: the resolved config.
    workdir: the folder.
    stop: whether the run must end.
    make: makes the experiment.
    screen: where output is shown; None for the terminal.
    seeds: those of the runs that train together; the first run shows the banner.
    allow_config_change: as for `run`.
    tracker: as for `run`.
  """
  workdir, screen = files.make_workdir(workdir), screen or Screen()
  with files.locked(workdir):
    if not allow_config_change:
      check_config(config, workdir)
    experiment = make()
    _check_peers(experiment)
    _check_shared(workdir)
    check_data(experiment, workdir)
    data = _data_facts(experiment, workdir)
    moved = _moved_since(workdir, data)
    events = Events(workdir, screen)
    stop()  # a first sign of life, for the watchdog
    with (
      watched(lambda: stop.last_look),
      _names_the_folder(workdir),
      _claimed(experiment.config, data, workdir),
      tracking(tracker, config, workdir, events) as track,
    ):
      events(
        'started',
        pid=os.getpid(),
        host=platform.node(),
        uses_target_labels=results.uses_target_labels(experiment),
        command=provenance.command(),
      )
      if not seeds or config['seed'] == seeds[0]:
        _banner(experiment, workdir, screen, seeds)
      for was, now in moved:
        events('data_moved', was=was, now=now)
      origin = provenance.facts(config, data)
      yield _Run(experiment, workdir, screen, events, track, origin)


@contextlib.contextmanager
def _names_the_folder(workdir: epath.Path) -> Iterator[None]:
  """Adds the folder to errors that name no file, such as a full disk."""
  try:
    yield
  except OSError as error:
    if error.filename is None:
      error.filename = os.fspath(workdir)
    raise


def _finish(
  opened: _Run, state: State, stop: StopRequest, began: float, replicas: int = 1
) -> dict[str, Any]:
  """Evaluates the last State, writes the results and shows them."""
  experiment, workdir, events = opened.experiment, opened.workdir, opened.events
  rows = read_rows(workdir / 'events.jsonl')
  before = results.seconds_of_earlier_starts(rows)
  result = results.write_results(
    experiment,
    workdir,
    [*experiment.stages.values()][-1],
    state,
    stop=stop.alone,
    bad_images=BadImages(experiment.last.images, events, rows),
    wall_seconds=before + time.time() - began,
    replicas=replicas,
  )
  events('finished', state_sha256=result['state_sha256'])
  results.show(result, opened.screen)
  opened.screen.line(f'files: {os.fspath(workdir)}')
  return result


def reseeded(experiment: Experiment, config: Config, replicas: int) -> Experiment:
  """Returns the experiment with another seed; everything else is shared.

  Its programs are the same objects, so none of them is compiled again.
  """
  own = build(config, replicas=replicas, datasets=experiment.domains)

  def stage(name: str) -> Stage:
    shared = experiment.stages[name]
    return shared._replace(
      streams={
        stream: shared.streams[stream]._replace(payload=ours.payload)
        for stream, ours in own.stages[name].streams.items()
      },
      reads=own.stages[name].reads,
    )

  stages = {name: stage(name) for name in experiment.stages}
  return experiment._replace(config=config, stages=stages)


def rehearsed(
  config: Config,
  workdir: epath.PathLike,
  stop: StopRequest | None = None,
  replicas: int = 1,
) -> Experiment:
  """Builds the experiment and runs through its stages on shapes, computing nothing.

  This finds most mistakes in networks, optimisers, augmentation and surgeries before
  the first stage has trained for days.

  Args:
    config: the resolved config.
    workdir: the run's folder.
    stop: whether the run must end, checked while surgeries pass over data; None: never.
    replicas: how many seeds train together.
  """
  workdir = epath.Path(workdir)

  def look() -> None:
    if stop is not None and stop.alone():
      raise train.Preempted

  try:
    experiment = build(config, replicas=replicas, look=look)
    shapes: dict[str, State] = {}
    for name, stage in experiment.stages.items():
      # The clock has a known value, not only a shape.
      state = state_shapes(stage.method, stage.streams).replace(step=np.int32(0))
      if stage.start and not (workdir / 'stages' / name).exists():
        stage.start(state)  # a run that resumes no longer needs the file
      for surgery in stage.surgeries:
        state = surgery(state, shapes)
      begin, end = state.step, stage.plan.steps
      if begin > end:
        raise UserError(f'stage {name!r} ends at step {end}, but starts at {begin}')
      metric_shapes(stage.method, stage.streams, state, experiment.mesh)
      _check_absences(stage, state, experiment)
      for saved in stage.save_outputs:
        saved_shape(stage.survey, state, saved)
      shapes[name] = state.replace(step=np.int32(end))
  except (TypeError, ValueError, LookupError, ZeroDivisionError) as error:
    if isinstance(error, UserError):
      raise
    if error.args == ('label',):  # what a batch without labels lacks
      raise UserError(
        'the method reads labels of a stream that has none: look at its key labels in '
        'config.streams'
      ) from error
    raise UserError(
      f'the config cannot be built: {type(error).__name__}: {error}'
    ) from error
  return experiment


def _check_absences(stage: Stage, state: State, experiment: Experiment) -> None:
  """Refuses a stream that skips steps, if the method needs it in all of them."""
  often = {name: one for name, one in stage.streams.items() if one.every == 1}
  if len(often) == len(stage.streams):
    return
  try:
    metric_shapes(stage.method, often, state, experiment.mesh)
  except KeyError as missing:
    (name,) = missing.args
    if name not in stage.streams:
      raise
    raise UserError(
      f'streams.{name}.every is {stage.streams[name].every}, but the method needs a '
      'batch of it in every step: set it to 1'
    ) from None


@contextlib.contextmanager
def _claimed(
  config: Config, data: Mapping[str, Any], workdir: epath.Path
) -> Iterator[None]:
  """Writes config.json and data.json; if the start fails, restores what was there.

  So a mistake does not block the corrected command. Stale files are removed: the error
  of an earlier start, and the result of another config.
  """
  facts = {'config.json': config, 'data.json': data}
  paths = {name: workdir / name for name in (*facts, 'result.json')}
  before = {n: p.read_bytes() if p.exists() else None for n, p in paths.items()}
  if jax.process_index() == 0:
    for name, fact in facts.items():
      files.write_json(paths[name], fact)
    (workdir / 'error.json').unlink(missing_ok=True)
    if not _same_training(before['config.json'], config):
      paths['result.json'].unlink(missing_ok=True)
  wait_for_all('claimed')
  try:
    yield
  except UserError:
    if jax.process_index() == 0:
      for name, path in paths.items():
        if before[name] is not None:
          files.write_atomically(path, before[name])
        elif not (workdir / 'stages').exists():
          path.unlink(missing_ok=True)
    raise


def _same_training(text: bytes | None, config: Config) -> bool:
  """Returns whether the text of a config.json trains the same run as a config."""
  try:
    return not provenance.changes(json.loads(text or b''), config)
  except (ValueError, TypeError, AttributeError, RecursionError):  # torn or no object
    return False


def _check_shared(workdir: epath.Path) -> None:
  """Refuses a folder that the processes do not share.

  Process 0 creates a file there with a random name, which the others must see.
  """
  if jax.process_count() == 1:
    return
  mark = workdir / f'.shared-{agreed(secrets.token_hex(8))}'
  if jax.process_index() == 0:
    mark.touch()
  wait_for_all('marked')
  unseen = any_process(not files.seen(mark))
  if jax.process_index() == 0:
    mark.unlink()
  if unseen:
    raise UserError(
      f'not every process sees {workdir} as process 0 does: the workdir must be one '
      'folder for all of them, in a bucket or a shared file system'
    )


def _check_peers(experiment: Experiment) -> None:
  """Refuses to run beside a process that has another config, data or seed."""
  config = experiment.config
  ours = [config_digest(config), experiment.fingerprint[:12], config['seed']]
  if any_process(agreed(ours) != ours):
    raise UserError(
      'the processes of this run differ in config, data or seed: this one has '
      f'{ours[0]}, {ours[1]} and {ours[2]}'
    )


class OtherConfig(UserError):
  """A folder was started with another config."""


def check_config(config: Config, workdir: epath.Path) -> None:
  """Refuses a config other than the one the folder was started with.

  That is the one in its checkpoints or, before the first checkpoint, in config.json.
  The data may have moved, if `check_data` finds that they are the same.
  """
  record, path = provenance.recorded(workdir), workdir / 'config.json'
  stored = provenance.read_config(workdir) if path.exists() else {}
  before = record['config'] if record else stored
  if before and (changes := provenance.changes(before, config)):
    raise OtherConfig(
      f'{workdir} was started with another config: {provenance.listed(changes)}; give '
      'another workdir'
    )
  if stored and (changes := provenance.changes(stored, config)):
    raise UserError(
      f'{path} was changed after training: {provenance.listed(changes)}; the '
      'checkpoints were trained with the config of this command, so delete '
      f'{path} to resume'
    )


def check_data(experiment: Experiment, workdir: epath.Path) -> None:
  """Refuses data other than those the run was started with."""
  path, now = workdir / 'data.json', {'fingerprint': experiment.fingerprint}
  if path.exists():
    stored = provenance.read_json(path)
    files.check_fits(stored, {'fingerprint': str}, path)
    if stored['fingerprint'] != now['fingerprint']:
      raise UserError(
        f'the data have changed since {workdir} was started: fingerprint '
        f'{stored["fingerprint"][:12]} then, {now["fingerprint"][:12]} now; give '
        'another workdir'
      )
  record = provenance.recorded(workdir)
  then = record['data'].get('fingerprint') if record else None
  if then not in (None, provenance.facts({}, now)['data']['fingerprint']):
    raise UserError(
      f'the checkpoints of {workdir} were trained on other data; give another workdir'
    )


def _moved_since(workdir: epath.Path, data: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns (old place, new place) of data that moved since the run was started."""
  path = workdir / 'data.json'
  before = provenance.read_json(path).get('found') if path.exists() else None
  return provenance.moved_since(before, data['found'])


def _data_facts(experiment: Experiment, workdir: epath.Path) -> dict[str, Any]:
  """Returns the contents of data.json; other keys that it already has stay."""
  path, dataset = workdir / 'data.json', experiment.dataset
  classes = len(dataset.class_names)
  data = experiment.config['data']
  return (files.read_json(path) if path.exists() else {}) | {
    'class_names': list(dataset.class_names),
    'counts': {
      name: split.counts(classes).tolist()
      for name, split in dataset.every.items()
      if not name.startswith('open')
    },
    'open_images': {
      name: len(split.labels)
      for name, split in dataset.every.items()
      if name.startswith('open')
    },
    'label_maps': dataset.of_pixels,
    'fingerprint': experiment.fingerprint,
    'found': provenance.found(experiment.config),
    'shot_bounds': longtail.shot_bounds(
      dataset.counts, data['many_shot'], data['few_shot']
    ),
    'image_shape': list(dataset.image_shape),
    'image_dtype': dataset.dtype,
    'preprocessing': experiment.preprocessing,
    **_described(dataset),
  }


def _unseen(dataset: Dataset) -> list[tuple[str, str]]:
  """Returns a row of the banner with the unseen classes and those for validation."""
  if dataset.unseen is None:
    return []
  masks = {'unseen': dataset.unseen, 'validation': dataset.val_classes}
  found = {
    kind: [n for n, m in zip(dataset.class_names, mask, strict=True) if m]
    for kind, mask in masks.items()
    if mask is not None
  }
  parts = (f'{len(names)} {kind} ({", ".join(names)})' for kind, names in found.items())
  return [('held out', '; '.join(parts))]


def _described(dataset: Dataset) -> dict[str, Any]:
  """Returns what data.json says about unseen classes and class descriptions."""
  found: dict[str, Any] = {}
  for key in ('unseen', 'val_classes'):
    mask = getattr(dataset, key)
    if mask is not None:
      found[key] = [n for n, m in zip(dataset.class_names, mask, strict=True) if m]
  if dataset.class_vectors is not None:
    found['class_vectors'] = list(dataset.class_vectors.shape)
  return found


def _banner(
  experiment: Experiment, workdir: epath.Path, screen: Screen, seeds: Sequence[int]
) -> None:
  """Shows what is about to run, before anything is compiled.

  Raises:
    UserError: the first steps need more memory than there is.
  """
  check_memory(experiment)
  config, dataset, mesh = experiment.config, experiment.dataset, experiment.mesh
  counts = dataset.counts
  stage = next(iter(experiment.stages.values()))
  state = state_shapes(stage.method, stage.streams)
  params = sum(x.size for x in jax.tree.leaves(state.params))
  idle = jax.device_count() - mesh.size
  idle_note = f' ({idle} idle: they do not divide the batches)' if idle else ''
  per_device = f'{config["batch"] // mesh.size} per device'
  if len(seeds) > 1:
    idle_note = f' ({idle} idle: too few seeds)' if idle else ''
    per_device = f'for each seed, {-(-len(seeds) // mesh.size)} seeds per device'
  sizes = _sizes(dataset)
  imbalance = counts.max() / counts[counts > 0].min(initial=counts.max())
  screen.table(
    f'{config["name"]}: {config["recipe"]}, {_named(seeds or [config["seed"]])}',
    [
      ('devices', f'{results.devices(mesh.size)}{idle_note}'),
      ('batch', f'{config["batch"]:,} ({per_device})'),
      ('images', sizes),
      *_unseen(dataset),
      *(
        (f'{role} {name}', _sizes(experiment.domains[name]))
        for role, members in experiment.roles.items()
        for name in members
        if name != SOURCE
      ),
      *(('note', line) for line in dataset.passed_over),
      (
        'classes',
        f'{len(counts)}: {_of_classes(dataset)}, imbalance {imbalance:.4g}',
      ),
      ('network', f'{config["model"]["trunk"]}, {params:,} parameters'),
      ('weights', config['init'] or 'random'),
      ('config', f'{config_digest(config)} (without the seed)'),
      ('workdir', os.fspath(workdir)),
    ],
  )
  for caution in cautions(experiment):
    screen.line(f'warning: {caution}')


SPLITS = ('train', 'meta', 'val', 'test')
"""The order in which splits are shown; others follow."""


def _sizes(dataset: Dataset) -> str:
  """Returns the number of images of each split."""
  names = dict.fromkeys(name for name in SPLITS if name in dataset.every)
  return ', '.join(
    f'{name} {len(dataset.every[name].rows):,}' for name in (names | dataset.every)
  )


def _named(seeds: Sequence[int]) -> str:
  numbers = ', '.join(map(str, seeds))
  return f'seeds {numbers} as one program' if len(seeds) > 1 else f'seed {numbers}'


def _of_classes(dataset: Dataset) -> str:
  """Says how many images or pixels classes have: all of them, or the two extremes."""
  counts, noun = dataset.counts, dataset.counted
  names = [name if name.isprintable() else ascii(name) for name in dataset.class_names]
  if len(counts) <= 10:
    numbered = names == [*map(str, range(len(names)))]
    each = (
      f'{count:,}' if numbered else f'{name} {count:,}'
      for name, count in zip(names, counts, strict=True)
    )
    return f'{", ".join(each)} {noun}'
  (least, fewest), (most, highest) = (
    (names[c], counts[c]) for c in (counts.argmin(), counts.argmax())
  )
  return f'from {highest:,} {noun} ({most}) to {fewest:,} ({least})'
