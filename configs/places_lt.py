"""Places-LT with ResNet-152: scenes, starting from an ImageNet network.

  python -m lt_jax.main --config=configs/places_lt.py:oltr \
    --config.data.source=list:LISTS --config.data.dir=IMAGES --workdir=runs/places

Data: the published lists and a folder of images (Places365, 256 x 256 pixels). LISTS
(by default the folder Places_LT) holds Places_LT_train.txt, _val.txt, _test.txt and
optionally _open.txt, with either of their two spellings of paths (or
Places_LT_v2_*.txt); IMAGES is either archive, unpacked. 365 classes with 4,980 to 5
images, 62,500 in all; 131 are many-shot, 163 medium and 71 few.

Published, in % (Liu et al., CVPR 2019; closed set, F as 'oltr2019'):

  recipe           many  medium   few    all      F
  ce               45.9    22.4  0.36   27.2   36.6
  lifted          41.1*   35.4* 24.0*  35.2*  45.9*
  focal_aware     41.1*   34.8* 22.4*  34.6*  45.3*
  range           41.1*   35.4* 23.2*  35.1*  45.7*
  openmax             -       -     -      -  45.8*
  fslwf           43.9*   29.9* 29.5*  34.9*  37.5*
  oltr            44.7*   37.0* 25.3*  35.9*  46.4*

* as in configs/imagenet_lt.py.

These numbers start from a network trained on ImageNet. Pass yours with
--config.init=FILE (`python -m lt_jax.convert` turns a PyTorch file into
FILE.safetensors) or --config.init=timm/resnet152.tv_in1k. Random weights will not get
there, and protocol kang, which only trains the last block of the trunk, refuses to
start from them.

Cost: `oltr` takes 14,649 + 14,640 steps of 128 images; not run.

Argument: as in configs/imagenet_lt.py; kang has 30 epochs of batches of 256.
"""

from lt_jax.protocols import photographs


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'oltr', 'crt', ..."""
  return photographs.photographs_lt(arg, name='places_lt', recipe='oltr')
