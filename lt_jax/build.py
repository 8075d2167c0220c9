"""From a resolved configuration to the objects of a run.

The only place that knows both the keys of a configuration and the functions behind
them. Below it there are plain arrays and numbers.
"""

import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from lt_jax import method as wrappers
from lt_jax import posthoc, sharding, surgery
from lt_jax.class_weights import make_class_weights
from lt_jax.data import augment, longtail
from lt_jax.data.dataset import Dataset, load_dataset
from lt_jax.data.episodes import episode_stream, episodes
from lt_jax.data.reading import usable_cores
from lt_jax.data.samplers import SAMPLERS, Sampler, deferred, instance
from lt_jax.data.streams import (
  Pass,
  Split,
  Stream,
  evaluation_pass,
  train_stream,
)
from lt_jax.errors import UserError, check_options, construct, lookup, suggest
from lt_jax.evals.collect import Survey, survey
from lt_jax.files import flatten
from lt_jax.losses import REDUCTIONS, make_loss, make_penalty
from lt_jax.method import Method, State
from lt_jax.methods import METHODS, few_shot
from lt_jax.models import make_classifier
from lt_jax.optim import epoch_start, make_optimizer, make_schedule, per_parameter
from lt_jax.recipes import STAGE_KEYS, set_keys
from lt_jax.surgery import Surgery
from lt_jax.train import Plan, state_shapes

Config = Mapping[str, Any]

WRAPPERS = wrappers.WRAPPERS | posthoc.WRAPPERS
SURGERIES = surgery.SURGERIES | posthoc.SURGERIES | few_shot.SURGERIES

STEPS_PER_CALL = 100
"""Most steps a compiled call runs on an accelerator.

On the CPU it is one: in a loop body XLA:CPU misses its fast path for convolution
gradients, and a call costs little there.
"""


SELECTABLE = {
  'accuracy': 1,
  'macro_accuracy': 1,
  'harmonic_mean': 1,
  'worst_class': 1,
  'many': 1,
  'medium': 1,
  'few': 1,
  'loss': -1,
  'ece': -1,
}
"""Metrics a State can be chosen by; -1 where less is better."""

ON_BAD_IMAGE = {'raise': False, 'skip': True}
"""Whether another image of the class stands in for one that cannot be read."""

RANGES = {
  'seed': (0, 2**31 - 1),
  'batch': (1, 2**31),
  'meta_batch': (0, 2**31),
  'meta_every': (1, 1e9),
  'eval_batch': (1, 2**31),
  'epochs': (0, 1e9),
  'log_every_steps': (1, 1e9),
  'save_every_epochs': (1e-9, 1e9),
  'evaluate_every_epochs': (1e-9, 1e9),
  'keep_checkpoints': (1, 1e9),
  'method.accumulate': (1, 2**31),
  'model.projection': (-1, 1e6),
  'data.seed': (0, 2**31 - 1),
  'data.known_classes': (0, 1e9),
  'data.imbalance': (1, 1e12),
  'data.test_per_class': (0, 1e9),
  'data.val_per_class': (0, 1e9),
  'data.meta_per_class': (0, 1e9),
  'data.open_val_per_class': (0, 1e9),
  'data.open_test_per_class': (0, 1e9),
  'data.pad': (0, 1e4),
  'data.jitter': (0, 1),
  'data.image_size': (0, 1e4),
  'data.resize': (0, 1e4),
  'data.workers': (-1, 1e4),
  'defer_epoch': (0, 1e9),
  'sampler.start_epoch': (0, 1e9),
  'class_weights.start_epoch': (0, 1e9),
  'schedule.base': (0, 1e30),
  'method.weight': (0, 1e30),
  'penalty.weight': (0, 1e30),
}
"""Least and largest value of numbers in a configuration."""


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


