"""The config for your own photographs: the splits it cuts off, and its shot bounds."""

import numpy as np
import pytest
from etils import epath

from configs import my_images
from lt_jax import build, run
from lt_jax.config import resolve
from lt_jax.errors import UserError
from tests import mini

pytestmark = pytest.mark.usefixtures('one_device')

COUNTS = {'heron': 21, 'kingfisher': 8, 'wren': 5}
TINY = {
  'model.trunk': 'tiny_cnn',
  'batch': 8,
  'eval_batch': 8,
  'data.workers': 0,
  'data.image_size': 8,
  'data.resize': 8,
}


def write_classes(folder, counts):
  rng = np.random.default_rng(0)
  for label, (name, count) in enumerate(counts.items()):
    (folder / name).mkdir(parents=True)
    for number in range(count):
      path = folder / name / f'{number}.jpg'
      path.write_bytes(mini.photograph(rng, label))


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp('my') / 'photos'
  write_classes(folder, COUNTS)
  return folder


def config(folder, recipe='ce,epochs=1.0'):
  made = my_images.get_config(f'{recipe},data={folder}')
  made.update_from_flattened_dict(TINY)
  return resolve(made)


def test_missing_splits_are_cut_from_training(photos):
  dataset = build.build(config(photos)).dataset
  assert dataset.class_names == tuple(COUNTS)
  assert dataset.counts.tolist() == [19, 6, 3]
  for split in (dataset.splits['val'], dataset.tests['test']):
    assert np.bincount(split.labels).tolist() == [1, 1, 1]


def test_custom_splits_are_kept(tmp_path):
  for split in ('train', 'val', 'test'):
    write_classes(tmp_path / split, COUNTS)
  dataset = build.build(config(tmp_path)).dataset
  assert dataset.counts.tolist() == list(COUNTS.values())
  assert len(dataset.tests['test'].rows) == sum(COUNTS.values())


def test_a_class_that_can_spare_nothing_is_named(tmp_path):
  write_classes(tmp_path, COUNTS | {'wren': 2})
  with pytest.raises(UserError, match="class 'wren' has 2 images.* for val and test"):
    config(tmp_path)


def test_the_shot_bounds_come_from_the_data(photos, tmp_path):
  experiment = run.rehearsed(config(photos), tmp_path)
  facts = run._data_facts(experiment, epath.Path(tmp_path))
  assert facts['shot_bounds'] == {'many': 12.0, 'few': 3.0}
  assert experiment.groups['many'].tolist() == [True, False, False]
  chosen = experiment.last.select
  assert (chosen.split, chosen.metric) == ('val', 'macro_accuracy')
