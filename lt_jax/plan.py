"""Estimates what a run needs before you rent anything.

  python -m lt_jax.plan --config=configs/imagenet_lt.py:ldam_drw --devices=v5e:4x8

Needs neither the data nor the devices: data are generated with the counts in the
config's `data.fake`. Every stage that trains is compiled for its global shapes, and the
program reports its FLOPs, memory and collectives. For a TPU, the real TPU compiler does
this on any machine that has the package `libtpu`. Without it, and for GPUs, the program
is compiled for as many simulated CPU devices, and its memory is an estimate. Times
follow from the vendors' peak rates and a utilisation that is assumed, not measured.
"""

import collections
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lt_jax import build, commands, config_file, files, footprint, sharding, train
from lt_jax.config import Config, resolve, stage_config
from lt_jax.errors import UserError, lookup, suggest
from lt_jax.evals import TASKS

CONFIG = commands.config_flag()
DEVICES = flags.DEFINE_string(
  'devices',
  None,
  "The devices: v4-32 (Cloud TPU's name of a slice), v5e:4x8, h100:8 and so on.",
)
UTILISATION = flags.DEFINE_float(
  'utilisation', 0.4, 'The assumed share of the peak FLOP/s.'
)
DECODE_RATE = flags.DEFINE_float(
  'decode_rate',
  None,
  'Images/s that one host core decodes; see benchmarks.input_pipeline.',
)
PRICES = commands.path_flag(
  'prices', 'A JSON file with prices per chip and hour, such as {"v5e": 1.0}.'
)


EMBEDDED = ('digits', 'scenes')
"""Sources that come with the package, so that they need not be generated."""


class Chip(NamedTuple):
  """A kind of device, as its vendor states it.

  Attributes:
    bfloat16: peak FLOP/s of products in bfloat16, without sparsity.
    float32: the same for float32 in JAX's default precision, which is bfloat16 on a TPU
      and TF32 on a GPU (`jax.lax.Precision`).
    memory: bytes.
    bandwidth: of the memory, bytes/s.
    interconnect: bytes/s that a device can send to others, one way.
    dimensions: number of dimensions of a TPU's torus; 0 for GPUs.
    cores: how much each chip counts in the name of a slice.
  """

  bfloat16: float
  float32: float
  memory: float
  bandwidth: float
  interconnect: float
  dimensions: int = 0
  cores: int = 1


CHIPS = {
  # TPU: docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e. The interconnect of a v4
  # is the all-reduce bandwidth of a pod, 1.1 PB/s, divided by its 4,096 chips; of a v5e
  # 1,600 Gbit/s and of a v5p 4,800; of a v6e half of 800 GB/s both ways.
  'v4': Chip(275e12, 275e12, 32 * 2**30, 1200e9, 1.1e15 / 4096, 3, 2),
  'v5e': Chip(197e12, 197e12, 16e9, 819e9, 200e9, 2),
  'v5p': Chip(459e12, 459e12, 95e9, 2765e9, 600e9, 3, 2),
  'v6e': Chip(918e12, 918e12, 32e9, 1638e9, 400e9, 2),
  # GPU: NVIDIA's data sheets of A100 (SXM) and H100 (SXM), as quoted and linked at
  # glennklockwood.com/garden/processors/A100 and /h100. NVLink is half of 600 or 900
  # GB/s.
  'a100-40gb': Chip(312e12, 156e12, 40e9, 1555e9, 300e9),
  'a100-80gb': Chip(312e12, 156e12, 80e9, 2039e9, 300e9),
  'h100': Chip(989.4e12, 494.7e12, 80e9, 3350e9, 450e9),
}

SLICES = {
  2: ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
  3: ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8'),
}
"""Shapes of the slices that are named by their size; from the same pages."""


class Devices(NamedTuple):
  """The devices of a plan.

  Attributes:
    kind: a key of `CHIPS`.
    count: how many.
    shape: of a TPU slice, such as '4x8'; empty for GPUs.
  """

  kind: str
  count: int
  shape: str = ''

  @property
  def chip(self) -> Chip:
    """The rates of one device."""
    return CHIPS[self.kind]


