"""iNaturalist 2017 with ResNet-50: 5,089 species as people photograph them.

  python -m lt_jax.main --config=configs/inat17.py:cb_focal --workdir=gs://BUCKET/run1

Data: the TFDS set `i_naturalist2017` (run `python -m lt_jax.prepare i_naturalist2017`
once). 579,184 training images, 3,919 to 9 per class. The 95,986 images of 'val' are the
test set, so there is no validation set to select a checkpoint on: the last one is
evaluated. If you have no data, train on generated images: --config.data.source=fake.

Published, top-1 error in % (Cui et al., CVPR 2019): `ce` 45.38†, `cb_focal` 41.92†.

† quoted from memory, unverified.

Cost: `cb_focal` takes 50,905 steps of 1,024 images; not run.

Argument: as in configs/inat18.py.
"""

from lt_jax.protocols import photographs


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'cb_focal', 'crt,net=resnet101', ..."""
  return photographs.photographs_lt(arg, name='inat17')
