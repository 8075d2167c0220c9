"""A training step of AdvEnt on street scenes, compared with plain PyTorch.

  python -m benchmarks.segmentation_step [--network=small] [--torch_python=PATH]
  python -m benchmarks.segmentation_step --network=deeplab_resnet50 --steps=2

'small' is the network for CPUs at 240 x 180 pixels, with 4 images per domain and 11
classes; 'deeplab_resnet50' is DeepLab-v2 with both its outputs at 512 x 256 pixels,
with one image per domain and 19 classes. Both use ADVENT's discriminators, SGD and
Adam. For comparison the network is also trained on the source alone, and with MinEnt.
PyTorch runs in its default layout and in channels-last. Sides take turns within one
run; the table shows medians over the rounds, of times and of ratios within a round.
"""

import argparse
import statistics
import subprocess
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.adaptation_step import Side
from benchmarks.train_step import HERE, find_torch
from lt_jax.losses import REDUCTIONS, make_loss
from lt_jax.losses.alignment import make_alignment, make_weight
from lt_jax.method import Player
from lt_jax.methods import METHODS
from lt_jax.methods.advent import JUDGES
from lt_jax.methods.supervised import make_objective
from lt_jax.models import NETWORKS, make_classifier
from lt_jax.optim import make_optimizer
from lt_jax.schedules import make_schedule

TRAINING = 3000
"""Steps of a whole training, which the schedules assume."""


class Case(NamedTuple):
  """A network and the size of its batches.

  Attributes:
    parts: trunk, head and their options.
    classes: number of classes.
    size: (H, W).
    batch: images of each domain.
    layers: the network's outputs of logits.
  """

  parts: dict[str, Any]
  classes: int
  size: tuple[int, int]
  batch: int
  layers: tuple[str, ...]


CASES = {
  'small': Case(
    {'trunk': 'small_segmenter', 'head': 'multi_dilation'},
    11,
    (180, 240),
    4,
    ('logits',),
  ),
  'deeplab_resnet50': Case(
    {
      'trunk': 'deeplab_resnet50',
      'head': 'deeplab',
      'head_options': {'auxiliary': 'stage3'},
    },
    19,
    (256, 512),
    1,
    ('logits', 'auxiliary_logits'),
  ),
}


def progress(step):
  return jnp.minimum(jnp.asarray(step, jnp.float32) / TRAINING, 1)


def make_methods(case):
  """Returns the methods to time, by name."""
  length = {'length': 1, 'batch': 1, 'end': TRAINING}
  optimizer = make_optimizer(
    'sgd',
    make_schedule('poly', 2.5e-4, **length),
    momentum=0.9,
    weight_decay=(('.*', 5e-4),),
  )
  of_judges = make_optimizer('adam', make_schedule('poly', 1e-4, **length), b2=0.99)
  net = make_classifier(num_classes=case.classes, per_pixel=True, **case.parts)
  counts = np.ones(case.classes)
  auxiliary = 0.1 * (len(case.layers) > 1)
  parts = {
    'loss': make_loss('cross_entropy', counts, auxiliary=auxiliary),
    'class_weights': lambda step: jnp.ones(case.classes),
    'reduction': REDUCTIONS['mean'],
    'penalty': None,
  }
  minent = make_alignment(
    'minent', align_on=case.layers, weight=1e-3, counts=counts, progress=progress
  )
  two = {
    'objective': make_objective(**parts),
    'streams': ('train', 'target'),
    'statistics': 'separate',
  }
  judges = JUDGES[: len(case.layers)]
  return {
    'source only': METHODS['supervised'](net, optimizer, **parts),
    'minent': METHODS['aligned'](net, optimizer, alignment=minent, **two),
    'advent': METHODS['advent'](
      net,
      optimizer,
      players={
        name: Player(NETWORKS['patch_discriminator'](), of_judges) for name in judges
      },
      align_on=case.layers,
      alignment=None,
      alignment_weight=make_weight(1e-3, progress),
      **two,
    ),
  }


class Torch:
  """The PyTorch side, in its own process."""

  def __init__(self, python, network, case):
    height, width = case.size
    self.process = subprocess.Popen(
      [
        python,
        HERE / 'torch_segmentation_step.py',
        f'--network={network}',
        f'--batch={case.batch}',
        f'--height={height}',
        f'--width={width}',
        f'--steps={TRAINING}',
      ],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    ready = self.process.stdout.readline().split()
    if not ready:
      raise SystemExit(f'{python} cannot run torch_segmentation_step.py')
    self.version, self.params = ready[2], int(ready[4])

  def run(self, steps, kind):
    """Returns the seconds that `steps` steps of a kind take."""
    self.process.stdin.write(f'{kind} {steps}\n')
    self.process.stdin.flush()
    return float(self.process.stdout.readline())


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--network', choices=CASES, default='small')
  parser.add_argument('--batch', type=int, default=0, help='images of each domain')
  parser.add_argument('--height', type=int, default=0)
  parser.add_argument('--width', type=int, default=0)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=10, help='per round')
  parser.add_argument('--torch_python', default=None)
  parser.add_argument('--json', default=None)
  options = parser.parse_args()

  case = CASES[options.network]
  size = options.height or case.size[0], options.width or case.size[1]
  case = case._replace(size=size, batch=options.batch or case.batch)
  generator = np.random.default_rng(0)
  images = generator.standard_normal((2, case.batch, *size, 3)).astype(np.float32)
  labels = generator.integers(-1, case.classes, (case.batch, *size)).astype(np.int32)
  batches = {
    'train': {'image': jnp.asarray(images[0]), 'label': jnp.asarray(labels)},
    'target': {'image': jnp.asarray(images[1])},
  }
  ours = {name: Side(method, batches) for name, method in make_methods(case).items()}
  sides = {name: side.run for name, side in ours.items()}
  python = find_torch(options.torch_python)
  if python:
    torch = Torch(python, options.network, case)
    assert torch.params == ours['advent'].params, (torch.params, ours['advent'].params)
    for kind, text in (('plain', ''), ('channels_last', ', channels last')):
      name = f'PyTorch {torch.version}{text}'
      sides[name] = lambda steps, kind=kind: torch.run(steps, kind)
  seconds = timing.in_turn(sides, options.rounds, options.steps)
  height, width = size
  print(
    f'AdvEnt with {options.network}, {ours["advent"].params:,} parameters, '
    f'{case.batch} + {case.batch} images of {height} x {width}, JAX {jax.__version__} '
    f'on {jax.devices()[0].device_kind}; {options.rounds} rounds of {options.steps} '
    'steps in turn'
  )
  table = {}
  for name, taken in seconds.items():
    median = statistics.median(taken)
    over_advent = timing.ratio(taken, seconds['advent'])
    table[name] = {'seconds_per_step': median, 'over_advent': over_advent}
    print(f'  {name:32s}{1e3 * median:9.1f} ms per step   {over_advent:6.3f} of advent')
  report = {
    'network': options.network,
    'batch': case.batch,
    'size': size,
    'rounds': options.rounds,
    'steps': options.steps,
    **timing.facts(),
    'compile_seconds': ours['advent'].compile_seconds,
    'sides': table,
  }
  timing.write_report(options.json, report)


if __name__ == '__main__':
  main()
