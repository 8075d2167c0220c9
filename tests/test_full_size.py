"""Miniatures of ImageNet, iNaturalist 2018 and Places-LT with unchanged configs."""

import numpy as np
import pytest
from etils import epath

from configs import imagenet, imagenet_lt, inat18, places_lt
from lt_jax import build, evaluate, report, run
from lt_jax.config import resolve
from lt_jax.data import reading
from tests import mini

pytestmark = pytest.mark.usefixtures('one_device')


STEPS = {
  'batch': 8,
  'eval_batch': 63,
  'log_every_steps': 1,
  'data.image_size': 32,
  'data.resize': 36,
  'model.trunk_options.width': 4,
}
"""Besides the data path, settings that make two steps of a large network fast."""


def small(config, **overrides):
  """Returns a config with miniature data, small images and few steps."""
  config.model.trunk_options.width = 64
  config.update_from_flattened_dict({**STEPS, **overrides})
  return resolve(config)


@pytest.fixture(scope='module')
def inat(tmp_path_factory):
  return mini.write_inat18(tmp_path_factory.mktemp('inat'), np.random.default_rng(0))


def test_inat18_from_records(inat, tmp_path):
  config = small(
    inat18.get_config('cb_focal,net=resnet10,epochs=0.001'),
    **{'data.dir': str(inat), 'data.workers': 1},
  )
  config['model'] |= {'trunk': 'digits_cnn', 'trunk_options': {'width': 4}}
  result = run.run(config, tmp_path)
  assert result['step'] == 3  # ceil(0.001 * 16293 / 8)
  assert np.isnan(result['test']['class_accuracy'][30])  # has no test image here
  assert result['select'] == 'last'
  assert {'many', 'medium', 'few'} <= set(result['test'])


@pytest.mark.slow
def test_imagenet_from_records(tmp_path):
  """It trains, can be evaluated again and has a page."""
  folder = mini.write_imagenet(tmp_path / 'data', np.random.default_rng(0))
  config = small(
    imagenet.get_config('cb_focal,net=resnet10,epochs=0.005'),
    **{'data.dir': str(folder), 'data.workers': 0},
  )
  result = run.run(config, tmp_path / 'run')
  assert result['step'] == 2  # ceil(0.005 * 2010 / 8)
  assert result['select'] == 'last' and len(result['test']['class_accuracy']) == 1000
  again = evaluate.evaluate(epath.Path(tmp_path / 'run'))
  assert again['test']['accuracy'] == result['test']['accuracy']
  assert 'cb\\_focal' in report.write(tmp_path / 'run').with_suffix('.md').read_text()


@pytest.mark.parametrize('recipe', ['meta_ce', 'crt', 'tau_norm', 'ldam_drw'])
def test_inat18_builds_with_the_recipes_of_its_papers(inat, recipe):
  options = {'data.dir': str(inat), 'data.workers': 0}
  if recipe == 'meta_ce':
    options['stages.meta.streams.meta.batch'] = 8
  config = small(inat18.get_config(f'{recipe},net=resnet10'), **options)
  experiment = build.build(config)
  counts = experiment.dataset.counts
  assert len(counts) == 8142
  meta = {'meta_ce': 2 * 8142, 'tau_norm': 8142}.get(recipe, 0)
  assert len(experiment.dataset.splits['train'].rows) == 16293 - meta * (
    recipe == 'tau_norm'
  )
  if meta:
    assert len(experiment.dataset.splits['meta'].rows) == meta
  assert len(experiment.dataset.tests['test'].rows) == 60


def test_labels_are_scanned_once(inat, tmp_path):
  """Without labels beside the records, the first run reads and stores all labels."""
  (home,) = (inat / 'i_naturalist2018').iterdir()
  for file in home.glob('lt_jax-labels-*'):
    file.unlink()
  config = small(
    inat18.get_config('ce,net=resnet10'), **{'data.dir': str(inat), 'data.workers': 0}
  )
  first = build.build(config).dataset
  stored = sorted(path.name for path in home.glob('lt_jax-labels-*'))
  assert stored == ['lt_jax-labels-train.npy', 'lt_jax-labels-validation.npy']
  second = build.build(config).dataset
  assert first.fingerprint == second.fingerprint
  np.testing.assert_array_equal(first.counts, second.counts)


@pytest.mark.parametrize(
  ('lists', 'images'),
  [
    ('standard', '256'),
    *(
      pytest.param(*pair, marks=pytest.mark.slow)
      for pair in (('standard', 'standard'), ('256', 'standard'), ('256', '256'))
    ),
  ],
)
def test_places_in_both_spellings(tmp_path, lists, images):
  folder, root = mini.write_places(
    tmp_path, np.random.default_rng(0), lists=lists, images=images
  )
  config = small(
    places_lt.get_config('ce,net=resnet10,epochs=0.001'),
    **{
      'data.source': f'list:{folder}',
      'data.dir': str(root),
      'data.workers': 0,
    },
  )
  if lists != images:  # because the spelling only matters for reading
    stream = build.build(config).stages['train'].streams['train']
    with reading.reading({'train': stream}, 0, 1) as read:
      assert read('train', 0)['image'].shape == (8, 32, 32, 3)
    return
  result = run.run(config, tmp_path / 'run')
  assert result['step'] == 1 and len(result['test']['class_accuracy']) == 365


WHOLE = {'batch': 2, 'eval_batch': 63, 'log_every_steps': 1, 'data.workers': 2}
"""What a small machine can bear of a network and images of full size."""


@pytest.fixture
def whole(request, tmp_path):
  """A config, unchanged except for its data, its batch and a single step."""
  config, write, options = request.param
  written = write(tmp_path, np.random.default_rng(0), **options)
  made = config.get_config('ce,epochs=0.00001')
  made.update_from_flattened_dict(WHOLE)
  if isinstance(written, tuple):  # lists, and the images that they name
    made.data.source, written = f'list:{written[0]}', written[1]
  made.data.dir = str(written)
  return resolve(made)


@pytest.mark.slow
@pytest.mark.parametrize(
  'whole',
  [
    (inat18, mini.write_inat18, {}),
    (imagenet_lt, mini.write_lists, {}),
    (places_lt, mini.write_places, {'lists': 'standard', 'images': 'standard'}),
  ],
  indirect=True,
)
def test_networks_of_full_size_on_images_of_full_size(whole, tmp_path):
  assert build.build(whole).dataset.image_shape == (224, 224, 3)
  assert run.run(whole, tmp_path / 'run')['step'] == 1


def test_generated_photographs_serve_a_config_unchanged():
  config = small(
    inat18.get_config('ce,net=resnet10,epochs=0.00001'),
    **{'data.source': 'fake', 'data.fake.val': 64, 'data.workers': 0},
  )
  experiment = build.build(config)
  assert experiment.stages['train'].plan.steps == 1
  stream = experiment.stages['train'].streams['train']
  with reading.reading({'train': stream}, 0, 1) as read:
    assert read('train', 0)['image'].shape == (8, 32, 32, 3)
