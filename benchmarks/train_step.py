"""Images per second of a training step: bare, inside the loop, and in PyTorch.

  python -m benchmarks.train_step [--torch_python=PATH] [--json=FILE]

The sides take turns within one run, so that other load on the machine affects all of
them. The table shows medians over the rounds, of times and of ratios within a round.
PyTorch runs if this Python, or the one that --torch_python names, has it.

On an accelerator the step runs in a scan over device-resident data, and one epoch of
CIFAR-10-LT (imbalance 100: 12,406 images) is timed as the loop runs it.

  python -m benchmarks.train_step --net=resnet50 --size=224 --dtype=bfloat16 --peak=989

If --size is not 32, the step is one of ImageNet-LT. The loop then gets its batches,
already decoded, from a worker process, so the difference is the cost of handing them
over; the bare step has one batch on the device. The model-FLOP utilisation is that of
the compiled step relative to --peak TFLOP/s.
"""

import argparse
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

import jax
import numpy as np

from benchmarks import timing
from configs import cifar10_lt, imagenet_lt
from lt_jax import allocator, build, sharding, train
from lt_jax.config import resolve
from lt_jax.data import dataset, sources
from lt_jax.data.reading import reading

HERE = pathlib.Path(__file__).parent


def synthetic(spec, data_dir=None):
  """Returns random images with CIFAR-10's counts; replaces the real source."""
  del spec, data_dir
  rng = np.random.default_rng(0)

  def split(count):
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = np.arange(count, dtype=np.int32) % 10
    return sources.Arrays(images, labels, tuple(str(c) for c in range(10)))

  return {'train': split(50000), 'test': split(1000)}


def make_config(options):
  """Returns the config of CIFAR-10-LT, or of ImageNet-LT if --size is not 32."""
  if options.size == 32:
    config = cifar10_lt.get_config(f'ce,net={options.net}')
  else:
    config = imagenet_lt.get_config(f'ce,net={options.net}')
    config.data.update(source='fake', image_size=options.size, resize=options.size)
    config.data.workers = 1
    config.model.dtype = options.dtype
  config.batch = options.batch
  return config


def make_stage(config):
  """Returns (stage, mesh); photographs come from the host, already decoded."""
  dataset.load_source = synthetic
  experiment = build.build(resolve(config), devices=1)
  stage = experiment.stages['train']
  stream = stage.streams['train']
  if stream.workers is not None:
    decoded = [stream.payload(step) for step in range(4)]
    stream = stream._replace(payload=lambda step: decoded[step % len(decoded)])
  return stage._replace(streams={'train': stream}), experiment.mesh


