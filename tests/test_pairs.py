"""Configs for pairs of domains: features and photographs, with small files."""

import os
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from configs import my_domains, office31, office_caltech10, pacs, synsigns_gtsrb
from lt_jax import build, results, run, train
from lt_jax.cautions import cautions
from lt_jax.config import resolve, stage_config
from lt_jax.errors import UserError

CLASSES, WIDTH = 3, 12
COUNTS = {'amazon': 60, 'webcam': 45, 'caltech': 48, 'dslr': 36}


@pytest.fixture(scope='module')
def features(tmp_path_factory):
  """A file with a pair of arrays for each domain."""
  rng, path = np.random.default_rng(0), tmp_path_factory.mktemp('pairs') / 'all.npz'
  members = {'classes': np.array(['mug', 'pen', 'file'])}
  centres = rng.poisson(6.0, (CLASSES, WIDTH))
  for name, count in COUNTS.items():
    label = np.arange(count) % CLASSES
    members |= {f'x_{name}': centres[label] + rng.poisson(3.0, (count, WIDTH))}
    members |= {f'y_{name}': label}
  np.savez(path, **members)
  return path


def trained_for(config):
  experiment = build.build(config, devices=1)
  return {name: stage.plan.steps for name, stage in experiment.stages.items()}


@pytest.mark.parametrize('recipe', ['source_only', 'target_only', 'dann', 'dan', 'mcc'])
def test_office_31_on_features_has_a_bottleneck(features, recipe, monkeypatch):
  images = {**office31.OFFICE31.images, 'amazon': 60, 'webcam': 45}
  monkeypatch.setattr(office31, 'OFFICE31', office31.OFFICE31._replace(images=images))
  made = resolve(office31.get_config(f'{recipe},features={features}'))
  assert trained_for(made) == {'train': 1000}
  stage = build.build(made, devices=1).last
  params = train.state_shapes(stage.method, stage.streams).params
  assert params['net']['head']['kernel'].shape == (256, CLASSES)
  assert stage.batch == 32 and made['schedule']['end'] == made['epochs']
  if recipe == 'dann':
    kernels = {x.shape for x in jax.tree.leaves(params['discriminator'])}
    assert (256, 1024) in kernels and (1024, 1024) in kernels


def test_photographs_are_found_where_their_archives_have_them(tmp_path):
  for domain in ('photo', 'sketch'):
    for name in ('dog', 'horse'):
      folder = tmp_path / domain / name
      folder.mkdir(parents=True)
      for number in range(20):
        colours = np.full((40, 30, 3), 10 * number, np.uint8)
        Image.fromarray(colours).save(folder / f'{number}.jpg')
  made = pacs.get_config(f'dann,net=resnet10,data={tmp_path},size=32,steps=5')
  made.batch = made.streams.target.batch = 8
  experiment = build.build(resolve(made), devices=1)
  assert experiment.dataset.class_names == ('dog', 'horse')
  assert len(experiment.domains['sketch'].tests['test'].rows) == 40
  rates = dict(resolve(made)['optimizer']['learning_rate_scale'])
  assert rates == {'net/(head|projection)/.*': 1.0, '.*': 0.1}


def test_photographs_of_ones_own_in_two_domains(tmp_path):
  for domain in ('photos', 'sketches'):
    for name, count in (('dog', 20), ('horse', 15)):
      folder = tmp_path / domain / name
      folder.mkdir(parents=True)
      for number in range(count):
        colours = np.full((40, 30, 3), 10 * number, np.uint8)
        Image.fromarray(colours).save(folder / f'{number}.png')
  folders = f'source={tmp_path}/photos,target={tmp_path}/sketches'
  made = my_domains.get_config(f'mcc,net=resnet10,size=32,epochs=1,{folders}')
  made.batch = made.streams.target.batch = 8
  experiment = build.build(resolve(made), devices=1)
  target = experiment.domains['unlabelled']
  assert len(target.tests['test'].rows) == 2 * 3
  assert len(target.splits['train'].rows) == 35 - 2 * 2 * 3
  assert not experiment.last.uses_target_labels
  assert 'label' not in experiment.last.streams['target'].payload(0)


@pytest.fixture
def unlabelled(tmp_path):
  """A folder of photographs with classes, and one without."""
  for folder, count in (('photos/dog', 20), ('photos/horse', 15), ('sketches', 12)):
    (tmp_path / folder).mkdir(parents=True)
    for number in range(count):
      colours = np.full((40, 30, 3), 10 * number + len(folder), np.uint8)
      Image.fromarray(colours).save(tmp_path / folder / f'{number}.png')
  return f'source={tmp_path}/photos,target={tmp_path}/sketches'


def of_ones_own(recipe, folders, **changes):
  made = my_domains.get_config(f'{recipe},net=resnet10,size=32,epochs=1,{folders}')
  made.batch = 8
  for stream in made.streams.values():
    stream.batch = 8
  made.update_from_flattened_dict(changes)
  return build.build(resolve(made), devices=1)


