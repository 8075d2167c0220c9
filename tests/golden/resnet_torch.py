"""Writes resnet_torch.npz: what residual networks compute in PyTorch, stage by stage.

  python tests/golden/resnet_torch.py      (needs NumPy and PyTorch, CPU)

The networks are written here from the papers, with torchvision's names of modules, and
their weights and images follow from names and shapes by integer arithmetic: so the file
holds no weights, and `tests/test_pretrained.py` makes the same ones without PyTorch.

The file has, per network of `NETWORKS`, 'NETWORK/state', the JSON list of (name, shape)
of PyTorch's own `state_dict`, and samples of the output of the stem, of the four stages
and of the linear head: every `STRIDE`-th number of the channels-last array.
"""

import json
import math
import pathlib
import zlib

import numpy as np

FILE = pathlib.Path(__file__).with_suffix('.npz')
CLASSES = 10
STRIDE = 31  # odd, as channels are even: each of them is sampled
NETWORKS = {
  # name -> blocks a stage, bottlenecks, width of the 3x3 over w, groups, Caffe's style
  'resnet18': ((2, 2, 2, 2), False, 1, 1, False),
  'resnet50': ((3, 4, 6, 3), True, 1, 1, False),
  'resnext50_32x4d': ((3, 4, 6, 3), True, 2, 32, False),
  'caffe': ((1, 2, 1, 1), True, 1, 1, True),
}


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns numbers in [-1, 1) that follow from a name: a hash of each position."""
  x = np.arange(math.prod(shape), dtype=np.uint32) * np.uint32(0x9E3779B9)
  x ^= np.uint32(zlib.crc32(name.encode()))
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x ^= x >> np.uint32(shift)
    x *= np.uint32(factor)
  x ^= x >> np.uint32(16)
  return (x >> np.uint32(8)).astype(np.float32).reshape(shape) / 2**23 - 1


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns the weights of one name, such that activations stay near one."""
  if name.endswith('num_batches_tracked'):
    return np.zeros(shape, np.int64)
  x = uniform(name, shape)
  if len(shape) > 1:
    return x * np.float32(math.sqrt(6 / math.prod(shape[1:])))
  if name.endswith('running_var'):
    return 1 + x / 2
  if name.endswith('weight'):
    return np.float32(0.6) + x * np.float32(0.3)
  return x / 2


def images() -> np.ndarray:
  """Returns (2, 64, 64, 3), of variance 1."""
  return uniform('images', (2, 64, 64, 3)) * np.float32(math.sqrt(3))


def sample(x: np.ndarray) -> np.ndarray:
  """Returns the numbers of an array that are compared."""
  return np.asarray(x, np.float32).reshape(-1)[:: STRIDE if x.ndim == 4 else 1]


def make_network(blocks, bottleneck, inner, groups, caffe):
  """Returns the network, in PyTorch, by its description in `NETWORKS`."""
  from torch import nn

  def conv(inputs, outputs, size, stride=1, groups=1):
    padding = size // 2
    return nn.Conv2d(inputs, outputs, size, stride, padding, 1, groups, bias=False)

  class Block(nn.Module):
    def __init__(self, inputs, width, stride):
      super().__init__()
      outputs = 4 * width if bottleneck else width
      first, second = (stride, 1) if caffe else (1, stride)
      if bottleneck:
        self.conv1 = conv(inputs, inner * width, 1, first)
        self.bn1 = nn.BatchNorm2d(inner * width)
        self.conv2 = conv(inner * width, inner * width, 3, second, groups)
        self.bn2 = nn.BatchNorm2d(inner * width)
        self.conv3 = conv(inner * width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
      else:
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
      if stride > 1 or inputs != outputs:
        shortcut = conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(*shortcut)
      self.outputs = outputs

    def forward(self, x):
      y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
      if bottleneck:
        y = self.bn3(self.conv3(y.relu()))
      return (y + (self.downsample(x) if hasattr(self, 'downsample') else x)).relu()

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      self.conv1, self.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
      padding = {'padding': 0, 'ceil_mode': True} if caffe else {'padding': 1}
      self.maxpool = nn.MaxPool2d(3, 2, **padding)
      channels = 64
      for stage, length in enumerate(blocks):
        layers = []
        for block in range(length):
          stride = 2 if stage and not block else 1
          layers.append(Block(channels, 64 * 2**stage, stride))
          channels = layers[-1].outputs
        setattr(self, f'layer{stage + 1}', nn.Sequential(*layers))
      self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x):
      outputs = {'stem': self.maxpool(self.bn1(self.conv1(x)).relu())}
      x = outputs['stem']
      for stage in range(1, 5):
        x = outputs[f'stage{stage}'] = getattr(self, f'layer{stage}')(x)
      outputs['logits'] = self.fc(x.mean((2, 3)))
      return outputs

  return Network().eval()


def run(name: str) -> dict[str, np.ndarray]:
  """Returns what the file holds of one network, computed by PyTorch."""
  import torch

  network = make_network(*NETWORKS[name])
  shapes = [(key, tuple(value.shape)) for key, value in network.state_dict().items()]
  weights = {key: torch.from_numpy(tensor(key, shape)) for key, shape in shapes}
  network.load_state_dict(weights)
  with torch.no_grad():
    outputs = network(torch.from_numpy(images()).permute(0, 3, 1, 2))
  state = np.frombuffer(json.dumps(shapes).encode(), np.uint8)
  found = {f'{name}/state': state}
  for key, x in outputs.items():
    x = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
    found[f'{name}/{key}'] = sample(x.numpy())
  return found


if __name__ == '__main__':
  arrays = {}
  for network_name in NETWORKS:
    arrays |= run(network_name)
  np.savez_compressed(FILE, **arrays)
