"""What configurations share: every key with its default, and a recipe a method name.

A configuration file states its data set and protocol on top of `base_config`, then
applies the recipe that its argument names:

  --config=configs/cifar10_lt.py:ldam_drw,imbalance=50

Durations are in epochs of the training sampler; `lt_jax.build` turns them into steps.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference

from lt_jax.errors import UserError, lookup, suggest

Overrides = dict[str, Any]

STAGE_KEYS = (
  'batch',
  'meta_batch',
  'meta_every',
  'train_split',
  'classes',
  'stream',
  'leaves',
  'epochs',
  'log_every_steps',
  'save_every_epochs',
  'evaluate_every_epochs',
  'method',
  'model',
  'loss',
  'penalty',
  'class_weights',
  'reduction',
  'sampler',
  'optimizer',
  'schedule',
  'wrappers',
  'surgeries',
  'select',
)
"""Keys that a stage can set; the others are of the whole run."""


def base_config() -> ConfigDict:
  """Returns every key there is, with the default most papers share.

  A stage is a set of overrides of the top level, from `loss` to `surgeries`.
  """
  config = ConfigDict(
    {
      'name': '',
      'recipe': '',
      'seed': 0,  # initialisation, order and augmentation
      'device': 'any',  # 'gpu' and 'tpu' refuse a machine without one
      'init': '',  # weights the trunk begins with: OWNER/MODEL or FILE.safetensors
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
        'jitter': 0.0,  # of brightness, contrast and saturation
        'test_split': 'test',
        'meta_split': 'train',  # 'val': meta images are taken from those for validation
        'fake': {  # what source=fake generates
          'classes': 10,
          'train': 1000,
          'largest': 100,
          'smallest': 100,
          'val': 0,
          'test': 100,
          'open': 0,
          'image_size': 8,  # 0: photographs of many sizes
        },
        'image_size': 0,  # of random crops, where images have many sizes
        'resize': 0,  # short side before the central crop in evaluation
        'on_bad_image': 'raise',  # 'skip': another image of its class stands in
        'workers': 0,  # processes that decode images; -1: one a core, 0: threads
      },
      'batch': 128,
      'meta_batch': 0,  # images a step of the meta set; 0: no such stream
      'meta_every': 1,  # steps from one meta batch to the next
      'train_split': 'train',  # 'meta' trains on the balanced set itself
      'stream': {'name': 'images'},
      'classes': (),  # shot groups whose classes are learned; none: all classes are
      'leaves': (),  # outputs of all training images for later stages
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
        'attention': False,
        'projection': 0,  # size of a linear layer and ReLU; -1: as many as before
        'head': 'linear',
        'head_options': {},
        'dtype': 'float32',
        'batch_norm': 'global',  # 'per_device', 'frozen', or the size of a ghost batch
      },
      'loss': {'name': 'cross_entropy'},
      'penalty': {'name': 'none', 'weight': 0.0},  # what exists only over a whole batch
      'class_weights': {'name': 'uniform', 'start_epoch': 0.0},
      'reduction': 'mean',
      'sampler': {'name': 'instance', 'start_epoch': 0.0},  # instance sampling before
      'optimizer': {'name': 'sgd', 'momentum': 0.9, 'weight_decay': (('.*', 2e-4),)},
      'schedule': {'name': 'constant', 'base': 0.1},
      'wrappers': {},
      'surgeries': (),
      'select': 'last',  # or 'val/accuracy': the best State by a metric on val
      'stages': {'train': {}},
      'stage_order': ('train',),
    }
  )
  # Where deferred recipes switch; Cao et al.: at 160 of 200.
  config.defer_epoch = config.get_ref('epochs') * 0.8
  return config


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


class _Following(FieldReference):
  """The value of a key of the top level, until it is set itself."""

  def __init__(self, followed: FieldReference):
    super().__init__(followed)
    self.is_set = False

  def set(self, value: Any, type_safe: bool = True) -> None:
    """Sets the value, and stops following."""
    super().set(value, type_safe)
    self.is_set = True


def open_stages(config: ConfigDict) -> ConfigDict:
  """Lets every key of every stage be set; until then it follows the top level."""

  def follow(stage: ConfigDict, base: ConfigDict, keys: Iterable[str]) -> None:
    for key in keys:
      nested = isinstance(base[key], ConfigDict)
      if key not in stage and nested:
        if base[key]:  # in an empty one there is no key to set
          stage[key] = {}
          follow(stage[key], base[key], base[key])
      elif key not in stage:
        stage[key] = _Following(base.get_ref(key))
      elif nested and 'name' not in stage[key]:
        follow(stage[key], base[key], base[key])

  for name in set(config.stages) - set(config.stage_order):
    del config.stages[name]  # of the base, and not this recipe's
  for stage in config.stages.values():
    follow(stage, config, STAGE_KEYS)
  return config


def set_keys(stage: ConfigDict) -> Overrides:
  """Returns what a stage sets, without what only follows the top level."""
  found = {}
  for key in stage:
    value = stage[key]
    if isinstance(value, ConfigDict):
      inside = set_keys(value)
      if inside or not value:
        found[key] = value.to_dict() if 'name' in inside else inside
    elif getattr(stage.get_ref(key), 'is_set', True):
      found[key] = value
  return found


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


def _sigmoid(config: ConfigDict, loss: Overrides) -> Overrides:
  """Sigmoid losses: the prior as the first bias, and no decay on it."""
  decay = config.optimizer.weight_decay
  return {
    'loss': loss,
    'class_weights': _effective(),
    'model': {'head_options': {'prior_bias': True}},
    'optimizer': {'weight_decay': (('net/head/bias', 0.0), *decay)},
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
  """Meta-Weight-Net, with the optimiser of the authors' class-imbalance code."""
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
      # Its last State, as the clock goes on from there.
      'pretrain': {'epochs': config.get_ref('defer_epoch'), 'select': 'last'},
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


