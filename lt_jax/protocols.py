"""Protocols: the data treatment, optimiser and schedule that papers share.

A configuration file names a data set; a protocol says how it is trained on, and a
recipe (`lt_jax.recipes`) what is learned.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lt_jax.errors import UserError, lookup
from lt_jax.recipes import (
  Overrides,
  apply,
  apply_recipe,
  base_config,
  open_stages,
  parse_arg,
)

_CAO_DATA = {'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2023, 0.1994, 0.2010)}
_MWN_DATA = {
  'mean': (125.3 / 255, 123.0 / 255, 113.9 / 255),
  'std': (63.0 / 255, 62.1 / 255, 66.7 / 255),
  'pad_mode': 'reflect',
}
_CAO_MODEL = {'trunk_options': {'shortcut': 'subsample', 'init': 'kaiming'}}
_NESTEROV = {'momentum': 0.9, 'nesterov': True, 'weight_decay': (('.*', 5e-4),)}


def _steps(epochs: float, *drops: tuple[float, float], **schedule: Any) -> Overrides:
  """A step schedule of so many epochs; drops are (epoch, factor of the base)."""
  return {
    'epochs': float(epochs),
    'schedule': {
      'name': 'step_decay',
      'base': 0.1,
      'boundaries': tuple(epoch for epoch, _ in drops),
      'factors': tuple(factor for _, factor in drops),
      **schedule,
    },
  }


def _cosine(epochs: float, *, base: float) -> Overrides:
  """A cosine over so many epochs, to zero."""
  schedule = {'name': 'cosine', 'base': base, 'end': float(epochs)}
  return {'epochs': float(epochs), 'schedule': schedule}


PROTOCOLS: dict[str, Overrides] = {
  # Cao et al., arXiv 1906.07413, and its code: warm-up in stairs, option A shortcuts.
  'cao': {
    'data': _CAO_DATA,
    'model': _CAO_MODEL,
    **_steps(200, (160, 1e-2), (180, 1e-4), warmup='staircase', warmup_epochs=5),
  },
  # Cui et al., arXiv 1901.05555, and its code: x / 128 - 1, average-pool shortcuts.
  'cui': {
    'data': {'mean': (128 / 255,), 'std': (128 / 255,)},
    'model': {
      'trunk_options': {'shortcut': 'average', 'init': 'glorot'},
      'head_options': {'init': 'glorot'},
    },
    **_steps(200, (160, 1e-2), (180, 1e-4), warmup='linear', warmup_epochs=5),
  },
  # Ren et al., arXiv 1803.09050, and its code: 80,000 steps of 100 images of 50,000.
  'ren': {
    'data': {**_CAO_DATA, 'meta_per_class': 10},
    'model': _CAO_MODEL,
    'batch': 100,
    **_steps(160, (80, 0.1), (120, 0.01)),
  },
  # Shu et al., arXiv 1902.07379, and its code for class imbalance, which counts epochs
  # from 1: its drops at 80 and 90 act from the 79th and 89th on, counted from 0.
  'shu': {
    'data': {**_MWN_DATA, 'meta_per_class': 10},
    'model': _CAO_MODEL,
    'batch': 100,
    'optimizer': _NESTEROV,
    **_steps(100, (79, 0.1), (89, 0.01)),
  },
  # Jamal et al., arXiv 2003.10780, and its code: no warm-up; the rate drops an epoch
  # before the meta stage begins, as that code counts epochs from 1 for the one only.
  'jamal': {
    'data': {**_MWN_DATA, 'meta_per_class': 10},
    'model': _CAO_MODEL,
    'batch': 100,
    'optimizer': _NESTEROV,
    **_steps(200, (159, 1e-2), (179, 1e-4)),
  },
}

PROTOCOL_OF = {
  'cb_ce': 'cui',
  'cb_sigmoid': 'cui',
  'cb_focal': 'cui',
  'l2rw': 'ren',
  'mwn': 'shu',
  'meta_ce': 'jamal',
  'meta_focal': 'jamal',
  'meta_ldam': 'jamal',
  'meta_ce_control': 'jamal',
  'cb_finetune': 'jamal',
  'ce_plus_meta': 'jamal',
}
"""The protocol of a recipe's own paper, where that is not Cao et al."""


