"""Every config builds with every recipe and matches the papers, without data."""

import dataclasses
import inspect
import json
import math
import re

import jax
import numpy as np
import pytest

from configs import (
  awa1,
  c_digits,
  c_digits_small,
  c_driving,
  c_faces,
  c_mazes,
  camvid_dusk,
  cifar10_lt,
  cifar100_lt,
  cifar100_open,
  cityscapes_foggy,
  digits_domains,
  digits_lt,
  digits_multitask,
  digits_transfer,
  digits_zero_shot,
  fine_grained,
  gta5_cityscapes,
  imagenet,
  imagenet_lt,
  inat17,
  inat18,
  mnist_mnistm,
  mnist_usps,
  ms1m_lt,
  my_domains,
  my_images,
  office31,
  office_caltech10,
  open_world,
  pacs,
  places_lt,
  scenes,
  scenes_zero_shot,
  svhn_mnist,
  synsigns_gtsrb,
  synth_svhn,
  synthia_cityscapes,
  transfer,
  usps_mnist,
  visda,
  xlsa,
)
from lt_jax import build, recipes, run, sharding, train
from lt_jax.build import checks
from lt_jax.config import ADDED, base_config, resolve, stage_config, upgraded
from lt_jax.data import dataset
from lt_jax.data.longtail import class_counts
from lt_jax.data.streams import Split
from lt_jax.errors import UserError
from lt_jax.optim import as_rules, make_optimizer, per_parameter
from lt_jax.protocols import cifar
from lt_jax.schedules import epoch_start, make_schedule

WITH_META = {name for name, made in recipes.RECIPES.items() if 'meta' in made.needs}
WITH_META -= {'meta_ce_control'}  # it trains as if there were none
"""Recipes that need meta images."""

CONFIGS = {
  'digits_lt': (digits_lt, ''),
  'cifar10_lt': (cifar10_lt, ',net=resnet8'),
  'cifar100_lt': (cifar100_lt, ',net=resnet8'),
  'cifar100_open': (cifar100_open, ',net=resnet8'),
  'imagenet': (imagenet, ',net=resnet10'),
  'imagenet_lt': (imagenet_lt, ''),
  'places_lt': (places_lt, ',net=resnet10'),
  'inat17': (inat17, ',net=resnet10'),
  'inat18': (inat18, ',net=resnet10'),
  'ms1m_lt': (ms1m_lt, ''),
  'my_images': (my_images, ''),
}

DESCRIBED = {
  'awa1': awa1,
  'digits_zero_shot': digits_zero_shot,
  'open_world': open_world,
  'scenes_zero_shot': scenes_zero_shot,
  'xlsa': xlsa,
}
"""Configs with unseen classes, which need other recipes."""

WITH_TARGET = {
  'digits_domains': digits_domains,
  'mnist_mnistm': mnist_mnistm,
  'mnist_usps': mnist_usps,
  'usps_mnist': usps_mnist,
  'svhn_mnist': svhn_mnist,
  'c_mazes': c_mazes,
  'c_digits': c_digits,
  'c_digits_small': c_digits_small,
  'c_faces': c_faces,
  'scenes': scenes,
  'camvid_dusk': camvid_dusk,
  'gta5_cityscapes': gta5_cityscapes,
  'synthia_cityscapes': synthia_cityscapes,
  'cityscapes_foggy': cityscapes_foggy,
  'c_driving': c_driving,
  'synth_svhn': synth_svhn,
  'synsigns_gtsrb': synsigns_gtsrb,
  'office_caltech10': office_caltech10,
  'office31': office31,
  'my_domains': my_domains,
  'pacs': pacs,
  'visda': visda,
}
"""Configs with a source and a target, which need other recipes."""


PAIRS = {
  'mnist_mnistm': (28, 60000),
  'mnist_usps': (28, 60000),
  'usps_mnist': (28, 7291),
  'svhn_mnist': (32, 73257),
}
"""Pairs of digit sets -> (side of the images, training images of the source)."""


TWO_TRAININGS = ('oltr', 'ce_aware', 'focal_aware', 'lifted', 'range', 'openmax')
IMPOSSIBLE = {
  **{('inat18', recipe): 'inat18 has no stage' for recipe in (*TWO_TRAININGS, 'fslwf')},
  ('imagenet_lt', 'ce_plus_meta'): 'the meta images come from another split',
  ('places_lt', 'ce_plus_meta'): 'the meta images come from another split',
  ('my_images', 'fslwf'): 'no class is in many',  # the generated ones are balanced
}
"""Combinations without such a training or such images -> what the message says."""


OFTEN = (
  'ce',
  'ldam_drw',
  'meta_ce',
  'oltr',
  'crt',
  'tau_norm',
)
"""Recipes that every config is built with; that of digits takes all, and CIFAR-100 is
like CIFAR-10."""


