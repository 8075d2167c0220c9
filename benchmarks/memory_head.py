"""What a memory of class centroids costs: its head, its share of a step, its filling.

  python -m benchmarks.memory_head [--torch_python=PATH] [--full] [--json=FILE]

1. The meta-embedding head beside a linear one, forward and backward to the features
   and every parameter, with the FLOPs that the compiler counts and its peak of
   temporary memory. Where PyTorch is installed, a linear head there and the direct
   meta-embedding, which makes arrays (B, C, D); not where one of them is too large.
2. The head's share of the FLOPs of a training step (`oltr`, ResNet-10, 224 pixels);
   with --full, also its share of the time in small batches.
3. The pass that fills the memory with class means, beside the bare forward pass of the
   same batches.

Sides take turns within one run; medians over the rounds are shown, of times and of
ratios within a round.
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
from lt_jax.optim import make_optimizer, make_schedule
from lt_jax.surgery import class_sums

HERE = pathlib.Path(__file__).parent
BATCH, WIDTH = 256, 512
STEP_CLASSES = 1000
SMALL_BATCH = 8
SPLIT_BATCH, SPLIT_CLASSES = 128, 100
IN_FLIGHT = 4
"""Batches that a pass over a split may be ahead of the device."""


class Program:
  """A compiled function, its arguments, and what the compiler says of it."""

  def __init__(self, function, *arguments, options=None):
    self.arguments = arguments
    self.call = jax.jit(function).lower(*arguments).compile(options)
    cost = self.call.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    self.gflop = cost['flops'] / 1e9
    self.memory_mib = self.call.memory_analysis().temp_size_in_bytes / 2**20

  def run(self, steps):
    """Seconds of so many calls."""
    began = time.perf_counter()
    for _ in range(steps):
      done = self.call(*self.arguments)
    jax.block_until_ready(done)
    return time.perf_counter() - began


def head_program(name, classes, batch=BATCH):
  """Returns the gradients of the cross-entropy after a head, with random inputs."""
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
  """The heads in PyTorch, in a process of their own."""

  def __init__(self, python, classes):
    command = [python, HERE / 'torch_memory_head.py', f'--classes={classes}']
    command += [f'--batch={BATCH}', f'--width={WIDTH}']
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    ready = self.process.stdout.readline().split()
    if not ready:
      raise SystemExit(f'{python} cannot run torch_memory_head.py: has it PyTorch?')
    self.version, self.device = ready[2], ready[3]

  def close(self):
    """Ends the process, and gives back its memory."""
    self.process.communicate()


def compare_heads(classes, steps, options):
  """Prints and returns one table of heads."""
  ours = {name: head_program(name, classes) for name in ('linear', 'meta_embedding')}
  sides = {name: program.run for name, program in ours.items()}
  copy = 4 * BATCH * classes * WIDTH
  python = find_torch(options.torch_python)
  if python:
    torch = TorchHead(python, classes)
    sides[f'PyTorch {torch.version}, linear'] = lambda n: torch.run(n, 'linear')
    if copy <= options.most_bytes:
      sides['PyTorch, direct'] = lambda n: torch.run(n, 'direct')
  seconds = timing.in_turn(sides, options.rounds, steps)
  if python:
    torch.close()
  print(f'  C = {classes:,}, {steps} steps a round')
  sides = print_table(seconds, 'linear', ours)
  if python and copy > options.most_bytes:
    print(f'  {"PyTorch, direct":28s}  not run: {copy / 2**30:.1f} GiB for (B, C, D)')
  return {'steps': steps, 'direct_copy_mib': copy / 2**20, 'sides': sides}


def print_table(seconds, base, programs):
  """Prints and returns a row a side: its time, and what is known of its program."""
  table = {}
  for name, taken in seconds.items():
    median = statistics.median(taken)
    over = timing.ratio(taken, seconds[base])
    row = {'seconds': median, f'over_{base}': over}
    text = f'  {name:28s}{1e3 * median:10.1f} {over:7.2f}'
    if name in programs:
      program = programs[name]
      row |= {'gflop': program.gflop, 'temporary_mib': program.memory_mib}
      text += f' {program.gflop:9.2f} {program.memory_mib:8.1f}'
    table[name] = row
    print(text)
  return table


def make_method(net, classes):
  """Returns the second stage of open long-tailed recognition."""
  net = make_classifier(
    net, 'meta_embedding', classes, attention=True, projection=-1, batch_norm={}
  )
  optimizer = make_optimizer(
    'sgd',
    make_schedule('constant', 0.01, length=BATCH, batch=BATCH),
    momentum=0.9,
    weight_decay=(('.*', 5e-4),),
  )
  return oltr(
    net,
    optimizer,
    make_loss('cross_entropy', counts=np.ones(classes)),
    class_weights=lambda step: jnp.ones(classes),
    reduction=REDUCTIONS['mean'],
  )


def shapes(size, batch, classes):
  """Returns a ResNet-10's method, State and batches, the latter two as shapes."""
  images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
  labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
  batches = {'train': {'image': images, 'label': labels}}
  method = make_method('resnet10', classes)
  state = jax.eval_shape(method.init, jax.random.key(0), batches)
  return method, state, batches


