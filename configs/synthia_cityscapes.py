"""SYNTHIA to Cityscapes: from rendered streets with labels to real ones without.

  python -m lt_jax.main --config=configs/synthia_cityscapes.py:advent \
      --workdir=runs/synthia --config.init=timm/resnet101.tv_in1k

Data: SYNTHIA-RAND-CITYSCAPES (`RGB`, `GT/LABELS`; 9,400 images) in the folder
`synthia`, or anywhere with --config.data.source=synthia:DIR, and Cityscapes as for
`gta5_cityscapes`. SYNTHIA's label files have three 16-bit channels, with the id in the
first. Overwrite each file once with just that channel, in 8 bits (for example with
OpenCV: `imwrite(path, imread(path, -1)[..., 2].astype('uint8'))`).

The 16 classes are those of SYNTHIA. classes=13 leaves out wall, fence and pole in
training too; papers train with 16 classes and leave them out of the mean.
`iou_by_class` of result.json has what you need for such a mean.

Published mIoU in %, DeepLab-v2 on ResNet-101, over 16 classes and over 13 of them; the
best of many checkpoints on the test images, as for `gta5_cityscapes`:

  recipe        16      13              ours
  source_only           41.5 (TLLib)    not run
  adapt_seg             46.7†           not run
  minent        38.1†   44.2†           not run
  advent        40.8†   47.6            not run
  advent_minent 41.2†   48.0†           not run
  target_only           71.7            not run

With net=vgg16: minent_cp 30.4† / 35.4†, advent_cp 31.4† / 36.6†.

† quoted from memory, unverified. Sources as for `gta5_cityscapes`. So is the setting,
except that source images have 1280 x 760 pixels, and that all 90,000 steps of the decay
are run.

Cost: 90,000 steps of 1 + 1 images: not run, on the order of a day and a half on one
GPU.

Argument: a recipe for domain adaptation (see docs/methods.md) and
  net      resnet101 (default), resnet50, vgg16, vgg16_bn, lite0, or small for CPUs
  classes  16 (default) or 13
  steps    90000; all schedules scale with it
"""

from lt_jax.config import parse_arg
from lt_jax.errors import lookup
from lt_jax.protocols.driving import adaptation

KINDS = {16: ('synthia', 'cityscapes16'), 13: ('synthia13', 'cityscapes13')}
"""Number of classes -> the layouts of source and target with that many."""


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'advent', 'minent_cp,net=vgg16', ..."""
  recipe, option = parse_arg(arg, 'advent', net='resnet101', classes=16, steps=90_000)
  source, target = lookup(KINDS, 'number of classes', option.classes)
  return adaptation(
    recipe,
    name='synthia_cityscapes',
    source={'source': f'{source}:synthia', 'resize_to': (760, 1280)},
    targets={
      'cityscapes': {
        'source': f'{target}:cityscapes',
        'test_split': 'val',
        'resize_to': (512, 1024),
      }
    },
    net=option.net,
    images=9_400,
    classes=option.classes,
    steps=option.steps,
  )
