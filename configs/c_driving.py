"""C-Driving: from GTA5 streets with labels to rain, snow and clouds of BDD100K, mixed.

  python -m lt_jax.main --config=configs/c_driving.py:advent --workdir=runs/c_driving \
      --config.init=WEIGHTS.safetensors

Data: GTA5 as for `gta5_cityscapes`, and BDD100K (`images/10k`, `images/100k/train`,
`labels/sem_seg/masks`, and the label files of the detection set, whose
`attributes.weather` gives the weather) in the folder `bdd100k`, or anywhere with
--config.domains.rainy.source=bdd100k_rainy:DIR, and likewise for each domain. Rainy,
snowy and cloudy (BDD's "partly cloudy") images form one compound target: they are
trained on without labels and without their weather. Overcast is the open domain. All
images of a weather that have a label map are test images and are in no training set. If
you have the authors' own lists, use a source `list:FOLDER`: each line names an image
and its label map, or `-`.

Published mIoU over 19 classes in %, DeepLab on VGG-16 with batch normalisation:

  recipe        rainy   snowy   cloudy   overcast   ours
  source_only   16.2†   18.0†    20.9†      21.2†   not run
  adapt_seg     20.2†   21.2†    23.8†      25.1†   not run

and OCDA itself (`ocda`) 22.0†, 22.9†, 27.0†, 27.9†.

† quoted from memory, unverified: Liu et al., Open Compound Domain Adaptation, CVPR
2020, arXiv 1909.03403. The authors' segmentation code only includes the baseline
adapt_seg (XingangPan/OCDA-Driving-Example). The network is theirs: hidden layers of
1,024 features in front of the branches, and no auxiliary output. They train it for
40,000 steps of 8 + 8 images at a learning rate of 0.01 (discriminator 0.005). Splits
and training here are ours, and `ocda` is a re-creation (see docs/methods.md), so
numbers will not be comparable to the point.

Cost: 100,000 steps of 1 + 1 images: not run, on the order of a day on one GPU. `ocda`
takes about one and a half times as long.

Argument: a recipe for domain adaptation (see docs/methods.md) and
  net      vgg16_bn (default), resnet101, resnet50, vgg16, lite0, or small for CPUs
  steps    100000; all schedules scale with it
"""

from lt_jax.config import parse_arg
from lt_jax.protocols.driving import adaptation

TARGET, OPEN = ('rainy', 'snowy', 'cloudy'), ('overcast',)


def get_config(arg: str | None = None):
  """Returns the config of a recipe: 'adapt_seg', 'source_only,net=small', ..."""
  recipe, option = parse_arg(arg, 'adapt_seg', net='vgg16_bn', steps=100_000)

  def of_weather(name: str) -> dict[str, object]:
    return {
      'source': f'bdd100k_{name}:bdd100k',
      'test_split': 'val',
      'resize_to': (540, 960),
    }

  return adaptation(
    recipe,
    name='c_driving',
    source={'source': 'gta5:gta5', 'resize_to': (720, 1280)},
    targets={name: of_weather(name) for name in TARGET},
    opened={name: of_weather(name) for name in OPEN},
    net=option.net,
    images=24_966,
    steps=option.steps,
    window=(540, 960),
  )
