"""An open world of digits: a long tail, unseen classes and unknown classes.

Of ten digits six are seen, with 90 to 9 training images (a long tail); two are unseen
but described, by the segments that a display lights for them; two are unknown: they
have neither images nor descriptions. A result measures all three:

  seen           S, mean accuracy on the seen classes, among all eight known ones
  unseen         U, the same on the two unseen classes
  harmonic_mean  of S and U
  unknown        the share of images of unknown classes that are rejected, at the
                 threshold that best separates known from unknown validation images

  python -m lt_jax.main --config=configs/open_world.py:eszsl --workdir=runs/open

The images are the 1,797 digits of scikit-learn; nothing is downloaded. `target=blended`
poses the same task in a domain without labels: the source is half of the digits as they
are, the target the other half over photographs (see configs/digits_domains.py). There
is no published number.

Cost: two trainings of 37,000 parameters, half a minute on two CPU cores.

Argument: a recipe for zero-shot learning (see docs/methods.md) and
  imbalance  10: of the seen classes, n_max / n_min
  target     none (default), or a rendering of configs/digits_domains.py
  epochs     60; schedules scale with it
"""

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.protocols import Protocol, steps, train_by

CLASSES = {
  'class_vectors': ('seven_segments',),
  'known_classes': 8,  # 8 and 9 are unknown
  'unseen': ('3', '5'),
  'val_classes': ('1', '4'),
}


def training(epochs: float) -> Protocol:
  """Returns how the digits are trained on, for any recipe."""
  schedule = steps(epochs, (0.8 * epochs, 0.1), base=0.05)
  return Protocol(
    {
      **schedule,
      'batch': 32,
      'eval_batch': 200,
      'save_every_epochs': epochs / 2,
      'evaluate_every_epochs': epochs / 2,
      'model': {'trunk': 'digits_cnn'},
    }
  )


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'eszsl', 'ale,target=blended', ..."""
  recipe, option = parse_arg(arg, 'eszsl', imbalance=10.0, target='none', epochs=60.0)
  tail = {'profile': 'exponential', 'imbalance': option.imbalance}
  config = apply(
    base_config(),
    {
      'name': 'open_world',
      'task': 'zero_shot',
      'data': {
        **CLASSES,
        **tail,
        'source': 'digits',
        'n_max': 90,
        'test_per_class': 50,
        'val_per_class': 20,
        'open_val_per_class': 20,
        'open_test_per_class': 50,
        'many_shot': 40,
        'few_shot': 15,
        'mean': (0.5,),
        'std': (0.5,),
        'pad': 1,
      },
    },
  )
  if option.target != 'none':
    apply(config, _domains(option.target))
  return train_by(config, recipe, training(option.epochs))


def _domains(target: str):
  """Returns the overrides for two domains: rendered digits with splits of their own."""
  own = {
    'source': f'digits_domains:{target}',
    'known_classes': CLASSES['known_classes'],
  }
  return {
    'data': {
      'source': 'digits_domains:source',
      'n_max': 50,
      'test_per_class': 0,
      'val_per_class': 0,
      'open_val_per_class': 0,
      'open_test_per_class': 0,
      'mean': (0.306,),
      'std': (0.318,),
    },
    'domains': {target: own},
    'target': (target,),
    'model': {'trunk': 'lenet'},
  }
