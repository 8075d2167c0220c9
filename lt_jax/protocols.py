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


def _cifar_counts(of_a_class: int) -> dict[str, int]:
  """Returns what the source 'fake' needs to know of CIFAR."""
  return {
    'classes': 50000 // of_a_class,
    'train': 50000,
    'largest': of_a_class,
    'smallest': of_a_class,
    'val': 0,
    'test': 10000,
    'image_size': 32,
  }


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
        'fake': _cifar_counts(n_max),
        'profile': option.profile,
        'imbalance': option.imbalance,
        'pad': 4,
        'flip': True,
      },
      'model': {'trunk': option.net},
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
        'fake': _cifar_counts(500),
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
  if 'boundaries' in schedule:
    schedule.boundaries = tuple(scale * epoch for epoch in schedule.boundaries)
  if 'end' in schedule:
    schedule.end *= scale
  if 'warmup_epochs' in schedule:
    schedule.warmup_epochs = max(1, round(scale * schedule.warmup_epochs))


# Photographs: ImageNet-LT, Places-LT and iNaturalist.

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
_LAST_BLOCK = 'net/trunk/stage4_block3/.*'
_FEWER_BLOCKS = {'resnet10': 1, 'resnet18': 2}
"""Trunks whose last stage has not three blocks."""


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
    # As above, and of the trunk the last block alone, so that it must begin with
    # published weights; the authors published no config.
    'kang': Protocol(
      {
        'batch': 256,
        'optimizer': _sgd(5e-4, (_HEAD, 1.0), (_LAST_BLOCK, 0.1), ('.*', 0.0)),
        **_cosine(30, base=0.1),
      },
      None,
    ),
  },
  'inat': {
    # Cui et al., arXiv 1901.05555, and its code for TPUs: 0.1 for 256 images; neither
    # statistics' scales nor the last bias decay. Their resize is bicubic.
    'cui': Protocol(
      {
        'batch': 1024,
        'model': {'dtype': 'bfloat16'},
        'optimizer': {
          **_sgd(1e-4),
          'nesterov': True,
          'weight_decay': ((r'.*norm\d?/.*|net/head/bias', 0.0), ('.*', 1e-4)),
        },
        **_steps(
          90,
          (30, 0.1),
          (60, 0.01),
          (80, 1e-3),
          base=0.4,
          warmup='linear',
          warmup_epochs=5,
        ),
      },
      None,
    ),
    # Kang et al., arXiv 1910.09217, the shorter of their two schedules.
    'kang': Protocol(
      {'batch': 512, 'optimizer': _sgd(1e-4), **_cosine(90, base=0.2)},
      None,
    ),
  },
}
"""name -> protocol -> how it is trained."""

CUI_LARGE: dict[str, Overrides] = {
  'cb_focal': {
    'loss': {'gamma': 0.5},
    'class_weights': {'beta': 0.999},
    'schedule': {'base': 1.6},  # 0.4 for 256 images
  },
}
"""What Cui et al. change from one recipe to the next on iNaturalist."""

EPISODES: dict[str, Overrides] = {
  # As in the code of Gidaris and Komodakis, 250 of 389 base classes, 1,500 and 750
  # queries, but in numbers that eight devices divide.
  'imagenet_lt': {'novel': 248, 'queries_novel': 1488, 'queries_base': 752},
  'places_lt': {'novel': 80, 'queries_novel': 480, 'queries_base': 240},
}

CLASSIFIER_EPOCHS = {
  'imagenet_lt': {'crt': 10.0, 'crt_las': 10.0, 'lws': 5.0},
  'places_lt': {'crt': 10.0, 'crt_las': 10.0, 'lws': 5.0},
  'inat': {'crt': 30.0, 'crt_las': 30.0, 'lws': 5.0},
}
"""Of the classifier alone, whatever the first training takes; Kang et al."""

DECOUPLED = ('crt', 'crt_las', 'lws', 'tau_norm', 'ncm')
"""Recipes of Kang et al."""


def _counts(
  classes: int, train: int, largest: int, smallest: int, *, val: int, test: int = 0
) -> dict[str, int]:
  """Returns what the source 'fake' needs to know of photographs."""
  return {
    'classes': classes,
    'train': train,
    'largest': largest,
    'smallest': smallest,
    'val': val,
    'test': test,
    'image_size': 0,
  }


class Photographs(NamedTuple):
  """A data set of photographs.

  Attributes:
    source: of the images.
    net: the trunk.
    protocols: a key of `PHOTOGRAPHS`.
    fake: its counts, see `lt_jax.data.generated.sources`.
    meta: images a class of the meta set, of recipes that learn weights by it.
    data: what else its data need.
  """

  source: str
  net: str
  protocols: str
  fake: dict[str, int]
  meta: int
  data: Overrides


