"""One stage of a run: restores or begins it, and gives the loop its hooks."""

import contextlib
import os
import time
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from lt_jax import checkpoint, files, results, sharding, train
from lt_jax.build import Experiment, Stage
from lt_jax.build.checks import SELECTABLE
from lt_jax.config import config_digest, stage_config
from lt_jax.errors import UserError
from lt_jax.evals import record
from lt_jax.evals.collect import collector
from lt_jax.method import State, named_key
from lt_jax.stopping import (
  StopRequest,
  agreed,
  any_process,
  of_any_process,
  wait_for_all,
)
from lt_jax.surgery import operate
from lt_jax.writers import Events, MetricWriter, Screen, Track, read_rows, write_npz

MOST_BAD = 1e-3
"""Share of the training images that may be damaged where others stand in for them."""


class StageRunner:
  """One stage of a run: restores or begins it, and gives the loop its hooks.

  `run` does it all. Where one program trains several runs, `begin` and `end` are called
  before and after, and the loop calls the `hooks` of each.

  Attributes:
    stage: the stage.
    plan: when things happen; known once it has begun.
  """

  def __init__(
    self,
    experiment: Experiment,
    stage: Stage,
    workdir: epath.Path,
    screen: Screen,
    events: Events,
    stop: StopRequest,
    profile: tuple[int, int] | None,
    track: Track,
  ):
    self._experiment = experiment
    self.stage = stage
    self._workdir = workdir
    self._screen = screen
    self._events = events
    self._stop = stop
    self._profile = profile
    self._track = track
    self._folder = workdir / 'stages' / stage.name
    self._checkpoints = checkpoint.Checkpoints(
      self._folder / 'checkpoints',
      keep=experiment.config['keep_checkpoints'],
      facts=_facts(experiment),
      log=events,
    )
    self._collect = collector(stage.method.predict, record, experiment.mesh)
    events_before = read_rows(workdir / 'events.jsonl')
    self._bad = {
      (row.get('split', 'train'), row['image'])
      for row in events_before
      if row['event'] == 'bad_image'
    }
    self._train_split = stage_config(experiment.config, stage.name)['train_split']
    self._metrics: MetricWriter | None = None
    self._new_bad: dict[str, set[int]] = {name: set() for name in stage.streams}
    self._began = time.time()

  def run(self, earlier: Mapping[str, State]) -> State:
    """Trains the stage to its end and returns the State that counts."""
    with contextlib.closing(self):
      state = self.begin(earlier)
      try:
        state = train.train(
          self.stage.method,
          self.stage.streams,
          state,
          mesh=self._experiment.mesh,
          plan=self.plan,
          hooks=self.hooks(),
        )
      except train.Diverged as diverged:
        self._report_divergence(diverged)
        raise
      except train.Preempted:  # a process that ends may take the others with it
        self._wait_for_saves()
        raise
      return self.end(state)

  def begin(self, earlier: Mapping[str, State]) -> State:
    """Returns the State from which the stage goes on, after opening its files."""
    mesh = self._experiment.mesh
    self._begun_from = {name: checkpoint.digest(s)[:16] for name, s in earlier.items()}
    stage = self.stage = self._with_arrays(self.stage)
    shapes = train.state_shapes(stage.method, stage.streams)
    self._target = checkpoint.abstract(shapes, sharding.replicated(mesh))
    restored = self._checkpoints.restore(self._target)
    if restored is None:
      state = operate(self._first_state(bool(earlier)), earlier, stage.surgeries)
      first = int(jax.device_get(state.step))
    else:
      state, first = restored.state, restored.manifest.get('first', 0)
      self._check_origin(restored.manifest.get('begun_from', self._begun_from), earlier)
    step = int(jax.device_get(state.step))
    if stage.plan.steps < step:
      raise UserError(
        f'stage {stage.name!r} ends at step {stage.plan.steps}, but begins at {step}'
      )
    self.plan = stage.plan._replace(
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
      track=self._track,
    )
    if stage.plan.steps == first and restored is None:  # a stage of no steps
      self._save(step, state)
    self._screen.start_bar(stage.name, step, stage.plan.steps)
    return state

  def hooks(self) -> train.Hooks:
    """Returns what happens at a step."""
    return train.Hooks(
      first_call=self._first_call,
      progress=self._screen.progress,
      log=self._log,
      save=self._save,
      evaluate=self._evaluate,
      stop=self._stop,
      bad_images=self._bad_images,
    )

  def end(self, state: State) -> State:
    """Returns the State that counts, given the last one, and leaves what it must."""
    self._metrics.close()
    self._wait_for_saves()
    if self.stage.select is not None and self.stage.plan.steps > self.plan.first:
      state = self._checkpoints.restore_best(self._target).state
    self._leave(state)
    return state

  def _wait_for_saves(self) -> None:
    """Waits until what is saved has its manifest, which process 0 alone writes."""
    self._checkpoints.wait()
    wait_for_all('saved')

  def close(self) -> None:
    """Ends what is under way."""
    self._screen.stop_bar()
    if self._metrics is not None:
      self._metrics.abandon()
    self._checkpoints.close()

  def _first_state(self, later: bool) -> State:
    """Returns the State of step 0.

    A later stage draws other parameters than the first one did, or a classifier that is
    trained again would begin just where the first did.
    """
    stage, key = self.stage, jax.random.key(self._experiment.config['seed'])
    drawn_by = named_key(key, f'stage {stage.name}', 0) if later else key
    state = train.initial_state(
      stage.method, stage.streams, drawn_by, self._experiment.mesh
    )
    key = sharding.put_replicated(self._experiment.mesh, key)
    state = state.replace(key=key)
    if stage.start:
      state, told = stage.start(state)
      if any_process(agreed(told['sha256']) != told['sha256']):
        raise UserError(f'the processes have not all the same file of {told["source"]}')
      self._events('began_with_weights', **told)
      data = self._experiment.config['data']
      if told['mean'] and (list(told['mean']), list(told['std'])) != (
        list(data['mean']),
        list(data['std']),
      ):
        self._screen.line(
          'those weights expect pixels of another data.mean or data.std'
        )
    return state

  def _check_origin(
    self, begun_from: Mapping[str, str], earlier: Mapping[str, State]
  ) -> None:
    """Refuses to go on with a stage whose earlier stages have changed since."""
    for name, digest in self._begun_from.items():
      told = begun_from.get(name)
      if told != digest and told != _old_digest(earlier[name]):
        raise UserError(
          f'stage {self.stage.name!r} began from another State of stage {name!r}, '
          f'which was trained on since: delete {self._folder} to begin it again'
        )

  def _with_arrays(self, stage: Stage) -> Stage:
    """Returns the stage with the arrays that earlier stages have left for its streams.

    Raises:
      UserError: they are not there, or not as they should be.
    """
    streams = dict(stage.streams)
    for name, origin in stage.reads.items():
      path = self._workdir / 'stages' / origin / 'arrays.npz'
      if not files.seen(path):
        raise UserError(f'stage {stage.name!r} reads what {origin!r} leaves in {path}')
      with path.open('rb') as file, np.load(file, allow_pickle=False) as stored:
        found = {key: stored[key] for key in streams[name].arrays}
      for key, expected in streams[name].arrays.items():
        if found[key].shape != expected.shape:
          raise UserError(
            f'{path}: {key} is {found[key].shape}, but it should be {expected.shape}'
          )
      arrays = sharding.put_replicated(self._experiment.mesh, found)
      streams[name] = streams[name]._replace(arrays=arrays)
    return stage._replace(streams=streams)

  def _leave(self, state: State) -> None:
    """Writes arrays.npz: outputs of the final State for every training image."""
    path, names = self._folder / 'arrays.npz', self.stage.save_outputs
    if not names:
      return
    origin = checkpoint.digest(state)
    known_by = (origin, checkpoint.digest(state, old_paths=True))
    if agreed(path.exists() and _origin(path) in known_by):
      return

    def keep(outputs, batch):
      del batch
      return {name: outputs[name] for name in names}

    survey = self._experiment.survey(self.stage.method.predict)
    found = survey.collect(state, 'train', keep)
    if jax.process_index() == 0:
      write_npz(path, **found, state_sha256=np.array(origin))
    wait_for_all(f'{path} is written')

  def _announce(self, step: int, restored: checkpoint.Restored | None) -> None:
    told = 'fresh start'
    if restored is not None:
      told = (
        f'resuming from {step} ({"verified" if restored.verified else "UNVERIFIED"})'
      )
    elif step:
      told = f'fresh start at step {step}, carried over'
    epochs = self.stage.plan.steps / self.stage.epoch_steps
    self._screen.detail(
      f'stage {self.stage.name}: {self.stage.plan.steps} steps, {epochs:.4g} epochs '
      f'of {self.stage.epoch_steps:.4g} steps; {told}'
    )

  def _first_call(self, compile_seconds: float) -> None:
    self._events(
      'first_step',
      stage=self.stage.name,
      seconds=round(time.time() - self._began, 1),
      compile_seconds=round(compile_seconds, 1),
    )

  def _log(
    self, step: int, values: dict[str, np.ndarray], steps: int, seconds: float
  ) -> None:
    self._tell_bad_images()
    rate = steps * self.stage.batch / seconds
    epoch = step / self.stage.epoch_steps
    self._metrics.write('train', step, epoch, values, images_per_second=round(rate, 1))
    left = (self.plan.steps - step) / steps * seconds
    loss, accuracy = (float(values.get(k, np.nan)) for k in ('loss', 'accuracy'))
    self._screen.note(
      f'loss {loss:.4f}  {rate:,.0f} images/s',
      f'step {step}/{self.plan.steps}  epoch {epoch:.2f}  loss {loss:.4f}  '
      f'accuracy {accuracy:.4f}  {rate:,.0f} images/s  ETA {left:.0f} s',
    )

  def _bad_images(self, stream: str, positions: np.ndarray) -> None:
    """Notes images that this process cannot read, for the next row of the log."""
    self._new_bad[stream].update(positions.tolist())

  def _tell_bad_images(self) -> None:
    """Tells of images that cannot be read, each once; too many of a split end the run.

    All processes are here together, and tell of what any of them has found.
    """
    for stream, new in self._new_bad.items():
      if self.stage.streams[stream].workers is None:
        continue
      name = self._train_split if stream == 'train' else 'meta'
      split = self._experiment.dataset.splits[name]
      found = of_any_process(sorted(new))
      new.difference_update(found)
      for bad in {(name, split.source.where(row)) for row in found} - self._bad:
        self._bad.add(bad)
        self._events('bad_image', split=name, image=bad[1])
      count = sum(known == name for known, _ in self._bad)
      if any_process(count > max(1, MOST_BAD * len(split.rows))):
        raise UserError(
          f'{count} images cannot be read, more than {MOST_BAD:.1%} of '
          f'{len(split.rows)}: see events.jsonl'
        )

  def _save(self, step: int, state: State) -> None:
    if self._checkpoints.last_saved != step:
      self._metrics.flush()
      epoch = step / self.stage.epoch_steps
      self._checkpoints.save(
        step,
        state,
        epoch=epoch,
        first=self.plan.first,
        begun_from=self._begun_from,
      )

  def _evaluate(self, step: int, state: State) -> None:
    """Evaluates closed-set accuracy on validation and test data, and selects."""
    rows = {}
    for split in ('val', 'test'):
      if split in self._experiment.passes:
        one_pass = self._experiment.passes[split]
        records = self._collect(state, one_pass, self._stop.alone)
        if records is None:
          return
        rows[split] = results.split_metrics(records, self._experiment)
    for split, values in rows.items():
      self._metrics.write(split, step, step / self.stage.epoch_steps, values)
    told = ', '.join(f'{k} {v["accuracy"]:.4f}' for k, v in rows.items())
    self._screen.detail(f'step {step}: accuracy on {told}')
    if self.stage.select is not None:
      self._keep_best(step, state, rows)

  def _keep_best(self, step: int, state: State, rows: Mapping[str, Any]) -> None:
    """Saves a State that is strictly better than the best so far."""
    split, metric = self.stage.select
    value = SELECTABLE[metric] * float(rows[split][metric])
    self._checkpoints.wait()
    best = self._checkpoints.best()
    better = best is None or value > best['value'] or step < best['step']
    if agreed(better):
      self._checkpoints.save_best(step, state, split=split, metric=metric, value=value)

  def diverged(self, step: int) -> train.Diverged:
    """Returns that a step was not finite, after telling of it."""
    diverged = train.Diverged(step, train.payloads_at(self.stage.streams, step))
    self._report_divergence(diverged)
    return diverged

  def follow(self) -> None:
    """Has the screen follow this run, among others that train with it."""
    self._screen.follow(self.stage.name, self.plan.steps)

  def _report_divergence(self, diverged: train.Diverged) -> None:
    """Says where it happened, and on which examples: every process its own."""
    examples = {
      name: {k: v.tolist() for k, v in payload.items() if k in ('index', 'label')}
      for name, payload in diverged.payload.items()
    }
    ours = f'.{jax.process_index()}' if jax.process_index() else ''
    path = self._folder / f'not_finite{ours}.json'
    self._folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {'step': diverged.step, 'examples': examples})
    self._events('diverged', stage=self.stage.name, step=diverged.step, see=str(path))


def _old_digest(state: State) -> str:
  """Returns the short digest of a State, as it was before its paths were renamed."""
  return checkpoint.digest(state, old_paths=True)[:16]


def _origin(path: epath.Path) -> str:
  """Returns the digest of the State that left some arrays; '' of a damaged file."""
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as stored:
      return str(stored['state_sha256'])
  except (OSError, ValueError, KeyError, zipfile.BadZipFile):
    return ''


def _facts(experiment: Experiment) -> dict[str, Any]:
  """Returns what a manifest tells of the run it belongs to."""
  return {
    'config_digest': config_digest(experiment.config),
    'seed': experiment.config['seed'],
    'devices': experiment.mesh.size,
    'processes': jax.process_count(),
    'versions': results.versions(),
  }
