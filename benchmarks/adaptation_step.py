"""Training steps of adaptation methods on digits, compared with plain PyTorch.

  python -m benchmarks.adaptation_step [--torch_python=PATH] [--json=FILE]

The network is DANN's for MNIST, with 64 images of 28 x 28 x 3 pixels from each domain.
The methods are DANN with the paper's domain classifier; DAN, whose multi-kernel MMD
compares the 768 outputs of the convolutions or 2,048 features; and the last stage of
OCDA, with its memory, domain features and two updates. The first two use SGD with
momentum and both schedules, OCDA uses Adam. For comparison the network is also trained
on the source alone, and with Deep CORAL. PyTorch runs in its default layout and in
channels-last. Sides take turns within one run; the table shows medians over the rounds,
of times and of ratios within a round.
"""

import argparse
import statistics
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.train_step import HERE, find_torch
from lt_jax import sharding
from lt_jax.losses import REDUCTIONS, make_loss
from lt_jax.losses.alignment import make_alignment, make_weight
from lt_jax.method import Player
from lt_jax.methods import METHODS
from lt_jax.methods.supervised import make_objective
from lt_jax.models import NETWORKS, make_classifier
from lt_jax.optim import make_optimizer
from lt_jax.schedules import make_schedule

TRAINING = 5000
"""Steps of a whole training, which the schedules assume."""

COUNTS = np.ones(10)

WEIGHT = {'name': 'dann', 'gamma': 10.0, 'weight': 1.0}


def progress(step):
  return jnp.minimum(jnp.asarray(step, jnp.float32) / TRAINING, 1)


SUPERVISED = {
  'loss': make_loss('cross_entropy', counts=COUNTS),
  'class_weights': lambda step: jnp.ones(10),
  'reduction': REDUCTIONS['mean'],
  'penalty': None,
}

TWO_DOMAINS = {
  'objective': make_objective(**SUPERVISED),
  'streams': ('train', 'target'),
}


def network(**model):
  """Returns the network and its optimiser."""
  schedule = make_schedule('dann', 0.01, length=1, batch=1, end=TRAINING)
  return (
    make_classifier('mnist_dann', 'linear', 10, **model),
    make_optimizer('sgd', schedule, momentum=0.9),
  )


def aligned(name, layer, **model):
  """Returns the method that aligns one layer."""
  alignment = make_alignment(
    name, align_on=(layer,), weight=WEIGHT, counts=COUNTS, progress=progress
  )
  return METHODS['aligned'](*network(**model), alignment=alignment, **TWO_DOMAINS)


def dann():
  """Returns the method DANN."""
  net, optimizer = network()
  return METHODS['dann'](
    net,
    optimizer,
    players={'discriminator': Player(NETWORKS['mlp'](hidden=(100,)), optimizer)},
    align_on=('conv',),
    alignment_weight=make_weight(WEIGHT, progress),
    **TWO_DOMAINS,
  )


def ocda():
  """Returns the last stage of OCDA, in which every step updates all players."""

  def adam(rate):
    return make_optimizer('adam', make_schedule('constant', rate, length=1, batch=1))

  return METHODS['compound'](
    make_classifier('mnist_dann', 'cosine_squash', 10),
    adam(1e-4),
    players={
      'discriminator': Player(NETWORKS['mlp'](hidden=(500, 500)), adam(1e-4)),
      'fusion': Player(NETWORKS['fusion'](form='paper'), adam(1e-5)),
    },
    align_on=('logits',),
    streams=('train', 'target'),
    counts=COUNTS,
    threshold=0.0,
  )


def make_methods():
  """Returns the methods to time, by name; PyTorch also has those of `COMPARED`."""
  return {
    'source only': METHODS['supervised'](*network(), **SUPERVISED),
    'deep_coral': aligned('coral', 'logits'),
    'dann': dann(),
    'dan_768': aligned('mmd', 'conv'),
    'dan_2048': aligned('mmd', 'features', projection=2048),
    'ocda': ocda(),
  }


