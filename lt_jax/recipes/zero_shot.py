"""Recipes of zero-shot learning: classes with a description but no images.

Hyper-parameters and gamma are chosen on validation classes, with a network that has not
seen them: if there is anything to train, a stage 'validate' trains it without these
classes. The last stage has no steps.
"""

from typing import Any

from ml_collections import ConfigDict

from lt_jax.config import Overrides
from lt_jax.recipes import adaptation, segmentation
from lt_jax.recipes.parts import (
  ALL_BUT_HEAD,
  CLASS_AWARE,
  Recipe,
  copy,
  target_stream,
)

VALIDATE: Overrides = {'shot_groups': ('fitted',)}
"""Trains on the seen classes without the validation classes."""


def _stacked(*values: str) -> Overrides:
  return {'calibrated_stacking': {'values': values}}


def _closed_form(form: str, head: str, *values: str, **options: Any) -> Recipe:
  """Returns the recipe for a closed form.

  Args:
    form: the method.
    head: the head it fits.
    *values: its hyper-parameters, reported in the result.
    **options: options of the head, and 'most' of the surgery.
  """
  most = options.pop('most', 0)

  def overrides(config: ConfigDict) -> Overrides:
    held_out = 'val' if config.data.val_per_class else ''
    fit = {'form': form, 'held_out': held_out, 'most': most}
    last = {
      'epochs': 0.0,
      'model': {'head': head, 'head_options': options},
      'wrappers': _stacked(*values),
      'select': 'last',
    }
    if config.model.trunk == 'identity':  # fixed features, no trunk to train
      return {
        'stages': {'fit': {**last, 'surgeries': (('closed_form', fit),)}},
        'stage_order': ('fit',),
      }
    fit = 'closed_form', {**fit, 'search': 'validate'}
    return {
      'stages': {
        'validate': VALIDATE,
        'train': {},
        'fit': {**last, 'surgeries': (copy(ALL_BUT_HEAD, 'train'), fit)},
      },
      'stage_order': ('validate', 'train', 'fit'),
    }

  return Recipe(overrides, needs=('class_vectors',))


def _trained(loss: Overrides, head: str, **options: Any) -> Recipe:
  """Returns the recipe for a method that is trained with a loss.

  Args:
    loss: name and options of the loss.
    head: head of the network.
    **options: options of the head.
  """

  def overrides(config: ConfigDict) -> Overrides:
    del config
    last = {
      'epochs': 0.0,
      'wrappers': _stacked(),
      'select': 'last',
      'surgeries': (copy('net/.*', 'train'), ('choose_gamma', {'stage': 'validate'})),
    }
    return {
      'loss': loss,
      'model': {'head': head, 'head_options': options},
      'stages': {'validate': VALIDATE, 'train': {}, 'calibrated': last},
      'stage_order': ('validate', 'train', 'calibrated'),
    }

  return Recipe(overrides, needs=('class_vectors',))


def _generate(config: ConfigDict) -> Overrides:
  """A stage that trains generator and head, with rates chosen on validation classes."""
  schedule = {'name': 'cosine', 'base': 3e-3, 'end': config.get_ref('epochs')}
  player = {
    'network': {'name': 'generator', 'hidden': (256,)},
    'optimizer': {'name': 'adam'},
    'schedule': schedule,
  }
  return {
    'method': {'name': 'feature_generator'},
    'players': {'generator': player},
    'optimizer': {'name': 'adam'},
    'schedule': schedule,
  }


def _feature_generator(config: ConfigDict) -> Overrides:
  """A feature generator and a linear head, on a trunk that is trained first.

  With fixed features there is no trunk, and no stage for it.
  """
  generate = {**_generate(config), 'sampler': CLASS_AWARE['sampler']}
  stages: dict[str, Overrides] = {}
  for name, trunk, own in (
    ('validate', 'validate_trunk', VALIDATE),
    ('train', 'trunk', {}),
  ):
    taken = {}
    if config.model.trunk != 'identity':
      stages[trunk] = dict(own)
      taken = {'surgeries': (copy(ALL_BUT_HEAD, trunk),)}
    stages[name] = {**generate, **own, **taken}
  stages['calibrated'] = {
    'epochs': 0.0,
    'wrappers': _stacked(),
    'select': 'last',
    'surgeries': (copy('net/.*', 'train'), ('choose_gamma', {'stage': 'validate'})),
  }
  return {'stages': stages, 'stage_order': tuple(stages)}


