"""Zero-shot learning: closed forms, views and curves by independent formulas."""

import functools
import itertools
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from scipy import linalg

from configs import xlsa
from lt_jax import build, run, trained
from lt_jax.build import checks
from lt_jax.cautions import cautions
from lt_jax.config import resolve
from lt_jax.data.attributes import EMBEDDED, binary, unit_rows
from lt_jax.errors import UserError
from lt_jax.evals.zero_shot import (
  Scores,
  class_mean_accuracy,
  harmonic_mean,
  scores_of,
  seen_unseen_curve,
  zero_shot_task,
)
from lt_jax.losses import make_loss
from lt_jax.models import HEADS, make_classifier
from lt_jax.surgeries.closed_forms import FORMS, Seen, softmax_regression
from lt_jax.surgeries.zero_shot import Classes, best_gamma, choose
from tests import mini_zsl

UNSEEN = np.isin(np.arange(mini_zsl.CLASSES), mini_zsl.UNSEEN)
VALIDATION = np.isin(mini_zsl.NAMES, mini_zsl.VALIDATION)


def planted(fitted=~UNSEEN):
  x, label, attributes = mini_zsl.planted()
  mask = fitted[label]
  return Seen(x[mask], label[mask], unit_rows(attributes), attributes, fitted)


# Closed forms.


def test_eszsl_is_where_its_objective_is_stationary():
  seen = planted()
  s = seen.described[seen.fitted]
  y = np.where(seen.y[:, None] == np.flatnonzero(seen.fitted)[None], 1.0, -1.0)
  sets = [{'g': 0.3, 'l': 2.0}, {'g': 10.0, 'l': 0.01}]
  for one, params in zip(sets, FORMS['eszsl'].fits(seen, sets), strict=True):
    w, g, h = params['kernel'], one['g'], one['l']
    slope = seen.x.T @ (seen.x @ w @ s.T - y) @ s
    slope += g * w @ s.T @ s + h * seen.x.T @ seen.x @ w + g * h * w
    assert np.abs(slope).max() < 1e-9
    left = linalg.inv(seen.x.T @ seen.x + g * np.eye(mini_zsl.WIDTH))
    right = linalg.inv(s.T @ s + h * np.eye(mini_zsl.ATTRIBUTES))
    np.testing.assert_allclose(w, left @ seen.x.T @ y @ s @ right, rtol=0, atol=1e-9)


def test_the_kernel_form_is_stationary_too():
  seen = planted()
  s = seen.described[seen.fitted]
  y = np.where(seen.y[:, None] == np.flatnonzero(seen.fitted)[None], 1.0, -1.0)
  one = {'width': 0.5, 'g': 0.1, 'l': 0.3}
  (params,) = FORMS['kernel_eszsl'].fits(seen, [one])
  apart = ((seen.x[:, None] - seen.x[None]) ** 2).sum(-1)
  width = 0.5 * math.sqrt(apart.mean())
  assert math.isclose(float(params['width']), width, rel_tol=1e-12)
  k, a = np.exp(-apart / (2 * width**2)), params['kernel']
  slope = k @ ((k @ a @ s.T - y) @ s + 0.1 * a @ s.T @ s + 0.3 * k @ a + 0.03 * a)
  assert np.abs(slope).max() < 1e-9
  scores = FORMS['kernel_eszsl'].scores(params, seen.x[:5], seen.described, seen.raw)
  np.testing.assert_allclose(scores, k[:5] @ a @ seen.described.T, rtol=0, atol=1e-9)


def test_sae_solves_its_sylvester_equation():
  seen = planted()
  codes = seen.described[seen.y].T
  (params,) = FORMS['sae'].fits(seen, [{'weight': 0.7}])
  expected = linalg.solve_sylvester(
    codes @ codes.T, 0.7 * seen.x.T @ seen.x, 1.7 * codes @ seen.x
  )
  np.testing.assert_allclose(params['kernel'].T, expected, rtol=0, atol=1e-9)


def test_a_softmax_is_at_its_minimum(rng):
  from sklearn.linear_model import LogisticRegression

  x, label = rng.normal(size=(60, 4)), rng.integers(0, 3, 60)
  targets = (label[:, None] == np.arange(3)[None]).astype(float)
  kernel, bias = softmax_regression(x, targets, 2.0)
  p = np.exp(x @ kernel + bias)
  p /= p.sum(1, keepdims=True)
  assert np.abs(x.T @ (p - targets) + 2 * kernel).max() < 1e-4
  model = LogisticRegression(C=0.5, tol=1e-10, max_iter=10000).fit(x, label)
  np.testing.assert_allclose(kernel, model.coef_.T, atol=2e-5)


