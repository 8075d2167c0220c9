"""Long-tailed CIFAR: five papers, and CIFAR-100 with open classes."""

from ml_collections import ConfigDict

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.protocols import Protocol, choose, steps, train_by
from lt_jax.recipes import find

_CAO_DATA = {'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2023, 0.1994, 0.2010)}
_MWN_DATA = {
  'mean': (125.3 / 255, 123.0 / 255, 113.9 / 255),
  'std': (63.0 / 255, 62.1 / 255, 66.7 / 255),
  'pad_mode': 'reflect',
}
_CAO_MODEL = {'trunk_options': {'shortcut': 'subsample', 'init': 'kaiming'}}
_NESTEROV = {'momentum': 0.9, 'nesterov': True, 'weight_decay': (('.*', 5e-4),)}


PROTOCOLS: dict[str, Protocol] = {
  # Cao et al., arXiv 1906.07413, and its code: warm-up in stairs, option A shortcuts.
  'cao': Protocol(
    {
      'data': _CAO_DATA,
      'model': _CAO_MODEL,
      **steps(200, (160, 1e-2), (180, 1e-4), warmup='staircase', warmup_epochs=5),
    }
  ),
  # Cui et al., arXiv 1901.05555, and its code: x / 128 - 1, average-pool shortcuts.
  'cui': Protocol(
    {
      'data': {'mean': (128 / 255,), 'std': (128 / 255,)},
      'model': {
        'trunk_options': {'shortcut': 'average', 'init': 'glorot'},
        'head_options': {'init': 'glorot'},
      },
      **steps(200, (160, 1e-2), (180, 1e-4), warmup='linear', warmup_epochs=5),
    }
  ),
  # Ren et al., arXiv 1803.09050, and its code: 80,000 steps of 100 images of 50,000.
  'ren': Protocol(
    {
      'data': {**_CAO_DATA, 'meta_per_class': 10},
      'model': _CAO_MODEL,
      'batch': 100,
      **steps(160, (80, 0.1), (120, 0.01)),
    }
  ),
  # Shu et al., arXiv 1902.07379, and its code for class imbalance, which counts epochs
  # from 1: its drops at 80 and 90 take effect at 79 and 89, counted from 0.
  'shu': Protocol(
    {
      'data': {**_MWN_DATA, 'meta_per_class': 10},
      'model': _CAO_MODEL,
      'batch': 100,
      'optimizer': _NESTEROV,
      **steps(100, (79, 0.1), (89, 0.01)),
    }
  ),
  # Jamal et al., arXiv 2003.10780, and its code: no warm-up. The rate drops one epoch
  # before the meta stage begins, because that code counts epochs from 1 for the rate
  # only.
  'jamal': Protocol(
    {
      'data': {**_MWN_DATA, 'meta_per_class': 10},
      'model': _CAO_MODEL,
      'batch': 100,
      'optimizer': _NESTEROV,
      **steps(200, (159, 1e-2), (179, 1e-4)),
    }
  ),
}
"""Paper -> protocol; the first is for recipes of other papers."""


def _counts(of_a_class: int) -> dict[str, int]:
  """Returns what the source 'fake' needs to know about CIFAR."""
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
  """Returns the config of long-tailed CIFAR; see configs/cifar10_lt.py for options.

  Args:
    arg: what follows the colon in --config.
    name: name of the config.
    source: source of the images.
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
  protocol = choose(PROTOCOLS, option.protocol, recipe)
  meta = protocol.training['data'].get('meta_per_class', 0)
  if option.meta >= 0:
    meta = option.meta
  elif 'held_out' in find(recipe).needs:  # there are no validation images
    meta = 10
  config = apply(
    base_config(),
    {
      'name': name,
      'data': {
        'source': source,
        'fake': _counts(n_max),
        'profile': option.profile,
        'imbalance': option.imbalance,
        'pad': 4,
        'flip': True,
      },
      'model': {'trunk': option.net},
    },
  )
  sizes = Protocol({'data': {'meta_per_class': meta, 'n_max': n_max - meta}})
  return train_by(config, recipe, protocol, sizes, epochs=option.epochs)


def cifar100_open(arg: str | None) -> ConfigDict:
  """Returns the config of CIFAR-100 with open classes; see configs/cifar100_open.py.

  Args:
    arg: what follows the colon in --config.
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
        'fake': _counts(500),
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
  return train_by(config, recipe, PROTOCOLS['cao'], epochs=option.epochs)
