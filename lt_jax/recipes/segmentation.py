"""Adaptation recipes for segmentation: by entropy, adversarially, or with a teacher.

Loss weights are ADVENT's, for images of a million pixels and 19 classes.
If the network has an auxiliary output (`model.head_options.auxiliary`), it is adapted
too.
"""

from typing import Any

from ml_collections import ConfigDict

from lt_jax.config import Overrides
from lt_jax.recipes.parts import Recipe, copy, target_stream


def _on_logits(config: ConfigDict, name: str, **options: Any) -> Overrides:
  """An alignment of the logits, and of auxiliary logits if there are any."""
  auxiliary = config.model.head_options.get('auxiliary')
  layers = ('logits', 'auxiliary_logits') if auxiliary else ('logits',)
  weight = {'name': 'constant', 'weight': 1e-3}
  return {'name': name, 'align_on': layers, 'weight': weight, **options}


def _minent(config: ConfigDict, **options: Any) -> Overrides:
  """Minimises the entropy of the target's pixels."""
  return {
    **target_stream(config),
    'method': {'name': 'aligned', 'statistics': 'separate'},
    'alignment': _on_logits(config, 'minent', **options),
  }


def _advent(
  config: ConfigDict, *, shown: str = 'self_information', alignment: str = 'none'
) -> Overrides:
  """One discriminator per layer of logits; its rate decays as the network's does."""
  align = _on_logits(config, alignment)
  schedule = {key: config.schedule.get_ref(key) for key in config.schedule}
  judges = ('discriminator', 'auxiliary_discriminator')[: len(align['align_on'])]
  players = {
    judge: {
      'network': {'name': 'patch_discriminator', 'width': 64},
      'optimizer': {'name': 'adam', 'b1': 0.9, 'b2': 0.99},
      'schedule': {**schedule, 'base': 1e-4},
    }
    for judge in judges
  }
  return {
    **target_stream(config),
    'method': {'name': 'advent', 'statistics': 'separate', 'shown': shown},
    'alignment': align,
    'players': players,
  }


def _average(config: ConfigDict) -> Overrides:
  """AdvEnt, MinEnt on the most uncertain pixels, and the average of their logits.

  The stage 'begin' has the first weights, from which both are trained.
  """
  begun = {'surgeries': (copy('net/.*', 'begin'),)}
  stages = {
    'begin': {'epochs': 0.0},
    'advent': _advent(config) | begun,
    'minent': _minent(config, hardest=0.3) | begun,
    'average': {
      'epochs': 0.0,
      'wrappers': {'average_logits': {'weight': 0.5}},
      'surgeries': (copy('net/.*', 'advent'), ('second_network', {'stage': 'minent'})),
    },
  }
  return {'stages': stages, 'stage_order': tuple(stages)}


def _label_prior(config: ConfigDict) -> Overrides:
  """Penalises predictions that miss class shares, estimated from the source."""
  shares = {
    'epochs': 0.0,
    'wrappers': {'label_shares': {}},
    'surgeries': (copy('net/.*', 'source'), ('fit_label_shares', {})),
    'save_outputs': ('target/train/label_shares',),
  }
  read = {'stage': 'shares', 'arrays': {'label_shares': 'label_shares'}}
  adapt = {
    **target_stream(config, **read),
    'method': {'name': 'label_prior', 'statistics': 'separate'},
    'alignment': {'weight': {'name': 'constant', 'weight': 0.1}},
    'surgeries': (copy('net/.*', 'source'),),
  }
  stages = {'source': {}, 'shares': shares, 'adapt': adapt}
  return {'stages': stages, 'stage_order': tuple(stages)}


def _mean_teacher(config: ConfigDict) -> Overrides:
  """A teacher labels target images; source images are mixed in, rare classes first."""
  return {
    **target_stream(config),
    'sampler': {'name': 'rare_class', 'temperature': 0.01, 'start_epoch': 0.0},
    'method': {'name': 'mean_teacher', 'statistics': 'separate'},
    'alignment': {'weight': {'name': 'constant', 'weight': 1.0}},
  }


NEEDS = ('target', 'pixels')

RECIPES: dict[str, Recipe] = {
  'minent': Recipe(_minent, needs=NEEDS),
  'minent_cp': Recipe(lambda config: _minent(config, prior=1.0), needs=NEEDS),
  'advent': Recipe(_advent, needs=NEEDS),
  'advent_cp': Recipe(
    lambda config: _advent(config, alignment='class_prior'), needs=NEEDS
  ),
  'adapt_seg': Recipe(lambda config: _advent(config, shown='softmax'), needs=NEEDS),
  'advent_minent': Recipe(_average, needs=NEEDS),
  'label_prior': Recipe(_label_prior, needs=NEEDS),
  'mean_teacher': Recipe(_mean_teacher, needs=NEEDS),
}
