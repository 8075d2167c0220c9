"""C-Faces: expressions seen by one camera, then by others, then by one more.

  python -m lt_jax.main --config=configs/c_faces.py:ocda,lists=LISTS,images=IMAGES \
    --workdir=runs/c_faces

A benchmark of Liu et al., "Open Compound Domain Adaptation", CVPR 2020, arXiv
1909.03403, on Multi-PIE, which is to be licensed. A domain is a camera: 05 the source,
08, 09, 13 and 14 one compound target, 19 open.

Data: faces cut out of Multi-PIE, and of every camera the lists that come with the
authors' code: LISTS/mp05/mp05_train.txt and mp05_test.txt of lines `path label`, and so
on; the paths are relative to IMAGES (of those lists the folder mp05 is a part of the
path). The code speaks of five expressions in one place and of six in another; here the
labels tell.

No code for it was published, and of its numbers none is quoted here: a gain of some ten
points, by its authors.

Protocol: ResNet-18 from random weights on 224 pixels, Adam, batches of 128 + 128, 100
epochs on the source and 200 of every other stage, as in the authors' configuration of
it. Training images are cropped at random, evaluation takes the central square.

Cost: not run, but for a miniature in the tests. A step of `ocda` takes some three
passes of ResNet-18 over 256 images: for accelerators.

Argument: a recipe of domain adaptation (see docs/methods.md) and
  lists    the folder of the lists (multipie)
  images   the folder that their paths are relative to (that of the lists)
  epochs   100, on the source; all others scale
  net      resnet18, or resnet34, 50, efficientnet_lite0, ...
  size     224, side of the images
"""

import os

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.protocols import Protocol, train_by
from lt_jax.recipes.compound import ADAM, RECIPES

SOURCE, COMPOUND, OPEN = '05', ('08', '09', '13', '14'), '19'
"""Cameras."""

LONG = {'epochs': 200.0}


def training() -> Protocol:
  """Returns how the faces are trained on, for any recipe."""
  ocda = {
    'stages': {
      'adversarial': LONG,
      'domain_factor': {
        **LONG,
        'players': {'decoder': {'network': {'name': 'decoder', 'doublings': 5}}},
      },
      'scheduled': {**LONG, 'schedule': {'end': 200.0}},
    }
  }
  return Protocol(
    {
      'batch': 128,
      'eval_batch': 128,
      'epochs': 100.0,
      'optimizer': ADAM,
      'schedule': {'name': 'constant', 'base': 1e-4},
    },
    recipes=dict.fromkeys(RECIPES, ocda),
  )


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'ocda', 'source_only,epochs=3', ..."""
  recipe, option = parse_arg(
    arg,
    'ocda',
    lists='multipie',
    images='',
    epochs=100.0,
    net='resnet18',
    size=224,
  )

  def camera(number: str) -> dict[str, str]:
    return {'source': f'list:{os.path.join(option.lists, f"mp{number}")}'}

  config = apply(
    base_config(),
    {
      'name': 'c_faces',
      'data': {
        **camera(SOURCE),
        'dir': option.images or option.lists,
        'workers': -1,
        'image_size': option.size,
        'resize': option.size,
        'mean': (0.5,),
        'std': (0.5,),
      },
      'domains': {f'mp{number}': camera(number) for number in (*COMPOUND, OPEN)},
      'target': tuple(f'mp{number}' for number in COMPOUND),
      'open_domains': (f'mp{OPEN}',),
      'model': {'trunk': option.net},
      'save_every_epochs': option.epochs / 10,
      'evaluate_every_epochs': option.epochs / 10,
    },
  )
  return train_by(config, recipe, training(), epochs=option.epochs)
