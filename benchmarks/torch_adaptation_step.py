"""Training steps of adaptation methods in plain PyTorch, as a worker process.

Started by `benchmarks.adaptation_step`, possibly with another Python. For each line
`METHOD LAYOUT K` on standard input it runs K steps of a method of `METHODS` in a layout
of `LAYOUTS` and answers with the seconds they took.
"""

import argparse
import copy
import sys
import time

import torch
from torch import nn
from torch.nn import functional

FAMILY = (0.125, 0.25, 0.5, 1.0, 2.0)


class Reverse(torch.autograd.Function):
  """The identity, whose gradient is multiplied by -scale."""

  @staticmethod
  def forward(ctx, x, scale):
    ctx.scale = scale
    return x.view_as(x)

  @staticmethod
  def backward(ctx, grad):
    return -ctx.scale * grad, None


def convolutions():
  """Returns the convolutions of DANN's MNIST network, with 768 flattened outputs."""
  return nn.Sequential(
    nn.Conv2d(3, 32, 5),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(32, 48, 5),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
  )


def hidden():
  """Returns its hidden layers."""
  return nn.Sequential(nn.Linear(768, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU())


class Cosine(nn.Module):
  """The squashed cosine classifier."""

  def __init__(self, inputs):
    super().__init__()
    self.weight = nn.Parameter(torch.randn(10, inputs))

  def forward(self, x):
    squashed = x / (1 + x.norm(dim=1, keepdim=True))
    return 16 * squashed @ functional.normalize(self.weight, dim=1).T


def progress(step, steps):
  """Returns DANN's lambda(p)."""
  p = torch.tensor(step / steps)
  return (2 / (1 + torch.exp(-10 * p)) - 1).item()


class Method:
  """Networks, optimisers and fixed batches."""

  def __init__(self, batch, steps, device, layout):
    self.steps, self.step = steps, 0
    source, target = torch.randn(2, batch, 3, 28, 28, device=device)
    self.source, self.target = (x.to(memory_format=layout) for x in (source, target))
    self.labels = torch.arange(batch, device=device) % 10
    self.build()
    self.parts.to(device, memory_format=layout)
    self.optimisers()

  @property
  def params(self):
    """Number of learned parameters."""
    return sum(p.numel() for p in self.parts.parameters())

  def sgd(self):
    """Makes the optimiser and schedule of DANN and DAN."""
    self.optimiser = torch.optim.SGD(self.parts.parameters(), lr=0.01, momentum=0.9)
    self.schedule = torch.optim.lr_scheduler.LambdaLR(
      self.optimiser, lambda step: (1 + 10 * step / self.steps) ** -0.75
    )

  optimisers = sgd

  def descend(self, loss):
    """Updates all parameters once."""
    self.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    self.optimiser.step()
    self.schedule.step()
    self.step += 1
    return loss.detach()


class Dann(Method):
  """DANN: a discriminator behind a reversed gradient."""

  def build(self):
    domain = nn.Sequential(nn.Linear(768, 100), nn.ReLU(), nn.Linear(100, 1))
    self.parts = nn.ModuleList([convolutions(), hidden(), nn.Linear(100, 10), domain])
    zeros, ones = torch.zeros(len(self.source), 1), torch.ones(len(self.target), 1)
    self.domains = torch.cat([zeros, ones]).to(self.source.device)

  def plain(self):
    """One step of both players."""
    scale = progress(self.step, self.steps)
    conv, fc, head, domain = self.parts
    x = conv(torch.cat([self.source, self.target]))
    logits = head(fc(x[: len(self.source)]))
    judged = domain(Reverse.apply(x, scale))
    # The mean over both domains is half of the paper's sum of two means.
    apart = functional.binary_cross_entropy_with_logits(judged, self.domains)
    return self.descend(functional.cross_entropy(logits, self.labels) + 2 * apart)


def mmd(source, target):
  """Unbiased multi-kernel MMD, from one matrix of distances."""
  x = torch.cat([source, target])
  squares = x.square().sum(1)
  squares = (squares[:, None] + squares[None] - 2 * x @ x.T).clamp_min(0)
  mean = squares.detach().mean()
  kernel = sum(torch.exp(-squares / (2 * alpha * mean)) for alpha in FAMILY)
  n, m = len(source), len(target)
  diagonal = torch.diagonal(kernel)
  within_s = (kernel[:n, :n].sum() - diagonal[:n].sum()) / (n * (n - 1))
  within_t = (kernel[n:, n:].sum() - diagonal[n:].sum()) / (m * (m - 1))
  return within_s + within_t - 2 * kernel[:n, n:].mean()


class Dan768(Method):
  """MMD of the flattened convolutions."""

  def build(self):
    self.parts = nn.ModuleList([convolutions(), hidden(), nn.Linear(100, 10)])

  def plain(self):
    """One step."""
    scale = progress(self.step, self.steps)
    conv, fc, head = self.parts
    s, t = conv(torch.cat([self.source, self.target])).split(len(self.source))
    loss = functional.cross_entropy(head(fc(s)), self.labels)
    return self.descend(loss + scale * mmd(s, t))


class Dan2048(Method):
  """MMD of features after another layer."""

  def build(self):
    wide = nn.Sequential(*hidden(), nn.Linear(100, 2048), nn.ReLU())
    self.parts = nn.ModuleList([convolutions(), wide, nn.Linear(2048, 10)])

  def plain(self):
    """One step."""
    scale = progress(self.step, self.steps)
    conv, fc, head = self.parts
    both = fc(conv(torch.cat([self.source, self.target])))
    s, t = both.split(len(self.source))
    loss = functional.cross_entropy(head(s), self.labels)
    return self.descend(loss + scale * mmd(s, t))


class Ocda(Method):
  """The last stage of OCDA: memory, domain features, a discriminator of logits."""

  def build(self):
    self.net = nn.ModuleList([convolutions(), hidden(), Cosine(100)])
    self.fixed = nn.ModuleList([copy.deepcopy(self.net) for _ in range(2)])
    self.fusion = nn.ModuleList([nn.Linear(100, 100), Cosine(100)])
    self.judge = nn.Sequential(
      nn.Linear(10, 500), nn.ReLU(), nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, 1)
    )
    self.centroids = torch.randn(10, 100, device=self.source.device)
    self.parts = nn.ModuleList([self.net, self.fixed, self.fusion, self.judge])

  def optimisers(self):
    """Makes Adam's optimisers; the fusion has a tenth of the rate."""
    moved = [
      {'params': self.net.parameters(), 'lr': 1e-4},
      {'params': self.fusion.parameters(), 'lr': 1e-5},
    ]
    self.optimiser = torch.optim.Adam(moved)
    self.of_judge = torch.optim.Adam(self.judge.parameters(), lr=1e-4)

  @property
  def params(self):
    return super().params + self.centroids.numel()

  def plain(self):
    """Updates the discriminator, then the others."""
    source_net, domain_net = self.fixed
    with torch.no_grad():
      conv, fc, head = source_net
      of_source = head(fc(conv(self.source)))
      domain = domain_net[1](domain_net[0](self.target))
    conv, fc, head = self.net
    direct = fc(conv(self.target))
    memory = head(direct).softmax(1) @ self.centroids
    gate, classify = self.fusion
    logits = classify(direct + gate(domain).tanh() * memory)
    softplus = functional.softplus
    judged = softplus(self.judge(of_source)).mean()
    judged = judged + softplus(-self.judge(logits.detach())).mean()
    self.of_judge.zero_grad(set_to_none=True)
    judged.backward()
    self.of_judge.step()
    fooled = softplus(self.judge(logits)).mean()
    self.optimiser.zero_grad(set_to_none=True)
    fooled.backward()
    self.optimiser.step()
    return fooled.detach()


METHODS = {'dann': Dann, 'dan_768': Dan768, 'dan_2048': Dan2048, 'ocda': Ocda}

LAYOUTS = {'plain': torch.contiguous_format, 'channels_last': torch.channels_last}


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--batch', type=int, required=True)
  parser.add_argument('--steps', type=int, required=True, help='of the whole training')
  options = parser.parse_args()
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.manual_seed(0)
  made = {
    (name, layout): method(options.batch, options.steps, device, LAYOUTS[layout])
    for name, method in METHODS.items()
    for layout in LAYOUTS
  }
  for training in made.values():
    training.plain().item()
  params = ' '.join(f'{name}={made[name, "plain"].params}' for name in METHODS)
  print(f'ready torch {torch.__version__} {device} {params}', flush=True)
  for line in sys.stdin:
    name, layout, steps = line.split()
    began = time.perf_counter()
    for _ in range(int(steps)):
      loss = made[name, layout].plain()
    loss.item()
    print(time.perf_counter() - began, flush=True)


if __name__ == '__main__':
  main()
