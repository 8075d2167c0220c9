"""VisDA-2017: renderings of twelve kinds of objects, then photographs of them.

  python -m lt_jax.main --config=configs/visda.py:dann,init=timm/resnet50.tv_in1k \
    --workdir=runs/visda

Data: the classification track of Peng et al. (arXiv 1710.06924), unpacked as
visda/train/CLASS/*.png (152,397 renderings) and visda/validation/CLASS/*.jpg (55,388
photographs), as the challenge's archives are. It is not in TFDS. data=FILE.npz and
features=FILE.npz are as for configs/office31.py, whose protocol this is, but that it
has 30,000 steps. The photographs are used without labels, and all of them are tested
on; the challenge measures the mean over classes, macro_accuracy here.

Published numbers are in many protocols, most of them the best epoch on the target's
labels; none stands here.

Cost: 30,000 steps of 32 + 32 images; ResNet-50 needs an accelerator.

Argument: a recipe of domain adaptation (see docs/methods.md) and
  net, data, features, size, init, steps   as for configs/office31.py
"""

from lt_jax.protocols.pairs import Pairs, pair_of_photographs

VISDA = Pairs(
  'visda',
  {'train': 152397, 'validation': 55388},
  '{data}/{domain}',
  ('train', 'validation'),
  steps=30_000,
)


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'dann', 'mcc,steps=10000', ..."""
  return pair_of_photographs(arg, VISDA)
