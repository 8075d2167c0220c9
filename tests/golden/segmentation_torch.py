"""Writes segmentation_torch.npz: what networks of pixels compute in PyTorch.

  python -m tests.golden.segmentation_torch      (needs NumPy and PyTorch, CPU)

The networks are written here from the papers. Trunks have torchvision's names, heads
and the discriminator have our own paths with dots; weights and images follow from names
and shapes, as in `resnet_torch.py`, and the file has the same entries: of every network
'NETWORK/state' and a sample of each of its outputs. Trunks are an eighth as wide as
published, and of few blocks.
"""

import json
import pathlib

import numpy as np

from tests.golden.resnet_torch import CLASSES, sample, tensor, uniform
from tests.golden.trunks_torch import VGG16

FILE = pathlib.Path(__file__).with_suffix('.npz')
HIDDEN = 16
BLOCKS = (1, 2, 2, 2)
DILATIONS = (1, 2, 4, 6)
SIDES = {
  'deeplab_resnet': (63, 51),  # its first maximum has an even side and an odd one
  'deeplab_vgg16_bn': (45, 38),
  'fcn32': (20, 31),
  'fcn16': (33, 24),
  'fcn8': (20, 31),
  'discriminator': (66, 97),
}
NETWORKS = tuple(SIDES)


def images(name: str) -> np.ndarray:
  """Returns two images, or maps of classes for the discriminator."""
  channels = CLASSES if name == 'discriminator' else 3
  return uniform('images', (2, *SIDES[name], channels)) * np.float32(2)


def branches(inputs):
  """Returns the convolutions whose sum is DeepLab's head."""
  from torch import nn

  return nn.ModuleDict(
    {
      f'dilation{d}': nn.Conv2d(inputs, CLASSES, 3, padding=d, dilation=d)
      for d in DILATIONS
    }
  )


def summed(x, convolutions):
  return sum(conv(x) for conv in convolutions.values())


def grown(x, size):
  from torch.nn import functional

  return functional.interpolate(x, size, mode='bilinear', align_corners=True)


def deeplab_resnet():
  """Returns DeepLab-v2 as ADVENT has it, with dilations 2 and 4."""
  from torch import nn

  class Block(nn.Module):
    def __init__(self, inputs, width, stride, dilation):
      super().__init__()
      self.conv1 = nn.Conv2d(inputs, width, 1, stride, bias=False)
      self.bn1 = nn.BatchNorm2d(width)
      apart = {'padding': dilation, 'dilation': dilation, 'bias': False}
      self.conv2 = nn.Conv2d(width, width, 3, **apart)
      self.bn2 = nn.BatchNorm2d(width)
      self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
      self.bn3 = nn.BatchNorm2d(4 * width)
      if inputs != 4 * width:
        projection = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
        self.downsample = nn.Sequential(projection, nn.BatchNorm2d(4 * width))

    def forward(self, x):
      y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
      y = self.bn3(self.conv3(y))
      return (y + (self.downsample(x) if hasattr(self, 'downsample') else x)).relu()

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
      self.bn1 = nn.BatchNorm2d(8)
      self.maxpool = nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)
      channels = 8
      shapes = ((1, 1), (2, 1), (1, 2), (1, 4))
      for stage, (stride, dilation) in enumerate(shapes):
        width, layers = 8 * 2**stage, []
        for block in range(BLOCKS[stage]):
          layers.append(Block(channels, width, 1 if block else stride, dilation))
          channels = 4 * width
        setattr(self, f'layer{stage + 1}', nn.Sequential(*layers))
      self.head = nn.ModuleDict({'main': branches(256), 'auxiliary': branches(128)})

    def forward(self, x):
      size = x.shape[2:]
      x = self.maxpool(self.bn1(self.conv1(x)).relu())
      third = self.layer3(self.layer2(self.layer1(x)))
      low = summed(self.layer4(third), self.head['main'])
      return {
        'stage3': third,
        'low_logits': low,
        'logits': grown(low, size),
        'auxiliary_logits': grown(summed(third, self.head['auxiliary']), size),
      }

  return Network()


def deeplab_vgg16_bn():
  """Returns the network of C-Driving: no fourth and fifth maximum, two wide layers."""
  from torch import nn

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      channels, place, layers = 3, 0, {}
      for stage, (convolutions, outputs) in enumerate(VGG16, 1):
        dilation = 2 if stage == 5 else 1
        for _ in range(convolutions):
          apart = {'padding': dilation, 'dilation': dilation}
          layers[str(place)] = nn.Conv2d(channels, outputs, 3, **apart)
          layers[str(place + 1)] = nn.BatchNorm2d(outputs)
          layers[str(place + 2)] = nn.ReLU()
          channels, place = outputs, place + 3
        if stage < 4:
          layers[str(place)] = nn.MaxPool2d(2)
        place += 1
      self.features = nn.ModuleDict(layers)
      wide = {'padding': 4, 'dilation': 4}
      self.head = nn.ModuleDict(
        {
          'hidden1': nn.Conv2d(channels, HIDDEN, 3, **wide),
          'hidden2': nn.Conv2d(HIDDEN, HIDDEN, 3, **wide),
          'main': branches(HIDDEN),
        }
      )

    def forward(self, x):
      size = x.shape[2:]
      for layer in self.features.values():
        x = layer(x)
      x = self.head['hidden1'](x).relu()
      x = self.head['hidden2'](x).relu()
      low = summed(x, self.head['main'])
      return {'low_logits': low, 'logits': grown(low, size)}

  return Network()


