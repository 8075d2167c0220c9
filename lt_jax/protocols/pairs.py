"""Pairs of photograph domains: Office-31, PACS, VisDA, as images or as features."""

from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from lt_jax.config import Overrides, apply, base_config, parse_arg
from lt_jax.errors import UserError, lookup
from lt_jax.pretrained.dialects import pixels
from lt_jax.protocols import Protocol, train_by

BATCH = 32

TRUNK_SLOWLY = (('net/(head|projection)/.*', 1.0), ('.*', 0.1))
"""Learning rate of parameters, relative to that of new layers: a trained trunk's is a
tenth."""

BOTTLENECK = 256
"""Size of a linear layer with ReLU between trunk and head, as in TLLib."""


class Pairs(NamedTuple):
  """A set of domains of photographs with the same classes.

  Attributes:
    name: name of the config.
    images: domain -> number of images.
    folder: path of a domain's class folders as published, with {data} and {domain}.
    pair: default source and target.
    net: the trunk.
    steps: number of steps of a training on photographs.
  """

  name: str
  images: Mapping[str, int]
  folder: str
  pair: tuple[str, str]
  net: str = 'resnet50'
  steps: int = 10_000


FEATURE_STEPS = 1000
"""Training on features, where no trunk needs to learn."""


def tllib(of_source: float, of_target: float) -> Protocol:
  """Rates, decay, bottleneck and discriminator size of Jiang et al.'s library TLLib.

  Args:
    of_source: epochs of the source to train for.
    of_target: epochs of the target, if only that is trained on.
  """
  return Protocol(
    {
      'batch': BATCH,
      'eval_batch': 100,
      'epochs': of_source,
      'optimizer': {
        'name': 'sgd',
        'momentum': 0.9,
        'nesterov': True,
        'weight_decay': (('.*', 1e-3),),
      },
      'schedule': {'name': 'dann', 'base': 0.01, 'end': of_source},
      'save_every_epochs': of_source / 4,
      'evaluate_every_epochs': of_source / 4,
      'model': {'projection': BOTTLENECK},
    },
    recipes={
      'target_only': {'epochs': of_target, 'schedule': {'end': of_target}},
      'dann': {
        'alignment': {'align_on': ('features',)},
        'players': {'discriminator': {'network': {'hidden': (1024, 1024)}}},
      },
      'dan': {'alignment': {'align_on': ('features',)}},
    },
  )


def pair_of_photographs(arg: str | None, pairs: Pairs) -> ConfigDict:
  """Returns the config of one source and one target; config files list the options.

  Args:
    arg: what follows the colon in --config.
    pairs: the set of domains.

  Raises:
    UserError: unknown domains, or the same one twice.
  """
  recipe, option = parse_arg(
    arg,
    'dann',
    source=pairs.pair[0],
    target=pairs.pair[1],
    net=pairs.net,
    data=pairs.name,
    features='',
    size=224,
    steps=0,
    init='',
  )
  pair = option.source, option.target
  for name in pair:
    lookup(pairs.images, f'domain of {pairs.name}', name)
  if option.source == option.target:
    raise UserError(f'source and target are both {option.source!r}')

  def place(name: str) -> Overrides:
    if option.features or option.data.endswith('.npz'):
      file = option.features or option.data
      return {'source': f'npz:{file}', 'train_split': name, 'test_split': name}
    folder = pairs.folder.format(data=option.data, domain=name)
    return {'source': f'folder:{folder}', 'test_split': 'train'}

  if option.features:
    seen: Overrides = {'data': {'standardise': True}, 'model': {'trunk': 'identity'}}
  else:
    seen = {
      'init': option.init,
      'data': {**_photographs(option), **pixels(option.net)},
      'model': {'trunk': option.net},
      'optimizer': {'learning_rate_scale': TRUNK_SLOWLY},
    }
  config = apply(
    base_config(),
    {
      'name': pairs.name,
      'domains': {name: place(name) for name in pair},
      'sources': (option.source,),
      'target': (option.target,),
    },
  )
  steps = option.steps or (FEATURE_STEPS if option.features else pairs.steps)
  protocol = tllib(*((steps - 0.5) * BATCH / pairs.images[name] for name in pair))
  training = Protocol(apply(ConfigDict(protocol.training), seen).to_dict())
  return train_by(config, recipe, protocol._replace(training=training.training))


def _photographs(option: ConfigDict) -> Overrides:
  """Returns how photographs are cropped: files have many sizes, arrays only one."""
  if option.data.endswith('.npz'):
    return {'size': option.size, 'pad': option.size // 8, 'flip': True}
  return {
    'image_size': option.size,
    'resize': round(option.size * 8 / 7),
    'flip': True,
    'workers': -1,
    'on_bad_image': 'skip',
  }
