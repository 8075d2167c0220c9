"""A small C-Digits: from USPS to MNIST and MNIST-M mixed; rotated digits are open.

  python -m lt_jax.main --config=configs/c_digits_small.py:ocda --workdir=runs/c_small

A compound target and open domains of real digits, small enough for two CPU cores. The
source is USPS (7,291 training images). The target mixes 1,000 images per class of MNIST
and as many of MNIST-M, without saying which image comes from which. The open domains,
never seen in training, are MNIST's test images rotated counterclockwise by 30, 60 and
90 degrees. All images are converted to 28x28x3.

Data: usps.npz and mnistm.npz as in configs/mnist_usps.py and configs/mnist_mnistm.py,
and mnist.npz (x_train (60000, 28, 28), y_train, x_test, y_test), in the working
directory or in another folder: files=FOLDER. The target's labels are used to balance
it, which is part of making the data set; they are not used in training.

There is no published number, because we chose the data ourselves. Compare with
configs/c_digits.py, whose source is SVHN.

Protocol: the MNIST network of Ganin et al., 30 epochs of 64 + 64 images per stage.
`ocda` uses the learning rates of its authors' code, except that those of the stages
`source` and `domain_factor` are ten times as high, since these stages are a tenth as
long. Other recipes use momentum, as in configs/mnist_usps.py.

Cost: 3,418 steps of 64 + 64 images per stage; `ocda` has four stages. About 25 minutes
on two CPU cores (estimated from a run of 2 epochs on a busy machine), a third of that
with epochs=10.

Argument: a recipe for domain adaptation (see docs/methods.md) and
  epochs   30, in every stage; all schedules scale with it
  net      mnist_dann, lenet or dtn
  files    the folder of the .npz files
"""

import os

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.protocols import compound_rates, train_by
from lt_jax.protocols.digits import ganin

TURNED = (30, 60, 90)
"""Angles of the open domains, in degrees."""


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'ocda', 'source_only,epochs=3', ..."""
  recipe, option = parse_arg(arg, 'ocda', epochs=30.0, net='mnist_dann', files='')

  def file(name: str) -> str:
    return f'npz:{os.path.join(option.files, name)}.npz'

  balanced = {'profile': 'balanced', 'n_max': 1000}
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
        'mnist': {'source': file('mnist'), **balanced},
        'mnistm': {'source': file('mnistm'), **balanced},
      }
      | {
        f'mnist_{angle}': {'source': f'rotated:{angle}:{file("mnist")}', **balanced}
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
