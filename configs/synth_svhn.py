"""Synthetic numbers to SVHN: from typeset digits on images to house numbers.

  python -m lt_jax.main --config=configs/synth_svhn.py:dann --workdir=runs/synth_svhn

Data: the TFDS set `svhn_cropped` (run `python -m lt_jax.prepare svhn_cropped` once),
and Ganin's Syn Numbers, which is not in TFDS: his archive SynthDigits.zip has two .mat
files of 32x32x3 images, X (H, W, 3, N) and y. Save them as one .npz of x_train (479400,
32, 32, 3) uint8, y_train, x_test (9553, ...) and y_test, in the working directory or
wherever --config.data.source=npz:PATH says. Labels are 0 to 9.

Published accuracy on SVHN's test images. The two papers print different numbers for the
same method; do not mix them.

  recipe         ICML 2015   JMLR 2016
  source_only        .8665      .8674†
  sa                 .8672      .8644
  dann               .9048      .9109
  target_only        .9244      .9220†

† quoted from memory, unverified. Sources: Ganin and Lempitsky, arXiv 1409.7495; Ganin
et al., arXiv 1505.07818. Their SA uses the dimension that is best by the target's
labels, which is `sa_oracle` here.

Cost: as configs/svhn_mnist.py, over an hour on two CPU cores for 5,000 steps; not
measured.

Argument: a recipe for domain adaptation (see docs/methods.md) and steps, net,
imbalance, target_imbalance and target_profile as in configs/svhn_mnist.py.
"""

from lt_jax.protocols import digits


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'dann', 'source_only,steps=1000', ..."""
  return digits.pair(
    arg,
    name='synth_svhn',
    source='npz:synth_numbers.npz',
    target={'source': 'tfds:svhn_cropped'},
    images=479400,
    n_max=(40000, 4500),
    net='svhn_dann',
    size=32,
  )
