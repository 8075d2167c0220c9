"""From a resolved config to the objects of a run.

This is the only place that knows both the keys of a config and the functions behind
them. Below it there are only plain arrays and numbers.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from lt_jax import method as wrappers
from lt_jax import sharding, surgery
from lt_jax.build.checks import (
  check_all_is_used,
  check_collapse,
  check_device,
  check_end,
  check_ranges,
  check_surgeries,
)
from lt_jax.build.domains import Domains, load_domains
from lt_jax.build.experiment import Experiment, Stage
from lt_jax.build.selection import label_free_scores, selection
from lt_jax.build.streams import (
  ON_BAD_IMAGE,
  Row,
  batch_sizes,
  make_rows,
  workers,
)
from lt_jax.class_weights import make_class_weights
from lt_jax.config import CLOCK, OPEN, TARGET, Config, stage_config
from lt_jax.data import longtail
from lt_jax.data.dataset import Dataset
from lt_jax.data.domains import fingerprint
from lt_jax.data.streams import Pass, Split, Stream, Unlabelled, evaluation_pass
from lt_jax.errors import UserError, class_names, construct, lookup
from lt_jax.evals import TASKS, label_free
from lt_jax.evals.collect import Survey, survey
from lt_jax.evals.tasks import Task
from lt_jax.losses import REDUCTIONS, make_loss, make_penalty
from lt_jax.losses.alignment import make_alignment, make_weight
from lt_jax.method import Method, State
from lt_jax.methods import METHODS, few_shot, self_training, tiled, translation
from lt_jax.methods.meta import WEIGHERS
from lt_jax.methods.multitask import make_heads
from lt_jax.methods.pairs import as_source
from lt_jax.methods.supervised import make_objective
from lt_jax.models import DTYPES, make_classifier
from lt_jax.models.layers import Layer, chopped, trunk_layers
from lt_jax.optim import Optimizer, as_rules, make_optimizer, per_parameter
from lt_jax.players import make_players
from lt_jax.schedules import make_schedule
from lt_jax.surgeries import maps, pixels, posthoc, shallow, shift, zero_shot
from lt_jax.train import Plan, state_shapes

WRAPPERS = (
  wrappers.WRAPPERS
  | posthoc.WRAPPERS
  | shallow.WRAPPERS
  | maps.WRAPPERS
  | translation.WRAPPERS
  | shift.WRAPPERS
  | zero_shot.WRAPPERS
  | tiled.WRAPPERS
  | pixels.WRAPPERS
)


SURGERIES = (
  surgery.SURGERIES
  | posthoc.SURGERIES
  | shallow.SURGERIES
  | maps.SURGERIES
  | few_shot.SURGERIES
  | self_training.SURGERIES
  | shift.SURGERIES
  | zero_shot.SURGERIES
  | pixels.SURGERIES
)


STEPS_PER_CALL = 100
"""Most steps that a compiled call runs on an accelerator.

