"""CIFAR-100-LT with ResNet-32: the benchmark of class-balanced loss and of LDAM-DRW.

  python -m lt_jax.main --config=configs/cifar100_lt.py:ldam_drw,imbalance=100 \
    --config.seed=1 --workdir=runs/cifar100_lt/ldam_drw/1

Data: the TFDS set `cifar100` (run `python -m lt_jax.prepare cifar100` once), or any
.npz of x_train, y_train, x_test, y_test with --config.data.source=npz:PATH. Training
counts at imbalance 100: 500 477 455 434 415 ... 6 5 5 5 5, 10,847 in all.

Published top-1 error in % at the best test epoch, as printed by FaMUS (CVPR 2021, table
8); for `ldam_drw`, by Cao et al. (NeurIPS 2019):

  recipe               imbalance 100   imbalance 10
  ce,protocol=cui              61.68          44.29
  sigmoid_focal                61.59          44.22
  cb_focal                    60.40*         42.01*
  ldam_drw                     57.96              -
  l2rw,protocol=shu           59.77*         46.27*
  mwn                          57.91          41.54
  meta_ce                      56.65          40.42
  meta_ldam                   55.92*         42.00*

* measured in another setting, or the source does not say in which; the report gives the
details. The numbers of `cb_focal` are for the best class-balanced loss: beta 0.9 at
imbalance 100, beta 0.999 and gamma 0.5 at imbalance 10†.

† quoted from memory, unverified.

Cost: 16,949 steps of 128 images. On two CPU cores a step takes about a second.

Argument: as in configs/cifar10_lt.py (n_max is 500, or 490 with meta=10).
"""

from lt_jax.protocols import cifar


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'ldam_drw', 'ce,imbalance=10', ..."""
  return cifar.cifar_lt(arg, name='cifar100_lt', source='tfds:cifar100', n_max=500)
