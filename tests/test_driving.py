"""Configs for real label maps: they build and run on miniatures in the real layouts."""

import json
import signal

import jax
import numpy as np
import pytest

from configs import (
  c_driving,
  camvid_dusk,
  cityscapes_foggy,
  gta5_cityscapes,
  synthia_cityscapes,
)
from lt_jax import build, run, train
from lt_jax.config import resolve
from tests import child, trees
from tests.test_masks import archive


def foggy(root):
  trees.cityscapes(root)
  ending = '_leftImg8bit_foggy_beta_0.02.png'
  trees.cityscapes(root, 'leftImg8bit_foggy', ending)


def bdd100k(root):
  trees.bdd100k(root)
  names = {'snowy': 'snowy', 'partly cloudy': 'cloudy', 'overcast': 'overcast'}
  rows = []
  for folder, name in names.items():
    trees.photograph(root / 'images' / '100k' / 'train' / f'{name}.jpg')
    trees.photograph(root / 'images' / '10k' / 'val' / f'{name}_val.jpg')
    mask = root / 'labels' / 'sem_seg' / 'masks' / 'val' / f'{name}_val.png'
    trees.save(mask, trees.ids(values=(0, 1, 18, 255)))
    rows += [(name, folder), (f'{name}_val', folder)]
  entries = [{'name': f'{n}.jpg', 'attributes': {'weather': w}} for n, w in rows]
  (root / 'labels' / 'more_train.json').write_text(json.dumps(entries))


CONFIGS = {
  'gta5_cityscapes': (
    gta5_cityscapes,
    {'source': trees.gta5, 'cityscapes': trees.cityscapes},
  ),
  'synthia_cityscapes': (
    synthia_cityscapes,
    {'source': trees.synthia, 'cityscapes': trees.cityscapes},
  ),
  'cityscapes_foggy': (cityscapes_foggy, {'source': foggy, 'foggy': foggy}),
  'c_driving': (
    c_driving,
    {
      'source': trees.gta5,
      **dict.fromkeys(('rainy', 'snowy', 'cloudy', 'overcast'), bdd100k),
    },
  ),
}


def config(name, arg, folder, **changes):
  """Returns a config on miniatures, with images resized so networks leave a map."""
  module, writers = CONFIGS[name]
  made = module.get_config(arg)
  for number, write in enumerate(dict.fromkeys(writers.values())):
    write(folder / str(number))
    for domain in (d for d, w in writers.items() if w is write):
      data = made.data if domain == 'source' else made.domains[domain]
      kind = data.source.partition(':')[0]
      data.source = f'{kind}:{folder / str(number)}'
  for data in (made.data, *made.domains.values()):
    if data.get('resize_to'):
      data.resize_to = (40, 56) if data is made.data else (32, 48)
  made.data.workers = 0
  made.update(changes)
  return resolve(made)


@pytest.mark.parametrize(
  ('name', 'arg'),
  [
    ('gta5_cityscapes', 'advent,net=resnet50'),
    ('synthia_cityscapes', 'minent_cp,net=small'),
    ('synthia_cityscapes', 'source_only,classes=13,net=lite0'),
    ('cityscapes_foggy', 'target_only,net=vgg16'),
    ('c_driving', 'ocda'),
  ],
)
def test_a_config_builds_on_a_miniature_in_the_real_layout(tmp_path, name, arg):
  made = config(name, arg, tmp_path)
  experiment = build.build(made, devices=1)
  stage = experiment.last
  train.state_shapes(stage.method, stage.streams)
  batch = {name: stream.payload(0) for name, stream in stage.streams.items()}
  by_target = arg.startswith('target_only')
  size = (40, 56)
  assert batch['train']['image'].shape == (1, *size, 3)
  assert batch['train']['label'].shape == (1, *size)
  assert stage.uses_target_labels == by_target
  if 'target' in batch:
    assert 'label' not in batch['target']
    assert batch['target']['image'].shape == (1, 32, 48, 3)
  for split, one in stage.passes.items():
    payload, shapes = one.stream.payload(0), one.stream.shapes
    assert {n: x.shape for n, x in payload.items()} == {
      n: x.shape for n, x in shapes.items()
    }, split
  assert stage.passes['test'].stream.shapes['label'].shape == (1, 12, 16)
  if name == 'c_driving':
    params = train.state_shapes(stage.method, stage.streams).params['net']['head']
    assert params['head']['hidden2']['kernel'].shape == (3, 3, 1024, 1024)
    branches = [x.shape for x in jax.tree.leaves(params['head']['main']) if x.ndim == 4]
    assert branches == 4 * [(3, 3, 1024, 19)]
    assert stage.reads['target'].ordered_by == 'target/train/domain_distance'


