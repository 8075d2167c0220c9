"""SVHN to MNIST: from house numbers in photographs to handwritten digits.

  python -m lt_jax.main --config=configs/svhn_mnist.py:dann --workdir=runs/svhn_mnist

Data: the TFDS sets `svhn_cropped` and `mnist` (run `python -m lt_jax.prepare
svhn_cropped` and `... mnist` once). MNIST is converted to 32x32x3. The source has a
tail of its own: the digit 1 is about three times as frequent as 9.

Published accuracy on the target's test images, SVHN to MNIST. The two papers print
different numbers for the same method; do not mix them.

  recipe         ICML 2015   JMLR 2016
  source_only        .5919      .5490†
  dann               .7107      .7385
  target_only        .9951      .9942†

† quoted from memory, unverified. Sources: Ganin and Lempitsky, arXiv 1409.7495; Ganin
et al., arXiv 1505.07818.

Cost: 5,000 steps of 64 + 64 images, each about 20 times the work of one of
configs/mnist_mnistm.py: over an hour on two CPU cores (estimated, not measured).

Argument: a recipe for domain adaptation (see docs/methods.md) and
  steps   5000; all schedules scale with it
  net     svhn_dann (the paper's), or lenet
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
    name='svhn_mnist',
    source='tfds:svhn_cropped',
    target={'source': 'tfds:mnist'},
    images=73257,
    n_max=(4500, 5000),
    net='svhn_dann',
    size=32,
  )
