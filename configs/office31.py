"""Office-31: the same products in a shop's pictures and from two cameras; six pairs.

  python -m lt_jax.main --config=configs/office31.py:dann,source=amazon,target=webcam,\
init=timm/resnet50.tv_in1k --workdir=runs/office31

Data: the archive of Saenko et al. (ECCV 2010), unpacked as
office31/DOMAIN/images/CLASS/*.jpg, where DOMAIN is amazon (2,817 images), dslr (498) or
webcam (795), 31 classes; use data=FOLDER if it is elsewhere. The set is not in TFDS.
data=FILE.npz reads arrays: pairs x_DOMAIN (N, H, W, 3) uint8 and y_DOMAIN. As usual all
images of both domains are used for training, those of the target without labels, and
all of them are tested on.

features=FILE.npz trains a bottleneck and a head on features of a frozen network, pairs
x_DOMAIN (N, D) and y_DOMAIN, as written by

  python -m lt_jax.probe --config=configs/office31.py:net=efficientnet_lite0 \
    --init=timm/tf_efficientnet_lite0.in1k --layers=last --save=office31.npz

Published accuracy in %, ResNet-50 at 224 pixels, mean over the six pairs, by the papers
and by TLLib's own runs, which select the epoch with the target's labels (source: the
table of the library's README):

  recipe         papers   TLLib
  source_only      76.1    79.5
  dan              80.4    83.7
  dann             82.2    86.1
  jan              84.3    87.0
  adda                -    87.3
  cdan             87.7    87.7
  mcd                 -    85.4
  mcc              89.4    89.6

TLLib's `adda` is a different method with the same name. The protocol is that of TLLib's
code: 10,000 steps of 32 + 32 images, a learning rate that decays from 0.01, a tenth of
it for the trunk, a bottleneck of 256.

Cost: 1,000 steps on features take a few seconds; ResNet-50 needs an accelerator.

Argument: a recipe for domain adaptation (see docs/methods.md) and
  source    amazon (default), dslr or webcam
  target    webcam (default), likewise
  net       resnet50, or efficientnet_lite0, which two CPU cores can train at size=128
  data      office31, the folder, or an .npz
  features  an .npz of features, instead of photographs
  size      224
  init      initial weights; without them a network learns nothing from photographs
  steps     10000, or 1000 on features; all schedules scale with it
"""

from lt_jax.protocols.pairs import Pairs, pair_of_photographs

OFFICE31 = Pairs(
  'office31',
  {'amazon': 2817, 'dslr': 498, 'webcam': 795},
  '{data}/{domain}/images',
  ('amazon', 'webcam'),
)


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'dann,source=dslr,target=webcam', ..."""
  return pair_of_photographs(arg, OFFICE31)
