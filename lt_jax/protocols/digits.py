"""Pairs of digit data sets: a labelled source, and a target to adapt to."""

from ml_collections import ConfigDict

from lt_jax.config import Overrides, apply, base_config, parse_arg
from lt_jax.protocols import Protocol, train_by


def _ganin(epochs: float) -> Protocol:
  """Ganin et al., arXiv 1505.07818: momentum, and a rate that falls with progress."""
  return Protocol(
    {
      'batch': 64,
      'eval_batch': 500,
      'epochs': epochs,
      'optimizer': {'name': 'sgd', 'momentum': 0.9, 'weight_decay': (('.*', 0.0),)},
      'schedule': {'name': 'dann', 'base': 0.01, 'end': epochs},
      'alignment': {'align_on': ('conv',)},
    }
  )


def pair(
  arg: str | None,
  *,
  name: str,
  source: str,
  target: Overrides,
  images: int,
  net: str = 'mnist_dann',
  size: int = 28,
) -> ConfigDict:
  """Returns the config of a source and one target; the options are in the config file.

  Args:
    arg: what follows the colon of --config.
    name: of the config, SOURCE_TARGET.
    source: of the labelled images.
    target: what the target's `data` have of their own.
    images: training images of the source.
    net: the trunk.
    size: side that all images are brought to.
  """
  recipe, option = parse_arg(arg, 'dann', steps=5000, net=net)
  domain = name.rpartition('_')[2]
  epochs = (option.steps - 0.5) * 64 / images  # an epoch begins at the next whole step
  config = apply(
    base_config(),
    {
      'name': name,
      'data': {
        'source': source,
        'size': size,
        'channels': 3,
        'mean': (0.5,),
        'std': (0.5,),
        'fake': {'image_size': size, 'train': images, 'largest': images // 10},
      },
      'domains': {domain: target},
      'target': (domain,),
      'model': {'trunk': option.net},
      'save_every_epochs': epochs / 5,
      'evaluate_every_epochs': epochs / 5,
    },
  )
  return train_by(config, recipe, _ganin(epochs))