On the CPU it runs one: inside a loop XLA:CPU has no fast path for convolution
gradients, and there a call costs little.
"""


def build(
  config: Config,
  *,
  devices: int | None = None,
  mesh: Mesh | None = None,
  datasets: Mapping[str, Dataset] | None = None,
  replicas: int = 1,
  look: Callable[[], None] = lambda: None,
) -> Experiment:
  """Builds every object of a run; nothing is trained or compiled.

  Args:
    config: the resolved config.
    devices: use at most this many devices; None for all.
    mesh: mesh of devices that need not exist, on which no data is placed; None for the
      devices that do.
    datasets: domain -> data that replace those named in the config, which are then not
      read.
    replicas: number of seeds that one program trains; each device then has whole
      batches of some of them.
    look: called before every batch of a surgery's passes; it may raise to stop them.

  Raises:
    UserError: something in the config or the data is wrong.
  """
  check_device(config['device'])
  configs = _stage_configs(config)
  to_device = _shape
  if mesh is None:
    mesh = _mesh(configs, devices or jax.device_count(), replicas)
    to_device = functools.partial(sharding.put_replicated, mesh)
  else:  # idle devices cost as much
    sharding.usable_devices(_batches(configs, replicas), mesh.size, processes=2)
  _check_replicas(configs, mesh, replicas)
  domains = load_domains(config, to_device=to_device, given=datasets)
  if datasets is None:
    for stage in configs.values():
      _check_reads(config['task'], domains.dataset(stage['domain']))
  stages: dict[str, Stage] = {}
  for name, stage in configs.items():
    with class_names(domains.dataset(stage['domain']).class_names):
      stages[name] = _build_stage(stage, name, stages, domains, mesh, look)
  return Experiment(
    config,
    domains.single,
    domains.roles,
    domains.data,
    fingerprint(domains.single),
    mesh,
    stages,
    domains.sharing,
  )


def _stage_configs(config: Config) -> dict[str, Config]:
  """Returns the config of each stage, in order, after checking it."""
  configs = {name: stage_config(config, name) for name in config['stage_order']}
  if not configs or len(configs) < len(config['stage_order']):
    raise UserError('stage_order must name each stage exactly once')
  for stage in configs.values():
    check_ranges(stage)
    check_surgeries(stage['surgeries'])
  check_end(configs)
  return configs


def _batches(configs: Mapping[str, Config], replicas: int) -> dict[str, int]:
  """Returns the batch sizes that the number of devices must divide, by description."""
  if replicas > 1:  # each device has whole batches
    return {}
  return {
    f'{name} {what}': size
    for name, stage in configs.items()
    for what, size in batch_sizes(stage).items()
  }


def _mesh(configs: Mapping[str, Config], available: int, replicas: int) -> Mesh:
  """Returns the mesh of those available devices that can be used."""
  if replicas > 1:
    available = min(available, replicas)
  batches = _batches(configs, replicas)
  return sharding.make_mesh(
    sharding.usable_devices(batches, available, jax.process_count())
  )


def _check_replicas(configs: Mapping[str, Config], mesh: Mesh, replicas: int) -> None:
  """Rejects per-device statistics if devices hold batches of several seeds."""
  per_device = any(c['model']['batch_norm'] == 'per_device' for c in configs.values())
  if replicas > 1 and mesh.size > 1 and per_device:
    raise UserError(
      "model.batch_norm is 'per_device', but when seeds train together each device has "
      "whole batches: set it to 'global'"
    )


def _shape(images: np.ndarray) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(images.shape, images.dtype)


def _build_stage(
  config: Config,
  name: str,
  earlier: Mapping[str, Stage],
  domains: Domains,
  mesh: Mesh,
  look: Callable[[], None],
) -> Stage:
  """Builds one stage from its merged config."""
  dataset = domains.dataset(config['domain'])
  task = _task(config['task'], dataset)
  groups = _groups(config, domains) | task.groups(dataset.counts)
  learned = learned_classes(config['shot_groups'], groups, dataset)
  rows = make_rows(config, domains, learned, earlier)
  streams = {name: row.stream for name, row in rows.items()}
  clock = rows[CLOCK]
  plan = _plan(config, clock)
  progress = _progress(_first_step(config, earlier), plan.steps)
  _check_labels(config['task'], task.per_pixel, dataset)
  net = _network(
    config['model'],
    dataset,
    config['batch'],
    config['method'].get('accumulate', 1),
    mesh,
  )
  layers = functools.cache(lambda: trunk_layers(net, dataset.image_shape))
  optimizer = _optimizer(config, clock, layers)
  method, weigh = _method(
    config, dataset, net, optimizer, mesh, rows, learned, progress
  )
  # A stage's passes, shot groups and selection read the labels of its own domain.
  own_target = domains.is_target(config['domain'])
  gives_target_labels = own_target or any(r.uses_target_labels for r in rows.values())
  images, evaluated, seen, few = _passes(config, domains, mesh, gives_target_labels)
  stage_survey = survey(method.predict, passes=seen, mesh=mesh, look=look)
  return Stage(
    name=name,
    method=method,
    net=net,
    optimizer=optimizer,
    layers=layers,
    drawn=chopped(layers(), config['kept_layers']) if config['kept_layers'] else (),
    weigh=weigh,
    domain=config['domain'],
    dataset=dataset,
    task=task,
    groups=groups,
    streams=streams,
    trained_on={name: row.split[0] for name, row in rows.items() if row.split},
    images=images | dict(row.split for row in rows.values() if row.split),
    uses_target_labels=gives_target_labels or bool(domains.sharing),
    passes=evaluated,
    compared=_compared(config, domains, mesh),
    survey=stage_survey,
    reads={name: row.left for name, row in rows.items() if row.left},
    save_outputs=tuple(config['save_outputs']),
    start=None if earlier else _start(config, dataset, method, streams),
    surgeries=(
      *(
        construct(
          SURGERIES,
          'surgery',
          name,
          options=options,
          survey=stage_survey,
          net=net,
          base=learned,
          classes=zero_shot.Classes.of(dataset),
        )
        for name, options in config['surgeries']
      ),
      *_beginning(config, dataset, net, layers, stage_survey, mesh),
    ),
    plan=plan,
    epoch_steps=clock.length / clock.batch,
    batch=max(batch_sizes(config).values()),
    select=selection(config['select'], task, dataset, groups, adapts=bool(few)),
    scores=label_free_scores(method, task, few, mesh),
  )


def _check_labels(task: str, per_pixel: bool, dataset: Dataset) -> None:
  """Rejects label maps for a task on whole images, and vice versa."""
  if per_pixel and not dataset.of_pixels:
    raise UserError(f'task {task!r} needs label maps, but the data have none')
  if dataset.of_pixels and not per_pixel:
    raise UserError(
      f"the data have label maps: set task to 'segmentation', not {task!r}"
    )


def _groups(config: Config, domains: Domains) -> dict[str, np.ndarray]:
  """Returns the shot groups of a stage's classes, strict and inclusive."""
  data, counts = (
    domains.data[config['domain']],
    domains.dataset(config['domain']).counts,
  )
  strict, inclusive = (
    longtail.shot_groups(
      counts, many=data['many_shot'], few=data['few_shot'], rule=rule
    )
    for rule in ('strict', 'inclusive')
  )
  groups = strict | {f'{name}_inclusive': mask for name, mask in inclusive.items()}
  unseen = domains.dataset(config['domain']).unseen
  if unseen is None:
    return groups
  of_seen = {name: mask & ~unseen for name, mask in groups.items()}
  return of_seen | {'seen': ~unseen, 'unseen': unseen}


