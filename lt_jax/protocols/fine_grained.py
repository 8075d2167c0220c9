"""Fine-tuning targets: their data sets, and how papers train on them."""

from typing import NamedTuple

from ml_collections import ConfigDict

from lt_jax.config import Overrides, apply, base_config, parse_arg
from lt_jax.errors import lookup
from lt_jax.pretrained.dialects import pixels
from lt_jax.protocols import Protocol, cosine, steps, train_by


class Target(NamedTuple):
  """A data set to fine-tune a network on.

  Attributes:
    source: source of the images; '' if TFDS has none and data= must name a folder.
    classes: number of classes.
    train: number of training images.
    test: number of test images.
    per_class: training images per class that the protocol uses; 0 for all.
    test_split: name of the source's test split.
  """

  source: str
  classes: int
  train: int
  test: int
  per_class: int = 0
  test_split: str = 'test'


TARGETS: dict[str, Target] = {
  'cub200': Target('tfds:caltech_birds2011', 200, 5994, 5794),
  'dogs': Target('tfds:stanford_dogs', 120, 12000, 8580),
  # Most papers train on the 1,020 images of 'train' and the 1,020 of 'val'. Here TFDS's
  # 'train' is used for training and 'val' for selection.
  'flowers': Target('tfds:oxford_flowers102', 102, 1020, 6149),
  'cars': Target('tfds:cars196', 196, 8144, 8041),
  'aircraft': Target('', 100, 6667, 3333),
  'food': Target('tfds:food101', 101, 75750, 25250, test_split='val'),
  'nabirds': Target('', 555, 23929, 24633),
  'caltech101': Target('tfds:caltech101', 102, 3060, 6084, per_class=30),
  'caltech256': Target('', 257, 15420, 15187, per_class=60),
  'cats_vs_dogs': Target('tfds:cats_vs_dogs', 2, 23262, 0),
}
"""name -> target; the first seven are from Cui et al., CVPR 2018."""


def _sgd(weight_decay: float, **options) -> Overrides:
  return {
    'name': 'sgd',
    'momentum': 0.9,
    'weight_decay': (('.*', weight_decay),),
    **options,
  }


PROTOCOLS: dict[str, Protocol] = {
  # TLLib's plain fine-tuning: 20 epochs, the rate drops to a tenth at 12, and the trunk
  # learns at a tenth of it.
  'tllib': Protocol(
    {
      'batch': 48,
      'optimizer': _sgd(
        5e-4, learning_rate_scale=((r'(?!net/trunk/).*', 1.0), ('.*', 0.1))
      ),
      **steps(20, (12, 0.1), base=0.01),
    }
  ),
  # Cui et al.'s demo, which trains only the last layer (recipe frozen); the decay is
  # ours.
  'cui': Protocol(
    {
      'batch': 64,
      'optimizer': _sgd(1e-4),
      **steps(30, (10, 0.1), (20, 0.01), base=0.01),
    }
  ),
  # Like BiT's: no weight decay, a cosine schedule; but batches of 128 instead of 512,
  # and a length in epochs.
  'bit': Protocol(
    {
      'batch': 128,
      'optimizer': _sgd(0.0),
      **cosine(20.0, base=0.01),
    }
  ),
}
"""name -> protocol; `tllib` is the default."""


def fine_grained(arg: str | None) -> ConfigDict:
  """Returns the config of a target; see configs/fine_grained.py for options."""
  recipe, option = parse_arg(
    arg,
    'ce',
    target='cub200',
    data='',
    init='',
    net='resnet50',
    size=224,
    per_class=-1,
    protocol='tllib',
    epochs=0.0,
  )
  target = lookup(TARGETS, 'target', option.target)
  protocol = lookup(PROTOCOLS, 'protocol', option.protocol)
  per_class = target.per_class if option.per_class < 0 else option.per_class
  images = per_class * target.classes or target.train
  data: Overrides = {'source': option.data or target.source or 'fake'}
  if per_class:
    data |= {'profile': 'balanced', 'n_max': per_class}
  if target.test:
    data |= {'test_split': target.test_split}
  else:
    data |= {'test_per_class': min(2000, target.train // target.classes // 5)}
  each = max(1, target.train // target.classes)
  fake = {
    'classes': target.classes,
    'train': each * target.classes,
    'largest': each,
    'smallest': each,
    'val': target.test if target.test_split == 'val' else 0,
    'test': 0 if target.test_split == 'val' else target.test,
    'image_size': 0,
  }
  config = apply(
    base_config(),
    {
      'name': 'fine_grained',
      'init': option.init,
      'data': {
        **data,
        'fake': fake,
        'many_shot': 0,
        'few_shot': 0,
        'image_size': option.size,
        'resize': round(option.size * 8 / 7),
        'flip': True,
        **pixels(option.net),
        'workers': -1,
      },
      'model': {'trunk': option.net},
      'eval_batch': 128,
      'save_every_epochs': 2.0 if images > 2000 else 5.0,
      'evaluate_every_epochs': 5.0,
    },
  )
  return train_by(config, recipe, protocol, epochs=option.epochs)