def test_weathers_are_one_target_and_overcast_is_open(tmp_path):
  made = config('c_driving', 'source_only,net=small', tmp_path)
  experiment = build.build(made, devices=1)
  assert experiment.roles['target'] == ('rainy', 'snowy', 'cloudy')
  assert experiment.roles['open'] == ('overcast',)
  names = ('rainy', 'snowy', 'cloudy', 'overcast')
  tested = {n: len(experiment.domains[n].tests['test'].rows) for n in names}
  assert tested == {'rainy': 2, 'snowy': 1, 'cloudy': 2, 'overcast': 2}
  joint = experiment.last.images['test']
  assert joint.domain.tolist() == [0, 0, 1, 2, 2] and joint.of_pixels
  np.testing.assert_array_equal(joint.class_pixels(19).sum(1) > 0, True)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'recipe'), [('gta5_cityscapes', 'advent'), ('c_driving', 'ocda')]
)
def test_a_miniature_goes_through_a_config_from_end_to_end(tmp_path, name, recipe):
  made = config(
    name, f'{recipe},net=small,steps=100000', tmp_path / 'data', save_every_epochs=10.0
  )
  made |= {'evaluate_every_epochs': 10.0, 'log_every_steps': 2}
  result = run.run(made, tmp_path / 'run')
  assert len(result['test']['iou_by_class']) == 19
  assert 0 <= result['test']['miou'] <= 1


def test_day_and_dusk_from_archives(tmp_path):
  made = camvid_dusk.get_config('minent')
  made.data.source = archive(tmp_path / 'day.npz')
  dark = np.zeros((3, 4, 5, 3), np.uint8)
  made.domains.dusk.source = archive(tmp_path / 'dusk.npz', x_train=dark)
  made.batch = 2
  stage = build.build(resolve(made), devices=1).last
  assert stage.streams['train'].payload_shapes().keys() == {'index'}
  state = train.state_shapes(stage.method, stage.streams)
  assert jax.tree.leaves(state.params)


PAIRS = {
  'scenes': ('train=16,steps=6', ['--config.model.trunk_options.width=4']),
  'camvid_dusk': ('steps=200', []),  # of 305 images; 8 of the few here
}
"""Config of a pair that every machine can train on -> (its argument, overrides)."""


@pytest.mark.slow
@pytest.mark.parametrize('name', PAIRS)
def test_a_killed_adaptation_and_any_number_of_devices_end_alike(tmp_path, name):
  """The commands themselves: bit-equal after kill -9, nearly so on 1, 2, 8 devices."""
  argument, given = PAIRS[name]
  given += [
    '--config.batch=8',
    '--config.eval_batch=8',
    '--config.save_every_epochs=0.5',
    '--config.log_every_steps=2',
  ]
  if name == 'camvid_dusk':
    rng = np.random.default_rng(0)
    for domain, data in (('day', 'data'), ('dusk', 'domains.dusk')):
      images = rng.integers(0, 256, (2, 24, 45, 60, 3), np.uint8)
      maps = rng.integers(0, 11, (2, 24, 45, 60), np.uint8)
      given.append(f'--config.{data}.source=npz:{tmp_path / domain}.npz')
      np.savez(
        tmp_path / f'{domain}.npz',
        x_train=images[0],
        y_train=maps[0],
        x_test=images[1][:8],
        y_test=maps[1][:8],
        class_names=[f'class {number}' for number in range(11)],
      )

  def ended(folder, fault=''):
    workdir = tmp_path / folder
    made = child.command(
      workdir, *given, config=f'{name}.py:advent,{argument}', fast=()
    )
    code = child.run(made, tmp_path / 'log', fault)
    assert code == (-signal.SIGKILL if 'kill' in fault else 0), (
      tmp_path / 'log'
    ).read_text()
    return workdir

  def result(workdir):
    return json.loads((workdir / 'result.json').read_text())

  whole = result(ended('whole', 'devices:1'))
  ended('killed', 'devices:1+kill_in_save:2')
  killed = result(ended('killed', 'devices:1'))
  assert 'resuming from' in (tmp_path / 'log').read_text()
  assert killed['state_sha256'] == whole['state_sha256']
  assert killed['test'] == whole['test']
  for devices in (2, 8):
    found = result(ended(f'on{devices}', f'devices:{devices}'))
    np.testing.assert_allclose(found['test']['loss'], whole['test']['loss'], rtol=1e-3)
    assert abs(found['test']['miou'] - whole['test']['miou']) < 0.01