def _fitted(dataset: Dataset) -> dict[str, np.ndarray]:
  """Returns the seen classes without the validation classes, as the group 'fitted'."""
  if dataset.unseen is None or dataset.val_classes is None:
    return {}
  return {'fitted': ~dataset.unseen & ~dataset.val_classes}


def _task(name: str, dataset: Dataset) -> Task:
  """Returns a task, bound to the unseen classes if there are any.

  Raises:
    UserError: there are unseen classes but the task does not handle them, or vice
      versa.
  """
  task = lookup(TASKS, 'task', name)
  views = 'zero_shot_segmentation' if dataset.of_pixels else 'zero_shot'
  if (dataset.unseen is None) != (task.bind is None):
    raise UserError(
      f'task {name!r} is for data with unseen classes: set data.unseen'
      if dataset.unseen is None
      else f'task is {name!r}, but classes are unseen: set config.task to {views!r}'
    )
  if task.bind is None:
    return task
  columns = dataset.described.columns if dataset.described else ()
  return task.bind(dataset.unseen, dataset.class_vectors, columns)


def _check_reads(name: str, dataset: Dataset) -> None:
  """Rejects test images that lack what a task reads besides labels."""
  test = dataset.tests.get('test')
  for read, how in lookup(TASKS, 'task', name).reads.items():
    if test is None or read not in test.numbers():
      raise UserError(f'task {name!r} needs a {read} for every test image: {how}')


