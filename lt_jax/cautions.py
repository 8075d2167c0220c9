"""Warnings that the numbers of a run may mean less than they seem to.

The banner of a run and `lt_jax.doctor` print them, and `result.json` keeps them. To add
one, write a function (Experiment) -> lines and put it into `CAUTIONS`.
"""

import math
from collections.abc import Iterator

import jax
import numpy as np

from lt_jax import footprint
from lt_jax.build import Experiment, Stage
from lt_jax.build.streams import batch_sizes
from lt_jax.config import SOURCE, TARGET, stage_config, unused
from lt_jax.data.attributes import names_of_words, words_of
from lt_jax.errors import UserError
from lt_jax.surgeries import shallow
from lt_jax.train import state_shapes

FITS = (*shallow.SURGERIES, 'nearest_class_mean')
"""Surgeries that fit a classifier, so that a stage of no steps is one of training."""


def cautions(experiment: Experiment) -> list[str]:
  """Returns what makes the numbers of a run mean less than they seem to."""
  return [line for caution in CAUTIONS for line in caution(experiment)]


def _one_class(experiment: Experiment) -> Iterator[str]:
  """Warns of a data set in which nothing can be mistaken."""
  if len(experiment.dataset.class_names) == 1:
    yield 'there is only one class, so every accuracy is 100 % whatever is learned'


def _untrained(experiment: Experiment) -> Iterator[str]:
  """Warns where the last stage has learned nothing, and took nothing over."""
  trained = bool(experiment.config['init'])
  for number, stage in enumerate(experiment.stages.values()):
    surgeries = stage_config(experiment.config, stage.name)['surgeries']
    fits = any(name in FITS for name, _ in surgeries)
    # The surgeries of a first stage inherit nothing, so they fit something to data.
    fits |= bool(stage.surgeries) and (trained or not number)
    trained = bool(stage.plan.steps) or fits
  if not trained:
    yield (
      f'the result is of an untrained network: stage {stage.name!r} makes no step '
      '(see epochs) and inherits nothing from another stage'
    )


def _unused_domains(experiment: Experiment) -> Iterator[str]:
  """Warns of domains that nothing is done with."""
  for name in experiment.config['domains']:
    if name not in experiment.domains:
      yield unused(name)


def _same_names(experiment: Experiment) -> Iterator[str]:
  """Warns of classes of one name in several sources that count as different classes."""
  owners: dict[str, list[str]] = {}
  for source in experiment.roles[SOURCE]:
    for name in experiment.domains[source].class_names:
      owners.setdefault(name, []).append(source)
  union = set(experiment.dataset.class_names)
  twice = [
    (name, sources)
    for name, sources in owners.items()
    if sum(f'{source}/{name}' in union for source in sources) > 1
  ]
  if twice:
    name, sources = twice[0]
    yield (
      f'{" and ".join(sources)} each have a class {name!r}, which count as different '
      f'classes (of {len(twice)} such names): if they are the same, name them in '
      'same_classes of each'
    )


def _trained_on_tests(experiment: Experiment) -> Iterator[str]:
  """Warns of test images that are, by their place in the data, trained on too."""
  for name, dataset in experiment.domains.items():
    train, test = dataset.splits['train'], dataset.tests.get('test')
    if test is None or test.source is not train.source or test.source is None:
      continue
    both = np.intersect1d(train.rows, test.rows).size
    if both:
      hidden = name in experiment.roles[TARGET]
      yield (
        f'{both:,} of the {len(test.rows):,} test images of {name!r} are among its '
        'training images' + (', whose labels are hidden' if hidden else '')
      )


def _same_data(experiment: Experiment) -> Iterator[str]:
  """Warns of two domains that are the very same images."""
  prints: dict[str, str] = {}
  for name, dataset in experiment.domains.items():
    if dataset.fingerprint and dataset.fingerprint in prints:
      yield f'domains {prints[dataset.fingerprint]!r} and {name!r} are the same images'
    prints.setdefault(dataset.fingerprint, name)


FEW_STEPS = 50
"""Fewer are too few for a classifier that a later stage trains from the beginning."""


def _short_stages(experiment: Experiment) -> Iterator[str]:
  """Warns of a later stage that trains for very few steps."""
  for name, stage in experiment.stages.items():
    steps = stage.plan.steps
    taken = stage_config(experiment.config, name)['surgeries']
    if taken and 0 < steps < FEW_STEPS:
      told = '1 step' if steps == 1 else f'{steps} steps'
      yield (
        f'stage {name!r} trains for {told} only, which is too few for a classifier '
        f'trained from scratch: raise config.stages.{name}.epochs'
      )


