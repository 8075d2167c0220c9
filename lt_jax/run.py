"""A run: its folder, its stages one after the other, and what they leave behind."""

import os
import platform
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from lt_jax import checkpoint, files, results, sharding, train
from lt_jax.build import Config, Experiment, Stage, build, config_digest
from lt_jax.errors import UserError, suggest
from lt_jax.evals import record
from lt_jax.evals.collect import collector
from lt_jax.method import State
from lt_jax.surgery import operate
from lt_jax.writers import Events, MetricWriter, Screen

MAY_CHANGE = frozenset(
  {
    'device',
    'eval_batch',
    'evaluate_every_epochs',
    'keep_checkpoints',
    'log_every_steps',
    'save_every_epochs',
  }
)
"""Keys a resumed run may change, because the training does not depend on them."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
  """Whether a scheduler has asked this process to stop: SIGTERM or SIGUSR1."""

  def __init__(self):
    self._asked = False

  def __enter__(self) -> 'StopRequest':
    self._before = {s: signal.signal(s, self._ask) for s in STOP_SIGNALS}
    return self

  def __exit__(self, *exception: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _ask(self, number: int, frame: Any) -> None:
    self._asked = True

  def __call__(self) -> bool:
    """Returns whether it was asked."""
    return self._asked


def run(
  config: Config,
  workdir: epath.PathLike,
  *,
  allow_config_change: bool = False,
  profile: tuple[int, int] | None = None,
) -> dict[str, Any]:
  """Trains every stage, from where an interrupted run left off, and sums up.

  Args:
    config: the resolved configuration.
    workdir: the run's folder.
    allow_config_change: goes on although the configuration differs from the one the
      folder was begun with.
    profile: (first, last) step of a profiler trace of each stage.

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
      _check_config(config, workdir)
    experiment = build(config)
    _check_data(experiment, workdir)
    if jax.process_index() == 0:  # only now, so that a wrong start leaves nothing
      files.write_json(workdir / 'config.json', config)
      files.write_json(workdir / 'data.json', _data_facts(experiment, workdir))
    events = Events(workdir, screen)
    events('started', pid=os.getpid(), host=platform.node())
    _banner(experiment, workdir, screen)
    earlier: dict[str, State] = {}
    for stage in experiment.stages.values():
      runner = _StageRunner(experiment, stage, workdir, screen, events, stop, profile)
      earlier[stage.name] = runner.run(earlier)
    result = results.write_results(
      experiment,
      workdir,
      stage,
      earlier[stage.name],
      stop=stop,
      wall_seconds=time.time() - began,
    )
    events('finished', state_sha256=result['state_sha256'])
    results.show(result, workdir, screen)
    return result


