"""A step of DANN on digits, beside the same step written plainly in PyTorch.

  python -m benchmarks.adaptation_step [--torch_python=PATH] [--json=FILE]

The paper's MNIST network and domain classifier, 64 images of either domain of 28 x 28
x 3 pixels, SGD with momentum, both schedules. Beside it the same network trained on the
source alone, and its step with Deep CORAL. PyTorch runs in its usual layout and in
channels-last. Sides take turns within one run; medians over the rounds are shown, of
times and of ratios within a round.
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
from lt_jax.models import NETWORKS, make_classifier
from lt_jax.optim import make_optimizer, make_schedule

TRAINING = 5000
"""Steps of a whole training, by which the schedules go."""


def progress(step):
  return jnp.minimum(jnp.asarray(step, jnp.float32) / TRAINING, 1)


def make_methods():
  """Returns the methods that are timed, by name."""
  schedule = make_schedule('dann', 0.01, length=1, batch=1, end=TRAINING)
  optimizer = make_optimizer('sgd', schedule, momentum=0.9)
  given = (
    make_classifier('mnist_dann', 'linear', 10),
    optimizer,
    make_loss('cross_entropy', counts=np.ones(10)),
  )
  shared = {
    'class_weights': lambda step: jnp.ones(10),
    'reduction': REDUCTIONS['mean'],
  }
  weight = {'name': 'dann', 'gamma': 10.0, 'weight': 1.0}
  coral = make_alignment(
    'coral',
    align_on=('logits',),
    weight=weight,
    counts=np.ones(10),
    progress=progress,
  )
  return {
    'source only': METHODS['supervised'](*given, **shared),
    'deep_coral': METHODS['aligned'](*given, alignment=coral, **shared),
    'dann': METHODS['dann'](
      *given,
      players={'discriminator': Player(NETWORKS['mlp'](hidden=(100,)), optimizer)},
      align_on=('conv',),
      alignment_weight=make_weight(weight, progress),
      **shared,
    ),
  }


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
    """Seconds of so many steps."""
    state = self.state
    began = time.perf_counter()
    for _ in range(steps):
      state, _ = self.step(state, self.batches)
    jax.block_until_ready(state)
    self.state = state
    return time.perf_counter() - began


class Torch:
  """The other side, in a process of its own."""

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
    self.version, self.params = ready[2], int(ready[4])

  def run(self, steps, kind):
    """Seconds of so many steps of a kind."""
    self.process.stdin.write(f'{kind} {steps}\n')
    self.process.stdin.flush()
    return float(self.process.stdout.readline())


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch', type=int, default=64, help='images of each domain')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=50, help='a round')
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
  python = find_torch(options.torch_python)
  if python:
    torch = Torch(python, options.batch)
    assert torch.params == ours['dann'].params, (torch.params, ours['dann'].params)
    for kind, text in (('plain', ''), ('channels_last', ', channels last')):
      name = f'PyTorch {torch.version}{text}'
      sides[name] = lambda steps, kind=kind: torch.run(steps, kind)
  seconds = timing.in_turn(sides, options.rounds, options.steps)
  kind = jax.devices()[0].device_kind
  print(
    f'DANN on MNIST, {ours["dann"].params:,} parameters, {options.batch} + '
    f'{options.batch} images, JAX {jax.__version__} on {kind}; {options.rounds} rounds '
    f'of {options.steps} steps in turn'
  )
  table = {}
  for name, taken in seconds.items():
    median = statistics.median(taken)
    over_dann = timing.ratio(taken, seconds['dann'])
    table[name] = {'seconds_per_step': median, 'over_dann': over_dann}
    print(f'  {name:32s}{1e3 * median:9.2f} ms a step   {over_dann:6.3f} of dann')
  report = {
    'batch': options.batch,
    'rounds': options.rounds,
    'steps': options.steps,
    **timing.facts(),
    'compile_seconds': ours['dann'].compile_seconds,
    'sides': table,
  }
  timing.write_report(options.json, report)


if __name__ == '__main__':
  main()
