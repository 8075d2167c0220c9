"""ImageNet with ResNet-50: the largest of the tables of class-balanced loss.

  python -m lt_jax.main --config=configs/imagenet.py:cb_focal --workdir=gs://BUCKET/run1

Data: the TFDS set `imagenet2012` (run `python -m lt_jax.prepare imagenet2012` once;
TFDS asks for the ILSVRC2012 archives). 1,281,167 training images, 1,300 to 732 per
class, which is hardly a tail. The 50,000 images of 'val' are the test set, as in all
papers, so there is no validation set to select a checkpoint on: the last one is
evaluated. If you have no data, train on generated images: --config.data.source=fake.

Published, top-1 and top-5 error in % (Cui et al., CVPR 2019; protocol cui):

  recipe      ResNet-50          ResNet-101         ResNet-152
  ce          23.92†, 7.03†      22.65†, 6.47†      21.68†, 5.92†
  cb_focal    22.71†, 6.72†      21.57†, 5.91†      20.87†, 5.61†

† quoted from memory, unverified.

Cost: `cb_focal` takes 112,603 steps of 1,024 images; not run. To see what that needs:

  python -m lt_jax.plan --config=configs/imagenet.py:cb_focal --devices=v5e:4x8

Argument: a recipe (see docs/methods.md) and
  net         resnet50, or resnet10, 18, 34, 101, 152, resnext50_32x4d
  epochs      90, in the first stage; all stages scale with it
"""

from lt_jax.protocols import photographs


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'cb_focal', 'ce,net=resnet101', ..."""
  return photographs.photographs_lt(arg, name='imagenet')
