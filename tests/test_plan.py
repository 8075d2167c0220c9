"""What a run would take, on simulated CPU devices and on hand-written programs."""

import json

import jax
import numpy as np
import pytest

from configs import digits_lt, gta5_cityscapes, imagenet_lt
from lt_jax import plan
from lt_jax.config import resolve
from lt_jax.errors import UserError
from tests import child

EIGHT = plan.Devices('h100', 8)


def config(arg='ldam_drw', **overrides):
  made = digits_lt.get_config(arg)
  made.model.update(trunk='digits_cnn', trunk_options={'width': 4})
  made.update_from_flattened_dict(overrides)
  return resolve(made)


@pytest.fixture(scope='module')
def stage():
  return plan.build_stages(config(), plan.make_mesh(EIGHT))['train']


@pytest.fixture(scope='module')
def step(stage):
  return plan.compile_step(stage, plan.make_mesh(EIGHT))


HLO = """
HloModule jit_update, entry_computation_layout={(f32[4]{0})->f32[4]{0}}
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(f32[] %x, f32[] %y), metadata={op_name="an all-reduce(of 3)"}
}
ENTRY %main {
  %all-reduce.1 = f32[64,3]{1,0:T(8,128)S(1)} all-reduce(%a), to_apply=%add
  %all-reduce.2 = (bf16[10]{0:T(256)(128)(2,1)}, /*index=1*/f32[]) all-reduce(%b, %c)
  %one = f32[] get-tuple-element((bf16[10], f32[]) %all-reduce.2), index=1
  %gather-start = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%d), dimensions={0}
  %gather-done = f32[16,4]{1,0} all-gather-done((f32[2,4], f32[16,4]) %gather-start)
  %scatter = u8[7]{0} reduce-scatter(u8[56]{0} %e), to_apply=%add
  %permute = pred[5]{0} collective-permute(pred[5]{0} %f), source_target_pairs={{0,1}}
  ROOT %fused = f32[4]{0} fusion(%g), kind=kLoop, calls=%all-reduce-fusion
}
"""


def test_collectives_of_a_program():
  found = [tuple(one) for one in plan.parse_collectives(HLO)]
  assert found == [
    ('all-reduce', 64 * 3 * 4),
    ('all-reduce', 10 * 2 + 4),
    ('all-gather', 16 * 4 * 4),
    ('reduce-scatter', 7),
    ('collective-permute', 5),
  ]


def test_a_ring_sends_an_all_reduce_nearly_twice():
  assert plan.Collective('all-reduce', 800).seconds(8, 100.0) == 14.0
  assert plan.Collective('all-gather', 800).seconds(8, 100.0) == 7.0
  assert plan.Collective('reduce-scatter', 100).seconds(8, 100.0) == 7.0
  assert plan.Collective('all-reduce', 800).seconds(1, 100.0) == 0.0


def test_chips_are_of_a_plausible_size():
  for name, chip in plan.CHIPS.items():
    assert 100e12 < chip.float32 <= chip.bfloat16 < 1e15, name
    assert 16e9 <= chip.memory < 200e9, name
    assert 8e11 < chip.bandwidth < 1e13 and 1e11 < chip.interconnect < 1e12, name
    assert (chip.dimensions > 0) == name.startswith('v'), name


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('v4-32', ('v4', 16, '2x2x4')),
    ('v5p-8', ('v5p', 4, '2x2x1')),
    ('v5litepod-16', ('v5e', 16, '4x4')),
    ('v5e-32', ('v5e', 32, '4x8')),
    ('v5e:4x8', ('v5e', 32, '4x8')),
    ('v6e:32', ('v6e', 32, '4x8')),
    ('V5P:2x2x4', ('v5p', 16, '2x2x4')),
    ('h100:8', ('h100', 8, '')),
    ('a100-80gb:4', ('a100-80gb', 4, '')),
  ],
)
def test_devices(text, expected):
  assert tuple(plan.parse_devices(text)) == expected


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('v5:4x8', "did you mean 'v5e' or 'v5p'"),
    ('a100:8', "did you mean 'a100-40gb' or 'a100-80gb'"),
    ('a100-80:8', "did you mean 'a100-80gb'"),
    ('h10:8', "did you mean 'h100'"),
    ('h100', 'a kind and a size'),
    ('a100-80gb', 'a kind and a size'),
    ('h100:eight', 'a kind and a size'),
    ('h100:0', 'a kind and a size'),
    ('h100:2x4', 'GPUs are a number'),
    ('v4-33', "unknown v4 slice '33'"),
    ('v5e:2x2x4', 'has 2 dimensions'),
  ],
)
def test_impossible_numbers_of_devices(text, message):
  with pytest.raises(UserError, match=message) as caught:
    plan.parse_devices(text)
  assert '\n' not in str(caught.value)


def test_the_gradient_is_all_reduced_once(stage, step):
  numbers = jax.tree.leaves(plan.train.state_shapes(stage.method, stage.streams).params)
  assert step.parameters == sum(np.prod(x.shape, dtype=int) for x in numbers)
  gradient = 4 * step.parameters
  reduced = sum(c.bytes for c in step.collectives if c.kind == 'all-reduce')
  # And the batch statistics, forward and backward, and the metrics.
  assert gradient <= reduced < 1.05 * gradient + 4096
  assert {c.kind for c in step.collectives} == {'all-reduce'}


