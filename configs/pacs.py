"""PACS: photographs, paintings, cartoons and sketches of seven classes; twelve pairs.

  python -m lt_jax.main --config=configs/pacs.py:dann,source=photo,target=sketch,\
init=timm/resnet50.tv_in1k --workdir=runs/pacs

Data: the set of Li et al. (ICCV 2017), unpacked as pacs/DOMAIN/CLASS/*.jpg, where
DOMAIN is photo (1,670 images), art_painting (2,048), cartoon (2,344) or sketch (3,929).
It is not in TFDS; get it from the authors' page on domain generalization. data=FILE.npz
and features=FILE.npz work as in configs/office31.py, whose protocol is used. All images
of both domains are used for training, those of the target without labels, and all of
them are tested on.

Published numbers for these pairs use other protocols (the set was made for domain
generalization, with three sources and an unseen target), so we quote none.

Cost: 10,000 steps of 32 + 32 images; ResNet-50 needs an accelerator.

Argument: a recipe for domain adaptation (see docs/methods.md) and
  source, target   photo and sketch by default
  net, data, features, size, init, steps   as in configs/office31.py
"""

from lt_jax.protocols.pairs import Pairs, pair_of_photographs

PACS = Pairs(
  'pacs',
  {'photo': 1670, 'art_painting': 2048, 'cartoon': 2344, 'sketch': 3929},
  '{data}/{domain}',
  ('photo', 'sketch'),
)


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'mcc,source=cartoon,target=photo', ..."""
  return pair_of_photographs(arg, PACS)
