"""Office-31: products of a shop, and the same photographed by two cameras; six pairs.

  python -m lt_jax.main --config=configs/office31.py:dann,source=amazon,target=webcam,\
init=timm/resnet50.tv_in1k --workdir=runs/office31

Data: the archive of Saenko et al. (ECCV 2010), unpacked as
office31/DOMAIN/images/CLASS/*.jpg, DOMAIN being amazon (2,817 images), dslr (498) and
webcam (795), 31 classes; data=FOLDER where it lies elsewhere. The set is not in TFDS.
data=FILE.npz reads arrays: pairs x_DOMAIN (N, H, W, 3) uint8 and y_DOMAIN. As usual all
images of both domains are used, those of the target without labels, and all of them are
tested on.

features=FILE.npz trains a bottleneck and a head on features that a frozen network left,
pairs x_DOMAIN (N, D) and y_DOMAIN, as this writes them:

  python -m lt_jax.probe --config=configs/office31.py:net=efficientnet_lite0 \
    --init=timm/tf_efficientnet_lite0.in1k --layers=last --save=office31.npz

Published accuracy in %, ResNet-50 at 224 pixels, mean over the six pairs, by the papers
and by TLLib's own runs, which choose the epoch by labels of the target (source: the
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

TLLib's `adda` is another method of that name. The protocol is that of its code: 10,000
steps of 32 + 32 images, a rate of 0.01 that falls, a tenth of it for the trunk, a
bottleneck of 256.

Cost: 1,000 steps on features some seconds; ResNet-50 needs an accelerator.

Argument: a recipe of domain adaptation (see docs/methods.md) and
  source    amazon (default), dslr or webcam
  target    webcam (default), likewise
  net       resnet50, or efficientnet_lite0, which two CPU cores can bear at size=128
  data      office31, the folder, or an .npz
  features  an .npz of features, in place of photographs
  size      224
  init      weights to begin with; without any a network of photographs learns nothing
  steps     10000, on features 1000; all schedules scale
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
