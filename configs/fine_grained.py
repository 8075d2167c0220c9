r"""Transfer targets: birds, dogs, flowers, cars, aircraft, food, and Caltech's objects.

  python -m lt_jax.main --workdir=runs/cub/ce \
    --config=configs/fine_grained.py:ce,target=cub200,init=timm/resnet50.tv_in1k

  target        classes  training     test  data
  cub200            200     5,994    5,794  tfds:caltech_birds2011
  dogs              120    12,000    8,580  tfds:stanford_dogs
  flowers           102     1,020    6,149  tfds:oxford_flowers102, without its 'val'
  cars              196     8,144    8,041  tfds:cars196
  aircraft          100     6,667    3,333  data=folder:DIR or data=list:DIR
  food              101    75,750   25,250  tfds:food101
  nabirds           555    23,929   24,633  data=folder:DIR or data=list:DIR
  caltech101        102  30 / class  6,084  tfds:caltech101, with the background class
  caltech256        257  60 / class   rest  data=folder:DIR with a test split
  cats_vs_dogs        2    19,262    4,000  tfds:cats_vs_dogs, 2,000 of each held out

Prepare a TFDS set once: python -m lt_jax.prepare NAME. If you have no data, train on
generated images: --config.data.source=fake.

Published top-1 accuracy in %, Cui et al. (CVPR 2018), Inception-v3 at 299 pixels. The
fine-tuning is not published, so no run here matches that setting:

  pre-trained on    cub200   dogs  flowers   cars  aircraft   food  nabirds
  ImageNet           82.84  84.19    96.26  91.31     85.49  88.65    82.01
  iNaturalist        89.26  78.46    97.64  88.31     82.61  88.80    87.91
  both               85.84  82.36    97.07  91.38     85.21  88.45    83.98
  585 chosen classes 88.76  85.23    97.37  90.58     86.13  88.37    87.89

TLLib's plain fine-tuning of ResNet-50 (protocol=tllib), from its README: cub200 81.8,
cars 87.8, aircraft 80.1. Caltech by Zeiler and Fergus (ECCV 2014), a softmax on their
features: caltech101 85.4 (30 per class), caltech256 72.6 (60 per class), the mean
per-class accuracy over several draws. Ours is the macro accuracy, and
--config.data.seed makes another draw.

Cost: 2,500 steps of 48 images for cub200; not run.

Argument: a recipe (docs/methods.md: `ce` fine-tunes everything, the trunk at a tenth of
the rate under protocol=tllib; frozen, layer_decay, chop, l2_sp, ...) and
  target     one of the above
  data       the images, if they are not from TFDS
  init       initial weights: a file, a model, or the folder of a run
  net        resnet50, or any trunk of configs/my_images.py
  size       224; 0 for images in memory, such as data=npz:FILE, which keep their size
  per_class  training images per class, overriding the protocol's
  protocol   tllib, cui (the authors' demonstration) or bit
  epochs     overrides the protocol's
"""

from lt_jax.protocols.fine_grained import fine_grained


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'frozen,target=cars,init=WEIGHTS', ..."""
  return fine_grained(arg)
