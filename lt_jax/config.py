"""Configs: every key with its default, stages, overrides and digests.

A config file states its data set and protocol on top of `base_config`, then applies
the recipe that its argument names:

  --config=configs/cifar10_lt.py:ldam_drw,imbalance=50

Durations are in epochs of the training sampler; `lt_jax.build` turns them into steps.
Nothing here needs JAX: a config is plain data.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference

from lt_jax.errors import UserError, lookup, suggest
from lt_jax.pretrained import ours

Config = Mapping[str, Any]
Overrides = dict[str, Any]

SOURCE, TARGET, OPEN = 'source', 'target', 'open'
"""Roles of domains; without `sources`, `data` itself is the domain 'source'."""

CLOCK = 'train'
"""The stream whose epochs are the epochs of a stage."""


STAGE_KEYS = (
  'domain',
  'batch',
  'streams',
  'shot_groups',
  'save_outputs',
  'kept_layers',
  'heads',
  'epochs',
  'log_every_steps',
  'save_every_epochs',
  'evaluate_every_epochs',
  'method',
  'model',
  'loss',
  'penalty',
  'alignment',
  'players',
  'class_weights',
  'reduction',
  'sampler',
  'optimizer',
  'schedule',
  'wrappers',
  'surgeries',
  'select',
)
"""Keys that a stage can set; the others belong to the whole run."""


MAY_CHANGE = frozenset(
  {
    'data.workers',
    'device',
    'keep_checkpoints',
    'log_every_steps',
    'save_every_epochs',
  }
)
"""Keys that a resumed run may change, because they do not affect training."""


RENAMED = {'leaves': 'save_outputs', 'classes': 'shot_groups'}
"""Old name of a key -> its name now, at the top level and in stages."""

ADDED = (
  'task',
  'domains',
  'sources',
  'target',
  'open_domains',
  'domain',
  'alignment',
  'players',
  'kept_layers',
  'heads',
)
"""Keys that older runs lack."""

REWEIGHTING: dict[str, Overrides] = {
  'l2rw': {
    'eps_lr': 1.0,
    'eps_scale': 'absolute',
    'form': 'additive',
    'prior': 'none',
    'clip': True,
    'normalise': True,
  },
  'meta_reweight': {'prior': 'class_weights', 'clip': False, 'normalise': False},
}
"""Two methods of old configs -> the options that make `meta_reweight` equal each."""

L2RW_COMPARED_WITH = {'name': 'effective_number', 'beta': 0.9999, 'start_epoch': 0.0}
"""Class weights in the logs of 'l2rw', from before they were an option."""

OWN = (
  'same_classes',
  'keep_classes',
  'known_classes',
  'profile',
  'n_max',
  'imbalance',
  'val_per_class',
  'meta_per_class',
  'meta_in_train',
  'open_val_per_class',
  'open_test_per_class',
  'class_vectors',
  'unseen',
  'val_classes',
)
"""Keys of `data` that a domain does not inherit: they name its classes, draw the tail
or split off images."""


def base_config() -> ConfigDict:
  """Returns every key with its default, which is what most papers use.

  A stage is a set of overrides of the top level, see `STAGE_KEYS`.
  """
  config = ConfigDict(
    {
      'name': '',
      'recipe': '',
      'seed': 0,  # initialisation, order and augmentation
      'device': 'any',  # 'gpu' and 'tpu' refuse a machine without one
      'init': '',  # initial weights: OWNER/MODEL, FILE.safetensors or a workdir
      'data': {
        'source': 'digits',
        'size': 0,  # side to which images in memory are resized; 0: as stored
        'channels': 0,  # likewise
        'dir': '',  # folder of TFDS; its default if empty
        'seed': 0,  # splits and subset, the same in all runs of a table
        'subset': 'seeded',  # 'stored': the first images of each class
        'keep_classes': '',  # a file with a name per line, NAME+NAME or -NAME; '': all
        'known_classes': 0,  # classes from this one on are open; 0: all are known
        'profile': 'original',
        'n_max': 0,
        'imbalance': 1.0,
        'test_per_class': 0,  # 0: use the test split of the source
        'val_per_class': 0,
        'meta_per_class': 0,
        'meta_in_train': False,  # True: meta images are also training images
        'open_val_per_class': 0,
        'open_test_per_class': 0,
        'many_shot': 100,  # 0: twice the median number of training images
        'few_shot': 20,  # 0: half the median
        'mean': (0.0,),
        'std': (1.0,),
        'standardise': False,  # True: mean and std of this domain's training images
        'unit': 'none',  # of float arrays: 'l1' or 'l2' divides each by its norm
        'pad': 0,  # pixels, for the random crop
        'pad_mode': 'zero',
        'flip': False,
        'jitter': 0.0,  # of brightness, contrast and saturation
        'class_vectors': (),  # files that describe classes, see data/attributes.py
        'unseen': (),  # classes never trained on: names, '@FILE', or (NUMBER,)
        'val_classes': (),  # seen classes on which settings for unseen ones are chosen
        'pretrain_classes': '',  # file with the classes that `init` was trained on
        'same_classes': (),  # (name here, name in the union), if sources differ
        'train_split': 'train',
        'test_split': 'test',
        'meta_split': 'train',  # 'val': meta images are validation images
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
        'window': (),  # (height, width) of random crops, if labels are maps
        'scale': (1.0, 1.0),  # random scale of images with label maps before the crop
        'resize_to': (),  # (height, width) of such images before that; (): as stored
        'image_size': 0,  # of random crops, if images have many sizes
        'resize': 0,  # short side before the central crop in evaluation
        'crop_area': 0.08,  # least share of an image in a random crop; 1: all of it
        'on_bad_image': 'raise',  # 'skip': replace it by another image of its class
        'workers': 0,  # processes that decode images; -1: one per core, 0: threads
      },
      'domains': {},  # name -> what differs from `data`
      'sources': (),  # labelled domains; (): `data` itself
      'target': (),  # domains to adapt to; several are one compound target
      'open_domains': (),  # domains never seen in training, only tested on
      'domain': 'source',  # the domain whose classes a stage learns
      'task': 'classification',  # what a label is, and what is measured
      'batch': 128,
      'streams': {'train': {'split': 'train'}},  # see build/streams.py
      'shot_groups': (),  # groups whose classes are learned; (): all classes
      'save_outputs': (),  # NAME or SPLIT/NAME, for later stages, see evals/saved.py
      'kept_layers': '',  # of the trunk, such as 'first:2'; re-initialises the rest
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
        'projection': 0,  # size of a linear layer and ReLU; -1: that of the features
        'head': 'linear',
        'head_options': {},
        'dtype': 'float32',
        # 'per_device', 'frozen', 'recalibrate', or the size of a ghost batch
        'batch_norm': 'global',
      },
      'loss': {'name': 'cross_entropy'},
      'penalty': {'name': 'none', 'weight': 0.0},  # a loss term of the whole batch
      'alignment': {
        'name': 'none',
        'align_on': ('features',),
        'weight': {'name': 'constant', 'weight': 0.0},  # a schedule of progress
      },
      'heads': {},  # further tasks: name -> kind, outputs, stream
      'players': {},  # networks beside the main one: network, optimizer, schedule
      'class_weights': {'name': 'uniform', 'start_epoch': 0.0},
      'reduction': 'mean',
      # Before start_epoch, sampling is by instance.
      'sampler': {'name': 'instance', 'start_epoch': 0.0},
      'optimizer': {'name': 'sgd', 'momentum': 0.9, 'weight_decay': (('.*', 2e-4),)},
      'schedule': {'name': 'constant', 'base': 0.1},
      'wrappers': {},
      'surgeries': (),
      'select': 'last',  # or 'val/accuracy': the State that is best by a metric on val
      'stages': {'train': {}},
      'stage_order': ('train',),
    }
  )
  # The epoch at which deferred recipes switch; for Cao et al. 160 of 200.
  config.defer_epoch = config.get_ref('epochs') * 0.8
  return config


_NOUNS = {float: 'a number', int: 'a whole number', str: 'a string'}


def parse_arg(arg: str | None, recipe: str, **defaults: Any) -> tuple[str, ConfigDict]:
  """Parses the argument of a config file: 'ldam_drw,imbalance=50'.

  Args:
    arg: what follows the colon: a recipe, options, or both; None for all defaults.
    recipe: the default recipe.
    **defaults: the options; the defaults give their types.

  Returns:
    (recipe, options).

  Raises:
    UserError: an option is unknown, or its value has another type.
  """
  options = dict(defaults)
  for part in filter(None, (arg or '').split(',')):
    name, equals, text = part.partition('=')
    if not equals and name in defaults:
      raise UserError(f'option {name!r} of the config needs a value: {name}=...')
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
          f'option {name}={text!r} of the config is not {_NOUNS[kind]}'
        ) from None
      if kind is float and not 0 < options[name] < math.inf:
        raise UserError(
          f'option {name}={text} of the config must be positive and finite'
        )
  return recipe, ConfigDict(options)


def apply(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
  """Sets keys of a config, dicts key by key.

  Two values replace the old one as a whole: a dict with a 'name', whose other keys are
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
  """The value of a key that follows the top level until it is set."""

  def __init__(self, followed: FieldReference):
    super().__init__(followed)
    self.is_set = False

  def set(self, value: Any, type_safe: bool = True) -> None:
    """Sets the value, and stops following."""
    super().set(value, type_safe)
    self.is_set = True