class Stage(NamedTuple):
  """One stage: an ordinary run, which begins from the States of earlier ones.

  Attributes:
    name: of the stage.
    method: what is trained.
    streams: what it is trained on.
    reads: streams whose arrays an earlier stage leaves: name of the stream -> stage.
    leaves: what this stage leaves of each training image: names of outputs.
    start: what puts published weights into a fresh State, and tells of it, or refuses
      to do without; None: they are random.
    surgeries: from a fresh State and earlier ones to the first State.
    plan: when things happen; `first` is set when the first State is known.
    epoch_steps: steps an epoch, fractional.
    batch: global batch size.
    select: (split, metric) by which the State that counts is chosen; None: the last.
  """

  name: str
  method: Method
  streams: dict[str, Stream]
  reads: dict[str, str]
  leaves: tuple[str, ...]
  start: Callable[[State], tuple[State, dict[str, Any]]] | None
  surgeries: tuple[Surgery, ...]
  plan: Plan
  epoch_steps: float
  batch: int
  select: tuple[str, str] | None


class Experiment(NamedTuple):
  """Everything a run needs.

  Attributes:
    config: the resolved configuration.
    dataset: its data.
    mesh: its devices.
    passes: split -> evaluation pass.
    survey: a method's `predict` -> its passes over all splits, those of training too.
    groups: 'many', 'medium' and 'few', strict, and '<group>_inclusive' -> (C,) bool.
    stages: in order.
  """

  config: Config
  dataset: Dataset
  mesh: Mesh
  passes: dict[str, Pass]
  survey: Callable[[Callable], Survey]
  groups: dict[str, np.ndarray]
  stages: dict[str, Stage]


def resolve(config: Any) -> dict[str, Any]:
  """Returns a `ConfigDict` as plain data, just as config.json gives it back.

  Raises:
    UserError: a number is not finite.
  """
  plain = config.to_dict()
  plain['stages'] = {n: set_keys(stage) for n, stage in config.stages.items()}
  plain = json.loads(json.dumps(plain))
  for key, value in flatten(plain).items():
    try:
      json.dumps(value, allow_nan=False)
    except ValueError:
      raise UserError(f'config.{key} is {value!r}; it must be finite') from None
  return plain


def trained_by(config: Config) -> dict[str, Any]:
  """Returns what of a configuration the training depends on: 'data.source' -> value."""
  return {k: value for k, value in flatten(config).items() if k not in MAY_CHANGE}


def config_digest(config: Config) -> str:
  """Returns 12 hexadecimal digits of what the training depends on, the seed aside."""
  rest = {key: value for key, value in trained_by(config).items() if key != 'seed'}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:12]


def stage_config(config: Config, name: str) -> dict[str, Any]:
  """Returns the configuration of a stage: the top level, overridden."""

  def merge(base: Config, over: Config) -> dict[str, Any]:
    merged = dict(base)
    for key in over:  # what is called otherwise has not the options of another
      if f'{key}_options' in base and over[key] != base[key]:
        merged[f'{key}_options'] = {}
    for key, value in over.items():
      both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
      nested = both and 'name' not in value
      merged[key] = merge(merged[key], value) if nested else value
    return merged

  stage = lookup(config['stages'], 'stage', name)
  for key in stage:
    if key not in STAGE_KEYS:
      near = suggest(key, STAGE_KEYS)
      raise UserError(f'stage {name!r} sets {key!r}, which a stage cannot{near}')
  return merge(config, stage)


