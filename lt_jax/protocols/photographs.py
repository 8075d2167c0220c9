"""Photographs: ImageNet, ImageNet-LT, Places-LT, iNaturalist and MS1M-LT."""

from typing import NamedTuple

from ml_collections import ConfigDict

from lt_jax.config import Overrides, apply, base_config, parse_arg
from lt_jax.protocols import Protocol, choose, cosine, steps, train_by
from lt_jax.recipes import Recipe, find

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
"""Number of blocks in the last stage, for trunks where it is not three."""


def _sgd(weight_decay: float, *rates: tuple[str, float]) -> Overrides:
  """SGD with the same decay for all parameters, and learning rates by rule."""
  return {
    'name': 'sgd',
    'momentum': 0.9,
    'weight_decay': (('.*', weight_decay),),
    'learning_rate_scale': rates or (('.*', 1.0),),
  }


def _second(overrides: Overrides) -> dict[str, Overrides]:
  """The second training that some recipes have, on class-aware batches."""
  return {'memory': overrides, 'aware': overrides}


NO_SECOND = {'memory': None, 'aware': None}
"""Stages of a protocol for which nobody has tried a second training."""


def _cui(focal_rate: float) -> Protocol:
  """Cui et al., arXiv 1901.05555, and its code for TPUs: 0.1 for 256 images.

  Normalisation scales and the last bias do not decay. Their resizing is bicubic.

  Args:
    focal_rate: learning rate for 256 images of their class-balanced focal loss.
  """
  focal = {
    'loss': {'gamma': 0.5},
    'class_weights': {'beta': 0.999},
    'schedule': {'base': 4 * focal_rate},
  }
  return Protocol(
    {
      'batch': 1024,
      'model': {'dtype': 'bfloat16'},
      'optimizer': {
        **_sgd(1e-4),
        'nesterov': True,
        'weight_decay': ((r'.*norm\d?/.*|net/head/bias', 0.0), ('.*', 1e-4)),
      },
      **steps(
        90,
        (30, 0.1),
        (60, 0.01),
        (80, 1e-3),
        base=0.4,
        warmup='linear',
        warmup_epochs=5,
      ),
    },
    NO_SECOND,
    {'cb_focal': focal},
  )


PHOTOGRAPHS: dict[str, dict[str, Protocol]] = {
  'imagenet_lt': {
    # Liu et al., arXiv 1904.05160: the latest config in the authors' repository.
    'liu': Protocol(
      {'batch': 128, 'optimizer': _sgd(5e-4), **steps(30, (10, 0.1), (20, 0.01))},
      _second(steps(60, (20, 0.1), (40, 0.01))),
    ),
    # Kang et al., arXiv 1910.09217. Their cosine decays per epoch, ours per step.
    'kang': Protocol(
      {'batch': 512, 'optimizer': _sgd(5e-4), **cosine(90, base=0.2)},
      NO_SECOND,
    ),
  },
  'places_lt': {
    # As above; the second stage only trains attention, projection and head.
    'liu': Protocol(
      {
        'batch': 128,
        'model': {'projection': 512},
        'optimizer': _sgd(5e-4, (_HEAD, 1.0), ('.*', 0.01)),
        **steps(30, (10, 0.1), (20, 0.01)),
      },
      _second(
        {
          'optimizer': {
            'learning_rate_scale': (
              (f'{_HEAD}|centroids', 1.0),
              ('net/(attention|projection)/.*', 0.01),
              ('.*', 0.0),
            )
          },
          **steps(30, (10, 0.1), (20, 0.01), base=0.01),
        }
      ),
    ),
    # As above, and only the last block of the trunk is trained, so that it needs
    # published initial weights. The authors published no config.
    'kang': Protocol(
      {
        'batch': 256,
        'optimizer': _sgd(5e-4, (_HEAD, 1.0), (_LAST_BLOCK, 0.1), ('.*', 0.0)),
        **cosine(30, base=0.1),
      },
      NO_SECOND,
    ),
  },
  # Ours, as none was published: batch and rate are usual for faces, and the second
  # training otherwise follows `liu`.
  'ms1m_lt': {
    'ours': Protocol(
      {
        'batch': 512,
        'task': 'identification',
        'model': {'trunk_options': {'stem': 'small'}, 'projection': 512},
        'optimizer': _sgd(5e-4),
        'select': 'last',
        **steps(20, (10, 0.1), (16, 0.01)),
      },
      _second(steps(20, (10, 0.1), (16, 0.01))),
    ),
  },
  'imagenet': {'cui': _cui(0.2)},
  'inat': {
    'cui': _cui(0.4),
    # Kang et al., arXiv 1910.09217, the shorter of their two schedules.
    'kang': Protocol(
      {'batch': 512, 'optimizer': _sgd(1e-4), **cosine(90, base=0.2)},
      NO_SECOND,
    ),
  },
}
"""data set -> name of a protocol -> protocol."""


