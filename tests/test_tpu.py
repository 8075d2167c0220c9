"""The TPU compiler accepts the step of every method, for 32 chips on eight hosts.

It needs no TPU, only the package libtpu, which `make test-tpu` installs. Networks are
small, because each is compiled anew.
"""

import importlib.util

import jax
import pytest

from configs import (
  digits_domains,
  digits_multitask,
  digits_zero_shot,
  imagenet_lt,
  scenes,
)
from lt_jax import footprint, plan
from lt_jax.config import resolve, stage_config
from lt_jax.errors import UserError
from lt_jax.methods import METHODS

if not importlib.util.find_spec('libtpu'):
  pytest.skip('libtpu is not installed: make test-tpu', allow_module_level=True)

jax.config.update(
  'jax_platforms', 'cpu'
)  # otherwise JAX looks for a TPU in this machine

POD = plan.parse_devices('v5e:4x8')

SMALL = {
  'data.image_size': 32,
  'data.resize': 36,
  'data.workers': 0,
  'data.meta_per_class': 1,
  'data.fake.classes': 128,
  'data.fake.train': 6400,
  'data.fake.largest': 250,
  'data.fake.smallest': 3,
  'data.fake.val': 256,
  'data.fake.test': 128,
  'data.many_shot': 50,
  'data.few_shot': 20,
  'model.dtype': 'bfloat16',
  'batch': 64,
  'eval_batch': 64,
}

STAGES = {  # recipe and stage -> its method
  ('ce', 'train'): 'supervised',
  ('ldam_drw', 'train'): 'supervised',
  ('crt', 'classifier'): 'supervised',
  ('oltr', 'memory'): 'oltr',
  ('fslwf', 'generator'): 'weight_generator',
  ('l2rw', 'train'): 'meta_reweight',
  ('mwn', 'train'): 'meta_weight_net',
  ('meta_ce', 'meta'): 'meta_reweight',
}

TWO_DOMAINS = {  # likewise for the embedded pair
  ('deep_coral', 'train'): 'aligned',
  ('dann', 'train'): 'dann',
  ('cdan', 'train'): 'cdan',
  ('mcd', 'train'): 'mcd',
  ('adda', 'adapt'): 'adda',
  ('adda_cycada', 'adapt'): 'adda',
  ('ocda', 'source'): 'centroid_loss',
  ('ocda', 'adversarial'): 'compound',
  ('ocda', 'domain_factor'): 'domain_factor',
  ('ocda', 'scheduled'): 'compound',
  ('self_supervised', 'train'): 'self_supervised',
  ('pseudo_label', 'self_training'): 'pseudo_label',
  ('i2i', 'train'): 'i2i',
}

OTHER_TASKS = {  # config, recipe and stage -> its method
  (digits_multitask, 'multitask', 'train'): 'multitask',
  (digits_zero_shot, 'feature_generator', 'train'): 'feature_generator',
  (digits_zero_shot, 'zsda,target=blended', 'refine'): 'saved_label',
}

OF_PIXELS = {  # likewise for the embedded scenes
  ('minent', 'train'): 'aligned',
  ('advent', 'train'): 'advent',
  ('mean_teacher', 'train'): 'mean_teacher',
  ('label_prior', 'adapt'): 'label_prior',
  ('ocda', 'scheduled'): 'advent',
}


def compiled(recipe, name='train', **overrides):
  """Returns a stage's compiled step on the pod, and its stage."""
  made = imagenet_lt.get_config(recipe)
  made.model.trunk_options.width = 8
  made.update_from_flattened_dict({**SMALL, **overrides})
  for stage in (made, *made.stages.values()):
    if 'meta' in stage.get('streams', {}):
      stage.streams.meta.batch = 64
  if 'generator' in made.stages:
    made.stages.generator.streams.train.update(
      novel=32, queries_novel=64, queries_base=32
    )
  return step_of(resolve(made), name, STAGES[recipe, name])


def step_of(config, name, method):
  mesh = plan.make_mesh(POD)
  stage = plan.build_stages(config, mesh)[name]
  assert stage_config(config, name)['method']['name'] == method
  return plan.compile_step(stage, mesh), stage


@pytest.fixture(scope='module')
def plain():
  return compiled('ce', **{'model.dtype': 'float32'})


def all_reduces(step):
  assert {c.kind for c in step.collectives} == {'all-reduce'}
  return [c.bytes for c in step.collectives]


