"""GTA5 to Cityscapes: from streets of a game, with labels, to real ones without.

  python -m lt_jax.main --config=configs/gta5_cityscapes.py:advent --workdir=runs/gta5 \
      --config.init=timm/resnet101.tv_in1k

Data: GTA5 as unpacked (`images`, `labels`; 24,966 images) in the folder `gta5`, or
anywhere with --config.data.source=gta5:DIR, and Cityscapes (`leftImg8bit`, `gtFine`) in
`cityscapes`, or --config.domains.cityscapes.source=cityscapes:DIR. The ids in their
label files are mapped to the 19 classes here. Cityscapes' 2,975 training images are the
target, without labels. Its 500 validation images are the test set, and never used to
choose anything.

Published mIoU over 19 classes in %, DeepLab-v2 on ResNet-101. The papers report the
best of about 60 checkpoints on the test images, and neighbouring checkpoints differ by
points. We report the last checkpoint, the best one (`oracle`) and those that label-free
rules choose, each under its own name, in the report's table "Which State would be
chosen".

  recipe        ADVENT    TLLib    ours
  source_only    36.6†     37.3    not run
  minent         42.3†             not run
  adapt_seg      42.4†             not run
  advent         43.8      43.8    not run
  target_only    65.1      70.5    not run

The paper also averages the logits of two models (AdvEnt + MinEnt: 45.5) and trains on
CycleGAN images (46.3); neither is implemented here. With net=vgg16: minent 32.8†,
advent 36.1†.

† quoted from memory, unverified. Sources: the README of valeoai/ADVENT (Vu et al., CVPR
2019, arXiv 1811.12833), and that of thuml/Transfer-Learning-Library.

The setting is ADVENT's: source images are resized to 1280 x 720, target images to 1024
x 512; one of each per step, no augmentation; SGD at 2.5e-4, ten times that for the
head, with a decay over 250,000 steps that stops after 120,000. Two things differ:
pixels and weights are torchvision's rather than Caffe's, and logits are resized to the
size of the images before they are resized to that of the labels.

Cost: 120,000 steps of 1 + 1 images and an evaluation every 2,000: not run, on the order
of two days on one GPU.

Argument: a recipe for domain adaptation (see docs/methods.md) and
  net      resnet101 (default), resnet50, vgg16, vgg16_bn, lite0, or small for CPUs
  steps    120000; all schedules scale with it
"""

from lt_jax.config import parse_arg
from lt_jax.protocols.driving import adaptation


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'advent', 'minent,net=vgg16', ..."""
  recipe, option = parse_arg(arg, 'advent', net='resnet101', steps=120_000)
  return adaptation(
    recipe,
    name='gta5_cityscapes',
    source={'source': 'gta5:gta5', 'resize_to': (720, 1280)},
    targets={
      'cityscapes': {
        'source': 'cityscapes:cityscapes',
        'test_split': 'val',
        'resize_to': (512, 1024),
      }
    },
    net=option.net,
    images=24_966,
    steps=option.steps,
    part=0.48,
  )
