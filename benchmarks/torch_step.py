"""The same ResNet steps in plain PyTorch, as a worker process.

Started by the benchmarks, possibly with another Python. For each line `KIND K` on
standard input it runs K steps of that kind and answers with the seconds they took.
"""

import argparse
import copy
import sys
import time

import torch
from torch import nn
from torch.nn import functional

RATE = 0.1


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


def basic(inputs, width, stride):
  """Returns two 3x3 convolutions."""
  return [
    nn.Conv2d(inputs, width, 3, stride, 1, bias=False),
    nn.BatchNorm2d(width),
    nn.ReLU(),
    nn.Conv2d(width, width, 3, 1, 1, bias=False),
    nn.BatchNorm2d(width),
  ]


def bottleneck(inputs, width, stride):
  """Returns 1x1, 3x3 and 1x1 convolutions."""
  return [
    nn.Conv2d(inputs, width, 1, bias=False),
    nn.BatchNorm2d(width),
    nn.ReLU(),
    nn.Conv2d(width, width, 3, stride, 1, bias=False),
    nn.BatchNorm2d(width),
    nn.ReLU(),
    nn.Conv2d(width, 4 * width, 1, bias=False),
    nn.BatchNorm2d(4 * width),
  ]


class Residual(nn.Module):
  """A branch and its shortcut: a 1x1 convolution where the shape changes."""

  def __init__(self, branch, inputs, width, stride):
    super().__init__()
    self.body = nn.Sequential(*branch(inputs, width, stride))
    self.outputs = outputs = self.body[-1].num_features
    self.shortcut = nn.Identity()
    if inputs != outputs or stride != 1:
      self.shortcut = nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
      )

  def forward(self, x):
    return functional.relu(self.body(x) + self.shortcut(x))


PHOTOGRAPHS = {
  'resnet10': (basic, (1, 1, 1, 1)),
  'resnet18': (basic, (2, 2, 2, 2)),
  'resnet34': (basic, (3, 4, 6, 3)),
  'resnet50': (bottleneck, (3, 4, 6, 3)),
}
"""name -> (branch, blocks per stage) of the networks for photographs."""


def photographs(name, classes=1000):
  """Returns the network of that name in `PHOTOGRAPHS`."""
  branch, stages = PHOTOGRAPHS[name]
  layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
  layers.append(nn.MaxPool2d(3, 2, 1))
  inputs = 64
  for stage, blocks in enumerate(stages):
    width = 64 * 2**stage
    for i in range(blocks):
      layers.append(Residual(branch, inputs, width, 2 if i == 0 and stage else 1))
      inputs = layers[-1].outputs
  pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
  return nn.Sequential(*layers, *pooled)


class Photographs:
  """A network in channels-last; in bfloat16 by autocast, compiled on a GPU."""

  def __init__(self, name, batch, size, dtype, device):
    net = photographs(name)
    self.net = net.to(device, memory_format=torch.channels_last).train()
    self.sgd = torch.optim.SGD(
      self.net.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4
    )
    images = torch.randn(batch, 3, size, size, device=device)
    self.images = images.to(memory_format=torch.channels_last)
    self.labels = torch.randint(0, 1000, (batch,), device=device)
    self.device, self.low = device, dtype == 'bfloat16'
    self.loss = torch.compile(self._loss) if device == 'cuda' else self._loss

  def _loss(self):
    with torch.autocast(self.device, torch.bfloat16, enabled=self.low):
      return functional.cross_entropy(self.net(self.images), self.labels)

  def plain(self):
    """Steps down the gradient of the mean loss."""
    self.sgd.zero_grad(set_to_none=True)
    loss = self.loss()
    loss.backward()
    self.sgd.step()
    return loss.detach()