COMPARED = ('dann', 'dan_768', 'dan_2048', 'ocda')


class Side:
  """The compiled step of a method, and its state."""

  def __init__(self, method, batches):
    self.batches = batches
    self.state = jax.jit(method.init)(jax.random.key(0), batches)
    jitted = jax.jit(method.step, donate_argnums=0)
    began = time.perf_counter()
    lowered = jitted.lower(self.state, batches)
    self.step = lowered.compile(sharding.compiler_options())
    self.compile_seconds = time.perf_counter() - began
    self.params = sum(x.size for x in jax.tree.leaves(self.state.params))

  def run(self, steps):
    """Returns the seconds that `steps` steps take."""
    state = self.state
    began = time.perf_counter()
    for _ in range(steps):
      state, _ = self.step(state, self.batches)
    jax.block_until_ready(state)
    self.state = state
    return time.perf_counter() - began


class Torch:
  """The PyTorch side, in its own process."""

  def __init__(self, python, batch):
    command = [python, HERE / 'torch_adaptation_step.py', f'--batch={batch}']
    self.process = subprocess.Popen(
      [*command, f'--steps={TRAINING}'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    ready = self.process.stdout.readline().split()
    if not ready:
      raise SystemExit(f'{python} cannot run torch_adaptation_step.py')
    self.version = ready[2]
    self.params = {
      name: int(count) for name, count in (one.split('=') for one in ready[4:])
    }

  def run(self, steps, method, layout):
    """Returns the seconds that `steps` steps of a method take."""
    self.process.stdin.write(f'{method} {layout} {steps}\n')
    self.process.stdin.flush()
    return float(self.process.stdout.readline())


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch', type=int, default=64, help='images of each domain')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=50, help='per round')
  parser.add_argument('--torch_python', default=None)
  parser.add_argument('--json', default=None)
  options = parser.parse_args()

  generator = np.random.default_rng(0)
  shape = (2, options.batch, 28, 28, 3)
  source, target = generator.standard_normal(shape).astype(np.float32)
  labels = np.arange(options.batch, dtype=np.int32) % 10
  batches = {
    'train': {'image': jnp.asarray(source), 'label': jnp.asarray(labels)},
    'target': {'image': jnp.asarray(target)},
  }
  ours = {name: Side(method, batches) for name, method in make_methods().items()}
  sides = {name: side.run for name, side in ours.items()}
  beside = dict.fromkeys(ours, 'dann')  # side -> the side it is compared with
  python = find_torch(options.torch_python)
  if python:
    torch = Torch(python, options.batch)
    for name in COMPARED:
      counts = torch.params[name], ours[name].params
      assert counts[0] == counts[1], (name, *counts)
      for layout, text in (('plain', ''), ('channels_last', ', channels last')):
        side = f'{name}, PyTorch {torch.version}{text}'
        sides[side] = lambda steps, at=(name, layout): torch.run(steps, *at)
        beside[side] = name
  seconds = timing.in_turn(sides, options.rounds, options.steps)
  kind = jax.devices()[0].device_kind
  print(
    f'adaptation on MNIST, {options.batch} + {options.batch} images, JAX '
    f'{jax.__version__} on {kind}; {options.rounds} rounds of {options.steps} steps in '
    'turn'
  )
  table = {}
  for name, taken in seconds.items():
    median, base = statistics.median(taken), beside[name]
    over = timing.ratio(taken, seconds[base])
    table[name] = {'seconds_per_step': median, 'beside': base, 'ratio': over}
    print(f'  {name:40s}{1e3 * median:9.2f} ms per step   {over:6.3f} of {base}')
  report = {
    'batch': options.batch,
    'rounds': options.rounds,
    'steps': options.steps,
    **timing.facts(),
    'compile_seconds': {name: side.compile_seconds for name, side in ours.items()},
    'parameters': {name: side.params for name, side in ours.items()},
    'sides': table,
  }
  timing.write_report(options.json, report)


if __name__ == '__main__':
  main()