def share_of_step(options):
  """Prints and returns the head's part of a training step."""
  options_of_step = sharding.compiler_options()
  method, state, batches = shapes(224, BATCH, STEP_CLASSES)
  step = Program(method.step, state, batches, options=options_of_step)
  head = head_program('meta_embedding', STEP_CLASSES)
  report = {
    'step_gflop': step.gflop,
    'head_gflop': head.gflop,
    'share_of_flops': head.gflop / step.gflop,
  }
  print(
    f'2. a ResNet-10 step, 224 pixels, batch {BATCH}, C = {STEP_CLASSES:,}: '
    f'{step.gflop:,.0f} GFLOP, the head {head.gflop:.2f}, '
    f'{100 * report["share_of_flops"]:.2f} %'
  )
  if options.full:
    method, _, batches = shapes(224, SMALL_BATCH, STEP_CLASSES)
    batches = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), batches)
    state = jax.jit(method.init)(jax.random.key(0), batches)
    step = Program(method.step, state, batches, options=options_of_step)
    head = head_program('meta_embedding', STEP_CLASSES, SMALL_BATCH)
    seconds = timing.in_turn({'step': step.run, 'head': head.run}, options.rounds, 2)
    report['small_batch'] = SMALL_BATCH
    report['share_of_time'] = timing.ratio(seconds['head'], seconds['step'])
    print(
      f'   timed in batches of {SMALL_BATCH}: {100 * report["share_of_time"]:.2f} % of '
      f'{1e3 * statistics.median(seconds["step"]):.0f} ms'
    )
  return report


class Filling:
  """The pass that adds up features by class, and the bare forward pass."""

  def __init__(self, batches):
    # The clock starts when the first batch is done and its program thus compiled.
    self.timed = batches
    examples = SPLIT_BATCH * (batches + 1)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (examples, 32, 32, 3), np.uint8)
    split = Split(
      source=images,
      rows=np.arange(examples),
      labels=np.arange(examples, dtype=np.int32) % SPLIT_CLASSES,
      arrays={'image': jnp.asarray(images)},
    )
    self.one_pass = evaluation_pass(
      split, batch=SPLIT_BATCH, transform=lambda key, x: x.astype(jnp.float32) / 255
    )
    self.method = make_method('resnet32', SPLIT_CLASSES)
    self.mesh = sharding.make_mesh(1)
    first = {'train': {'image': jnp.zeros((1, 32, 32, 3))}}
    self.state = jax.jit(self.method.init)(jax.random.key(0), first)

  def seconds(self, fold):
    """Seconds of all batches but the first in a pass that adds up `fold`."""
    stream = self.one_pass.stream
    marks = {}

    def payload(step):
      # The pass asks for this one as soon as the first batch is done.
      if step == IN_FLIGHT + 1:
        marks['began'] = time.perf_counter()
      return stream.payload(step)

    timed = self.one_pass._replace(stream=stream._replace(payload=payload))
    collect.total(
      self.method.predict, fold, self.mesh, self.state, timed, in_flight=IN_FLIGHT
    )
    return time.perf_counter() - marks['began']
