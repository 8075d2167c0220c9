"""Recipes with one training: losses, class weights, samplers, adjusted logits."""

from ml_collections import ConfigDict

from lt_jax.config import Overrides
from lt_jax.recipes.parts import BETA, Recipe, drw, effective, margin


def _resample(start_epoch: float = 0.0) -> Overrides:
  return {'name': 'effective_number', 'beta': BETA, 'start_epoch': start_epoch}


def _sigmoid(config: ConfigDict, loss: Overrides, **weights: Overrides) -> Overrides:
  """Sigmoid losses: the bias starts at the prior and is not decayed."""
  decay = config.optimizer.weight_decay
  return {
    'loss': loss,
    **weights,
    'model': {'head_options': {'prior_bias': True}},
    'optimizer': {'weight_decay': (('net/head/bias', 0.0), *decay)},
  }


def _posthoc(config: ConfigDict) -> Overrides:
  """Cross-entropy, then a stage without steps that adjusts the logits."""
  del config
  return {
    'stages': {
      'train': {},
      'posthoc': {
        'epochs': 0.0,
        'wrappers': {'adjust_logits': {'tau': 1.0}},
        'surgeries': (('copy', {'pattern': '.*', 'stage': 'train'}),),
      },
    },
    'stage_order': ('train', 'posthoc'),
  }


SIGMOID = {'name': 'sigmoid_cross_entropy'}


SIGMOID_FOCAL = {'name': 'sigmoid_focal', 'gamma': 1.0}


RECIPES: dict[str, Recipe] = {
  'ce': Recipe(lambda config: {}),
  'focal': Recipe(lambda config: {'loss': {'name': 'softmax_focal', 'gamma': 1.0}}),
  'cb_ce': Recipe(lambda config: {'class_weights': effective()}, paper='cui'),
  'sigmoid': Recipe(lambda config: _sigmoid(config, SIGMOID), paper='cui'),
  'sigmoid_focal': Recipe(lambda config: _sigmoid(config, SIGMOID_FOCAL), paper='cui'),
  'cb_sigmoid': Recipe(
    lambda config: _sigmoid(config, SIGMOID, class_weights=effective()), paper='cui'
  ),
  'cb_focal': Recipe(
    lambda config: _sigmoid(config, SIGMOID_FOCAL, class_weights=effective()),
    paper='cui',
  ),
  'ce_drw': Recipe(drw),
  'ce_drs': Recipe(
    lambda config: {'sampler': _resample(config.get_ref('defer_epoch'))}
  ),
  'resample_cb': Recipe(lambda config: {'sampler': _resample()}),
  'resample_sqrt': Recipe(
    lambda config: {'sampler': {'name': 'square_root', 'start_epoch': 0.0}}
  ),
  'resample_progressive': Recipe(
    lambda config: {'sampler': {'name': 'progressive', 'start_epoch': 0.0}}
  ),
  'ldam': Recipe(lambda config: margin('ldam')),
  'ldam_drw': Recipe(lambda config: margin('ldam') | drw(config)),
  'margin_drw': Recipe(lambda config: margin('uniform_margin') | drw(config)),
  'balanced_softmax': Recipe(lambda config: {'loss': {'name': 'balanced_softmax'}}),
  'logit_adjust': Recipe(
    lambda config: {'loss': {'name': 'logit_adjustment', 'tau': 1.0}}
  ),
  'logit_adjust_posthoc': Recipe(_posthoc),
  'lade': Recipe(
    lambda config: {
      'loss': {'name': 'balanced_softmax'},
      'penalty': {'name': 'lade', 'weight': 0.1},
    }
  ),
  'vs': Recipe(
    lambda config: {'loss': {'name': 'vector_scaling', 'gamma': 0.3, 'tau': 1.0}}
  ),
  'cdt': Recipe(
    lambda config: {'loss': {'name': 'class_dependent_temperature', 'gamma': 0.3}}
  ),
}
