"""The cost of a memory of class centroids: its head, its share of a step, filling it.

  python -m benchmarks.memory_head [--torch_python=PATH] [--full] [--json=FILE]

1. The meta-embedding head and a linear one, forward and backward to the features and
every parameter, with the compiler's FLOP count and its peak temporary memory. If
PyTorch is installed, also a linear head there and the direct meta-embedding, which
makes arrays (B, C, D); it is skipped if one of them would be too large.

2. The head's share of the FLOPs of a training step (`oltr`, ResNet-10, 224 pixels);
with --full, also its share of the time with small batches.

3. The pass that fills the memory with class means, compared with only the forward pass
on the same batches.

Sides take turns within one run; the tables show medians over the rounds, of times and
of ratios within a round.
"""

import argparse
import pathlib
import statistics
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.train_step import Torch, find_torch
from lt_jax import sharding
from lt_jax.data.streams import Split, evaluation_pass
from lt_jax.evals import collect
from lt_jax.losses import REDUCTIONS, make_loss
from lt_jax.methods.memory import oltr
from lt_jax.models import make_classifier
from lt_jax.models.heads import HEADS
from lt_jax.optim import make_optimizer
from lt_jax.schedules import make_schedule
from lt_jax.surgery import class_sums

HERE = pathlib.Path(__file__).parent
BATCH, WIDTH = 256, 512
STEP_CLASSES = 1000
SMALL_BATCH = 8
SPLIT_BATCHES, SPLIT_BATCH, SPLIT_CLASSES = 4, 128, 100
IN_FLIGHT = 2
"""How many batches the pass can be ahead of the device; fewer than SPLIT_BATCHES."""


class Program:
  """A compiled function, its arguments, and the compiler's FLOP and memory counts."""

  def __init__(self, function, *arguments, options=None):
    self.arguments = arguments
    self.call = jax.jit(function).lower(*arguments).compile(options)
    cost = self.call.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    self.gflop = cost['flops'] / 1e9
    self.memory_mib = self.call.memory_analysis().temp_size_in_bytes / 2**20

  def run(self, steps):
    """Returns the seconds that `steps` calls take."""
    began = time.perf_counter()
    for _ in range(steps):
      done = self.call(*self.arguments)
    jax.block_until_ready(done)
    return time.perf_counter() - began


def head_program(name, classes, batch=BATCH):
  """Returns the program of a head's cross-entropy gradients, with random inputs."""
  generator = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(generator.standard_normal(shape, np.float32))

  features = normal(batch, WIDTH)
  memory = {'centroids': normal(classes, WIDTH)} if name == 'meta_embedding' else {}
  labels = jnp.arange(batch, dtype=jnp.int32) % classes
  head = HEADS[name](classes)
  params = jax.jit(head.init)(jax.random.key(0), features)['params']
  losses = make_loss('cross_entropy', counts=np.ones(classes))

  def loss(params, features, memory, labels):
    logits = head.apply({'params': params}, features, **memory)
    return losses({'logits': logits}, {'label': labels}).mean()

  gradients = jax.grad(loss, argnums=(0, 1))
  options = sharding.compiler_options()
  return Program(gradients, params, features, memory, labels, options=options)


class TorchHead(Torch):
  """The heads in PyTorch, in their own process."""

  def __init__(self, python, classes):
    command = [python, HERE / 'torch_memory_head.py', f'--classes={classes}']
    command += [f'--batch={BATCH}', f'--width={WIDTH}']
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    ready = self.process.stdout.readline().split()
    if not ready:
      raise SystemExit(f'{python} cannot run torch_memory_head.py; is PyTorch there?')
    self.version, self.device = ready[2], ready[3]

  def close(self):
    """Ends the process, which frees its memory."""
    self.process.communicate()


