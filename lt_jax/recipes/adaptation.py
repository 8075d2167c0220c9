"""Recipes of adaptation: from a labelled source to a target without labels.

They refer to roles, never to data sets. An adapted network is expected to fall between
`source_only` and `target_only`.
"""

import functools
from typing import Any

from ml_collections import ConfigDict

from lt_jax.config import Overrides
from lt_jax.recipes.parts import SHALLOW, Recipe, copy, shallow, target_stream


def aligned(config: ConfigDict, statistics: str = 'joint', **alignment: Any):
  """Training with one of the alignments."""
  return {
    **target_stream(config),
    'method': {'name': 'aligned', 'statistics': statistics},
    'alignment': {'align_on': ('features',), 'weight': ONE, **alignment},
  }


ONE = {'name': 'constant', 'weight': 1.0}

RISING = {'name': 'dann', 'gamma': 10.0, 'weight': 1.0}
"""Rises from 0 to 1 over the stage, as DANN's lambda does."""


def _player_like_network(config: ConfigDict, **network: Any) -> Overrides:
  """A player with the same kind of optimiser and learning rates as the network."""
  optimizer = {
    key: value
    for key, value in config.optimizer.items()
    if key
    not in (
      'weight_decay',
      'learning_rate_scale',
    )  # these are rules for the network's paths
  }
  return {
    'network': network,
    'optimizer': optimizer,
    'schedule': {key: config.schedule.get_ref(key) for key in config.schedule},
  }


def adversarial(
  config: ConfigDict, name: str, hidden: tuple[int, ...], layer: str
) -> Overrides:
  """Adversarial training against a discriminator that reads one layer.

  It has the same kind of optimiser and learning rates as the network, as in DANN's
  paper, where one optimiser updates both.
  """
  discriminator = _player_like_network(config, name='mlp', hidden=hidden)
  return {
    **target_stream(config),
    'method': {'name': name, 'statistics': 'joint'},
    'alignment': {'name': 'none', 'align_on': (layer,), 'weight': RISING},
    'players': {'discriminator': discriminator},
  }


def self_supervised(config: ConfigDict, layer: str, **labels: int) -> Overrides:
  """Linear heads on a layer that predict how an image was transformed."""
  return {
    **target_stream(config),
    'method': {
      'name': 'self_supervised',
      'order': 'alternating',
      'statistics': 'joint',
    },
    'alignment': {'name': 'none', 'align_on': (layer,), 'weight': ONE},
    'players': {
      task: _player_like_network(config, name='linear', num_classes=number)
      for task, number in labels.items()
    },
  }


def _i2i(config: ConfigDict) -> Overrides:
  """Translation through shared features, with all its loss terms.

  Adam updates the decoders and the image discriminators. The weights were chosen by
  accuracy on the source's digits, with one run each.
  """
  judge, draw = {'name': 'image_discriminator'}, {'name': 'decoder'}
  networks = {
    'source_decoder': draw,
    'target_decoder': draw,
    'source_images': judge,
    'target_images': judge,
  }
  adam = {
    'optimizer': {'name': 'adam', 'b1': 0.5},
    'schedule': {'name': 'constant', 'base': 1e-3},
  }
  players = {name: {'network': {**net}, **adam} for name, net in networks.items()}
  players['discriminator'] = _player_like_network(config, name='mlp', hidden=(100,))
  weights = {'identity': 1.0, 'images': 0.1, 'cycle': 1.0, 'translated': 0.1}
  return {
    **target_stream(config),
    'method': {'name': 'i2i', **weights},
    'alignment': {'name': 'none', 'align_on': ('conv',), 'weight': RISING},
    'players': players,
  }


def _pseudo_label(config: ConfigDict) -> Overrides:
  """The source alone, then also the target images predicted with confidence."""
  self_training = {
    **target_stream(config),
    'method': {'name': 'pseudo_label', 'statistics': 'joint'},
    'alignment': {'weight': ONE},
    'surgeries': (copy('net/.*', 'source'), ('class_thresholds', {'portion': 0.2})),
  }
  return after_source('self_training', self_training)


