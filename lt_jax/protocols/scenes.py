"""Street scenes: a network of 0.1 million parameters, eight images per step."""

from lt_jax.protocols import Protocol

BATCH = 8


def epochs_of(steps: int, images: int) -> float:
  """Returns the number of epochs over `images` that end after `steps`."""
  return (steps - 0.5) * BATCH / images  # an epoch starts at the next whole step


def training(epochs: float) -> Protocol:
  """Returns the overrides for training on the scenes, for any recipe."""
  return Protocol(
    {
      'batch': BATCH,
      'eval_batch': 50,
      'epochs': epochs,
      'optimizer': {'name': 'sgd', 'momentum': 0.9, 'weight_decay': (('.*', 5e-4),)},
      'schedule': {'name': 'cosine', 'base': 0.02, 'end': epochs},
      'save_every_epochs': epochs / 5,
      'evaluate_every_epochs': epochs / 5,
    }
  )
