"""The results of a run: final metrics, predictions, features, worst errors."""

import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

import lt_jax
from lt_jax import checkpoint, files
from lt_jax.build import Experiment, Stage
from lt_jax.cautions import cautions
from lt_jax.config import OPEN, SOURCE, TARGET, config_digest, flatten
from lt_jax.evals import titles
from lt_jax.evals.classification import half
from lt_jax.evals.closed_set import SHOTS, told_apart
from lt_jax.evals.collect import Collected, collector
from lt_jax.evals.domains import (
  mean_metrics,
  of_domains,
  proxy_a_distance,
  records_by_domain,
  sampled,
  split_by_domain,
)
from lt_jax.method import Batch, Outputs, State
from lt_jax.screen import Screen, checkpoint_of
from lt_jax.train import Preempted
from lt_jax.writers import read_rows, read_vectors, write_npz

PREDICTIONS = (
  'domain',
  'label',
  'classes',
  'prediction',
  'confidence',
  'logits',
  'top_logits',
  'top_classes',
  'label_logit',
  'log_sum_exp',
)
"""What predictions.npz may hold; in float16 two logits may become equal."""

OF_A_DOMAIN = ('label', 'prediction', 'confidence')
"""What it holds for each domain that is not part of the split 'test'."""

OF_PIXELS = ('confusion', 'pixels', 'right', 'confidence')
"""What it holds if every pixel has a label: for each image, its confusion matrix and
its pixels by confidence, see `evals.segmentation.record`."""

FEATURES = 2000
DOMAIN_FEATURES = 500
SAMPLES = 64
TRANSLATED = 16
SHOWN = 4


class Evaluated(NamedTuple):
  """A State, evaluated on every split.

  Attributes:
    metrics: 'val' and 'test' -> name -> value. Those of the open set are in 'test' for
      the method's known score, and in 'test_by_energy' for the energy of the logits.
    threshold: the threshold of the known score: how it was chosen, and its value, which
      is None without validation images; None without an open test set.
    curves: score -> `open_set.curve`; empty without an open test set.
    arrays: name of a file -> further arrays to write, see `Across`.
    records: split -> what the task keeps; test splits, of every domain, also have
      logits and features.
  """

  metrics: dict[str, dict[str, Any]]
  threshold: dict[str, Any] | None
  curves: dict[str, dict[str, np.ndarray]]
  arrays: dict[str, dict[str, np.ndarray]]
  records: dict[str, Collected]


def evaluate(
  experiment: Experiment,
  stage: Stage,
  state: State,
  stop: Callable[[], bool] = lambda: False,
  bad_images: Callable[[str, np.ndarray], None] = lambda split, rows: None,
) -> Evaluated:
  """Evaluates a State on every split.

  Args:
    experiment: the experiment.
    stage: the stage whose method is evaluated.
    state: its State.
    stop: whether to end at once.
    bad_images: called with (split, positions in the source) of images that could not be
      read and were replaced by others; may raise.

  Raises:
    Preempted: `stop()` returned True during the evaluation.
  """
  task, classes = stage.task, len(stage.dataset.class_names)
  keep = task.keep(stage.passes['test'].examples, classes)
  keep_all = collector(stage.method.predict, keep, experiment.mesh)
  keep_record = collector(stage.method.predict, task.record, experiment.mesh)
  records = {
    name: (keep_all if is_test(name) else keep_record)(state, one_pass, stop)
    for name, one_pass in stage.passes.items()
  }
  if None in records.values():
    raise Preempted
  for name, kept in records.items():
    bad_images(name, bad_rows(stage, name, kept))
  metrics = {'val': split_metrics(records['val'], stage)} if 'val' in records else {}
  played = _played(experiment, stage, state)
  metrics |= _test_metrics(records, played, experiment, stage)
  across = task.across(records, num_classes=classes, groups=stage.groups)
  for place, found in across.metrics.items():
    metrics[place] = metrics.get(place, {}) | found
  return Evaluated(metrics, across.threshold, across.curves, across.arrays, records)


