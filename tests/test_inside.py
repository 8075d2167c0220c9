"""What a finished run shows about single images: weights, maps, embeddings."""

import jax
import numpy as np
import pytest
from etils import epath

from lt_jax import evaluate, inside, report, run, train, trained
from lt_jax.errors import UserError
from lt_jax.files import read_npz
from tests import tiny

pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
  return tiny.write_npz(tmp_path_factory.mktemp('inside') / 'tiny.npz')


@pytest.fixture(scope='module')
def weighed(npz, tmp_path_factory):
  """A run in which the largest |epsilon| of a batch is a half."""
  workdir = tmp_path_factory.mktemp('weighed') / 'run'
  config = tiny.config(npz, 'meta_ce,epochs=6.0')
  method = config['stages']['meta']['method']
  method |= {'eps_scale': 'relative', 'eps_lr': 0.5}
  run.run(config, workdir)
  return epath.Path(workdir)


@pytest.fixture(scope='module')
def remembered(npz, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('remembered') / 'run'
  run.run(tiny.config(npz, 'oltr,epochs=6.0'), workdir)
  return epath.Path(workdir)


def state_of(workdir, stage=-1):
  experiment = evaluate.with_data(workdir, None)
  chosen = list(experiment.stages.values())[stage]
  return chosen, trained.restore(workdir, chosen, experiment.mesh, None).state


def test_every_training_image_has_its_epsilon(weighed):
  assert inside.look(weighed, []) == ['epsilons.npz']
  found = read_npz(weighed / 'epsilons.npz')
  assert sorted(found['label']) == [0, 0, 0, 0, 0, 1, 2, 3]
  assert np.abs(found['epsilon']).max() == pytest.approx(0.5, rel=1e-5)
  order = found['epsilon'][found['shown']]
  assert (np.diff(order[:8]) <= 0).all() and order[0] == found['epsilon'].max()
  assert found['image'].shape == (len(order), 8, 8, 1)
  page = report.write(weighed).read_text()
  assert 'the next step would add' in page and 'data:image/png;base64' in page


def test_it_weighs_as_the_next_step_does(weighed):
  stage, state = state_of(weighed)
  streams = stage.streams
  payloads = train.payloads_at(streams, int(state.step))
  arrays = {name: stream.arrays for name, stream in streams.items()}
  batches = train.batches_at(streams, arrays, payloads, state.key, state.step)
  weights, prior = jax.jit(stage.weigh)(state, batches)
  _, metrics = jax.jit(stage.method.step)(state, batches)
  learned = np.abs(weights - prior).sum() / np.abs(prior).sum()
  total, count = metrics['learned_over_prior']
  assert learned == pytest.approx(float(total / count), rel=1e-4) and learned > 0.01


def test_maps_stand_beside_those_of_the_plain_network(remembered):
  assert inside.look(remembered, [0, 5]) == ['feature_maps.npz', 'embeddings.npz']
  found = read_npz(remembered / 'feature_maps.npz')
  predicted = read_npz(remembered / 'predictions.npz')
  np.testing.assert_array_equal(found['prediction'], predicted['prediction'][[0, 5]])
  np.testing.assert_array_equal(found['label'], predicted['label'][[0, 5]])
  np.testing.assert_allclose(found['attention'].sum(axis=(1, 2)), 1, rtol=1e-5)
  assert found['plain'].shape == found['modulated'].shape == found['attention'].shape
  assert np.abs(found['plain'] - found['modulated']).max() > 1e-4
  stage, state = state_of(remembered, 0)
  images = found['image'].astype(np.float32) / 127.5 - 1
  logits = jax.jit(stage.method.predict)(state, images)['logits']
  np.testing.assert_array_equal(found['plain_prediction'], logits.argmax(-1))


def test_embeddings_stand_beside_features_and_centroids(remembered):
  inside.look(remembered, [])
  found = read_npz(remembered / 'embeddings.npz')
  kept = read_npz(remembered / 'features.npz')
  np.testing.assert_array_equal(found['features'], kept['features'])
  np.testing.assert_array_equal(found['centroids'], kept['centroids'])
  _, state = state_of(remembered)
  # By the formula, from what the head has learned.
  head = jax.device_get(state.params['net']['head'])
  v = found['features'].astype(np.float64)
  memory = np.asarray(state.params['centroids'], np.float64)

  def dense(x, layer):
    return x @ layer['kernel'].astype(np.float64) + layer['bias']

  z = dense(v, head['hallucinator'])
  o = np.exp(z - z.max(1, keepdims=True))
  o /= o.sum(1, keepdims=True)
  near = np.linalg.norm(v[:, None] - memory[None], axis=-1).min(1, keepdims=True)
  expected = 10 / near * (v + np.tanh(dense(v, head['selector'])) * (o @ memory))
  np.testing.assert_allclose(found['embeddings'], expected, rtol=0.05, atol=0.05)
  text = report.write(remembered).read_text()
  assert 'direct features' in text and 'share of attention' in text


def test_invisible_errors_are_reported(remembered, monkeypatch):
  with pytest.raises(
    UserError, match='--look_at is 99, but there are only 16 test images'
  ):
    inside.look(remembered, [99])
  experiment = evaluate.with_data(remembered, None)
  plain = next(iter(experiment.stages.values()))
  only = experiment._replace(stages={plain.name: plain})
  monkeypatch.setattr(evaluate, 'with_data', lambda *args: only)
  with pytest.raises(UserError, match='there is nothing to show'):
    inside.look(remembered, [])
