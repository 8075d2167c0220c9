"""Writes trunks_torch.npz: what further trunks compute in PyTorch, tap by tap.

  python -m tests.golden.trunks_torch      (needs NumPy and PyTorch, CPU)

The networks are written here from the papers, with the names that timm (EfficientNet)
or torchvision (AlexNet, VGG) has for their modules; weights and images follow from
names and shapes, as in `resnet_torch.py`, and the file has the same entries: of every
network 'NETWORK/state' and a sample of each tap and of the linear head's outputs.

AlexNet and VGG are an eighth as wide as published, their hidden layers have 32
features. Images are of odd sizes, so that every rounding is seen.
"""

import json
import pathlib

import numpy as np

from tests.golden.resnet_torch import CLASSES, sample, tensor, uniform

FILE = pathlib.Path(__file__).with_suffix('.npz')
HIDDEN = 32
LITE = (  # blocks, kernel, stride, expansion, channels
  (1, 3, 1, 1, 16),
  (2, 3, 2, 6, 24),
  (2, 5, 2, 6, 40),
  (3, 3, 2, 6, 80),
  (3, 5, 1, 6, 112),
  (4, 5, 2, 6, 192),
  (1, 3, 1, 6, 320),
)
VGG16 = ((2, 8), (2, 16), (3, 32), (3, 64), (3, 64))
ALEXNETS = {
  # features, kernel, stride, padding, groups of each convolution
  'krizhevsky': (
    (12, 11, 4, 0, 1),
    (32, 5, 1, 2, 2),
    (48, 3, 1, 1, 1),
    (48, 3, 1, 1, 2),
    (32, 3, 1, 1, 2),
  ),
  'zeiler_fergus': (
    (12, 7, 2, 1, 1),
    (32, 5, 2, 0, 1),
    (48, 3, 1, 1, 1),
    (48, 3, 1, 1, 1),
    (32, 3, 1, 1, 1),
  ),
  'torchvision': (
    (8, 11, 4, 2, 1),
    (24, 5, 1, 2, 1),
    (48, 3, 1, 1, 1),
    (32, 3, 1, 1, 1),
    (32, 3, 1, 1, 1),
  ),
}
SIDES = {'lite0': (75, 54), 'vgg16': (70, 101), 'vgg16_bn': (70, 101)}
NETWORKS = ('lite0', 'vgg16', 'vgg16_bn', *ALEXNETS)


def images(name: str) -> np.ndarray:
  """Returns two images; those for Lite0 are so bright that ReLU6 has its second end."""
  shape = (2, *SIDES.get(name, (131, 98)), 3)
  return uniform('images', shape) * np.float32(8 if name == 'lite0' else 2)