def test_every_method_is_here():
  found = {**STAGES, **TWO_DOMAINS, **OTHER_TASKS, **OF_PIXELS}.values()
  assert set(found) == set(METHODS)


@pytest.mark.parametrize(('recipe', 'name'), [s for s in STAGES if s[0] != 'ce'])
def test_a_method_compiles(recipe, name):
  step, _ = compiled(recipe, name)
  assert step.flops > 0 and step.traffic > 0 and step.collectives
  assert 4 * step.parameters < sum(step.memory.values()) < POD.chip.memory


@pytest.mark.parametrize(('recipe', 'name'), TWO_DOMAINS)
def test_a_method_of_two_domains_compiles(recipe, name):
  """And no image moves between chips: only sums are exchanged."""
  made = digits_domains.get_config(recipe)
  made.update(batch=64, eval_batch=64)
  made.model.dtype = 'bfloat16'
  method = TWO_DOMAINS[recipe, name]
  step, stage = step_of(resolve(made), name, method)
  assert ('target' in stage.streams) == (method != 'centroid_loss')
  assert step.flops > 0 and all_reduces(step)


@pytest.mark.parametrize(('file', 'recipe', 'name'), OTHER_TASKS)
def test_a_method_of_another_task_compiles(file, recipe, name):
  made = file.get_config(recipe)
  made.update(batch=64, eval_batch=64)
  made.model.dtype = 'bfloat16'
  step, _ = step_of(resolve(made), name, OTHER_TASKS[file, recipe, name])
  assert step.flops > 0 and step.collectives


@pytest.mark.parametrize(('recipe', 'name'), OF_PIXELS)
def test_a_method_of_pixels_compiles(recipe, name):
  """And no map moves between chips, even where images are mixed."""
  made = scenes.get_config(f'{recipe},train=64')
  made.update(batch=64, eval_batch=64)
  made.model.dtype = 'bfloat16'
  step, stage = step_of(resolve(made), name, OF_PIXELS[recipe, name])
  assert set(stage.streams) == {'train', 'target'}
  assert step.flops > 0 and all_reduces(step)


def test_a_plain_step_exchanges_its_gradient_alone(plain):
  step, stage = plain
  state = plan.train.state_shapes(stage.method, stage.streams)
  metrics = plan.train.metric_shapes(
    stage.method, stage.streams, state, plan.make_mesh(POD)
  )
  found = all_reduces(step)
  assert len(found) <= 3
  least = 4 * step.parameters
  assert least <= sum(found) <= least + footprint.size((state.stats, metrics))


def test_in_bfloat16_most_of_the_gradient_is_half_as_large(plain):
  """A kernel's gradient is exchanged in bfloat16 and widened afterwards."""
  step, _ = compiled('ce')
  assert len(all_reduces(step)) <= 3
  assert (
    2 * step.parameters <= sum(all_reduces(step)) < 0.7 * sum(all_reduces(plain[0]))
  )


def test_global_statistics_cost_exchanges_a_layer(plain):
  step, _ = compiled('ce', **{'model.dtype': 'float32', 'model.batch_norm': 'global'})
  assert len(all_reduces(step)) > len(all_reduces(plain[0])) + 9  # of ten layers


def test_flops_are_those_that_are_counted_without_it(plain):
  on_tpu, stage = plain
  on_cpu = plan.compile_step(stage, plan.make_mesh(plan.Devices('h100', 8)))
  assert on_tpu.parameters == on_cpu.parameters
  more = on_tpu.flops * POD.count - on_cpu.flops * 8
  # There every device's parameter update counts, here only one.
  assert 0 <= more <= 20 * on_tpu.parameters * POD.count


def test_a_step_that_does_not_fit():
  with pytest.raises(UserError, match="stage 'train' does not fit.*HBM") as caught:
    compiled('ce', batch=2**24)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('text', ['v4-32', 'v5p-32', 'v6e-16', 'v5e-1'])
def test_topologies(text):
  devices = plan.parse_devices(text)
  mesh = plan.make_mesh(devices)
  assert mesh.size == devices.count and mesh.devices.flat[0].platform == 'tpu'


def test_an_unknown_topology():
  with pytest.raises(UserError, match='the TPU compiler refuses v5e:3x5') as caught:
    plan.make_mesh(plan.parse_devices('v5e:3x5'))
  assert '\n' not in str(caught.value)
