"""One stage of a run: restores or starts it, and provides the hooks of the loop."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from lt_jax import checkpoint, files, results, sharding, train
from lt_jax.build import Experiment, Stage
from lt_jax.config import config_digest
from lt_jax.data.streams import Split, most_bad
from lt_jax.errors import UserError, class_names
from lt_jax.evals.collect import collector
from lt_jax.evals.saved import collect_saved
from lt_jax.method import State, named_key
from lt_jax.parts import parts
from lt_jax.screen import Screen
from lt_jax.stopping import (
  StopRequest,
  agreed,
  any_process,
  of_any_process,
  wait_for_all,
)
from lt_jax.surgery import operate
from lt_jax.writers import Events, MetricWriter, Row, Track, read_rows, write_npz


class BadImages:
  """Reports images that cannot be read and are replaced by others; each only once.

  Too many of them in one split end the run.
  """

  def __init__(
    self, splits: Mapping[str, Split], tell: Callable[..., None], events: Iterable[Row]
  ):
    """Stores the splits.

    Args:
      splits: name -> split.
      tell: called with an event and its values for every new image.
      events: the rows of events.jsonl so far.
    """
    self._splits = splits
    self._tell = tell
    self._reported = {
      (str(row.get('split', 'train')), str(row.get('image')))
      for row in events
      if row['event'] == 'bad_image'
    }

  def __call__(self, name: str, rows: Iterable[int]) -> None:
    """Reports images of a split; all processes call this together.

    Args:
      name: the split.
      rows: positions of the images in its source.

    Raises:
      UserError: there are more than `most_bad`.
    """
    split = self._splits[name]
    for bad in {(name, split.source.where(row)) for row in rows} - self._reported:
      self._reported.add(bad)
      self._tell('bad_image', split=name, image=bad[1])
    count, most = sum(known == name for known, _ in self._reported), most_bad(split)
    if any_process(count > most):
      raise UserError(
        f'{count} images of {name} cannot be read, but at most {most} of '
        f'{len(split.rows)} may be replaced: repair or remove those in events.jsonl'
      )


class StageRunner:
  """One stage of a run: restores or starts it, and provides the hooks of the loop.

  `run` does everything. If one program trains several runs, `begin` and `end` are
  called before and after training, and the loop calls the `hooks` of each.

  Attributes:
    stage: the stage.
    plan: when things happen; set by `begin`.
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
    origin: Mapping[str, Any],
  ):
    """Opens nothing yet.

    Args:
      experiment: what the run is made of.
      stage: the stage.
      workdir: the run's folder.
      screen: where output is shown.
      events: records events.
      stop: whether the run must end.
      profile: (first, last) step of a profiler trace.
      track: called with every row of metrics.
      origin: what manifests record of config and data, see `provenance.facts`.
    """
    self._experiment = experiment
    self.stage = stage
    self._workdir = workdir
    self._screen = screen
    self._events = events
    self._stop = stop
    self._profile = profile
    self._track = track
    self._origin = origin
    self._folder = workdir / 'stages' / stage.name
    self._checkpoints = checkpoint.Checkpoints(
      self._folder / 'checkpoints',
      keep=experiment.config['keep_checkpoints'],
      facts=_facts(experiment) | origin,
      log=events,
    )
    self._collect = collector(stage.method.predict, stage.task.record, experiment.mesh)
    self._bad = BadImages(stage.images, events, read_rows(workdir / 'events.jsonl'))
    self._metrics: MetricWriter | None = None
    self._new_bad: dict[str, set[int]] = {name: set() for name in stage.streams}
    self._began = time.time()

  def run(self, earlier: Mapping[str, State]) -> State:
    """Trains the stage to its end; returns its selected State, or else its last one."""
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
          unlogged=self._unlogged(),
        )
      except train.Diverged as diverged:
        self._report_divergence(diverged)
        raise
      except train.Preempted:  # if this process exited now, the others might die too
        self._wait_for_saves()
        raise
      return self.end(state)

  def begin(self, earlier: Mapping[str, State]) -> State:
    """Opens the files of the stage; returns the State at which it starts or resumes."""
    mesh = self._experiment.mesh
    self._begun_from = {name: checkpoint.digest(s)[:16] for name, s in earlier.items()}
    stage = self.stage = self._with_arrays(self.stage)
    shapes = train.state_shapes(stage.method, stage.streams)
    self._target = checkpoint.abstract(shapes, sharding.replicated(mesh))
    restored = self._checkpoints.restore(self._target)
    if restored is None:
      with class_names(stage.dataset.class_names):
        state = operate(self._first_state(bool(earlier)), earlier, stage.surgeries)
      first = int(jax.device_get(state.step))
    else:
      state, first = restored.state, restored.manifest.get('first', 0)
      self._check_origin(restored.manifest.get('begun_from', self._begun_from), earlier)
    step = int(jax.device_get(state.step))
    if stage.plan.steps < step:
      raise UserError(
        f'stage {stage.name!r} ends at step {stage.plan.steps}, but starts at {step}'
      )
    self.plan = stage.plan._replace(
      first=first,
      profile=self._profile,
      profile_dir=os.fspath(self._folder / 'profile'),
    )
    self._announce(step, restored)
    self._report_parts(shapes)
    if restored is not None and jax.process_index() == 0:
      self._checkpoints.amend(step, **self._origin)
    self._metrics = MetricWriter(
      self._workdir,
      stage.name,
      resume_step=step,
      vectors=self._folder / 'metrics',
      expected=(restored.manifest if restored else {}).get('rows'),
      track=self._track,
      tell=self._events.damaged,
    )
    if stage.plan.steps == first and restored is None:  # a stage without steps
      self._save(step, state)
    self._screen.start_bar(stage.name, step, stage.plan.steps)
    return state

  def hooks(self) -> train.Hooks:
    """Returns the callbacks of the loop."""
    return train.Hooks(
      first_call=self._first_call,
      progress=self._screen.progress,
      log=self._log,
      save=self._save,
      hold=self._hold,
      evaluate=self._evaluate,
      stop=self._stop,
      bad_images=self._bad_images,
    )

  def end(self, state: State) -> State:
    """Ends the stage: saves outputs for later stages, and returns its result.

    Args:
      state: the last State.

    Returns:
      The selected State, if the stage selects one, or else the last.
    """
    self._metrics.close()
    self._wait_for_saves()
    if self.stage.select is not None and self.stage.plan.steps > self.plan.first:
      state = self._checkpoints.restore_best(self._target).state
    self._save_outputs(state)
    return state

  def _wait_for_saves(self) -> None:
    """Waits until saves have their manifests, which only process 0 writes."""
    self._checkpoints.wait()
    wait_for_all('saved')

  def close(self) -> None:
    """Removes the progress bar, closes files and waits for saves."""
    self._screen.stop_bar()
    if self._metrics is not None:
      self._metrics.abandon()
    self._checkpoints.close()

  def _first_state(self, later: bool) -> State:
    """Returns the State of step 0.

    A later stage draws other parameters than the first; otherwise a retrained
    classifier would start from the same ones as in the first stage.
    """
    stage, key = self.stage, jax.random.key(self._experiment.config['seed'])
    drawn_by = named_key(key, f'stage {stage.name}', 0) if later else key
    state = train.initial_state(
      stage.method, stage.streams, drawn_by, self._experiment.mesh
    )
    key = sharding.put_replicated(self._experiment.mesh, key)
    state = state.replace(key=key)
    if stage.start:
      state, report = stage.start(state)
      if any_process(agreed(report['sha256']) != report['sha256']):
        raise UserError(f'the processes have different files of {report["source"]}')
      self._events('began_with_weights', **report)
      data = self._experiment.config['data']
      wanted = {key: tuple(round(x, 4) for x in report[key]) for key in ('mean', 'std')}
      ours = {key: tuple(round(x, 4) for x in data[key]) for key in wanted}
      if report['mean'] and wanted != ours:
        self._screen.line(
          'these weights expect pixels normalised differently: set '
          f'--config.data.mean="{wanted["mean"]}" --config.data.std="{wanted["std"]}"'
        )
    return state

  def _check_origin(
    self, begun_from: Mapping[str, str], earlier: Mapping[str, State]
  ) -> None:
    """Refuses to resume a stage if its earlier stages have changed since it started."""
    for name, digest in self._begun_from.items():
      recorded = begun_from.get(name)
      if recorded != digest and recorded != _old_digest(earlier[name]):
        raise UserError(
          f'stage {self.stage.name!r} started from another checkpoint of stage '
          f'{name!r}, which has changed since: delete {self._folder} to train the '
          'stage again'
        )

  def _with_arrays(self, stage: Stage) -> Stage:
    """Returns the stage with arrays that earlier stages saved added to its streams.

    Raises:
      UserError: an array is missing or has another shape.
    """
    streams = dict(stage.streams)
    put = functools.partial(sharding.put_replicated, self._experiment.mesh)
    for name, saved in stage.reads.items():
      path = self._workdir / 'stages' / saved.stage / 'arrays.npz'
      if not files.seen(path):
        raise UserError(
          f'stage {stage.name!r} needs {path}, which stage {saved.stage!r} writes'
        )
      found = _arrays(path)
      for key, expected in saved.shapes.items():
        shape = found[key].shape if key in found else None
        if shape != expected:
          raise UserError(
            f'{path}: {key} is {shape or "missing"}, but it should be {expected}'
            '; delete the file and run the same command to write it again'
          )
      streams[name] = saved.into(streams[name], found, put)
    return stage._replace(streams=streams)

  def _save_outputs(self, state: State) -> None:
    """Writes arrays.npz: outputs of the final State for every image of some splits."""
    path, names = self._folder / 'arrays.npz', self.stage.save_outputs
    if not names:
      return
    origin = checkpoint.digest(state)
    digests = (origin, checkpoint.digest(state, old_paths=True))
    if agreed(path.exists() and _origin(path) in digests):
      return
    found = collect_saved(self.stage.survey, state, names)
    if jax.process_index() == 0:
      write_npz(path, **found, state_sha256=np.array(origin))
    wait_for_all(f'{path} is written')

  def _announce(self, step: int, restored: checkpoint.Restored | None) -> None:
    start = 'fresh start'
    if restored is not None:
      start = (
        f'resuming from {step} ({"verified" if restored.verified else "UNVERIFIED"})'
      )
    elif step:
      start = f'fresh start at step {step}, carried over'
    steps, of_epoch = self.stage.plan.steps, self.stage.epoch_steps
    epochs = f'{_rounded(steps / of_epoch)} epochs of {_rounded(of_epoch)} steps'
    self._screen.line_if_followed(
      f'stage {self.stage.name}: {steps:,} steps ({epochs}); {start}'
    )

  def _report_parts(self, shapes: State) -> None:
    """Writes parameters.json: what trains at which rate; shows it if it is unusual."""
    rows = parts(self.stage, shapes)
    if jax.process_index() == 0:
      self._folder.mkdir(parents=True, exist_ok=True)
      files.write_json(self._folder / 'parameters.json', [r._asdict() for r in rows])
    if any(row.differs for row in rows):
      trained = sum(row.parameters for row in rows if row.trained)
      total = sum(row.parameters for row in rows)
      self._screen.table(
        f'stage {self.stage.name} trains {trained:,} of {total:,} parameters',
        [(row.part, row.description) for row in rows],
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
    self._report_bad_images()
    rate = steps * self.stage.batch / seconds
    epoch = step / self.stage.epoch_steps
    self._metrics.write('train', step, epoch, values, images_per_second=round(rate, 1))
    left = (self.plan.steps - step) / steps * seconds
    loss, accuracy = (float(values.get(k, np.nan)) for k in ('loss', 'accuracy'))
    self._screen.status(
      f'loss {loss:.4f}  {rate:,.0f} images/s',
      f'step {step}/{self.plan.steps}  epoch {epoch:.2f}  loss {loss:.4f}  '
      f'accuracy {accuracy:.4f}  {rate:,.0f} images/s  ETA {left:.0f} s',
    )

  def _bad_images(self, stream: str, positions: np.ndarray) -> None:
    """Remembers images that this process cannot read, until the next log row."""
    self._new_bad[stream].update(positions.tolist())

  def _report_bad_images(self) -> None:
    """Reports training images that cannot be read; too many in a split end the run.

    All processes call this together, and report what any of them has found.
    """
    for stream, new in self._new_bad.items():
      if self.stage.streams[stream].workers is None:
        continue
      name = self.stage.trained_on[stream]
      found = of_any_process(sorted(new))
      new.difference_update(found)
      self._bad(name, found)

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
        rows=self._metrics.counts(step),
      )

  def _hold(self, unlogged: train.Unlogged) -> None:
    """Saves the partial sums of the next log row, for the run that resumes."""
    self._report_bad_images()
    if jax.process_index() == 0:
      totals = {
        f'{name}/{part}': value
        for name, pair in unlogged.totals.items()
        for part, value in zip(('total', 'count'), pair, strict=True)
      }
      numbers = {k: v for k, v in unlogged._asdict().items() if k != 'totals'}
      write_npz(self._folder / 'unlogged.npz', **totals, **numbers)

  def _unlogged(self) -> train.Unlogged | None:
    """Returns what `_hold` saved, if it is intact.

    Several processes save nothing: they stop at a log row.
    """
    path = self._folder / 'unlogged.npz'
    if jax.process_count() > 1 or not path.exists():
      return None
    try:
      stored = files.read_npz(path)
      names = {name.rpartition('/')[0] for name in stored if '/' in name}
      totals = {n: (stored[f'{n}/total'], stored[f'{n}/count']) for n in names}
      step, logged = (int(stored[name]) for name in ('step', 'logged'))
      return train.Unlogged(step, logged, float(stored['seconds']), totals)
    except (UserError, KeyError, TypeError, ValueError) as error:
      self._events.damaged(f'{path}: {error}; the next log row covers fewer steps')
      return None

  def _evaluate(self, step: int, state: State) -> None:
    """Evaluates on validation and test data, and keeps the best State."""
    rows = {}
    for split, one_pass in self.stage.passes.items():
      if split.rpartition('/')[2] in ('val', 'test'):
        records = self._collect(state, one_pass, self._stop.alone)
        if records is None:
          return
        if split == 'test':
          rows |= results.test_rows(records, self._experiment, self.stage)
        else:
          rows[split] = results.split_metrics(records, self.stage)
    headline = self.stage.task.headline
    shown = {k: v[headline] for k, v in rows.items() if v[headline] is not None}
    if self.stage.scores is not None:
      scores = self.stage.scores(state, self._stop.alone)
      if scores is None:
        return
      rows |= scores
    for split, values in rows.items():
      self._metrics.write(split, step, step / self.stage.epoch_steps, values)
    self._screen.evaluated(step, headline, shown)
    if self.stage.select is not None:
      self._keep_best(step, state, rows)

  def _keep_best(self, step: int, state: State, rows: Mapping[str, Any]) -> None:
    """Saves the State if it is strictly better than the best so far."""
    split, metric, sign = self.stage.select
    value = sign * float(rows[split][metric])
    self._checkpoints.wait()
    best = self._checkpoints.best()
    than = -np.inf if best is None else best.get('value')
    if than is None:
      raise UserError(
        f'{self._folder / "checkpoints/manifests/best.json"} lacks the value by which '
        f'the checkpoint was selected; {self._checkpoints.how_to_retrain()}'
      )
    better = value > than or step < best['step']
    if agreed(better):
      self._checkpoints.save_best(step, state, split=split, metric=metric, value=value)

  def diverged(self, step: int) -> train.Diverged:
    """Records that a step was not finite; returns the error."""
    diverged = train.Diverged(step, train.payloads_at(self.stage.streams, step))
    self._report_divergence(diverged)
    return diverged

  def follow(self) -> None:
    """Makes the screen show this run, among those that train together."""
    self._screen.follow(self.stage.name, self.plan.steps)

  def _report_divergence(self, diverged: train.Diverged) -> None:
    """Records where it happened and on which examples; every process records its own.

    Args:
      diverged: the step and its payload.
    """
    examples = {
      name: {k: v.tolist() for k, v in payload.items() if k in ('index', 'label')}
      for name, payload in diverged.payload.items()
    }
    process = f'.{jax.process_index()}' if jax.process_index() else ''
    path = self._folder / f'not_finite{process}.json'
    self._folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {'step': diverged.step, 'examples': examples})
    self._events('diverged', stage=self.stage.name, step=diverged.step, see=str(path))


def _rounded(number: float) -> str:
  """Returns a number with three digits, or with all those before the point.

  Examples:
    >>> [_rounded(number) for number in (0.0502, 2.0, 19.96, 1234.5)]
    ['0.0502', '2', '20', '1,234']
  """
  return f'{number:,.0f}' if number >= 100 else f'{number:.3g}'


def _arrays(path: epath.Path) -> dict[str, np.ndarray]:
  """Reads the arrays that an earlier stage saved; {} if the file is damaged."""
  try:
    return files.read_npz(path)
  except UserError:
    return {}


def _old_digest(state: State) -> str:
  """Returns the short digest that a State had before its paths were renamed."""
  return checkpoint.digest(state, old_paths=True)[:16]


def _origin(path: epath.Path) -> str:
  """Returns the digest of the State that made the arrays; '' if they are damaged."""
  return str(_arrays(path).get('state_sha256', ''))


def _facts(experiment: Experiment) -> dict[str, Any]:
  """Returns what a manifest records about its run."""
  return {
    'config_digest': config_digest(experiment.config),
    'seed': experiment.config['seed'],
    'devices': experiment.mesh.size,
    'processes': jax.process_count(),
    'versions': results.versions(),
  }