def _selected(config: ConfigDict, metric: str = 'accuracy') -> Overrides:
  """The best State on validation images, as these papers take it, if there are any."""
  keeps = config.data.val_per_class or config.select != 'last'
  return {'select': f'val/{metric}'} if keeps else {}


def _then(config: ConfigDict, first: str, *seconds: tuple[str, Overrides]) -> Overrides:
  """The config's own training as the stage `first`, then other stages."""
  return {
    **_selected(config),
    'stages': {first: {}, **dict(seconds)},
    'stage_order': (first, *(name for name, _ in seconds)),
  }


ALL_BUT_HEAD = r'net/(?!head/).*'
HEAD_ONLY = (('net/head/.*', 1.0), ('.*', 0.0))
TENTH_BUT_HEAD = (('net/head/.*', 1.0), ('.*', 0.1))
"""Learning rates of OLTR's second stage: a tenth, but for the classifier."""


def _copy(pattern: str, stage: str, **source: str) -> tuple[str, Overrides]:
  return ('copy', {'pattern': pattern, 'stage': stage, **source})


CLASS_AWARE: Overrides = {
  'sampler': {'name': 'class_aware', 'per_class': 4, 'start_epoch': 0.0},
  # Consecutive images are of one class: statistics of a part of the batch would be of a
  # few classes, and depend on the number of devices.
  'model': {'batch_norm': 'global'},
}


def _aware(**second: Any) -> Overrides:
  """A second training from the first one's weights, with class-aware batches."""
  return {
    **CLASS_AWARE,
    'optimizer': {'learning_rate_scale': TENTH_BUT_HEAD},
    'surgeries': (_copy('.*', 'plain'),),
    **second,
  }


def _oltr(config: ConfigDict) -> Overrides:
  """OLTR: plain training, then attention and a memory of class centroids."""
  projected = config.model.projection  # in the first stage too, and then it is copied
  memory = _aware(
    method={'name': 'oltr', 'weight': 0.01, 'form': 'released'},
    model={
      **CLASS_AWARE['model'],
      'attention': True,
      'projection': projected or -1,
      'head': 'meta_embedding',
    },
    surgeries=(
      _copy('net/(trunk|projection)/.*' if projected else 'net/trunk/.*', 'plain'),
      _copy('net/head/hallucinator/(.*)', 'plain', source=r'net/head/\1'),
      ('class_means', {}),
    ),
  )
  return _then(config, 'plain', ('memory', memory))


def _two_trainings(config: ConfigDict, **second: Any) -> Overrides:
  return _then(config, 'plain', ('aware', _aware(**second)))


def _openmax(config: ConfigDict) -> Overrides:
  """OpenMax on the network that the range loss trained."""
  posthoc = {
    'epochs': 0.0,
    'wrappers': {'openmax': {'alpha': 10}},
    'surgeries': (_copy('.*', 'aware'), ('fit_openmax', {'tail': 20})),
  }
  aware = _aware(penalty=RANGE)
  return _then(config, 'plain', ('aware', aware), ('openmax', posthoc))


LIFTED = {'name': 'lifted', 'weight': 0.1}
RANGE = {'name': 'range', 'weight': 1.0}


def _decoupled(config: ConfigDict, share: float, **classifier: Any) -> Overrides:
  """Cross-entropy; then the classifier alone on balanced batches, cosine to zero."""
  epochs = config.get_ref('epochs') * share
  second = {
    **CLASS_AWARE,
    'epochs': epochs,
    'schedule': {
      'name': 'cosine',
      'base': config.schedule.get_ref('base'),
      'end': epochs,
    },
    **classifier,
  }
  return _then(config, 'train', ('classifier', second))


