"""Feature files and other float arrays reach the head unchanged."""

import os
import pathlib

import jax
import numpy as np
import pytest
from etils import epath

from lt_jax import build, doctor, export, predict, run, train, trained
from lt_jax.config import apply, base_config, open_stages, resolve
from lt_jax.data import augment
from lt_jax.errors import UserError
from lt_jax.files import read_npz
from lt_jax.recipes import apply_recipe
from lt_jax.report import page, runs

CLASSES, WIDTH = 3, 5
SPLITS = {'a': 24, 'b': 15}


def features(rng, count, shift):
  """Counts that depend on the class; the last feature is constant."""
  label = np.arange(count) % CLASSES
  x = rng.poisson(5.0 + shift, (count, WIDTH))
  x[np.arange(count), label] += 20
  x[:, -1] = 0
  return x.astype(np.uint16), label


@pytest.fixture(scope='module')
def archive(tmp_path_factory):
  """A feature file with two domains and a pair of arrays for each."""
  path = tmp_path_factory.mktemp('features') / 'two.npz'
  rng = np.random.default_rng(0)
  made = {name: features(rng, count, 0) for name, count in SPLITS.items()}
  members = {f'x_{n}': x for n, (x, _) in made.items()}
  np.savez(path, **members, **{f'y_{n}': y for n, (_, y) in made.items()})
  return path


def split(name):
  return {'train_split': name, 'test_split': name}


def config(path, recipe='source_only', **data):
  made = base_config()
  overrides = {
    'name': 'features',
    'data': {'source': f'npz:{path}', 'unit': 'l1', 'standardise': True, **split('a')},
    'domains': {'other': split('b')},
    'target': ('other',),
    'batch': 8,
    'eval_batch': 8,
    'epochs': 4.0,
    'model': {'trunk': 'identity'},
    'schedule': {'name': 'constant', 'base': 0.05},
  }
  apply(made, overrides)
  made.data.update(data)
  return resolve(open_stages(apply_recipe(made, recipe)))


def reference(x):
  """Divides by the sum, then by domain to mean 0 and deviation 1, in float64."""
  x = x / x.sum(1, keepdims=True, dtype=np.float64)
  deviation = x.std(0)
  return (x - x.mean(0)) / np.where(deviation > 0, deviation, 1)


def seen(outputs, batch):
  return {'features': outputs['features'], 'index': batch['index']}


def test_features_reach_the_head_as_they_are(archive, tmp_path, one_device):
  made = config(archive)
  run.run(made, tmp_path)
  stored, stage = read_npz(archive), build.build(made).last
  network = trained.open_run(epath.Path(tmp_path))
  for name, where in {'a': 'train', 'b': 'target/train'}.items():
    found = stage.survey.collect(network.state, where, seen)
    expected = reference(stored[f'x_{name}'])
    np.testing.assert_allclose(found['features'], expected[found['index']], atol=2e-5)
  # On its own, the network treats features as it did the target's.
  outputs = jax.jit(network.predict)(
    network.state, stored['x_b'][:, None, None].astype(np.float32)
  )
  np.testing.assert_allclose(outputs['features'], expected, atol=2e-5)
  kernel = network.state.params['net']['head']['kernel']
  assert set(network.state.params['net']) == {'head'} and kernel.shape == (5, 3)

  photo = tmp_path / 'one.png'
  photo.write_bytes(b'')
  with pytest.raises(UserError, match='float arrays, but predict reads') as error:
    predict.predict(epath.Path(tmp_path), [str(photo)], str(tmp_path / 'found.csv'))
  assert '\n' not in str(error.value)
  for kind in export.FORMATS:  # each is read back and compared before it is accepted
    description = export.export(
      epath.Path(tmp_path), kind, tmp_path / f'network.{kind}'
    )
    assert description['image_dtype'] == 'float32'
  (found,) = runs.find(epath.Path(tmp_path))
  assert page._samples(found) is None  # float arrays are not images


def test_the_doctor_does_not_take_features_for_pictures(archive):
  for standardise, message in ((True, 'data.standardise'), (False, 'far from ')):
    case = doctor.Case(config(archive, standardise=standardise))
    sections = {'data': (doctor.Case.open,), 'images': doctor.SECTIONS['images']}
    found = [finding for _, finding in doctor.examine(case, sections)]
    assert not [finding for finding in found if finding.level == 'wrong']
    assert any(message in finding.text for finding in found)


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    ({'pad': 2}, "domain 'source' has float32 arrays, not images: set data.pad to 0"),
    ({'flip': True}, 'set data.flip to False'),
    ({'size': 8}, 'data.size and data.channels are for uint8 images'),
    ({'unit': 'l3'}, "unknown data.unit 'l3'; known: none, l1, l2"),
    ({'mean': (0.0, 0.0)}, 'must be one number or 5 numbers'),
    ({'train_split': 'c'}, 'has no split named c, only a, b: set data.train_split'),
    (
      {'source': 'fake', 'train_split': 'train', 'test_split': 'test'},
      'data.unit is for float arrays',
    ),
  ],
)
def test_mistakes_are_one_line(archive, data, message):
  with pytest.raises(UserError, match=message) as error:
    build.build(config(archive, **data))
  assert '\n' not in str(error.value)


def test_images_are_standardised_by_their_own_training_images(rng):
  images = rng.integers(0, 256, (7, 4, 4, 3), np.uint8)
  images[..., 2] = 9
  mean, std = augment.moments(images)
  values = images / 255
  np.testing.assert_allclose(mean, values.mean((0, 1, 2)), atol=1e-12)
  np.testing.assert_allclose(std[:2], values.std((0, 1, 2))[:2], atol=1e-12)
  assert std[2] == 1
  normal = np.asarray(augment.normalise(images, mean, std))
  np.testing.assert_allclose(normal.mean((0, 1, 2)), 0, atol=1e-5)


@pytest.mark.parametrize(
  ('source', 'target', 'published'),
  [
    ('caltech', 'amazon', 23.70),
    ('amazon', 'webcam', 29.83),
    ('webcam', 'dslr', 59.24),
  ],
)
def test_nearest_neighbours_on_real_features(source, target, published):
  """Matches Gong et al. 2012 on Office-Caltech, so the normalisation is right."""
  path = pathlib.Path(os.environ.get('LT_JAX_DATA', '')) / 'office_caltech10_surf.npz'
  if not path.exists():
    pytest.skip('LT_JAX_DATA names no folder with office_caltech10_surf.npz')
  made = config(path, **split(source))
  made['domains'] = {'other': split(target)}
  experiment = build.build(made, devices=1)
  stage = experiment.last
  key = jax.random.key(0)
  state = train.initial_state(stage.method, stage.streams, key, experiment.mesh)
  x, z = (
    stage.survey.collect(state, name, seen)['features'].astype(np.float64)
    for name in ('train', 'target/train')
  )
  distance = (x**2).sum(1) - 2 * z @ x.T
  known, true = (
    experiment.domains[name].splits['train'].labels for name in ('source', 'other')
  )
  right = known[distance.argmin(1)] == true
  assert 100 * right.mean() == pytest.approx(published, abs=0.01)
