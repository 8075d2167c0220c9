"""Recipes that learn example weights from a balanced meta set, and their controls."""

from typing import Any

from ml_collections import ConfigDict

from lt_jax.config import Overrides
from lt_jax.recipes.parts import Recipe, effective, margin

META = {
  'route': 'jvp',
  'virtual': 'sgd',
  'meta_layers': 'all',
  'low_memory': False,
}
"""Options shared by all methods that learn example weights."""


def meta_row(config: ConfigDict) -> Overrides:
  """A second stream: batches of the balanced meta set."""
  return {'meta': {'split': 'meta', 'batch': config.batch, 'every': 1}}


def reweight(**options: Any) -> Overrides:
  """The method whose example weights are a prior and a learned epsilon."""
  return {
    'name': 'meta_reweight',
    'eps_lr': 0.01,
    'eps_scale': 'absolute',
    'form': 'additive',
    'prior': 'class_weights',
    'clip': False,
    'normalise': False,
    **META,
    **options,
  }


def _l2rw(config: ConfigDict) -> Overrides:
  """Learning to Reweight; its logs compare the weights with the class weights."""
  return {
    'method': reweight(prior='none', clip=True, normalise=True, eps_lr=1.0),
    'class_weights': effective(),
    'streams': meta_row(config),
  }


def _mwn(config: ConfigDict) -> Overrides:
  """Meta-Weight-Net, with the optimiser of the authors' class-imbalance code."""
  method = {'name': 'meta_weight_net', 'normalise': True, 'detach': False, **META}
  weight_net = {
    'network': {'name': 'weight_net', 'hidden': 100},
    'optimizer': {
      'name': 'sgd',
      'momentum': 0.9,
      'nesterov': True,
      'weight_decay': (('.*', 5e-4),),
    },
    'schedule': {'name': 'constant', 'base': 1e-5},
  }
  return {
    'method': method,
    'players': {'weight_net': weight_net},
    'streams': meta_row(config),
  }


def two_stages(config: ConfigDict, second: Overrides) -> Overrides:
  """Training without weights up to `defer_epoch`, then the same run with changes."""
  resume = (
    ('copy', {'pattern': '.*', 'stage': 'pretrain'}),
    ('carry', {'fields': ('opt', 'step'), 'stage': 'pretrain'}),
  )
  return {
    'stages': {
      # The last State, because the clock resumes there.
      'pretrain': {'epochs': config.get_ref('defer_epoch'), 'select': 'last'},
      'meta': {'class_weights': effective(), 'surgeries': resume, **second},
    },
    'stage_order': ('pretrain', 'meta'),
  }


def _jamal(config: ConfigDict) -> Overrides:
  """Meta class-weights (Jamal et al.): pre-training, then learned weights."""
  return two_stages(config, {'method': reweight(), 'streams': meta_row(config)})


def _finetune(config: ConfigDict) -> Overrides:
  """Cross-entropy, then a short training on the balanced meta set alone."""
  rate = config.schedule.get_ref('base') * 0.01
  second = {
    'streams': {'train': {'split': 'meta'}},
    'epochs': 100.0,
    'schedule': {'name': 'constant', 'base': rate},
    'surgeries': (('copy', {'pattern': '.*', 'stage': 'train'}),),
  }
  return {
    'stages': {'train': {}, 'finetune': second},
    'stage_order': ('train', 'finetune'),
  }


RECIPES: dict[str, Recipe] = {
  'l2rw': Recipe(_l2rw, paper='ren', needs=('meta',)),
  'mwn': Recipe(_mwn, paper='shu', needs=('meta',)),
  'meta_ce': Recipe(_jamal, paper='jamal', needs=('meta',)),
  'meta_focal': Recipe(
    lambda config: {
      'loss': {'name': 'softmax_focal', 'gamma': 1.0},
      **_jamal(config),
    },
    paper='jamal',
    needs=('meta',),
  ),
  'meta_ldam': Recipe(
    lambda config: margin('ldam') | _jamal(config), paper='jamal', needs=('meta',)
  ),
  'meta_ce_control': Recipe(
    lambda config: two_stages(config, {}), paper='jamal', needs=('meta',)
  ),
  'cb_finetune': Recipe(_finetune, paper='jamal', needs=('meta',)),
  'ce_plus_meta': Recipe(
    lambda config: {'data': {'meta_in_train': True}}, paper='jamal', needs=('meta',)
  ),
}
