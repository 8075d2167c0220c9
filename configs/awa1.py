"""Animals with Attributes 1: 50 animals, 85 attributes, features from a file.

  python -m lt_jax.main --config=configs/awa1.py:eszsl --workdir=runs/awa1 \
    --config.data.source=xlsa:FEATURES --config.data.dir=AWA1_att_splits.mat

FEATURES is an `.npz` with 'features' (30475, D), 'labels' (30475,) counted from 0, and
'classes' (50,). Its images must be in the order of the split file; its classes can be
in any order. It can also be the res101.mat of Xian et al. (configs/xlsa.py has those
features with their published numbers). The published histogram features, used here,
give lower numbers than features of networks trained on ImageNet.

There are two splits. `proposed` also has test images of seen classes. `standard`, by
Lampert et al., only tests its ten unseen classes, so it only gives zero-shot metrics.
Thirteen of the seen classes, drawn with the data seed, are the validation classes.

  recipe          split      T
  dap             standard   40.5 †

† quoted from memory, unverified: published by Lampert et al. with kernel machines.

Cost: closed forms take seconds on two CPU cores, the kernel form two minutes (and 4 GB
of memory), methods with gradients one or two minutes.

Argument: a recipe for zero-shot learning (see docs/methods.md) and
  split    proposed (default) or standard
  epochs   10, for methods with gradients; schedules scale with it
"""

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.errors import lookup
from lt_jax.protocols import train_by
from lt_jax.protocols.features import training

STANDARD = (
  'chimpanzee',
  'giant+panda',
  'hippopotamus',
  'humpback+whale',
  'leopard',
  'persian+cat',
  'pig',
  'raccoon',
  'rat',
  'seal',
)
"""The unseen classes of Lampert et al., CVPR 2009."""

SPLITS = {
  'proposed': {},
  'standard': {'train_split': 'all', 'test_split': 'all', 'unseen': STANDARD},
}


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'eszsl', 'ale,split=standard', ..."""
  recipe, option = parse_arg(arg, 'eszsl', split='proposed', epochs=10.0)
  config = apply(
    base_config(),
    {
      'name': 'awa1',
      'task': 'zero_shot',
      'data': {
        'source': 'xlsa:awa1_features.npz',
        'dir': 'AWA1_att_splits.mat',
        'val_classes': (13,),
        'many_shot': 0,
        'few_shot': 0,
        'unit': 'l2',
        **lookup(SPLITS, 'split', option.split),
      },
    },
  )
  return train_by(config, recipe, training(option.epochs))