@pytest.mark.parametrize(
  ('name', 'recipe'),
  [
    pytest.param(
      name,
      recipe,
      marks=[]
      if name == 'digits_lt' or (recipe in OFTEN and name != 'cifar100_lt')
      else pytest.mark.slow,
    )
    for name in CONFIGS
    for recipe, made in recipes.RECIPES.items()
    if not {'target', 'heads', 'class_vectors'} & {*made.needs}
    if name not in ('inat17', 'imagenet', 'ms1m_lt')  # like inat18; faces: elsewhere
    if name != 'cifar100_lt' or recipe in OFTEN  # like cifar10_lt
  ],
)
def test_every_config_builds_with_every_recipe(no_data, name, recipe):
  module, option = CONFIGS[name]
  if (name, recipe) in IMPOSSIBLE:
    with pytest.raises(UserError, match=IMPOSSIBLE[name, recipe]):
      build.build(resolve(module.get_config(recipe + option)))
    return
  config = module.get_config(recipe + option)
  if not config.data.meta_per_class and recipe in WITH_META:
    with pytest.raises(UserError, match=r'set data\.meta_per_class'):
      build.build(resolve(config))
    return
  config = resolve(config)
  assert (config['name'], config['recipe']) == (name, recipe)
  experiment = build.build(config)
  for stage in experiment.stages.values():
    state = train.state_shapes(stage.method, stage.streams)
    assert state.params['net']['trunk'] and state.params['net']['head']


@pytest.mark.parametrize('recipe', ['source_only', 'target_only', 'dann'])
@pytest.mark.parametrize('name', PAIRS)
def test_pairs_of_digits_build_as_ganin_trains_them(no_data, monkeypatch, name, recipe):
  def resized(source, size, channels, name):
    shape = (len(source), size, size, channels)
    images = np.broadcast_to(np.zeros((), np.uint8), shape)
    return dataclasses.replace(source, images=images)

  monkeypatch.setattr(dataset, 'brought_to', resized)
  size, images = PAIRS[name]
  config = resolve(WITH_TARGET[name].get_config(recipe))
  source, target = name.split('_')
  assert (config['name'], config['target']) == (name, [target])
  assert math.ceil(config['epochs'] * images / 64) == 5000
  assert config['schedule'] == {'name': 'dann', 'base': 0.01, 'end': config['epochs']}
  experiment = build.build(config, devices=1)
  shapes = {one.image_shape for one in experiment.domains.values()}
  assert shapes == {(size, size, 3)} and set(experiment.domains) == {'source', target}
  stage = experiment.last
  assert [stage.batch, config['optimizer']['momentum']] == [64, 0.9]
  params = train.state_shapes(stage.method, stage.streams).params
  if recipe == 'dann':  # size of the flattened convolutions, as in the paper
    kernels = [x.shape for x in jax.tree.leaves(params['discriminator']) if x.ndim == 2]
    assert (8192 if size == 32 else 768) in {shape[0] for shape in kernels}
  assert experiment.last.uses_target_labels == (recipe == 'target_only')


TRANSFER = {
  'digits_multitask': digits_multitask,
  'digits_transfer': digits_transfer,
  'fine_grained': fine_grained,
  'transfer': transfer,
}
"""Configs with their own tests: test_transfer.py and test_multitask.py."""


@pytest.mark.parametrize('name', [*CONFIGS, *WITH_TARGET, *TRANSFER, *DESCRIBED])
def test_a_config_says_what_it_claims_costs_and_runs(name):
  module = (WITH_TARGET | TRANSFER | DESCRIBED).get(name) or CONFIGS[name][0]
  for part in ('Cost:', 'ublished', f'--config=configs/{name}.py'):
    assert part in module.__doc__
  assert inspect.signature(module.get_config).parameters['arg'].default is None


@pytest.mark.parametrize(
  ('arg', 'total', 'first', 'last'),
  [
    ('ce', 12406, 5000, 50),
    ('ce,imbalance=200', 11203, 5000, 25),
    ('ce,imbalance=10', 20431, 5000, 500),
    ('ce,imbalance=10,profile=step', 27500, 5000, 500),
    ('ce,meta=10', 12380, 4990, 49),
  ],
)
def test_cifar10_counts(no_data, arg, total, first, last):
  experiment = build.build(resolve(cifar10_lt.get_config(arg)))
  counts = experiment.dataset.counts
  assert (counts.sum(), counts[0], counts[-1]) == (total, first, last)
  assert ('meta' in experiment.dataset.splits) == ('meta' in arg)


def test_the_protocols_are_those_of_the_papers(no_data):
  cao = resolve(cifar10_lt.get_config('ldam_drw'))
  cui = resolve(cifar10_lt.get_config('cb_focal'))
  assert cao['epochs'] == 200 and cao['defer_epoch'] == 160
  for config in (cao, cui):
    schedule = config['schedule']
    assert (schedule['base'], schedule['warmup_epochs']) == (0.1, 5)
    assert schedule['boundaries'] == [160, 180]
    assert schedule['factors'] == [1e-2, 1e-4]
  assert cao['schedule']['warmup'] == 'staircase'
  assert cui['schedule']['warmup'] == 'linear'
  assert cao['class_weights']['start_epoch'] == 160
  assert cao['reduction'] == 'weight_normalised' and cui['reduction'] == 'mean'
  assert cao['model']['trunk_options']['shortcut'] == 'subsample'
  assert cui['model']['trunk_options']['shortcut'] == 'average'
  assert cui['optimizer']['weight_decay'][0] == ['net/head/bias', 0.0]
  assert cui['model']['head_options']['prior_bias']
  stage = build.build(cao).stages['train']
  assert stage.plan.steps == 19385  # ceil(200 * 12406 / 128)


