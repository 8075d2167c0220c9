"""A data set of eight images and a network of a few hundred parameters."""

import numpy as np

from configs import digits_lt
from lt_jax.config import resolve

COUNTS = (5, 1, 1, 1)


META = 2
"""Meta images per class, enough to fill a batch."""


def write_npz(path, counts=COUNTS, seed=0):
  """Writes 8x8 images, half noise and half their class; returns the path.

  There are `counts` training images per class, and `META` more.
  """
  generator = np.random.default_rng(seed)
  label = np.repeat(np.arange(len(counts)), np.add(counts, META))
  pattern = generator.integers(0, 128, (len(counts), 8, 8, 1), np.uint8)
  noise = generator.integers(0, 128, (len(label), 8, 8, 1), np.uint8)
  image = pattern[label] + noise
  np.savez(path, x_train=image, y_train=label, x_test=image, y_test=label)
  return path


def config(path, arg, **overrides):
  """Returns the resolved config of a recipe for such a file."""
  made = unresolved(path, arg)
  for key, value in overrides.items():
    made[key] = value
  return resolve(made)


def unresolved(path, arg):
  """Returns the config of a recipe for such a file, as a config file makes it."""
  made = digits_lt.get_config(arg)
  made.data.update(
    source=f'npz:{path}',
    known_classes=0,
    profile='original',
    test_per_class=0,
    val_per_class=0,
    meta_per_class=META,
    open_val_per_class=0,
    open_test_per_class=0,
    many_shot=4,
    few_shot=2,
    pad=0,
  )
  made.model.update(trunk='digits_cnn', trunk_options={'width': 4})
  made.update(batch=8, eval_batch=8, select='last')
  made.schedule = {'name': 'constant', 'base': 0.05}
  for stage in (made, *made.stages.values()):
    if (
      'meta' in stage.streams and stage.streams.meta.batch != 8
    ):  # otherwise it follows
      stage.streams.meta.batch = 8
    for key in ('schedule', 'optimizer'):  # one rate for all, nothing frozen
      if key in stage and stage is not made:
        del stage[key]
    if 'sampler' in stage and stage.sampler.name == 'class_aware':
      stage.sampler.per_class = 2  # so that a batch has every class
  return made


WITH_WIDTH = ('decoder', 'image_discriminator', 'patch_discriminator')
"""Networks of players whose size is their width."""


def shrink_players(made):
  """Makes the players of every stage of an unresolved config small."""
  for stage in (made, *made.stages.values()):
    for player in stage.get('players', {}).values():
      if 'hidden' in player.network:
        player.network.hidden = (8,) * len(player.network.hidden)
      if player.network.name in WITH_WIDTH:
        player.network.width = 4
