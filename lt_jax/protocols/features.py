"""Training on features from files: one-layer networks for unseen classes."""

from lt_jax.config import Overrides
from lt_jax.protocols import Protocol

HELD_OUT: Overrides = {'data': {'val_per_class': 15}}
"""Validation images to choose gamma for trained recipes; closed forms hold out some."""

TRAINED = ('devise', 'sje', 'ale', 'two_tower', 'two_tower_distance')
TRAINED += ('feature_generator',)


def training(epochs: float) -> Protocol:
  """Returns the overrides for training on features; closed forms need none of them.

  Args:
    epochs: epochs of a training.
  """
  return Protocol(
    {
      'batch': 64,
      'eval_batch': 1024,
      'epochs': epochs,
      'optimizer': {'name': 'sgd', 'momentum': 0.9, 'weight_decay': (('.*', 1e-4),)},
      'schedule': {'name': 'cosine', 'base': 0.1, 'end': epochs},
      'save_every_epochs': epochs,
      'evaluate_every_epochs': epochs,
      'model': {'trunk': 'identity'},
    },
    recipes=dict.fromkeys(TRAINED, HELD_OUT),
  )