def build(
  config: Config,
  *,
  devices: int | None = None,
  mesh: Mesh | None = None,
  dataset: Dataset | None = None,
  replicas: int = 1,
  look: Callable[[], None] = lambda: None,
) -> Experiment:
  """Builds every object of a run; nothing is trained or compiled.

  Args:
    config: the resolved configuration.
    devices: uses at most so many; None for all there are.
    mesh: of devices that need not be here, for which nothing is put in place; None for
      those that are.
    dataset: takes the place of the one that the configuration names, which is then not
      read; None for that one.
    replicas: how many seeds one program trains; each device then has whole batches of
      some of them.
    look: called before every batch of a surgery's passes; it may raise, to end them.

  Raises:
    UserError: something in the configuration or the data is wrong.
  """
  check_device(config['device'])
  configs = {name: stage_config(config, name) for name in config['stage_order']}
  if not configs or len(configs) < len(config['stage_order']):
    raise UserError('stage_order must name stages, each of them once')
  for stage in configs.values():
    check_ranges(stage)
  _check_end(configs)
  batches = {
    f'{name} {what}': size
    for name, stage in configs.items()
    for what, size in _batch_sizes(stage).items()
  }
  if replicas > 1:
    batches = {}
  batches['evaluation'] = config['eval_batch']
  if mesh is None:
    available = devices or jax.device_count()
    if replicas > 1:
      available = min(available, replicas)
    mesh = sharding.make_mesh(
      sharding.usable_devices(batches, available, jax.process_count())
    )
    to_device = functools.partial(sharding.put_replicated, mesh)
  else:
    sharding.usable_devices(batches, mesh.size, processes=2)  # idle ones cost as much
    to_device = _shape
  per_device = any(c['model']['batch_norm'] == 'per_device' for c in configs.values())
  if replicas > 1 and mesh.size > 1 and per_device:
    raise UserError(
      "model.batch_norm is 'per_device', but of seeds that train together a device has "
      "whole batches: set it to 'global'"
    )
  data = dict(config['data'])
  shots = {'many': data.pop('many_shot'), 'few': data.pop('few_shot')}
  train_transform, plain_transform = _transforms(data)
  workers = _workers(data.pop('workers'))
  skips = lookup(ON_BAD_IMAGE, 'answer to a bad image', data.pop('on_bad_image'))
  check_options('data', load_dataset, data, 'to_device')
  if dataset is None:
    dataset = load_dataset(**data, to_device=to_device)
  _check_channels(config['data'], dataset.image_shape[-1])
  passes = {
    name: evaluation_pass(
      split,
      batch=config['eval_batch'],
      transform=plain_transform,
      workers=workers,
      stand_in=skips,
    )
    for name, split in dataset.splits.items()
  }
  strict, inclusive = (
    longtail.shot_groups(dataset.counts, **shots, rule=rule)
    for rule in ('strict', 'inclusive')
  )
  groups = strict | {f'{name}_inclusive': mask for name, mask in inclusive.items()}
  surveyor = functools.partial(survey, passes=passes, mesh=mesh, look=look)
  stages: dict[str, Stage] = {}
  for name, stage in configs.items():
    stages[name] = _build_stage(
      stage, name, stages, dataset, surveyor, groups, mesh, train_transform
    )
  evaluated = {n: p for n, p in passes.items() if n not in ('train', 'meta')}
  return Experiment(config, dataset, mesh, evaluated, surveyor, groups, stages)


def _shape(images: np.ndarray) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(images.shape, images.dtype)


def check_ranges(config: Config) -> None:
  """Refuses numbers that mean nothing, such as a batch of no images."""
  flat = flatten(config)
  for key, (least, most) in RANGES.items():
    value = flat.get(key, least)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and least <= value <= most):  # NaN is in no range
      raise UserError(f'{key} is {value!r}; it must be from {least:g} to {most:g}')