def split_metrics(records: Collected, stage: Stage) -> dict[str, Any]:
  """Returns what a stage's task measures on a split with labels."""
  classes = len(stage.dataset.class_names)
  return stage.task.measure(records, num_classes=classes, groups=stage.groups)


def is_test(split: str) -> bool:
  """Returns whether a split holds the test images of one or several domains."""
  return split.rpartition('/')[2] == 'test'


def test_domains(experiment: Experiment, stage: Stage) -> tuple[str, ...]:
  """Returns the domains of the split 'test'; none if the run has only one domain.

  They are the targets, unless these have no test images.
  """
  targets, opened = experiment.roles[TARGET], experiment.roles[OPEN]
  if targets and experiment.domains[targets[0]].tests:
    return targets
  sources = experiment.roles[SOURCE]
  if stage.domain == SOURCE and len(sources) > 1 and not opened:
    return sources
  return (stage.domain,) if targets or opened else ()


def test_rows(
  records: Collected, experiment: Experiment, stage: Stage
) -> dict[str, dict[str, Any]]:
  """Returns the metrics of the split 'test'.

  With several targets, each has its own as 'NAME/test', and 'test' is the mean over
  them, as in result.json.
  """
  names = test_domains(experiment, stage)
  if len(names) < 2:
    return {'test': split_metrics(records, stage)}
  found = {
    f'{name}/test': split_metrics(own, stage)
    for name, own in split_by_domain(records, names).items()
  }
  return {'test': mean_metrics([*found.values()]), **found}


def _played(
  experiment: Experiment, stage: Stage, state: State
) -> dict[str, dict[str, Any]]:
  """Returns domain -> what a stage's task measures by running the network itself."""
  if stage.task.play is None:
    return {}
  prepare = stage.passes['test'].stream.prepare

  def predict(state: State, images: jax.Array) -> Outputs:
    batch = prepare({}, {'image': images}, jax.random.key(0))
    return stage.method.predict(state, batch['image'])

  names = dict.fromkeys(name for role in experiment.roles.values() for name in role)
  tests = {name: experiment.domains[name].tests['test'] for name in names}
  sources = {name: split.source for name, split in tests.items()}
  return stage.task.play(predict, state, sources)


def _test_metrics(
  records: Mapping[str, Collected],
  played: Mapping[str, dict[str, Any]],
  experiment: Experiment,
  stage: Stage,
) -> dict[str, Any]:
  """Returns 'test', and with several domains also 'domains' and 'domain_means'.

  'test' is the mean over `test_domains`: the targets, if they have test images.
  'domains' has the metrics of every domain. 'domain_means' has the same mean
  ('compound') and the mean over these and the open domains ('compound_open').
  """
  names, opened = test_domains(experiment, stage), experiment.roles[OPEN]
  if not names:
    own = split_metrics(records['test'], stage)
    return {'test': own | played.get(stage.domain, {})}
  domains = {
    name: split_metrics(found, stage) | played.get(name, {})
    for name, found in records_by_domain(records, names).items()
  }
  means = {'compound': mean_metrics([domains[name] for name in names])}
  if opened:
    every = (*names, *opened)
    means['compound_open'] = mean_metrics([domains[name] for name in every])
  return {'test': means['compound'], 'domains': domains, 'domain_means': means}


def bad_rows(stage: Stage, split: str, records: Collected) -> np.ndarray:
  """Returns the positions in the source of images of a split that cannot be read."""
  rows = stage.images[split].rows
  return rows[records['bad']] if 'bad' in records else rows[:0]


