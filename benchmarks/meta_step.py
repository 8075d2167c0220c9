"""The cost of a step with learned weights: ResNet-32, 100 training and 100 meta images.

  python -m benchmarks.meta_step [--torch_python=PATH] [--json=FILE]

The plain weighted step, the exact meta step by both routes and with low memory, its
head-only form, and a meta batch in one of four steps; with the compiler's FLOP count
and its peak temporary memory. If PyTorch is installed, also the same meta step there,
by double backward and by torch.func.jvp. Sides take turns within one run; the table
shows medians over the rounds, of times and of ratios within a round.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.train_step import Torch, find_torch
from configs import cifar10_lt
from lt_jax import allocator, sharding
from lt_jax.losses import REDUCTIONS, make_loss
from lt_jax.methods import meta
from lt_jax.methods.supervised import supervised
from lt_jax.models import make_classifier
from lt_jax.optim import make_optimizer
from lt_jax.schedules import make_schedule

BATCH = 100
EVERY = 4
SIDES = {
  'plain': None,
  'unrolled': {'route': 'unrolled'},
  'jvp': {},
  'jvp, low memory': {'low_memory': True},
  'head only': {'meta_layers': 'head'},
}


def make_method(options, net):
  """Returns plain class-weighted training, or meta-reweighting if there are options."""
  optimizer = make_optimizer(
    'sgd',
    make_schedule('constant', 0.001, length=BATCH, batch=BATCH),
    momentum=0.9,
    nesterov=True,
    weight_decay=(('.*', 5e-4),),
  )
  shared = {'class_weights': lambda step: jnp.linspace(0.05, 4.0, 10)}
  loss = make_loss('cross_entropy', counts=np.ones(10))
  if options is None:
    return supervised(net, optimizer, loss, reduction=REDUCTIONS['mean'], **shared)
  return meta.meta_reweight(
    net, optimizer, loss, streams=('train', 'meta'), **shared, **options
  )


class Side:
  """The compiled step of a method, and its state."""

  def __init__(self, options, net, batches):
    method = make_method(options, net)
    self.batches = batches
    self.state = jax.jit(method.init)(jax.random.key(0), batches)
    self.jitted = jax.jit(method.step, donate_argnums=0)
    began = time.perf_counter()
    lowered = self.jitted.lower(self.state, batches)
    self.trace_seconds = time.perf_counter() - began
    began = time.perf_counter()
    self.step = lowered.compile(sharding.compiler_options())
    self.compile_seconds = time.perf_counter() - began
    cost = self.step.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    self.gflop = cost['flops'] / 1e9
    self.memory_mib = self.step.memory_analysis().temp_size_in_bytes / 2**20

  @functools.cached_property
  def step_without_meta(self):
    lowered = self.jitted.lower(self.state, {'train': self.batches['train']})
    return lowered.compile(sharding.compiler_options())

  def run(self, steps, every=1):
    """Returns the seconds of `steps` steps, of which every `every`-th has meta data."""
    state, alone = self.state, {'train': self.batches['train']}
    began = time.perf_counter()
    for i in range(steps):
      if i % every == 0:
        state, _ = self.step(state, self.batches)
      else:
        state, _ = self.step_without_meta(state, alone)
    jax.block_until_ready(state)
    self.state = state
    return time.perf_counter() - began


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--net', default='resnet32')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=0, help='per round; 0: automatic')
  parser.add_argument('--torch_python', default=None)
  parser.add_argument('--json', default=None)
  options = parser.parse_args()
  # As lt_jax.main does for this step, before JAX starts.
  allocator.keep_pages(cifar10_lt.get_config(f'meta_ce,net={options.net}'))
  steps = options.steps or (EVERY if jax.default_backend() == 'cpu' else 100)
  if steps % EVERY:
    parser.error(f'--steps must be a multiple of meta_every, {EVERY}')

  generator = np.random.default_rng(0)
  batches = {
    name: {
      'image': jnp.asarray(
        generator.standard_normal((BATCH, 32, 32, 3)).astype(np.float32)
      ),
      'label': jnp.asarray(np.arange(BATCH, dtype=np.int32) % 10),
    }
    for name in ('train', 'meta')
  }
  net = make_classifier(options.net, 'linear', 10, batch_norm={'groups': 1})
  ours = {name: Side(choice, net, batches) for name, choice in SIDES.items()}
  sides = {name: side.run for name, side in ours.items()}
  sides[f'jvp, meta_every={EVERY}'] = lambda n: ours['jvp'].run(n, every=EVERY)
  python = find_torch(options.torch_python)
  if python:
    params = sum(x.size for x in jax.tree.leaves(ours['plain'].state.params))
    torch = Torch(python, options.net, params, BATCH)
    sides[f'PyTorch {torch.version}, plain'] = lambda n: torch.run(n, 'plain')
    sides['PyTorch, double backward'] = lambda n: torch.run(n, 'double')
    sides['PyTorch, torch.func.jvp'] = lambda n: torch.run(n, 'jvp')

  seconds = timing.in_turn(sides, options.rounds, steps)
  kind = jax.devices()[0].device_kind
  print(
    f'{options.net}, {BATCH} + {BATCH} images, float32, JAX {jax.__version__} on '
    f'{kind}; {options.rounds} rounds of {steps} steps in turn'
  )
  print(
    f'  {"":28s}{"ms":>9s} {"/ plain":>8s} {"GFLOP":>8s} {"MiB":>7s} {"trace s":>8s}'
  )
  table = {}
  for name, taken in seconds.items():
    median = statistics.median(taken)
    over_plain = timing.ratio(taken, seconds['plain'])
    row = {'seconds_per_step': median, 'over_plain': over_plain}
    text = f'  {name:28s}{1e3 * median:9.1f} {over_plain:8.2f}'
    if name in ours:
      side = ours[name]
      row |= {
        'gflop': side.gflop,
        'temporary_mib': side.memory_mib,
        'trace_seconds': side.trace_seconds,
        'compile_seconds': side.compile_seconds,
      }
      text += f' {side.gflop:8.2f} {side.memory_mib:7.0f} {side.trace_seconds:8.1f}'
    table[name] = row
    print(text)
  report = {
    'net': options.net,
    'batch': BATCH,
    'rounds': options.rounds,
    'steps': steps,
    **timing.facts(),
    'sides': table,
  }
  timing.write_report(options.json, report)


if __name__ == '__main__':
  main()