def _adda(
  config: ConfigDict,
  *,
  layer: str,
  rate: float,
  b1: float = 0.9,
  classifier: float = 1.0,
  threshold: float = 0.0,
) -> Overrides:
  """Training on the source, then training a copy of its network for the target.

  Validation images come from the source, where the copy is best before it has moved, so
  the second stage keeps its last State. The discriminator has the size used for this
  step in OCDA's code.

  Args:
    config: config of the first stage; the second is just as long.
    layer: what the discriminator reads.
    rate: learning rate of both players in the second stage.
    b1: option of Adam, which updates both.
    classifier: factor on the head's rate; 0 freezes it.
    threshold: option of the method.
  """
  adam = {'name': 'adam', 'b1': b1}
  schedule = ConfigDict({'name': 'constant', 'base': rate})
  adapt = {
    **target_stream(config),
    'method': {'name': 'adda', 'threshold': threshold},
    'alignment': {'align_on': (layer,)},
    'players': {
      'discriminator': {
        'network': {'name': 'mlp', 'hidden': (500, 500)},
        'optimizer': adam,
        'schedule': {'name': 'constant', 'base': schedule.get_ref('base')},
      }
    },
    'optimizer': {
      **adam,
      'learning_rate_scale': (('net/head/.*', classifier), ('.*', 1.0)),
    },
    'schedule': schedule,
    'select': 'last',
    'surgeries': (
      copy('net/.*', 'pretrain'),
      copy('source_net/(.*)', 'pretrain', source=r'net/\1'),
    ),
  }
  return {
    'stages': {'pretrain': {}, 'adapt': adapt},
    'stage_order': ('pretrain', 'adapt'),
  }


def after_source(name: str, stage: Overrides) -> Overrides:
  """The config's own training on the source, followed by another stage."""
  return {'stages': {'source': {}, name: stage}, 'stage_order': ('source', name)}


def subspaces(
  classifier: str = 'linear_svm', choose_by: str = 'source', **stage: Any
) -> Overrides:
  """The stage that aligns subspaces, on features of the stage 'source'.

  Args:
    classifier: a key of `parts.SHALLOW`, fitted to the source in the aligned subspace.
    choose_by: option of the surgery 'align_subspaces'.
    **stage: further overrides of the stage.
  """
  judge = SHALLOW[classifier]['judge']
  align = 'align_subspaces', {'choose_by': choose_by, 'classifier': judge}
  return (
    _without_standardising(shallow(classifier, 'source', align, aligned_subspaces={}))
    | stage
  )


def coral_shallow(classifier: str = 'linear_svm') -> Overrides:
  """The stage that applies CORAL to features of the stage 'source'."""
  return _without_standardising(
    shallow(classifier, 'source', ('coral', {}), aligned_features={})
  )


def _without_standardising(stage: Overrides) -> Overrides:
  """The stage with an SVM that does not standardise: a map has mixed the features."""
  surgeries = tuple(
    (name, {**options, 'standardise': False} if name == 'linear_svm' else options)
    for name, options in stage['surgeries']
  )
  return stage | {'surgeries': surgeries}


def _ada_bn(config: ConfigDict) -> Overrides:
  """The source's network, with the target's batch statistics for the target."""
  return {
    **target_stream(config),
    'method': {'name': 'aligned', 'statistics': 'domain_specific'},
    'epochs': 0.0,
    'surgeries': (
      copy('net/.*', 'source'),
      copy('net_source/(.*)', 'source', source=r'net/\1'),
      ('recalibrate', {'split': 'target/train'}),
    ),
  }