def write_results(
  experiment: Experiment,
  workdir: epath.Path,
  stage: Stage,
  state: State,
  *,
  stop: Callable[[], bool],
  bad_images: Callable[[str, np.ndarray], None],
  wall_seconds: float,
  replicas: int = 1,
) -> dict[str, Any]:
  """Evaluates the last stage and writes all results of a run.

  Args:
    experiment: the experiment.
    workdir: the run's folder.
    stage: the last stage.
    state: its selected or last State.
    stop: whether the run must end at once.
    bad_images: as for `evaluate`.
    wall_seconds: from start to here, summed over all starts.
    replicas: how many runs trained together in that time.

  Returns:
    What result.json holds.
  """
  evaluated = evaluate(experiment, stage, state, stop, bad_images)
  translations = _translations(experiment, stage, state)
  pictures = _pictures(experiment, stage, state)
  rows = read_rows(workdir / 'metrics.jsonl')
  rates = [r['images_per_second'] for r in rows if r.get('images_per_second')]
  events = read_rows(workdir / 'events.jsonl')
  starts = [row for row in events if row['event'] == 'started']
  config = experiment.config
  result = {
    'name': config['name'],
    'recipe': config['recipe'],
    'seed': config['seed'],
    'stage': stage.name,
    'step': int(jax.device_get(state.step)),
    'init': _init(events),
    'select': '/'.join(stage.select[:2]) if stage.select else 'last',
    **evaluated.metrics,
    **a_distances(experiment, stage, state, stop),
    'threshold': evaluated.threshold,
    # Of earlier starts too: their config may have been another.
    'uses_target_labels': uses_target_labels(experiment)
    or any(row.get('uses_target_labels') for row in starts),
    'warnings': cautions(experiment),
    'stand_ins': {
      name: int(kept['bad'].sum())
      for name, kept in evaluated.records.items()
      if 'bad' in kept and kept['bad'].any()
    },
    'best_on_test': _best_on_test(rows, stage),
    'memory': _scalars(state.memory),
    'images_per_second': float(np.median(rates)) if rates else None,
    'wall_seconds': round(wall_seconds, 1),
    'replicas': replicas,
    'starts': len(starts),
    'device': f'{experiment.mesh.size} x {jax.devices()[0].device_kind}',
    'versions': versions(),
    'config_digest': config_digest(config),
    'fingerprint': experiment.fingerprint,
    'state_sha256': checkpoint.digest(state),
  }
  if jax.process_index() == 0:
    facts = files.read_json(workdir / 'data.json')
    files.write_json(workdir / 'data.json', facts | {'threshold': evaluated.threshold})
    names = test_domains(experiment, stage)
    if pictures:
      _write_matrices(workdir, evaluated.records, names)
      write_npz(workdir / 'samples.npz', **pictures)
    else:
      _write_arrays(stage, workdir, state, evaluated.records, names)
    _write_borrowed(workdir, records_by_domain(evaluated.records, names))
    _write_order(workdir, experiment, stage)
    if translations:
      write_npz(workdir / 'translations.npz', **translations)
    if evaluated.curves:
      write_npz(
        workdir / 'open_set.npz',
        **{f'{s}/{n}': v for s, c in evaluated.curves.items() for n, v in c.items()},
      )
    for name, arrays in evaluated.arrays.items():
      write_npz(workdir / f'{name}.npz', **arrays)
    _write_weights(workdir, stage, stage.dataset.counts)
    files.write_json(workdir / 'result.json', jsonable(result))
  return result


def uses_target_labels(experiment: Experiment) -> bool:
  """Returns whether a run, or the one it begins from, reads labels of a target."""
  of_stages = any(stage.uses_target_labels for stage in experiment.stages.values())
  return of_stages or experiment.begins_with_target_labels


