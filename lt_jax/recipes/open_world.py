"""Recipes of open long-tailed recognition, and the baselines in its tables."""

from typing import Any

from ml_collections import ConfigDict

from lt_jax.config import Overrides
from lt_jax.recipes.parts import (
  ALL_BUT_HEAD,
  CLASS_AWARE,
  TENTH_BUT_HEAD,
  Recipe,
  copy,
  selected,
  then,
)


def _class_aware(**second: Any) -> Overrides:
  """A second training from the first one's weights, on class-aware batches."""
  return {
    **CLASS_AWARE,
    'optimizer': {'learning_rate_scale': TENTH_BUT_HEAD},
    'surgeries': (copy('.*', 'plain'),),
    **second,
  }


def _oltr(config: ConfigDict) -> Overrides:
  """OLTR: plain training, then attention and a memory of class centroids."""
  projected = config.model.projection  # the first stage has it too: copy it
  memory = _class_aware(
    method={'name': 'oltr', 'weight': 0.01, 'form': 'released'},
    model={
      **CLASS_AWARE['model'],
      'attention': True,
      'projection': projected or -1,
      'head': 'meta_embedding',
    },
    surgeries=(
      copy('net/(trunk|projection)/.*' if projected else 'net/trunk/.*', 'plain'),
      copy('net/head/hallucinator/(.*)', 'plain', source=r'net/head/\1'),
      ('class_means', {}),
    ),
  )
  return then(config, 'plain', ('memory', memory))


def _two_trainings(config: ConfigDict, **second: Any) -> Overrides:
  return then(config, 'plain', ('aware', _class_aware(**second)))


def _openmax(config: ConfigDict) -> Overrides:
  """OpenMax on the network trained with the range loss."""
  posthoc = {
    'epochs': 0.0,
    'wrappers': {'openmax': {'alpha': 10}},
    'surgeries': (copy('.*', 'aware'), ('fit_openmax', {'tail': 20})),
  }
  aware = _class_aware(penalty=RANGE)
  return then(config, 'plain', ('aware', aware), ('openmax', posthoc))


LIFTED = {'name': 'lifted', 'weight': 0.1}


RANGE = {'name': 'range', 'weight': 1.0}


def _fslwf(config: ConfigDict) -> Overrides:
  """Few-shot learning without forgetting: many-shot classes are base, others novel."""
  shared = {'shot_groups': ('many',), 'model': {'head': 'cosine_bias'}}
  generator = {
    'method': {'name': 'weight_generator', 'dropout': 0.5, 'gamma': 10.0},
    'streams': {
      'train': {
        'name': 'episodes',
        'stage': 'base',
        'per_epoch': 100,
        'novel': 2,
        'queries_novel': 32,
        'queries_base': 32,
      }
    },
    'epochs': 5.0,
    'optimizer': {
      'nesterov': True,
      'learning_rate_scale': ((ALL_BUT_HEAD, 0.0), ('.*', 1.0)),
    },
    'schedule': {
      'name': 'step_decay',
      'base': 0.01,
      'boundaries': (4.0,),
      'factors': (0.1,),
    },
    'select': 'last',
    'surgeries': (copy('net/.*', 'base'),),
  }
  novel = {
    'epochs': 0.0,
    'surgeries': (
      copy('net/.*', 'generator'),
      ('novel_classifiers', {'stage': 'generator'}),
    ),
  }
  return {
    'stages': {
      # Selected by the many-shot classes, the only ones it has learned.
      'base': {**shared, **selected(config, 'many'), 'save_outputs': ('features',)},
      'generator': {**shared, **generator},
      'novel': {**shared, **novel},
    },
    'stage_order': ('base', 'generator', 'novel'),
  }


RECIPES: dict[str, Recipe] = {
  'oltr': Recipe(_oltr),
  'ce_aware': Recipe(_two_trainings),
  'focal_aware': Recipe(
    lambda config: _two_trainings(config, loss={'name': 'softmax_focal', 'gamma': 2.0})
  ),
  'lifted': Recipe(lambda config: _two_trainings(config, penalty=LIFTED)),
  'range': Recipe(lambda config: _two_trainings(config, penalty=RANGE)),
  'openmax': Recipe(_openmax),
  'fslwf': Recipe(_fslwf),
}
