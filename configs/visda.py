"""VisDA-2017: from renderings of twelve kinds of objects to photographs of them.

  python -m lt_jax.main --config=configs/visda.py:dann,init=timm/resnet50.tv_in1k \
    --workdir=runs/visda

Data: the classification track of Peng et al. (arXiv 1710.06924), unpacked as
visda/train/CLASS/*.png (152,397 renderings) and visda/validation/CLASS/*.jpg (55,388
photographs), like the challenge's archives. It is not in TFDS. data=FILE.npz and
features=FILE.npz work as in configs/office31.py, whose protocol is used with 30,000
steps. The photographs are used for training without labels, and all of them are tested
on. The challenge reports the mean over classes, macro_accuracy here.

Published numbers come from many protocols, most of which select the best epoch with the
target's labels; we quote none.

Cost: 30,000 steps of 32 + 32 images; ResNet-50 needs an accelerator.

Argument: a recipe for domain adaptation (see docs/methods.md) and
  net, data, features, size, init, steps   as in configs/office31.py
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