def cifar_lt(arg: str | None, *, name: str, source: str, n_max: int) -> ConfigDict:
  """Returns the config of long-tailed CIFAR; the options are in configs/cifar10_lt.py.

  Args:
    arg: what follows the colon of --config.
    name: of the config.
    source: of the images.
    n_max: images of the largest class, before a meta set is taken out.
  """
  recipe, option = parse_arg(
    arg,
    'ce',
    imbalance=100.0,
    profile='exponential',
    protocol='',
    epochs=0.0,
    net='resnet32',
    meta=-1,
  )
  chosen = option.protocol or PROTOCOL_OF.get(recipe, 'cao')
  protocol = lookup(PROTOCOLS, 'protocol', chosen)
  config = apply(
    base_config(),
    {
      'name': name,
      'data': {
        'source': source,
        'profile': option.profile,
        'imbalance': option.imbalance,
        'pad': 4,
        'flip': True,
      },
      'model': {'trunk': option.net},
      'defer_epoch': 160.0,
    },
  )
  apply(config, protocol)
  data = config.data
  if option.meta >= 0:
    data.meta_per_class = option.meta
  elif recipe == 'tau_norm':  # there are no validation images to choose tau by
    data.meta_per_class = 10
  data.n_max = n_max - data.meta_per_class
  rescale(config, (option.epochs or config.epochs) / config.epochs)
  return open_stages(apply_recipe(config, recipe))


def cifar100_open(arg: str | None) -> ConfigDict:
  """Returns the config of CIFAR-100 with open classes; configs/cifar100_open.py.

  Args:
    arg: what follows the colon of --config.
  """
  recipe, option = parse_arg(
    arg, 'oltr', imbalance=100.0, known=80, epochs=0.0, net='resnet32'
  )
  config = apply(
    base_config(),
    {
      'name': 'cifar100_open',
      'data': {
        'source': 'tfds:cifar100',
        'known_classes': option.known,
        'profile': 'exponential',
        'n_max': 490,
        'imbalance': option.imbalance,
        'val_per_class': 10,
        'open_val_per_class': 10,
        'pad': 4,
        'flip': True,
      },
      'model': {'trunk': option.net},
      'select': 'val/accuracy',
    },
  )
  apply(config, PROTOCOLS['cao'])
  rescale(config, (option.epochs or config.epochs) / config.epochs)
  return open_stages(apply_recipe(config, recipe))


def rescale(config: ConfigDict, scale: float) -> None:
  """Multiplies everything that is counted in epochs; the warm-up stays whole epochs.

  Args:
    config: of a run, or of a stage.
    scale: what by.
  """
  schedule = config.schedule
  config.epochs *= scale
  if 'defer_epoch' in config:
    config.defer_epoch *= scale
  if 'boundaries' in schedule:
    schedule.boundaries = tuple(scale * epoch for epoch in schedule.boundaries)
  if 'end' in schedule:
    schedule.end *= scale
  if 'warmup_epochs' in schedule:
    schedule.warmup_epochs = max(1, round(scale * schedule.warmup_epochs))


# ImageNet-LT and Places-LT.

_PHOTOGRAPHS = {
  'workers': -1,
  'image_size': 224,
  'resize': 256,
  'flip': True,
  'jitter': 0.4,
  'mean': (0.485, 0.456, 0.406),
  'std': (0.229, 0.224, 0.225),
}
_HEAD = 'net/head/.*'


def _sgd(weight_decay: float, *rates: tuple[str, float]) -> Overrides:
  """SGD with one decay for all parameters, and learning rates by rule."""
  return {
    'name': 'sgd',
    'momentum': 0.9,
    'weight_decay': (('.*', weight_decay),),
    'learning_rate_scale': rates or (('.*', 1.0),),
  }


class Protocol(NamedTuple):
  """How photographs are trained on.

  Attributes:
    first: of the first training.
    second: of a second training on class-aware batches; None: it was never tried.
  """

  first: Overrides
  second: Overrides | None


