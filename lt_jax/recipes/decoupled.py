"""Recipes that train the classifier separately from the features."""

from typing import Any

from ml_collections import ConfigDict

from lt_jax.config import Overrides
from lt_jax.recipes.parts import (
  ALL_BUT_HEAD,
  CLASS_AWARE,
  HEAD_ONLY,
  Recipe,
  copy,
  shallow,
  then,
)


def _decoupled(config: ConfigDict, share: float, **classifier: Any) -> Overrides:
  """Cross-entropy, then the classifier alone on balanced batches, cosine to zero."""
  epochs = config.get_ref('epochs') * share
  second = {
    **CLASS_AWARE,
    'epochs': epochs,
    'schedule': {
      'name': 'cosine',
      'base': config.schedule.get_ref('base'),
      'end': epochs,
    },
    **classifier,
  }
  return then(config, 'train', ('classifier', second))


def _crt(config: ConfigDict, **classifier: Any) -> Overrides:
  """Classifier re-training: a fresh classifier on the first stage's features."""
  return _decoupled(
    config,
    1 / 9,
    optimizer={'learning_rate_scale': HEAD_ONLY},
    surgeries=(copy(ALL_BUT_HEAD, 'train'),),
    **classifier,
  )


def _lws(config: ConfigDict) -> Overrides:
  """Learnable weight scaling: one scale per class on the first stage's classifier."""
  return _decoupled(
    config,
    1 / 18,
    model={**CLASS_AWARE['model'], 'head': 'scaled_linear'},
    optimizer={'learning_rate_scale': (('net/head/scale', 1.0), ('.*', 0.0))},
    surgeries=(copy('net/(?!head/scale).*', 'train'),),
  )


def _tau_norm(config: ConfigDict) -> Overrides:
  """Tau chosen on validation images, or on meta images if there are only those."""
  data = config.data
  split = 'meta' if data.meta_per_class and not data.val_per_class else 'val'
  taus = tuple(round(0.1 * i, 1) for i in range(21))
  posthoc = {
    'epochs': 0.0,
    'wrappers': {'tau_norm': {'taus': taus}},
    'surgeries': (copy('.*', 'train'), ('choose_tau', {'split': split})),
  }
  return then(config, 'train', ('tau_norm', posthoc))


def _ncm(config: ConfigDict) -> Overrides:
  """Nearest class mean on the first stage's features."""
  posthoc = {
    'epochs': 0.0,
    'model': {'head': 'nearest_class_mean'},
    'surgeries': (copy(ALL_BUT_HEAD, 'train'), ('nearest_class_mean', {})),
  }
  return then(config, 'train', ('ncm', posthoc))


def _shallow(config: ConfigDict, classifier: str) -> Overrides:
  """A shallow classifier fitted to the first stage's features, without steps."""
  return then(config, 'train', (classifier, shallow(classifier, 'train')))


RECIPES: dict[str, Recipe] = {
  'crt': Recipe(_crt, paper='kang'),
  'lws': Recipe(_lws, paper='kang'),
  'crt_las': Recipe(
    lambda config: _crt(config, loss={'name': 'label_aware_smoothing'}), paper='kang'
  ),
  'tau_norm': Recipe(_tau_norm, paper='kang', needs=('held_out',)),
  'ncm': Recipe(_ncm, paper='kang'),
  'linear_svm': Recipe(lambda config: _shallow(config, 'linear_svm'), paper='kang'),
  'nearest_neighbour': Recipe(
    lambda config: _shallow(config, 'nearest_neighbour'), paper='kang'
  ),
}