@pytest.mark.parametrize(
  ('path', 'recipe', 'set_', 'message'),
  [
    (digits_lt, 'ldam_drw', {'defer_epoch': 200.0}, 'class_weights.start_epoch'),
    (digits_lt, 'ce_drs', {'defer_epoch': 300.0}, 'sampler.start_epoch .* 300, .* 200'),
    (digits_lt, 'ldam_drw', {'epochs': 180.0}, 'schedule.boundaries .* 180, .* 180'),
    (
      inat18,
      'crt,protocol=kang',
      {'epochs': 5.0, 'schedule': {'end': 90.0}},
      'schedule.end is at epoch 90',
    ),
    (inat18, 'crt,protocol=kang', {'epochs': 5.0}, None),
    (imagenet_lt, 'oltr', {'epochs': 8.0}, "schedule.boundaries .* stage 'plain' .* 8"),
    (digits_lt, 'ce_drs,epochs=4', {}, 'sampler.start_epoch is at epoch 4, .* 4'),
    (imagenet_lt, 'crt', {'epochs': 0.0}, None),
    (digits_lt, 'meta_ce', {}, None),
    (digits_lt, 'ldam_drw', {'epochs': 181.0}, None),
    (digits_lt, 'ldam_drw,epochs=10', {}, None),
    (digits_lt, 'ldam_drw', {'epochs': 0.0}, None),
  ],
)
def test_deferrals_after_the_end_are_rejected(path, recipe, set_, message):
  """Otherwise `ldam_drw` would silently be `ldam`."""
  config = path.get_config(recipe)
  config.update(set_)
  resolved = resolve(config)
  stages = {n: stage_config(resolved, n) for n in resolved['stage_order']}
  if message is None:
    checks.check_end(stages)
  else:
    with pytest.raises(UserError, match=message + '.*epochs='):
      checks.check_end(stages)


def test_a_deferral_follows_the_epochs_until_it_is_set():
  config = base_config()
  recipes.apply_recipe(config, 'ldam_drw')
  config.epochs = 100.0
  assert config.class_weights.start_epoch == config.defer_epoch == 80
  config.defer_epoch = 30.0
  assert (config.epochs, config.class_weights.start_epoch) == (100, 30)


BUILT = ('ldam_drw', 'ce_drs', 'cb_focal', 'ncm', 'lws', 'crt', 'oltr', 'fslwf')
"""One recipe for each head, and for each way to start a stage."""


@pytest.mark.parametrize(
  ('protocol', 'recipe'),
  [
    pytest.param(
      protocol,
      recipe,
      marks=[pytest.mark.slow] * (number > 0 and recipe not in ('cb_focal', 'crt')),
    )
    for number, protocol in enumerate(cifar.PROTOCOLS)
    for recipe in BUILT
  ],
)
def test_recipes_build_under_every_protocol(no_data, recipe, protocol):
  arg = f'{recipe},net=resnet8,protocol={protocol},meta=10'
  build.build(resolve(cifar10_lt.get_config(arg)))


@pytest.mark.parametrize(
  ('recipe', 'stage', 'rates'),
  [
    ('ldam_drw', 'train', {0: 0.02, 4: 0.1, 5: 0.1, 159: 0.1, 160: 1e-3, 180: 1e-5}),
    ('cb_focal', 'train', {0: 0.0, 5: 0.1, 159: 0.1, 160: 1e-3, 179: 1e-3, 180: 1e-5}),
    ('meta_ce', 'pretrain', {0: 0.1, 5: 0.1, 158: 0.1, 159: 1e-3}),
    ('meta_ce', 'meta', {160: 1e-3, 178: 1e-3, 179: 1e-5, 180: 1e-5}),
    ('mwn', 'train', {0: 0.1, 78: 0.1, 79: 1e-2, 88: 1e-2, 89: 1e-3, 99: 1e-3}),
    ('l2rw', 'train', {0: 0.1, 79: 0.1, 80: 1e-2, 119: 1e-2, 120: 1e-3}),
  ],
)
def test_learning_rates_of_the_papers_to_the_epoch(no_data, recipe, stage, rates):
  config = resolve(cifar10_lt.get_config(f'{recipe},net=resnet8'))
  merged = stage_config(config, stage)
  length = sum(cifar10_counts(merged['data']['n_max']))
  schedule = make_schedule(**merged['schedule'], length=length, batch=merged['batch'])
  for epoch, rate in rates.items():
    first = epoch_start(epoch, length, merged['batch'])
    np.testing.assert_allclose(schedule(first), rate, rtol=1e-5, err_msg=str(epoch))