def compare_heads(classes, options):
  """Prints and returns one table of heads."""
  steps = max(1, options.steps * 1000 // classes)
  ours = {name: head_program(name, classes) for name in ('linear', 'meta_embedding')}
  sides = {name: program.run for name, program in ours.items()}
  difference = 4 * BATCH * classes * WIDTH
  fits = difference <= options.most_bytes
  python = find_torch(options.torch_python)
  if python:
    torch = TorchHead(python, classes)
    sides[f'PyTorch {torch.version}, linear'] = lambda n: torch.run(n, 'linear')
    if fits:
      sides['PyTorch, direct'] = lambda n: torch.run(n, 'direct')
  seconds = timing.in_turn(sides, options.rounds, steps)
  print(f'  C = {classes:,}; {steps} steps per round')
  report = {
    'steps': steps,
    'difference_mib': difference / 2**20,
    'sides': print_table(seconds, 'linear', ours),
  }
  if python:
    torch.close()
    if not fits:
      print(f'  PyTorch, direct: not run, {difference / 2**30:.1f} GiB for v - m alone')
  return report


def print_table(seconds, base, programs):
  """Prints and returns one row per side, with the counts of its program, if any."""
  over = f'/ {base}'
  print(f'  {"":28s}{"ms":>10s} {over:>10s}' + '   GFLOP     MiB' * bool(programs))
  table = {}
  for name, taken in seconds.items():
    median = statistics.median(taken)
    ratio = timing.ratio(taken, seconds[base])
    table[name] = {'seconds_per_step': median, f'over_{base}': ratio}
    text = f'  {name:28s}{1e3 * median:10.1f} {ratio:10.3f}'
    if name in programs:
      gflop, mib = programs[name].gflop, programs[name].memory_mib
      table[name] |= {'gflop': gflop, 'temporary_mib': mib}
      text += f' {gflop:7.2f} {mib:7.1f}'
    print(text)
  return table


def make_method(net, classes):
  """Returns the method of OLTR's second stage."""
  schedule = make_schedule('constant', 0.01, length=BATCH, batch=BATCH)
  return oltr(
    make_classifier(net, 'meta_embedding', classes, attention=True, projection=-1),
    make_optimizer('sgd', schedule, momentum=0.9, weight_decay=(('.*', 5e-4),)),
    make_loss('cross_entropy', counts=np.ones(classes)),
    class_weights=lambda step: jnp.ones(classes),
    reduction=REDUCTIONS['mean'],
  )


def photographs(batch):
  """Returns the method with ResNet-10, and the shapes of its State and batches."""
  method = make_method('resnet10', STEP_CLASSES)
  images = jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32)
  labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
  batches = {'train': {'image': images, 'label': labels}}
  return method, jax.eval_shape(method.init, jax.random.key(0), batches), batches


def share_of_step(options):
  """Prints and returns the head's share of a training step."""
  method, *shapes = photographs(BATCH)
  step = Program(method.step, *shapes, options=sharding.compiler_options())
  head = head_program('meta_embedding', STEP_CLASSES)
  share = head.gflop / step.gflop
  print(
    f'2. oltr, ResNet-10, 224 pixels, batch {BATCH}, C = {STEP_CLASSES:,}: a step of '
    f'{step.gflop:,.0f} GFLOP\n  in the head {head.gflop:.2f}, {100 * share:.2f} %'
  )
  report = {'step_gflop': step.gflop, 'head_gflop': head.gflop, 'of_flops': share}
  if options.full:
    method, *shapes = photographs(SMALL_BATCH)
    state, batches = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    state = jax.jit(method.init)(jax.random.key(0), batches)
    step = Program(method.step, state, batches, options=sharding.compiler_options())
    head = head_program('meta_embedding', STEP_CLASSES, SMALL_BATCH)
    seconds = timing.in_turn({'step': step.run, 'head': head.run}, options.rounds, 2)
    share = timing.ratio(seconds['head'], seconds['step'])
    median = statistics.median(seconds['step'])
    print(f'  with batches of {SMALL_BATCH}: {100 * share:.2f} % of {median:.2f} s')
    report |= {'small_batch': SMALL_BATCH, 'small_step': median, 'of_time': share}
  return report


def _scaled(key, batch):
  return {**batch, 'image': batch['image'].astype(jnp.float32) / 255}


