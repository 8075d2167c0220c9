"""Generated features: their objective by its formula, and who may see what."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_zero_shot, scenes_zero_shot, xlsa
from lt_jax import build, checkpoint, run, sharding, train
from lt_jax.config import resolve
from lt_jax.data import augment, masks, scenes
from lt_jax.errors import UserError
from lt_jax.evals.zero_shot import ZERO_SHOT_SEGMENTATION
from lt_jax.losses.alignment import FAMILY, class_mmd
from lt_jax.methods.generation import batch_features
from lt_jax.report.zero_shot import placed_by_description
from tests import mini_zsl

pytestmark = pytest.mark.usefixtures('one_device')

# The objective.


def reference(real, made, labels, mean=None):
  """Returns (discrepancy, mean squared distance) in float64, pair by pair."""
  places = [np.flatnonzero(labels == c) for c in np.unique(labels[labels >= 0])]
  places = [p for p in places if len(p) > 1]
  terms = []  # (weight, squared distance) of every pair that is compared
  total = sum(map(len, places))
  for p in places:
    n = len(p)
    for a in range(n):
      for b in range(n):
        i, j = p[a], p[b]
        if a != b:
          weight = 1 / ((n - 1) * total)
          terms += [(weight, ((x[i] - x[j]) ** 2).sum()) for x in (real, made)]
        terms.append((-2 / (n * total), ((real[i] - made[j]) ** 2).sum()))
  w, d = np.array(terms).T
  mean = (abs(w) * d).sum() / 4 if mean is None else mean
  return sum(w @ np.exp(-d / (2 * a * mean)) for a in FAMILY), mean


DISCREPANCY = jax.jit(jax.value_and_grad(class_mmd, argnums=1))
LABELS = np.array([0, 1, 0, 2, 1, 0, -1, -1])  # of class 2 there is one


def test_the_discrepancy_and_its_gradient_are_the_formula(rng):
  real, made = rng.normal(size=(2, 8, 3))
  value, mean = reference(real, made, LABELS)
  ours, slope = DISCREPANCY(jnp.float32(real), jnp.float32(made), jnp.asarray(LABELS))
  assert float(ours) == pytest.approx(value, abs=1e-6)
  expected = np.zeros_like(made)  # the bandwidths are constants
  for place in np.ndindex(made.shape):
    for sign in (1, -1):
      moved = made.copy()
      moved[place] += sign * 1e-5
      expected[place] += sign * reference(real, moved, LABELS, mean)[0] / 2e-5
  np.testing.assert_allclose(slope, expected, atol=2e-5)
  assert (np.asarray(slope)[[3, 6, 7]] == 0).all() and np.abs(expected).max() > 0.01


def test_nothing_to_compare_has_no_gradient():
  x = jnp.zeros((8, 3))
  for labels in (np.arange(8), np.full(8, -1), np.zeros(8, int)):
    value, slope = DISCREPANCY(x, x, jnp.asarray(labels))
    assert float(value) == pytest.approx(0, abs=1e-6) and not slope.any()


def test_pixels_are_drawn_by_class_and_read_where_the_map_has_them(rng):
  label = np.zeros((2, 8, 8), np.int32)
  label[:, 4:] = -1
  label[0, 2:4, 2:4] = 1  # at one pixel of the map
  label = jnp.asarray(label)
  features = rng.normal(size=(2, 4, 4, 3)).astype(np.float32)
  outputs = {'map': jnp.asarray(features), 'logits': jnp.zeros((2, 8, 8, 2))}
  draw = jax.jit(jax.vmap(lambda key: batch_features(outputs, label, key, 99)))
  vectors, labels = draw(jax.random.split(jax.random.key(0), 400))
  assert 0.4 < labels[:, 0].mean() < 0.6  # though one of 16 is of class 1
  v, found = vectors[0], labels[0]
  assert sorted(found.tolist()) == [-1] * 16 + [0] * 15 + [1]
  np.testing.assert_array_equal(v[found.argmax()], features[0, 1, 1])


# Runs.


def config(folder, options='epochs=50'):
  made = xlsa.get_config(f'feature_generator,{options}')
  made.data.update(
    source=f'xlsa:{folder}',
    unit='none',
    val_classes=mini_zsl.VALIDATION,
    val_per_class=3,
  )
  made.update(batch=16, eval_batch=256)
  for stage in ('validate', 'train'):
    made.stages[stage].players.generator.network.hidden = (16,)
    made.stages[stage].players.generator.schedule.base = 0.01
    made.stages[stage].schedule.base = 0.02
  return resolve(made)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return mini_zsl.write(tmp_path_factory.mktemp('xlsa') / 'MINI')


def test_a_run_recognises_classes_that_it_has_features_of_by_generation_alone(
  folder, tmp_path
):
  result = run.run(config(folder), tmp_path)
  assert result['test']['zero_shot'] > 0.6  # where chance is a third
  assert result['test']['seen_plain'] > 0.6  # where it is a twelfth
  assert result['memory']['calibrated_stacking.gamma'] != 0
  assert result['memory']['calibrated_stacking.val_zero_shot'] > 0.5


@pytest.mark.slow
def test_a_run_resumes_bit_by_bit(folder, tmp_path):
  made = config(folder)
  made['save_every_epochs'] = 25.0
  before = run.run(made, tmp_path)['state_sha256']
  checkpoints = tmp_path / 'stages' / 'train' / 'checkpoints'
  first, last = sorted(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
  assert 0 < first < last
  shutil.rmtree(checkpoints / str(last))
  shutil.rmtree(tmp_path / 'stages' / 'calibrated')
  (tmp_path / 'result.json').unlink()
  assert run.run(made, tmp_path)['state_sha256'] == before


def test_images_of_unseen_classes_reach_no_step_and_the_trunk_stays(rng):
  made = digits_zero_shot.get_config('feature_generator')
  made.model.update(trunk='tiny_cnn')
  made.stages.train.players.generator.network.hidden = ()
  experiment = build.build(resolve(made), devices=1)
  stage, split = experiment.stages['train'], experiment.dataset.splits['train']
  assert not set(split.labels.tolist()) & {3, 5, 8}
  arrays, key = stage.streams['train'].arrays, jax.random.key(0)
  of_others = np.ones((len(arrays['image']), 1, 1, 1), bool)
  of_others[split.rows] = False
  noise = rng.integers(0, 17, arrays['image'].shape).astype(np.uint8)
  other = jnp.asarray(np.where(of_others, noise, arrays['image']))
  first = train.initial_state(stage.method, stage.streams, key, experiment.mesh)

  @jax.jit
  def step(state, image, payloads):
    read = {'train': {**arrays, 'image': image}}
    batches = train.batches_at(stage.streams, read, payloads, key, state.step)
    return stage.method.step(state, batches)[0]

  found = []
  for image in (arrays['image'], other):
    state = first
    for number in range(3):
      payloads = train.payloads_at(stage.streams, number)
      state = step(state, image, sharding.put_batch(experiment.mesh, payloads))
    found.append(jax.device_get(state))
  assert checkpoint.digest(found[0]) == checkpoint.digest(found[1])
  moved = {
    part
    for part, before in {**first.params['net'], **first.params}.items()
    for a, b in zip(
      jax.tree.leaves(before),
      jax.tree.leaves({**found[0].params['net'], **found[0].params}[part]),
      strict=True,
    )
    if (a != b).any()
  }
  assert moved == {'head', 'net', 'generator'}
  for a, b in zip(*(jax.tree.leaves(s.stats) for s in (first, found[0])), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'data': {'class_vectors': ()}}, 'set data.class_vectors'),
    ({'players': {}}, "needs a player 'generator'"),
  ],
)
def test_mistakes_are_one_line(change, message):
  made = digits_zero_shot.get_config('feature_generator')
  if 'players' in change:
    del made.stages.train.players
  else:
    for key, value in change.items():
      made[key].update(value)
  with pytest.raises(UserError, match=message) as error:
    build.build(resolve(made), devices=1)
  assert '\n' not in str(error.value)


# Pixels.


PIXEL_RECIPES = ('zero_shot_pixels', 'zero_shot_pixels_self_training', 'boundless')


@pytest.fixture
def few(monkeypatch):
  monkeypatch.setattr(scenes, 'SPLITS', {'train': 16, 'val': 8, 'test': 8})


def pixel_config(recipe):
  made = scenes_zero_shot.get_config(f'{recipe},train=16,steps=4,target=real')
  made.update(batch=8, eval_batch=8, log_every_steps=2)
  made.model.trunk_options = {'width': 4}
  for stage in made.stages.values():
    for player in stage.get('players', {}).values():
      if 'width' in player.network:
        player.network.width = 4
  return resolve(made)


@pytest.mark.parametrize('recipe', PIXEL_RECIPES[1:])  # the first is in the second
def test_unseen_classes_have_no_pixel_but_in_test_images(recipe, few):
  experiment = build.build(pixel_config(recipe), devices=1)
  source, gone = experiment.dataset, [1, 5]
  assert source.unseen.tolist() == [c in gone for c in range(7)]
  assert not source.counts[gone].any() and (source.counts[[0, 2, 3]] > 0).all()
  for split in ('train', 'val'):
    assert not np.isin(source.splits[split].arrays['label'], gone).any()
  assert np.isin(source.tests['test'].arrays['label'], gone).any()
  for stage in experiment.stages.values():
    state = train.state_shapes(stage.method, stage.streams)
    metrics = train.metric_shapes(stage.method, stage.streams, state, experiment.mesh)
    assert ('discrepancy' in metrics) == (stage.name == 'generate')
    assert ('labelled' in metrics) == (stage.name == 'self_training')
    assert not stage.uses_target_labels


@pytest.mark.slow
@pytest.mark.parametrize('recipe', PIXEL_RECIPES)
def test_pixels_from_end_to_end(recipe, few, tmp_path):
  result = run.run(pixel_config(recipe), tmp_path)
  for found in (result['test'], *result['domains'].values()):
    seen, unseen = found['seen'], found['unseen']
    mean = 2 * seen * unseen / (seen + unseen) if seen + unseen else 0
    assert found['harmonic_mean'] == pytest.approx(mean)


def test_labels_of_pixels_move_with_them_and_fit_the_predictions(few):
  label = jnp.arange(6).reshape(1, 2, 3) - 1
  batch = {'image': jnp.zeros((1, 2, 3, 1)), 'pseudo_label': label.astype(float)}
  moved = augment.with_maps(lambda x: x[:, :, ::-1], batch)['pseudo_label']
  np.testing.assert_array_equal(moved, label[:, :, ::-1])
  made = pixel_config('boundless')
  made['stages']['self_training']['method']['only_unseen'] = True
  stage = build.build(made, devices=1).last
  state = train.state_shapes(stage.method, stage.streams)
  images = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32)
  own = {'image': images, 'label': jax.ShapeDtypeStruct((8, 64, 64), jnp.int32)}
  target = {
    'image': images,
    'pseudo_label': jax.ShapeDtypeStruct((8, 9, 9), jnp.float32),
  }
  with pytest.raises(UserError, match='leave out data.window'):
    jax.eval_shape(stage.method.step, state, {'train': own, 'target': target})


def test_the_views_of_pixels_by_hand():
  unseen = np.array([False, False, True])
  matrix = np.array([[4, 0, 1], [0, 2, 0], [2, 1, 3]])
  sums = np.ones((1, 15))
  records = {'confusion': matrix[None], 'pixels': sums, 'right': sums}
  records |= {'confidence': sums, 'loss': np.ones(1), 'entropy': np.ones(1)}
  task = ZERO_SHOT_SEGMENTATION.bind(unseen, None, ())
  found = task.measure(records, num_classes=3, groups={})
  seen, of_unseen = (4 / 7 + 2 / 3) / 2, 3 / 7
  assert (found['seen'], found['unseen']) == pytest.approx((seen, of_unseen))
  assert found['harmonic_mean'] == pytest.approx(2 / (1 / seen + 1 / of_unseen))
  assert task.headline == 'harmonic_mean'


def test_classes_of_files_are_made_void_too():
  ids = masks.make_ids(('a', 'b', 'c'), raw=(10, 20, 30))
  files = masks.LabelledFiles('', (), (), ids)
  hidden = masks.without_classes(files, np.array([False, True, False]))
  stored = np.array([[10, 20], [30, 255]])
  found = hidden.ids.classes(stored, 'map')
  np.testing.assert_array_equal(found, [[0, masks.VOID], [2, masks.VOID]])
  with pytest.raises(UserError, match='id 7'):
    hidden.ids.classes(np.array([[7]]), 'map')


def test_a_head_that_reads_neighbours_is_rejected(few):
  made = pixel_config('zero_shot_pixels')
  made['model']['head'] = 'multi_dilation'
  with pytest.raises(UserError, match="single pixels.*such as 'linear'"):
    build.build(made, devices=1)
  made = pixel_config('zero_shot_pixels')
  made['task'] = 'segmentation'
  with pytest.raises(UserError, match="set config.task to 'zero_shot_segmentation'"):
    build.build(made, devices=1)


# The report.


def test_a_description_is_placed_where_the_others_lead_to(rng):
  vectors = rng.normal(size=(6, 3))
  unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
  label = np.repeat(np.arange(6), 2)
  spread = np.tile([[1.0], [-1.0]], (6, 4))  # none in the mean of a class
  mixing = rng.normal(size=(3, 4))
  points = (unit @ mixing)[label] + spread
  seen = np.arange(6) < 5
  found = placed_by_description(points, label, vectors, seen, penalty=0.5)
  means = points.reshape(6, 2, 4).mean(1)[:5]
  gram = unit[:5].T @ unit[:5] + 0.5 * np.eye(3)
  ridge = np.linalg.solve(gram, unit[:5].T @ (means - means.mean(0)))
  np.testing.assert_allclose(found, unit @ ridge + means.mean(0), atol=1e-6)
  other = np.where(label[:, None] == 5, 99.0, points)  # not fitted to
  again = placed_by_description(other, label, vectors, seen, penalty=0.5)
  np.testing.assert_array_equal(found, again)
