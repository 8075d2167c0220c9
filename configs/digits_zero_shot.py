"""Zero-shot digits: unseen classes are known only by the segments of a display.

Each digit is described by which of the seven segments of a display are lit; all ten
codes differ. The images are scikit-learn's 1,797 handwritten digits, 8x8, and no
training image shows an unseen class. Nothing is downloaded.

  python -m lt_jax.main --config=configs/digits_zero_shot.py:eszsl --workdir=runs/zsl

Seven bits are few, and nobody writes in segments. Chance gets an unseen digit right a
third of the time, so compare methods here and don't expect high numbers. Two of the
seen digits are the validation classes: hyper-parameters and gamma are chosen on them,
with a network trained without them.

Cost: two trainings of 37,000 parameters, half a minute on two CPU cores. There is no
published number.

With a target, the same task is posed in another domain, whose images have no labels and
come from all ten classes: `zsda` adapts to it, `two_tower` does not. Source and target
are those of configs/digits_domains.py; a result then has S, U and H for both.

Argument: a recipe for zero-shot learning (see docs/methods.md) and
  unseen   3+5+8 (default): names, joined by +
  val      0+6: the validation classes, likewise
  target   none (default), or blended, inverted, rotated or noisy
  epochs   40; schedules scale with it
"""

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.protocols import Protocol, steps, train_by


def training(epochs: float, target: str) -> Protocol:
  """Returns how the digits are trained on, for any recipe."""
  schedule = steps(epochs, (0.8 * epochs, 0.1), base=0.05)
  return Protocol(
    {
      **schedule,
      'batch': 64,
      'eval_batch': 256,
      'save_every_epochs': epochs / 2,
      'evaluate_every_epochs': epochs / 2,
      'model': {'trunk': 'digits_cnn' if target == 'none' else 'lenet'},
    }
  )


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'eszsl', 'ale,unseen=4+9', ..."""
  recipe, option = parse_arg(
    arg, 'eszsl', unseen='3+5+8', val='0+6', target='none', epochs=40.0
  )
  config = apply(
    base_config(),
    {
      'name': 'digits_zero_shot',
      'task': 'zero_shot',
      'data': {
        'source': 'digits',
        'class_vectors': ('seven_segments',),
        'unseen': tuple(option.unseen.split('+')),
        'val_classes': tuple(option.val.split('+')),
        'test_per_class': 50,
        'val_per_class': 20,
        'many_shot': 0,
        'few_shot': 0,
        'mean': (0.5,),
        'std': (0.5,),
        'pad': 1,
      },
    },
  )
  if option.target != 'none':
    apply(config, _domains(option.target))
  return train_by(config, recipe, training(option.epochs, option.target))


def _domains(target: str):
  """Returns the overrides for two domains: rendered digits with splits of their own."""
  return {
    'data': {
      'source': 'digits_domains:source',
      'test_per_class': 0,
      'val_per_class': 0,
      'mean': (0.306,),
      'std': (0.318,),
      'pad': 0,
    },
    'domains': {target: {'source': f'digits_domains:{target}'}},
    'target': (target,),
  }