def _crt(config: ConfigDict, **classifier: Any) -> Overrides:
  """Classifier re-training: a fresh one on the first stage's features."""
  return _decoupled(
    config,
    1 / 9,
    optimizer={'learning_rate_scale': HEAD_ONLY},
    surgeries=(_copy(ALL_BUT_HEAD, 'train'),),
    **classifier,
  )


def _lws(config: ConfigDict) -> Overrides:
  """Learnable weight scaling: one scale a class on the first stage's classifier."""
  return _decoupled(
    config,
    1 / 18,
    model={**CLASS_AWARE['model'], 'head': 'scaled_linear'},
    optimizer={'learning_rate_scale': (('net/head/scale', 1.0), ('.*', 0.0))},
    surgeries=(_copy('net/(?!head/scale).*', 'train'),),
  )


def _tau_norm(config: ConfigDict) -> Overrides:
  """Tau by validation images, or by those set aside as meta images."""
  data = config.data
  split = 'meta' if data.meta_per_class and not data.val_per_class else 'val'
  taus = tuple(round(0.1 * i, 1) for i in range(21))
  posthoc = {
    'epochs': 0.0,
    'wrappers': {'tau_norm': {'taus': taus}},
    'surgeries': (_copy('.*', 'train'), ('choose_tau', {'split': split})),
  }
  return _then(config, 'train', ('tau_norm', posthoc))


def _ncm(config: ConfigDict) -> Overrides:
  """Nearest class mean on the first stage's features."""
  posthoc = {
    'epochs': 0.0,
    'model': {'head': 'nearest_class_mean'},
    'surgeries': (_copy(ALL_BUT_HEAD, 'train'), ('nearest_class_mean', {})),
  }
  return _then(config, 'train', ('ncm', posthoc))


def _fslwf(config: ConfigDict) -> Overrides:
  """Few-shot learning without forgetting: many-shot classes are base, others novel."""
  shared = {'classes': ('many',), 'model': {'head': 'cosine_bias'}}
  generator = {
    'method': {'name': 'weight_generator', 'dropout': 0.5, 'gamma': 10.0},
    'stream': {
      'name': 'episodes',
      'stage': 'base',
      'per_epoch': 100,
      'novel': 2,
      'queries_novel': 32,
      'queries_base': 32,
    },
    'epochs': 5.0,
    'optimizer': {
      'nesterov': True,
      'learning_rate_scale': ((ALL_BUT_HEAD, 0.0), ('.*', 1.0)),
    },
    'schedule': {
      'name': 'step_decay',
      'base': 0.01,
      'boundaries': (4.0,),
      'factors': (0.1,),
    },
    'select': 'last',
    'surgeries': (_copy('net/.*', 'base'),),
  }
  novel = {
    'epochs': 0.0,
    'surgeries': (
      _copy('net/.*', 'generator'),
      ('novel_classifiers', {'stage': 'generator'}),
    ),
  }
  return {
    'stages': {
      # Of the classes it has learned.
      'base': {**shared, **_selected(config, 'many'), 'leaves': ('features',)},
      'generator': {**shared, **generator},
      'novel': {**shared, **novel},
    },
    'stage_order': ('base', 'generator', 'novel'),
  }


RECIPES: dict[str, Callable[[ConfigDict], Overrides]] = {
  'ce': lambda config: {},
  'focal': lambda config: {'loss': {'name': 'softmax_focal', 'gamma': 1.0}},
  'cb_ce': lambda config: {'class_weights': _effective()},
  'cb_sigmoid': lambda config: _sigmoid(config, {'name': 'sigmoid_cross_entropy'}),
  'cb_focal': lambda config: _sigmoid(config, {'name': 'sigmoid_focal', 'gamma': 1.0}),
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
  'lade': lambda config: {
    'loss': {'name': 'balanced_softmax'},
    'penalty': {'name': 'lade', 'weight': 0.1},
  },
  'vs': lambda config: {'loss': {'name': 'vector_scaling', 'gamma': 0.3, 'tau': 1.0}},
  'cdt': lambda config: {'loss': {'name': 'class_dependent_temperature', 'gamma': 0.3}},
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
  'oltr': _oltr,
  'ce_aware': _two_trainings,
  'focal_aware': lambda config: _two_trainings(
    config, loss={'name': 'softmax_focal', 'gamma': 2.0}
  ),
  'lifted': lambda config: _two_trainings(config, penalty=LIFTED),
  'range': lambda config: _two_trainings(config, penalty=RANGE),
  'openmax': _openmax,
  'fslwf': _fslwf,
  'crt': _crt,
  'lws': _lws,
  'crt_las': lambda config: _crt(config, loss={'name': 'label_aware_smoothing'}),
  'tau_norm': _tau_norm,
  'ncm': _ncm,
  'ce_plus_meta': lambda config: {'data': {'meta_in_train': True}},
}