PHOTOGRAPHS = {
  ('imagenet_lt', 'oltr', 'plain'): {
    'batch': (128, 'instance', 30),
    'net/trunk/x': {0: 0.1, 9: 0.1, 10: 0.01, 19: 0.01, 20: 1e-3, 29: 1e-3},
    'net/head/x': {0: 0.1, 10: 0.01, 20: 1e-3},
  },
  ('imagenet_lt', 'oltr', 'memory'): {
    'batch': (128, 'class_aware', 60),
    'net/trunk/x': {0: 0.01, 19: 0.01, 20: 1e-3, 39: 1e-3, 40: 1e-4},
    'net/attention/x': {0: 0.01, 20: 1e-3},
    'net/projection/x': {0: 0.01},
    'net/head/x': {0: 0.1, 20: 0.01, 40: 1e-3, 59: 1e-3},
    'centroids': {0: 0.01, 20: 1e-3, 40: 1e-4},
  },
  ('imagenet_lt', 'range', 'aware'): {
    'batch': (128, 'class_aware', 60),
    'net/trunk/x': {0: 0.01, 20: 1e-3},
    'net/head/x': {0: 0.1, 40: 1e-3},
  },
  ('imagenet_lt', 'crt', 'train'): {
    'batch': (512, 'instance', 90),
    'net/trunk/x': {0: 0.2, 45: 0.1, 90: 0.0},
  },
  ('imagenet_lt', 'crt', 'classifier'): {
    'batch': (512, 'class_aware', 10),
    'net/trunk/x': {0: 0.0, 5: 0.0},
    'net/head/x': {0: 0.2, 5: 0.1, 10: 0.0},
  },
  ('imagenet_lt', 'lws', 'classifier'): {
    'batch': (512, 'class_aware', 5),
    'net/head/kernel': {0: 0.0},
    'net/head/scale': {0: 0.2, 5: 0.0},
  },
  ('imagenet_lt', 'fslwf', 'base'): {'batch': (128, 'instance', 30)},
  ('imagenet_lt', 'fslwf', 'generator'): {'batch': (128, 'instance', 6)},
  ('places_lt', 'oltr', 'plain'): {
    'batch': (128, 'instance', 30),
    'net/trunk/x': {0: 1e-3, 10: 1e-4, 20: 1e-5},
    'net/projection/x': {0: 1e-3},
    'net/head/x': {0: 0.1, 10: 0.01},
  },
  ('places_lt', 'oltr', 'memory'): {
    'batch': (128, 'class_aware', 30),
    'net/trunk/x': {0: 0.0},
    'net/attention/x': {0: 1e-4, 10: 1e-5},
    'net/projection/x': {0: 1e-4},
    'net/head/x': {0: 0.01, 10: 1e-3, 20: 1e-4},
    'centroids': {0: 0.01, 10: 1e-3},
  },
  ('places_lt', 'crt', 'train'): {
    'batch': (256, 'instance', 30),
    'net/trunk/stage4_block3/x': {0: 0.01, 15: 0.005},
    'net/trunk/stage4_block2/x': {0: 0.0},
    'net/head/x': {0: 0.1},
  },
  ('places_lt', 'crt', 'classifier'): {
    'batch': (256, 'class_aware', 10),
    'net/head/x': {0: 0.1, 5: 0.05},
  },
  ('places_lt', 'lws', 'classifier'): {
    'batch': (256, 'class_aware', 5),
    'net/head/scale': {0: 0.1},
  },
}
"""(batch, sampler, epochs), and learning rates by parameter and epoch."""


STEPS = {
  'inat18:cb_focal': {'train': 38454},
  'inat17:cb_focal': {'train': 50905},
  'imagenet:cb_focal': {'train': 112603},
  'inat18:ldam_drw': {'train': 38454},
  'inat18:crt': {'train': 76907, 'classifier': 25620},
  'inat18:meta_ce': {'pretrain': 25636, 'meta': 38454},
  'ms1m_lt:oltr': {'plain': 34668, 'memory': 34660},
  'imagenet_lt:oltr': {'plain': 27152, 'memory': 54300},
  'places_lt:oltr': {'plain': 14649, 'memory': 14640},
  'cifar10_lt:ce': {'train': 19385},
  'cifar100_open:oltr': {'plain': 13327, 'memory': 13200},
}
"""From Cui et al.'s code, and epochs times images over the batch."""


@pytest.mark.parametrize(
  'which',
  [pytest.param(w, marks=[pytest.mark.slow] * w.startswith('cifar')) for w in STEPS],
)
def test_steps_of_photographs_on_generated_ones(which):
  name, recipe = which.split(':')
  config = CONFIGS[name][0].get_config(recipe)
  config.data.source = 'fake'
  experiment = build.build(resolve(config))
  steps = {stage: s.plan.steps for stage, s in experiment.stages.items()}
  assert steps == STEPS[which]