def _init(events: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
  """Returns which published weights the run started from; None if they were random."""
  rows = [row for row in events if row['event'] == 'began_with_weights']
  names = ('source', 'revision', 'sha256')
  return {name: rows[-1].get(name) for name in names} if rows else None


def _features(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  del batch
  return {'features': outputs['features'].astype('float32')}


def a_distances(
  experiment: Experiment, stage: Stage, state: State, stop: Callable[[], bool]
) -> dict[str, Any]:
  """Returns 'a_distance': target -> its distance from the stage's own domain.

  Measured on features of training images, as `predict` returns them; empty without a
  target.

  Raises:
    Preempted: `stop()` returned True during the evaluation.
  """
  collect = collector(stage.method.predict, _features, experiment.mesh)
  found = {name: collect(state, one, stop) for name, one in stage.compared.items()}
  if None in found.values():
    raise Preempted
  if not found:
    return {}
  own, *targets = (one['features'] for one in found.values())
  distances = (proxy_a_distance(own, features) for features in targets)
  return {'a_distance': dict(zip(list(found)[1:], distances, strict=True))}


def _write_arrays(
  stage: Stage,
  workdir: epath.Path,
  state: State,
  records: Mapping[str, Collected],
  names: Sequence[str] = (),
) -> None:
  """Writes predictions.npz, features.npz and samples.npz.

  Args:
    stage: the last stage.
    workdir: the run's folder.
    state: its selected or last State.
    records: split -> records; those of test images have features.
    names: the domains of the split 'test'; none if the run has only one domain.
  """
  test = records['test']
  domains = records_by_domain(records, names) if names else {}
  predictions = {name: test[name] for name in PREDICTIONS if name in test}
  if domains:
    predictions['domains'] = np.array([*domains])
  for name, found in domains.items():
    if name not in names:
      predictions |= {f'{name}/{key}': found[key] for key in OF_A_DOMAIN}
  write_npz(workdir / 'predictions.npz', **predictions)

  centroids = state.params.get('centroids')
  if centroids is None:
    centroids = _class_means(test['features'], test['label'], stage)
  write_npz(
    workdir / 'features.npz',
    centroids=half(np.asarray(centroids)),
    **(of_domains(domains, DOMAIN_FEATURES) if domains else sampled(test, FEATURES)),
  )

  worst = worst_tail_errors(test, stage.dataset.counts, stage.groups['few'])
  split = stage.images['test']
  write_npz(
    workdir / 'samples.npz',
    image=np.stack([split.image(row) for row in split.rows[worst]])
    if len(worst)
    else np.zeros((0, *stage.dataset.image_shape), split.dtype),
    **{name: test[name][worst] for name in ('label', 'prediction', 'confidence')},
  )


def _write_matrices(
  workdir: epath.Path, records: Mapping[str, Collected], names: Sequence[str]
) -> None:
  """Writes predictions.npz if pixels have labels: the confusion matrix of each image.

  Args:
    workdir: the run's folder.
    records: split -> records.
    names: as for `_write_arrays`.
  """
  domains = records_by_domain(records, names) if names else {}
  test = records['test']
  found = {name: test[name] for name in (*OF_PIXELS, 'domain') if name in test}
  if domains:
    found['domains'] = np.array([*domains])
  for name, own in domains.items():
    if name not in names:
      found |= {f'{name}/{key}': own[key] for key in OF_PIXELS}
  write_npz(workdir / 'predictions.npz', **found)


def _pictures(
  experiment: Experiment, stage: Stage, state: State
) -> dict[str, np.ndarray]:
  """Returns a few test images of every domain, and the task's pictures of them.

  Returns:
    'SPLIT/image' (N, H, W, channels) uint8, and the task's pictures as 'SPLIT/NAME'; {}
    if the task has none.
  """
  if stage.task.picture is None:
    return {}
  collect = collector(stage.method.predict, stage.task.picture, experiment.mesh)
  found: dict[str, np.ndarray] = {}
  for split, one_pass in stage.passes.items():
    if not is_test(split):
      continue
    few = one_pass._replace(batches=1)
    few = few._replace(examples=min(SHOWN, few.examples))
    shown = collect(state, few)
    found |= {f'{split}/{name}': values for name, values in shown.items()}
    images, height = stage.images[split], shown['label'].shape[1]
    seen = [images.image(row) for row in images.rows[: few.examples]]
    step = max(1, len(seen[0]) // height)
    found[f'{split}/image'] = np.stack([image[::step, ::step] for image in seen])
  return found


def _translations(
  experiment: Experiment, stage: Stage, state: State
) -> dict[str, np.ndarray]:
  """Returns a few test images and their translations; {} if the method has none.

  A method that translates outputs images 'as_source' and 'as_target', in which white is
  1. They are named 'test', of the target, and 'source/test'; a target without test
  images has none.
  """
  shapes = stage.survey.outputs(state, 'train')
  drawn = [name for name in shapes if name in ('as_source', 'as_target')]

  def keep(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    del batch
    return {name: jnp.clip(255 * outputs[name] + 0.5, 0, 255) for name in drawn}

  own = f'{stage.domain}/test'
  passes = {'test': 'test', own: own} if own in stage.passes else {own: 'test'}
  found = {}
  for name, split in passes.items() if drawn else ():
    few = stage.passes[split]._replace(batches=1)
    few = few._replace(examples=min(TRANSLATED, few.examples))
    pictures = collector(stage.method.predict, keep, experiment.mesh)(state, few)
    images = stage.images[split]
    rows = images.rows[: few.examples]
    found[f'{name}/image'] = np.stack([images.image(row) for row in rows])
    for kind, pixels in pictures.items():
      found[f'{name}/{kind}'] = pixels.astype(np.uint8)
  return found


def _write_borrowed(workdir: epath.Path, domains: Mapping[str, Collected]) -> None:
  """Writes borrowed.npz, if part of a feature comes from the method's memory.

  Args:
    workdir: the run's folder.
    domains: name -> records of its test images.
  """
  found = {n: one['borrowed'] for n, one in domains.items() if 'borrowed' in one}
  if found:
    sizes = [len(share) for share in found.values()]
    write_npz(
      workdir / 'borrowed.npz',
      borrowed=np.concatenate([*found.values()]),
      domain=np.repeat(np.arange(len(found), dtype=np.int32), sizes),
      domains=np.array([*found]),
    )


def _write_order(workdir: epath.Path, experiment: Experiment, stage: Stage) -> None:
  """Writes order.npz, if a curriculum has ordered the target: its scores, by domain.

  Args:
    workdir: the run's folder.
    experiment: has the target.
    stage: the last stage.
  """
  for stream, saved in stage.reads.items():
    if not saved.ordered_by or stage.trained_on[stream] != f'{TARGET}/train':
      continue
    stored = files.read_npz(workdir / 'stages' / saved.stage / 'arrays.npz')
    names = experiment.roles[TARGET]  # the target is their concatenation in this order
    sizes = [len(experiment.domains[name].splits['train'].rows) for name in names]
    write_npz(
      workdir / 'order.npz',
      score=stored[saved.ordered_by],
      domain=np.repeat(np.arange(len(names), dtype=np.int32), sizes),
      domains=np.array(names),
    )


def _write_weights(workdir: epath.Path, stage: Stage, counts: np.ndarray) -> None:
  """Writes weights.npz, if the stage learned the weights of its examples.

  For each log interval and class: the mean weight, its standard deviation, the fraction
  of negative weights, and the ratio of the mean to the weight without learning. Also
  the learned part alone, which float32 would lose in a mean a million times larger.
  """
  metrics = workdir / 'stages' / stage.name / 'metrics'
  names = ('prior', 'learned', 'about', 'about_square', 'negative')
  paths = {name: metrics / f'weight_{name}.npz' for name in names}
  if not all(path.exists() for path in paths.values()):
    return
  rows = {name: read_vectors(path) for name, path in paths.items()}
  step = [s for s in rows['prior'] if all(s in row for row in rows.values())]
  found = {name: np.stack([row[s] for s in step]) for name, row in rows.items()}
  variance = found['about_square'] - found['about'] ** 2
  mean = found['prior'] + found['learned']
  write_npz(
    workdir / 'weights.npz',
    counts=counts,
    step=np.asarray(step),
    prior=found['prior'],
    mean=mean,
    learned=found['learned'],
    spread=np.sqrt(np.maximum(variance, 0)),
    negative=found['negative'],
    ratio=mean / found['prior'],
  )


def _class_means(features: np.ndarray, label: np.ndarray, stage: Stage) -> np.ndarray:
  """Returns the mean test feature of each class, for a method without centroids."""
  classes = len(stage.dataset.class_names)
  means = np.zeros((classes, features.shape[1]), np.float32)
  np.add.at(means, label, features.astype(np.float32))
  means /= np.maximum(np.bincount(label, minlength=classes), 1)[:, None]
  return means


def worst_tail_errors(
  test: Collected, counts: np.ndarray, few: np.ndarray
) -> np.ndarray:
  """Returns the misclassified test images of the tail with the largest loss.

  Args:
    test: records of the test split.
    counts: (C,) training images.
    few: (C,) bool, the few-shot classes; if there are none, the rarest quarter is used.

  Returns:
    (M,) positions, at most 64, the largest loss first.
  """
  tail = few if few.any() else counts <= np.quantile(counts, 0.25)
  wrong = (test['prediction'] != test['label']) & tail[test['label']]
  positions = np.flatnonzero(wrong)
  return positions[np.argsort(-test['loss'][positions], kind='stable')][:SAMPLES]


def _best_on_test(rows: list[dict[str, Any]], stage: Stage) -> dict[str, Any] | None:
  """Returns the best headline on test data, for the record: it selects no State."""
  headline = stage.task.headline
  rows = [r for r in rows if r['stage'] == stage.name and r['split'] == 'test']
  rows = [r for r in rows if r.get(headline) is not None]
  if not rows:
    return None
  best = max(rows, key=lambda row: row[headline])
  return {name: best.get(name) for name in ('step', 'epoch', headline)}


def _scalars(memory: Mapping[str, Any]) -> dict[str, float]:
  """Returns the single numbers in a State's memory, such as a chosen tau."""
  return {
    path: float(value) for path, value in flatten(memory).items() if np.ndim(value) == 0
  }


def jsonable(value: Any) -> Any:
  """Returns a value with arrays as lists, and None for numbers that are not finite."""
  if isinstance(value, Mapping):
    return {key: jsonable(entry) for key, entry in value.items()}
  if isinstance(value, np.ndarray | list | tuple):
    return [jsonable(entry) for entry in np.asarray(value, object).tolist()]
  return None if isinstance(value, float) and not np.isfinite(value) else value


def seconds_of_earlier_starts(events: Sequence[Mapping[str, Any]]) -> float:
  """Returns how long a run took before its last start.

  Each start counts up to its last event, such as a save: later work is not in the
  result.

  Args:
    events: rows of events.jsonl.
  """
  spans: list[list[float]] = []
  for row in events:
    if row['event'] == 'started':
      spans.append([row['time'], row['time']])
    elif spans:
      spans[-1][1] = row['time']
  return sum(end - begin for begin, end in spans[:-1])


def devices(count: int) -> str:
  """Returns so many devices in words, such as '8 x gpu NVIDIA H200' or '1 x cpu'."""
  backend, kind = jax.default_backend(), jax.devices()[0].device_kind
  return f'{count} x {backend}' + f' {kind}' * (kind.casefold() != backend)


def versions() -> dict[str, str]:
  """Returns the versions a result depends on."""
  import flax
  import optax

  packages = {'lt_jax': lt_jax, 'jax': jax, 'flax': flax, 'optax': optax, 'numpy': np}
  found = {name: package.__version__ for name, package in packages.items()}
  return {'python': platform.python_version(), **found}


def show(result: Mapping[str, Any], screen: Screen) -> None:
  """Prints the table of a result, with the warnings.

  Metrics of shot groups without classes are left out, as is that of a group with all.
  """
  test = result['test']
  groups = told_apart(name for name in SHOTS if test.get(name) is not None)
  test = {k: v for k, v in test.items() if k not in SHOTS or k in groups}
  shown = {
    title: f'{"n/a":>6}' if test[name] is None else f'{100 * test[name]:6.2f} %'
    for name, title in titles().items()
    if name in test
  }
  title = f'test, {result["recipe"]}, seed {result["seed"]}, {checkpoint_of(result)}'
  screen.table(title, shown.items())
  for warning in result['warnings']:
    screen.line(f'warning: {warning}')