class Training:
  """A network, its optimiser and fixed batches; one method per kind of step."""

  def __init__(self, depth, batch, device):
    self.net = resnet(depth).to(device).train()
    # The same network without running statistics, which torch.func cannot update.
    self.stateless = copy.deepcopy(self.net)
    torch.func.replace_all_batch_norm_modules_(self.stateless)
    self.sgd = torch.optim.SGD(
      self.net.parameters(), lr=RATE, momentum=0.9, weight_decay=2e-4
    )
    self.images, self.meta_images = torch.randn(2, batch, 3, 32, 32, device=device)
    self.labels, self.meta_labels = torch.randint(0, 10, (2, batch), device=device)
    self.prior = torch.linspace(0.05, 4.0, 10, device=device)[self.labels]

  def plain(self):
    """Steps down the gradient of the mean loss."""
    return self._descend(functional.cross_entropy(self.net(self.images), self.labels))

  def double(self):
    """Meta-reweights by double backward: autograd through the virtual step."""
    eps = torch.zeros_like(self.prior, requires_grad=True)
    params = dict(self.net.named_parameters())
    objective = ((self.prior + eps) * self._losses()).sum()
    grads = torch.autograd.grad(objective, list(params.values()), create_graph=True)
    virtual = _virtual(params, grads)
    (gradient,) = torch.autograd.grad(self._meta_loss(virtual), eps)
    return self._descend(((self.prior - 0.01 * gradient) * self._losses()).mean())

  def jvp(self):
    """Does the same by one forward-mode pass; both gradients share a forward pass."""
    params = dict(self.net.named_parameters())
    losses = self._losses()
    objective = (self.prior * losses).sum()
    grads = torch.autograd.grad(objective, list(params.values()), retain_graph=True)
    virtual = _virtual(params, grads)
    virtual = {name: p.detach().requires_grad_() for name, p in virtual.items()}
    slope = torch.autograd.grad(self._meta_loss(virtual), list(virtual.values()))

    def losses_of(params):
      logits = torch.func.functional_call(self.stateless, params, (self.images,))
      return functional.cross_entropy(logits, self.labels, reduction='none')

    here = {name: p.detach() for name, p in params.items()}
    along = dict(zip(params, slope, strict=True))
    _, change = torch.func.jvp(losses_of, (here,), (along,))
    return self._descend(((self.prior + 0.01 * RATE * change) * losses).mean())

  def _losses(self):
    logits = self.net(self.images)
    return functional.cross_entropy(logits, self.labels, reduction='none')

  def _meta_loss(self, params):
    logits = torch.func.functional_call(self.stateless, params, (self.meta_images,))
    return functional.cross_entropy(logits, self.meta_labels)

  def _descend(self, loss):
    self.sgd.zero_grad(set_to_none=True)
    loss.backward()
    self.sgd.step()
    return loss.detach()


def _virtual(params, grads):
  pairs = zip(params.items(), grads, strict=True)
  return {name: p - RATE * grad for (name, p), grad in pairs}


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--net', required=True, help='such as resnet32 or resnet50')
  parser.add_argument('--batch', type=int, required=True)
  parser.add_argument('--size', type=int, default=32)
  parser.add_argument('--dtype', default='float32')
  options = parser.parse_args()
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.manual_seed(0)
  if options.net in PHOTOGRAPHS:
    training = Photographs(
      options.net, options.batch, options.size, options.dtype, device
    )
    kinds = {'plain': training.plain}
  else:
    depth = int(options.net.removeprefix('resnet'))
    training = Training(depth, options.batch, device)
    kinds = {'plain': training.plain, 'double': training.double, 'jvp': training.jvp}
  training.plain().item()
  params = sum(p.numel() for p in training.net.parameters())
  print(f'ready torch {torch.__version__} {device} {params}', flush=True)
  for line in sys.stdin:
    kind, steps = line.split()
    began = time.perf_counter()
    for _ in range(int(steps)):
      loss = kinds[kind]()
    loss.item()
    print(time.perf_counter() - began, flush=True)


if __name__ == '__main__':
  main()