def open_stages(config: ConfigDict) -> ConfigDict:
  """Makes every key of every stage settable; until it is set, it follows the top level.

  A schedule that ends with the training still does so if `epochs` is set.
  """

  def follow(stage: ConfigDict, base: ConfigDict, keys: Iterable[str]) -> None:
    fields = dict(base.items(preserve_field_references=True))
    for key in keys:
      nested = isinstance(base[key], ConfigDict)
      if key not in stage and nested:
        if base[key]:  # an empty dict has no keys to set
          stage[key] = {}
          follow(stage[key], base[key], base[key])
      elif key not in stage:
        if not isinstance(fields[key], FieldReference):
          base[key] = FieldReference(fields[key])  # `get_ref` takes 100 times as long
        stage[key] = _Following(base.get_ref(key))
      elif nested and 'name' not in stage[key]:
        follow(stage[key], base[key], base[key])

  for name in set(config.stages) - set(config.stage_order):
    del config.stages[name]  # from the base config, not from this recipe
  _end_with_epochs(config)
  for stage in config.stages.values():
    follow(stage, config, ('epochs',))
    _end_with_epochs(stage)
    follow(stage, config, STAGE_KEYS)
  return config


def _end_with_epochs(part: ConfigDict) -> None:
  """Makes the end of a schedule follow the epochs, if the two are equal."""
  players = part.get('players', {}).values()
  for owner in (part, *players):
    schedule = owner.get('schedule', {})
    if 'name' in schedule and repr(schedule.get('end')) == repr(part.epochs):
      del schedule['end']
      schedule['end'] = FieldReference(part.get_ref('epochs'))