def _passes(
  config: Config, domains: Domains, mesh: Mesh, gives_target_labels: bool
) -> tuple[dict[str, Split], dict[str, Pass], dict[str, Pass], dict[str, Pass]]:
  """Returns test splits, test passes, passes it may see, and passes over a few images.

  Surgeries get the passes that a stage may see: training and validation images of the
  stage's own domain, and training images of targets. The targets' labels are only
  there if a stream of the stage provides them, which the result reports. No test image
  is among them. The last are a few of the images that the stage may see, if it adapts
  to a target. The split 'test' has the test images of the targets or, if these have
  none, those of the stage's own domain.
  """
  own, targets = config['domain'], domains.roles[TARGET]
  dataset = domains.dataset(own)
  adapts = bool(targets) and not domains.is_target(own)
  learnt = {name: (own, split) for name, split in dataset.splits.items()}
  tested = {n: s for n, s in learnt.items() if n not in ('train', 'meta')}
  if adapts:
    theirs = domains.dataset(TARGET).tests
    tested |= {n: (TARGET, split) for n, split in theirs.items()}
    beside = f'{own}/' if theirs else ''
    tested |= {f'{beside}{n}': (own, split) for n, split in dataset.tests.items()}
    target = domains.dataset(TARGET).splits['train']
    split = target if gives_target_labels else Unlabelled(target)
    learnt[f'{TARGET}/train'] = TARGET, split
  else:
    tested |= {n: (own, split) for n, split in dataset.tests.items()}
  for name in domains.roles[OPEN]:
    tests = domains.dataset(name).tests
    tested |= {f'{name}/{n}': (name, split) for n, split in tests.items()}

  def make(domain: str, split: Split | Unlabelled) -> Pass:
    view = as_source if adapts and domain == own else lambda state: state
    return _pass(config, domains, mesh, domain, split, view=view)

  few = {}
  if adapts:
    few = {
      name: make(own, _few(split, label_free.MOST))
      for name, split in dataset.splits.items()
      if name in ('train', 'val')
    }
    some = _few(domains.dataset(TARGET).splits['train'], label_free.MOST)
    few[f'{TARGET}/train'] = make(TARGET, Unlabelled(some))
  if 'test' not in tested:
    raise UserError(f'domain {own!r} has no images to test on, and there is no target')
  seen = {name: make(*one) for name, one in learnt.items()}
  evaluated = {name: seen.get(name) or make(*one) for name, one in tested.items()}
  images = {name: split for name, (_, split) in tested.items()}
  for name, (domain, split, beside) in _tests_of_heads(config, domains).items():
    images[name] = split
    evaluated[name] = _pass(config, domains, mesh, domain, split, beside=beside)
  return images, evaluated, seen, few


def _pass(
  config: Config,
  domains: Domains,
  mesh: Mesh,
  domain: str,
  split: Split | Unlabelled,
  **more: Any,
) -> Pass:
  """Returns a pass over images of a domain, as `evaluation_pass` makes it."""
  data = domains.data[domain]
  return evaluation_pass(
    split,
    batch=sharding.round_up(config['eval_batch'], mesh.size),
    transform=domains.transforms[domain][1],
    workers=workers(data['workers']),
    stand_in=lookup(ON_BAD_IMAGE, 'answer to a bad image', data['on_bad_image']),
    **more,
  )


def _tests_of_heads(
  config: Config, domains: Domains
) -> dict[str, tuple[str, Split, dict[str, np.ndarray]]]:
  """Returns the test images of heads that have a stream of their own.

  Returns:
    'test/STREAM' -> (domain, its test images without their labels, which are classes
    that the network's own head does not have, and these as labels of the heads).
  """
  found = {}
  for stream, row in config['streams'].items():
    heads = [n for n, head in config['heads'].items() if head.get('stream') == stream]
    domain = row.get('domain')
    if stream == CLOCK or not heads or not domain:
      continue
    test = domains.dataset(domain).tests.get('test')
    if test is not None:
      hidden = test._replace(labels=np.full_like(test.labels, -1))
      found[f'test/{stream}'] = domain, hidden, dict.fromkeys(heads, test.labels)
  return found