_INAT = {
  'mean': (0.466, 0.471, 0.380),
  'std': (0.195, 0.194, 0.192),
  'jitter': 0.0,
  'test_split': 'val',
}

DATASETS = {
  'imagenet_lt': Photographs(
    'tfds:imagenet_lt',
    'resnet10',
    'imagenet_lt',
    _counts(1000, 115846, 1280, 5, val=20000, test=50000),
    10,
    {'meta_split': 'val'},
  ),
  'places_lt': Photographs(
    'list:Places_LT',
    'resnet152',
    'places_lt',
    _counts(365, 62500, 4980, 5, val=7300, test=36500),
    10,
    {'meta_split': 'val'},
  ),
  'inat18': Photographs(
    'tfds:i_naturalist2018',
    'resnet50',
    'inat',
    _counts(8142, 437513, 1000, 2, val=24426),
    2,
    _INAT,
  ),
  'inat17': Photographs(
    'tfds:i_naturalist2017',
    'resnet50',
    'inat',
    _counts(5089, 579184, 3919, 9, val=95986),
    5,
    _INAT,
  ),
}


LEARNING_WEIGHTS = ('l2rw', 'mwn', 'meta_ce', 'meta_focal', 'meta_ldam')
META_CONTROLS = ('meta_ce_control', 'cb_finetune', 'ce_plus_meta')


def _meta_set(recipe: str, dataset: Photographs) -> Overrides:
  """Returns the meta set of a recipe, as Jamal et al. are reported to have taken it.

  Of the validation images where there are any; else of the training images, where they
  stay. Without validation images tau is chosen on one image a class, which is not
  trained on.
  """
  kept = dataset.data.get('meta_split', 'train') == 'train'
  if recipe in LEARNING_WEIGHTS + META_CONTROLS:
    return {'meta_per_class': dataset.meta, 'meta_in_train': kept}
  return {'meta_per_class': 1} if kept and recipe == 'tau_norm' else {}


def photographs_lt(arg: str | None, *, name: str, recipe: str = 'ce') -> ConfigDict:
  """Returns the config of a long tail of photographs; configs/ has the options.

  Args:
    arg: what follows the colon of --config.
    name: of the config, a key of `DATASETS`.
    recipe: the default.
  """
  dataset = DATASETS[name]
  recipe, option = parse_arg(arg, recipe, protocol='', epochs=0.0, net=dataset.net)
  protocols = PHOTOGRAPHS[dataset.protocols]
  chosen = option.protocol or ('kang' if recipe in DECOUPLED else next(iter(protocols)))
  first, second = lookup(protocols, 'protocol', chosen)
  config = apply(
    base_config(),
    {
      'name': name,
      'data': {
        'source': dataset.source,
        **_PHOTOGRAPHS,
        **dataset.data,
        **_meta_set(recipe, dataset),
        'fake': dataset.fake,
      },
      'model': {'trunk': option.net, 'batch_norm': 'per_device'},
      'eval_batch': 256,
      'save_every_epochs': 1.0,
      'evaluate_every_epochs': 1.0,
      'select': 'last' if dataset.data.get('test_split') == 'val' else 'val/accuracy',
    },
  )
  apply(config, first)
  optimizer, last = config.optimizer, f'block{_FEWER_BLOCKS.get(option.net, 3)}'
  optimizer.learning_rate_scale = tuple(
    (pattern.replace('block3', last), scale)
    for pattern, scale in optimizer.learning_rate_scale
  )
  config.defer_epoch = config.get_ref('epochs') * (2 / 3)
  scale = (option.epochs or config.epochs) / config.epochs
  rescale(config, scale)
  apply_recipe(config, recipe)
  if chosen == 'cui':
    apply(config, CUI_LARGE.get(recipe, {}))
  stages = config.stages
  if 'generator' in stages:
    stages.generator.epochs = 6.0 * scale
    tasks = lookup(EPISODES, 'data set with few-shot tasks', name)
    stages.generator.stream.update(tasks, per_epoch=4000)
  if 'meta' in stages and 'method' in stages.meta:
    # As in the code of Li et al. (MetaSAug, CVPR 2021), who repeat Jamal et al.
    stages.meta.method.meta_layers = 'head'
  if 'classifier' in stages:
    epochs = CLASSIFIER_EPOCHS[dataset.protocols][recipe] * scale
    apply(stages.classifier, {'epochs': epochs, 'schedule': {'end': epochs}})
  for stage in {'memory', 'aware'} & set(stages):
    if second is None:
      raise UserError(f'protocol {chosen!r} of {name} has no second training: {recipe}')
    apply(stages[stage], second)
    rescale(stages[stage], scale)
  return open_stages(config)