def set_keys(stage: ConfigDict) -> Overrides:
  """Returns the keys that a stage sets, without those that follow the top level."""
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


def stage_config(config: Config, name: str) -> dict[str, Any]:
  """Returns the config of a stage: the top level with its overrides."""

  def merge(base: Config, over: Config) -> dict[str, Any]:
    merged = dict(base)
    for key in over:  # options of another trunk or head do not apply
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
      raise UserError(f'stage {name!r} cannot set {key!r}{near}')
  return merge(config, stage)


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Flattens nested dicts, with keys joined by dots: {'data.source': 'digits'}."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    name = f'{prefix}{key}'
    if isinstance(value, Mapping) and value:
      flat |= flatten(value, f'{name}.')
    else:
      flat[name] = value
  return flat


def domain_data(config: Config, name: str) -> dict[str, Any]:
  """Returns the `data` of a domain: that of the config, with the domain's overrides.

  Keys in `OWN` are not inherited.
  """
  if name == SOURCE:
    return dict(config['data'])
  plain = base_config().data.to_dict()
  own = lookup(config['domains'], 'domain', name)
  for key in own:
    if key not in plain:
      near = suggest(key, plain)
      raise UserError(f'domains.{name} sets {key!r}, but data has no such key{near}')
  return {**config['data'], **{key: plain[key] for key in OWN}, **own}


def labelled_data(config: Config) -> list[dict[str, Any]]:
  """Returns the `data` of every domain whose labels a run learns.

  Args:
    config: of any run; one of an older version may lack keys.

  Raises:
    UserError: a domain does not exist, or sets a key that `data` does not have.
  """
  if 'data' not in config:
    return []
  defaults = base_config().to_dict()
  whole = {**defaults, **config, 'data': {**defaults['data'], **config['data']}}
  names = {*(whole['sources'] or [SOURCE]), *domains_of_stages(whole)}
  return [domain_data(whole, name) for name in sorted(names - {*whole['target']})]


def domains_of_stages(config: Config) -> list[str]:
  """Returns the names of the domains that stages and their streams use."""
  stages = [config, *config['stages'].values()]
  names = [stage['domain'] for stage in stages if 'domain' in stage]
  for stage in stages:
    rows = stage.get('streams', {}).values()
    names += [row['domain'] for row in rows if row.get('domain') in config['domains']]
  return list(dict.fromkeys(names))


