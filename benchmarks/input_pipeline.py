"""Images per second and core, from JPEG files to random 224-pixel crops in uint8.

  python -m benchmarks.input_pipeline --images=FOLDER [--torch_python=PATH]
    [--tf_python=PATH] [--json=FILE]

1. Our crops, the same steps in plain Pillow, and, in separate processes, torchvision's
in PyTorch's DataLoader and tf.data's fused decoding and cropping, if this Python or the
one you name has them. Then a batch of crops on the device: transfer, flip and
normalisation.

2. The same after preparing the photographs as `lt_jax.prepare` does with
--short_side=320. Also prints how much that changes a central crop, in grey levels.

3. On all cores: batches by worker processes, read ahead and put on the device, relative
to the rate of one core times the number of cores.

In 1 and 2 the sides take turns within one run, all on the same core. The tables show
medians over the rounds, of times and of ratios within a round. Files come from the page
cache.
"""

import argparse
import contextlib
import io
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from PIL import Image

from benchmarks import timing
from lt_jax import prepare
from lt_jax.data import augment, crops
from lt_jax.data.reading import reading, usable_cores
from lt_jax.data.streams import Stream

HERE = pathlib.Path(__file__).parent
SIZE, RESIZE = 224, 256
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def ours(path, generator):
  """Returns a random crop by our code."""
  return crops.random_resized_crop(
    path.read_bytes(), path.name, generator, size=SIZE, scale=SCALE, ratio=RATIO
  )


def by_pillow(path, generator):
  """Returns the same crop, made the way torchvision makes it."""
  with open(path, 'rb') as file:
    image = Image.open(file).convert('RGB')
  box = crops._random_box(*image.size, generator, SCALE, RATIO)
  square = image.crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
  return np.asarray(square)


class Here:
  """A side in this process."""

  def __init__(self, crop, folder, batch):
    self.crop, self.batch = crop, batch
    self.paths = sorted(pathlib.Path(folder).glob('*.jpg'))
    self.position = 0

  def run(self, steps):
    """Returns the seconds that `steps` crops take, stacked into batches."""
    began = time.perf_counter()
    images = []
    for position in range(self.position, self.position + steps):
      path = self.paths[position % len(self.paths)]
      images.append(self.crop(path, np.random.default_rng((0, position))))
      if len(images) == self.batch:
        np.stack(images)
        images = []
    self.position += steps
    return time.perf_counter() - began


class Elsewhere:
  """A side in a worker process, possibly with another Python."""

  def __init__(self, python, script, folders, batch):
    command = [python, HERE / script, f'--size={SIZE}', f'--batch={batch}', *folders]
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    ready = self.process.stdout.readline().split()
    if not ready:
      raise SystemExit(f'{python} cannot run {script}')
    self.versions = ready[1:]

  def run(self, steps, folder):
    """Returns the seconds that `steps` crops take; `folder` is a position."""
    self.process.stdin.write(f'{folder} {steps}\n')
    self.process.stdin.flush()
    return float(self.process.stdout.readline())

  def close(self):
    self.process.communicate()


def find(module, named):
  """Returns a Python that has a module, or None."""
  python = shutil.which(named or sys.executable)
  check = [python, '-c', f'import {module}']
  if python and subprocess.run(check, capture_output=True, check=False).returncode == 0:
    return python
  if named:
    raise SystemExit(f'{named} has no {module}')
  return None