PHOTOGRAPHS: dict[str, dict[str, Protocol]] = {
  'imagenet_lt': {
    # Liu et al., arXiv 1904.05160: the last configuration in the authors' repository.
    'liu': Protocol(
      {'batch': 128, 'optimizer': _sgd(5e-4), **_steps(30, (10, 0.1), (20, 0.01))},
      _steps(60, (20, 0.1), (40, 0.01)),
    ),
    # Kang et al., arXiv 1910.09217. Their cosine falls epoch by epoch, ours by step.
    'kang': Protocol(
      {'batch': 512, 'optimizer': _sgd(5e-4), **_cosine(90, base=0.2)},
      None,
    ),
  },
  'places_lt': {
    # As above; the second stage leaves all but attention, projection and head alone.
    'liu': Protocol(
      {
        'batch': 128,
        'model': {'projection': 512},
        'optimizer': _sgd(5e-4, (_HEAD, 1.0), ('.*', 0.01)),
        **_steps(30, (10, 0.1), (20, 0.01)),
      },
      {
        'optimizer': {
          'learning_rate_scale': (
            (f'{_HEAD}|centroids', 1.0),
            ('net/(attention|projection)/.*', 0.01),
            ('.*', 0.0),
          )
        },
        **_steps(30, (10, 0.1), (20, 0.01), base=0.01),
      },
    ),
    # As above, and of the trunk the last block alone; the authors published no config.
    'kang': Protocol(
      {
        'batch': 256,
        'optimizer': _sgd(
          5e-4, (_HEAD, 1.0), ('net/trunk/stage4_block3/.*', 0.1), ('.*', 0.0)
        ),
        **_cosine(30, base=0.1),
      },
      None,
    ),
  },
}

EPISODES: dict[str, Overrides] = {
  # As in the code of Gidaris and Komodakis, 250 of 389 base classes, 1,500 and 750
  # queries, but in numbers that eight devices divide.
  'imagenet_lt': {'novel': 248, 'queries_novel': 1488, 'queries_base': 752},
  'places_lt': {'novel': 80, 'queries_novel': 480, 'queries_base': 240},
}

CLASSIFIER_EPOCHS = {'crt': 10.0, 'crt_las': 10.0, 'lws': 5.0}
"""Of the classifier alone, whatever the first training takes; Kang et al."""

DECOUPLED = ('crt', 'crt_las', 'lws', 'tau_norm', 'ncm')
"""Recipes of Kang et al."""


def photographs_lt(arg: str | None, *, name: str, source: str, net: str) -> ConfigDict:
  """Returns the config of ImageNet-LT or Places-LT; configs/imagenet_lt.py has options.

  Args:
    arg: what follows the colon of --config.
    name: of the config, a key of `PHOTOGRAPHS`.
    source: of the images.
    net: the trunk.
  """
  recipe, option = parse_arg(arg, 'oltr', protocol='', epochs=0.0, net=net)
  chosen = option.protocol or ('kang' if recipe in DECOUPLED else 'liu')
  first, second = lookup(PHOTOGRAPHS[name], 'protocol', chosen)
  config = apply(
    base_config(),
    {
      'name': name,
      'data': {'source': source, **_PHOTOGRAPHS},
      'model': {'trunk': option.net, 'batch_norm': 'per_device'},
      'eval_batch': 256,
      'save_every_epochs': 1.0,
      'evaluate_every_epochs': 1.0,
      'select': 'val/accuracy',
    },
  )
  apply(config, first)
  config.defer_epoch = 2 / 3 * config.epochs
  scale = (option.epochs or config.epochs) / config.epochs
  rescale(config, scale)
  apply_recipe(config, recipe)
  stages = config.stages
  if 'generator' in stages:
    stages.generator.epochs = 6.0 * scale
    stages.generator.stream.update(EPISODES[name], per_epoch=4000)
  if 'classifier' in stages:
    epochs = CLASSIFIER_EPOCHS[recipe] * scale
    apply(stages.classifier, {'epochs': epochs, 'schedule': {'end': epochs}})
  for stage in {'memory', 'aware'} & set(stages):
    if second is None:
      raise UserError(f'protocol {chosen!r} of {name} has no second training: {recipe}')
    apply(stages[stage], second)
    rescale(stages[stage], scale)
  return open_stages(config)
