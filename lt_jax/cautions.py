"""Warnings that the numbers of a run may mean less than they seem to.

The banner of a run and `lt_jax.doctor` print them, and `result.json` keeps them. To add
one, write a function (Experiment) -> lines and add it to `CAUTIONS`.
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
"""Surgeries that fit a classifier, so that even a stage without steps trains."""


def cautions(experiment: Experiment) -> list[str]:
  """Returns what makes the numbers of a run mean less than they seem to."""
  return [line for caution in CAUTIONS for line in caution(experiment)]


def _one_class(experiment: Experiment) -> Iterator[str]:
  """Warns if there is only one class."""
  if len(experiment.dataset.class_names) == 1:
    yield 'there is only one class, so every accuracy is 100 % whatever is learned'


def _untrained(experiment: Experiment) -> Iterator[str]:
  """Warns if the last stage has learned nothing and inherited nothing."""
  trained = bool(experiment.config['init'])
  for number, stage in enumerate(experiment.stages.values()):
    surgeries = stage_config(experiment.config, stage.name)['surgeries']
    fits = any(name in FITS for name, _ in surgeries)
    # Surgeries of a first stage have nothing to inherit, so they must fit something.
    fits |= bool(stage.surgeries) and (trained or not number)
    trained = bool(stage.plan.steps) or fits
  if not trained:
    yield (
      f'the result is of an untrained network: stage {stage.name!r} takes no steps '
      '(see epochs) and inherits nothing from another stage'
    )


def _unused_domains(experiment: Experiment) -> Iterator[str]:
  """Warns of domains that are not used."""
  for name in experiment.config['domains']:
    if name not in experiment.domains:
      yield unused(name)


def _several_classes(experiment: Experiment) -> Iterator[str]:
  """Warns where of several classes an image one alone is measured."""
  for stage in experiment.stages.values():
    test = stage.dataset.tests.get('test')
    known = {*stage.task.reads, *experiment.config['heads']}
    if test is not None and 'classes' in test.numbers() and 'classes' not in known:
      yield (
        f'stage {stage.name!r}: images have several classes, of which its task knows '
        "only the rarest: set task to 'multilabel'"
      )


def _same_names(experiment: Experiment) -> Iterator[str]:
  """Warns of classes with the same name in several sources that count as different."""
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
      f'{" and ".join(sources)} each have a class {name!r}, and these count as '
      f'different classes ({len(twice)} such names): if they are the same, list them '
      'in same_classes of each source'
    )


def _trained_on_tests(experiment: Experiment) -> Iterator[str]:
  """Warns of test images that are also trained on, judging by their position."""
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


def _unmeasured_target(experiment: Experiment) -> Iterator[str]:
  """Warns that accuracy is measured on the source, and by whose statistics."""
  names = experiment.roles[TARGET]
  if not names or any(experiment.domains[name].tests for name in names):
    return
  stage = experiment.last
  state = state_shapes(stage.method, stage.streams)
  as_source = any(n.endswith('_source') for n in (*state.stats, *state.memory))
  yield (
    f'the target ({" and ".join(names)}) has no labelled test images, so '
    f"'test' measures images of {stage.domain!r} instead"
    + ', with statistics of its own that predictions do not use'
    * as_source
  )


def _shares_images(experiment: Experiment) -> Iterator[str]:
  """Warns of labelled domains with images of a target."""
  for name, number in experiment.sharing.items():
    yield (
      f'domain {name!r}, whose labels are learned, has {number:,} images of a target, '
      'so the result says uses_target_labels'
    )


def _begins_with_target_labels(experiment: Experiment) -> Iterator[str]:
  """Warns of initial weights that have learned labels of a target."""
  if experiment.begins_with_target_labels:
    yield (
      f'the initial weights {experiment.config["init"]} were trained with labels of a '
      'target, so the result says uses_target_labels'
    )


def _same_data(experiment: Experiment) -> Iterator[str]:
  """Warns of two domains with identical images."""
  prints: dict[str, str] = {}
  for name, dataset in experiment.domains.items():
    if dataset.fingerprint and dataset.fingerprint in prints:
      first = prints[dataset.fingerprint]
      yield f'domains {first!r} and {name!r} have the same images'
    prints.setdefault(dataset.fingerprint, name)


FEW_STEPS = 50
"""Fewer steps are too few for a classifier that a later stage trains from scratch."""


def _short_stages(experiment: Experiment) -> Iterator[str]:
  """Warns if a later stage trains for very few steps."""
  for name, stage in experiment.stages.items():
    steps = stage.plan.steps
    taken = stage_config(experiment.config, name)['surgeries']
    if taken and 0 < steps < FEW_STEPS:
      number = '1 step' if steps == 1 else f'{steps} steps'
      yield (
        f'stage {name!r} trains for only {number}, too few for a classifier trained '
        f'from scratch: raise config.stages.{name}.epochs'
      )


def _pretrain_classes(experiment: Experiment) -> Iterator[str]:
  """Warns of unseen classes that pre-trained weights or features may have seen."""
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
        'features were pre-trained on; list these in a file, data.pretrain_classes'
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
  """Warns if there is an open set but its threshold cannot be chosen."""
  if 'open_test' in experiment.passes and 'val' not in experiment.passes:
    yield (
      'no threshold of the open set can be chosen without validation images, so '
      'metrics that need one are left out: set data.val_per_class'
    )


def _batch_statistics(experiment: Experiment) -> Iterator[str]:
  """Warns if batch normalisation in training sees one image at a time."""
  for name, stage in experiment.stages.items():
    state = state_shapes(stage.method, stage.streams)
    if not stage.plan.steps or not jax.tree.leaves(state.stats):
      continue
    for key, images in _normalised_together(experiment, stage).items():
      if images == 1:
        yield (
          f'stage {name!r} normalises each image by its own statistics ({key}), but '
          'in evaluation by running averages, so accuracies may be very different: '
          "use larger batches, or model.batch_norm='frozen'"
        )


def _normalised_together(experiment: Experiment, stage: Stage) -> dict[str, int]:
  """Returns setting -> number of images that share batch statistics."""
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
  _several_classes,
  _unmeasured_target,
  _shares_images,
  _begins_with_target_labels,
  _same_data,
  _trained_on_tests,
  _short_stages,
  _no_threshold,
  _pretrain_classes,
  _batch_statistics,
)


def check_memory(experiment: Experiment) -> None:
  """Refuses a run whose first steps need more memory than the machine has.

  This counts, from shapes alone, only the least that they need. A run that passes may
  still need too much; `lt_jax.doctor` finds out by compiling the steps.

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
          f'of it for {largest}, but there are {footprint.amount(there)}: '
          'reduce batch, eval_batch or the network'
        )


def _needs(experiment: Experiment, stage: Stage) -> dict[str, dict[str, float]]:
  """Returns what runs first -> part -> the least bytes per device."""
  devices = experiment.mesh.size
  state = state_shapes(stage.method, stage.streams)
  step = footprint.least_of_step(state, stage.streams, devices)
  stream = experiment.passes['test'].stream  # the others have batches of its shape
  evaluation = footprint.least_of_evaluation(stage.method, state, stream, devices)
  first = {'a step': step} if stage.plan.steps else {}
  return first | {'an evaluation': evaluation}
