"""Post-hoc classifiers, and the surgeries that measure their parameters."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax import build, run, sharding
from lt_jax.config import config_digest
from lt_jax.errors import UserError
from lt_jax.evals import openmax
from lt_jax.evals.collect import Survey
from lt_jax.method import Method, State
from lt_jax.surgeries.posthoc import (
  adjust_logits,
  choose_tau,
  fit_openmax,
  tau_norm,
  with_openmax,
)
from lt_jax.surgery import operate
from lt_jax.train import Preempted
from tests import tiny

NOWHERE = pathlib.Path('nowhere')  # the folder of a run that never started

COUNTS = (12, 7, 5, 2)
"""26 training images: the last batch of eight has two."""
VAL = 4
"""Validation images per class."""


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
  path = tmp_path_factory.mktemp('posthoc') / 'tiny.npz'
  return tiny.write_npz(path, np.add(COUNTS, VAL))


def make_config(npz, recipe, val=VAL):
  config = tiny.config(npz, recipe)
  config['data']['val_per_class'] = val
  return config


FIRST = {}
"""Initial States by config and stage; they do not depend on the devices."""


def first_state(experiment, stage):
  key = config_digest(experiment.config), stage
  if key not in FIRST:
    batch = {'image': jnp.zeros((8, 8, 8, 1)), 'label': jnp.zeros(8, jnp.int32)}
    init = jax.jit(experiment.stages[stage].method.init)
    FIRST[key] = jax.device_get(init(jax.random.key(0), {'train': batch}))
  return sharding.put_replicated(experiment.mesh, FIRST[key])


def with_head(state, **head):
  arrays = {name: jnp.asarray(x, jnp.float32) for name, x in head.items()}
  net = {**state.params['net'], 'head': arrays}
  return state.replace(params={**state.params, 'net': net})


def images_of(experiment, split):
  """Returns images as the network sees them, and labels; uses NumPy only."""
  split = experiment.dataset.every[split]
  images = np.stack([split.source[int(row)] for row in split.rows])
  return (images / 255 - 0.5).astype(np.float32) / 0.5, np.asarray(split.labels)


def features_of(experiment, stage, state, images):
  predict = jax.jit(experiment.stages[stage].method.predict)
  return np.asarray(predict(jax.device_get(state), images)['features'], np.float64)


def least_squares(experiment, stage, state):
  """Returns kernel and bias of a classifier that is right on most training images."""
  images, labels = images_of(experiment, 'train')
  features = features_of(experiment, stage, state, images)
  inputs = np.concatenate([features, np.ones((len(labels), 1))], axis=1)
  weights = np.linalg.lstsq(inputs, 4 * np.eye(4)[labels], rcond=None)[0]
  return weights[:-1], weights[-1]


# A method that needs no network.


def a_method(head):
  """Features are the images (B, D); tests set the head."""

  def predict(state, images):
    return {'features': images, 'logits': images @ jnp.asarray(head['kernel'])}

  def init(key, batches):
    return State(jnp.int32(0), key, {'net': {'head': head}}, {}, {}, {'other': 1})

  return Method(init, lambda state, batches: (state, {}), predict)


KERNEL = np.array([[3.0, 0.1, 0.5], [-4.0, 0.2, 0.5]], np.float32)
BATCHES = {'train': {'image': np.ones((4, 2), np.float32)}}


# Logit adjustment.


@pytest.mark.parametrize('tau', [0.0, 0.5, 1.0])
def test_adjusted_logits_are_shifted_by_the_log_prior(tau):
  plain = a_method({'kernel': KERNEL})
  adjusted = adjust_logits(plain, counts=[5, 1, 2], tau=tau)
  state = adjusted.init(jax.random.key(0), BATCHES)
  outputs = adjusted.predict(state, BATCHES['train']['image'])
  expected = np.ones((4, 2)) @ KERNEL - tau * np.log(np.array([5, 1, 2]) / 8)
  np.testing.assert_allclose(outputs['logits'], expected, rtol=1e-5)
  np.testing.assert_array_equal(outputs['features'], np.ones((4, 2)))
  assert adjusted.step is plain.step


def test_a_class_without_image_is_reported():
  with pytest.raises(UserError, match='class 1 has none'):
    adjust_logits(a_method({'kernel': KERNEL}), counts=[5, 0, 2])


@pytest.mark.parametrize('tau', [np.nan, np.inf, -1e39])
def test_a_strength_that_overflows_logits_is_rejected(tau):
  with pytest.raises(UserError, match='tau is .*: the logits would not be finite'):
    adjust_logits(a_method({'kernel': KERNEL}), counts=[5, 1, 2], tau=tau)


# Tau-normalisation.


@pytest.mark.parametrize('tau', [0.0, 0.5, 1.0])
def test_tau_normalised_logits(rng, tau):
  """Columns are divided by their length to the power of tau, without bias."""
  images = rng.normal(size=(4, 2)).astype(np.float32)
  method = a_method({'kernel': KERNEL, 'bias': np.full(3, 1e3, np.float32)})
  wrapped = tau_norm(method, taus=(0.0, 0.5, 1.0))
  state = wrapped.init(jax.random.key(0), BATCHES)
  memory = state.memory['tau_norm']
  assert state.memory['other'] == 1
  np.testing.assert_array_equal(memory['taus'], [0.0, 0.5, 1.0])
  state = state.replace(
    memory={**state.memory, 'tau_norm': {**memory, 'tau': jnp.float32(tau)}}
  )
  expected = [
    [image @ column / np.sqrt(column @ column) ** tau for column in KERNEL.T]
    for image in images.astype(np.float64)
  ]
  outputs = wrapped.predict(state, images)
  np.testing.assert_allclose(outputs['logits'], expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(outputs['features'], images)


@pytest.mark.parametrize('taus', [(), (0.5, float('nan'))])
def test_taus_that_cannot_be_chosen_from(taus):
  with pytest.raises(UserError, match='taus must be a list of finite numbers'):
    tau_norm(a_method({}), taus=taus)


def test_a_class_without_weights_keeps_finite_logits():
  kernel = KERNEL * np.array([[1, 0, 1]], np.float32)
  wrapped = tau_norm(a_method({'kernel': kernel, 'bias': np.zeros(3)}), taus=(2.0,))
  state = wrapped.init(jax.random.key(0), BATCHES)
  memory = {**state.memory['tau_norm'], 'tau': jnp.float32(2)}
  state = state.replace(memory={'tau_norm': memory})
  logits = wrapped.predict(state, BATCHES['train']['image'])['logits']
  np.testing.assert_allclose(logits[:, 1], np.zeros(4))
  assert np.isfinite(logits).all()


@pytest.mark.parametrize('head', ['cosine', 'scaled_linear', 'nearest_class_mean'])
def test_a_head_that_is_not_linear_is_reported(npz, head):
  config = make_config(npz, 'tau_norm')
  config['model'] = {**config['model'], 'head': head, 'head_options': {}}
  with pytest.raises(UserError, match="a 'linear' head only"):
    run.rehearsed(config, NOWHERE)


@pytest.fixture(scope='module', params=[1, pytest.param(8, marks=pytest.mark.slow)])
def chosen(request, npz):
  """Returns (experiment, States of both stages), on one device and on eight."""
  config = make_config(npz, 'tau_norm')
  experiment = build.build(config, devices=request.param)
  assert experiment.mesh.size == request.param
  state = first_state(experiment, 'train')
  kernel, _ = least_squares(experiment, 'train', state)
  kernel *= np.array([9.0, 3.0, 1.0, 0.3]) / np.linalg.norm(kernel, axis=0)
  state = with_head(state, kernel=kernel, bias=np.array([50.0, 0, 0, 0]))
  stage = experiment.stages['tau_norm']
  fresh = first_state(experiment, 'tau_norm')
  return experiment, state, operate(fresh, {'train': state}, stage.surgeries)


def accuracies_by_numpy(features, labels, kernel, taus):
  lengths = np.sqrt((kernel**2).sum(0))
  predicted = [(features @ (kernel / lengths**tau)).argmax(1) for tau in taus]
  return np.array([(p == labels).mean() for p in predicted])


def test_the_best_tau_on_val_is_chosen_and_the_least_of_equals(chosen):
  experiment, state, last = chosen
  images, labels = images_of(experiment, 'val')
  assert len(labels) == 4 * VAL
  features = features_of(experiment, 'train', state, images)
  memory = jax.device_get(last.memory['tau_norm'])
  taus = np.arange(21) / 10
  np.testing.assert_allclose(memory['taus'], taus, rtol=1e-6)
  kernel = np.asarray(state.params['net']['head']['kernel'], np.float64)
  expected = accuracies_by_numpy(features, labels, kernel, taus)
  best = np.flatnonzero(expected == expected.max())
  assert len(best) > 1 and best[0] > 0 and len(best) < len(taus)  # it can go wrong
  np.testing.assert_allclose(memory['accuracy'], expected, rtol=1e-6)
  np.testing.assert_allclose(memory['tau'], taus[best[0]], rtol=1e-6)


def test_predictions_use_the_chosen_tau(chosen):
  experiment, state, last = chosen
  images, _ = images_of(experiment, 'test')
  images = images[:8]
  features = features_of(experiment, 'train', state, images)
  method = experiment.stages['tau_norm'].method
  outputs = jax.jit(method.predict)(jax.device_get(last), images)
  kernel = np.asarray(state.params['net']['head']['kernel'], np.float64)
  tau = float(last.memory['tau_norm']['tau'])
  expected = features @ (kernel / np.sqrt((kernel**2).sum(0)) ** tau)
  np.testing.assert_allclose(outputs['logits'], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(outputs['features'], features, rtol=1e-4, atol=1e-6)


def test_the_least_of_equals_whatever_their_order(npz):
  config = make_config(npz, 'tau_norm')
  config['stages']['tau_norm']['wrappers'] = {'tau_norm': {'taus': (2.0, 1.0, 0.5)}}
  experiment = build.build(config, devices=1)
  state = first_state(experiment, 'train')
  kernel = np.eye(8, 4)  # all of one length: no tau changes anything
  state = with_head(state, kernel=kernel, bias=np.zeros(4))
  fresh = first_state(experiment, 'tau_norm')
  surgeries = experiment.stages['tau_norm'].surgeries
  memory = operate(fresh, {'train': state}, surgeries).memory['tau_norm']
  assert len(set(np.asarray(memory['accuracy']).tolist())) == 1
  assert float(memory['tau']) == 0.5


def test_tau_is_not_chosen_on_the_test_set(npz):
  with pytest.raises(UserError, match="not on 'test'"):
    choose_tau(survey=None, split='test')
  config = make_config(npz, 'tau_norm')
  config['stages']['tau_norm']['surgeries'] = [['choose_tau', {'split': 'test'}]]
  with pytest.raises(UserError, match="not on 'test'"):
    build.build(config)


@pytest.mark.parametrize('recipe', ['tau_norm', 'ncm'])
def test_a_run_that_must_end_ends_the_pass_of_a_surgery(npz, recipe):
  """One that collects outputs of each image, and one that sums them."""
  looks = []

  def look():
    looks.append(None)
    if len(looks) == 2:
      raise Preempted

  config = {**make_config(npz, recipe), 'eval_batch': 8}  # of 16 images and more
  experiment = build.build(config, devices=1, look=look)
  state, fresh = (first_state(experiment, name) for name in ('train', recipe))
  with pytest.raises(Preempted):
    operate(fresh, {'train': state}, experiment.stages[recipe].surgeries)
  assert len(looks) == 2


@pytest.fixture
def no_programs(monkeypatch):
  """Errors must be reported before anything is computed."""

  def computed(*args, **kwargs):
    raise AssertionError('a pass over data, or a step')

  monkeypatch.setattr('lt_jax.evals.collect.collector', computed)
  monkeypatch.setattr('lt_jax.evals.collect.total', computed)
  monkeypatch.setattr('lt_jax.train.train', computed)


def test_a_choice_without_val_is_reported_before_training(npz, no_programs):
  run.rehearsed(make_config(npz, 'tau_norm'), NOWHERE)
  message = 'needs validation images.* set data.val_per_class'
  with pytest.raises(UserError, match=message) as error:
    run.rehearsed(make_config(npz, 'tau_norm', val=0), NOWHERE)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('recipe', 'wrapper', 'surgery'),
  [('tau_norm', 'tau_norm', 'choose_tau'), ('openmax', 'openmax', 'fit_openmax')],
)
def test_a_surgery_without_its_wrapper_is_reported(
  npz, no_programs, recipe, wrapper, surgery
):
  config = make_config(npz, recipe)
  config['stages'][recipe]['wrappers'] = {}
  message = f"{surgery}: the stage has no wrapper '{wrapper}'"
  with pytest.raises(UserError, match=message):
    run.rehearsed(config, NOWHERE)


# OpenMax.

TAIL = 4


@pytest.fixture(scope='module', params=[1, 8])
def fitted(request, npz):
  """Returns (experiment, earlier stage's State, States before and after surgeries)."""
  config = make_config(npz, 'openmax')
  surgeries = config['stages']['openmax']['surgeries']
  assert [name for name, _ in surgeries] == ['copy', 'fit_openmax']
  surgeries[1][1]['tail'] = TAIL
  experiment = build.build(config, devices=request.param)
  state = first_state(experiment, 'aware')
  kernel, bias = least_squares(experiment, 'aware', state)
  bias += np.array([0.0, 0.0, 0.7, 0.0])  # so that it is wrong on some
  state = with_head(state, kernel=kernel, bias=bias)
  fresh = first_state(experiment, 'openmax')
  stage = experiment.stages['openmax']
  last = operate(fresh, {'aware': state}, stage.surgeries)
  return experiment, state, fresh, last


def logits_of(experiment, state, split):
  images, labels = images_of(experiment, split)
  predict = jax.jit(experiment.stages['aware'].method.predict)
  logits = predict(jax.device_get(state), images)['logits']
  return np.asarray(logits, np.float64), labels


def test_tails_are_those_of_the_images_classified_right(fitted):
  experiment, state, _, last = fitted
  logits, labels = logits_of(experiment, state, 'train')
  assert len(labels) == sum(COUNTS)
  right = logits.argmax(1) == labels
  numbers = np.bincount(labels[right], minlength=4)
  assert right.sum() < len(labels)  # some are left out
  assert numbers.max() > TAIL and numbers.min() < openmax.FEWEST
  logits, labels = logits[right], labels[right]
  means = np.stack(
    [logits[labels == c].mean(0) if n else np.zeros(4) for c, n in enumerate(numbers)]
  )
  distances = [
    np.linalg.norm(z - m) / 200 + 1 - z @ m / (np.linalg.norm(z) * np.linalg.norm(m))
    for z, m in zip(logits, means[labels], strict=True)
  ]
  expected = openmax.fit_tails(np.array(distances), labels, means, TAIL)
  memory = jax.device_get(last.memory['openmax'])
  assert memory.keys() == expected._asdict().keys()
  np.testing.assert_array_equal(memory['fitted'], expected.fitted)
  assert 0 < expected.fitted.sum() < 4
  for name, value in memory.items():
    np.testing.assert_allclose(
      value, getattr(expected, name), rtol=5e-3, atol=1e-4, err_msg=name
    )


def test_nothing_changes_before_the_tails_are_fitted(fitted):
  experiment, state, fresh, _ = fitted
  images, _ = images_of(experiment, 'test')
  fresh = fresh.replace(params=state.params, stats=state.stats)
  plain, wrapped = (
    jax.jit(experiment.stages[name].method.predict)(jax.device_get(s), images)
    for name, s in (('aware', state), ('openmax', fresh))
  )
  np.testing.assert_allclose(wrapped['logits'], plain['logits'], atol=1e-5)
  assert not np.asarray(fresh.memory['openmax']['fitted']).any()
  score = np.asarray(wrapped['known_score'])
  assert score.shape == (len(images),)
  assert (score >= 0).all() and (score <= 1).all()


def test_predictions_give_logits_to_the_unknown_class(fitted, rng):
  experiment, state, _, last = fitted
  logits, _ = logits_of(experiment, state, 'test')
  images, _ = images_of(experiment, 'test')
  predict = jax.jit(experiment.stages['openmax'].method.predict)
  last = jax.device_get(last)
  outputs = jax.device_get(predict(last, images))
  tails = openmax.Tails(**last.memory['openmax'])
  expected = openmax.recalibrate(jnp.asarray(logits, jnp.float32), tails, 10)
  expected = np.asarray(expected, np.float64)
  assert outputs['logits'].shape == logits.shape
  np.testing.assert_allclose(outputs['logits'], expected[:, :4], rtol=1e-3, atol=1e-3)
  assert np.abs(outputs['logits'] - logits).max() > 1e-2
  p = np.exp(expected - expected.max(1, keepdims=True))
  p /= p.sum(1, keepdims=True)
  np.testing.assert_allclose(outputs['known_score'], 1 - p[:, 4], atol=1e-3)
  np.testing.assert_array_equal(outputs['is_unknown'], expected.argmax(1) == 4)
  strange = 50 * rng.normal(size=images.shape).astype(np.float32)
  score = np.asarray(predict(last, strange)['known_score'])
  assert (score >= 0).all() and (score <= 1).all()


def test_a_known_score_is_the_share_of_the_known_classes():
  """Even if the unknown class has all but 1e-30 of the probability."""
  logits = np.array([[0.0, 1.0, 2.0], [-70.0, -71.0, -72.0]], np.float32)
  method = with_openmax(a_method({'kernel': np.eye(3, dtype=np.float32)}))
  state = method.init(jax.random.key(0), {'train': {'image': logits}})
  # The unknown logit is 0.
  outputs = jax.jit(method.predict)(state, logits)
  score = outputs['known_score']
  np.testing.assert_array_equal(outputs['is_unknown'], [False, True])
  known = np.exp(logits.astype(np.float64)).sum(1)
  np.testing.assert_allclose(score, known / (known + 1), rtol=1e-4)


def test_openmax_is_fitted_by_numbers_of_images_not_rows_of_classes(rng):
  """Values collected from training images are (N,), whatever the class count."""
  logits = rng.normal(size=(12, 3)).astype(np.float32)
  label = jnp.asarray(logits.argmax(1))
  batch, collected = {'label': label, 'mask': jnp.ones(12, bool)}, {}
  outputs = {'logits': jnp.asarray(logits)}

  def collect(state, split, keep):
    collected.update(jax.device_get(keep(outputs, batch)))
    return collected

  survey = Survey(
    outputs=lambda state, split: outputs,
    collect=collect,
    total=lambda state, split, fold: jax.device_get(fold(outputs, batch)),
  )
  method = with_openmax(a_method({'kernel': np.eye(3, dtype=np.float32)}))
  state = method.init(jax.random.key(0), {'train': {'image': logits}})
  fit_openmax(survey=survey)(state, {})
  assert {value.shape for value in collected.values()} == {(12,)}


@pytest.mark.parametrize(
  ('part', 'option', 'message'),
  [
    ('surgery', {'tail': 2}, 'tail must be at least 3'),
    ('wrapper', {'alpha': 0}, 'alpha must be at least 1'),
  ],
)
def test_wrong_numbers_of_openmax_are_reported_before_training(
  npz, no_programs, part, option, message
):
  config = make_config(npz, 'openmax')
  stage = config['stages']['openmax']
  run.rehearsed(config, NOWHERE)
  if part == 'surgery':
    stage['surgeries'][1][1].update(option)
  else:
    stage['wrappers']['openmax'].update(option)
  with pytest.raises(UserError, match=message):
    run.rehearsed(config, NOWHERE)
