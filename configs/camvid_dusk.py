"""CamVid from day to dusk: a real pair of domains that a CPU can train on.

  python -m lt_jax.main --config=configs/camvid_dusk.py:source_only --workdir=runs/dusk

Data: the day domain is CamVid's sequences 0006R0 and 0016E5, 305 training frames with
labels. The dusk domain is 0001TP: 62 frames without labels for training, and 62 others
for testing. 11 classes. Use either archives of arrays, day.npz and dusk.npz in the
working directory (x_train, y_train, x_test, y_test, class_names; images (N, H, W, 3),
label maps (N, H, W), void 255), or a folder in SegNet's layout (`train`, `trainannot`,
`val`, ...), where the file names identify the sequences:

  --config.data.source=camvid_day:DIR --config.domains.dusk.source=camvid_dusk:DIR

There is no published number for this split, which is ours: both parts of dusk come from
one drive, so training and test images show neighbouring streets.

Cost: 2,000 steps of 4 images (or 4 + 4) at 240 x 180; about ten minutes (or twenty) on
two CPU cores. net=lite0, with steps=1000 and --config.init=WEIGHTS.safetensors of
EfficientNet-Lite0, takes about as long.

Argument: a recipe for domain adaptation (see docs/methods.md) and
  net      small (default), lite0, or those of `gta5_cityscapes`
  steps    2000; all schedules scale with it
"""

from lt_jax.config import apply, base_config, parse_arg
from lt_jax.errors import lookup
from lt_jax.protocols import Protocol, train_by
from lt_jax.protocols.driving import NETS

BATCH, DAY = 4, 305
"""Images per step, and images of the source."""


def training(epochs: float) -> Protocol:
  """Returns how the frames are trained on, for any recipe and network."""
  return Protocol(
    {
      'batch': BATCH,
      'eval_batch': 16,
      'epochs': epochs,
      'data': {'flip': True},
      'optimizer': {'name': 'sgd', 'momentum': 0.9, 'weight_decay': (('.*', 5e-4),)},
      'schedule': {'name': 'poly', 'base': 0.01, 'end': epochs, 'power': 0.9},
      'save_every_epochs': epochs / 5,
      'evaluate_every_epochs': epochs / 5,
    }
  )


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'minent', 'source_only,net=lite0', ..."""
  recipe, option = parse_arg(arg, 'source_only', net='small', steps=2000)
  config = apply(
    base_config(),
    {
      'name': 'camvid_dusk',
      'task': 'segmentation',
      'data': {'source': 'npz:day.npz', 'many_shot': 0, 'few_shot': 0},
      'domains': {'dusk': {'source': 'npz:dusk.npz'}},
      'target': ('dusk',),
    },
  )
  # Epochs are rounded up to whole steps.
  epochs = (option.steps - 0.5) * BATCH / DAY
  net = Protocol(lookup(NETS, 'network', option.net))
  return train_by(config, recipe, training(epochs), net)