def test_large_batches_decay_neither_scales_nor_the_last_bias():
  config = resolve(inat18.get_config('cb_focal'))
  rules = config['optimizer']['weight_decay']
  decays = {
    path: next(d for pattern, d in rules if re.fullmatch(pattern, path))
    for path in (
      'net/trunk/norm/scale',
      'net/trunk/stage1_block1/norm2/bias',
      'net/trunk/stage1_block1/shortcut_norm/scale',
      'net/trunk/stage1_block1/conv1/kernel',
      'net/head/bias',
      'net/head/kernel',
    )
  }
  assert list(decays.values()) == [0, 0, 0, 1e-4, 0, 1e-4]
  assert (config['loss']['gamma'], config['class_weights']['beta']) == (0.5, 0.999)
  assert config['schedule']['base'] == 1.6 and config['model']['dtype'] == 'bfloat16'
  assert inat18.get_config('ce').schedule.base == 0.4
  assert imagenet.get_config('ce').schedule.base == 0.4
  assert imagenet.get_config('cb_focal').schedule.base == 0.8


@pytest.mark.parametrize('where', PHOTOGRAPHS, ids='-'.join)
def test_protocols_of_photographs_to_the_epoch(where):
  name, recipe, stage = where
  expected = dict(PHOTOGRAPHS[where])
  config = resolve(CONFIGS[name][0].get_config(recipe))
  merged = stage_config(config, stage)
  batch = merged['batch']
  found = (batch, merged['sampler']['name'], merged['epochs'])
  assert found == expected.pop('batch')
  assert dict(merged['optimizer']['weight_decay']) == {'.*': 5e-4}
  length = 1000 * batch
  schedule = make_schedule(**merged['schedule'], length=length, batch=batch)
  for path, rates in expected.items():
    rules = merged['optimizer']['learning_rate_scale']
    scale = next(s for pattern, s in rules if re.fullmatch(pattern, path))
    for epoch, rate in rates.items():
      now = scale * schedule(epoch_start(epoch, length, batch))
      np.testing.assert_allclose(
        now, rate, rtol=1e-4, atol=1e-8, err_msg=f'{path} {epoch}'
      )


def test_class_aware_batches_have_statistics_of_the_whole():
  for recipe, stage in (('oltr', 'memory'), ('range', 'aware'), ('lws', 'classifier')):
    config = resolve(imagenet_lt.get_config(recipe))
    assert config['model']['batch_norm'] == 'per_device'
    assert stage_config(config, stage)['model']['batch_norm'] == 'global'


def test_a_second_training_needs_a_protocol_that_has_one():
  with pytest.raises(
    UserError, match=r"places_lt has no stage 'memory' under protocol 'kang'"
  ):
    places_lt.get_config('oltr,protocol=kang')


def test_a_trunk_that_is_not_trained_needs_weights(tmp_path):
  config = resolve(digits_lt.get_config('ce'))
  config['optimizer']['learning_rate_scale'] = [['.*norm.*', 0.0], ['.*', 1.0]]
  run.rehearsed(config, tmp_path)  # because random kernels are trained
  config['optimizer']['learning_rate_scale'] = [['net/head/.*', 1.0], ['.*', 0.0]]
  build.build(config)  # for code that only needs shapes
  with pytest.raises(UserError, match=r'cannot start at random: give --config.init='):
    run.rehearsed(config, tmp_path)


@pytest.mark.parametrize('net', ['resnet10', 'resnet18', 'resnet50'])
def test_kang_trains_the_last_block_of_places(net):
  config = places_lt.get_config(f'crt,net={net}')
  config.data.source = 'fake'
  config = resolve(config)
  stage = build.build(config).stages['train']
  params = train.state_shapes(stage.method, stage.streams).params
  rules = config['optimizer']['learning_rate_scale']
  rates = per_parameter(rules, params)['net']['trunk']
  last = max(name for name in rates if name.startswith('stage4'))
  for name, block in rates.items():
    assert set(jax.tree.leaves(block)) == {0.1 if name == last else 0.0}


def test_keys_of_a_stage_follow_the_top_level_until_they_are_set():
  config = imagenet_lt.get_config('crt')
  config.stages.classifier.model.batch_norm = 'frozen'
  config.batch = 64
  config.stages.train.schedule.base = 0.05
  resolved = resolve(config)
  first, second = (stage_config(resolved, n) for n in ('train', 'classifier'))
  assert (first['model']['batch_norm'], second['model']['batch_norm']) == (
    'per_device',
    'frozen',
  )
  assert first['batch'] == second['batch'] == 64
  assert first['schedule']['base'] == 0.05 and resolved['schedule']['base'] == 0.2
  assert resolved['stages']['train'].keys() == {'schedule'}  # and no more


def test_a_different_head_does_not_inherit_options():
  config = resolve(cifar10_lt.get_config('ncm,protocol=cui,net=resnet8'))
  assert stage_config(config, 'train')['model']['head_options']
  assert stage_config(config, 'ncm')['model']['head_options'] == {}


def cifar10_counts(n_max):
  return class_counts('exponential', 10, n_max, 100)


