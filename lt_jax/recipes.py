"""What configurations share: every key with its default, and a recipe a method name.

A configuration file states its data set and protocol on top of `base_config`, then
applies the recipe that its argument names:

  --config=configs/cifar10_lt.py:ldam_drw,imbalance=50

Durations are in epochs of the training sampler; `lt_jax.build` turns them into steps.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from lt_jax.errors import UserError, lookup, suggest

Overrides = dict[str, Any]


def base_config() -> ConfigDict:
  """Returns every key there is, with the default most papers share.

  A stage is a set of overrides of the top level, from `loss` to `surgeries`.
  """
  return ConfigDict(
    {
      'name': '',
      'recipe': '',
      'seed': 0,  # initialisation, order and augmentation
      'device': 'any',  # 'gpu' and 'tpu' refuse a machine without one
      'data': {
        'source': 'digits',
        'dir': '',  # of TFDS; its own default if empty
        'seed': 0,  # splits and subset, the same in all runs of a table
        'subset': 'seeded',  # 'stored': the first images of each class
        'known_classes': 0,  # classes from this one on are open; 0: all are known
        'profile': 'original',
        'n_max': 0,
        'imbalance': 1.0,
        'test_per_class': 0,  # 0: the source has a test split
        'val_per_class': 0,
        'meta_per_class': 0,
        'meta_in_train': False,  # True: the meta images are trained on too
        'open_val_per_class': 0,
        'open_test_per_class': 0,
        'many_shot': 100,
        'few_shot': 20,
        'mean': (0.0,),
        'std': (1.0,),
        'pad': 0,  # pixels, for the random crop
        'pad_mode': 'zero',
        'flip': False,
      },
      'batch': 128,
      'meta_batch': 0,  # images a step of the meta set; 0: no such stream
      'meta_every': 1,  # steps from one meta batch to the next
      'train_split': 'train',  # 'meta' trains on the balanced set itself
      'eval_batch': 512,
      'epochs': 200.0,
      'log_every_steps': 50,
      'save_every_epochs': 10.0,
      'evaluate_every_epochs': 10.0,
      'keep_checkpoints': 3,
      'method': {'name': 'supervised', 'accumulate': 1},
      'model': {
        'trunk': 'resnet32',
        'trunk_options': {},
        'head': 'linear',
        'head_options': {},
        'dtype': 'float32',
        'batch_norm': 'global',  # 'per_device', 'frozen', or the size of a ghost batch
      },
      'loss': {'name': 'cross_entropy'},
      'class_weights': {'name': 'uniform', 'start_epoch': 0.0},
      'reduction': 'mean',
      'sampler': {'name': 'instance', 'start_epoch': 0.0},  # instance sampling before
      'optimizer': {'name': 'sgd', 'momentum': 0.9, 'weight_decay': (('.*', 2e-4),)},
      'schedule': {'name': 'constant', 'base': 0.1},
      'wrappers': {},
      'surgeries': (),
      'select': 'last',  # or 'val/accuracy': the best State by a metric on val
      'defer_epoch': 160.0,  # where deferred recipes switch
      'stages': {'train': {}},
      'stage_order': ('train',),
    }
  )


def parse_arg(arg: str | None, recipe: str, **defaults: Any) -> tuple[str, ConfigDict]:
  """Parses the argument of a configuration file: 'ldam_drw,imbalance=50'.

  Args:
    arg: what follows the colon: a recipe, options, or both; None for all defaults.
    recipe: the default recipe.
    **defaults: the options, which give the types.

  Returns:
    (recipe, options).

  Raises:
    UserError: an unknown recipe or option, or a value of another type.
  """
  options = dict(defaults)
  for part in filter(None, (arg or '').split(',')):
    name, equals, text = part.partition('=')
    if not equals:
      recipe = name
    elif name not in defaults:
      raise UserError(f'unknown option {name!r} of the config{suggest(name, defaults)}')
    else:
      kind = type(defaults[name])
      try:
        options[name] = kind(text)
      except ValueError:
        raise UserError(
          f'option {name}={text!r} of the config is no {kind.__name__}'
        ) from None
  lookup(RECIPES, 'method', recipe)
  return recipe, ConfigDict(options)


def apply(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
  """Sets keys of a config, dicts key by key.

  What replaces the value before it whole: a dict with a 'name', whose other keys are
  that name's options, and a `ConfigDict`.
  """
  for key, value in overrides.items():
    old = config.get(key)
    if isinstance(value, dict) and 'name' not in value and old:
      apply(old, value)
    else:
      config[key] = ConfigDict(value) if isinstance(value, dict) else value
  return config


def apply_recipe(config: ConfigDict, recipe: str) -> ConfigDict:
  """Applies a recipe by its name and returns the config."""
  config.recipe = recipe
  return apply(config, lookup(RECIPES, 'method', recipe)(config))


# The parts that recipes are made of.

BETA = 0.9999


def _effective(start_epoch: float = 0.0) -> Overrides:
  return {'name': 'effective_number', 'beta': BETA, 'start_epoch': start_epoch}


def _resample(start_epoch: float = 0.0) -> Overrides:
  return {'name': 'effective_number', 'beta': BETA, 'start_epoch': start_epoch}


def _drw(config: ConfigDict) -> Overrides:
  """Deferred re-weighting: the batch mean is weight-normalised, as in its code."""
  return {
    'class_weights': _effective(config.get_ref('defer_epoch')),
    'reduction': 'weight_normalised',
  }


def _sigmoid(loss: Overrides) -> Overrides:
  """Sigmoid losses: the prior as the first bias, and no decay on it."""
  return {
    'loss': loss,
    'class_weights': _effective(),
    'model': {'head_options': {'prior_bias': True}},
    'optimizer': {'weight_decay': (('net/head/bias', 0.0), ('.*', 2e-4))},
  }


def _margin(name: str) -> Overrides:
  """A margin loss on cosines; head and loss share one scale."""
  loss = ConfigDict({'name': name, 'scale': 30.0})
  loss['margin' if name == 'uniform_margin' else 'max_margin'] = 0.5
  head = ConfigDict({'scale': loss.get_ref('scale')})
  return {'loss': loss, 'model': {'head': 'cosine', 'head_options': head}}


def _posthoc(config: ConfigDict) -> Overrides:
  """Cross-entropy, then a stage of no steps that adjusts the logits."""
  del config
  return {
    'stages': {
      'train': {},
      'posthoc': {
        'epochs': 0.0,
        'wrappers': {'adjust_logits': {'tau': 1.0}},
        'surgeries': (('copy', {'pattern': '.*', 'stage': 'train'}),),
      },
    },
    'stage_order': ('train', 'posthoc'),
  }


META = {
  'route': 'jvp',
  'virtual': 'sgd',
  'meta_layers': 'all',
  'low_memory': False,
}
"""Options of every method that learns weights."""


def _l2rw(config: ConfigDict) -> Overrides:
  return {'method': {'name': 'l2rw', **META}, 'meta_batch': config.batch}


def _mwn(config: ConfigDict) -> Overrides:
  method = {
    'name': 'meta_weight_net',
    'normalise': True,
    'detach': False,
    'hidden': 100,
    'weight_learning_rate': 1e-5,
    'weight_optimizer': {
      'name': 'sgd',
      'momentum': 0.9,
      'nesterov': True,
      'weight_decay': (('.*', 5e-4),),
    },
    **META,
  }
  return {'method': method, 'meta_batch': config.batch}


def _two_stages(config: ConfigDict, second: Overrides) -> Overrides:
  """Training without weights up to `defer_epoch`; then the same run, changed."""
  goes_on = (
    ('copy', {'pattern': '.*', 'stage': 'pretrain'}),
    ('carry', {'fields': ('opt', 'step'), 'stage': 'pretrain'}),
  )
  return {
    'stages': {
      'pretrain': {'epochs': config.get_ref('defer_epoch')},
      'meta': {'class_weights': _effective(), 'surgeries': goes_on, **second},
    },
    'stage_order': ('pretrain', 'meta'),
  }


def _jamal(config: ConfigDict) -> Overrides:
  """Meta class-weights (Jamal et al.): pre-training, then learned weights."""
  method = {
    'name': 'meta_reweight',
    'eps_lr': 0.01,
    'eps_scale': 'absolute',
    'form': 'additive',
    **META,
  }
  second = {'method': method, 'meta_batch': config.batch}
  return _two_stages(config, second)


def _finetune(config: ConfigDict) -> Overrides:
  """Cross-entropy, then a short training on the balanced meta set alone."""
  rate = config.schedule.get_ref('base') * 0.01
  second = {
    'train_split': 'meta',
    'epochs': 100.0,
    'schedule': {'name': 'constant', 'base': rate},
    'surgeries': (('copy', {'pattern': '.*', 'stage': 'train'}),),
  }
  return {
    'stages': {'train': {}, 'finetune': second},
    'stage_order': ('train', 'finetune'),
  }


RECIPES: dict[str, Callable[[ConfigDict], Overrides]] = {
  'ce': lambda config: {},
  'focal': lambda config: {'loss': {'name': 'softmax_focal', 'gamma': 1.0}},
  'cb_ce': lambda config: {'class_weights': _effective()},
  'cb_sigmoid': lambda config: _sigmoid({'name': 'sigmoid_cross_entropy'}),
  'cb_focal': lambda config: _sigmoid({'name': 'sigmoid_focal', 'gamma': 1.0}),
  'ce_drw': _drw,
  'ce_drs': lambda config: {'sampler': _resample(config.get_ref('defer_epoch'))},
  'resample_cb': lambda config: {'sampler': _resample()},
  'resample_sqrt': lambda config: {
    'sampler': {'name': 'square_root', 'start_epoch': 0.0}
  },
  'resample_progressive': lambda config: {
    'sampler': {'name': 'progressive', 'start_epoch': 0.0}
  },
  'ldam': lambda config: _margin('ldam'),
  'ldam_drw': lambda config: _margin('ldam') | _drw(config),
  'margin_drw': lambda config: _margin('uniform_margin') | _drw(config),
  'balanced_softmax': lambda config: {'loss': {'name': 'balanced_softmax'}},
  'logit_adjust': lambda config: {'loss': {'name': 'logit_adjustment', 'tau': 1.0}},
  'logit_adjust_posthoc': _posthoc,
  'l2rw': _l2rw,
  'mwn': _mwn,
  'meta_ce': _jamal,
  'meta_focal': lambda config: {
    'loss': {'name': 'softmax_focal', 'gamma': 1.0},
    **_jamal(config),
  },
  'meta_ldam': lambda config: _margin('ldam') | _jamal(config),
  'meta_ce_control': lambda config: _two_stages(config, {}),
  'cb_finetune': _finetune,
  'ce_plus_meta': lambda config: {'data': {'meta_in_train': True}},
}


# Long-tailed CIFAR, which two configuration files share.

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
    'epochs': epochs,
    'schedule': {
      'name': 'step_decay',
      'base': 0.1,
      'boundaries': tuple(epoch for epoch, _ in drops),
      'factors': tuple(factor for _, factor in drops),
      **schedule,
    },
  }


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
  data.n_max = n_max - data.meta_per_class
  _rescale(config, (option.epochs or config.epochs) / config.epochs)
  return apply_recipe(config, recipe)


def _rescale(config: ConfigDict, scale: float) -> None:
  """Multiplies everything that is counted in epochs; the warm-up stays whole epochs."""
  schedule = config.schedule
  config.epochs *= scale
  config.defer_epoch *= scale
  schedule.boundaries = tuple(scale * epoch for epoch in schedule.boundaries)
  if 'warmup_epochs' in schedule:
    schedule.warmup_epochs = max(1, round(scale * schedule.warmup_epochs))
