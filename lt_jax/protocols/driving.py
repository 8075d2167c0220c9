"""Street scenes: a labelled source, targets to adapt to, and networks for them."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from lt_jax.config import Overrides, apply, base_config
from lt_jax.errors import lookup
from lt_jax.protocols import Protocol, train_by

IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
"""The normalisation that torchvision's and timm's ImageNet weights expect."""


def _resnet(trunk: str) -> Overrides:
  """DeepLab-v2 as in ADVENT: the head at ten times the rate, affine layers frozen."""
  return {
    'data': IMAGENET,
    'model': {
      'trunk': trunk,
      'trunk_options': {'also': ('stage3',)},
      'head': 'deeplab',
      'head_options': {'auxiliary': 'stage3'},
    },
    'loss': {'name': 'cross_entropy', 'auxiliary': 0.1},
    'optimizer': {
      'learning_rate_scale': (
        ('net/trunk/.*norm.*', 0.0),
        ('net/head/.*', 10.0),
        ('.*', 1.0),
      )
    },
    'schedule': {'base': 2.5e-4},
  }


def _vgg(trunk: str) -> Overrides:
  """DeepLab-v2 as C-Driving's authors have it, after AdaptSegNet: all equally fast.

  Their code returns from within the loop over the branches of the head, and so adds up
  the first two of the four; here all four count.
  """
  return {
    'data': IMAGENET,
    'model': {
      'trunk': trunk,
      'head': 'deeplab',
      'head_options': {'hidden': (1024, 1024)},
    },
    'schedule': {'base': 2.5e-4},
  }


def _small(trunk: str, **options: int) -> Overrides:
  """A trunk for CPUs and a head with small dilations, all at the same rate."""
  return {
    'data': IMAGENET,
    'model': {'trunk': trunk, 'trunk_options': options, 'head': 'multi_dilation'},
    'schedule': {'base': 0.01},
  }


NETS: Mapping[str, Overrides] = {
  'resnet101': _resnet('deeplab_resnet101'),
  'resnet50': _resnet('deeplab_resnet50'),
  'vgg16': _vgg('deeplab_vgg16'),
  'vgg16_bn': _vgg('deeplab_vgg16_bn'),
  'small': _small('small_segmenter'),
  'lite0': _small('efficientnet_lite0', output_stride=16),
}
"""Name of a network in a config -> its overrides."""


def _vu(epochs: float, part: float, window: tuple[int, int]) -> Protocol:
  """Vu et al., arXiv 1811.12833: one whole image of each domain per step.

  Recipes that mix images of the domains need them in one size, so they use windows.
  """
  windows = {'data': {'window': window}}
  return Protocol(
    {
      'batch': 1,
      'eval_batch': 1,
      'epochs': epochs,
      'optimizer': {'name': 'sgd', 'momentum': 0.9, 'weight_decay': (('.*', 5e-4),)},
      'schedule': {
        'name': 'poly',
        'base': 2.5e-4,
        'end': epochs,
        'power': 0.9,
        'part': part,
      },
      'save_every_epochs': epochs / 60,
      'evaluate_every_epochs': epochs / 60,
    },
    recipes={'fda': windows, 'mean_teacher': windows},
  )


def adaptation(
  recipe: str,
  *,
  name: str,
  source: Overrides,
  targets: Mapping[str, Overrides],
  opened: Mapping[str, Overrides] = {},
  net: str,
  images: int,
  steps: int,
  part: float = 1.0,
  window: tuple[int, int] = (512, 1024),
  classes: int = 19,
) -> ConfigDict:
  """Returns the config of a source and its targets, trained as in ADVENT.

  Args:
    recipe: the recipe.
    name: name of the config.
    source: keys of `data` for the labelled images.
    targets: name -> keys of `data` that differ from the source's.
    opened: likewise for open domains.
    net: a key of `NETS`.
    images: number of training images of the source.
    steps: number of training steps.
    part: share of the learning rate's decay that these steps cover.
    window: (height, width) for recipes that mix the domains.
    classes: number of classes, for plans, which read no data.
  """
  made = lookup(NETS, 'network', net)
  config = apply(
    base_config(),
    {
      'name': name,
      'task': 'segmentation',
      'data': {
        'many_shot': 0,
        'few_shot': 0,
        'workers': -1,
        'fake': {'classes': classes, 'train': images},
        **source,
      },
      'domains': {**targets, **opened},
      'target': tuple(targets),
      'open_domains': tuple(opened),
    },
  )
  # An epoch starts at the next whole step.
  protocol = _vu((steps - 0.5) / images, part, window)
  return train_by(config, recipe, protocol, Protocol(made))