def test_meta_class_weights_continue_from_pre_training(no_data):
  """Jamal et al.: t1 = 160, one schedule, 100 meta images that are not trained on."""
  config = resolve(cifar10_lt.get_config('meta_ce,net=resnet8'))
  experiment = build.build(config)
  first, second = (experiment.stages[name] for name in ('pretrain', 'meta'))
  assert experiment.dataset.counts.tolist() == [
    *(4990, 2991, 1793, 1075, 644, 386, 231, 138, 83, 49)
  ]
  assert len(experiment.dataset.splits['meta'].rows) == 100
  assert (first.plan.steps, second.plan.steps) == (
    160 * 12380 // 100,
    200 * 12380 // 100,
  )
  assert list(first.streams) == ['train'] and list(second.streams) == ['train', 'meta']
  method = config['stages']['meta']['method']
  assert (method['eps_lr'], method['form'], method['virtual']) == (
    0.01,
    'additive',
    'sgd',
  )
  assert config['batch'] == 100 and config['optimizer']['nesterov']


def test_the_meta_stage_continues_from_the_last_state():
  """Selection applies to the final stage; the clock of a best State is behind."""
  config = digits_lt.get_config('meta_ce')
  config.select = 'val/accuracy'
  resolved = resolve(config)
  selects = [stage_config(resolved, n)['select'] for n in ('pretrain', 'meta')]
  assert selects == ['last', 'val/accuracy']


def test_meta_weight_net_has_the_optimiser_of_its_class_imbalance_code():
  players = resolve(cifar10_lt.get_config('mwn'))['players']
  assert players['weight_net']['schedule'] == {'name': 'constant', 'base': 1e-5}
  assert players['weight_net']['optimizer'] == {
    'name': 'sgd',
    'momentum': 0.9,
    'nesterov': True,
    'weight_decay': [['.*', 5e-4]],
  }


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_number_that_is_not_finite_is_reported(value):
  config = digits_lt.get_config('ce')
  config.optimizer.weight_decay = (('.*', value),)
  with pytest.raises(UserError, match='config.optimizer.weight_decay is .*finite'):
    resolve(config)


def test_all_numbers_of_a_sequence_are_reported():
  config = digits_lt.get_config('ldam_drw')
  config.epochs = float('nan')
  with pytest.raises(UserError, match='config.epochs is nan.*: give finite numbers'):
    resolve(config)


def test_a_schedule_ends_with_the_training_unless_its_end_is_set():
  config = my_images.get_config('crt')
  assert resolve(config)['schedule']['end'] == 60
  classifier = resolve(config)['stages']['classifier']
  assert classifier['schedule']['end'] == classifier['epochs'] != 60
  config.epochs, config.stages.classifier.epochs = 3.0, 2.0
  resolved = resolve(config)
  assert resolved['schedule']['end'] == 3
  assert stage_config(resolved, 'train')['schedule']['end'] == 3
  assert stage_config(resolved, 'classifier')['schedule']['end'] == 2
  checks.check_end({n: stage_config(resolved, n) for n in resolved['stage_order']})
  config.schedule.end = 4.0
  config.epochs = 5.0
  assert resolve(config)['schedule']['end'] == 4


@pytest.mark.parametrize(
  'get_config', [my_images.get_config, digits_domains.get_config]
)
def test_a_config_whose_schedule_has_no_steps_is_shortened_by_its_epochs(get_config):
  config = get_config()
  config.epochs = 3.0
  resolved = resolve(config)
  checks.check_end({n: stage_config(resolved, n) for n in resolved['stage_order']})


def test_evaluation_is_padded_and_leaves_no_device_idle():
  config = resolve(digits_lt.get_config('ce'))
  for size, padded in ((1, 8), (100, 104)):
    built = build.build({**config, 'eval_batch': size})
    assert built.mesh.size == 8
    one = built.passes['test']
    assert one.examples == 400 and len(one.stream.payload(0)['mask']) == padded


def test_a_number_is_a_weight_decay_for_every_parameter():
  assert as_rules('decay', 5e-4) == (('.*', 5e-4),)
  assert as_rules('decay', (5e-4,)) == (('.*', 5e-4),)  # from the command line
  rules = [['net/head/bias', 0], 5e-4]
  assert as_rules('decay', rules) == (('net/head/bias', 0), ('.*', 5e-4))
  make_optimizer('sgd', lambda step: 0.1, weight_decay=5e-4)


def test_a_protocol_can_be_chosen():
  config = resolve(cifar10_lt.get_config('cb_ce,protocol=cao'))
  assert config['schedule']['warmup'] == 'staircase'
  with pytest.raises(UserError, match="did you mean 'cao'"):
    cifar10_lt.get_config('ce,protocol=caoo')


def test_schedules_scale_with_the_epochs():
  config = resolve(cifar10_lt.get_config('ce_drw,epochs=40'))
  assert config['schedule']['boundaries'] == [32, 36]
  assert config['class_weights']['start_epoch'] == 32


def test_head_and_margin_share_one_scale():
  config = digits_lt.get_config('ldam_drw')
  config.loss.scale = 20.0
  assert resolve(config)['model']['head_options']['scale'] == 20.0