MOST_COMPARED = 1000
"""Number of training images with which domains are compared."""


def _compared(config: Config, domains: Domains, mesh: Mesh) -> dict[str, Pass]:
  """Returns domain -> a pass over some of its training images, without labels.

  There is one for the stage's own domain, which comes first, and one for each target.
  It is empty unless the stage trains on a domain in order to serve targets.
  """
  own, targets = config['domain'], domains.roles[TARGET]
  if not targets or domains.is_target(own):
    return {}
  found = {}
  # Targets share one transform, so that their passes can share a program.
  for name, role in {own: own, **dict.fromkeys(targets, TARGET)}.items():
    split = domains.dataset(name).splits['train']
    found[name] = evaluation_pass(
      Unlabelled(_few(split, MOST_COMPARED)),
      batch=sharding.round_up(config['eval_batch'], mesh.size),
      transform=domains.transforms[role][1],
      view=as_source if name == own else lambda state: state,
      stand_in=True,  # a damaged image that nothing else reads must not end a run
    )
  return found


def _few(split: Split, most: int) -> Split:
  """Returns a split, or at most `most` of its images, drawn with a fixed seed."""
  drawn = np.random.default_rng(0).permutation(len(split.rows))[:most]
  return split.at(np.sort(drawn))


def learned_classes(
  names: Sequence[str], groups: Mapping[str, np.ndarray], dataset: Dataset
) -> np.ndarray:
  """Returns (C,) bool, the classes in the named groups; all seen classes by default.

  Args:
    names: names of groups, or 'fitted' for seen classes without validation classes.
    groups: the stage's groups.
    dataset: the stage's data set.

  Raises:
    UserError: there is no such group, or the groups have no class.
  """
  groups = {**groups, **_fitted(dataset)}
  if 'fitted' in names and 'fitted' not in groups:
    raise UserError(
      'gamma is chosen on validation classes, with a network trained on the other seen '
      'classes: set data.val_classes'
    )
  members = [lookup(groups, 'group of classes', name) for name in names]
  every = groups.get('seen', np.ones_like(groups['many']))
  learned = np.any(members, axis=0) if members else every
  if not learned.any():
    raise UserError(
      f'shot_groups: no class is in {" or ".join(names)}; choose other groups, or '
      'other bounds by data.many_shot and data.few_shot'
    )
  return learned


def _beginning(
  config: Config,
  dataset: Dataset,
  net: nn.Module,
  layers: Callable[[], tuple[Layer, ...]],
  stage_survey: Survey,
  mesh: Mesh,
) -> list[surgery.Surgery]:
  """Returns surgeries that come last, wherever the initial weights are from."""
  found = []
  if config['kept_layers']:
    found.append(
      surgery.keep_layers(
        kept=config['kept_layers'],
        net=net,
        image_shape=dataset.image_shape,
        layers=layers(),
      )
    )
  if config['model']['batch_norm'] == 'recalibrate':
    model = {**config['model'], 'batch_norm': 'global'}
    live = _network(model, dataset, config['batch'], 1, mesh)
    found.append(maps.recalibrate(survey=stage_survey, net=live, split='train'))
  if config['optimizer'].get('anchored'):
    found.append(surgery.anchor())
  return found


def _start(
  config: Config, dataset: Dataset, method: Method, streams: Mapping[str, Stream]
) -> Callable | None:
  """Returns the function that puts initial weights into a State; None if random."""
  if config['init']:
    return functools.partial(
      surgery.start_from, source=config['init'], class_names=dataset.class_names
    )
  if config['kept_layers'] or config['optimizer'].get('anchored'):
    return _refuse_random
  key = 'learning_rate_scale'
  rules = as_rules(key, config['optimizer'].get(key, ()))
  if all(rate for _, rate in rules):
    return None
  params = {'net': state_shapes(method, streams).params['net']}
  rates = per_parameter(rules, params, some=True)
  frozen = jax.tree.map(lambda x, rate: x.ndim > 1 and not rate, params, rates)
  return _refuse_random if any(jax.tree.leaves(frozen['net'].get('trunk'))) else None


