"""Two classification heads in plain PyTorch, as a worker process.

Started by benchmarks/memory_head.py, possibly with another Python. For each line `KIND
K` on standard input it runs K forward and backward passes of that kind and answers with
the seconds they took.
"""

import argparse
import sys
import time

import torch
from torch import nn
from torch.nn import functional


class Direct(nn.Module):
  """The meta-embedding, which stores every difference of a feature and a centroid."""

  def __init__(self, centroids):
    super().__init__()
    classes, width = centroids.shape
    self.hallucinator = nn.Linear(width, classes)
    self.selector = nn.Linear(width, width)
    self.weight = nn.Parameter(torch.randn(classes, width) / width**0.5)
    self.register_buffer('centroids', centroids)

  def forward(self, v):
    distance = (v[:, None] - self.centroids[None]).norm(2, 2)
    reachability = 10 / distance.min(1, keepdim=True).values
    read = self.hallucinator(v).softmax(1) @ self.centroids
    embedding = reachability * (v + self.selector(v).tanh() * read)
    squashed = embedding / (1 + embedding.norm(2, 1, keepdim=True))
    return 16 * squashed @ functional.normalize(self.weight).T


def main():
  parser = argparse.ArgumentParser()
  for name in ('batch', 'width', 'classes'):
    parser.add_argument(f'--{name}', type=int, required=True)
  options = parser.parse_args()
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.manual_seed(0)
  features = torch.randn(options.batch, options.width, device=device).requires_grad_()
  centroids = torch.randn(options.classes, options.width, device=device)
  labels = torch.arange(options.batch, device=device) % options.classes
  heads = {
    'linear': nn.Linear(options.width, options.classes).to(device),
    'direct': Direct(centroids).to(device),
  }
  print(f'ready torch {torch.__version__} {device}', flush=True)
  for line in sys.stdin:
    kind, steps = line.split()
    wanted = [features, *heads[kind].parameters()]
    began = time.perf_counter()
    for _ in range(int(steps)):
      loss = functional.cross_entropy(heads[kind](features), labels)
      grads = torch.autograd.grad(loss, wanted)
    grads[0].sum().item()
    print(time.perf_counter() - began, flush=True)


if __name__ == '__main__':
  main()