def _check_end(stages: Mapping[str, Config]) -> None:
  """Refuses what would come when a stage has ended, and so never.

  Fewer epochs leave it where it was, and `ldam_drw` would be `ldam` without a word.
  """
  ends = {name: stage['epochs'] for name, stage in stages.items()}
  for name, stage in reversed(stages.items()):
    for operation, options in stage['surgeries']:
      if operation == 'carry' and 'step' in options.get('fields', ()):  # one clock
        origin = options.get('stage')
        ends[origin] = max(ends.get(origin, 0), ends[name])
  for name, stage in stages.items():
    end, schedule = ends[name], stage['schedule']
    epochs = {
      'class_weights.start_epoch': stage['class_weights'].get('start_epoch', 0),
      'sampler.start_epoch': math.ceil(stage['sampler'].get('start_epoch', 0)),
      'schedule.boundaries': max(schedule.get('boundaries') or [0]),
    }
    for key, epoch in epochs.items():
      if 0 < end <= epoch:
        raise UserError(f'{key} is at epoch {epoch:g}{_BEYOND.format(name, end)}')
    if 0 < end < schedule.get('end', 0) * (1 - 1e-9):
      raise UserError(
        f'schedule.end is at epoch {schedule["end"]:g}{_BEYOND.format(name, end)}'
      )


_BEYOND = (
  ', but stage {!r} ends at {:g}; a whole recipe becomes shorter with epochs=... '
  'behind the colon of --config'
)


def _check_channels(data: Config, channels: int) -> None:
  """Refuses means and deviations that do not fit the images."""
  for key in ('mean', 'std'):
    values = data[key]
    if not isinstance(values, list | tuple) or len(values) not in (1, channels):
      raise UserError(
        f'data.{key} is {values!r}; it must be 1 or {channels} numbers, as the images '
        f'have {channels} channels'
      )
  if not all(value > 0 for value in data['std']):
    raise UserError(f'data.std is {data["std"]!r}; it must be positive')


def check_device(device: str) -> None:
  """Refuses to train on a CPU what was meant for an accelerator.

  A driver that is missing or busy makes JAX fall back to the CPU with a warning.
  """
  backend = jax.default_backend()
  if device not in ('any', 'cpu', backend):
    raise UserError(
      f'config.device is {device!r}, but JAX found {backend!r}; '
      'set --config.device=any to run on what is there'
    )


def _transforms(data: dict[str, Any]) -> tuple[Callable, Callable]:
  """Takes the keys of augmentation out of `data`; returns (training, evaluation)."""
  mean, std = data.pop('mean'), data.pop('std')
  pad, pad_mode, flip = data.pop('pad'), data.pop('pad_mode'), data.pop('flip')
  jitter = data.pop('jitter')
  lookup(augment.PAD_MODES, 'pad_mode', pad_mode)

  def plain(key, images):
    del key
    return augment.normalise(images, mean, std)

  def augmented(key, images):
    crop_key, flip_key = jax.random.split(key)
    jitter_key = jax.random.fold_in(key, 1)
    if pad:
      images = augment.pad_crop(crop_key, images, pad=pad, mode=pad_mode)
    if flip:
      images = augment.flip(flip_key, images)
    if jitter:
      images = augment.colour_jitter(jitter_key, images, strength=jitter)
    return augment.normalise(images, mean, std)

  return augmented, plain


def _build_stage(
  config: Config,
  name: str,
  earlier: Mapping[str, Stage],
  dataset: Dataset,
  surveyor: Callable[[Callable], Survey],
  groups: Mapping[str, np.ndarray],
  mesh: Mesh,
  transform: Callable,
) -> Stage:
  """Builds one stage from its merged configuration."""
  learned = learned_classes(config['classes'], groups)
  images = functools.partial(
    train_stream,
    seed=config['seed'],
    transform=transform,
    workers=_workers(config['data']['workers']),
    stand_in=lookup(
      ON_BAD_IMAGE, 'answer to a bad image', config['data']['on_bad_image']
    ),
  )
  train = construct(
    STREAMS,
    'stream',
    config['stream']['name'],
    config,
    dataset,
    learned,
    options={k: v for k, v in config['stream'].items() if k != 'name'},
    images=images,
    earlier=earlier,
  )
  streams = {'train': train.stream}
  if config['meta_batch']:
    meta = _meta_split(dataset, config['meta_batch'])
    drawn = images(meta, instance(meta.labels), batch=config['meta_batch'], name='meta')
    streams['meta'] = drawn._replace(every=config['meta_every'])
  method = _method(config, dataset, mesh, train, learned)
  seen = surveyor(method.predict)
  return Stage(
    name=name,
    method=method,
    streams=streams,
    reads={'train': train.origin} if train.origin else {},
    leaves=tuple(config['leaves']),
    start=None if earlier else _start(config, method, streams),
    surgeries=tuple(
      construct(SURGERIES, 'surgery', name, options=options, survey=seen, base=learned)
      for name, options in config['surgeries']
    ),
    plan=_plan(config, train),
    epoch_steps=train.length / train.batch,
    batch=max(_batch_sizes(config).values()),
    select=_select(config['select'], dataset, groups),
  )


