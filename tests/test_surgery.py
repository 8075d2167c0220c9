"""Surgery: what is named is taken, what is not stays fresh, and mistakes are told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax import build, run, sharding
from lt_jax.config import config_digest
from lt_jax.errors import UserError
from lt_jax.evals.collect import Survey
from lt_jax.method import State
from lt_jax.models import heads
from lt_jax.surgery import (
  carry,
  class_means,
  copy,
  nearest_class_mean,
  operate,
  put,
)
from tests import tiny


def make_state(value, step=0, classes=3):
  net = {
    'trunk': {'kernel': jnp.full((2, 2), value)},
    'head': {'kernel': jnp.full((2, classes), value)},
  }
  return State(
    step=jnp.int32(step),
    key=jax.random.key(0),
    params={'net': net},
    stats={'net': {'trunk': {'mean': jnp.full(2, value)}}},
    opt={'net': {'momentum': jnp.full(2, value)}},
    memory={},
  )


def test_copy_takes_full_matches_and_nothing_else():
  taken = operate(
    make_state(0.0),
    {'train': make_state(1.0, step=7)},
    [copy(pattern='net/trunk/.*', stage='train')],
  )
  assert taken.params['net']['trunk']['kernel'][0, 0] == 1
  assert taken.stats['net']['trunk']['mean'][0] == 1
  assert taken.params['net']['head']['kernel'][0, 0] == 0
  assert taken.opt['net']['momentum'][0] == 0
  assert int(taken.step) == 0


def test_carry_takes_clock_and_optimiser():
  taken = operate(
    make_state(0.0),
    {'train': make_state(1.0, step=7)},
    [carry(fields=('opt', 'step'), stage='train')],
  )
  assert taken.opt['net']['momentum'][0] == 1
  assert int(taken.step) == 7
  assert taken.params['net']['trunk']['kernel'][0, 0] == 0


def test_surgeries_are_done_in_order():
  earlier = {'a': make_state(1.0), 'b': make_state(2.0)}
  copies = [copy(pattern='.*', stage=stage) for stage in ('a', 'b')]
  taken = operate(make_state(0.0), earlier, copies)
  assert taken.params['net']['trunk']['kernel'][0, 0] == 2


def test_no_buffer_is_shared_with_an_earlier_stage():
  """A step that consumes the buffers of one must leave the other alone."""
  origin = make_state(1.0)
  taken = operate(make_state(0.0), {'a': origin}, [copy(pattern='.*', stage='a')])
  ours = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(taken.params)}
  theirs = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(origin.params)}
  assert not ours & theirs
  leaves = jax.tree.leaves(taken.params)
  assert len(ours) == len(leaves)
  jax.jit(lambda x: jax.tree.map(jnp.negative, x), donate_argnums=0)(taken.params)
  np.testing.assert_array_equal(origin.params['net']['trunk']['kernel'], 1)


@pytest.mark.parametrize(
  ('surgery', 'message'),
  [
    (copy(pattern='net/trunc/.*', stage='train'), 'matches no parameter'),
    (copy(pattern='.*', stage='trian'), "did you mean 'train'"),
    (copy(pattern='net/head/.*', stage='other'), r'net/head/kernel is \(2, 3\) here'),
    (carry(fields=('opt',), stage='unlike'), "'net/second' of stage 'unlike'"),
  ],
)
def test_mistakes_are_reported(surgery, message):
  earlier = {
    'train': make_state(1.0),
    'other': make_state(1.0, classes=5),
    'unlike': make_state(1.0).replace(
      opt={'net': {'momentum': jnp.zeros(2), 'second': jnp.zeros(2)}}
    ),
  }
  with pytest.raises(UserError, match=message):
    operate(make_state(0.0), earlier, [surgery])


def test_a_field_that_cannot_be_carried_is_reported():
  with pytest.raises(UserError, match="did you mean 'opt'"):
    carry(fields=('optt',), stage='train')


# A leaf that is measured.


KERNEL = np.arange(6.0).reshape(2, 3)


def shapes_of(state):
  return jax.eval_shape(lambda: state)


def test_put_replaces_one_leaf():
  put_there = put(make_state(0.0), 'params/net/head/kernel', (2, 3), lambda: KERNEL)
  np.testing.assert_array_equal(put_there.params['net']['head']['kernel'], KERNEL)
  assert put_there.params['net']['head']['kernel'].dtype == np.float32
  assert not put_there.params['net']['trunk']['kernel'].any()


def not_called(*args):
  raise AssertionError('something was computed')


def test_in_a_rehearsal_put_computes_nothing():
  shapes = shapes_of(make_state(0.0))
  after = put(shapes, 'params/net/head/kernel', (2, 3), not_called)
  assert jax.tree.leaves(after) == jax.tree.leaves(shapes)
  assert jax.tree.structure(after) == jax.tree.structure(shapes)


@pytest.mark.parametrize('prepare', [lambda state: state, shapes_of])
@pytest.mark.parametrize(
  ('path', 'shape', 'message'),
  [
    ('params/centroids', (2, 3), 'there is no params/centroids here'),
    (
      'params/net/head/kernel',
      (2, 4),
      r'params/net/head/kernel has shape \(2, 3\) here, but the measured value has',
    ),
  ],
)
def test_put_reports_what_it_cannot_replace(prepare, path, shape, message):
  with pytest.raises(UserError, match=message) as error:
    put(prepare(make_state(0.0)), path, shape, not_called)
  assert '\n' not in str(error.value)


# A copy under another name.


def renamed(value):
  """A State with the head of `make_state` in a part of its own."""
  state = make_state(value)
  net = state.params['net']
  head = {'hallucinator': net['head'], 'classifier': net['head']}
  return state.replace(params={'net': {**net, 'head': head}})


def test_copy_from_another_path():
  source = r'net/head/\1'
  surgery = copy(pattern='net/head/hallucinator/(.*)', stage='plain', source=source)
  taken = operate(renamed(0.0), {'plain': make_state(1.0)}, [surgery]).params['net']
  assert np.all(taken['head']['hallucinator']['kernel'] == 1)
  assert not np.any(taken['head']['classifier']['kernel'])
  assert not np.any(taken['trunk']['kernel'])


@pytest.mark.parametrize('prepare', [lambda state: state, shapes_of])
def test_a_source_that_is_absent_is_named(prepare):
  source = r'net/tail/\1'
  surgery = copy(pattern='net/head/hallucinator/(.*)', stage='plain', source=source)
  message = (
    r'net/head/hallucinator/kernel is \(2, 3\) here, '
    r"but in stage 'plain' net/tail/kernel is absent"
  )
  with pytest.raises(UserError, match=message):
    surgery(prepare(renamed(0.0)), {'plain': prepare(make_state(1.0))})


def test_a_source_of_another_shape_is_named():
  surgery = copy(
    pattern='net/head/hallucinator/.*', stage='plain', source='net/head/kernel'
  )
  with pytest.raises(UserError, match=r'net/head/kernel is \(2, 5\)'):
    surgery(renamed(0.0), {'plain': make_state(1.0, classes=5)})


# Means of features over the training images.

COUNTS = (9, 6, 4, 2)
"""21 training images: the last batch of eight has five."""


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
  return tiny.write_npz(tmp_path_factory.mktemp('surgery') / 'tiny.npz', COUNTS)


FIRST = {}
"""First States by configuration and stage: they are the same on any devices."""


def first_state(experiment, stage):
  key = config_digest(experiment.config), stage
  if key not in FIRST:
    batch = {'image': jnp.zeros((8, 8, 8, 1)), 'label': jnp.zeros(8, jnp.int32)}
    init = jax.jit(experiment.stages[stage].method.init)
    FIRST[key] = jax.device_get(init(jax.random.key(len(FIRST)), {'train': batch}))
  return sharding.put_replicated(experiment.mesh, FIRST[key])


def measured(npz, recipe, devices):
  """Returns (images, labels, outputs, first stage's State, last State)."""
  experiment = build.build(tiny.config(npz, recipe), devices=devices)
  assert experiment.mesh.size == devices
  (before, _), (name, stage) = experiment.stages.items()
  earlier = {before: first_state(experiment, before)}
  last = operate(first_state(experiment, name), earlier, stage.surgeries)
  split = experiment.dataset.splits['train']
  images = np.stack([split.source[int(row)] for row in split.rows])
  images = (images / 255 - 0.5).astype(np.float32) / 0.5
  outputs = jax.jit(stage.method.predict)(jax.device_get(last), images)
  outputs = {name: np.asarray(x, np.float64) for name, x in outputs.items()}
  return (
    images,
    np.asarray(split.labels),
    outputs,
    *jax.device_get((earlier[before], last)),
  )


@pytest.mark.parametrize('devices', [1, 8])
def test_centroids_start_as_class_means(npz, devices):
  _, labels, outputs, before, last = measured(npz, 'oltr', devices)
  assert len(labels) == sum(COUNTS)
  expected = [outputs['features'][labels == c].mean(0) for c in range(4)]
  assert np.ptp(expected, axis=0).max() > 1e-3
  np.testing.assert_allclose(last.params['centroids'], expected, rtol=1e-4, atol=1e-6)
  # And the network is what the surgeries before left it.
  head, plain = last.params['net']['head'], before.params['net']['head']
  jax.tree.map(np.testing.assert_array_equal, head['hallucinator'], plain)
  jax.tree.map(
    np.testing.assert_array_equal,
    last.params['net']['trunk'],
    before.params['net']['trunk'],
  )


@pytest.mark.parametrize('devices', [1, 8])
def test_nearest_class_mean(npz, devices):
  _, labels, outputs, before, last = measured(npz, 'ncm', devices)
  features = outputs['features']
  centre = features.mean(0)
  v = features - centre
  v /= np.linalg.norm(v, axis=1, keepdims=True)
  means = np.stack([v[labels == c].mean(0) for c in range(4)])
  head = last.params['net']['head']
  np.testing.assert_allclose(head['centre'], centre, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(head['means'], means, rtol=1e-3, atol=1e-4)
  logits = [[-np.square(x - mean).sum() for mean in means] for x in v]
  np.testing.assert_allclose(outputs['logits'], logits, rtol=1e-3, atol=1e-3)
  jax.tree.map(
    np.testing.assert_array_equal,
    last.params['net']['trunk'],
    before.params['net']['trunk'],
  )


def test_the_head_of_class_means(rng):
  """In doubles, from any means."""
  features, means = rng.normal(size=(6, 5)), rng.normal(size=(3, 5))
  centre = rng.normal(size=5)
  with jax.enable_x64(True):
    variables = {'params': {'centre': jnp.asarray(centre), 'means': jnp.asarray(means)}}
    logits = heads.nearest_class_mean(3).apply(variables, jnp.asarray(features))
  unit = [(x - centre) / np.linalg.norm(x - centre) for x in features]
  expected = [[-np.square(x - mean).sum() for mean in means] for x in unit]
  np.testing.assert_allclose(logits, expected, rtol=1e-10)


def a_survey(counts):
  """Passes over a split whose sums are given: ones, and so many images a class."""
  shapes = {
    'logits': jax.ShapeDtypeStruct((8, 3), np.float32),
    'features': jax.ShapeDtypeStruct((8, 2), np.float32),
  }
  counts = np.asarray(counts, np.float32)
  return Survey(
    outputs=lambda state, split: shapes,
    collect=not_called,
    total=lambda state, split, fold: (np.ones((3, 2), np.float32), counts),
  )


def with_centroids(state):
  return state.replace(params={**state.params, 'centroids': jnp.zeros((3, 2))})


def test_a_class_without_images_has_no_mean():
  surgery = class_means(survey=a_survey([4, 0, 2]))
  with pytest.raises(UserError, match='class 1 has no image in train'):
    surgery(with_centroids(make_state(0.0)), {})
  surgery = class_means(survey=a_survey([4, 1, 2]))
  centroids = surgery(with_centroids(make_state(0.0)), {}).params['centroids']
  np.testing.assert_array_equal(centroids, [[0.25] * 2, [1] * 2, [0.5] * 2])


@pytest.mark.parametrize(
  ('surgery', 'path'),
  [(class_means, 'params/centroids'), (nearest_class_mean, 'params/net/head/centre')],
)
def test_a_state_without_room_for_means_is_reported(surgery, path):
  survey = a_survey([1, 1, 1])._replace(total=not_called)
  with pytest.raises(UserError, match=f'there is no {path} here: method, head and'):
    surgery(survey=survey)(make_state(0.0), {})


@pytest.mark.parametrize('recipe', ['oltr', 'ncm'])
def test_a_rehearsal_leaves_shapes_and_computes_nothing(npz, monkeypatch, recipe):
  monkeypatch.setattr('lt_jax.evals.collect.total', not_called)
  monkeypatch.setattr('lt_jax.evals.collect.collector', not_called)
  experiment = build.build(tiny.config(npz, recipe), devices=1)
  batch = {'image': jnp.zeros((8, 8, 8, 1))}
  (before, first), (_, stage) = experiment.stages.items()
  init = [
    jax.eval_shape(s.method.init, jax.random.key(0), {'train': batch})
    for s in (first, stage)
  ]
  state = init[1]
  for surgery in stage.surgeries:
    state = surgery(state, {before: init[0]})
  assert jax.tree.structure(state) == jax.tree.structure(init[1])
  for a, b in zip(*map(jax.tree.leaves, (state, init[1])), strict=True):
    assert isinstance(a, jax.ShapeDtypeStruct)
    assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize('recipe', ['oltr', 'ncm'])
def test_a_class_that_has_no_training_image_is_named(tmp_path, recipe):
  path = tiny.write_npz(tmp_path / 'tiny.npz', (5, 0, 2, 1))
  with pytest.raises(UserError, match='class 1'):
    measured(path, recipe, 1)


@pytest.mark.parametrize('name', ['nearest_class_mean', 'class_means'])
@pytest.mark.parametrize('split', ['test', 'open_test'])
def test_no_surgery_can_see_a_test_image(npz, name, split):
  config = tiny.config(npz, 'ncm')
  copy = config['stages']['ncm']['surgeries'][0]
  config['stages']['ncm']['surgeries'] = [copy, [name, {'split': split}]]
  with pytest.raises(UserError, match=f'cannot see the split {split!r}; it can see'):
    run.rehearsed(config, '/nonexistent')
