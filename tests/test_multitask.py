"""Several tasks on one trunk: masks, weights and metrics."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_multitask
from lt_jax import build, report, results, run, train
from lt_jax.config import resolve
from lt_jax.data.sources import load_source
from lt_jax.errors import UserError
from lt_jax.evals import multitask as measures
from lt_jax.losses.tasks import KINDS, mean_of_valid
from lt_jax.method import forward
from lt_jax.methods.multitask import WEIGHTINGS, make_heads
from lt_jax.report.multitask import multitask_table, remarks

pytestmark = pytest.mark.usefixtures('one_device')


# Losses.


def test_missing_labels_give_neither_loss_nor_gradient(rng):
  """Compared with float64 sums over existing labels."""
  z = rng.normal(size=(5, 3))
  labels = np.array([0, -1, 2, -1, 1])
  tags = np.array([[1, 0, -1], [-1, -1, -1], [0, 0, 1], [1, -1, 1], [0, 1, 0]])
  numbers = np.where(tags < 0, np.nan, tags * 2.5)
  log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
  rows = np.flatnonzero(labels >= 0)
  p = 1 / (1 + np.exp(-z))
  binary = -(tags * np.log(p) + (1 - tags) * np.log(1 - p))
  expected = {
    'softmax': (labels, -log_p[rows, labels[rows]].mean()),
    'sigmoid': (tags, binary[tags >= 0].mean()),
    'regression': (numbers, ((z - numbers)[tags >= 0] ** 2).mean()),
  }
  for kind, (y, value) in expected.items():
    y = jnp.asarray(y, jnp.float32 if kind == 'regression' else jnp.int32)

    def loss(z, y=y, kind=kind):
      return mean_of_valid(*KINDS[kind].losses(z, y))

    found, grads = jax.value_and_grad(loss)(jnp.asarray(z, jnp.float32))
    assert float(found) == pytest.approx(value, rel=1e-5)
    assert np.isfinite(grads).all() and not np.any(grads[1])
    nothing = jnp.full_like(y, jnp.nan if kind == 'regression' else -1)
    none, grads = jax.value_and_grad(loss)(jnp.asarray(z, jnp.float32), nothing)
    assert float(none) == 0 and not np.any(grads)


# Weights.


def test_uncertain_weights_have_their_optimum_where_the_derivative_is_zero():
  """S = log(2 L) for a classification, log L for a regression; 0 is ignored."""
  losses = jnp.array([0.3, 1.7, 5.0])
  halves = jnp.array([False, True, False])
  weigh = WEIGHTINGS['uncertainty'](jnp.array([0.5, 0.5, 0.0]), halves, 100)

  def total(s):
    return weigh.combine(losses, {'log_variance': s}, {})[0]

  best = jnp.array([np.log(0.6), np.log(1.7), 0.2])
  np.testing.assert_allclose(jax.grad(total)(best), 0, atol=1e-6)
  assert float(total(best)) < float(total(best + jnp.array([0.1, -0.1, 0.0])))
  tiny = weigh.combine(losses / 1000, {'log_variance': best - 6.9}, {})[0]
  assert float(tiny) < 0  # as intended


def test_dynamic_weights_follow_the_ratio_of_two_periods():
  weigh = WEIGHTINGS['dynamic'](jnp.array([0.5, 0.5]), jnp.array([False] * 2), 2)
  memory = weigh.memory
  history = np.array([(1, 1), (3, 1), (1, 1), (1, 3), (2, 2)], np.float32)
  for step, losses in enumerate(history):
    weights = weigh.combine(jnp.asarray(losses), {}, memory)[1]
    if step < 4:
      np.testing.assert_allclose(weights, (0.5, 0.5))
    memory = weigh.remember(memory, jnp.asarray(losses), step)
  ratio = np.exp(np.array([1 / 2, 2 / 1]) / 2)
  np.testing.assert_allclose(weights, ratio / ratio.sum(), rtol=1e-6)


# Steps.


def stage_of(**changes):
  config = digits_multitask.get_config('multitask,epochs=1')
  config.model.trunk_options = {'width': 2}
  config.batch = 8
  config.data.pad = 0
  resolved = resolve(config)
  if 'heads' in changes:
    resolved['method']['weights'] = {}  # which name those of the config
  for key, value in changes.items():
    resolved[key] = {**resolved[key], **value} if key == 'method' else value
  return build.build(resolved, devices=1).last


def first(stage):
  arrays = {name: stream.arrays for name, stream in stage.streams.items()}
  payloads = train.payloads_at(stage.streams, 0)

  @jax.jit
  def begun(key, arrays, payloads):
    batches = train.batches_at(stage.streams, arrays, payloads, key, 0)
    return stage.method.init(key, batches), batches

  return begun(jax.random.key(0), arrays, payloads)


def test_one_task_alone_is_plain_training_to_the_bit():
  alone = stage_of(heads={})
  config = digits_multitask.get_config('ce,epochs=1')
  config.model.trunk_options = {'width': 2}
  config.batch, config.heads = 8, {}
  config.data.pad = 0
  supervised = build.build(resolve(config), devices=1).last
  states = []
  for stage in (alone, supervised):
    state, batches = first(stage)
    step = jax.jit(stage.method.step)
    for _ in range(2):
      state, _ = step(state, batches)
    states.append(state)
  equal = jax.tree.map(lambda a, b: bool((a == b).all()), *(s.params for s in states))
  assert all(jax.tree.leaves(equal))


def test_a_task_moves_its_own_head_and_the_trunk_alone():
  stage = stage_of(method={'only': 'ink'})
  state, batches = first(stage)
  after, metrics = jax.jit(stage.method.step)(state, batches)
  assert metrics['weight_of_ink'][0] == 1 and metrics['weight_of_label'][0] == 0

  def moved(*path):
    one, other = state.params, after.params
    for part in path:
      one, other = one[part], other[part]
    change = jax.tree.map(lambda a, b: jnp.abs(a - b).max() > 1e-4, one, other)
    return any(jax.tree.leaves(change))

  assert moved('heads', 'ink') and moved('net', 'trunk')
  for other in (('heads', 'coarse'), ('heads', 'parity'), ('net', 'head')):
    assert not moved(*other)  # beyond its decay


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'heads': {'label': {'kind': 'softmax'}}},
      'heads.label: a batch uses this name',
    ),
    ({'heads': {'a': {'kind': 'softmx'}}}, "did you mean 'softmax'"),
    ({'heads': {'a': {}}}, "heads.a needs the option 'kind'"),
    ({'heads': {'a': {'kind': 'softmax', 'outputs': 0}}}, 'heads.a.outputs is 0'),
    ({'method': {'only': 'inc'}}, "method.only: no task 'inc'; did you mean 'ink'"),
    ({'method': {'weights': {'ink': -1.0}}}, 'method.weights.ink is -1.0'),
    ({'method': {'weights': {'inc': 1.0}}}, "no task 'inc'; did you mean 'ink'"),
    ({'method': {'weighting': 'fixd'}}, "did you mean 'fixed'"),
    (
      {'heads': {'a': {'kind': 'softmax', 'stream': 'more'}}},
      "a head reads the stream 'more': set streams.more",
    ),
  ],
)
def test_mistakes_are_reported(changes, message):
  with pytest.raises(UserError, match=message):
    stage_of(**changes)


def test_missing_labels_are_reported():
  stage = stage_of(heads={'pairity': {'kind': 'softmax', 'outputs': 2}})
  with pytest.raises(UserError, match="no labels 'pairity'; did you mean 'parity'"):
    stage.method.step(*first(stage))


def test_a_task_may_have_images_of_its_own():
  """Labels, running averages and test images are those of its stream."""
  config = digits_multitask.get_config('multitask,epochs=1')
  config.model.trunk_options = {'width': 2}
  config.batch, config.data.pad = 8, 0
  resolved = resolve(config) | {
    'heads': {'other': {'kind': 'softmax', 'outputs': 5, 'stream': 'other'}},
    'domains': {'other': {'source': 'digits_tasks:round'}},
    'streams': {
      'train': {'split': 'train'},
      'other': {'domain': 'other', 'split': 'train', 'labels': True, 'batch': 8},
    },
  }
  resolved['method'] |= {'statistics': 'by_stream', 'weights': {}}
  experiment = build.build(resolved, devices=1)
  stage = experiment.last
  state, batches = first(stage)
  assert set(np.asarray(batches['other']['label'])) <= set(range(5))
  after, metrics = jax.jit(stage.method.step)(state, batches)
  assert metrics['loss_other'][0] > 0
  assert make_heads({}) == ()
  for place, stream in (('net', 'train'), ('net_other', 'other')):
    moved = jax.jit(functools.partial(forward, stage.net, train=True))
    own = moved(state.params['net'], state.stats['net'], batches[stream]['image'])[1]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, after.stats[place], own)
  test = experiment.domains['other'].tests['test']
  images = np.float32(test.source.images[test.rows] / 255 - 0.306) / np.float32(0.377)
  predict = jax.jit(stage.method.predict)
  outputs = predict(after, images)
  right = np.asarray(outputs['softmax/other']).argmax(1) == test.labels
  found = results.evaluate(experiment, stage, after).metrics['test']
  assert found['other_accuracy'] == pytest.approx(right.mean())
  assert found['task_mean'] == pytest.approx((found['accuracy'] + right.mean()) / 2)
  swapped = after.replace(stats={**after.stats, 'net_other': after.stats['net']})
  other = predict(swapped, images)
  assert np.abs(other['softmax/other'] - outputs['softmax/other']).max() > 1e-3
  np.testing.assert_array_equal(other['logits'], outputs['logits'])


# Metrics.


def test_average_precision_at_eleven_points():
  """By hand: ranked 1 0 1 1 0; precision 1, 2/3, 3/4 at recall 1/3, 2/3, 1."""
  scores, labels = np.array([9, 8, 7, 6, 5.0]), np.array([1, 0, 1, 1, 0])
  expected = (4 * 1 + 7 * 0.75) / 11
  assert measures.average_precision(scores, labels) == pytest.approx(expected)
  padded = np.append(labels, -1), np.append(scores, 10)
  assert measures.average_precision(*padded[::-1]) == pytest.approx(expected)
  assert measures.average_precision(scores, labels * 0) is None


def test_each_kind_has_its_measure(rng):
  z, y = rng.normal(size=(20, 3)), rng.integers(-1, 3, 20)
  right = [a.argmax() == b for a, b in zip(z, y, strict=True) if b >= 0]
  assert measures.accuracy(z, y)['accuracy'] == pytest.approx(np.mean(right))
  x = rng.normal(size=(20, 1))
  t = np.where(y < 0, np.nan, x[:, 0] * 2)
  there = np.isfinite(t)
  found = measures.determination(x, t)
  assert found['rmse'] == pytest.approx(np.sqrt(((x[:, 0] - t)[there] ** 2).mean()))
  assert found['r2'] == pytest.approx(1 - found['rmse'] ** 2 / t[there].var())
  alone = {'a': 0.8, 'b': 0.5}
  gain = measures.relative_gain({'a': 0.9, 'b': 0.4}, alone, {'a': 1, 'b': -1})
  assert gain == pytest.approx((0.125 + 0.2) / 2)
  assert measures.relative_gain({'a': 0.9}, {'a': 0.0}, {'a': 1}) is None


def group(label, only='', weights=None, val=None, weighting='fixed', **test):
  config = {
    'method': {
      'name': 'multitask',
      'only': only,
      'weights': weights or {},
      'weighting': weighting,
    },
    'heads': {'ink': {'kind': 'regression'}},
  }
  result = {'test': test, 'val': val and {'task_mean': val}}
  one = types.SimpleNamespace(config=config, result=result, kind=('', 'data'))
  return types.SimpleNamespace(label=label, anchor=label, counted=[one])


def test_the_gain_is_over_networks_that_learned_one_task():
  groups = [
    group('both', accuracy=0.9, ink_rmse=0.03),
    group('digits', 'label', accuracy=0.8, ink_rmse=1.0),
    group('ink', 'ink', accuracy=0.1, ink_rmse=0.024),
  ]
  table = multitask_table(groups)
  gain = 100 * (0.1 / 0.8 - 0.006 / 0.024) / 2
  assert [row[-1] for row in table.rows] == [f'{gain:+.1f}', '-', '-']
  assert multitask_table(groups[:2]).rows[0][-1] == '-'
  assert table.rows[0][1:4] == ['equal', '90.0', '3.0']
  assert table.rows[1][1] == 'one task alone: label'
  (best,) = remarks(groups)
  assert 'best fixed weights are not known' in best
  assert remarks(groups[1:]) == [] and len(remarks(groups[:1])) == 2


def test_the_best_fixed_weights_are_those_of_validation():
  """Whatever the test images say, and the learned weights."""
  groups = [
    group('a', weights={'label': 1.0, 'ink': 1.0}, val=0.7, accuracy=0.9),
    group('b', weights={'label': 1.0, 'ink': 0.1}, val=0.8, accuracy=0.8),
    group('c', weighting='uncertainty', val=0.9, accuracy=0.8),
  ]
  told = [row[1] for row in multitask_table(groups).rows]
  assert told == ['equal', 'fixed (1, 0.1), best on validation', 'uncertainty']
  assert len(remarks(groups)) == 1  # the controls alone are missing
  groups[0].counted[0].result['val'] = None
  assert 'best' not in multitask_table(groups).rows[1][1]
  assert len(remarks(groups[1:])) == 3


def test_a_run_of_several_tasks_and_its_page(tmp_path):
  config = digits_multitask.get_config('multitask_uncertainty,epochs=1,labelled=0.5')
  config.model.trunk, config.model.trunk_options = 'tiny_cnn', {'width': 2}
  result = run.run(resolve(config), tmp_path)
  assert result['test']['task_mean'] is not None
  assert 0 <= result['test']['coarse_accuracy'] <= 1 and result['test']['ink_rmse'] > 0
  assert 'By task' in report.write(tmp_path).read_text()


def test_an_archive_has_further_labels(tmp_path, rng):
  path = tmp_path / 'a.npz'
  parts = {
    f'{kind}_{split}': values
    for split in ('train', 'test')
    for kind, values in (
      ('x', rng.integers(0, 256, (4, 8, 8), np.uint8)),
      ('y', np.arange(4) % 2),
    )
  }
  tags = np.array([[1, 0], [0, 1], [-1, 1], [0, 0]])
  np.savez(path, **parts, **{'y_train.tags': tags, 'y_train.age': tags[:, 0] / 2})
  found = load_source(f'npz:{path}')['train']
  np.testing.assert_array_equal(found.attributes['tags'], tags)
  assert found.attributes['age'].dtype == np.float32 and not found.passed_over
  np.savez(path, **parts, **{'y_train.tags': tags[:3]})
  with pytest.raises(
    UserError, match=r'y_train.tags must be numbers \(4,\) or \(4, K\)'
  ):
    load_source(f'npz:{path}')