def parse_devices(text: str) -> Devices:
  """Returns the devices that 'v4-32', 'v5e:4x8' or 'h100:8' name.

  Raises:
    UserError: there is no such kind, or no such slice.
  """
  kind, colon, size = text.lower().partition(':')
  kind = kind.replace('v5litepod', 'v5e')
  if not colon and kind not in CHIPS and re.fullmatch(r'.+-\d+', kind):
    kind, _, size = kind.rpartition('-')
  chip = lookup(CHIPS, 'device', kind)
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', size):
    raise UserError(
      f'--devices is {text!r}; give a kind and a size, such as v4-32, v5e:4x8, h100:8'
    )
  if not chip.dimensions:
    if 'x' in size:
      raise UserError(f'--devices is {text!r}; GPUs are a number, such as {kind}:8')
    return Devices(kind, int(size))
  if 'x' not in size:
    shapes = {str(chip.cores * _product(s)): s for s in SLICES[chip.dimensions]}
    size = lookup(shapes, f'{kind} slice', size)
  if size.count('x') != chip.dimensions - 1:
    shapes = suggest(size, SLICES[chip.dimensions])
    raise UserError(f'a slice of {kind} has {chip.dimensions} dimensions{shapes}')
  return Devices(kind, _product(size), size)


def _product(shape: str) -> int:
  """Returns the number of chips of a shape: 32 for '4x8'."""
  return math.prod(int(side) for side in shape.split('x'))


def make_mesh(devices: Devices) -> Mesh:
  """Returns a mesh to compile for: a TPU topology, or else simulated CPU devices.

  Raises:
    UserError: the TPU compiler does not know the topology.
  """
  if not (devices.shape and importlib.util.find_spec('libtpu')):
    return sharding.make_mesh(devices.count)
  from jax.experimental import topologies

  os.environ |= {  # otherwise libtpu looks for a real TPU
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': 'true',  # safe, as compiling opens no chip
  }
  options: dict[str, Any] = {}
  if devices.kind == 'v4':
    options['chip_config_name'] = 'megacore'  # one device per chip, as on later TPUs
  if devices.count == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)  # other hosts have four chips
  name = f'{devices.kind}:{devices.shape}'
  try:
    topology = topologies.get_topology_desc(name, 'tpu', **options)
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f'the TPU compiler refuses {name}: {error}') from None
  return jax.make_mesh(
    (devices.count,),
    (sharding.AXIS,),
    axis_types=(AxisType.Auto,),
    devices=topology.devices,
  )


def _is_tpu(mesh: Mesh) -> bool:
  return mesh.devices.flat[0].platform == 'tpu'


class Collective(NamedTuple):
  """An exchange between devices.

  Attributes:
    kind: such as 'all-reduce'.
    bytes: size of its result on one device.
  """

  kind: str
  bytes: int

  def seconds(self, devices: int, rate: float) -> float:
    """Returns how long a ring of devices takes at a rate in bytes/s.

    An all-reduce of b bytes sends 2 b (n - 1) / n from each of n devices, a
    reduce-scatter with a result of b bytes b (n - 1), any other about b (n - 1) / n.
    """
    rounds = {'all-reduce': 2, 'reduce-scatter': devices}.get(self.kind, 1)
    return self.bytes * rounds * (devices - 1) / devices / rate


COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'all-to-all',
  'ragged-all-to-all',
  'reduce-scatter',
  'collective-permute',
  'collective-broadcast',
)
_OPERATION = re.compile(r'\s([a-z][a-z-]*)\(')  # first match: the operation of a line
_SHAPE = re.compile(r'([a-z]+)(\d*)\w*\[([\d,]*)\]')


def parse_collectives(hlo: str) -> list[Collective]:
  """Returns the collectives in the text of a compiled program.

  An asynchronous one is counted at its '-done', since only there the type is that of
  the result alone. One in the body of a loop counts once.
  """
  found = []
  for line in hlo.splitlines():
    _, _, text = line.partition(' = ')
    match = _OPERATION.search(text)
    kind = match[1].removesuffix('-done') if match else ''
    if kind in COLLECTIVES:
      shapes = _SHAPE.findall(text[: match.start()])
      found.append(Collective(kind, sum(itertools.starmap(_bytes, shapes))))
  return found


def _bytes(kind: str, bits: str, shape: str) -> int:
  """Returns the bytes of an array such as ('bf', '16', '3,3'); 'pred' has no bits."""
  elements = math.prod(int(n) for n in shape.split(',') if n)
  return math.ceil(elements * int(bits or 8) / 8)


def build_stages(config: Config, mesh: Mesh) -> dict[str, build.Stage]:
  """Returns the stages of a run on generated data, with images that are only shapes.

  Raises:
    UserError: the config is wrong, or the devices do not divide a batch.
  """
  maps = lookup(TASKS, 'task', config['task']).per_pixel

  def generated(data: Config) -> Config:
    if data.get('source', 'digits').startswith(EMBEDDED):
      return data
    return {**data, 'source': 'fake'}

  data = generated(config['data'])
  if maps and data['source'] == 'fake':
    data = {**data, 'fake': {**data['fake'], 'label_maps': True}}
  made = {
    'device': 'any',
    'data': data,
    'domains': {name: generated(data) for name, data in config['domains'].items()},
  }
  return build.build({**config, **made}, mesh=mesh).stages