def lite0():
  """Returns EfficientNet-Lite0."""
  import torch
  from torch import nn
  from torch.nn import functional

  class Same(nn.Conv2d):
    """Pads as TensorFlow does: a pixel that is over goes after the image."""

    def forward(self, x):
      over = []
      for side in (x.shape[3], x.shape[2]):
        wanted = (-(-side // self.stride[0]) - 1) * self.stride[0]
        missing = max(0, wanted + self.kernel_size[0] - side)
        over += [missing // 2, missing - missing // 2]
      return super().forward(functional.pad(x, over))

  def norm(channels):
    return nn.BatchNorm2d(channels, eps=1e-3)

  class Block(nn.Module):
    def __init__(self, inputs, size, stride, expansion, outputs):
      super().__init__()
      inside = inputs * expansion
      depthwise = Same(inside, inside, size, stride, groups=inside, bias=False)
      self.residual = stride == 1 and inputs == outputs
      self.expands = expansion > 1
      if self.expands:
        self.conv_pw, self.bn1 = nn.Conv2d(inputs, inside, 1, bias=False), norm(inside)
        self.conv_dw, self.bn2 = depthwise, norm(inside)
        self.conv_pwl = nn.Conv2d(inside, outputs, 1, bias=False)
        self.bn3 = norm(outputs)
      else:
        self.conv_dw, self.bn1 = depthwise, norm(inside)
        self.conv_pw = nn.Conv2d(inside, outputs, 1, bias=False)
        self.bn2 = norm(outputs)

    def forward(self, x):
      if self.expands:
        y = functional.relu6(self.bn1(self.conv_pw(x)))
        y = functional.relu6(self.bn2(self.conv_dw(y)))
        y = self.bn3(self.conv_pwl(y))
      else:
        y = functional.relu6(self.bn1(self.conv_dw(x)))
        y = self.bn2(self.conv_pw(y))
      return x + y if self.residual else y

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      self.conv_stem, self.bn1 = Same(3, 32, 3, 2, bias=False), norm(32)
      channels, stages = 32, []
      for blocks, size, stride, expansion, outputs in LITE:
        stage = []
        for block in range(blocks):
          stage.append(
            Block(channels, size, 1 if block else stride, expansion, outputs)
          )
          channels = outputs
        stages.append(nn.Sequential(*stage))
      self.blocks = nn.Sequential(*stages)
      self.conv_head, self.bn2 = nn.Conv2d(320, 1280, 1, bias=False), norm(1280)
      self.classifier = nn.Linear(1280, CLASSES)

    def forward(self, x):
      x = functional.relu6(self.bn1(self.conv_stem(x)))
      outputs = {'stem': x}
      for s, stage in enumerate(self.blocks, 1):
        for b, block in enumerate(stage, 1):
          x = outputs[f'stage{s}_block{b}'] = block(x)
      x = outputs['last'] = torch.clip(self.bn2(self.conv_head(x)), 0, 6)
      return outputs | {'logits': self.classifier(x.mean((2, 3)))}

  return Network()


def _linear(channels, side):
  """Returns the modules after the convolutions, by torchvision's names."""
  from torch import nn

  hidden = nn.Linear(channels * side**2, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
  return *hidden, nn.Linear(HIDDEN, CLASSES)


def _hidden(x, side, fc6, fc7, fc8):
  """Returns the outputs of the linear layers."""
  from torch.nn import functional

  x = functional.adaptive_avg_pool2d(x, (side, side)).flatten(1)
  fc6 = fc6(x).relu()
  fc7 = fc7(fc6).relu()
  return {'fc6': fc6, 'fc7': fc7, 'logits': fc8(fc7)}


def vgg16(normalised):
  """Returns VGG-16, with or without batch normalisation."""
  from torch import nn

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      channels, layers = 3, []
      for convolutions, outputs in VGG16:
        for _ in range(convolutions):
          layers.append(nn.Conv2d(channels, outputs, 3, padding=1))
          layers += [nn.BatchNorm2d(outputs)] if normalised else []
          layers.append(nn.ReLU())
          channels = outputs
        layers.append(nn.MaxPool2d(2))
      self.features = nn.Sequential(*layers)
      fc6, fc7, fc8 = _linear(channels, 7)
      gap = nn.Identity
      self.classifier = nn.Sequential(fc6, gap(), gap(), fc7, gap(), gap(), fc8)

    def forward(self, x):
      outputs = {}
      for layer in self.features:
        x = layer(x)
        if isinstance(layer, nn.MaxPool2d):
          outputs[f'conv{len(outputs) + 1}'] = x
      return outputs | _hidden(x, 7, *(self.classifier[i] for i in (0, 3, 6)))

  return Network()


def alexnet(style):
  """Returns AlexNet, whose convolutions are followed as the style has it."""
  from torch import nn

  def norm():  # whose alpha PyTorch divides by the number of neighbours
    return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)

  def pool():
    return nn.MaxPool2d(3, 2, ceil_mode=style != 'torchvision')

  first = {
    'krizhevsky': lambda: nn.Sequential(norm(), pool()),
    'zeiler_fergus': lambda: nn.Sequential(pool(), norm()),
    'torchvision': pool,
  }[style]

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      channels, places = 3, {}
      for place, layer in zip((0, 3, 6, 8, 10), ALEXNETS[style], strict=True):
        outputs, size, stride, padding, groups = layer
        shape = {'stride': stride, 'padding': padding, 'groups': groups}
        places[place] = nn.Conv2d(channels, outputs, size, **shape)
        channels = outputs
      places |= {2: first(), 5: first(), 12: pool()}
      relus = dict.fromkeys((1, 4, 7, 9, 11), nn.ReLU())
      layers = sorted((places | relus).items())
      self.features = nn.Sequential(*(layer for _, layer in layers))
      fc6, fc7, fc8 = _linear(channels, 6)
      gap = nn.Identity
      self.classifier = nn.Sequential(gap(), fc6, gap(), gap(), fc7, gap(), fc8)

    def forward(self, x):
      outputs, ends = {}, {2: 1, 5: 2, 7: 3, 9: 4, 12: 5}
      for place, layer in enumerate(self.features):
        x = layer(x)
        if place in ends:
          outputs[f'conv{ends[place]}'] = x
      return outputs | _hidden(x, 6, *(self.classifier[i] for i in (1, 4, 6)))

  return Network()


def make_network(name):
  """Returns a network of `NETWORKS`, in PyTorch."""
  if name == 'lite0':
    return lite0()
  return vgg16(name == 'vgg16_bn') if name.startswith('vgg') else alexnet(name)


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