@pytest.mark.parametrize(
  ('arg', 'message'),
  [
    ('ldam_drv', "unknown recipe 'ldam_drv'; did you mean 'ldam_drw'"),
    ('ce,imbalence=3', "unknown option 'imbalence' of the config; did you mean"),
    ('ce,imbalance=big', "option imbalance='big' of the config is not a number"),
    ('ce,epochs=0', 'option epochs=0 of the config must be positive and finite'),
    ('ce,epochs=nan', 'option epochs=nan of the config must be positive and finite'),
    ('ce,imbalance=inf', 'option imbalance=inf of the config must be positive'),
  ],
)
def test_mistakes_in_the_argument_are_reported(arg, message):
  with pytest.raises(UserError, match=message):
    cifar10_lt.get_config(arg)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'reduction': 'meen'}, "unknown reduction 'meen'; did you mean 'mean'"),
    ({'loss': {'name': 'softmax_focal', 'gama': 1.0}}, "no option 'gama'"),
    ({'optimizer': {'name': 'sgdd'}}, "did you mean 'sgd'"),
    ({'sampler': {'name': 'instnce'}}, "did you mean 'instance'"),
    ({'wrappers': {'emma': {'decay': 0.9}}}, "did you mean 'ema'"),
    ({'wrappers': {'ema': {}}}, "needs the option 'decay'"),
    ({'surgeries': [['coppy', {}]]}, "did you mean 'copy'"),
    ({'stage_order': ['trian']}, "did you mean 'train'"),
    (
      {'stages.train': {'epohs': 1.0}},
      "stage 'train' cannot set 'epohs'; did you mean 'epochs'",
    ),
    ({'select': 'best'}, 'use .last., or a form like'),
    ({'model.batch_norm': 7}, 'model.batch_norm is 7'),
    ({'model.batch_norm': 'globl'}, "model.batch_norm is 'globl'"),
    ({'model.trunk': 'digits_cn'}, "did you mean 'digits_cnn'"),
    ({'model.head': 'linaer'}, "did you mean 'linear'"),
    ({'data.known_classes': 11}, 'data.known_classes is 11'),
    ({'data.profile': 'exponentail'}, "did you mean 'exponential'"),
    ({'data.source': 'digitz'}, "did you mean 'digits'"),
    ({'data.pad_mode': 'zeros'}, "did you mean 'zero'"),
    ({'data.test_per_class': 0}, 'has no test split'),
    ({'data.sede': 1}, "data has no option 'sede'; did you mean 'seed'"),
    ({'stages.train': {'seed': 9}}, "stage 'train' cannot set 'seed'"),
    ({'stage_order': []}, 'must name each stage exactly once'),
    ({'stage_order': ['train', 'train']}, 'must name each stage exactly once'),
    ({'penalty': {'name': 'lade', 'weight': -1.0}}, 'penalty.weight is -1'),
    ({'batch': 0}, 'batch is 0; it must be from 1'),
    ({'epochs': -1.0}, 'epochs is -1.0'),
    ({'epochs': float('nan')}, 'epochs is nan'),
    ({'epochs': 1e9}, r'epochs is 1e\+09, which is [\d,]+ steps; a run has at most'),
    ({'optimizer.momentum': 1.5}, 'optimizer.momentum is 1.5; it must be from 0 to 1'),
    (
      {'optimizer.weight_decay': -1.0},
      'weight_decay is -1.0; it must be a number >=',
    ),
    (
      {'loss': {'name': 'cross_entropy', 'label_smoothing': 1.5}},
      'loss.label_smoothing is 1.5; it must be from 0 to 1',
    ),
    ({'data.pad': 1000}, 'data.pad is 1000'),
    ({'log_every_steps': 0}, 'log_every_steps is 0'),
    ({'keep_checkpoints': -1}, 'keep_checkpoints is -1'),
    ({'seed': -1}, 'seed is -1'),
    ({'seed': 2**31}, 'seed is 2147483648; it must be from 0 to 2147483647'),
    ({'method.accumulate': 0}, 'method.accumulate is 0'),
    ({'streams.meta': {'split': 'meta'}}, "does not read the stream 'meta'"),
    ({'data.test_per_class': -5}, 'data.test_per_class is -5'),
    ({'data.pad': -1}, 'data.pad is -1'),
    ({'data.mean': [0.5, 0.5]}, 'must be one number: the images have 1 channel$'),
    ({'data.std': [0.0]}, 'must be positive'),
    ({'select': 'val/class_accuracy'}, "unknown metric to select by 'class_accuracy'"),
    ({'wrappers': {'ema': {'decay': 1.5}}}, 'decay must be in'),
    ({'device': 'gpu'}, "config.device is 'gpu'"),
    ({'model.dtype': 'bf16'}, "unknown model.dtype 'bf16'; did you mean 'bfloat16'"),
    ({'surgeries': [['copy']]}, r"surgeries has \['copy'\]; each must be a name and"),
    ({'surgeries': ['copy']}, "surgeries has 'copy'; each must be a name and"),
    ({'surgeries': [['copy', 'train']]}, 'each must be a name and its options'),
    (
      {'optimizer.weight_decay': ['x']},
      r"optimizer.weight_decay is \['x'\]; it must be a number >= 0",
    ),
    ({'optimizer.weight_decay': [['.*', 1e999]]}, 'weight_decay is .*a number >= 0'),
    (
      {'class_weights': {'name': 'effective_number', 'beta': 1.5}},
      'class_weights.beta is 1.5; it must be from 0 to 1',
    ),
    (
      {'select': 'val/accuracy', 'data.val_per_class': 0},
      "select is 'val/accuracy', but there are no val.* data.val_per_class above 0",
    ),
    (
      {'optimizer.weight_decay': [['.*']]},
      'weight_decay is .*; it must be a number >= 0',
    ),
    (
      {'optimizer.learning_rate_scale': 'x'},
      "learning_rate_scale is 'x'; it must",
    ),
    ({'optimizer.momentum': 'x'}, "'sgd': momentum is 'x'; it must be a number"),
    ({'optimizer.momentum': True}, "'sgd': momentum is True; it must be a number"),
    ({'optimizer.nesterov': 'no'}, "nesterov is 'no'; it must be True or False"),
    (
      {'schedule.boundaries': 'x'},
      "'step_decay': boundaries is 'x'; it must be a l",
    ),
    ({'schedule.factors': ['x', 2]}, "an element is 'x'; it must be a number"),
    ({'schedule': {'name': 'constant'}}, "schedule is {'name': 'constant'}: .*'base'"),
    ({'loss': {}}, "loss is {}: .*'name'"),
    ({'data.mean': ['x']}, 'must be one number: the images have 1 channel$'),
    ({'data.n_max': 900}, 'digits: class 0: .* images asked'),
    (
      {'shot_groups': ['many', 'few'], 'data.many_shot': 999, 'data.few_shot': 1},
      'shot_groups: no class is in many or few; .* data.many_shot and data.few_shot',
    ),
  ],
)
def test_mistakes_in_a_config_are_reported_before_anything_runs(change, message):
  config = resolve(digits_lt.get_config('ce'))
  for key, value in change.items():
    *path, last = key.split('.')
    place = config
    for part in path:
      place = place[part]
    place[last] = value
  with pytest.raises(UserError, match=message) as error:
    build.build(config)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('kind', 'groups'), [('global', 1), ('per_device', 8), (16, 4)]
)
def test_batch_statistics_by_name(monkeypatch, kind, groups):
  seen = {}
  monkeypatch.setattr(
    build, 'make_classifier', lambda *args, **options: seen.update(options)
  )
  config = resolve(digits_lt.get_config('ce'))
  labels = np.arange(8)
  splits = {'train': Split(None, labels, labels, {})}
  data = dataset.Dataset(splits, {}, np.ones(8), tuple('01234567'), (8, 8, 1), '')
  mesh = sharding.make_mesh(8)
  build._network({**config['model'], 'batch_norm': kind}, data, 64, 1, mesh)
  assert seen['batch_norm'] == {'groups': groups, 'frozen': False}


