"""A small C-Digits: USPS, then MNIST and MNIST-M mixed, then digits that are turned.

  python -m lt_jax.main --config=configs/c_digits_small.py:ocda --workdir=runs/c_small

A compound target and open domains of real digits, for two CPU cores. The source is
USPS (7,291 training images); 1,000 images a class of MNIST and as many of MNIST-M are
one target, whose images do not tell of which of the two they are; the open domains, of
which nothing is seen in training, are MNIST's test images turned to the left by 30, 60
and 90 degrees. All are brought to 28x28x3.

Data: usps.npz and mnistm.npz as in configs/mnist_usps.py and configs/mnist_mnistm.py,
and mnist.npz (x_train (60000, 28, 28), y_train, x_test, y_test), in the folder where
the command runs, or in another one: files=FOLDER. That the target is balanced takes its
labels: to make the data set, not to train on it.

There is no published number: the data are a choice of our own. Compare with
configs/c_digits.py, whose source is SVHN.

Protocol: the MNIST network of Ganin et al., 30 epochs of 64 + 64 images a stage; `ocda`
by the rates of its authors' code, which in the stages `source` and `domain_factor` are
ten times as high, as these are a tenth as long; other recipes by momentum, as in
configs/mnist_usps.py.

Cost: 3,418 steps of 64 + 64 images a stage, four stages of `ocda`. Reckoned from a run
of 2 epochs on a busy machine: some 25 minutes on two CPU cores, with epochs=10 a third.

Argument: a recipe of domain adaptation (see docs/methods.md) and
  epochs   30, of every stage; all schedules scale
  net      mnist_dann, lenet or dtn
  files    the folder of the .npz files
"""

import os

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.protocols import compound_rates, train_by
from lt_jax.protocols.digits import ganin

TURNED = (30, 60, 90)
"""Degrees of the open domains."""


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'ocda', 'source_only,epochs=3', ..."""
  recipe, option = parse_arg(arg, 'ocda', epochs=30.0, net='mnist_dann', files='')

  def file(name: str) -> str:
    return f'npz:{os.path.join(option.files, name)}.npz'

  some = {'profile': 'balanced', 'n_max': 1000}
  config = apply(
    base_config(),
    {
      'name': 'c_digits_small',
      'data': {
        'source': file('usps'),
        'size': 28,
        'channels': 3,
        'mean': (0.5,),
        'std': (0.5,),
      },
      'domains': {
        'mnist': {'source': file('mnist'), **some},
        'mnistm': {'source': file('mnistm'), **some},
      }
      | {
        f'mnist_{angle}': {'source': f'rotated:{angle}:{file("mnist")}', **some}
        for angle in TURNED
      },
      'target': ('mnist', 'mnistm'),
      'open_domains': tuple(f'mnist_{angle}' for angle in TURNED),
      'model': {'trunk': option.net},
      'save_every_epochs': option.epochs / 3,
      'evaluate_every_epochs': option.epochs / 3,
    },
  )
  protocol = ganin(option.epochs)
  return train_by(config, recipe, protocol._replace(recipes=compound_rates(10.0)))
