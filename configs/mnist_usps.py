"""MNIST to USPS: handwritten digits; the target has other writers and another scanner.

  python -m lt_jax.main --config=configs/mnist_usps.py:dann --workdir=runs/mnist_usps

Data: the TFDS set `mnist` (run `python -m lt_jax.prepare mnist` once) and USPS, which
is not in TFDS, as a .npz of x_train (7291, 16, 16), y_train, x_test (2007, 16, 16) and
y_test in the working directory, or anywhere with --config.domains.usps.source=npz:PATH.
All images are converted to 28x28x3, and all training images are used. Many papers use
2,000 images of MNIST and 1,800 of USPS instead, or split USPS differently.

Published accuracy on the target's test images, MNIST to USPS. The protocol and network
differ in this way, so don't expect to reproduce these numbers here (source: Tzeng et
al., Adversarial Discriminative Domain Adaptation, CVPR 2017, arXiv 1702.05464, table
2):

  recipe         ADDA paper
  source_only          .752
  dann                .771†

† quoted from memory, unverified. Reimplementations print .79 to .87 for source_only.

Cost: 5,000 steps of 64 + 64 images; about 4 minutes on two CPU cores.

Argument: a recipe for domain adaptation (see docs/methods.md) and
  steps   5000; all schedules scale with it
  net     mnist_dann, or lenet
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
    name='mnist_usps',
    source='tfds:mnist',
    target={'source': 'npz:usps.npz'},
    images=60000,
    n_max=(5000, 500),
  )
