"""An embedded pair of domains: digits, and other digits drawn in other styles.

  python -m lt_jax.main --config=configs/digits_domains.py:dann --workdir=runs/domains

The source is half of scikit-learn's 1,797 handwritten digits (600 / 100 / 198 training,
validation and test images), at 16x16x3. The other half is split once into 600 training
and 299 test images. The target, any further targets and the open domain are all
rendered from that half, so no digit is in both the source and a target. Nothing is
downloaded.

There is no published number: `blended` is made like MNIST-M, but from other digits and
from the two photographs that scikit-learn bundles.

A target's tail is cut with its labels, as in every such benchmark. This is part of
making the data set: training does not use them. The target's test images are not cut.

Cost: 1,407 steps of 32 + 32 images, a minute on two CPU cores.

Argument: a recipe for domain adaptation (see docs/methods.md) and
  target      blended (default), inverted, rotated, noisy, or several joined by +, which
              then form one compound target: target=blended+inverted
  imbalance   of the source: 1, or e.g. 10 for a long-tailed exponential profile
  target_imbalance  of the target's training images, likewise
  target_profile    exponential (default), or reversed: the source's rarest class is
              then the target's most frequent one
  epochs      75; all schedules scale with it
"""

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.protocols import Protocol, compound_rates, train_by
from lt_jax.protocols.digits import tail

OPEN = 'sketched'
"""The rendering without training images."""


def training(epochs: float) -> Protocol:
  """Returns how the digits are trained on, for any recipe."""
  return Protocol(
    {
      'batch': 32,
      'eval_batch': 100,
      'epochs': epochs,
      'schedule': {'name': 'dann', 'base': 0.01, 'end': epochs},
      'save_every_epochs': epochs / 4,
      'evaluate_every_epochs': epochs / 4,
      'model': {'trunk': 'lenet'},
    },
    recipes={
      # LeNet lacks a second hidden layer and batch normalisation.
      'dan': {'alignment': {'align_on': ('features', 'logits')}},
      'ada_bn': {'model': {'trunk': 'digits_cnn'}},
      **compound_rates(10.0),
    },
  )


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'dann', 'deep_coral,target=inverted', ..."""
  recipe, option = parse_arg(
    arg,
    'dann',
    target='blended',
    imbalance=1.0,
    target_imbalance=1.0,
    target_profile='exponential',
    epochs=75.0,
  )
  target = tuple(option.target.split('+'))
  config = apply(
    base_config(),
    {
      'name': 'digits_domains',
      'data': {
        'source': 'digits_domains:source',
        'mean': (0.306,),  # of the source's training images
        'std': (0.318,),
        'many_shot': 40,
        'few_shot': 10,
        **tail(50, option.imbalance),
      },
      'domains': {
        name: {
          'source': f'digits_domains:{name}',
          **tail(50, option.target_imbalance, option.target_profile),
        }
        for name in target
      }
      | {OPEN: {'source': f'digits_domains:{OPEN}'}},
      'target': target,
      'open_domains': (OPEN,),
    },
  )
  return train_by(config, recipe, training(option.epochs))