class Step(NamedTuple):
  """What a compiled step reports, for one device.

  Attributes:
    flops: FLOPs of a step.
    traffic: bytes that it reads and writes; None if unknown.
    memory: component -> bytes.
    collectives: all its collectives.
    parameters: number of parameters.
  """

  flops: float
  traffic: float | None
  memory: dict[str, float]
  collectives: list[Collective]
  parameters: int


def compile_step(stage: build.Stage, mesh: Mesh) -> Step:
  """Compiles a step with all its streams; nothing is put on a device.

  Raises:
    UserError: it does not fit into the memory of a TPU.
  """
  method, streams = stage.method, stage.streams
  whole = sharding.replicated(mesh)
  rows = NamedSharding(mesh, PartitionSpec(None, sharding.AXIS))
  state = train.state_shapes(method, streams)
  metrics = train.metric_shapes(method, streams, state, mesh)
  arrays = {name: stream.arrays for name, stream in streams.items()}
  payloads = {name: stream.payload_shapes() for name, stream in streams.items()}
  is_tpu = _is_tpu(mesh)
  lowered = train.make_update(method, streams, mesh, 1).lower(
    _placed(state, whole),
    _placed(metrics, whole),
    jax.ShapeDtypeStruct((), np.int32, sharding=whole),
    _placed(arrays, whole),
    _placed(payloads, rows, leading=(1,)),
  )
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    reason = str(error).splitlines()[0].removeprefix('RESOURCE_EXHAUSTED: ')
    raise UserError(
      f'stage {stage.name!r} does not fit on a device: {reason}'
    ) from None
  # XLA:CPU calls a library for convolutions and does not know its FLOPs. The lowered
  # program still has them, for all devices together.
  cost = compiled.cost_analysis() if is_tpu else lowered.cost_analysis()
  return Step(
    flops=cost['flops'] if is_tpu else cost['flops'] / mesh.size,
    traffic=cost['bytes accessed'] if is_tpu else None,
    memory=footprint.memory_of(
      compiled.memory_analysis(), state, arrays, payloads, mesh.size
    ),
    collectives=parse_collectives(compiled.as_text()),
    parameters=sum(x.size for x in jax.tree.leaves(state.params)),
  )


