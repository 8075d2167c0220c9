"""Your own photographs: one folder of images per class, or lists of image files.

  python -m lt_jax.main --config=configs/my_images.py:ldam_drw,data=photos \
    --workdir=runs/photos

Data: `photos/CLASS/*.jpg`, or `photos/train/CLASS/*.jpg` and optionally `val` and
`test` in the same form, or a folder with train.txt of `path label` lines
(list=LISTS,data=IMAGES). If there are no validation or test images, they are split off
the training images, as many from each class as the smallest class can spare. A class is
many-shot above twice the median number of training images, few-shot below half of it;
data.json records the bounds.

docs/my_images.md takes you through it in ten minutes. Without data= the images are
generated, so you can check that everything runs.

Cost: each step of 32 images takes a third of a second with ResNet-10 at 112 pixels on
two CPU cores. There is no published number.

Argument: a recipe (see docs/methods.md) and
  data     the folder of images
  list     the folder of lists, if there are any
  net      resnet10, or resnet18, 34, 50, 101, 152, resnext50_32x4d, or
           efficientnet_lite0, which is the fastest on a CPU, vgg16, vgg16_bn, alexnet
  size     128, side of the images that the network sees
  epochs   60; all schedules scale with it
  init     initial weights, such as timm/resnet18.tv_in1k: with few images they
           matter more than any method
"""

from lt_jax.config import Overrides, apply, base_config, parse_arg
from lt_jax.pretrained.dialects import pixels
from lt_jax.protocols import Protocol, cosine, train_by
from lt_jax.protocols.cutting import cut


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'ldam_drw,data=photos', ..."""
  recipe, option = parse_arg(
    arg, 'ce', data='', list='', net='resnet10', size=128, epochs=60.0, init=''
  )
  data: Overrides = {'source': 'fake', 'fake': {'image_size': 0, 'val': 100}}
  if option.list:
    data = {'source': f'list:{option.list}', 'dir': option.data}
  elif option.data:
    data = {'source': f'folder:{option.data}'}
  if option.data or option.list:
    data |= cut(data['source'], data.get('dir', ''))
  config = apply(
    base_config(),
    {
      'name': 'my_images',
      'init': option.init,
      'data': {
        **data,
        'many_shot': 0,
        'few_shot': 0,
        'image_size': option.size,
        'resize': round(option.size * 8 / 7),
        'flip': True,
        'jitter': 0.4,
        **pixels(option.net),
        'on_bad_image': 'skip',
        'workers': -1,
      },
      'model': {'trunk': option.net},
      'select': 'val/macro_accuracy',
    },
  )
  training = Protocol(
    {
      'batch': 32,
      'eval_batch': 64,
      'optimizer': {
        'name': 'sgd',
        'momentum': 0.9,
        'nesterov': True,
        'weight_decay': (('.*', 5e-4),),
      },
      **cosine(60.0, base=0.02),
      'save_every_epochs': 2.0,
      'evaluate_every_epochs': 2.0,
    }
  )
  return train_by(config, recipe, training, epochs=option.epochs)