def _counts(
  classes: int,
  train: int,
  largest: int,
  smallest: int,
  *,
  val: int = 0,
  test: int = 0,
  **roles: int,
) -> dict[str, int]:
  """Returns what the source 'fake' needs to know about photographs."""
  return {
    'classes': classes,
    'train': train,
    'largest': largest,
    'smallest': smallest,
    'val': val,
    'test': test,
    **roles,
    'image_size': 0,
  }


class Photographs(NamedTuple):
  """A data set of photographs.

  Attributes:
    source: source of the images.
    net: the trunk.
    protocols: a key of `PHOTOGRAPHS`.
    fake: its counts, see `lt_jax.data.generated.sources`.
    meta: images per class of the meta set, for recipes that need one.
    data: other keys of `data`.
    own: overrides of recipes on this data set, whatever the protocol.
  """

  source: str
  net: str
  protocols: str
  fake: dict[str, int]
  meta: int
  data: Overrides
  own: Protocol


def _classifier(epochs: float) -> Overrides:
  """Number of epochs for the classifier alone, as in Kang et al."""
  return {
    'stages': {'classifier': {'epochs': epochs, 'schedule': {'end': epochs}}},
  }


def _episodes(**tasks: int) -> dict[str, Overrides]:
  """Few-shot tasks: six epochs of 4,000 each."""
  return {
    'generator': {'epochs': 6.0, 'streams': {'train': {**tasks, 'per_epoch': 4000}}}
  }


# As in the code of Li et al. (MetaSAug, CVPR 2021), which reproduces Jamal et al.
_META_HEAD: Overrides = {'stages': {'meta': {'method': {'meta_layers': 'head'}}}}


def _own(episodes: dict[str, Overrides | None], *, crt: float, lws: float) -> Protocol:
  """Returns the overrides of recipes on a data set, given the classifiers' epochs."""
  return Protocol(
    {},
    episodes,
    {
      'crt': _classifier(crt),
      'crt_las': _classifier(crt),
      'lws': _classifier(lws),
      'meta_ce': _META_HEAD,
      'meta_focal': _META_HEAD,
      'meta_ldam': _META_HEAD,
    },
  )


# As in the code of Gidaris and Komodakis (250 of 389 base classes, 1,500 and 750
# queries), but with numbers that eight devices divide.
_IMAGENET_LT = _own(
  _episodes(novel=248, queries_novel=1488, queries_base=752), crt=10.0, lws=5.0
)
_PLACES_LT = _own(
  _episodes(novel=80, queries_novel=480, queries_base=240), crt=10.0, lws=5.0
)
_INATURALIST = _own({'generator': None}, crt=30.0, lws=5.0)
_IMAGENET = _own({'generator': None}, crt=10.0, lws=5.0)
_MS1M_LT = _own({'generator': None}, crt=10.0, lws=5.0)


_FACES = {
  'image_size': 112,
  'resize': 112,
  'crop_area': 1.0,  # faces are aligned, so they are not cropped, only flipped
  'jitter': 0.0,
  'mean': (0.5,),
  'std': (0.5,),
  'many_shot': 20,
  'few_shot': 5,
}


_INAT = {
  'mean': (0.466, 0.471, 0.380),
  'std': (0.195, 0.194, 0.192),
  'jitter': 0.0,
  'test_split': 'val',
}