class _Training(NamedTuple):
  """The stream that a stage is trained on.

  Attributes:
    stream: the stream.
    length: L of an epoch: it begins at every step ceil(e L / B).
    batch: B.
    origin: the stage that leaves the stream's arrays; empty if none does.
  """

  stream: Stream
  length: int
  batch: int
  origin: str = ''

  def steps(self, epochs: float) -> int:
    """Returns the step at which an epoch begins."""
    return epoch_start(epochs, self.length, self.batch)


def _images(
  config: Config, dataset: Dataset, learned: np.ndarray, *, images: Callable
) -> _Training:
  """Returns the stream of a split's images of the learned classes, by the sampler."""
  split = lookup(_trainable(dataset), 'split to train on', config['train_split'])
  kept = learned[split.labels]
  split = split._replace(rows=split.rows[kept], labels=split.labels[kept])
  batch = config['batch']
  sampler = _sampler(config['sampler'], split.labels, batch, config['epochs'])
  return _Training(images(split, sampler, batch=batch), sampler.length, batch)


def _episodes(
  config: Config,
  dataset: Dataset,
  learned: np.ndarray,
  *,
  earlier: Mapping[str, Stage],
  stage: str,
  per_epoch: int,
  novel: int,
  queries_novel: int,
  queries_base: int,
) -> _Training:
  """Returns the stream of few-shot tasks on the features that a stage leaves.

  An epoch is `per_epoch` tasks; the others are options of `episodes`.
  """
  origin = lookup(earlier, 'earlier stage', stage)
  if 'features' not in origin.leaves:
    raise UserError(f"stage {stage!r} must leave its features: leaves = ('features',)")
  labels = dataset.splits['train'].labels
  tasks = episodes(
    labels,
    learned,
    novel=novel,
    queries_novel=queries_novel,
    queries_base=queries_base,
  )
  state = state_shapes(origin.method, origin.streams)
  image = jax.ShapeDtypeStruct((1, *dataset.image_shape), np.float32)
  width = jax.eval_shape(origin.method.predict, state, image)['features'].shape[-1]
  features = jax.ShapeDtypeStruct((len(labels), width), np.float32)
  stream = episode_stream(tasks, features, seed=config['seed'])
  return _Training(stream, per_epoch, 1, stage)


STREAMS = {'images': _images, 'episodes': _episodes}
"""name -> (config, dataset, learned classes, ...) -> what a stage is trained on."""


def _batch_sizes(config: Config) -> dict[str, int]:
  """Returns the first axes of what a step is given, which devices must divide."""
  sizes = {'batch': config['batch'], 'meta batch': config['meta_batch']}
  stream = config['stream']
  if stream['name'] == 'episodes':
    queries = stream.get('queries_novel', 0) + stream.get('queries_base', 0)
    sizes = {'novel classes': stream.get('novel', 0), 'queries': queries}
  return {name: size for name, size in sizes.items() if size}


def learned_classes(
  names: Sequence[str], groups: Mapping[str, np.ndarray]
) -> np.ndarray:
  """Returns (C,) bool, the classes of some shot groups; of none: all classes."""
  members = [lookup(groups, 'group of classes', name) for name in names]
  learned = np.any(members, axis=0) if members else np.ones_like(groups['many'])
  if not learned.any():
    raise UserError(f'no class is in {" or ".join(names)}')
  return learned