def _pretrain_classes(experiment: Experiment) -> Iterator[str]:
  """Warns of unseen classes that the weights, or the features, may have seen."""
  dataset = experiment.dataset
  if dataset.unseen is None:
    return
  unseen = [
    name for name, mask in zip(dataset.class_names, dataset.unseen, strict=True) if mask
  ]
  path = experiment.config['data']['pretrain_classes']
  outside = experiment.config['init'] or dataset.dtype != 'uint8'
  if not path:
    if outside:
      yield (
        'not checked: whether the unseen classes are among those that the weights or '
        'features were pre-trained on; name these in a file, data.pretrain_classes'
      )
    return
  known = names_of_words(path)
  both = [name for name in unseen if words_of(name) in known]
  if both:
    yield (
      f'{len(both)} of {len(unseen)} unseen classes are in {path}, so pre-training has '
      f'seen them: {", ".join(both)}'
    )


def _no_threshold(experiment: Experiment) -> Iterator[str]:
  """Warns of an open set whose threshold cannot be chosen."""
  if 'open_test' in experiment.passes and 'val' not in experiment.passes:
    yield (
      'no threshold of the open set can be chosen without validation images, so no '
      'metric that depends on one is given: set data.val_per_class'
    )


def _batch_statistics(experiment: Experiment) -> Iterator[str]:
  """Warns where batch normalisation in training sees one image at a time."""
  for name, stage in experiment.stages.items():
    state = state_shapes(stage.method, stage.streams)
    if not stage.plan.steps or not jax.tree.leaves(state.stats):
      continue
    for key, images in _normalised_together(experiment, stage).items():
      if images == 1:
        yield (
          f'stage {name!r} normalises each image by its own statistics ({key}), but '
          'in evaluation by running averages, which may give quite other accuracies: '
          "use larger batches, or model.batch_norm='frozen'"
        )


def _normalised_together(experiment: Experiment, stage: Stage) -> dict[str, int]:
  """Returns of how many images batch statistics are: what sets it -> number."""
  config = stage_config(experiment.config, stage.name)
  kind, devices = config['model']['batch_norm'], experiment.mesh.size
  if kind in ('frozen', 'recalibrate') or len(stage.trained_on) < len(stage.streams):
    return {}
  parts = config['method'].get('accumulate', 1)
  groups = {'global': 1, 'per_device': devices}.get(kind)
  groups = groups or config['batch'] // parts // int(kind)
  return {
    f'{key} {images}, batch_norm {kind!r}': images // parts // groups
    for key, images in batch_sizes(config).items()
  }


CAUTIONS = (
  _one_class,
  _untrained,
  _unused_domains,
  _same_names,
  _same_data,
  _trained_on_tests,
  _short_stages,
  _no_threshold,
  _pretrain_classes,
  _batch_statistics,
)


def check_memory(experiment: Experiment) -> None:
  """Refuses a run whose first steps need more memory than the machine has.

  By shapes alone, and only what they need at least: what passes may still be too much,
  which `lt_jax.doctor` finds out by compiling the steps.

  Raises:
    UserError: the memory of a device, or of the machine, is too small.
  """
  mesh = experiment.mesh
  device = mesh.local_devices[0]
  there = footprint.machine_memory(device) or math.inf
  # The CPU devices of a process share its memory.
  share = len(mesh.local_devices) if device.platform == 'cpu' else 1
  for name, stage in experiment.stages.items():
    for what, parts in _needs(experiment, stage).items():
      needed, largest = share * sum(parts.values()), max(parts, key=parts.get)
      if needed > there:
        raise UserError(
          f'{what} of stage {name!r} needs at least {footprint.amount(needed)}, most '
          f'of it for {largest}, and there are {footprint.amount(there)}: set batch, '
          'eval_batch or the network smaller'
        )


def _needs(experiment: Experiment, stage: Stage) -> dict[str, dict[str, float]]:
  """Returns what is done first -> part -> bytes on a device, at least."""
  devices = experiment.mesh.size
  state = state_shapes(stage.method, stage.streams)
  step = footprint.least_of_step(state, stage.streams, devices)
  stream = experiment.passes['test'].stream  # the others have batches of its shape
  evaluation = footprint.least_of_evaluation(stage.method, state, stream, devices)
  first = {'a step': step} if stage.plan.steps else {}
  return first | {'an evaluation': evaluation}