class Jax:
  """Our side: the compiled call alone, and the loop that calls it."""

  def __init__(self, config):
    self.stage, self.mesh = make_stage(config)
    self.chunk = self.stage.plan.chunk
    streams = self.stage.streams
    self.arrays = {name: s.arrays for name, s in streams.items()}
    self.state, self.loop_state = (
      train.initial_state(self.stage.method, streams, jax.random.key(0), self.mesh)
      for _ in range(2)
    )
    self.zeros, self.bad = train.empty_totals(
      self.stage.method, streams, self.state, self.mesh
    )
    with reading(streams, 0, self.chunk) as read:
      rows = train._stack(read, streams, 0, self.chunk)
    self.payload = sharding.put_batch(self.mesh, rows, leading=1)
    update = train.make_update(self.stage.method, streams, self.mesh, self.chunk)
    began = time.perf_counter()
    arguments = (self.state, self.zeros, self.bad, self.arrays, self.payload)
    self.update = update.lower(*arguments).compile()
    self.compile_seconds = time.perf_counter() - began
    self.flops = self.update.cost_analysis()['flops']  # of a scan: of one step
    self.params = sum(x.size for x in jax.tree.leaves(self.state.params))

  def lower(self, *arguments):
    """With `compile`, replaces the jitted update that the loop would make."""
    return self

  def compile(self):
    return self.update

  def bare(self, steps):
    """Returns the seconds of `steps` steps, called in a row with one payload."""
    state, bad = self.state, self.bad
    began = time.perf_counter()
    for _ in range(steps // self.chunk):
      state, _, bad = self.update(state, self.zeros, bad, self.arrays, self.payload)
    bad.block_until_ready()
    self.state = state
    return time.perf_counter() - began

  def loop(self, steps):
    """Returns the seconds of `steps` steps of the loop, up to a row of the log.

    With a host stream it runs twice as many and does not count the first half, in which
    the worker process starts.
    """
    seconds = []
    rows = 1 if self.stage.streams['train'].workers is None else 2
    train.make_update = lambda *arguments: self  # compiled once, for both sides
    first = int(self.loop_state.step)
    hooks = train.Hooks(
      first_call=lambda s: None,
      progress=lambda step: None,
      log=lambda step, values, count, s: seconds.append(s),
      save=lambda step, state: None,
      evaluate=lambda step, state: None,
      stop=lambda: False,
      bad_images=lambda stream, positions: None,
    )
    plan = self.stage.plan._replace(
      first=first, steps=first + rows * steps, log_every=steps, save_every=10**9
    )
    self.loop_state = train.train(
      self.stage.method,
      self.stage.streams,
      self.loop_state,
      mesh=self.mesh,
      plan=plan,
      hooks=hooks,
    )
    return seconds[-1]


class Torch:
  """The PyTorch side, in its own process; its network has as many parameters."""

  def __init__(self, python, net, params, batch, size=32, dtype='float32'):
    command = [python, HERE / 'torch_step.py', f'--net={net}', f'--batch={batch}']
    command += [f'--size={size}', f'--dtype={dtype}']
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    ready = self.process.stdout.readline().split()
    if not ready:
      raise SystemExit(f'{python} cannot run torch_step.py on {net}')
    self.version, self.device = ready[2:4]
    if int(ready[4]) != params:
      with self.process:
        self.process.kill()
      raise SystemExit(
        f'{net} has {params:,} parameters here and {int(ready[4]):,} in PyTorch: '
        'torch_step.py has no equivalent network'
      )

  def run(self, steps, kind='plain'):
    """Returns the seconds that `steps` steps of a kind take."""
    self.process.stdin.write(f'{kind} {steps}\n')
    self.process.stdin.flush()
    return float(self.process.stdout.readline())


def find_torch(named):
  """Returns a Python that has PyTorch, or None."""
  candidates = [named] if named else [sys.executable]
  for python in filter(None, map(shutil.which, candidates)):
    check = [python, '-c', 'import torch']
    if subprocess.run(check, capture_output=True, check=False).returncode == 0:
      return python
  return None


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--net', default='resnet32')
  parser.add_argument('--batch', type=int, default=128)
  parser.add_argument('--size', type=int, default=32, help='pixels; 32 is CIFAR')
  parser.add_argument('--dtype', default='float32', help='only if --size is not 32')
  parser.add_argument('--peak', type=float, default=0, help='TFLOP/s of the device')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=0, help='per round; 0: automatic')
  parser.add_argument('--torch_python', default=None)
  parser.add_argument('--json', default=None)
  options = parser.parse_args()

  config = make_config(options)
  allocator.keep_pages(config)  # as lt_jax.main does, before JAX starts
  on_cpu = jax.default_backend() == 'cpu'
  config.log_every_steps = steps = options.steps or (4 if on_cpu else 200)
  ours = Jax(config)
  steps = max(1, steps // ours.chunk) * ours.chunk
  sides = {'bare step': ours.bare, 'loop': ours.loop}
  python = find_torch(options.torch_python)
  if python:
    torch = Torch(
      python, options.net, ours.params, options.batch, options.size, options.dtype
    )
    sides[f'PyTorch {torch.version}'] = torch.run
  seconds = timing.in_turn(sides, options.rounds, steps)
  kind = jax.devices()[0].device_kind
  print(
    f'{options.net}, {ours.params:,} parameters, batch {options.batch} of '
    f'{options.size} pixels, {options.dtype}, '
    f'JAX {jax.__version__} on {kind}; {options.rounds} rounds of {steps} steps in '
    f'turn, {ours.chunk} per call; compiled in {ours.compile_seconds:.1f} s'
  )
  bare = seconds['bare step']
  base = statistics.median(bare)
  table = {}
  for name, taken in seconds.items():
    median = statistics.median(taken)
    rate = timing.ratio(bare, taken)
    table[name] = {
      'seconds_per_step': median,
      'fastest': min(taken),
      'slowest': max(taken),
      'images_per_second': options.batch / median,
      'rate_over_bare': rate,
    }
    print(
      f'  {name:16s} {1e3 * median:9.2f} ms per step   '
      f'{options.batch / median:10,.0f} images/s   {rate:6.3f} of bare'
    )
  report = {
    'net': options.net,
    'batch': options.batch,
    'size': options.size,
    'dtype': options.dtype,
    'tflop_per_step': ours.flops / 1e12,
    'rounds': options.rounds,
    'steps': steps,
    **timing.facts(),
    'compile_seconds': ours.compile_seconds,
    'sides': table,
  }
  tflops = ours.flops / base / 1e12
  share = f', {100 * tflops / options.peak:.1f} % of peak' if options.peak else ''
  print(f'  bare step: {tflops:.2f} TFLOP/s{share}')
  if not on_cpu and options.size == 32:
    calls = max(1, round(10 * 12406 / options.batch / ours.chunk))  # ten epochs
    images = calls * ours.chunk * options.batch
    loop = min(ours.loop(calls * ours.chunk) for _ in range(3)) * 12406 / images
    busy = 12406 / options.batch * base / loop
    print(f'  one CIFAR-10-LT epoch: {loop:.3f} s, device busy {100 * busy:.1f} %')
    report['epoch'] = {'seconds': loop, 'device_busy': busy}
  timing.write_report(options.json, report)


if __name__ == '__main__':
  main()