def test_attributes_are_ridge_regressions_with_sigmoids():
  seen = planted()
  codes = seen.raw > seen.raw.mean()
  (params,) = FORMS['dap'].fits(seen, [{'penalty': 0.5}])
  centred = seen.x - seen.x.mean(0)
  gram = centred.T @ centred + 0.5 * np.eye(mini_zsl.WIDTH)
  wanted = codes[seen.y].astype(float)
  ridge = linalg.solve(gram, centred.T @ wanted)
  for m in range(mini_zsl.ATTRIBUTES):
    alpha = params['kernel'][:, m] @ ridge[:, m] / (ridge[:, m] @ ridge[:, m])
    np.testing.assert_allclose(params['kernel'][:, m], alpha * ridge[:, m], atol=1e-9)
    # The sigmoid is at the stationary point of the likelihood of Platt's targets.
    p = 1 / (1 + np.exp(-(seen.x @ params['kernel'][:, m] + params['bias'][m])))
    has = wanted[:, m] > 0
    target = np.where(has, (has.sum() + 1) / (has.sum() + 2), 1 / ((~has).sum() + 2))
    assert abs((p - target).sum()) < 1e-6
    assert abs(((p - target) * (seen.x @ ridge[:, m])).sum()) < 1e-6
  np.testing.assert_allclose(params['prior'], codes[seen.fitted].mean(0), atol=1e-12)


def loops(form, params, x, described, raw):
  """Returns the scores of a form per class, from its formula."""
  has = raw > raw.mean()
  found = np.empty((len(x), len(raw)))
  for i, c in itertools.product(range(len(x)), range(len(raw))):
    logits = x[i] @ params['kernel'] + params['bias']
    if form in ('iap', 'conse'):
      shares = np.exp(logits - logits.max())
      shares /= shares.sum()
      p = shares @ has
    else:
      p = 1 / (1 + np.exp(-logits))
    if form == 'nearest_hamming':
      found[i, c] = -((p >= 0.5) != has[c]).sum()
    elif form == 'nearest_cosine':
      found[i, c] = p @ has[c] / np.linalg.norm(p) / np.linalg.norm(has[c])
    elif form == 'conse':
      top = np.argsort(-shares)[:3]
      mean = shares[top] @ described[top]
      found[i, c] = mean @ described[c] / np.linalg.norm(mean)
    else:
      found[i, c] = 0
      for m, q in enumerate(params['prior']):
        if 0 < q < 1:
          own = np.clip(p[m], 1e-6, 1 - 1e-6)
          found[i, c] += math.log(own / q if has[c, m] else (1 - own) / (1 - q))
  return found


HEAD_OF = {
  'eszsl': ('compatibility', {'scale': 2.0}),
  'kernel_eszsl': ('kernel_compatibility', {}),
  'sae': ('compatibility', {'similarity': 'attributes', 'scale': 2.0}),
  'sae_features': ('compatibility', {'similarity': 'features', 'scale': 2.0}),
  'dap': ('attributes', {'rule': 'dap'}),
  'nearest_hamming': ('attributes', {'rule': 'hamming'}),
  'nearest_cosine': ('attributes', {'rule': 'cosine'}),
  'iap': ('seen_classes', {'rule': 'iap'}),
  'conse': ('seen_classes', {'rule': 'conse', 'top': 3}),
}