def bilinear(x, factor):
  """Applies the transposed convolution of FCN's code, by its formula."""
  import torch
  from torch.nn import functional

  centre = factor - 0.5
  line = 1 - (torch.arange(2 * factor) - centre).abs() / factor
  kernel = (line[:, None] * line[None]).expand(x.shape[1], 1, -1, -1)
  return functional.conv_transpose2d(x, kernel, stride=factor, groups=x.shape[1])


def window(x, offset, size):
  return x[..., offset : offset + size[0], offset : offset + size[1]]


def fcn(stride):
  """Returns FCN-32s, 16s or 8s of Caffe's definitions, with their offsets."""
  import torch
  from torch import nn
  from torch.nn import functional

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      channels, layers = 3, []
      for stage, (convolutions, outputs) in enumerate(VGG16, 1):
        for place in range(convolutions):
          padding = 100 if stage == 1 and not place else 1
          layers += [nn.Conv2d(channels, outputs, 3, padding=padding), nn.ReLU()]
          channels = outputs
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
      self.features = nn.Sequential(*layers)
      gap = nn.Identity
      hidden = nn.Linear(channels * 49, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
      self.classifier = nn.Sequential(hidden[0], gap(), gap(), hidden[1])
      scores = {'features': HIDDEN, 'pool4': VGG16[3][1], 'pool3': VGG16[2][1]}
      used = list(scores)[: {32: 1, 16: 2, 8: 3}[stride]]
      self.head = nn.ModuleDict(
        {f'score_{name}': nn.Conv2d(scores[name], CLASSES, 1) for name in used}
      )

    def forward(self, x):
      size, pools = x.shape[2:], []
      for layer in self.features:
        x = layer(x)
        if isinstance(layer, nn.MaxPool2d):
          pools.append(x)
      fc6, fc7 = self.classifier[0], self.classifier[3]
      kernel = fc6.weight.reshape(HIDDEN, -1, 7, 7)
      x = functional.conv2d(x, kernel, fc6.bias).relu()
      x = functional.conv2d(x, fc7.weight[..., None, None], fc7.bias).relu()
      score = self.head['score_features'](x)
      if stride < 32:
        score = bilinear(score, 2)
        skip = self.head['score_pool4'](0.01 * pools[3])
        score = score + window(skip, 5, score.shape[2:])
      if stride < 16:
        score = bilinear(score, 2)
        skip = self.head['score_pool3'](0.0001 * pools[2])
        score = score + window(skip, 9, score.shape[2:])
      offset = {32: 19, 16: 27, 8: 31}[stride]
      logits = window(bilinear(score, stride), offset, size)
      assert logits.shape[2:] == size and torch.isfinite(logits).all()
      return {'features': x, 'low_logits': score, 'logits': logits}

  return Network()


def discriminator():
  """Returns the discriminator of maps of AdaptSegNet and ADVENT, an eighth as wide."""
  from torch import nn
  from torch.nn import functional

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      sizes = (CLASSES, 8, 16, 32, 64, 1)
      for number in range(1, 6):
        conv = nn.Conv2d(*sizes[number - 1 : number + 1], 4, stride=2, padding=1)
        setattr(self, f'conv{number}', conv)

    def forward(self, x):
      for number in range(1, 5):
        x = functional.leaky_relu(getattr(self, f'conv{number}')(x), 0.2)
      return {'logits': self.conv5(x)[:, 0]}

  return Network()


def make_network(name):
  """Returns a network of `NETWORKS`, in PyTorch."""
  made = {
    'deeplab_resnet': deeplab_resnet,
    'deeplab_vgg16_bn': deeplab_vgg16_bn,
    'discriminator': discriminator,
  }
  return fcn(int(name[3:])) if name.startswith('fcn') else made[name]()


def run(name: str) -> dict[str, np.ndarray]:
  """Returns what the file holds of one network, computed by PyTorch."""
  import torch

  network = make_network(name).eval()
  shapes = [(key, tuple(value.shape)) for key, value in network.state_dict().items()]
  network.load_state_dict({k: torch.from_numpy(tensor(k, s)) for k, s in shapes})
  with torch.no_grad():
    outputs = network(torch.from_numpy(images(name)).permute(0, 3, 1, 2))
  found = {f'{name}/state': np.frombuffer(json.dumps(shapes).encode(), np.uint8)}
  for key, x in outputs.items():
    x = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
    found[f'{name}/{key}'] = sample(x.numpy())
  return found


if __name__ == '__main__':
  arrays = {}
  for network_name in NETWORKS:
    arrays |= run(network_name)
  np.savez_compressed(FILE, **arrays)