class Device:
  """Moves a batch of crops to the device; flips and normalises it there."""

  def __init__(self, paths, batch):
    images = [
      ours(paths[i % len(paths)], np.random.default_rng(i)) for i in range(batch)
    ]
    self.images = np.stack(images)
    self.key = jax.random.key(0)
    self.transform = jax.jit(
      lambda key, x: augment.normalise(augment.flip(key, x), MEAN, STD)
    )

  def run(self, steps):
    """Returns the seconds of `steps` images, scaled from whole batches."""
    batches = max(1, steps // len(self.images))
    began = time.perf_counter()
    for _ in range(batches):
      self.transform(self.key, jax.device_put(self.images)).block_until_ready()
    return (time.perf_counter() - began) * steps / (batches * len(self.images))


def end_to_end(paths, batch, batches, rounds):
  """Compares the rate of one worker process per core with that of one core."""
  cores = usable_cores()

  def payload(step):
    rows = range(step * batch, (step + 1) * batch)
    crops_of = (
      ours(paths[i % len(paths)], np.random.default_rng((0, i))) for i in rows
    )
    return {'image': np.stack(list(crops_of))}

  def alone(steps):
    began = time.perf_counter()
    for step in range(steps):
      jax.device_put(payload(step)).popitem()[1].block_until_ready()
    return time.perf_counter() - began

  def together(steps):
    stream = Stream({}, payload, lambda arrays, rows, key: rows, workers=cores)
    ready = 3 * cores  # batches made while processes start are not counted
    with reading({'train': stream}, 0, ready + steps) as read:
      for step in range(ready + steps):
        if step == ready:
          began = time.perf_counter()
        jax.device_put(read('train', step)).popitem()[1].block_until_ready()
      return time.perf_counter() - began

  seconds = {'alone': [], 'together': []}
  for _ in range(rounds):
    seconds['alone'].append(alone(batches))
    seconds['together'].append(together(cores * batches))  # takes as long, at best
  share = timing.ratio(seconds['alone'], seconds['together'])
  rates = {k: batch * batches / statistics.median(v) for k, v in seconds.items()}
  rates['together'] *= cores
  print(
    f'3. {cores} worker processes: {rates["together"]:,.0f} images/s on the device, '
    f'{share:.2f} of {cores} times the {rates["alone"]:,.0f} of one process'
  )
  return {'workers': cores, 'images_per_second': rates, 'share': share}


def write_smaller(paths, folder, short):
  """Writes prepared photographs; returns how much their central crops differ."""
  differences = []
  for path in paths:
    before = path.read_bytes()
    after = prepare.smaller(before, path.name, short)
    (folder / path.name).write_bytes(after)
    crop, other = (
      crops.center_crop(encoded, path.name, size=SIZE, resize=RESIZE)
      for encoded in (before, after)
    )
    differences.append(np.abs(crop.astype(int) - other))
  means = [difference.mean() for difference in differences]
  return {
    'mean': float(np.mean(means)),
    'mean_of_worst_image': float(max(means)),
    'percentile_99': float(np.percentile(differences, 99)),
    'largest': int(np.max(differences)),
  }


def sides_of(stack, folders, options):
  """Returns name -> a function (steps, position of the folder) -> seconds."""
  sides = {}
  for name, crop in (('ours', ours), ('Pillow', by_pillow)):
    here = [Here(crop, folder, options.batch) for folder in folders]
    sides[name] = lambda steps, k, here=here: here[k].run(steps)
  others = (
    ('torchvision', options.torch_python, 'torch_input.py', 'DataLoader, torch '),
    ('tensorflow', options.tf_python, 'tf_input.py', 'tf.data '),
  )
  for module, named, script, label in others:
    python = find(module, named)
    if python:
      worker = Elsewhere(python, script, folders, options.batch)
      stack.callback(worker.close)
      sides[label + worker.versions[0]] = worker.run
  return sides


def print_table(seconds, names, bases):
  """Prints and returns one row per side, with its rate relative to the bases."""
  print(f'  {"":30s}      ms  images/s' + ''.join(f'{"/ " + b:>12s}' for b in bases))
  table = {}
  for label, key in names.items():
    taken = seconds[key]
    median = statistics.median(taken)
    rates = {base: timing.ratio(seconds[k], taken) for base, k in bases.items()}
    table[label] = {
      'seconds_per_image': median,
      'fastest': min(taken),
      'slowest': max(taken),
      **{f'rate_over_{base}': rate for base, rate in rates.items()},
    }
    text = ''.join(f'{rate:12.2f}' for rate in rates.values())
    print(f'  {label:30s}{1e3 * median:8.3f}{1 / median:10,.0f}{text}')
  return table


def describe(folder):
  """Returns the number, median size and mean kilobytes of a folder's photographs."""
  paths = sorted(pathlib.Path(folder).glob('*.jpg'))
  encoded = [path.read_bytes() for path in paths]
  sizes = [Image.open(io.BytesIO(e)).size for e in encoded]
  return {
    'photographs': len(paths),
    'long_side': statistics.median(map(max, sizes)),
    'short_side': statistics.median(map(min, sizes)),
    'kilobytes': sum(map(len, encoded)) / len(paths) / 1e3,
  }


def one_core():
  """Pins this process and its children to one core; returns whether it could."""
  if not hasattr(os, 'sched_setaffinity'):
    return False
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  return True


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--images', required=True, help='folder of photographs, *.jpg')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--steps', type=int, default=200, help='images per round')
  parser.add_argument('--batch', type=int, default=50)
  parser.add_argument('--short_side', type=int, default=320)
  parser.add_argument('--torch_python', default=None)
  parser.add_argument('--tf_python', default=None)
  parser.add_argument('--json', default=None)
  options = parser.parse_args()
  paths = sorted(pathlib.Path(options.images).glob('*.jpg'))
  if not paths:
    raise SystemExit(f'{options.images} has no *.jpg')
  all_cores = end_to_end(paths, options.batch, 20, options.rounds)
  bound = one_core()

  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    change = write_smaller(paths, folder, options.short_side)
    folders = [options.images, str(folder)]
    sides = sides_of(stack, folders, options)
    on_device = Device(paths, options.batch)
    runs = {
      (name, k): lambda steps, side=side, k=k: side(steps, k)
      for k in (0, 1)
      for name, side in sides.items()
    }
    runs['device'] = on_device.run
    seconds = timing.in_turn(runs, options.rounds, options.steps)
    files = [describe(folder) for folder in folders]

  print(
    f'{options.rounds} rounds in turn of {options.steps} images, '
    + ('one core' if bound else 'threads not pinned to a core')
    + '; rates are relative to Pillow and tf.data on the originals'
  )
  bases = {'Pillow': ('Pillow', 0)}
  for name in sides:
    if name.startswith('tf.data'):
      bases['tf.data'] = name, 0
  tables = []
  headings = ('originals', f'short side {options.short_side}, q {prepare.QUALITY}')
  for k, heading in enumerate(headings):
    print(
      f'{k + 1}. {heading}: {files[k]["photographs"]} photographs, mostly '
      f'{files[k]["long_side"]:.0f}x{files[k]["short_side"]:.0f}, '
      f'{files[k]["kilobytes"]:.0f} kB'
    )
    names = {name: (name, k) for name in sides}
    if not k:
      names['on the device'] = 'device'
    tables.append({**files[k], 'sides': print_table(seconds, names, bases)})
  print(
    f'  central crops differ by {change["mean"]:.2f} grey levels on average, '
    f'{change["mean_of_worst_image"]:.2f} in the worst image; 99 % of values by at '
    f'most {change["percentile_99"]:.0f}, all by {change["largest"]}'
  )
  report = {
    'rounds': options.rounds,
    'steps': options.steps,
    'batch': options.batch,
    'one_core': bound,
    'end_to_end': all_cores,
    **timing.facts(),
    'originals': tables[0],
    'prepared': {
      'short': options.short_side,
      'quality': prepare.QUALITY,
      **tables[1],
      'difference': change,
    },
  }
  timing.write_report(options.json, report)


if __name__ == '__main__':
  main()
