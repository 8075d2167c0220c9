"""Digits-LT: the 8x8 handwritten digits bundled with scikit-learn, long-tailed.

Eight known classes (0 to 7) with 90 55 34 20 12 7 4 3 training images, a balanced test
set of 50 images per class, and classes 8 and 9 as the open set. It needs no download
and no accelerator: use it to try a method first. The tests train on it too.

  python -m lt_jax.main --config=configs/digits_lt.py:ldam_drw --workdir=runs/one

Cost: 704 steps of a network of 37,000 parameters, a few seconds on two CPU cores. There
is no published number.

Argument: a recipe (see docs/methods.md), and `epochs` (200; schedules scale with it),
`imbalance` (30) and `n_max` (90). Every recipe sets ten images per class aside as the
balanced meta set; only the recipes that learn weights, and two controls, use it.
"""

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.protocols import Protocol, steps, train_by

FEW_SHOT = {
  stage: {'shot_groups': ('many', 'medium')} for stage in ('base', 'generator', 'novel')
}
"""Only two classes are many-shot, too few for `fslwf` to learn from."""


def training(epochs: float) -> Protocol:
  """Returns how the digits are trained on, for any recipe."""
  schedule = steps(
    epochs,
    (0.8 * epochs, 0.1),
    (0.9 * epochs, 0.01),
    base=0.05,
    warmup='linear',
    warmup_epochs=0.025 * epochs,
  )
  return Protocol(
    {
      **schedule,
      'batch': 64,
      'eval_batch': 128,
      'save_every_epochs': epochs / 4,
      'evaluate_every_epochs': epochs / 4,
      'model': {'trunk': 'digits_cnn'},
    },
    recipes={'fslwf': {'stages': FEW_SHOT}},
  )


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'ldam_drw', 'ce,imbalance=10', ..."""
  recipe, option = parse_arg(arg, 'ldam_drw', epochs=200.0, imbalance=30.0, n_max=90)
  config = apply(
    base_config(),
    {
      'name': 'digits_lt',
      'data': {
        'source': 'digits',
        'fake': {'train': 1797, 'largest': 180, 'smallest': 179, 'test': 0},
        'known_classes': 8,
        'profile': 'exponential',
        'n_max': option.n_max,
        'imbalance': option.imbalance,
        'test_per_class': 50,
        'val_per_class': 20,
        'meta_per_class': 10,
        'open_val_per_class': 20,
        'open_test_per_class': 50,
        'many_shot': 40,
        'few_shot': 10,
        'mean': (0.5,),
        'std': (0.5,),
        'pad': 1,
      },
    },
  )
  return train_by(config, recipe, training(option.epochs))