def test_an_older_config_is_read_under_the_keys_of_today():
  now = resolve(digits_lt.get_config('fslwf'))
  older = json.loads(
    json.dumps(now)
    .replace('"save_outputs"', '"leaves"')
    .replace('"shot_groups"', '"classes"')
  )
  for key in ADDED:
    del older[key]
  older |= {'streams': {}, 'train_split': 'train', 'meta_batch': 0, 'meta_every': 1}
  del older['streams']
  generator = older['stages']['generator']
  generator['stream'] = generator.pop('streams')['train']
  assert upgraded(older) == now


@pytest.mark.parametrize('recipe', ['l2rw', 'meta_ce'])
def test_two_older_methods_are_settings_of_one(recipe):
  now = resolve(digits_lt.get_config(recipe))
  older = json.loads(json.dumps(now))
  stage = older if recipe == 'l2rw' else older['stages']['meta']
  for option in ('prior', 'clip', 'normalise'):
    del stage['method'][option]
  if recipe == 'l2rw':
    options = ('low_memory', 'meta_layers', 'route', 'virtual')
    kept = {option: older['method'][option] for option in options}
    older['method'] = {'name': 'l2rw', **kept}
    older['class_weights'] = {'name': 'uniform', 'start_epoch': 0.0}
  assert older != now and upgraded(older) == now == upgraded(now)


def test_the_meta_batch_of_an_older_config_is_a_stream():
  now = resolve(digits_lt.get_config('meta_ce'))
  older = json.loads(json.dumps(now)) | {'stream': {'name': 'images'}}
  del older['streams'], older['stages']['meta']['streams']
  older['stages']['meta']['meta_batch'] = 64
  assert upgraded(older) == now


def test_the_weight_network_of_an_older_config_is_a_player():
  now = resolve(digits_lt.get_config('mwn'))
  older = json.loads(json.dumps(now))
  weight_net = older.pop('players')['weight_net']
  older['method'] |= {
    'hidden': weight_net['network']['hidden'],
    'weight_optimizer': weight_net['optimizer'],
    'weight_learning_rate': weight_net['schedule']['base'],
  }
  assert upgraded(older) == now
