"""The training step of AdvEnt in plain PyTorch, as a worker process.

Started by `benchmarks.segmentation_step`, possibly with another Python. For each line
`KIND K` on standard input it runs K steps and answers with the seconds they took.
"""

import argparse
import math
import sys
import time

import torch
from torch import nn
from torch.nn import functional


def branches(inputs, classes, dilations):
  """Returns the convolutions whose outputs a head adds up."""
  return nn.ModuleList(
    nn.Conv2d(inputs, classes, 3, padding=d, dilation=d) for d in dilations
  )


def logits(x, head, size, aligned):
  low = sum(conv(x) for conv in head)
  return functional.interpolate(low, size, mode='bilinear', align_corners=aligned)


class Small(nn.Module):
  """Five convolutions to an output stride of 4, and a head of four dilations."""

  def __init__(self, classes, width=16):
    super().__init__()
    w, layers, channels = width, [], 3
    shapes = ((w, 2, 1), (2 * w, 2, 1), (4 * w, 1, 1), (4 * w, 1, 2), (4 * w, 1, 4))
    for features, stride, d in shapes:
      layers += [
        nn.Conv2d(channels, features, 3, stride, d, dilation=d, bias=False),
        nn.BatchNorm2d(features),
        nn.ReLU(),
      ]
      channels = features
    self.trunk = nn.Sequential(*layers)
    self.head = branches(channels, classes, (1, 2, 4, 6))

  def forward(self, images):
    return (logits(self.trunk(images), self.head, images.shape[2:], False),)


class Block(nn.Module):
  """A bottleneck that strides in its first convolution."""

  def __init__(self, inputs, width, stride, dilation):
    super().__init__()
    self.branch = nn.Sequential(
      nn.Conv2d(inputs, width, 1, stride, bias=False),
      nn.BatchNorm2d(width),
      nn.ReLU(),
      nn.Conv2d(width, width, 3, 1, dilation, dilation=dilation, bias=False),
      nn.BatchNorm2d(width),
      nn.ReLU(),
      nn.Conv2d(width, 4 * width, 1, bias=False),
      nn.BatchNorm2d(4 * width),
    )
    self.shortcut = nn.Identity()
    if inputs != 4 * width:
      projection = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
      self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(4 * width))

  def forward(self, x):
    return functional.relu(self.shortcut(x) + self.branch(x))


class DeepLab(nn.Module):
  """DeepLab-v2 on ResNet-50, with an auxiliary head on its third stage."""

  def __init__(self, classes):
    super().__init__()
    stages, channels = [], 64
    shapes = ((3, 64, 1, 1), (4, 128, 2, 1), (6, 256, 1, 2), (3, 512, 1, 4))
    for blocks, width, stride, dilation in shapes:
      stage = []
      for block in range(blocks):
        stage.append(Block(channels, width, 1 if block else stride, dilation))
        channels = 4 * width
      stages.append(nn.Sequential(*stage))
    self.stem = nn.Sequential(
      nn.Conv2d(3, 64, 7, 2, 3, bias=False),
      nn.BatchNorm2d(64),
      nn.ReLU(),
      nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    )
    self.first, self.last = nn.Sequential(*stages[:3]), stages[3]
    self.head = branches(2048, classes, (6, 12, 18, 24))
    self.auxiliary = branches(1024, classes, (6, 12, 18, 24))

  def forward(self, images):
    size, third = images.shape[2:], self.first(self.stem(images))
    main = logits(self.last(third), self.head, size, True)
    return main, logits(third, self.auxiliary, size, True)


NETWORKS = {'small': (Small, 11), 'deeplab_resnet50': (DeepLab, 19)}


def discriminator(classes, width=64):
  """Returns a patch discriminator."""
  layers, sizes = [], (classes, *(width * n for n in (1, 2, 4, 8)), 1)
  for inputs, outputs in zip(sizes, sizes[1:], strict=False):
    layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.LeakyReLU(0.2)]
  return nn.Sequential(*layers[:-1])


def information(scores):
  """Returns -p log p / log C of every class."""
  log_p = functional.log_softmax(scores, 1)
  return -log_p.exp() * log_p / math.log(scores.shape[1])


def asks(z, value):
  """Returns the cross-entropy for labelling all patches with one domain."""
  return functional.binary_cross_entropy_with_logits(z, torch.full_like(z, value))


class Training:
  """The networks, their optimisers and fixed batches."""

  def __init__(self, options, device, layout):
    made, classes = NETWORKS[options.network]
    self.net = made(classes).to(device, memory_format=layout)
    self.levels = ((1.0, 1e-3), (0.1, 2e-4))
    images = torch.randn(2, options.batch, 3, options.height, options.width)
    self.source, self.target = images.to(device)
    self.source, self.target = (
      x.contiguous(memory_format=layout) for x in (self.source, self.target)
    )
    shape = (options.batch, options.height, options.width)
    self.labels = torch.randint(-1, classes, shape, device=device)
    with torch.no_grad():
      number = len(self.net(self.source))
    self.judges = nn.ModuleList(discriminator(classes) for _ in range(number))
    self.judges.to(device, memory_format=layout)
    shared = {'lr': 2.5e-4, 'momentum': 0.9, 'weight_decay': 5e-4}
    self.optimizers = [
      torch.optim.SGD(self.net.parameters(), **shared),
      torch.optim.Adam(self.judges.parameters(), lr=1e-4, betas=(0.9, 0.99)),
    ]
    self.schedules = [
      torch.optim.lr_scheduler.LambdaLR(o, lambda s: (1 - s / options.steps) ** 0.9)
      for o in self.optimizers
    ]

  def step(self):
    """One step of all players."""
    for optimizer in self.optimizers:
      optimizer.zero_grad(set_to_none=True)
    self.judges.requires_grad_(False)
    of_source, of_target = self.net(self.source), self.net(self.target)
    total, shown = 0, []
    for judge, s, t, (weight, fool) in zip(
      self.judges, of_source, of_target, self.levels, strict=False
    ):
      maps = information(s), information(t)
      loss = functional.cross_entropy(s, self.labels, ignore_index=-1)
      total = total + weight * loss + fool * asks(judge(maps[1]), 0.0)
      shown.append(maps)
    total.backward()
    self.judges.requires_grad_(True)
    for judge, maps in zip(self.judges, shown, strict=True):
      losses = [asks(judge(m.detach()), float(d)) for d, m in enumerate(maps)]
      (sum(losses) / 2).backward()
    for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
      optimizer.step()
      schedule.step()
    return total.detach()


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--network', choices=NETWORKS, required=True)
  for name in ('batch', 'height', 'width', 'steps'):
    parser.add_argument(f'--{name}', type=int, required=True)
  options = parser.parse_args()
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.manual_seed(0)
  layouts = {'plain': torch.contiguous_format, 'channels_last': torch.channels_last}
  kinds = {name: Training(options, device, layout) for name, layout in layouts.items()}
  for training in kinds.values():
    training.step().item()
  first = kinds['plain']
  params = sum(p.numel() for m in (first.net, first.judges) for p in m.parameters())
  print(f'ready torch {torch.__version__} {device} {params}', flush=True)
  for line in sys.stdin:
    kind, steps = line.split()
    began = time.perf_counter()
    for _ in range(int(steps)):
      loss = kinds[kind].step()
    loss.item()
    print(time.perf_counter() - began, flush=True)


if __name__ == '__main__':
  main()