def _refuse_random(state: State) -> NoReturn:
  """Raises a `UserError`: parts that are not trained need initial weights."""
  raise UserError(
    'part of the trunk is kept (optimizer.learning_rate_scale, optimizer.anchored, '
    'kept_layers), so it cannot start at random: give --config.init=FILE.safetensors, '
    '--config.init=OWNER/MODEL such as timm/resnet152.tv_in1k, or --config.init=WORKDIR'
  )


def _optimizer(
  config: Config, clock: Row, layers: Callable[[], tuple[Layer, ...]]
) -> Optimizer:
  """Builds the optimiser of the network."""
  size = {'length': clock.length, 'batch': clock.batch}
  schedule = _made('schedule', make_schedule, config['schedule'], **size)
  return _made(
    'optimizer',
    make_optimizer,
    config['optimizer'],
    learning_rate=schedule,
    layers=lambda: [layer.pattern for layer in layers()],
  )


def _method(
  config: Config,
  dataset: Dataset,
  net: nn.Module,
  optimizer: Optimizer,
  mesh: Mesh,
  rows: Mapping[str, Row],
  learned: np.ndarray,
  progress: Callable[[jax.Array], jax.Array],
) -> tuple[Method, Callable | None]:
  """Builds the loss and the method, and wraps the method.

  Returns:
    (the method, `Reweighted.weigh` if it learns example weights, otherwise None).
  """
  train = rows[CLOCK]
  counts = train.dataset.counts
  size = {'length': train.length, 'batch': train.batch}
  weights = dict(config['class_weights'])
  start_step = train.steps(weights.pop('start_epoch', 0))
  options = dict(config['method'])
  name = options.pop('name')
  check_all_is_used(name, config, WRAPPERS)
  check_collapse(config)
  parts = {
    'loss': _made(
      'loss',
      make_loss,
      config['loss'],
      counts=counts,
      classes=None if learned.all() else learned,
    ),
    'class_weights': _made(
      'class_weights',
      make_class_weights,
      weights,
      counts=counts,
      start_step=start_step,
      class_pixels=functools.partial(_class_pixels, train.dataset),
    ),
    'reduction': lookup(REDUCTIONS, 'reduction', config['reduction']),
    'penalty': _made('penalty', make_penalty, config['penalty'], counts=counts),
  }
  made = functools.partial(
    construct,
    options=options,
    counts=counts,
    **parts,
    objective=make_objective(**parts),
    alignment=_made(
      'alignment',
      make_alignment,
      config['alignment'],
      counts=counts,
      progress=progress,
    ),
    align_on=tuple(config['alignment']['align_on']),
    alignment_weight=make_weight(config['alignment']['weight'], progress),
    players=make_players(config['players'], **size),
    heads=make_heads(config['heads']),
    pixels={name: row.pixels for name, row in rows.items()},
    progress=progress,
    streams=tuple(config['streams']),
    base=learned,
    class_vectors=dataset.class_vectors,
    unseen=dataset.unseen,
    image_shape=dataset.image_shape,
  )
  method = made(METHODS, 'method', name, net, optimizer)
  weigh = made(WEIGHERS, 'method', name, net, optimizer) if name in WEIGHERS else None
  for name, wrapper_options in config['wrappers'].items():
    method = construct(
      WRAPPERS,
      'wrapper',
      name,
      method,
      options=wrapper_options,
      counts=counts,
      streams=tuple(rows),
      pixels={name: row.pixels for name, row in rows.items()},
      unseen=dataset.unseen,
    )
  # A function traced for its shapes is then not traced again for the program.
  method = Method(*(jax.jit(function, inline=True) for function in method))
  return method, weigh


