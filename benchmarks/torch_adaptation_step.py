"""The step of DANN on digits written plainly in PyTorch, as a worker process.

Started by `benchmarks.adaptation_step`, perhaps under another Python. For each line
`KIND K` on its standard input it makes K steps and answers with the seconds they took.
"""

import argparse
import sys
import time

import torch
from torch import nn
from torch.nn import functional


class Reverse(torch.autograd.Function):
  """The identity, whose gradient is multiplied by -scale."""

  @staticmethod
  def forward(ctx, x, scale):
    ctx.scale = scale
    return x.view_as(x)

  @staticmethod
  def backward(ctx, grad):
    return -ctx.scale * grad, None


class Dann(nn.Module):
  """The MNIST network of the paper, with its domain classifier."""

  def __init__(self):
    super().__init__()
    self.conv = nn.Sequential(
      nn.Conv2d(3, 32, 5),
      nn.ReLU(),
      nn.MaxPool2d(2),
      nn.Conv2d(32, 48, 5),
      nn.ReLU(),
      nn.MaxPool2d(2),
      nn.Flatten(),
    )
    self.label = nn.Sequential(
      nn.Linear(768, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    self.domain = nn.Sequential(nn.Linear(768, 100), nn.ReLU(), nn.Linear(100, 1))

  def forward(self, images, scale):
    x = self.conv(images)
    return self.label(x[: len(images) // 2]), self.domain(Reverse.apply(x, scale))


class Training:
  """The network, its optimiser and fixed batches."""

  def __init__(self, batch, steps, device, layout):
    self.net = Dann().to(device, memory_format=layout)
    self.sgd = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)
    self.schedule = torch.optim.lr_scheduler.LambdaLR(
      self.sgd, lambda step: (1 + 10 * step / steps) ** -0.75
    )
    source, target = torch.randn(2, batch, 3, 28, 28, device=device)
    self.source, self.target = (x.to(memory_format=layout) for x in (source, target))
    self.labels = torch.arange(batch, device=device) % 10
    self.domains = torch.arange(2 * batch, device=device).ge(batch).float()[:, None]
    self.step, self.steps = 0, steps

  def plain(self):
    """One step of both players."""
    p = torch.tensor(self.step / self.steps)
    scale = (2 / (1 + torch.exp(-10 * p)) - 1).item()
    images = torch.cat([self.source, self.target])
    logits, domains = self.net(images, scale)
    loss = functional.cross_entropy(logits, self.labels)
    # The mean over both domains is half of the paper's sum of two means.
    loss = loss + 2 * functional.binary_cross_entropy_with_logits(domains, self.domains)
    self.sgd.zero_grad(set_to_none=True)
    loss.backward()
    self.sgd.step()
    self.schedule.step()
    self.step += 1
    return loss.detach()


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--batch', type=int, required=True)
  parser.add_argument('--steps', type=int, required=True, help='of the whole training')
  options = parser.parse_args()
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.manual_seed(0)
  layouts = {'plain': torch.contiguous_format, 'channels_last': torch.channels_last}
  kinds = {
    name: Training(options.batch, options.steps, device, layout)
    for name, layout in layouts.items()
  }
  for training in kinds.values():
    training.plain().item()
  params = sum(p.numel() for p in kinds['plain'].net.parameters())
  print(f'ready torch {torch.__version__} {device} {params}', flush=True)
  for line in sys.stdin:
    kind, steps = line.split()
    began = time.perf_counter()
    for _ in range(int(steps)):
      loss = kinds[kind].plain()
    loss.item()
    print(time.perf_counter() - began, flush=True)


if __name__ == '__main__':
  main()