def _placed(tree: Any, where: NamedSharding, leading: tuple[int, ...] = ()) -> Any:
  """Returns shapes with a sharding and leading axes."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype, sharding=where), tree
  )


class Rates(NamedTuple):
  """What a plan assumes.

  Attributes:
    utilisation: share of the peak FLOP/s.
    decode_rate: images/s that one host core decodes; None if unknown.
    price: per chip and hour; None if unknown.
  """

  utilisation: float = 0.4
  decode_rate: float | None = None
  price: float | None = None


Rows = list[tuple[str, str]]


def predict(
  stage: build.Stage, step: Step, devices: Devices, rates: Rates, dtype: str
) -> Rows:
  """Returns the rows of a stage: what it needs, how long it takes, what it costs.

  A step takes as long as its arithmetic or its memory traffic, whichever is longer,
  plus its collectives, as if they overlapped with nothing.
  """
  chip, memory = devices.chip, sum(step.memory.values())
  peak = chip.bfloat16 if dtype == 'bfloat16' else chip.float32
  images = _images(stage)
  arithmetic = step.flops / (peak * rates.utilisation)
  traffic = (step.traffic or 0) / chip.bandwidth
  exchange = sum(c.seconds(devices.count, chip.interconnect) for c in step.collectives)
  seconds = max(arithmetic, traffic) + exchange
  hours = stage.plan.steps * seconds / 3600
  needed = images / seconds
  streamed = any(not stream.arrays for stream in stage.streams.values())
  return [
    ('images per step', f'{images:,}'),
    ('parameters', f'{step.parameters:,}'),
    ('GFLOP per image', f'{step.flops * devices.count / images / 1e9:,.4g}'),
    ('memory per device, MB', ''),
    *((f'  {name}', _mb(size)) for name, size in step.memory.items()),
    ('  total', _mb(memory)),
    (f'  of {chip.memory / 1e6:,.0f}', f'{memory / chip.memory:.0%}'),
    ('collectives per step, bytes', ''),
    *_listed(step.collectives),
    ('  total', f'{sum(c.bytes for c in step.collectives):,}'),
    ('predicted ms per step', ''),
    (f'  arithmetic, {rates.utilisation:.0%} of the peak', _ms(arithmetic)),
    ('  memory traffic', _ms(traffic) if step.traffic else 'unknown'),
    ('  collectives', _ms(exchange)),
    ('  total', _ms(seconds)),
    ('images/s', f'{needed:,.0f}'),
    ('images/s to decode', f'{needed:,.0f}' if streamed else 'none'),
    ('host cores for that', _cores(needed if streamed else 0, rates.decode_rate)),
    ('steps', f'{stage.plan.steps:,}'),
    ('days of training', f'{hours / 24:,.3f}'),
    ('cost', _cost(hours * devices.count, rates.price)),
  ]


def _images(stage: build.Stage) -> int:
  """Returns the number of images per step, including a meta batch."""
  payloads = [stream.payload_shapes() for stream in stage.streams.values()]
  return sum(p.get('index', p.get('label')).shape[0] for p in payloads)


def _listed(found: Iterable[Collective]) -> Rows:
  """Returns one row per kind and size, the largest first."""
  counts = collections.Counter(found)
  ordered = sorted(counts.items(), key=lambda item: -item[0].bytes)
  return [(f'  {n} x {one.kind}', f'{one.bytes:,}') for one, n in ordered]


def _mb(size: float) -> str:
  return f'{size / 1e6:,.3f}'


def _ms(seconds: float) -> str:
  return f'{1e3 * seconds:,.3f}'


def _cores(needed: float, rate: float | None) -> str:
  return f'{math.ceil(needed / rate):,}' if rate else 'give --decode_rate'


def _cost(hours: float, price: float | None) -> str:
  return 'give --prices' if price is None else f'{hours * price:,.2f}'


def read_price(path: str, kind: str) -> float:
  """Returns the price of a chip per hour, from a JSON file {kind: price}.

  Raises:
    UserError: the file has no such price.
  """
  price = lookup(files.read_json(path), f'device in {path}:', kind)
  number = isinstance(price, int | float) and not isinstance(price, bool)
  if not (number and 0 <= price < math.inf):
    raise UserError(f'{path}: the price of {kind} is {price!r}; give a number >= 0')
  return float(price)


def plan(
  config: Config,
  devices: Devices,
  rates: Rates,
  *,
  compiled: Callable[[build.Stage, Mesh], Step] = compile_step,
) -> str:
  """Returns the table of a run, with every stage that trains.

  Args:
    config: the resolved config.
    devices: what it would run on.
    rates: what is assumed.
    compiled: compiles a step.

  Raises:
    UserError: the config is wrong, or the run does not fit into memory.
  """
  mesh = make_mesh(devices)
  stages = build_stages(config, mesh)
  rows: Rows = []
  for name, stage in stages.items():
    if stage.plan.steps:
      dtype = stage_config(config, name)['model']['dtype']
      step = compiled(stage, mesh)
      rows += [('stage', name), *predict(stage, step, devices, rates, dtype)]
  if not rows:
    raise UserError('no stage has steps to plan for')
  hosts = len({device.process_index for device in mesh.devices.flat})
  how = (
    f'by the TPU compiler, for {hosts} hosts'
    if _is_tpu(mesh)
    else 'for simulated CPU devices: the memory is an estimate'
  )
  where = f'{devices.count} x {devices.kind} {devices.shape}'.strip()
  title = f'{config["name"]}:{config["recipe"]} on {where}, compiled {how}'
  width = max(len(label) for label, _ in rows)
  return '\n'.join(
    [title, *(f'{label:{width}}{value:>20}'.rstrip() for label, value in rows)]
  )


def main() -> None:
  """Prints the plan that the flags name."""
  # Before JAX looks for devices, since this machine's are not needed.
  devices = parse_devices(DEVICES.value)
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', devices.count)
  if not 0 < UTILISATION.value <= 1:
    raise UserError(
      f'--utilisation is {UTILISATION.value}; it must be above 0 and at most 1'
    )
  if DECODE_RATE.value is not None and not DECODE_RATE.value > 0:
    raise UserError(f'--decode_rate is {DECODE_RATE.value}; it must be positive')
  config = resolve(CONFIG.value, config_file.overrides())
  price = read_price(PRICES.value, devices.kind) if PRICES.value else None
  rates = Rates(UTILISATION.value, DECODE_RATE.value, price)
  print(plan(config, devices, rates))


if __name__ == '__main__':
  commands.launch(main, 'config', 'devices')