def _class_pixels(dataset: Dataset) -> np.ndarray:
  """Returns (N, C), the pixels of each class in each training image.

  Raises:
    UserError: the images have one label each.
  """
  if not dataset.of_pixels:
    raise UserError(
      'class_weights.name asks for label maps, but each image has one label: take '
      "'inverse_frequency'"
    )
  return dataset.splits['train'].class_pixels(len(dataset.class_names))


def _first_step(config: Config, earlier: Mapping[str, Stage]) -> int:
  """Returns a stage's first step: the end of the stage whose clock it carries, or 0."""
  first = 0
  for name, options in config['surgeries']:
    if name == 'carry' and 'step' in options.get('fields', ()):
      first = lookup(earlier, 'earlier stage', options.get('stage')).plan.steps
  return first


def _progress(first: int, last: int) -> Callable[[jax.Array], jax.Array]:
  """Returns progress from one step to another: step -> () float32 in [0, 1]."""
  steps = max(1, last - first)
  return lambda step: jnp.clip((step - first).astype(jnp.float32) / steps, 0.0, 1.0)


def _made(key: str, make: Callable, options: Config, **context: Any) -> Any:
  """Makes what a config key names; any error message names the key.

  Args:
    key: the key, such as 'loss'.
    make: function that takes the options and the context as keywords.
    options: the value of the key, including a name.
    **context: arguments that the user cannot set.
  """
  try:
    return make(**options, **context)
  except (TypeError, ValueError, LookupError, ZeroDivisionError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f'{key} is {options}: {error}') from error


def _network(
  options: Config, dataset: Dataset, batch: int, accumulate: int, mesh: Mesh
) -> Any:
  """Builds the classifier, with batch statistics as the config says."""
  options = dict(options)
  lookup(DTYPES, 'model.dtype', options['dtype'])
  micro, kind = batch // accumulate, options.pop('batch_norm')
  if batch % accumulate:
    raise UserError(f'batch {batch} does not divide into {accumulate} micro-batches')
  frozen = kind in ('frozen', 'recalibrate')
  groups = 1 if frozen else {'global': 1, 'per_device': mesh.size}.get(kind)
  if str(kind).isdigit() and int(kind) and micro % int(kind) == 0:
    groups = micro // int(kind)
  if groups is None or micro % groups:
    raise UserError(
      f"model.batch_norm is {kind!r}; it can be 'global', 'per_device', 'frozen', "
      f"'recalibrate' or a ghost batch size that divides the batch of {micro}"
    )
  return make_classifier(
    **options,
    num_classes=len(dataset.class_names),
    class_vectors=dataset.class_vectors,
    examples=int(dataset.counts.sum()),
    batch_norm={'groups': groups, 'frozen': frozen},
    per_pixel=dataset.of_pixels,
  )


def _plan(config: Config, train: Row) -> Plan:
  """Turns epochs into steps, and intervals into multiples of a compiled call.

  Checkpoints coincide with log rows, so that a resumed run writes whole rows.
  """
  log_every = config['log_every_steps']
  # Stacking image payloads of many steps would fill the device's memory.
  single = jax.default_backend() == 'cpu' or train.stream.workers is not None
  most = 1 if single else STEPS_PER_CALL
  chunk = max(n for n in range(1, min(log_every, most) + 1) if log_every % n == 0)

  steps = train.steps(config['epochs'])
  if steps >= 2**31:
    raise UserError(
      f'epochs is {config["epochs"]:g}, which is {steps:,} steps; a run has at most '
      f'{2**31 - 1:,}: lower epochs'
    )

  def interval(epochs: float, unit: int) -> int:
    return max(1, math.ceil(train.steps(epochs) / unit)) * unit

  return Plan(
    first=0,
    steps=steps,
    chunk=chunk,
    log_every=log_every,
    save_every=interval(config['save_every_epochs'], log_every),
    evaluate_every=interval(config['evaluate_every_epochs'], chunk),
  )
