"""Probes of layers: measurements, and the command's files."""

import json

import jax
import numpy as np
import pytest
from absl import flags
from etils import epath
from sklearn.metrics import average_precision_score

from configs import digits_lt
from lt_jax import build, probe, train
from lt_jax.config import resolve
from lt_jax.errors import UserError
from lt_jax.evals import probing
from lt_jax.models.taps import tapped
from lt_jax.report.pictures import uri
from tests import child

CLASSES, WIDTH = 4, 6
SPLITS = ('train', 'test')


@pytest.fixture(scope='module')
def images():
  """Training and test features of well-separated classes, one of them rare."""
  rng = np.random.default_rng(0)
  centres = 3 * rng.normal(size=(CLASSES, WIDTH))

  def draw(counts):
    labels = np.repeat(np.arange(CLASSES), counts)
    x = centres[labels] + rng.normal(size=(len(labels), WIDTH))
    return probing.Images(x.astype(np.float32), labels)

  return draw((20, 20, 20, 3)), draw((10, 10, 10, 0))


def test_maps_are_averaged_to_the_budget(rng):
  x = rng.normal(size=(2, 7, 7, 5)).astype(np.float32)
  np.testing.assert_array_equal(probing.pooled(x, 0), x.reshape(2, -1))
  np.testing.assert_array_equal(probing.pooled(x, 245), x.reshape(2, -1))
  four = np.asarray(probing.pooled(x, 30)).reshape(2, 2, 2, 5)
  for i, j in np.ndindex(2, 2):  # the squares overlap in the middle row
    part = x[:, 3 * i : 3 * i + 4, 3 * j : 3 * j + 4].mean((1, 2))
    np.testing.assert_allclose(four[:, i, j], part, atol=1e-6)
  np.testing.assert_allclose(probing.pooled(x, 3), x.mean((1, 2)), atol=1e-6)
  flat = x[:, 0, 0]
  np.testing.assert_array_equal(probing.pooled(flat, 3), flat)


def test_fewer_images_are_among_more(images):
  labels = images[0].labels
  place = probing.places_in_class(labels, 1)
  for k in (1, 2, 5):
    chosen = np.bincount(labels[place < k], minlength=CLASSES)
    np.testing.assert_array_equal(chosen, [k, k, k, min(k, 3)])
  assert (place != probing.places_in_class(labels, 2)).any()


@pytest.mark.parametrize('name', ['svm', 'class_means'])
def test_a_probe_measures_classes_alike(images, name):
  groups = {'many': np.arange(CLASSES) < 2, 'few': np.arange(CLASSES) == 3}
  draws = probing.Draws(shots=(1, 5, 0), draws=3, folds=2)
  one, five, whole = probing.probe(name, *images, CLASSES, groups, draws)
  assert [len(row['accuracy']) for row in (one, five, whole)] == [3, 3, 1]
  assert np.mean(five['accuracy']) > 0.85
  assert five['by_class'][3] is None and whole['groups']['few'] == [None]
  known = [value for value in whole['by_class'] if value is not None]
  assert whole['accuracy'][0] == pytest.approx(np.mean(known))
  both = np.mean(whole['by_class'][:2])
  assert whole['groups']['many'][0] == pytest.approx(both)


def test_retrieval_is_that_of_ranked_lists(images):
  gallery, queries = images
  found = probing.retrieval(queries, gallery, ranks=(1, 3))
  centre = gallery.features.mean(0)
  a, b = queries.features - centre, gallery.features - centre
  cosine = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
  same = queries.labels[:, None] == gallery.labels
  wanted = [average_precision_score(s, c) for s, c in zip(same, cosine, strict=True)]
  assert found['mean_average_precision'] == pytest.approx(np.mean(wanted), abs=1e-6)
  order = np.argsort(-cosine, axis=1)
  for k in (1, 3):
    hits = [s[o[:k]].any() for s, o in zip(same, order, strict=True)]
    assert found[f'recall@{k}'] == np.mean(hits)
  with pytest.raises(UserError, match='no query has a class'):
    probing.retrieval(queries._replace(labels=queries.labels + 9), gallery)


@pytest.fixture(scope='module')
def network():
  config = digits_lt.get_config('ce')
  config.model.trunk = 'tiny_cnn'
  experiment = build.build(resolve(config), devices=1)
  stage = experiment.last
  state = train.initial_state(
    stage.method, stage.streams, jax.random.key(0), experiment.mesh
  )
  return probe.Network(experiment, stage, state)


def test_the_last_shots_are_the_most():
  assert probe.ascending(['0', '5', '1', '5']) == [1, 5, 0]
  for given in ([], ['five']):
    with pytest.raises(UserError, match='--shots must be whole numbers, such as'):
      probe.ascending(given)