@pytest.mark.parametrize('form', FORMS)
def test_a_head_scores_as_its_form_does(form):
  seen, method = planted(), FORMS[form]
  hyper = {name: values[len(values) // 2] for name, values in method.grid.items()}
  (params,) = method.fits(seen, [hyper])
  assert set(params) == set(method.fills)
  x = mini_zsl.planted(seed=1)[0][:7]
  name, options = HEAD_OF[form]
  read = {key: options[key] for key in method.reads}
  scores = method.scores(params, x, seen.described, seen.raw, **read)
  if 'bias' in params:
    expected = loops(form, params, x, seen.described, seen.raw)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-9)
  net = make_classifier(
    'identity',
    name,
    mini_zsl.CLASSES,
    head_options=options,
    class_vectors=seen.raw,
    examples=len(seen.x),
  )
  images = jnp.asarray(x, jnp.float32)[:, None, None]
  variables = net.init(jax.random.key(0), images, train=False)
  assert set(variables['params']['head']) == set(params)
  head = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
  variables = {**variables, 'params': {'head': head}}
  outputs = net.apply(variables, images, train=False)
  np.testing.assert_allclose(outputs['logits'], scores, rtol=1e-3, atol=1e-3)


def test_perfect_attributes_name_every_class():
  codes, _ = binary(EMBEDDED['seven_segments'].vectors)
  head = make_classifier(
    'identity',
    'attributes',
    10,
    head_options={'rule': 'dap'},
    class_vectors=codes.astype(float),
  )
  images = jnp.asarray(codes, jnp.float32)[:, None, None]
  variables = head.init(jax.random.key(0), images, train=False)
  params = {
    'kernel': 40 * jnp.eye(7),
    'bias': jnp.full(7, -20.0),
    'threshold': jnp.float32(0.5),
    'prior': jnp.asarray(codes[:7].mean(0), jnp.float32),
  }
  outputs = head.apply({**variables, 'params': {'head': params}}, images, train=False)
  np.testing.assert_array_equal(outputs['logits'].argmax(-1), np.arange(10))
  np.testing.assert_array_equal(outputs['attributes'] > 0.5, codes)


# Views, curves, gamma.


def test_metrics_of_a_confusion_made_by_hand():
  """Classes 0 and 1 are seen, 2 and 3 are not; class 3 has no image."""
  unseen = np.array([False, False, True, True])
  label = np.array([0, 0, 0, 0, 1, 2, 2])
  logits = np.zeros((7, 4))
  for row, best, second in [
    (0, 0, 2), (1, 0, 2), (2, 2, 0), (3, 0, 3), (4, 1, 2), (5, 0, 2), (6, 2, 1),
  ]:  # fmt: skip
    logits[row, best], logits[row, second] = 2, 1
  task = zero_shot_task(unseen, None, ())
  outputs = {'logits': jnp.asarray(logits), 'features': jnp.zeros((7, 1))}
  records = jax.device_get(task.record(outputs, {'label': jnp.asarray(label)}))
  groups = {'seen': ~unseen, 'unseen': unseen}
  found = task.measure(records, num_classes=4, groups=groups)
  assert found['seen'] == pytest.approx((0.75 + 1) / 2)
  assert (found['unseen'], found['zero_shot']) == (0.5, 1.0)
  assert found['harmonic_mean'] == pytest.approx(2 * 0.875 * 0.5 / 1.375)
  assert found['seen_plain'] == found['seen']
  assert harmonic_mean(0.0, 0.0) == 0
  assert class_mean_accuracy(label, label, np.arange(4) == 3) is None


def brute(scores, unseen, gamma):
  prediction = np.where(
    scores.seen_score - gamma >= scores.unseen_score,
    scores.seen_class,
    scores.unseen_class,
  )
  return tuple(
    np.mean([(prediction[scores.label == c] == c).mean() for c in kind])
    for kind in (
      [c for c in np.unique(scores.label) if not unseen[c]],
      [c for c in np.unique(scores.label) if unseen[c]],
    )
  )


def test_the_curve_is_that_of_every_gamma(rng):
  unseen = np.arange(6) >= 4
  label = rng.integers(0, 6, 80)
  logits = rng.normal(size=(80, 6)) + 1.5 * np.eye(6)[label]
  logits = np.round(8 * logits) / 8  # with ties
  scores = scores_of(logits, label, unseen)
  curve = seen_unseen_curve(scores, unseen)
  for gamma in np.linspace(-5, 5, 101) + 0.01:
    np.testing.assert_allclose(
      curve.at(gamma), brute(scores, unseen, gamma), atol=1e-12
    )
  turns = np.unique(scores.seen_score - scores.unseen_score)
  gammas = [-99, *(turns + 1e-6)]
  points = np.array([brute(scores, unseen, gamma) for gamma in gammas])
  np.testing.assert_allclose(points[:, 0], curve.seen, atol=1e-12)
  np.testing.assert_allclose(points[:, 1], curve.unseen, atol=1e-12)
  s, u = points.T
  area = sum((u[1:] - u[:-1]) * (s[1:] + s[:-1]) / 2)
  assert curve.area == pytest.approx(area, abs=1e-12)
  alone = [
    class_mean_accuracy(label, found, kind)
    for found, kind in ((scores.seen_class, ~unseen), (scores.unseen_class, unseen))
  ]
  assert (curve.unseen[0], curve.seen[-1]) == (0, pytest.approx(0, abs=1e-12))
  assert [curve.seen[0], curve.unseen[-1]] == pytest.approx(alone)
  # The best point is the best of all, and gamma is in the middle of its range.
  h = [float(harmonic_mean(*point)) for point in points]
  assert harmonic_mean(*curve.at(curve.between(curve.best))) == pytest.approx(max(h))
  only_seen = Scores(*(x[~unseen[label]] for x in scores))
  assert seen_unseen_curve(only_seen, unseen) is None


def classes():
  attributes = mini_zsl.planted()[2]
  return Classes(unit_rows(attributes), attributes, ~UNSEEN, VALIDATION)


def test_choices_do_not_depend_on_unseen_classes():
  """Gamma is the same whatever their scores are."""
  x, label, _ = mini_zsl.planted()
  mask = ~UNSEEN[label]
  scores = np.random.default_rng(0).normal(size=(mask.sum(), mini_zsl.CLASSES))
  scores += np.eye(mini_zsl.CLASSES)[label[mask]]
  gamma, mean = best_gamma(scores, label[mask], classes())
  other = np.where(UNSEEN, 99.0, scores)
  assert best_gamma(other, label[mask], classes()) == (gamma, mean)
  shifted = scores - gamma * (~VALIDATION)
  prediction = np.where(UNSEEN, -np.inf, shifted).argmax(1)
  kinds = [
    class_mean_accuracy(label[mask], prediction, k)
    for k in (VALIDATION, ~VALIDATION & ~UNSEEN)
  ]
  assert harmonic_mean(*kinds) == pytest.approx(mean)


def test_hyper_parameters_are_those_best_on_validation_classes():
  x, label, _ = mini_zsl.planted()
  mask = ~UNSEEN[label]
  train = {'features': x[mask], 'label': label[mask]}
  method = FORMS['eszsl']
  hyper, chosen = choose(method, classes(), train, None, {'l': 0.1}, True)
  novel = VALIDATION[train['label']]
  apart = np.zeros(len(novel), bool)
  apart[np.flatnonzero(~novel)[::5]] = True
  rest = ~novel & ~apart
  described = classes().described
  values = []
  for g in method.grid['g']:
    seen = Seen(
      x[mask][rest], label[mask][rest], described, described, classes().fitted
    )
    (params,) = method.fits(seen, [{'g': g, 'l': 0.1}])
    scores = x[mask][novel] @ params['kernel'] @ described.T
    found = np.where(VALIDATION, scores, -9e9).argmax(1)
    values.append(class_mean_accuracy(label[mask][novel], found, VALIDATION))
  assert hyper == {'g': method.grid['g'][int(np.argmax(values))], 'l': 0.1}
  assert chosen['val_zero_shot'] == max(values)


# Losses and towers.


@pytest.mark.parametrize(('rank', 'weight'), [(1, 1.0), (2, 0.75), (3, 11 / 18)])
def test_weights_of_ale_by_rank(rank, weight):
  logits = jnp.asarray([[1.0] + [0.5] * rank + [-9.0] * (4 - rank)])
  batch = {'label': jnp.zeros(1, jnp.int32)}
  loss, plain = (
    make_loss(name, np.ones(5), margin=1.0)({'logits': logits}, batch)[0]
    for name in ('ale', 'devise')
  )
  assert float(loss / plain) == pytest.approx(weight, rel=1e-6)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize('distance', [False, True])
@pytest.mark.parametrize('fixed', ['none', 'classes', 'images'])
def test_towers_are_their_formula(rng, fixed, distance):
  x, described = rng.normal(size=(5, 4)), rng.normal(size=(6, 3))
  made = {'fixed': fixed, 'distance': distance, 'width': 3, 'hidden': 7}
  net = make_classifier(
    'identity',
    'two_tower',
    6,
    head_options={**made, 'temperature': 0.2},
    class_vectors=described,
  )
  with jax.enable_x64(True):
    images = jnp.asarray(x)[:, None, None]
    variables = net.init(jax.random.key(0), images, train=False)
    head = jax.tree.map(lambda p: rng.normal(size=p.shape), variables['params']['head'])
    stats = {'head': {'class_vectors': jnp.asarray(described)}}
    drawn = {'params': {'head': head}, 'batch_stats': stats}
    outputs = jax.device_get(net.apply(drawn, images, train=False))

  def dense(name, v):
    return v @ head[name]['kernel'] + head[name]['bias']

  f = x if fixed == 'images' else dense('images', x)
  g = unit(described)
  if fixed != 'classes':
    g = dense('classes', np.maximum(dense('hidden', g), 0))
  if distance:
    expected = -((f[:, None] - g[None]) ** 2).sum(-1)
  else:
    expected = unit(f) @ unit(g).T / 0.2
  np.testing.assert_allclose(outputs['logits'], expected, rtol=0, atol=1e-9)
  parts = {'images': {'images'}, 'classes': {'hidden', 'classes'}}
  assert set(head) == {'images', 'hidden', 'classes'} - parts.get(fixed, set())


def test_two_free_towers_need_a_contrast():
  config = resolve(xlsa.get_config('two_tower'))
  checks.check_collapse(config)
  config['loss'] = {'name': 'negative_score'}
  with pytest.raises(UserError, match='training collapses: set model.head_options'):
    checks.check_collapse(config)
  config['model']['head_options']['fixed'] = 'images'
  checks.check_collapse(config)


def test_heads_need_descriptions():
  with pytest.raises(UserError, match='set data.class_vectors'):
    make_classifier('identity', 'compatibility', 3)
  assert {name for name, _ in HEAD_OF.values()} | {'two_tower'} <= set(HEADS)


# Runs.


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return mini_zsl.write(tmp_path_factory.mktemp('xlsa') / 'MINI')


def config(folder, recipe, **data):
  made = xlsa.get_config(f'{recipe},epochs=20')
  made.data.update(
    source=f'xlsa:{folder}', unit='none', val_classes=mini_zsl.VALIDATION
  )
  made.data.update(data)
  if made.data.val_per_class:
    made.data.val_per_class = 3
  made.update(batch=16, eval_batch=256)
  return resolve(made)


def test_a_run_is_the_closed_form(folder, tmp_path, one_device):
  result = run.run(config(folder, 'eszsl'), tmp_path)
  chosen = {k.partition('.')[2]: v for k, v in result['memory'].items()}
  x, label, attributes = mini_zsl.planted()
  stored = np.load(tmp_path / 'predictions.npz')
  unseen = UNSEEN[label]
  rank = np.array([(label[:i] == c).sum() for i, c in enumerate(label)])
  is_train = ~unseen & (rank < 15)
  seen = Seen(x[is_train], label[is_train], unit_rows(attributes), attributes, ~UNSEEN)
  hyper = {name: float(chosen[name]) for name in ('g', 'l')}
  (params,) = FORMS['eszsl'].fits(seen, [hyper])
  scores = x[~is_train] @ params['kernel'] @ seen.described.T
  calibrated = scores - chosen['gamma'] * ~UNSEEN
  np.testing.assert_array_equal(stored['label'], label[~is_train])
  np.testing.assert_allclose(stored['logits'], calibrated, atol=2e-3)
  assert (stored['prediction'] == calibrated.argmax(1)).mean() > 0.97
  test = result['test']
  among = np.where(UNSEEN, scores, -9e9).argmax(1)
  expected = class_mean_accuracy(label[~is_train], among, UNSEEN)
  assert test['zero_shot'] == pytest.approx(expected, abs=0.03)
  assert test['zero_shot'] > 0.6  # where chance is a third
  assert test['seen_plain'] != test['seen'] and 0 < test['ausuc'] < 1
  curve = np.load(tmp_path / 'zero_shot.npz')
  assert curve['chosen'].tolist() == pytest.approx([test['seen'], test['unseen']])
  # The folder has everything that prediction needs; a class can be added there.
  network = trained.open_run(epath.Path(tmp_path))
  images = x[~is_train][:, None, None].astype(np.float32)
  outputs = jax.jit(network.predict)(network.state, images)
  np.testing.assert_allclose(outputs['logits'], calibrated, atol=1e-3)


def test_gamma_is_chosen_with_the_options_of_the_head(folder, tmp_path, one_device):
  made = xlsa.get_config('conse')
  made.stages.fit.model.head_options.top = 2
  made.data.update(
    source=f'xlsa:{folder}', unit='none', val_classes=mini_zsl.VALIDATION
  )
  result = run.run(resolve(made), tmp_path)
  x, label, _ = mini_zsl.planted()
  rank = np.array([(label[:i] == c).sum() for i, c in enumerate(label)])
  is_train = ~UNSEEN[label] & (rank < 15)
  train = {'features': x[is_train], 'label': label[is_train]}
  form = FORMS['conse']
  expected = {}
  for top in (2, 10):
    scores = functools.partial(form.scores, top=top)
    parts = form._replace(scores=scores), classes(), train, None
    expected[top] = choose(*parts, {}, True)[1]['gamma']
  gamma = result['memory']['calibrated_stacking.gamma']
  assert gamma == pytest.approx(expected[2], abs=1e-4)
  assert abs(gamma - expected[10]) > 1e-3


@pytest.mark.parametrize(
  'recipe', ['ale', pytest.param('two_tower', marks=pytest.mark.slow)]
)
def test_a_run_learns_what_unseen_classes_look_like(
  folder, tmp_path, recipe, one_device
):
  result = run.run(config(folder, recipe), tmp_path)
  assert result['test']['zero_shot'] > 0.6
  assert result['memory']['calibrated_stacking.gamma'] != 0
  if recipe == 'two_tower':  # not collapsed
    network = trained.open_run(epath.Path(tmp_path))
    x = mini_zsl.planted()[0][:, None, None].astype(np.float32)
    outputs = jax.jit(network.stage.method.predict)(network.state, x)
    assert np.asarray(outputs['embedding']).std(0).mean() > 0.1


WRONG = {
  'gamma': ('eszsl', {'val_classes': ()}, 'g and l and gamma are chosen on validation'),
  'gamma of a training': (
    'ale',
    {'val_classes': ()},
    'gamma is chosen on validation classes, .*: set data.val_classes',
  ),
  'nothing unseen': (
    'eszsl',
    {'source': 'digits', 'test_per_class': 5, 'val_classes': ()},
    'is for data with unseen classes: set data.unseen',
  ),
}


@pytest.mark.parametrize('name', WRONG)
def test_mistakes_are_one_line(folder, tmp_path, name):
  recipe, data, message = WRONG[name]
  with pytest.raises(UserError, match=message) as error:
    build.build(config(folder, recipe, **data), devices=1)
  assert '\n' not in str(error.value)


def test_another_task_is_rejected(folder):
  made = config(folder, 'eszsl')
  made['task'] = 'classification'
  with pytest.raises(UserError, match="set config.task to 'zero_shot'"):
    build.build(made, devices=1)


def test_classes_of_pretraining_are_warned_of(folder, tmp_path, one_device):
  path = tmp_path / 'classes.txt'
  path.write_text('cat\nanimal 7, the seventh\n')
  made = config(folder, 'eszsl', pretrain_classes=str(path))
  lines = cautions(build.build(made, devices=1))
  assert any('1 of 3 unseen classes are in' in line for line in lines)
  plain = cautions(build.build(config(folder, 'eszsl'), devices=1))
  assert any(line.startswith('not checked: whether the unseen') for line in plain)


# Real data.


@pytest.mark.slow
@pytest.mark.parametrize(('split', 'expected'), [('ss', 40.8), ('ps', 30.3)])
def test_eszsl_on_awa1(split, expected):
  path = pathlib.Path(os.environ.get('LT_JAX_DATA', ''), 'zsl/awa1_features.npz')
  if not path.exists():
    pytest.skip('LT_JAX_DATA names no folder with zsl/awa1_features.npz')
  stored = np.load(path)
  x, label = stored['features'].astype(np.float64), stored['labels'].astype(int)
  unseen = stored[f'{split}_unseen']
  train = ~unseen[label] if split == 'ss' else stored['ps_part'] == 0
  raw = stored['attributes']
  seen = Seen(x[train], label[train], unit_rows(raw), raw, ~unseen)
  (params,) = FORMS['eszsl'].fits(seen, [{'g': 1.0, 'l': 0.1}])
  scores = x[unseen[label]] @ params['kernel'] @ seen.described.T
  found = np.where(unseen, scores, -9e9).argmax(1)
  value = class_mean_accuracy(label[unseen[label]], found, unseen)
  assert 100 * value == pytest.approx(expected, abs=1.0)