def test_a_target_without_labels_is_adapted_to_and_not_measured(unlabelled):
  experiment = of_ones_own('mcc', unlabelled)
  stage, target = experiment.last, experiment.domains['unlabelled']
  assert target.class_names == ('dog', 'horse') and not target.tests
  assert len(target.splits['train'].rows) == 12 and not target.has_labels
  assert 'label' not in stage.streams['target'].payload(0)
  assert set(stage.passes) == {'val', 'test'}
  assert stage.images['test'] is experiment.domains['source'].tests['test']
  assert results.test_domains(experiment, stage) == ('source',)
  (line,) = (line for line in cautions(experiment) if 'no labelled' in line)
  assert line.endswith("'test' measures images of 'source' instead")


@pytest.mark.slow
def test_translations_of_a_target_without_labels_are_of_the_source(unlabelled):
  experiment = of_ones_own('i2i', unlabelled, **{'model.trunk': 'lenet'})
  stage = experiment.last
  state = train.initial_state(
    stage.method, stage.streams, jax.random.key(0), experiment.mesh
  )
  found = results._translations(experiment, stage, state)
  assert found and all(name.startswith('source/test/') for name in found)


@pytest.mark.parametrize(
  ('recipe', 'changes', 'message'),
  [
    ('target_only', {}, "the images of 'target' have no labels, which this recipe"),
    ('mcc', {'domains.unlabelled.n_max': 5}, 'data.n_max is for images with classes'),
    ('finetune_target_1', {}, 'or choose a recipe that needs no labels of a target'),
    ('mcc', {'target': ('unlabelled', 'more')}, 'are one target, but only the second'),
    ('mcc', {'sources': ('unlabelled',), 'target': ('more',)}, 'which only a target'),
  ],
)
def test_what_needs_labels_of_a_target_is_told(unlabelled, recipe, changes, message):
  labelled = unlabelled.partition(',')[0].removeprefix('source=')
  more = {'source': f'folder:{labelled}', 'test_split': 'train'}
  with pytest.raises(UserError, match=message):
    of_ones_own(recipe, unlabelled, **{'domains.more': more}, **changes)


@pytest.mark.parametrize(
  ('arg', 'message'),
  [
    ('dann,source=amazone', "unknown domain of office31 'amazone'; did you mean"),
    ('dann,target=amazon', "source and target are both 'amazon'"),
  ],
)
def test_mistakes_are_reported(arg, message):
  with pytest.raises(UserError, match=message):
    office31.get_config(arg)


@pytest.mark.parametrize(
  ('given', 'missing'), [('source', 'target'), ('target', 'source')]
)
def test_one_folder_of_two_is_not_paired_with_generated_images(given, missing):
  with pytest.raises(UserError, match=f'{missing}= is missing: give both folders'):
    my_domains.get_config(f'dann,{given}=photos')


def test_traffic_signs_have_the_network_of_the_paper():
  made = stage_config(resolve(synsigns_gtsrb.get_config('dann')), 'train')
  assert (made['model']['trunk'], made['data']['size']) == ('gtsrb_dann', 40)
  from lt_jax.models import make_classifier

  net = make_classifier('gtsrb_dann', 'linear', 43)
  images = np.zeros((2, 40, 40, 3), np.float32)
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), images, train=False))
  outputs = jax.eval_shape(
    lambda: net.apply(
      net.init(jax.random.key(0), images, train=False), images, train=False
    )
  )
  assert outputs['conv'].shape == (2, 1024) and outputs['features'].shape == (2, 512)
  kernels = [x.shape for x in jax.tree.leaves(shapes['params']['trunk']) if x.ndim > 1]
  wanted = [(5, 5, 3, 96), (3, 3, 96, 144), (5, 5, 144, 256), (1024, 512)]
  assert kernels == wanted


@pytest.mark.parametrize(
  'recipe',
  ['sa', pytest.param('coral_shallow,classifier=linear_svm', marks=pytest.mark.slow)],
)
def test_stages_without_steps_on_features(features, tmp_path, one_device, recipe):
  option = f'source=dslr,target=webcam,features={features}'
  made = office_caltech10.get_config(f'{recipe},{option}')
  made.eval_batch = 16
  stage = made.stages[made.stage_order[-1]]
  if recipe == 'sa':
    stage.wrappers.aligned_subspaces = {'dimensions': (2, 3)}
    assert 'nearest_neighbour' in stage.wrappers and 'linear_svm' not in stage.wrappers
  result = run.run(resolve(made), tmp_path)
  assert result['step'] == 0 and not result['uses_target_labels']
  assert result['test']['accuracy'] > 0.8 and result['domains']['source']
  if recipe == 'sa':
    assert result['memory']['subspaces.dimension'] in (2, 3)
  assert not any('untrained' in line for line in result['warnings'])


def test_nearest_neighbours_on_real_features_are_the_published_ones(
  tmp_path, one_device
):
  """Matches Gong et al. 2012 on Office-Caltech, through the whole command."""
  path = pathlib.Path(os.environ.get('LT_JAX_DATA', '')) / 'office_caltech10_surf.npz'
  if not path.exists():
    pytest.skip('LT_JAX_DATA names no folder with office_caltech10_surf.npz')
  option = f'source=dslr,target=webcam,features={path}'
  made = office_caltech10.get_config(f'nearest_neighbour,{option}')
  result = run.run(resolve(made), tmp_path)
  assert round(100 * result['test']['accuracy'], 2) == 63.39
