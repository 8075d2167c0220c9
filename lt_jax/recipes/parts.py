"""Building blocks for recipes: re-weighting, margins, stages in sequence."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lt_jax.config import Overrides


class Recipe(NamedTuple):
  """A named method: what it sets in a config, and what it needs from one.

  Attributes:
    overrides: config -> overrides of it.
    paper: the protocol of its own paper, used by configs that have this protocol.
    needs: what the config must supply: 'meta', a balanced set to learn weights from (or
      for a control to train on); 'held_out', images outside training on which something
      is chosen; 'target', a domain to adapt to; 'init', initial weights, or an earlier
      stage to take them from; 'heads', additional tasks; 'class_vectors', descriptions
      of unseen classes; 'pixels', a label for every pixel.
  """

  overrides: Callable[[ConfigDict], Overrides]
  paper: str = ''
  needs: tuple[str, ...] = ()


BETA = 0.9999


def effective(start_epoch: float = 0.0) -> Overrides:
  """Class weights by the effective number of images, starting at an epoch."""
  return {'name': 'effective_number', 'beta': BETA, 'start_epoch': start_epoch}


def drw(config: ConfigDict) -> Overrides:
  """Deferred re-weighting, with a weight-normalised mean as in the authors' code."""
  return {
    'class_weights': effective(config.get_ref('defer_epoch')),
    'reduction': 'weight_normalised',
  }


def margin(name: str) -> Overrides:
  """A margin loss on cosines; the head and the loss share one scale."""
  loss = ConfigDict({'name': name, 'scale': 30.0})
  loss['margin' if name == 'uniform_margin' else 'max_margin'] = 0.5
  head = ConfigDict({'scale': loss.get_ref('scale')})
  return {'loss': loss, 'model': {'head': 'cosine', 'head_options': head}}


def selected(config: ConfigDict, metric: str = 'accuracy') -> Overrides:
  """Selects the State that is best on validation images, if any, as these papers do."""
  keeps = config.data.val_per_class or config.select != 'last'
  return {'select': f'val/{metric}'} if keeps else {}


def then(config: ConfigDict, first: str, *seconds: tuple[str, Overrides]) -> Overrides:
  """The config's own training as the stage `first`, followed by other stages."""
  return {
    **selected(config),
    'stages': {first: {}, **dict(seconds)},
    'stage_order': (first, *(name for name, _ in seconds)),
  }


ALL_BUT_HEAD = r'net/(?!head/).*'


HEAD_ONLY = (('net/head/.*', 1.0), ('.*', 0.0))


TENTH_BUT_HEAD = (('net/head/.*', 1.0), ('.*', 0.1))
"""Learning rates of OLTR's second stage: a tenth for everything but the classifier."""


def copy(pattern: str, stage: str, **source: str) -> tuple[str, Overrides]:
  """The surgery that copies parameters from an earlier stage, selected by path."""
  return ('copy', {'pattern': pattern, 'stage': stage, **source})


def target_stream(config: ConfigDict, **row: Any) -> Overrides:
  """Adds to every source batch as many images of the target."""
  stream = {
    'domain': 'target',
    'split': 'train',
    'labels': False,
    'batch': config.get_ref('batch'),
    **{key: value for key, value in row.items() if value},
  }
  return {'streams': {'target': stream}}


SHALLOW: dict[str, Overrides] = {
  'linear_svm': {
    'judge': 'svm',
    'wrappers': {'linear_svm': {}},
    'surgeries': (('linear_svm', {}),),
  },
  'nearest_neighbour': {
    'judge': 'neighbours',
    'wrappers': {'nearest_neighbour': {}},
    'surgeries': (('nearest_neighbour', {}),),
  },
}
"""Classifiers that a stage without steps fits to features.

'judge' is a key of `CLASSIFIERS` in `lt_jax.surgeries.classifiers`: the classifier
whose accuracy decides when something is chosen. The others are keys of a stage.
"""


def shallow(
  classifier: str, stage: str, *surgeries: tuple[str, Overrides], **wrappers: Any
) -> Overrides:
  """A stage without steps: a shallow classifier as the head of another stage's network.

  Args:
    classifier: a key of `SHALLOW`.
    stage: the stage that the network comes from.
    *surgeries: what is done to its features first.
    **wrappers: wrappers that hold the results of these surgeries.
  """
  own = SHALLOW[classifier]
  return {
    'epochs': 0.0,
    'wrappers': {**wrappers, **own['wrappers']},
    'surgeries': (copy('net/.*', stage), *surgeries, *own['surgeries']),
  }


CLASS_AWARE: Overrides = {
  'sampler': {'name': 'class_aware', 'per_class': 4, 'start_epoch': 0.0},
  # Consecutive images share a class, so statistics over part of the batch would cover
  # few classes and depend on the number of devices.
  'model': {'batch_norm': 'global'},
}
