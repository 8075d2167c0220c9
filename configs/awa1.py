"""Animals with Attributes 1: 50 animals, 85 attributes, features from a file.

  python -m lt_jax.main --config=configs/awa1.py:eszsl --workdir=runs/awa1 \
    --config.data.source=xlsa:FEATURES --config.data.dir=AWA1_att_splits.mat

FEATURES is an `.npz` with 'features' (30475, D), 'labels' (30475,) from 0 and 'classes'
(50,), in the order of images of the split, and of classes in any; or the res101.mat of
Xian et al. (configs/xlsa.py has those with their published numbers). Of the published
histograms, as here, numbers are lower than those of networks that have seen ImageNet.

Two splits: `proposed` has test images of seen classes too; `standard`, Lampert et
al.'s, has those of its ten unseen classes alone, so there is the zero-shot view only.
Thirteen of the seen classes, drawn by the data seed, are the validation classes.

  recipe          split      T
  dap             standard   40.5 †

† quoted from memory, unverified: published by Lampert et al. with kernel machines.

Cost: closed forms take seconds on two CPU cores, the kernel form two minutes (and 4 GB
of memory), methods with gradients one or two minutes.

Argument: a recipe of zero-shot learning (see docs/methods.md) and
  split    proposed (default) or standard
  epochs   10, of methods with gradients; schedules scale with it
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