def test_every_layer_is_probed_and_kept(network, tmp_path, monkeypatch):
  layers = probe.chosen_layers(network, [])
  assert layers == ['conv1', 'conv2']
  out = epath.Path(tmp_path)
  draws = probing.Draws(shots=(2,), draws=2, folds=2)
  found = probe.probe(network, layers, ['ridge'], draws, out, budget=48, retrieves=True)
  assert json.loads(json.dumps(found)) == found
  values = {
    layer: layer_found['values'] for layer, layer_found in found['layers'].items()
  }
  assert values == {'conv1': 48, 'conv2': 24}  # 2x2 of 12 channels, 1x1 of 24
  assert '| conv2 | 24 |' in probe.table(found) and '<svg' in probe.figure(found)
  head, *rows = probe.shown(found).splitlines()[3:]
  assert head.split() == ['layer', 'values', 'ridge']
  assert ['conv2', '24'] in [row.split()[:2] for row in rows]
  sets = probe.cached(network, layers, 'test', out / 'features', 48)
  split = network.experiment.dataset.tests['test']
  x = (split.source.images[split.rows] / 255).astype(np.float32)
  data = network.experiment.data['source']
  x = (x - np.float32(data['mean'])) / np.float32(data['std'])
  state = network.state
  own = tapped(network.stage.net, state.params['net'], state.stats['net'], x)
  wanted = np.asarray(own['conv2']).mean((1, 2))
  np.testing.assert_allclose(sets['conv2'].features, wanted, atol=1e-4)
  np.testing.assert_array_equal(sets['conv2'].labels, split.labels)

  def not_called(*args):
    raise AssertionError('features were computed again')

  monkeypatch.setattr(probe, 'features', not_called)
  head = {'kernel': np.zeros((24, 8)), 'bias': np.zeros(8)}
  params = {'net': {**state.params['net'], 'head': head}}
  same = network._replace(state=state.replace(params=params))
  again = probe.probe(same, layers, ['ridge'], draws, out, budget=48, retrieves=True)
  assert again == found  # features do not depend on the head
  moved = jax.tree.map(lambda leaf: leaf + 1, state.params)
  with pytest.raises(AssertionError, match='computed again'):
    other = network._replace(state=state.replace(params=moved))
    probe.probe(other, layers, ['ridge'], draws, out, budget=48)


def test_a_page_shows_what_is_found(network, tmp_path):
  out, draws = epath.Path(tmp_path), probing.Draws()
  found = probe.probe(network, ['conv1', 'conv2'], [], draws, out, 48, retrieves=True)
  probe.write_retrieval(network, found, out, 48)
  text = (tmp_path / 'retrieval.html').read_text()
  best = max(
    found['layers'],
    key=lambda layer: found['layers'][layer]['retrieval']['mean_average_precision'],
  )
  shown = probe.SHOWN_QUERIES
  assert f'Features of {best}:' in text
  assert text.count('data:image/png') == shown * (1 + probe.SHOWN_FOUND)
  sets = {
    s: probe.cached(network, [best], s, out / 'features', 48)[best] for s in SPLITS
  }
  queries, gallery = sets['test'], sets['train']
  places = probing.one_of_each(queries.labels, shown)
  near = probing.nearest(queries.features[places], gallery.features)
  same = gallery.labels[near[:, : probe.SHOWN_FOUND]] == queries.labels[places][:, None]
  assert text.count('class="right"') == same.sum()
  assert text.count('class="wrong"') == (~same).sum()
  split = network.experiment.dataset.splits['train']
  assert uri(split.image(split.rows[near[0, 0]])) in text


def test_features_of_a_layer_are_a_file_that_is_a_source(network, tmp_path):
  path = epath.Path(tmp_path) / 'features.npz'
  probe.save(network, ['conv2'], path, 2048)
  with np.load(path) as stored:
    names = set(stored.files)
    width = stored['x_source_train'].shape[1]
  assert names == {
    *(f'{kind}_source_{split}' for kind in 'xy' for split in ('train', 'test')),
    'class_names',
  }
  config = digits_lt.get_config('ce')
  config.data.source = f'npz:{path}'
  config.data.update(train_split='source_train', test_split='source_test', pad=0)
  config.data.update(known_classes=0, profile='original', test_per_class=0)
  config.data.update(val_per_class=0, meta_per_class=0, open_test_per_class=0)
  config.data.update(open_val_per_class=0, mean=(0.0,), std=(1.0,))
  config.model.trunk, config.model.trunk_options = 'identity', {}
  read = build.build(resolve(config), devices=1)
  assert read.dataset.image_shape == (1, 1, width)
  with pytest.raises(UserError, match='features of another size'):
    np.savez(path, x_other=np.zeros((2, 5)), y_other=np.zeros(2, int))
    probe.save(network, ['conv1'], path, 12)
  with pytest.raises(UserError, match='--save takes one layer'):
    probe.save(network, ['conv1', 'conv2'], path, 12)


def test_mistakes_are_reported(network, tmp_path):
  with pytest.raises(UserError, match="unknown layer 'conv3'; did you mean"):
    probe.chosen_layers(network, ['conv3'])
  draws = probing.Draws(shots=(1000,))
  with pytest.raises(UserError, match='no class has 1000 training images'):
    probe.probe(network, ['conv2'], ['ridge'], draws, epath.Path(tmp_path))


def test_a_network_must_be_named(monkeypatch):
  flags.FLAGS.mark_as_parsed()
  with pytest.raises(UserError, match='either --workdir=RUN, or --config'):
    probe.opened()


def test_the_folder_to_write_is_asked_for_before_anything_is_read(tmp_path):
  given = ['--config=digits_lt:ce', '--init=nowhere']
  log = tmp_path / 'log'
  assert child.run(given, log, module='lt_jax.probe') == 2
  assert log.read_text() == 'error: --out is missing: the folder to write to\n'
