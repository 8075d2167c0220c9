"""Building blocks of recipes: re-weighting, margins, stages in sequence."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lt_jax.config import Overrides


class Recipe(NamedTuple):
  """A method by its name: what it sets in a config, and what it asks of one.

  Attributes:
    overrides: config -> overrides of it.
    paper: the protocol of its own paper, which a config uses where it has that one.
    needs: what the config must supply: 'meta', a balanced set by which weights are
      learned (or that a control trains on); 'held_out', images outside of training by
      which something is chosen; 'target', a domain to adapt to; 'init', weights to
      begin with, or an earlier stage to take them from; 'heads', further tasks;
      'class_vectors', unseen classes that are described; 'pixels', labels of each of
      them.
  """

  overrides: Callable[[ConfigDict], Overrides]
  paper: str = ''
  needs: tuple[str, ...] = ()


BETA = 0.9999


def effective(start_epoch: float = 0.0) -> Overrides:
  """Class weights by the effective number of images, from an epoch on."""
  return {'name': 'effective_number', 'beta': BETA, 'start_epoch': start_epoch}


def drw(config: ConfigDict) -> Overrides:
  """Deferred re-weighting: the batch mean is weight-normalised, as in its code."""
  return {
    'class_weights': effective(config.get_ref('defer_epoch')),
    'reduction': 'weight_normalised',
  }


def margin(name: str) -> Overrides:
  """A margin loss on cosines; head and loss share one scale."""
  loss = ConfigDict({'name': name, 'scale': 30.0})
  loss['margin' if name == 'uniform_margin' else 'max_margin'] = 0.5
  head = ConfigDict({'scale': loss.get_ref('scale')})
  return {'loss': loss, 'model': {'head': 'cosine', 'head_options': head}}


def selected(config: ConfigDict, metric: str = 'accuracy') -> Overrides:
  """The best State on validation images, as these papers take it, if there are any."""
  keeps = config.data.val_per_class or config.select != 'last'
  return {'select': f'val/{metric}'} if keeps else {}


def then(config: ConfigDict, first: str, *seconds: tuple[str, Overrides]) -> Overrides:
  """The config's own training as the stage `first`, then other stages."""
  return {
    **selected(config),
    'stages': {first: {}, **dict(seconds)},
    'stage_order': (first, *(name for name, _ in seconds)),
  }


ALL_BUT_HEAD = r'net/(?!head/).*'


HEAD_ONLY = (('net/head/.*', 1.0), ('.*', 0.0))


TENTH_BUT_HEAD = (('net/head/.*', 1.0), ('.*', 0.1))
"""Learning rates of OLTR's second stage: a tenth, but for the classifier."""


def copy(pattern: str, stage: str, **source: str) -> tuple[str, Overrides]:
  """The surgery that copies parameters, by their paths, from an earlier stage."""
  return ('copy', {'pattern': pattern, 'stage': stage, **source})


def target_stream(config: ConfigDict, **row: Any) -> Overrides:
  """Images of the target beside every batch of the source, as many of them."""
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
"""Classifiers that are fitted to features in a stage of no steps.

'judge' is the key of `CLASSIFIERS` in `lt_jax.surgeries.classifiers` by which something
is chosen for one, the others are keys of a stage.
"""


def shallow(
  classifier: str, stage: str, *surgeries: tuple[str, Overrides], **wrappers: Any
) -> Overrides:
  """A stage of no steps: the network of another, and a shallow classifier for its head.

  Args:
    classifier: a key of `SHALLOW`.
    stage: where the network comes from.
    *surgeries: what is done to its features first.
    **wrappers: that have room for that.
  """
  own = SHALLOW[classifier]
  return {
    'epochs': 0.0,
    'wrappers': {**wrappers, **own['wrappers']},
    'surgeries': (copy('net/.*', stage), *surgeries, *own['surgeries']),
  }


CLASS_AWARE: Overrides = {
  'sampler': {'name': 'class_aware', 'per_class': 4, 'start_epoch': 0.0},
  # Consecutive images are of one class: statistics of a part of the batch would be of a
  # few classes, and depend on the number of devices.
  'model': {'batch_norm': 'global'},
}