def test_flops_are_three_times_a_forward_pass(stage, step):
  """But for the first layer, which needs no gradient of its input."""
  state = plan.train.state_shapes(stage.method, stage.streams)
  images = jax.ShapeDtypeStruct((64, 8, 8, 1), np.float32)
  forward = jax.jit(stage.method.predict).lower(state, images).cost_analysis()['flops']
  assert 2 < 8 * step.flops / forward < 3.5


def test_memory_has_its_parts(step):
  assert step.memory['parameters'] == 4 * step.parameters
  assert step.memory['optimiser state'] == 4 * step.parameters  # of the momentum
  assert step.memory['images on the device'] == 1797 * 64
  assert step.memory['batch'] == 64 / 8 * (4 + 4)  # row and label of each
  assert step.memory['activations, temporaries'] > 0


def rows(table):
  """Returns label -> value of the rows of a table, the last of each."""
  split = (line.rsplit('  ', 1) for line in table.splitlines()[1:])
  return {parts[0].strip(): parts[-1].strip() for parts in split}


def number(text):
  return float(text.replace(',', ''))


def test_one_table(stage, step):
  rates = plan.Rates(utilisation=0.5, decode_rate=100.0, price=3.0)
  table = plan.plan(config(), EIGHT, rates, compiled=lambda *_: step)
  title, *lines = table.splitlines()
  found = rows(table)
  assert 'the memory is an estimate' in title
  assert len({len(line) for line in lines if line != line.split('  ')[0]}) == 1
  seconds = step.flops / (0.5 * 494.7e12) + sum(
    c.seconds(8, 450e9) for c in step.collectives
  )
  assert found['stage'] == 'train' and found['images/s to decode'] == 'none'
  assert number(found['images/s']) == pytest.approx(64 / seconds, rel=1e-3)
  assert number(found['steps']) == stage.plan.steps


def test_streamed_images_must_be_decoded(step):
  resolved = resolve(imagenet_lt.get_config('ce'))
  slow = step._replace(flops=0.4 * 494.7e12, collectives=[])  # a second a step
  rates = plan.Rates(decode_rate=100.0, price=3.0)
  found = rows(plan.plan(resolved, EIGHT, rates, compiled=lambda *_: slow))
  steps = 30 * 115_846 // 128 + 1
  assert found['images/s to decode'] == '128' and found['host cores for that'] == '2'
  assert number(found['steps']) == steps
  assert number(found['days of training']) == pytest.approx(steps / 86400, abs=1e-3)
  assert number(found['cost']) == pytest.approx(steps / 3600 * 8 * 3.0, abs=0.01)


def test_only_stages_that_train_are_planned(step):
  seen = []
  plan.plan(
    resolve(imagenet_lt.get_config('tau_norm')),
    EIGHT,
    plan.Rates(),
    compiled=lambda stage, mesh: seen.append(stage.name) or step,
  )
  assert seen == ['train']  # the other stage makes no step


def test_devices_that_do_not_divide_the_batch():
  with pytest.raises(UserError, match='does not divide over 3 devices'):
    plan.build_stages(config(), plan.make_mesh(plan.Devices('h100', 3)))


def test_a_run_of_label_maps_is_planned_without_them():
  made = resolve(gta5_cityscapes.get_config('advent,net=small'))
  stage = plan.build_stages(made, plan.make_mesh(plan.Devices('h100', 1)))['train']
  shapes = {
    name: {key: x.shape for key, x in stream.payload_shapes().items() if x.ndim > 1}
    for name, stream in stage.streams.items()
  }
  source = {'image': (1, 720, 1280, 3), 'label': (1, 720, 1280)}
  assert shapes == {'train': source, 'target': {'image': (1, 512, 1024, 3)}}
  assert stage.plan.steps == 120_000 and len(stage.dataset.class_names) == 19


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('{"h100": 2.5}', None),
    ('{"h10": 2.5}', "did you mean 'h10'"),
    ('{"h100": "2.5"}', "is '2.5'; give a number"),
    ('{"h100": NaN}', 'is nan; give a number'),
    ('[1]', 'does not hold a JSON object'),
    ('{', 'not valid JSON'),
  ],
)
def test_prices(text, message, tmp_path):
  path = tmp_path / 'prices.json'
  path.write_text(text)
  if message is None:
    assert plan.read_price(path, 'h100') == json.loads(text)['h100']
    return
  with pytest.raises(UserError, match=message):
    plan.read_price(path, 'h100')


def test_the_command_reports_errors_in_one_line(tmp_path):
  arguments = ['--devices=h100:8', '--config=digits_lt:ce', '--utilisation=0']
  log = tmp_path / 'log'
  assert child.run(arguments, log, module='lt_jax.plan') == 2
  assert (
    log.read_text() == 'error: --utilisation is 0.0; it must be above 0 and at most 1\n'
  )
