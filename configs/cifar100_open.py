"""CIFAR-100 in an open world: a long tail of 80 classes, the other 20 unknown.

  python -m lt_jax.main --config=configs/cifar100_open.py:oltr --workdir=runs/open

Data: the TFDS set `cifar100` (run `python -m lt_jax.prepare cifar100` once), or any
.npz with --config.data.source=npz:PATH. Classes 0 to 79 have 490 to 4 training images,
and ten validation images each. Classes 80 to 99 have ten open validation images each.
The test set is that of CIFAR-100: 8,000 images of known classes, 2,000 open ones. This
split is ours: there is no published number.

Cost: `oltr` takes 13,327 + 13,200 steps of 128 images with ResNet-32. On two CPU cores
a step takes about a second; with `net=resnet8,epochs=10` the run takes minutes.

Argument: a recipe (see docs/methods.md) and
  imbalance   n_max / n_min, 100
  known       number of known classes, 80
  epochs      200, in the first stage; all schedules scale with it
  net         resnet32, or resnet8, 20, 44, 56
"""

from lt_jax.protocols import cifar


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'oltr', 'crt,known=50', ..."""
  return cifar.cifar100_open(arg)
