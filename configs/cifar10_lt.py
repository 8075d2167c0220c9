"""CIFAR-10-LT with ResNet-32: the benchmark of class-balanced loss and of LDAM-DRW.

  python -m lt_jax.main --config=configs/cifar10_lt.py:ldam_drw,imbalance=100 \
    --config.seed=1 --workdir=runs/cifar10_lt/ldam_drw/1

Data: the TFDS set `cifar10` (run `python -m lt_jax.prepare cifar10` once), or any .npz
of x_train, y_train, x_test, y_test with --config.data.source=npz:PATH. Training counts
at imbalance 100: 5000 2997 1796 1077 645 387 232 139 83 50, 12,406 in all.

Published top-1 error in % at the best test epoch, as printed by Jamal et al. (CVPR
2020) from Cui et al. (CVPR 2019) and Cao et al. (NeurIPS 2019):

  recipe               imbalance 100   imbalance 10
  ce,protocol=cui              29.64          13.61
  sigmoid_focal                29.62          13.34
  cb_ce                       27.63*         13.23*
  cb_focal                     25.43         12.52*
  ldam                         26.65          13.04
  ldam_drw                     22.97          11.84
  l2rw                        27.77*         17.88*
  mwn                         26.43*         12.45*
  meta_ce                      23.59          11.15
  meta_ldam                   20.00*         12.60*
  cb_finetune                 28.66*         16.83*

* measured in another setting, or the source does not say in which; the report gives the
details (lt_jax/report/published.json, `mark`). 27.63 comes from LDAM-DRW's code: cb_ce
with protocol=cao and --config.reduction=weight_normalised.

Cost: 19,385 steps of 128 images. On two CPU cores a step takes about a second.

Argument: a recipe (see docs/methods.md) and
  imbalance   n_max / n_min, 100
  profile     exponential (default) or step
  protocol    cao, cui, ren, shu or jamal: schedule, optimiser, initialisation, shortcut
              and input scale of a paper; the default is that of the recipe's own paper
  epochs      overrides the protocol's 200 (shu 100, ren 160); the schedule scales
  net         resnet32, or resnet8, 20, 44, 56
  meta        images per class of a balanced set that is taken out first: 10 in ren,
              shu and jamal, and for tau_norm, which chooses by them; 0 elsewhere.
              n_max is 5000 minus meta
"""

from lt_jax.protocols import cifar


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'ldam_drw', 'ce,imbalance=10', ..."""
  return cifar.cifar_lt(arg, name='cifar10_lt', source='tfds:cifar10', n_max=5000)
