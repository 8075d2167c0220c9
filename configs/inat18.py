"""iNaturalist 2018 with ResNet-50: 8,142 species as people photograph them.

  python -m lt_jax.main --config=configs/inat18.py:cb_focal --workdir=gs://BUCKET/run1

Data: the TFDS set `i_naturalist2018` (run `python -m lt_jax.prepare i_naturalist2018`
once), or the published lists and a folder of images (--config.data.source=list:LISTS
--config.data.dir=IMAGES, where LISTS has iNaturalist18_train.txt and _val.txt). 437,513
training images, 1,000 to 2 per class. The 24,426 images of 'val', three per class, are
the test set, as in all papers, so there is no validation set to select a checkpoint on:
the last one is evaluated. If you have no data, train on generated images:
--config.data.source=fake.

Published, top-1 error in %:

  recipe                   error   source
  ce                       42.86†  Cui et al., CVPR 2019, protocol cui
  cb_focal                 38.88†  the same
  ldam_drw                 32.00†  Cao et al., NeurIPS 2019
  ce, 90 epochs            38.3    Kang et al., protocol kang (RIDE's model zoo)
  crt, 90 epochs           34.8†   Kang et al., ICLR 2020, protocol kang
  tau_norm, 90 epochs      34.4†   the same; tau chosen on the test set, here it is not
  lws, 90 epochs           34.1    the same (RIDE's model zoo)

† quoted from memory, unverified.

Cost: `cb_focal` takes 38,454 steps of 1,024 images; not run.

Argument: a recipe (see docs/methods.md) and
  net         resnet50, or resnet10, 18, 34, 101, 152, resnext50_32x4d
  protocol    cui (90 epochs, batch 1024, steps) or kang (90 epochs, batch 512, cosine;
              for the decoupled recipes)
  epochs      overrides those of the first stage; all stages scale with it
"""

from lt_jax.protocols import photographs


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'cb_focal', 'crt,net=resnet101', ..."""
  return photographs.photographs_lt(arg, name='inat18')