def _pixels(
  config: ConfigDict, *, first: Overrides | None = None, learns_from: str = ''
) -> Overrides:
  """Trains on pixels, then generates unseen features, then may train on its own labels.

  There is no gamma: label maps have no validation classes.

  Args:
    config: the config.
    first: the training of the network; by default the config's own.
    learns_from: 'source' or 'target', the domain whose pixels get the network's most
      confident labels of each class; empty for none. These labels are fixed: if they
      were renewed as the network changes, those of unseen classes would die out.
  """
  stages: dict[str, Overrides] = {
    'train': first or {},
    'generate': {
      **_generate(config),
      'surgeries': (copy(ALL_BUT_HEAD, 'train'),),
      'select': 'last',
    },
  }
  if learns_from:
    saved = 'top_of_class' if learns_from == 'source' else 'target/train/top_of_class'
    stages['generate']['save_outputs'] = (saved,)
    read = {'stage': 'generate', 'arrays': {'pseudo_label': 'top_of_class'}}
    stages['self_training'] = {
      **target_stream(config, domain=learns_from, **read),
      'shot_groups': ('seen', 'unseen'),
      'epochs': config.get_ref('epochs') * 0.5,
      'schedule': {'name': 'constant', 'base': config.schedule.get_ref('base') * 0.1},
      'method': {
        'name': 'saved_label',
        'statistics': 'separate',
        'only_unseen': learns_from == 'source',
      },
      'alignment': {'weight': adaptation.ONE},
      'surgeries': (copy('net/.*', 'generate'),),
      'select': 'last',
    }
  return {'model': {'head': 'linear'}, 'stages': stages, 'stage_order': tuple(stages)}


def _boundless(config: ConfigDict) -> Overrides:
  """Adversarial training towards the target, then `_pixels` with labels on the target.

  The first stage doesn't mask the logits of unseen classes but trains them as wrong
  answers, so that what the discriminator sees of them is meaningful.
  """
  aligned = segmentation.RECIPES['advent'].overrides(config)
  return _pixels(
    config,
    first={**aligned, 'shot_groups': ('seen', 'unseen')},
    learns_from='target',
  )


def _zsda(config: ConfigDict) -> Overrides:
  """Two towers with DANN, then training on confident target predictions of each class.

  The target has images of seen and unseen classes. The labels come from the calibrated
  network, so that unseen classes get some, and are fixed.
  """
  aligned = adaptation.RECIPES['dann'].overrides(config)
  gamma = ('choose_gamma', {'stage': 'validate'})
  calibrated = {
    'epochs': 0.0,
    'wrappers': _stacked(),
    'select': 'last',
    'surgeries': (copy('net/.*', 'align'), gamma),
    'save_outputs': ('target/train/top_of_class',),
  }
  target = aligned['streams']['target']
  refine = {
    'shot_groups': ('seen', 'unseen'),
    'epochs': config.get_ref('epochs') * 0.5,
    'schedule': {'name': 'constant', 'base': config.schedule.get_ref('base') * 0.1},
    'method': {'name': 'saved_label', 'statistics': 'joint'},
    'streams': {
      'target': {
        **target,
        'stage': 'calibrated',
        'arrays': {'pseudo_label': 'top_of_class'},
      }
    },
    'alignment': {'weight': adaptation.ONE},
    'wrappers': _stacked(),
    'select': 'last',
    'surgeries': (
      copy('net/.*', 'calibrated'),
      ('carry', {'fields': ('memory',), 'stage': 'calibrated'}),
    ),
  }
  return {
    'model': {'head': 'two_tower', 'head_options': {'temperature': 0.1}},
    'stages': {
      'validate': {**aligned, **VALIDATE},
      'align': aligned,
      'calibrated': calibrated,
      'refine': refine,
    },
    'stage_order': ('validate', 'align', 'calibrated', 'refine'),
  }


SQUARED_DISTANCE = {'name': 'negative_score'}

RECIPES: dict[str, Recipe] = {
  'eszsl': _closed_form('eszsl', 'compatibility', 'g', 'l'),
  'kernel_eszsl': _closed_form(
    'kernel_eszsl', 'kernel_compatibility', 'width', 'g', 'l', most=4000
  ),
  'sae': _closed_form('sae', 'compatibility', 'weight', similarity='attributes'),
  'sae_features': _closed_form(
    'sae_features', 'compatibility', 'weight', similarity='features'
  ),
  'dap': _closed_form('dap', 'attributes', 'penalty', rule='dap'),
  'nearest_hamming': _closed_form(
    'nearest_hamming', 'attributes', 'penalty', rule='hamming'
  ),
  'nearest_attributes': _closed_form(
    'nearest_cosine', 'attributes', 'penalty', rule='cosine'
  ),
  'iap': _closed_form('iap', 'seen_classes', 'penalty', rule='iap', most=4000),
  'conse': _closed_form(
    'conse', 'seen_classes', 'penalty', rule='conse', top=10, most=4000
  ),
  'devise': _trained({'name': 'devise', 'margin': 0.1}, 'compatibility'),
  'sje': _trained({'name': 'sje', 'margin': 1.0}, 'compatibility'),
  'ale': _trained({'name': 'ale', 'margin': 1.0}, 'compatibility'),
  'two_tower': _trained({'name': 'cross_entropy'}, 'two_tower', temperature=0.1),
  'two_tower_distance': _trained(
    SQUARED_DISTANCE, 'two_tower', fixed='classes', distance=True
  ),
  'feature_generator': Recipe(_feature_generator, needs=('class_vectors',)),
  'zero_shot_pixels': Recipe(_pixels, needs=('class_vectors', 'pixels')),
  'zero_shot_pixels_self_training': Recipe(
    lambda config: _pixels(config, learns_from='source'),
    needs=('class_vectors', 'pixels'),
  ),
  'boundless': Recipe(_boundless, needs=('target', 'class_vectors', 'pixels')),
  'zsda': Recipe(_zsda, needs=('target', 'class_vectors')),
}