def _start(
  config: Config, method: Method, streams: Mapping[str, Stream]
) -> Callable | None:
  """Returns what puts published weights into a State; None: random ones will do."""
  if config['init']:
    return functools.partial(surgery.start_from, source=config['init'])
  rules = config['optimizer'].get('learning_rate_scale', ())
  if all(rate for _, rate in rules):
    return None
  params = state_shapes(method, streams).params
  rates = per_parameter(rules, params)
  frozen = jax.tree.map(lambda x, rate: x.ndim > 1 and not rate, params, rates)
  return _refuse_random if any(jax.tree.leaves(frozen['net']['trunk'])) else None


def _refuse_random(state: State) -> NoReturn:
  """Raises a `UserError`: what is not trained must come from somewhere."""
  raise UserError(
    'not all of the trunk is trained (optimizer.learning_rate_scale), so it cannot '
    'begin at random: give --config.init=FILE.safetensors or --config.init=OWNER/MODEL '
    'such as timm/resnet152.tv_in1k'
  )


def _workers(number: int) -> int:
  """Returns how many processes decode images; -1 means one a core."""
  return usable_cores() if number == -1 else number


def _trainable(dataset: Dataset) -> dict[str, Split]:
  """Returns the splits that a stage may train on."""
  return {n: s for n, s in dataset.splits.items() if n in ('train', 'meta')}


def _meta_split(dataset: Dataset, batch: int) -> Split:
  """Returns the balanced set of the meta stream, which must have every class."""
  if 'meta' not in dataset.splits:
    raise UserError(
      f'meta_batch is {batch}, but there is no meta set: set data.meta_per_class'
    )
  meta = dataset.splits['meta']
  missing = np.setdiff1d(np.arange(len(dataset.class_names)), meta.labels)
  if missing.size:
    raise UserError(f'the meta set has no image of class {missing[0]}')
  if batch > len(meta.rows):
    raise UserError(
      f'meta_batch is {batch}, but the meta set has {len(meta.rows)} images'
    )
  return meta


def _sampler(options: Config, labels: np.ndarray, batch: int, epochs: float) -> Sampler:
  """Builds a sampler; before its start, a whole epoch, instance sampling serves."""
  options = dict(options)
  start = options.pop('start_epoch', 0)
  name = options.pop('name')
  sampler = construct(
    SAMPLERS, 'sampler', name, labels, options=options, batch=batch, epochs=epochs
  )
  if not start:
    return sampler
  return deferred(instance(labels), sampler, switch_epoch=math.ceil(start))


def _method(
  config: Config, dataset: Dataset, mesh: Mesh, train: _Training, learned: np.ndarray
) -> Method:
  """Builds network, optimiser, loss and method, and wraps it."""
  counts = dataset.counts
  schedule = make_schedule(**config['schedule'], length=train.length, batch=train.batch)
  optimizer = make_optimizer(learning_rate=schedule, **config['optimizer'])
  weights = dict(config['class_weights'])
  start_step = train.steps(weights.pop('start_epoch', 0))
  options = dict(config['method'])
  micro_batches = options.get('accumulate', 1)
  name = options.pop('name')
  _check_all_is_used(name, config)
  method = construct(
    METHODS,
    'method',
    name,
    _network(config['model'], dataset, config['batch'], micro_batches, mesh),
    optimizer,
    make_loss(
      counts=counts, classes=None if learned.all() else learned, **config['loss']
    ),
    options=options,
    counts=counts,
    class_weights=make_class_weights(counts=counts, start_step=start_step, **weights),
    reduction=lookup(REDUCTIONS, 'reduction', config['reduction']),
    penalty=make_penalty(counts=counts, **config['penalty']),
    meta_batch=config['meta_batch'],
    base=learned,
    image_shape=dataset.image_shape,
  )
  for name, wrapper_options in config['wrappers'].items():
    method = construct(
      WRAPPERS, 'wrapper', name, method, options=wrapper_options, counts=counts
    )
  # What is traced once for shapes is then not traced again for the program.
  return Method(*(jax.jit(function, inline=True) for function in method))