class _StageRunner:
  """One stage of a run: restores or begins it, and gives the loop its hooks."""

  def __init__(
    self,
    experiment: Experiment,
    stage: Stage,
    workdir: epath.Path,
    screen: Screen,
    events: Events,
    stop: Callable[[], bool],
    profile: tuple[int, int] | None,
  ):
    self._experiment = experiment
    self._stage = stage
    self._workdir = workdir
    self._screen = screen
    self._events = events
    self._stop = stop
    self._profile = profile
    self._folder = workdir / 'stages' / stage.name
    self._checkpoints = checkpoint.Checkpoints(
      self._folder / 'checkpoints',
      keep=experiment.config['keep_checkpoints'],
      facts=_facts(experiment),
      log=events,
    )
    self._collect = collector(stage.method.predict, record, experiment.mesh)
    self._rate = 0.0  # images a second, of the last log interval

  def run(self, earlier: Mapping[str, State]) -> State:
    """Trains the stage to its end and returns the State that counts."""
    try:
      return self._run(earlier)
    except train.Diverged as diverged:
      self._report_divergence(diverged)
      raise
    finally:
      self._screen.stop_bar()
      self._checkpoints.close()

  def _run(self, earlier: Mapping[str, State]) -> State:
    stage, mesh = self._stage, self._experiment.mesh
    key = jax.random.key(self._experiment.config['seed'])
    first_state = train.initial_state(stage.method, stage.streams, key, mesh)
    target = checkpoint.abstract(jax.eval_shape(first_state), sharding.replicated(mesh))
    restored = self._checkpoints.restore(target)
    if restored is None:
      state = operate(first_state(), earlier, stage.surgeries)
      first = int(jax.device_get(state.step))
    else:
      state, first = restored.state, restored.manifest.get('first', 0)
    step = int(jax.device_get(state.step))
    if stage.plan.steps < step:
      raise UserError(
        f'stage {stage.name!r} ends at step {stage.plan.steps}, but begins at {step}'
      )
    self._plan = stage.plan._replace(
      first=first,
      profile=self._profile,
      profile_dir=os.fspath(self._folder / 'profile'),
    )
    self._announce(step, restored)
    self._metrics = MetricWriter(
      self._workdir,
      stage.name,
      resume_step=step,
      vectors=self._folder / 'metrics',
    )
    if step < stage.plan.steps:
      self._screen.start_bar(stage.name, step, stage.plan.steps)
      state = train.train(
        stage.method,
        stage.streams,
        state,
        mesh=mesh,
        plan=self._plan,
        hooks=train.Hooks(
          compiled=self._compiled,
          progress=self._screen.progress,
          log=self._log,
          save=self._save,
          evaluate=self._evaluate,
          stop=self._stop,
        ),
      )
    elif restored is None:  # a stage of no steps
      self._save(step, state)
    self._metrics.close()
    self._checkpoints.wait()
    if stage.select is None or stage.plan.steps == first:  # no step, no choice
      return state
    return self._checkpoints.restore_best(target).state

  def _announce(self, step: int, restored: checkpoint.Restored | None) -> None:
    told = 'fresh start'
    if restored is not None:
      told = (
        f'resuming from {step} ({"verified" if restored.verified else "UNVERIFIED"})'
      )
    elif step:
      told = f'fresh start at step {step}, carried over'
    epochs = self._stage.plan.steps / self._stage.epoch_steps
    self._screen.line(
      f'stage {self._stage.name}: {self._stage.plan.steps} steps, {epochs:.4g} epochs '
      f'of {self._stage.epoch_steps:.4g} steps; {told}'
    )

  def _compiled(self, seconds: float) -> None:
    self._events('compiled', stage=self._stage.name, seconds=round(seconds, 2))

  def _log(
    self, step: int, values: dict[str, np.ndarray], steps: int, seconds: float
  ) -> None:
    self._rate = steps * self._experiment.config['batch'] / seconds
    epoch = step / self._stage.epoch_steps
    self._metrics.write(
      'train', step, epoch, values, images_per_second=round(self._rate, 1)
    )
    left = (self._plan.steps - step) / steps * seconds
    loss, accuracy = float(values['loss']), float(values.get('accuracy', np.nan))
    self._screen.note(
      f'loss {loss:.4f}  {self._rate:,.0f} images/s',
      f'step {step}/{self._plan.steps}  epoch {epoch:.2f}  loss {loss:.4f}  '
      f'accuracy {accuracy:.4f}  {self._rate:,.0f} images/s  ETA {left:.0f} s',
    )

  def _save(self, step: int, state: State) -> None:
    if self._checkpoints.last_saved != step:
      self._metrics.flush()
      epoch = step / self._stage.epoch_steps
      self._checkpoints.save(step, state, epoch=epoch, first=self._plan.first)

  def _evaluate(self, step: int, state: State) -> None:
    """Evaluates closed-set accuracy on validation and test data, and selects."""
    rows = {}
    for split in ('val', 'test'):
      if split in self._experiment.passes:
        one_pass = self._experiment.passes[split]
        records = self._collect(state, one_pass, self._stop)
        if records is None:
          return
        rows[split] = results.split_metrics(records, self._experiment)
    for split, values in rows.items():
      self._metrics.write(split, step, step / self._stage.epoch_steps, values)
    told = ', '.join(f'{k} {v["accuracy"]:.4f}' for k, v in rows.items())
    self._screen.line(f'step {step}: accuracy on {told}')
    if self._stage.select is not None:
      self._keep_best(step, state, rows)

  def _keep_best(self, step: int, state: State, rows: Mapping[str, Any]) -> None:
    """Saves a State that is strictly better than the best so far."""
    split, metric = self._stage.select
    if metric not in rows[split]:
      raise UserError(f'select: no metric {metric!r}{suggest(metric, rows[split])}')
    value = float(rows[split][metric])
    self._checkpoints.wait()
    best = self._checkpoints.best()
    if best is None or value > best['value'] or step < best['step']:
      self._checkpoints.save_best(step, state, split=split, metric=metric, value=value)

  def _report_divergence(self, diverged: train.Diverged) -> None:
    """Says where it happened, and on which examples."""
    examples = {
      name: {k: v.tolist() for k, v in payload.items() if k in ('index', 'label')}
      for name, payload in diverged.payload.items()
    }
    path = self._folder / 'not_finite.json'
    self._folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {'step': diverged.step, 'examples': examples})
    self._events('diverged', stage=self._stage.name, step=diverged.step, see=str(path))


def _check_config(config: Config, workdir: epath.Path) -> None:
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


def _check_data(experiment: Experiment, workdir: epath.Path) -> None:
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
  preprocessing = ('mean', 'std', 'pad', 'pad_mode', 'flip')
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
    'preprocessing': {k: experiment.config['data'][k] for k in preprocessing},
  }


def _facts(experiment: Experiment) -> dict[str, Any]:
  """Returns what a manifest tells of the run it belongs to."""
  return {
    'config_digest': config_digest(experiment.config),
    'seed': experiment.config['seed'],
    'devices': experiment.mesh.size,
    'processes': jax.process_count(),
    'versions': results.versions(),
  }


def _banner(experiment: Experiment, workdir: epath.Path, screen: Screen) -> None:
  """Says what is about to run, before anything is compiled."""
  config, dataset, mesh = experiment.config, experiment.dataset, experiment.mesh
  counts = dataset.counts
  stage = next(iter(experiment.stages.values()))
  key = jax.random.key(0)
  state = jax.eval_shape(train.initial_state(stage.method, stage.streams, key, mesh))
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
