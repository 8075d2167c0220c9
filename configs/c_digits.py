"""C-Digits: from SVHN to a mix of MNIST, MNIST-M and USPS, tested on one more set too.

  python -m lt_jax.main --config=configs/c_digits.py:ocda --workdir=runs/c_digits

The benchmark of Liu et al., "Open Compound Domain Adaptation", CVPR 2020, arXiv
1909.03403, set up like the authors' code. The source has 4,659 training images per
class, as many as its rarest class. The target mixes the training images of three sets
without saying which image comes from which. No image of the open domain is used in
training. All images are converted to 32x32x3.

Data: the TFDS sets `svhn_cropped` and `mnist` (run `python -m lt_jax.prepare
svhn_cropped` and `... mnist` once); mnistm.npz and usps.npz as in
configs/mnist_mnistm.py and configs/mnist_usps.py; and the open domain as NAME.npz
(x_train, y_train, x_test, y_test). All .npz files belong in the working directory. In
the authors' code the open domain is `synth`, and only its synth_test_32x32.mat is used
(x_train can hold any images). The paper calls its open domain SWIT, which is not public
under this name; open=swit reads swit.npz.

Accuracy in % on the test images of each domain:

  recipe              mnist  mnistm   usps   open  mean of targets  and open
  ocda, code's page   89.62   64.53  81.17  87.86            78.44     80.80
  ocda, paper         90.9†   65.7†  83.4†  88.2†            80.0†     82.1†
  adda                80.1†   56.8†  64.8†
  jan                 65.1†   43.0†  63.5†  85.6†
  mcd                 69.6†   48.6†  70.6†  89.8†

† quoted from memory, unverified. Published by the authors. The first row comes from the
page of their code, with the open domain `synth`; we computed its means. The paper has
another open domain. Neither the dropout nor the exact balanced subset of the authors is
reproduced here (`lt_jax.models.digits.DTN`).

Protocol: Adam, batches of 128 + 128 images, 100 epochs on the source and 200 in every
other stage, a learning rate of 1e-4, and 1e-5 in the stage `adversarial`. Other
recipes: Adam, 1e-4, 100 epochs; no paper states these.

Cost: 36,399 steps on the source and 72,798 in each of three other stages. Estimated
from operation counts, not measured: two weeks on two CPU cores, a few hours on an
accelerator. epochs=... shortens all stages by the same factor.

Argument: a recipe for domain adaptation (see docs/methods.md) and
  epochs   100, on the source; all other stages scale with it
  open     synth, or the name of another file
  net      dtn
"""

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.protocols import Protocol, train_by
from lt_jax.recipes.compound import ADAM, RECIPES

LONG = {'epochs': 200.0}


def training() -> Protocol:
  """Returns how the digits are trained on, for any recipe."""
  ocda = {
    'stages': {
      'adversarial': LONG,
      'domain_factor': LONG,
      'scheduled': {**LONG, 'schedule': {'end': 200.0}},
    }
  }
  return Protocol(
    {
      'batch': 128,
      'eval_batch': 500,
      'epochs': 100.0,
      'optimizer': ADAM,
      'schedule': {'name': 'constant', 'base': 1e-4},
    },
    recipes=dict.fromkeys(RECIPES, ocda),
  )


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'ocda', 'source_only,epochs=3', ..."""
  recipe, option = parse_arg(arg, 'ocda', epochs=100.0, open='synth', net='dtn')
  config = apply(
    base_config(),
    {
      'name': 'c_digits',
      'data': {
        'source': 'tfds:svhn_cropped',
        'profile': 'balanced',
        'n_max': 4659,
        'size': 32,
        'channels': 3,
        'mean': (0.5,),
        'std': (0.5,),
      },
      'domains': {
        'mnist': {'source': 'tfds:mnist'},
        'mnistm': {'source': 'npz:mnistm.npz'},
        'usps': {'source': 'npz:usps.npz'},
        option.open: {'source': f'npz:{option.open}.npz'},
      },
      'target': ('mnist', 'mnistm', 'usps'),
      'open_domains': (option.open,),
      'model': {'trunk': option.net},
      'save_every_epochs': option.epochs / 10,
      'evaluate_every_epochs': option.epochs / 10,
    },
  )
  return train_by(config, recipe, training(), epochs=option.epochs)
