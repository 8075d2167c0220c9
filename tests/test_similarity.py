"""Which source suits a target: the command, with feature files and with a network."""

import json

import numpy as np
import pytest
from absl.testing import flagsaver

from lt_jax import features, run, similarity
from lt_jax.errors import UserError
from lt_jax.report.similarity import page
from tests import tiny

pytestmark = pytest.mark.usefixtures('one_device')


def write_features(path, rng, shift, names=('a', 'b', 'c')):
  """Writes features (N, 4) of classes around the corners of a cube."""
  labels = np.repeat(np.arange(len(names)), 6)
  points = np.eye(4)[labels] * 5 + shift + 0.1 * rng.normal(size=(len(labels), 4))
  np.savez(
    path,
    x_train=points,
    y_train=labels,
    x_test=points,
    y_test=labels,
    class_names=names,
  )
  return f'npz:{path}'


@pytest.fixture
def files(tmp_path, rng):
  return [
    write_features(tmp_path / f'{name}.npz', rng, shift)
    for name, shift in (('near', 0.0), ('far', 9.0), ('target', 0.5))
  ]


def given(tmp_path, source, target, **flags):
  similarity.flags.FLAGS.mark_as_parsed()
  values = {'source': source, 'target': target, 'out': str(tmp_path / 'out')} | flags
  return flagsaver.flagsaver(**values)


def test_files_of_features_need_no_network(tmp_path, files, rng):
  near, far, target = files
  accuracy = tmp_path / 'accuracy.csv'
  accuracy.write_text(
    f'source,target,accuracy\n{near},{target},0.9\n{far},{target},0.5\n'
  )
  with given(
    tmp_path, [near, far], [target], min_images=1, k=['2'], accuracy=str(accuracy)
  ):
    similarity.main()
  out = tmp_path / 'out'
  found = json.loads((out / 'similarity.json').read_text())
  emd = {pair['source']: pair['emd'] for pair in found['pairs']}
  assert emd[near] == pytest.approx(1.0, abs=0.2) and emd[far] == pytest.approx(
    17, abs=0.5
  )
  assert emd[near] < emd['union'] < emd[far]
  assert [len(names) for names in found['kept'].values()] == [2, 0]
  assert (out / 'keep_classes_1.txt').read_text().split() == found['kept'][near]
  assert found['correlations']['by_target'][target] == pytest.approx(1.0)
  assert found['transferability'][target]['h_score'] > 1.9  # three classes apart
  html = (out / 'similarity.html').read_text()
  assert html.count('<svg') == 5 and 'similar source is the best one for 1 of 1' in html


def test_errors_are_reported_in_one_line(tmp_path, files, rng):
  near, far, target = files
  with (
    given(tmp_path, [near], []),
    pytest.raises(UserError, match='--target is missing'),
  ):
    similarity.main()
  with (
    given(tmp_path, [], [target]),
    pytest.raises(UserError, match='--source is missing'),
  ):
    similarity.main()
  with (
    given(tmp_path, [near], [target]),
    pytest.raises(UserError, match='--min_images'),
  ):
    similarity.main()
  message = 'has images but no features: name a network'
  with (
    given(tmp_path, ['digits_tasks:one'], [target]),
    pytest.raises(UserError, match=message),
  ):
    similarity.main()
  message = "unknown selection rule 'gredy'; did you mean 'greedy'"
  with (
    given(tmp_path, [near], [target], rule='gredy'),
    pytest.raises(UserError, match=message),
  ):
    similarity.main()
  with pytest.raises(UserError, match='name its network, such as'):
    features.network('weights.safetensors')
  path = tmp_path / 'rows.csv'
  path.write_text('a,b,0.5\na,b\n')
  with pytest.raises(UserError, match="rows.csv, line 2: 'a,b' is not source,target"):
    similarity.read_accuracy(str(path))


def test_images_that_are_in_both_are_reported(files):
  near, _, target = files
  seen = {name: features.seen(name, None) for name in (near, target)}
  assert similarity.leaks(seen, [near], [target]) == []
  seen[target] = seen[target]._replace(digests=seen[near].digests[:3])
  (line,) = similarity.leaks(seen, [near], [target])
  assert 'have 3 images in common' in line


def test_a_dozen_by_a_dozen_is_one_call(rng):
  def domain(name):
    points = rng.normal(size=(6, 3))
    return similarity.measures.domain(name, points, np.arange(6) % 3, ('a', 'b', 'c'))

  sources = {f's{i}': domain(f's{i}') for i in range(12)}
  targets = {f't{i}': domain(f't{i}') for i in range(12)}
  found = similarity.compared(sources, targets, most=[1])
  assert len(found['pairs']) == 13 * 12 and len(found['classes']) == 36


def test_a_network_that_takes_features_looks_at_stored_ones(tmp_path, rng):
  spec = write_features(tmp_path / 'stored.npz', rng, 0.0)

  def network(width):
    def see(x):
      return {'features': 2 * x.reshape(len(x), -1)}

    return features.Network('twice', see, (1, 1, width), features.Crop(1, 1))

  stored = features.seen(spec, None).features
  twice = features.seen(spec, network(4)).features
  np.testing.assert_allclose(twice, 2 * stored, rtol=1e-6)
  with pytest.raises(
    UserError, match='twice takes features of 5 values, not 1 x 1 x 4'
  ):
    features.seen(spec, network(5))


def test_a_run_looks_at_data_and_runs_are_ranked(tmp_path):
  npz = tiny.write_npz(tmp_path / 'tiny.npz')
  config = tiny.config(npz, 'ce,epochs=1.0')
  run.run(config, tmp_path / 'runs' / 'one')
  network = features.network(str(tmp_path / 'runs' / 'one'))
  assert network.shape == (8, 8, 1)
  one = features.seen(f'npz:{npz}', network)
  images = np.load(npz)['x_train']
  np.testing.assert_allclose(
    one.features, network.see(images)['features'], rtol=1e-4, atol=1e-5
  )
  assert one.probabilities.shape == (len(images), 4)
  assert similarity.scores(one).keys() >= {'logme', 'leep', 'nce'}
  trained_on = features.seen(str(tmp_path / 'runs' / 'one'), network)
  assert len(trained_on.labels) == len(images) - 8  # without the meta images
  table = similarity.ranked(tmp_path / 'runs', [f'npz:{npz}'])
  (row,) = table[f'npz:{npz}']
  assert row['run'] == 'one' and row['scores'] == similarity.scores(one)
  assert 'Runs to start from' in page({'runs': table})
