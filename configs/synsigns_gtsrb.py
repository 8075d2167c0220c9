"""Synthetic traffic signs to GTSRB: 43 signs, from drawings to photographs.

  python -m lt_jax.main --config=configs/synsigns_gtsrb.py:dann \
    --workdir=runs/synsigns_gtsrb

Data: neither set is in TFDS. Syn Signs (Moiseev et al. 2013, 100,000 images) is hard to
get today; GTSRB (Stallkamp et al. 2011) is on its benchmark's website. Store each as a
.npz of x_train (N, 40, 40, 3) uint8, y_train, x_test and y_test, with labels 0 to 42 in
GTSRB's order: synsigns.npz and gtsrb.npz in the working directory, or anywhere with
--config.data.source=npz:PATH and --config.domains.gtsrb.source=npz:PATH. The paper
trains on 31,367 GTSRB images without labels and tests on the others. The target has a
heavy tail of its own.

Published accuracy on the target's test images. The two papers print different numbers
for the same method; do not mix them.

  recipe         ICML 2015   JMLR 2016
  source_only        .7400      .7900†
  sa                 .7635      .8165†
  dann               .8866      .8865†
  target_only        .9987      .9980†

† quoted from memory, unverified. Sources: Ganin and Lempitsky, arXiv 1409.7495; Ganin
et al., arXiv 1505.07818. Their SA uses the dimension that is best by the target's
labels, which is `sa_oracle` here. The layers of the network are from memory too.

Cost: 5,000 steps of 64 + 64 images of 40 pixels: over an hour on two CPU cores
(estimated, not measured).

Argument: a recipe for domain adaptation (see docs/methods.md) and
  steps   5000; all schedules scale with it
  net     gtsrb_dann, the paper's
  imbalance   of the source: 1, or e.g. 100 for a long-tailed exponential profile
  target_imbalance  of the target's training images, likewise
  target_profile    exponential (default), or reversed
"""

from lt_jax.protocols import digits


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'dann', 'source_only,steps=1000', ..."""
  return digits.pair(
    arg,
    name='synsigns_gtsrb',
    source='npz:synsigns.npz',
    target={'source': 'npz:gtsrb.npz'},
    images=100000,
    n_max=(2000, 1500),
    net='gtsrb_dann',
    size=40,
    classes=43,
  )
