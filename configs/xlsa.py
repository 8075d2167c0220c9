"""The benchmark of Xian et al.: ResNet-101 features, attributes, proposed splits.

  python -m lt_jax.main --config=configs/xlsa.py:eszsl,data=cub --workdir=runs/cub \
    --config.data.source=xlsa:xlsa17/data/CUB

The folder holds res101.mat and att_splits.mat. The digests of both are printed, because
there are two versions of the splits. In the proposed split no unseen class is in
ImageNet-1k, on which the features were trained; data.pretrain_classes=FILE checks this
for other features.

Per-class accuracy in %, zero-shot T, and generalised U / S / H, not calibrated:

  recipe   SUN     CUB     AwA1    AwA2    aPY     CUB              AwA2
  devise   56.5    52.0    54.2    59.7    39.8    23.8 53.0 32.8   17.1 74.7 27.8
  sje      53.7    53.9    65.6    61.9    32.9    23.5 59.2 33.6    8.0 73.9 14.4
  ale      58.1    54.9    59.9    62.5    39.7    23.7 62.8 34.4   14.0 81.8 23.9
  eszsl    54.5    53.9    58.2    58.6    38.3    12.6 63.8 21.0    5.9 77.8 11.0
  dap      39.9†   40.0†   44.1†   46.1†   33.8†    1.7  67.9  3.3†   0.0 84.7  0.0†
  iap      19.4†   24.0†   35.9†   35.9†   36.6†    0.2  72.8  0.4†   0.9 87.6  1.8†
  conse    38.8†   34.3†   45.6†   44.5†   26.9†    1.6  72.2  3.1†   0.5 90.6  1.0†

  recipe   SUN               aPY
  devise   16.9 27.4 20.9     4.9 76.9  9.2
  sje      14.7 30.5 19.8     3.7 55.7  6.9
  ale      21.8 33.1 26.3     4.6 73.7  8.7
  eszsl    11.0 27.9 15.8     2.4 70.1  4.6
  dap       4.2 25.1  7.2†    4.8 78.3  9.0†
  iap       1.0 37.8  1.8†    5.7 65.6 10.4†
  conse     6.8 39.9 11.6†    0.0 91.2  0.0†

Published by Xian et al., TPAMI 2018 (arXiv 1707.00600), as repeated in public code,
except that it has 80.5 for S of sje on SUN, which does not fit H; † quoted from memory,
unverified. Public code has 54.8 for eszsl on AwA2. Ours: not run, because the features
must be downloaded; the command is above.

Cost: closed forms take seconds on two CPU cores, the kernel form minutes and 8 bytes
times the square of the number of training images, methods with gradients minutes.

Argument: a recipe for zero-shot learning (see docs/methods.md) and
  data     awa2 (default), awa1, cub, sun or apy
  epochs   10, for methods with gradients; schedules scale with it

For a standard split, by classes only, set data.train_split='all', data.test_split='all'
and data.unseen=('@testclasses.txt',).
"""

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.errors import lookup
from lt_jax.protocols import train_by
from lt_jax.protocols.features import training

VALIDATION = {'awa1': 13, 'awa2': 13, 'cub': 50, 'sun': 65, 'apy': 5}
"""Number of seen classes that play unseen ones for validation, as in the paper."""


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'eszsl', 'ale,data=cub', ..."""
  recipe, option = parse_arg(arg, 'eszsl', data='awa2', epochs=10.0)
  config = apply(
    base_config(),
    {
      'name': 'xlsa',
      'task': 'zero_shot',
      'data': {
        'source': f'xlsa:xlsa17/data/{option.data.upper()}',
        'val_classes': (lookup(VALIDATION, 'data set', option.data),),
        'many_shot': 0,
        'few_shot': 0,
        'unit': 'l2',
      },
    },
  )
  return train_by(config, recipe, training(option.epochs))
