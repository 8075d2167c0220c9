"""The same ResNet-32 training step written plainly in PyTorch, as a worker process.

Started by train_step.py, perhaps under another Python. For each line `run K` on its
standard input it makes K steps and answers with the seconds they took.
"""

import argparse
import sys
import time

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
  """Two 3x3 convolutions; the shortcut sub-samples and pads channels with zeros."""

  def __init__(self, inputs, outputs, stride):
    super().__init__()
    self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(outputs)
    self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
    self.bn2 = nn.BatchNorm2d(outputs)
    self.stride, self.pad = stride, (outputs - inputs) // 2

  def forward(self, x):
    out = functional.relu(self.bn1(self.conv1(x)))
    out = self.bn2(self.conv2(out))
    if self.stride != 1:
      x = x[:, :, :: self.stride, :: self.stride]
      x = functional.pad(x, (0, 0, 0, 0, self.pad, self.pad))
    return functional.relu(out + x)


def resnet(depth, classes=10):
  """Returns a CIFAR ResNet of 6n + 2 layers."""
  layers = [
    nn.Conv2d(3, 16, 3, 1, 1, bias=False),
    nn.BatchNorm2d(16),
    nn.ReLU(),
  ]
  inputs = 16
  for outputs, stride in ((16, 1), (32, 2), (64, 2)):
    for i in range((depth - 2) // 6):
      layers.append(Block(inputs, outputs, stride if i == 0 else 1))
      inputs = outputs
  pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
  return nn.Sequential(*layers, *pooled)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--depth', type=int, required=True)
  parser.add_argument('--batch', type=int, required=True)
  options = parser.parse_args()
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.manual_seed(0)
  net = resnet(options.depth).to(device).train()
  sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
  images = torch.randn(options.batch, 3, 32, 32, device=device)
  labels = torch.randint(0, 10, (options.batch,), device=device)

  def step():
    loss = functional.cross_entropy(net(images), labels)
    sgd.zero_grad(set_to_none=True)
    loss.backward()
    sgd.step()
    return loss

  step().item()
  params = sum(p.numel() for p in net.parameters())
  print(f'ready torch {torch.__version__} {device} {params}', flush=True)
  for line in sys.stdin:
    steps = int(line.split()[1])
    began = time.perf_counter()
    for _ in range(steps):
      loss = step()
    loss.item()
    print(time.perf_counter() - began, flush=True)


if __name__ == '__main__':
  main()
