"""Cityscapes to Foggy Cityscapes: from streets with labels to foggy ones without.

  python -m lt_jax.main --config=configs/cityscapes_foggy.py:advent \
      --workdir=runs/foggy --config.init=timm/resnet101.tv_in1k

Data: Cityscapes (`leftImg8bit`, `gtFine`) with `leftImg8bit_foggy` next to it, of which
the images with beta = 0.02 are used, in the folder `cityscapes`, or anywhere with
--config.data.source=cityscapes:DIR and
--config.domains.foggy.source=cityscapes_foggy:DIR. The test images are the 500
validation images, in fog. They are in no training set, but the training images of both
domains show the same places.

Published mIoU over 19 classes in %, DeepLab-v2 on ResNet-101:

  recipe        TLLib   ours
  source_only    51.2   not run
  advent         61.8   not run
  fda            61.9   not run
  target_only    66.9   not run

Source: the README of thuml/Transfer-Learning-Library. Its protocol differs from ours in
crops, batch size and learning rate (2.5e-3), and it picks the best checkpoint on the
test images.

Cost: 60,000 steps of 1 + 1 images: not run, on the order of a day on one GPU.

Argument: a recipe for domain adaptation (see docs/methods.md) and
  net      resnet101 (default), resnet50, vgg16, vgg16_bn, lite0, or small for CPUs
  steps    60000; all schedules scale with it
"""

from lt_jax.config import parse_arg
from lt_jax.protocols.driving import adaptation


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'advent', 'source_only,net=small', ..."""
  recipe, option = parse_arg(arg, 'advent', net='resnet101', steps=60_000)
  return adaptation(
    recipe,
    name='cityscapes_foggy',
    source={
      'source': 'cityscapes:cityscapes',
      'test_split': 'val',
      'resize_to': (512, 1024),
    },
    targets={'foggy': {'source': 'cityscapes_foggy:cityscapes'}},
    net=option.net,
    images=2_975,
    steps=option.steps,
  )