def _check_all_is_used(name: str, config: Config) -> None:
  """Refuses what a method would not look at, such as class weights or a meta batch."""
  asked = inspect.signature(lookup(METHODS, 'method', name)).parameters
  neutral = {
    'class_weights': 'uniform',
    'reduction': 'mean',
    'penalty': 'none',
    'meta_batch': 0,
  }
  given = {
    'class_weights': config['class_weights']['name'],
    'reduction': config['reduction'],
    'penalty': config['penalty']['name'],
    'meta_batch': config['meta_batch'],
  }
  for key, value in neutral.items():
    if key not in asked and given[key] != value:
      raise UserError(
        f'method {name!r} does not use {key}: set it to {value!r}, or only for the '
        f'stage that does, as stages.STAGE.{key}'
      )


def _network(
  options: Config, dataset: Dataset, batch: int, accumulate: int, mesh: Mesh
) -> Any:
  """Builds the classifier, with batch statistics as the configuration names them."""
  options = dict(options)
  micro, kind = batch // accumulate, options.pop('batch_norm')
  if batch % accumulate:
    raise UserError(f'batch {batch} does not divide into {accumulate} micro-batches')
  groups = {'global': 1, 'frozen': 1, 'per_device': mesh.size}.get(kind)
  if str(kind).isdigit() and int(kind) and micro % int(kind) == 0:
    groups = micro // int(kind)
  if groups is None or micro % groups:
    raise UserError(
      f"model.batch_norm is {kind!r}; it can be 'global', 'per_device', 'frozen' or a "
      f'ghost batch size that divides the batch of {micro}'
    )
  return make_classifier(
    **options,
    num_classes=len(dataset.class_names),
    batch_norm={'groups': groups, 'frozen': kind == 'frozen'},
  )


def _plan(config: Config, train: _Training) -> Plan:
  """Turns epochs into steps, and intervals into multiples of a compiled call.

  Checkpoints fall on log rows, so that a run resumed from one writes whole rows.
  """
  log_every = config['log_every_steps']
  # Payloads of images would fill the device if many steps of them were stacked.
  single = jax.default_backend() == 'cpu' or train.stream.workers is not None
  most = 1 if single else STEPS_PER_CALL
  chunk = max(n for n in range(1, min(log_every, most) + 1) if log_every % n == 0)

  def interval(epochs: float, unit: int) -> int:
    return max(1, math.ceil(train.steps(epochs) / unit)) * unit

  return Plan(
    first=0,
    steps=train.steps(config['epochs']),
    chunk=chunk,
    log_every=log_every,
    save_every=interval(config['save_every_epochs'], log_every),
    evaluate_every=interval(config['evaluate_every_epochs'], chunk),
  )


def _select(
  select: str, dataset: Dataset, groups: Mapping[str, np.ndarray]
) -> tuple[str, str] | None:
  """Returns (split, metric) of the State that counts; None for the last one."""
  if select == 'last':
    return None
  split, _, metric = str(select).partition('/')
  if split == 'test':
    raise UserError('select: a State is never chosen on the test set')
  if split != 'val' or not metric:
    raise UserError(f"select is {select!r}; it is 'last' or such as 'val/accuracy'")
  lookup(SELECTABLE, 'metric to select by', metric)
  if split not in dataset.splits:
    raise UserError(f'select is {select!r}, but there is no val: data.val_per_class')
  if metric in groups and not groups[metric].any():
    raise UserError(f'select is {select!r}, but no class is {metric}-shot')
  return split, metric
