"""C-Faces: expressions seen by one camera, adapted to four others; a sixth is open.

  python -m lt_jax.main --config=configs/c_faces.py:ocda,lists=LISTS,images=IMAGES \
    --workdir=runs/c_faces

A benchmark of Liu et al., "Open Compound Domain Adaptation", CVPR 2020, arXiv
1909.03403, on Multi-PIE, which requires a licence. Each camera is a domain: 05 is the
source, 08, 09, 13 and 14 are one compound target, 19 is open.

Data: faces cropped from Multi-PIE, and for every camera the lists that come with the
authors' code: LISTS/mp05/mp05_train.txt and mp05_test.txt with lines `path label`, and
so on. Paths are relative to IMAGES (in these lists the folder mp05 is part of the
path). The authors' code mentions five expressions in one place and six in another; here
the labels decide.

No code for this benchmark was published, and we quote none of its numbers; the authors
report a gain of about ten points.

Protocol: ResNet-18 from random weights on 224 pixels, Adam, batches of 128 + 128
images, 100 epochs on the source and 200 in every other stage, as in the authors'
configuration. Training uses random crops, evaluation the central square.

Cost: not run, except for a miniature in the tests. A step of `ocda` takes about three
passes of ResNet-18 over 256 images, so use an accelerator.

Argument: a recipe for domain adaptation (see docs/methods.md) and
  lists    the folder of the lists (multipie)
  images   the folder that their paths are relative to (default: that of the lists)
  epochs   100, on the source; all other stages scale with it
  net      resnet18, or resnet34, 50, efficientnet_lite0, ...
  size     224, side of the images
"""

import os

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.protocols import Protocol, train_by
from lt_jax.recipes.compound import ADAM, RECIPES

SOURCE, COMPOUND, OPEN = '05', ('08', '09', '13', '14'), '19'
"""Camera numbers."""

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
