"""Pairs of digit data sets: a labelled source, and a target to adapt to."""

from ml_collections import ConfigDict

from lt_jax.config import Overrides, apply, base_config, parse_arg
from lt_jax.data.longtail import class_counts
from lt_jax.protocols import Protocol, train_by


def ganin(epochs: float) -> Protocol:
  """Ganin et al., arXiv 1505.07818: momentum, and a rate that decays with progress."""
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


def tail(n_max: int, imbalance: float, profile: str = 'exponential') -> Overrides:
  """Returns the keys of `data` that give a domain's training images a long tail.

  For a target this uses its labels, to make the data set but not to train on it.

  Args:
    n_max: images of the largest class.
    imbalance: n_max / n_min; 1 for all images.
    profile: 'exponential', or 'reversed', from the last class to the first.
  """
  if imbalance == 1:
    return {}
  return {'profile': profile, 'n_max': n_max, 'imbalance': imbalance}


def pair(
  arg: str | None,
  *,
  name: str,
  source: str,
  target: Overrides,
  images: int,
  n_max: tuple[int, int] = (500, 500),
  net: str = 'mnist_dann',
  size: int = 28,
  classes: int = 10,
) -> ConfigDict:
  """Returns the config of a source and one target; the config file lists its options.

  Args:
    arg: what follows the colon in --config.
    name: name of the config, SOURCE_TARGET.
    source: source of the labelled images.
    target: keys in which the target's `data` differ.
    images: number of training images of the source.
    n_max: images of the largest class of the source and of the target, if they get a
      long tail.
    net: the trunk.
    size: side to which all images are resized.
    classes: number of classes.
  """
  recipe, option = parse_arg(
    arg,
    'dann',
    steps=5000,
    net=net,
    imbalance=1.0,
    target_imbalance=1.0,
    target_profile='exponential',
  )
  domain = name.rpartition('_')[2]
  own = tail(n_max[0], option.imbalance)
  if own:
    images = int(class_counts(num_classes=classes, **own).sum())
  epochs = (option.steps - 0.5) * 64 / images  # an epoch starts at the next whole step
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
        'fake': {'image_size': size, 'train': images, 'largest': images // classes},
        **own,
      },
      'domains': {
        domain: {
          **target,
          **tail(n_max[1], option.target_imbalance, option.target_profile),
        }
      },
      'target': (domain,),
      'model': {'trunk': option.net},
      'save_every_epochs': epochs / 5,
      'evaluate_every_epochs': epochs / 5,
    },
  )
  return train_by(config, recipe, ganin(epochs))