DATASETS = {
  'imagenet': Photographs(
    'tfds:imagenet2012',
    'resnet50',
    'imagenet',
    _counts(1000, 1281167, 1300, 732, val=50000),
    10,
    {'jitter': 0.0, 'test_split': 'val'},
    _IMAGENET,
  ),
  'imagenet_lt': Photographs(
    'tfds:imagenet_lt',
    'resnet10',
    'imagenet_lt',
    _counts(1000, 115846, 1280, 5, val=20000, test=50000),
    10,
    {'meta_split': 'val'},
    _IMAGENET_LT,
  ),
  'places_lt': Photographs(
    'list:Places_LT',
    'resnet152',
    'places_lt',
    _counts(365, 62500, 4980, 5, val=7300, test=36500),
    10,
    {'meta_split': 'val'},
    _PLACES_LT,
  ),
  'ms1m_lt': Photographs(
    'list:MS1M_LT',
    'resnet50',
    'ms1m_lt',
    _counts(74500, 887500, 598, 1, gallery=4000, probe=12000, distractors=20000),
    1,
    _FACES,
    _MS1M_LT,
  ),
  'inat18': Photographs(
    'tfds:i_naturalist2018',
    'resnet50',
    'inat',
    _counts(8142, 437513, 1000, 2, val=24426),
    2,
    _INAT,
    _INATURALIST,
  ),
  'inat17': Photographs(
    'tfds:i_naturalist2017',
    'resnet50',
    'inat',
    _counts(5089, 579184, 3919, 9, val=95986),
    5,
    _INAT,
    _INATURALIST,
  ),
}


def _meta_set(recipe: Recipe, dataset: Photographs) -> Overrides:
  """Returns the meta set of a recipe, reportedly as in Jamal et al.

  It comes from the validation images if there are any. Otherwise it comes from the
  training images, where it also stays, and one image per class is held out of training
  for selection.
  """
  kept = dataset.data.get('meta_split', 'train') == 'train'
  if 'meta' in recipe.needs:
    return {'meta_per_class': dataset.meta, 'meta_in_train': kept}
  return {'meta_per_class': 1} if kept and 'held_out' in recipe.needs else {}


def _for_net(protocol: Protocol, net: str) -> Protocol:
  """Returns a protocol whose rules for the last block match a trunk's last block."""
  training, last = protocol.training, f'block{_FEWER_BLOCKS.get(net, 3)}'
  rules = tuple(
    (pattern.replace('block3', last), scale)
    for pattern, scale in training['optimizer']['learning_rate_scale']
  )
  optimizer = {**training['optimizer'], 'learning_rate_scale': rules}
  return protocol._replace(training={**training, 'optimizer': optimizer})


def photographs_lt(arg: str | None, *, name: str, recipe: str = 'ce') -> ConfigDict:
  """Returns the config of long-tailed photographs; see configs/ for options.

  Args:
    arg: what follows the colon in --config.
    name: name of the config, a key of `DATASETS`.
    recipe: the default.
  """
  dataset = DATASETS[name]
  recipe, option = parse_arg(arg, recipe, protocol='', epochs=0.0, net=dataset.net)
  protocol = choose(PHOTOGRAPHS[dataset.protocols], option.protocol, recipe)
  config = apply(
    base_config(),
    {
      'name': name,
      'data': {
        'source': dataset.source,
        **_PHOTOGRAPHS,
        **dataset.data,
        **_meta_set(find(recipe), dataset),
        'fake': dataset.fake,
      },
      'model': {'trunk': option.net, 'batch_norm': 'per_device'},
      'eval_batch': 256,
      'save_every_epochs': 1.0,
      'evaluate_every_epochs': 1.0,
      'select': 'last' if dataset.data.get('test_split') == 'val' else 'val/accuracy',
    },
  )
  config.defer_epoch = config.get_ref('epochs') * (2 / 3)
  layers = dataset.own, _for_net(protocol, option.net)
  return train_by(config, recipe, *layers, epochs=option.epochs)
