"""Recipes of domain adaptation: they name roles, never data sets."""

from ml_collections import ConfigDict

from lt_jax.config import Overrides
from lt_jax.recipes.parts import Recipe


def _target(config: ConfigDict) -> Overrides:
  """A second stream: images of the target, without their labels."""
  row = {'domain': 'target', 'split': 'train', 'batch': config.batch, 'labels': False}
  return {'streams': {'target': row}}


def _aligned(config: ConfigDict, **alignment: object) -> Overrides:
  """A loss on the source and an alignment with the target, which grows in."""
  return {
    **_target(config),
    'method': {'name': 'aligned', 'statistics': 'separate'},
    'alignment': {'align_on': ('features',), **alignment},
  }


def _grows(weight: float) -> Overrides:
  """DANN's schedule of a weight: from 0 to itself as training goes on."""
  return {'name': 'dann', 'gamma': 10.0, 'weight': weight}


def _dann(config: ConfigDict) -> Overrides:
  """DANN: the discriminator is trained as the network is, on its named layer."""
  discriminator = {
    'network': {'name': 'mlp', 'hidden': (100,)},
    'optimizer': config.optimizer.to_dict(),
    'schedule': config.schedule.to_dict(),
  }
  return {
    **_target(config),
    'method': {'name': 'dann', 'statistics': 'separate'},
    'alignment': {'align_on': config.alignment.align_on, 'weight': _grows(1.0)},
    'players': {'discriminator': discriminator},
  }


RECIPES: dict[str, Recipe] = {
  'source_only': Recipe(lambda config: {}, needs=('target',)),
  'target_only': Recipe(
    lambda config: {'streams': {'train': {'domain': 'target', 'labels': True}}},
    needs=('target',),
  ),
  'dann': Recipe(_dann, needs=('target',)),
  'deep_coral': Recipe(
    lambda config: _aligned(config, name='coral', weight=_grows(1.0)),
    needs=('target',),
  ),
  'dan': Recipe(
    lambda config: _aligned(config, name='mmd', weight=_grows(1.0)), needs=('target',)
  ),
  'entropy': Recipe(
    lambda config: _aligned(config, name='entropy', weight=_grows(0.1)),
    needs=('target',),
  ),
  'mcc': Recipe(
    lambda config: _aligned(config, name='mcc', weight=_grows(1.0)), needs=('target',)
  ),
}
