"""Your own photographs in two domains: labelled ones, and others to adapt to.

  python -m lt_jax.main --config=configs/my_domains.py:dann,source=photos,\
target=sketches,net=resnet18,init=timm/resnet18.tv_in1k --workdir=runs/mine

Data: two folders of the same classes, each laid out as for configs/my_images.py:
`photos/CLASS/*.jpg`, or `photos/train/CLASS/*.jpg` with `val` and `test`. What is
missing of these is set aside as there. The target, which the run calls `unlabelled`,
gives its training images without their labels; its test images only measure how well
that worked. If you know no labels at all, put the target's images into one folder,
`sketches/*.jpg`, without folders inside. Every accuracy is then measured on the
source's test images; criteria such as the entropy of predictions still look at the
target. Without source= and target= the images are generated, so you can check that
everything runs.

Training follows TLLib, as in configs/office31.py.

Cost: a step takes 32 images from each domain; not measured. There is no published
number.

Argument: a recipe for domain adaptation (see docs/methods.md) and
  source   the folder of labelled images
  target   the folder of the others
  net      resnet18, or those of configs/my_images.py
  size     128, side of the images that the network sees
  epochs   20 of the source; all schedules scale with it
  init     initial weights, such as timm/resnet18.tv_in1k
"""

from lt_jax.config import Overrides, apply, base_config, parse_arg
from lt_jax.errors import UserError
from lt_jax.pretrained.dialects import pixels
from lt_jax.protocols import Protocol, train_by
from lt_jax.protocols.cutting import cut
from lt_jax.protocols.pairs import TRUNK_SLOWLY, tllib


def images_in(folder: str) -> Overrides:
  """Returns where images are and how many are set aside; generated without a folder."""
  if not folder:
    return {'source': 'fake'}
  source = f'folder:{folder}'
  return {'source': source, **cut(source, '')}


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'dann,source=photos,target=sketches', ..."""
  recipe, option = parse_arg(
    arg, 'dann', source='', target='', net='resnet18', size=128, epochs=20.0, init=''
  )
  if bool(option.source) != bool(option.target):
    missing = 'target' if option.source else 'source'
    raise UserError(
      f'{missing}= is missing: give both folders, or none to generate images'
    )
  config = apply(
    base_config(),
    {
      'name': 'my_domains',
      'init': option.init,
      'data': {
        **images_in(option.source),
        'fake': {'image_size': 0, 'val': 100},
        'many_shot': 0,
        'few_shot': 0,
        'image_size': option.size,
        'resize': round(option.size * 8 / 7),
        'flip': True,
        **pixels(option.net),
        'on_bad_image': 'skip',
        'workers': -1,
      },
      'domains': {'unlabelled': images_in(option.target)},
      'target': ('unlabelled',),
    },
  )
  net: Overrides = {'model': {'trunk': option.net}}
  if option.init:
    net['optimizer'] = {'learning_rate_scale': TRUNK_SLOWLY}
  return train_by(config, recipe, Protocol(net), tllib(option.epochs, option.epochs))