def _finetune_target(config: ConfigDict, images: int) -> Overrides:
  """The source's network, fine-tuned on a few labelled images of the target.

  They are taken out of its unlabelled images. The hundred epochs at a tenth of the rate
  are our choice.

  Args:
    config: config of the first stage.
    images: labelled images per class.
  """
  finetune = {
    'streams': {'train': {'domain': 'target', 'split': 'meta', 'labels': True}},
    'batch': min(config.batch, 10 * images),  # as many as ten classes have
    'epochs': 100.0,
    'save_every_epochs': 50.0,
    'evaluate_every_epochs': 50.0,
    'schedule': {'name': 'constant', 'base': config.schedule.get_ref('base') * 0.1},
    'surgeries': (copy('net/.*', 'source'),),
  }
  labelled = {name: {'meta_per_class': images} for name in config.target}
  return {'domains': labelled, **after_source('finetune', finetune)}


ORACLE = {'streams': {'train': {'domain': 'target', 'labels': True}}}
"""For a stage without steps: its surgeries see the target's labels."""


RECIPES: dict[str, Recipe] = {
  'source_only': Recipe(lambda config: {}, needs=('target',)),
  'target_only': Recipe(
    lambda config: {'streams': {'train': {'domain': 'target', 'labels': True}}},
    needs=('target',),
  ),
  **{
    f'finetune_target_{images}': Recipe(
      functools.partial(_finetune_target, images=images), needs=('target',)
    )
    for images in (1, 5, 10)
  },
  'ada_bn': Recipe(
    lambda config: after_source('ada_bn', _ada_bn(config)), needs=('target',)
  ),
  'sa': Recipe(lambda config: after_source('sa', subspaces()), needs=('target',)),
  'sa_oracle': Recipe(
    lambda config: after_source('sa', subspaces(choose_by='oracle', **ORACLE)),
    needs=('target',),
  ),
  'coral_shallow': Recipe(
    lambda config: after_source('coral', coral_shallow()), needs=('target',)
  ),
  'dann': Recipe(
    lambda config: adversarial(config, 'dann', (100,), 'conv'), needs=('target',)
  ),
  'cdan': Recipe(
    lambda config: adversarial(config, 'cdan', (500, 500), 'features'),
    needs=('target',),
  ),
  'mcd': Recipe(
    lambda config: {
      **target_stream(config),
      'method': {'name': 'mcd', 'inner_steps': 4},
    },
    needs=('target',),
  ),
  'adda': Recipe(
    lambda config: _adda(config, layer='features', rate=2e-4, b1=0.5, classifier=0.0),
    needs=('target',),
  ),
  'adda_cycada': Recipe(
    lambda config: _adda(config, layer='logits', rate=1e-5, threshold=0.6),
    needs=('target',),
  ),
  'deep_coral': Recipe(
    lambda config: aligned(config, name='coral', align_on=('logits',)),
    needs=('target',),
  ),
  'cmd': Recipe(
    lambda config: aligned(config, name='central_moments'), needs=('target',)
  ),
  'dan': Recipe(
    lambda config: aligned(
      config, name='mmd', align_on=('fc1', 'features', 'logits'), weight=RISING
    ),
    needs=('target',),
  ),
  'jan': Recipe(
    lambda config: aligned(config, name='joint_mmd', weight=RISING),
    needs=('target',),
  ),
  'entropy': Recipe(
    lambda config: aligned(config, name='entropy', weight={**ONE, 'weight': 0.1}),
    needs=('target',),
  ),
  'mcc': Recipe(lambda config: aligned(config, name='mcc'), needs=('target',)),
  'pseudo_label': Recipe(_pseudo_label, needs=('target',)),
  'i2i': Recipe(_i2i, needs=('target',)),
  'fda': Recipe(
    lambda config: {**target_stream(config), 'wrappers': {'fda': {'beta': 0.09}}},
    needs=('target',),
  ),
  'self_supervised': Recipe(
    lambda config: self_supervised(config, 'conv', digit_rotation=4), needs=('target',)
  ),
  'self_supervised_photos': Recipe(
    lambda config: self_supervised(config, 'features', rotation=4, location=4, flip=2),
    needs=('target',),
  ),
}
