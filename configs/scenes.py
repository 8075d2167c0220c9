"""Street scenes: an embedded pair of domains in which every pixel has a class.

  python -m lt_jax.main --config=configs/scenes.py:source_only --workdir=runs/scenes

Images of 64 x 64 pixels with sky, road, buildings, vegetation, and, rarely, cars, poles
and persons (`lt_jax/data/scenes.py`). The source, `sim`, has flat colours; the target,
`real`, has other colours, textures, shadows, haze and noise. `fog`, `night` and `rain`
can form a compound target, and `snow` is an open domain. Nothing is downloaded: images
are generated when a run starts, 1,400 per domain in about two seconds. All domains are
tested on the same 300 layouts.

There is no published number: the data are our own. Use the mIoU to compare methods with
each other, never with Cityscapes. Expect source_only below MinEnt (`entropy`) and FDA,
and those below target_only. With target=fog+night+rain expect source_only below
adapt_seg, and adapt_seg below `ocda`.

With tail=10 the source's training images keep one in ten of their cars, poles and
persons. That is a long tail of pixels, which the long-tailed losses count:

  python -m lt_jax.main --config=configs/scenes.py:balanced_softmax,tail=10 ...

Sigmoid losses (`cb_focal`, ...) need --config.model.head=linear, which has a single
bias.

Cost: 3,000 steps of 8 images (or 8 + 8) at 64 x 64, about four minutes (or seven) on
two CPU cores.

Argument: a recipe for domain adaptation or long tails (see docs/methods.md) and
  target      real (default), or several joined by +: target=fog+night+rain
  train       1000 training images per domain
  tail        1: as they are drawn; 10: a tenth of the cars, poles and persons
  layout      0 to 1: how far layouts of the target differ from those of the source
  style       0.7: how far the target's style differs, 0 to 1
  steps       3000; all schedules scale with it
"""

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.protocols import train_by
from lt_jax.protocols.scenes import epochs_of, training

OPEN = 'snow'
"""The domain without training images."""


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'source_only', 'fda,target=fog+night+rain', ..."""
  recipe, option = parse_arg(
    arg,
    'source_only',
    target='real',
    train=1000,
    tail=1.0,
    layout='0',
    style=0.7,
    steps=3000,
  )
  target = tuple(option.target.split('+'))
  look = f'train={option.train},layout={option.layout},style={option.style:g}'
  opened = tuple(name for name in (OPEN,) if name not in target)
  config = apply(
    base_config(),
    {
      'name': 'scenes',
      'task': 'segmentation',
      'data': {
        'source': f'scenes:sim,train={option.train},tail={option.tail:g}',
        'mean': (0.5,),
        'std': (0.25,),
        'flip': True,
        'many_shot': 0,  # twice the median number of pixels per class
        'few_shot': 0,
      },
      'domains': {
        name: {'source': f'scenes:{name},{look}'} for name in (*target, *opened)
      },
      'target': target,
      'open_domains': opened,
      'model': {'trunk': 'small_segmenter', 'head': 'multi_dilation'},
    },
  )
  epochs = epochs_of(option.steps, option.train)
  return train_by(config, recipe, training(epochs))
