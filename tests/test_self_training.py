"""Pseudo-labels: which predictions count, and what they add to a step."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_domains
from lt_jax import build, run, sharding, train
from lt_jax.config import resolve
from lt_jax.errors import UserError
from lt_jax.method import ema, forward
from lt_jax.methods.self_training import (
  class_thresholds,
  confident,
  portion_thresholds,
)
from lt_jax.optim import sgd
from tests.test_adaptation import (
  batches_of,
  close,
  made,
  normalised_net,
  plain_net,
  rate,
)


def softmax(logits):
  e = np.exp(logits - logits.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def test_a_prediction_counts_where_its_own_class_says_so(rng):
  logits = rng.normal(size=(50, 3))
  thresholds = np.array([0.4, 0.6, 2.0])
  with jax.enable_x64(True):
    found = np.asarray(confident(jnp.asarray(logits), jnp.asarray(thresholds)))
  p = softmax(logits)
  expected = [
    x.argmax() if x.max() >= thresholds[x.argmax()] else -1 for x in p
  ]  # image by image
  np.testing.assert_array_equal(found, expected)
  assert set(found) == {-1, 0, 1}  # the third is out of reach


@pytest.mark.parametrize('portion', [0.1, 0.5, 1.0])
def test_the_same_portion_of_every_class_is_labelled(portion, rng):
  """Also of a class that the network is never sure of."""
  predicted = np.repeat([0, 1, 3], [40, 7, 1])
  confidence = np.concatenate(
    [rng.uniform(0.8, 1, 40), rng.uniform(0.3, 0.4, 7), [0.5]]
  )
  thresholds = portion_thresholds(predicted, confidence, 4, portion)
  passed = confidence >= thresholds[predicted]
  for label, images in ((0, 40), (1, 7), (3, 1)):
    assert passed[predicted == label].sum() == np.ceil(portion * images)
  assert thresholds[2] == thresholds.max()  # which no image is predicted to be
  assert thresholds[2] <= 1


def with_thresholds(state, *values):
  return state.replace(memory={**state.memory, 'thresholds': jnp.asarray(values)})


def test_a_step_adds_the_loss_of_what_is_labelled():
  net, batches = plain_net(), batches_of(8, 6)
  method = made('pseudo_label', net, weight=0.5, optimizer=sgd(rate(0.1), momentum=0.0))
  state = jax.jit(method.init)(jax.random.key(0), batches)
  assert state.memory['thresholds'].tolist() == [2, 2, 2]
  outputs, _ = forward(
    net, state.params['net'], {}, batches['target']['image'], train=True
  )
  p = softmax(np.asarray(outputs['logits'], np.float64))
  predicted = p.argmax(-1)
  least = np.median(p.max(-1))  # about half of them pass
  state = with_thresholds(state, *np.full(3, least, np.float32))
  chosen = p.max(-1) >= np.float32(least)
  assert 0 < chosen.sum() < 6

  def objective(params):
    def log_p(name, labels):
      outputs, _ = forward(net, params, {}, batches[name]['image'], train=True)
      log_p = jax.nn.log_softmax(outputs['logits'])
      return jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0]

    target = (log_p('target', jnp.asarray(predicted)) * chosen).sum() / 6
    return -log_p('train', batches['train']['label']).mean() - 0.5 * target

  grads = jax.jit(jax.grad(objective))(state.params['net'])
  after, metrics = jax.jit(method.step)(state, batches)
  expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params['net'], grads)
  close(after.params['net'], expected, atol=1e-6)
  assert metrics['labelled'] == (chosen.sum(), 6)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  np.testing.assert_array_equal(after.memory['thresholds'], state.memory['thresholds'])


def test_a_wrapper_remembers_beside_it():
  method, batches = ema(made('pseudo_label', plain_net()), decay=0.9), batches_of()
  state = jax.eval_shape(method.init, jax.random.key(0), batches)
  after, _ = jax.eval_shape(method.step, state, batches)
  assert set(after.memory) == {'ema', 'thresholds'}
  assert jax.tree.structure(after) == jax.tree.structure(state)


@functools.cache
def two_steps(devices):
  method = made('pseudo_label', normalised_net())
  mesh, batches = sharding.make_mesh(devices), batches_of(16, 8)
  state = jax.jit(method.init)(jax.random.key(0), batches)
  state = sharding.put_replicated(mesh, with_thresholds(state, 0.3, 0.4, 0.5))
  batches = sharding.put_batch(mesh, jax.tree.map(np.asarray, batches), leading=0)
  step = jax.jit(method.step)
  for _ in range(2):
    state, metrics = step(state, batches)
  assert step._cache_size() == 1
  return jax.device_get((state.params, metrics['labelled']))


@pytest.mark.slow
def test_eight_devices_are_one():
  close(two_steps(8), two_steps(1), rtol=2e-3, atol=2e-5)
  assert two_steps(1)[1][0] > 0


def test_mistakes_are_reported():
  with pytest.raises(UserError, match='portion must be more than 0 and at most 1'):
    class_thresholds(survey=None, portion=1.5)
  made = digits_domains.get_config('dann,epochs=1.0')
  made.surgeries = (('class_thresholds', {}),)
  stage = build.build(resolve(made), devices=1).last
  state = train.state_shapes(stage.method, stage.streams)
  with pytest.raises(UserError, match='there is no memory/thresholds here'):
    stage.surgeries[0](state, {})


def test_a_surgery_measures_them_on_the_target():
  made = digits_domains.get_config('pseudo_label,epochs=1.0')
  stage = build.build(resolve(made), devices=1).last
  fresh = train.initial_state(
    stage.method, stage.streams, jax.random.key(0), sharding.make_mesh(1)
  )
  state = stage.surgeries[1](fresh, {})

  def keep(outputs, batch):
    return {'logits': outputs['logits']}

  p = softmax(stage.survey.collect(state, 'target/train', keep)['logits'])
  passed = p.max(-1) >= np.asarray(state.memory['thresholds'])[p.argmax(-1)] - 1e-6
  for label in np.unique(p.argmax(-1)):
    of_class = p.argmax(-1) == label
    assert passed[of_class].sum() == np.ceil(0.2 * of_class.sum())


@pytest.mark.slow
def test_a_run_labels_a_fifth_and_then_more(tmp_path, one_device):
  made = digits_domains.get_config('pseudo_label,epochs=4.0')
  made.log_every_steps = 19  # an epoch
  result = run.run(resolve(made), tmp_path)
  assert not result['uses_target_labels']
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  rows = [row['labelled'] for row in map(json.loads, lines) if 'labelled' in row]
  assert len(rows) == 4 and 0.1 < rows[0] < rows[-1] < 1
