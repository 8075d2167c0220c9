"""MNIST to MNIST-M: from handwritten digits to the same digits over photographs.

  python -m lt_jax.main --config=configs/mnist_mnistm.py:dann --workdir=runs/mnistm

Data: the TFDS set `mnist` (run `python -m lt_jax.prepare mnist` once) and MNIST-M,
which is not in TFDS, as a .npz of x_train, y_train, x_test, y_test in the working
directory, or anywhere with --config.domains.mnistm.source=npz:PATH. All images are
converted to 28x28x3.

Published accuracy on the target's test images, MNIST to MNIST-M. The two papers print
different numbers for the same method; do not mix them.

  recipe         ICML 2015   JMLR 2016
  source_only       .5749*      .5225†
  dann              .8149*     .7666*
  target_only       .9891*      .9596†

* the number of steps is ours.

† quoted from memory, unverified.

Cost: 5,000 steps of 64 + 64 images; about 4 minutes on two CPU cores.

Argument: a recipe for domain adaptation (see docs/methods.md) and
  steps   5000; all schedules scale with it
  net     mnist_dann (the paper's), or lenet
  imbalance   of the source: 1, or e.g. 100 for a long-tailed exponential profile
  target_imbalance  of the target's training images, likewise; its labels are used to
              make the data set, as in every such benchmark, and not to train
  target_profile    exponential (default), or reversed: the source's rarest class is
              then the target's most frequent one
"""

from lt_jax.protocols import digits


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'dann', 'source_only,steps=1000', ..."""
  return digits.pair(
    arg,
    name='mnist_mnistm',
    source='tfds:mnist',
    target={'source': 'npz:mnistm.npz'},
    images=60000,
    n_max=(5000, 5000),
  )
