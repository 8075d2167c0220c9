"""Files of a run: predictions as they were evaluated, whatever their values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lt_jax import build, results, train
from lt_jax.evals import classification
from lt_jax.report.runs import Run
from tests import tiny


@pytest.mark.parametrize('all_logits', [True, False])
@pytest.mark.parametrize('scale', [1, 2.0**100])
def test_predictions_are_those_of_the_metrics(tmp_path, monkeypatch, all_logits, scale):
  """In float16 these logits are equal or too large."""

  def predict(state, images):
    scores = images.reshape(len(images), -1)[:, :4]
    features = scale * scores.astype(jnp.bfloat16)
    return {'logits': scale * (1000 + scores), 'features': features}

  monkeypatch.setattr(classification, 'TOP', 3)
  if not all_logits:
    monkeypatch.setattr(classification, 'MOST_LOGITS', 0)
  config = tiny.config(tiny.write_npz(tmp_path / 'tiny.npz', (30, 30, 30, 30)), 'ce')
  experiment = build.build(config, devices=1)
  stage = experiment.stages['train']
  stage = stage._replace(method=stage.method._replace(predict=predict))
  key = jax.random.key(0)
  state = train.initial_state(stage.method, stage.streams, key, experiment.mesh)
  evaluated = results.evaluate(experiment, stage, state)
  test = evaluated.records['test']
  results._write_arrays(stage, epath.Path(tmp_path), state, evaluated.records)

  label, prediction, confidence = Run(epath.Path(tmp_path), 'run').predicted
  assert (label == prediction).mean() == evaluated.metrics['test']['accuracy']
  np.testing.assert_array_equal(prediction, test['prediction'])
  np.testing.assert_array_equal(confidence, test['confidence'])
  for name in ('predictions.npz', 'features.npz'):
    with np.load(tmp_path / name) as stored:
      assert all(np.isfinite(stored[key]).all() for key in stored)