class Filling:
  """A pass over small images that sums features by class, and the bare forward pass."""

  def __init__(self, batches):
    examples = SPLIT_BATCH * (batches + 1)  # the first is not timed
    images = np.random.default_rng(0).integers(0, 256, (examples, 32, 32, 3), np.uint8)
    labels = np.arange(examples, dtype=np.int32) % SPLIT_CLASSES
    split = Split(images, np.arange(examples), labels, {'image': jnp.asarray(images)})
    self.one_pass = evaluation_pass(split, batch=SPLIT_BATCH, transform=_scaled)
    self.method = make_method('resnet32', SPLIT_CLASSES)
    batch = {'image': jnp.zeros((SPLIT_BATCH, 32, 32, 3))}
    self.state = jax.jit(self.method.init)(jax.random.key(0), {'train': batch})
    self.forward = Program(features_of(self.method), self.state, batch['image'])

  def means(self, steps):
    """Returns the seconds of all batches except the first, which compiles."""
    stream = self.one_pass.stream
    began = 0.0

    def payload(step):
      nonlocal began
      if step == IN_FLIGHT + 1:  # requested when the first batch is done
        began = time.perf_counter()
      return stream.payload(step)

    def fold(outputs, batch):
      return class_sums(outputs['features'], batch, SPLIT_CLASSES)

    one_pass = self.one_pass._replace(stream=stream._replace(payload=payload))
    mesh = sharding.make_mesh(1)
    collect.total(
      self.method.predict, fold, mesh, self.state, one_pass, in_flight=IN_FLIGHT
    )
    return time.perf_counter() - began


def features_of(method):
  """Returns (state, images) -> features (B, D)."""
  return lambda state, images: method.predict(state, images)['features']


def fill_memory(options):
  """Prints and returns the cost of class means relative to the forward pass."""
  filling = Filling(SPLIT_BATCHES)
  sides = {'forward': filling.forward.run, 'class means': filling.means}
  seconds = timing.in_turn(sides, options.rounds, SPLIT_BATCHES)
  print(
    f'3. class means of a split; ResNet-32, {SPLIT_BATCHES} batches of {SPLIT_BATCH}, '
    f'C = {SPLIT_CLASSES}'
  )
  report = {'resnet32': print_table(seconds, 'forward', {})}

  method, state, batches = photographs(BATCH)
  batch = {**batches['train'], 'mask': jax.ShapeDtypeStruct((BATCH,), jnp.bool_)}
  features = features_of(method)

  def sums(state, batch):
    return class_sums(features(state, batch['image']), batch, STEP_CLASSES)

  forward = Program(features, state, batch['image']).gflop
  means = Program(sums, state, batch).gflop
  print(
    f'  ResNet-10, 224 pixels, batch {BATCH}, C = {STEP_CLASSES:,}: '
    f'{means:,.1f} GFLOP, {means / forward:.4f} of the forward pass'
  )
  report['resnet10'] = {'forward_gflop': forward, 'means_gflop': means}
  return report


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--sizes', type=int, nargs='+', default=[1000, 8142, 85000])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument(
    '--steps', type=int, default=4, help='per round at C = 1000; fewer for larger C'
  )
  parser.add_argument(
    '--most_bytes',
    type=float,
    default=1e9,
    help='limit for one (B, C, D) array of PyTorch',
  )
  parser.add_argument('--full', action='store_true', help='also time a ResNet-10 step')
  parser.add_argument('--torch_python', default=None)
  parser.add_argument('--json', default=None)
  options = parser.parse_args()

  print(
    f'JAX {jax.__version__} on {jax.devices()[0].device_kind}, float32; '
    f'{options.rounds} rounds in turn'
  )
  print(f'1. heads, forward and backward; B = {BATCH}, D = {WIDTH}')
  heads = {c: compare_heads(c, options) for c in options.sizes}
  report = {
    'batch': BATCH,
    'width': WIDTH,
    'rounds': options.rounds,
    **timing.facts(),
    'heads': heads,
    'step': share_of_step(options),
    'filling': fill_memory(options),
  }
  timing.write_report(options.json, report)


if __name__ == '__main__':
  main()
