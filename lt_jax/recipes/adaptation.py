"""Recipes of adaptation: from a labelled source to a target without labels.

They name roles, never data sets. `source_only` and `target_only` are the two ends
between which an adapted network is expected.
"""

from typing import Any

from ml_collections import ConfigDict

from lt_jax.config import Overrides
from lt_jax.recipes.parts import Recipe, copy


def _target(config: ConfigDict) -> Overrides:
  """Images of the target beside every batch of the source, as many of them."""
  stream = {
    'domain': 'target',
    'split': 'train',
    'labels': False,
    'batch': config.get_ref('batch'),
  }
  return {'streams': {'target': stream}}


def _aligned(config: ConfigDict, statistics: str = 'joint', **alignment: Any):
  """The one method of alignments, with one of them."""
  return {
    **_target(config),
    'method': {'name': 'aligned', 'statistics': statistics},
    'alignment': {'align_on': ('features',), 'weight': ONE, **alignment},
  }


ONE = {'name': 'constant', 'weight': 1.0}

RISING = {'name': 'dann', 'gamma': 10.0, 'weight': 1.0}
"""From 0 to 1 as DANN's lambda rises, by the progress of the stage."""


def _judged(
  config: ConfigDict, name: str, hidden: tuple[int, ...], layer: str
) -> Overrides:
  """Adversarial training against a discriminator that reads one layer.

  It has the kind of optimiser and the learning rates of the network, as in DANN's
  paper, where one optimiser moves both.
  """
  optimizer = {
    key: value
    for key, value in config.optimizer.items()
    if key not in ('weight_decay', 'learning_rate_scale')  # rules for other paths
  }
  discriminator = {
    'network': {'name': 'mlp', 'hidden': hidden},
    'optimizer': optimizer,
    'schedule': {key: config.schedule.get_ref(key) for key in config.schedule},
  }
  return {
    **_target(config),
    'method': {'name': name, 'statistics': 'joint'},
    'alignment': {'name': 'none', 'align_on': (layer,), 'weight': RISING},
    'players': {'discriminator': discriminator},
  }


def _adda(
  config: ConfigDict,
  *,
  layer: str,
  rate: float,
  b1: float = 0.9,
  classifier: float = 1.0,
  threshold: float = 0.0,
) -> Overrides:
  """A training on the source, then one of a copy of its network for the target.

  Validation images are of the source, on which the copy is best before it has moved: so
  the second stage takes its last State. The discriminator is of the size that it has in
  OCDA's code of the same step.

  Args:
    config: of the first stage, which the second is as long as.
    layer: what the discriminator reads.
    rate: learning rate of both players of the second stage.
    b1: of Adam, by which they move.
    classifier: multiple of the rate for the head; 0 freezes it.
    threshold: option of the method.
  """
  adam = {'name': 'adam', 'b1': b1}
  schedule = ConfigDict({'name': 'constant', 'base': rate})
  adapt = {
    **_target(config),
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


RECIPES: dict[str, Recipe] = {
  'source_only': Recipe(lambda config: {}, needs=('target',)),
  'target_only': Recipe(
    lambda config: {'streams': {'train': {'domain': 'target', 'labels': True}}},
    needs=('target',),
  ),
  'dann': Recipe(
    lambda config: _judged(config, 'dann', (100,), 'conv'), needs=('target',)
  ),
  'cdan': Recipe(
    lambda config: _judged(config, 'cdan', (500, 500), 'features'), needs=('target',)
  ),
  'mcd': Recipe(
    lambda config: {**_target(config), 'method': {'name': 'mcd', 'inner_steps': 4}},
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
    lambda config: _aligned(config, name='coral', align_on=('logits',)),
    needs=('target',),
  ),
  'dan': Recipe(
    lambda config: _aligned(
      config, name='mmd', align_on=('fc1', 'features', 'logits'), weight=RISING
    ),
    needs=('target',),
  ),
  'jan': Recipe(
    lambda config: _aligned(config, name='joint_mmd', weight=RISING),
    needs=('target',),
  ),
  'entropy': Recipe(
    lambda config: _aligned(config, name='entropy', weight={**ONE, 'weight': 0.1}),
    needs=('target',),
  ),
  'mcc': Recipe(lambda config: _aligned(config, name='mcc'), needs=('target',)),
}
