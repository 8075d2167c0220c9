"""ImageNet-LT with ResNet-10: the benchmark of open long-tailed recognition.

  python -m lt_jax.main --config=configs/imagenet_lt.py:oltr --workdir=gs://BUCKET/oltr

Data: the TFDS set `imagenet_lt` (run `python -m lt_jax.prepare imagenet_lt` once), or
the published lists, including the open set if you have it, and a folder of images:

  --config.data.source=list:LISTS --config.data.dir=IMAGES

LISTS holds ImageNet_LT_train.txt, _val.txt, _test.txt and optionally _open.txt; IMAGES
has the folders train and val of ILSVRC2012 (and ImageNet_LT_open). 1,000 classes with
1,280 to 5 images, 115,846 in all; 385 are many-shot, 479 medium-shot and 136 few-shot.

Published, in % (Liu et al., CVPR 2019; F as 'oltr2019', on the closed set many, medium,
few and all classes; the paper's `plain` is `ce` here):

  recipe           many  medium   few    all      F
  ce               40.9    10.7   0.4   20.9   29.5
  lifted          35.8*   30.4* 17.9*  30.8*  37.4*
  focal_aware     36.4*   29.9* 16.0*  30.5*  37.1*
  range           35.8*   30.3* 17.6*  30.7*  37.3*
  openmax             -       -     -      -  36.8*
  fslwf           40.9*   22.1* 15.0*  28.4*  34.7*
  oltr            43.2*   35.1* 18.5*  35.6*  47.4*

* the authors published no code for the baselines, so their constants are ours; `oltr`
follows the authors' last configuration, which is newer than the table.

`ce` trains for 30 epochs as in that table, the others for 90 in all, which favours
them: `ce,epochs=90` is the fair control. Every stage keeps its best State by validation
images, except the one of few-shot episodes.

Cost: `oltr` takes 27,152 + 54,300 steps of 128 images; not run.

Argument: a recipe (see docs/methods.md) and
  net         resnet10, or resnet18, 34, 50, 101, 152, resnext50_32x4d
  protocol    liu (30 epochs, batch 128, steps; a second stage of 60) or kang (90
              epochs, batch 512, cosine; not for recipes with a second training); the
              default is that of the recipe's own paper
  epochs      overrides those of the first stage; all stages scale with it
"""

from lt_jax.protocols import photographs


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'oltr', 'crt,net=resnext50_32x4d', ..."""
  return photographs.photographs_lt(arg, name='imagenet_lt', recipe='oltr')