def check_set_domains(config: Config, given: Mapping[str, Any]) -> None:
  """Refuses keys set for an unused domain, since they would change nothing.

  A config file may describe more domains than a run uses, such as all possible targets;
  those only cause a warning.

  Args:
    config: the config.
    given: key -> value that was set after the config file was read; the keys in
      question are 'domains.NAME.KEY'.

  Raises:
    UserError: a key belongs to an unused domain; the message names it.
  """
  roles = (*config['sources'], *config['target'], *config['open_domains'])
  used = {*roles, *domains_of_stages(config)}
  for key, value in given.items():
    first, *rest = key.split('.')
    named = rest[:1] or (value if isinstance(value, Mapping) else ())
    for name in named if first == 'domains' else ():
      if name not in used:
        raise UserError(
          f'config.domains.{name} is set, but {unused(name)}; the target is '
          f'{", ".join(config["target"]) or "not set"}'
        )


def unused(name: str) -> str:
  """Returns the message about a domain that nothing uses."""
  return (
    f'domain {name!r} has no role and is not used: name it in sources, target or '
    'open_domains, or as the domain of a stage'
  )


def resolve(config: Any, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Returns a `ConfigDict` as plain data, exactly as config.json gives it back.

  If it starts from weights of ours, pixels are set as these weights expect them.

  Args:
    config: the config.
    given: key -> value that was set after the config file was read.

  Raises:
    UserError: a number is not finite, or `given` has keys of an unused domain.
  """
  plain = config.to_dict()
  plain['stages'] = {n: set_keys(stage) for n, stage in config.stages.items()}
  plain = json.loads(json.dumps(plain))
  wrong = {k: v for k, v in flatten(plain).items() if not _is_finite(v)}
  if wrong:  # several keys may follow a single one
    values = ', '.join(f'config.{key} is {value!r}' for key, value in wrong.items())
    raise UserError(
      f'{values}: give {"finite numbers" if len(wrong) > 1 else "a finite number"}'
    )
  check_set_domains(plain, given or {})
  return ours.adopted(plain)


def _is_finite(value: Any) -> bool:
  try:
    json.dumps(value, allow_nan=False)
  except ValueError:
    return False
  return True


def upgraded(config: Config) -> dict[str, Any]:
  """Returns the config of an older run with the keys of today.

  Keys that it lacks get their defaults, which are what older versions did. Damaged
  values stay as they are; their readers report them.
  """
  found = _renamed(config)
  for key in ('stages', 'streams', 'data'):
    if not isinstance(found.get(key, {}), Mapping):
      return found
  stages = found.get('stages', {})
  found['stages'] = {name: _renamed(stage) for name, stage in stages.items()}
  base = base_config().to_dict()
  row = {'train': base['streams']['train']} | found.get('streams', {})
  added = {key: json.loads(json.dumps(base[key])) for key in ADDED}
  found = added | found | {'streams': row}
  return found | {'data': base['data'] | found.get('data', {})}


def _renamed(keys: Any) -> Any:
  """Returns a config, or a stage of one, with the keys of today."""
  if not isinstance(keys, Mapping):
    return keys
  found = {RENAMED.get(key, key): value for key, value in keys.items()}
  train, meta = {}, {}
  if 'train_split' in found:
    train['split'] = found.pop('train_split')
  stream = found.pop('stream', None)
  if isinstance(stream, Mapping) and stream.get('name') != 'images':
    train = dict(stream)
  if 'meta_every' in found:
    meta['every'] = found.pop('meta_every')
  if batch := found.pop('meta_batch', 0):
    meta = {'split': 'meta', 'batch': batch, 'every': 1} | meta
  elif meta == {'every': 1}:
    meta = {}
  rows = {name: row for name, row in (('train', train), ('meta', meta)) if row}
  found |= {'streams': rows} if rows else {}
  method = found.get('method')
  if isinstance(method, Mapping) and 'weight_optimizer' in method:
    method = dict(method)
    weight_net = {
      'network': {'name': 'weight_net', 'hidden': method.pop('hidden', 100)},
      'optimizer': method.pop('weight_optimizer'),
      'schedule': {
        'name': 'constant',
        'base': method.pop('weight_learning_rate', 1e-5),
      },
    }
    found |= {'method': method, 'players': {'weight_net': weight_net}}
  elif isinstance(method, Mapping) and method.get('name') in REWEIGHTING:
    found['method'] = {**REWEIGHTING[method['name']], **method, 'name': 'meta_reweight'}
    if method['name'] == 'l2rw':
      found['class_weights'] = dict(L2RW_COMPARED_WITH)
  return found


def trained_by(config: Config) -> dict[str, Any]:
  """Returns the config keys that affect training: 'data.source' -> value."""
  return {k: value for k, value in flatten(config).items() if k not in MAY_CHANGE}


def config_digest(config: Config) -> str:
  """Returns 12 hex digits over the keys that affect training, except the seed."""
  rest = {key: value for key, value in trained_by(config).items() if key != 'seed'}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:12]
