"""Adaptation in closed form: the maps match the papers and reach the network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from sklearn.decomposition import PCA

from configs import digits_domains
from lt_jax import build, train
from lt_jax.config import resolve
from lt_jax.errors import UserError
from lt_jax.evals.collect import Survey
from lt_jax.method import Method, State
from lt_jax.methods.pairs import as_source
from lt_jax.models.normalisation import BatchNorm
from lt_jax.surgeries import maps, shallow
from lt_jax.surgery import copy

D, C = 6, 3


@pytest.fixture(scope='module')
def domains():
  """Labelled features of two domains; the second is rotated and shifted."""
  rng = np.random.default_rng(0)
  labels = np.arange(60) % C
  centres, turn = rng.normal(size=(C, D)), np.linalg.qr(rng.normal(size=(D, D)))[0]
  scale = np.linspace(2, 0.2, D)
  x = (centres[labels] + 0.3 * rng.normal(size=(60, D))) * scale
  z = (centres[labels[:45]] + 0.3 * rng.normal(size=(45, D))) * scale @ turn + 1
  return x.astype(np.float32), labels, z.astype(np.float32)


def base():
  """A method with a linear head on images that are features."""

  def init(key, batches):
    head = {'kernel': jnp.ones((D, C)), 'bias': jnp.zeros(C)}
    return State(jnp.int32(0), key, {'net': {'head': head}}, {'net': {}}, {}, {})

  def predict(state, images):
    head = state.params['net']['head']
    return {'features': images, 'logits': images @ head['kernel'] + head['bias'][None]}

  return Method(init, None, predict)


def operated(domains, wrappers, surgeries, shown=None):
  """Returns a method, and its State after surgeries that see both domains."""
  x, labels, z = domains
  method = functools.reduce(lambda made, wrap: wrap(made), wrappers, base())
  images = {
    'train': {'image': x, 'label': labels},
    'target/train': {'image': z} | ({} if shown is None else {'label': shown}),
  }

  def collect(state, split, keep):
    view = as_source(state) if split == 'train' else state
    return jax.device_get(
      keep(method.predict(view, images[split]['image']), images[split])
    )

  def outputs(state, split):
    assert split in images
    return jax.eval_shape(method.predict, state, images[split]['image'])

  survey = Survey(outputs, collect, None)
  state = method.init(jax.random.key(0), {'train': {'image': x}})
  shapes = jax.eval_shape(lambda: state)
  for surgery in surgeries:
    made = surgery(survey=survey)
    assert jax.tree.structure(made(shapes, {})) == jax.tree.structure(shapes)
    state = jax.device_get(made(state, {}))
  return method, state


def test_subspaces_are_aligned_as_in_the_paper(domains):
  x, _, z = (np.asarray(v, np.float64) for v in domains)
  d = 3
  p_s, p_t = (PCA(d).fit(v).components_.T for v in (x, z))
  ours = maps.subspace_maps(maps.principal_axes(x), maps.principal_axes(z), d)
  source = (x - x.mean(0)) @ p_s @ p_s.T @ p_t
  target = (z - z.mean(0)) @ p_t
  # Axes are determined up to sign, and the map back is an isometry; distances are
  # unique.
  for a, b in ((ours[0](x), source), (ours[1](z), target)):
    np.testing.assert_allclose(a @ a.T, b @ b.T, atol=1e-9)
  np.testing.assert_allclose(ours[0](x) @ ours[1](z).T, source @ target.T, atol=1e-9)
  same = maps.subspace_maps(*[maps.principal_axes(x)] * 2, D)
  for one in same:
    np.testing.assert_allclose(one.kernel, np.eye(D), atol=1e-9)


def test_the_rank_is_that_of_the_data(domains):
  x, _, _ = domains
  assert maps.principal_axes(x).axes.shape == (D, D)
  assert maps.principal_axes(x[:4]).axes.shape == (D, 3)
  flat = np.concatenate([x, x[:, :2], np.ones((60, 1))], axis=1)
  assert maps.principal_axes(flat).axes.shape == (9, D)


def test_coral_gives_the_source_the_covariance_of_the_target(domains):
  x, _, z = domains
  source, target = maps.coral_maps(x, z, 1e-9)
  found = np.cov(source(x.astype(np.float64)), rowvar=False)
  np.testing.assert_allclose(found, np.cov(z, rowvar=False), atol=1e-6)
  np.testing.assert_allclose(source(x).mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(target(z), z - z.mean(0), atol=1e-5)
  # On standardised features, the constants of the paper's code.
  x, z = ((v - v.mean(0)) / v.std(0, ddof=1) for v in (np.float64(x), np.float64(z)))
  source, _ = maps.coral_maps(x, z, 1.0)

  def power(covariance, exponent):
    values, vectors = np.linalg.eigh(covariance + np.eye(D))
    return vectors @ np.diag(values**exponent) @ vectors.T

  wanted = power(np.cov(x, rowvar=False), -0.5) @ power(np.cov(z, rowvar=False), 0.5)
  np.testing.assert_allclose(source.kernel, wanted, atol=1e-9)
  same, _ = maps.coral_maps(x, x, 1.0)
  np.testing.assert_allclose(same.kernel, np.eye(D), atol=1e-9)


SUBSPACES = functools.partial(maps.aligned_subspaces, dimensions=(4, 2))
SVM = functools.partial(shallow.linear_svm, costs=(1.0, 0.01))


@pytest.mark.parametrize(
  ('wrapper', 'surgery'),
  [(SUBSPACES, maps.align_subspaces), (maps.aligned_features, maps.coral)],
)
def test_each_domain_is_seen_through_its_own_map(domains, wrapper, surgery):
  x, labels, z = domains
  fit = functools.partial(shallow.fit_linear_svm, standardise=False)
  method, state = operated(domains, (wrapper, SVM), (surgery, fit))
  pair = (as_source(state).memory['map'], state.memory['map'])
  for domain, own, seen in zip((x, z), pair, (as_source(state), state), strict=True):
    mapped = (domain - own['centre']) @ own['kernel']
    found = jax.device_get(method.predict(seen, domain))
    np.testing.assert_allclose(found['features'], mapped, atol=1e-4)
    head = state.params['net']['head']
    logits = mapped @ head['kernel'] + head['bias']
    np.testing.assert_allclose(found['logits'], logits, atol=1e-4)
  predicted = method.predict(as_source(state), x)['logits'].argmax(1)
  assert (predicted == labels).mean() > 0.9
  assert float(state.memory['linear_svm']['cost']) in (1.0, np.float32(0.01))
  assert not np.allclose(pair[0]['kernel'], pair[1]['kernel'])


def test_the_dimension_is_chosen_by_the_source_and_the_oracle_says_so(domains):
  x, labels, z = domains
  _, state = operated(domains, (SUBSPACES,), (maps.align_subspaces,))
  room = state.memory['subspaces']
  assert room['dimensions'].tolist() == [2, 4]
  best = int(np.argmax(room['accuracy']))
  assert int(room['dimension']) == [2, 4][best] and (room['accuracy'] > 0.5).all()
  oracle = functools.partial(maps.align_subspaces, choose_by='oracle')
  with pytest.raises(UserError, match="needs the target's labels"):
    operated(domains, (SUBSPACES,), (oracle,))
  _, state = operated(domains, (SUBSPACES,), (oracle,), shown=labels[:45])
  assert state.memory['subspaces']['accuracy'].shape == (2,)


def test_neighbours_are_the_images_of_the_stage(domains):
  x, labels, z = domains
  near = functools.partial(shallow.nearest_neighbour, counts=[20] * C)
  wrappers = (maps.aligned_features, near)
  method, state = operated(domains, wrappers, (maps.coral, shallow.remember_images))
  source, target = maps.coral_maps(x, z, 1.0)
  apart = ((target(z)[:, None] - source(x)[None]) ** 2).sum(-1)
  found = method.predict(state, z)['logits'].argmax(1)
  np.testing.assert_array_equal(found, labels[apart.argmin(1)])


@pytest.mark.parametrize(
  ('wrappers', 'surgeries', 'message'),
  [
    ((), (maps.coral,), "no wrapper 'aligned_features'"),
    ((), (maps.align_subspaces,), "no wrapper 'aligned_subspaces'"),
    ((), (shallow.fit_linear_svm,), "no wrapper 'linear_svm'"),
    ((), (shallow.remember_images,), "no wrapper 'nearest_neighbour'"),
    (
      (functools.partial(maps.aligned_subspaces, dimensions=(7,)),),
      (),
      'd = 7 is not between 1 and 6, the number',
    ),
    ((functools.partial(shallow.linear_svm, costs=(0.0,)),), (), 'positive'),
    (
      (functools.partial(shallow.nearest_neighbour, counts=[2, 1], k=4),),
      (),
      'k is 4; it must be from 1 to 3',
    ),
    ((), (functools.partial(maps.coral, ridge=0.0),), 'ridge is 0.0'),
  ],
)
def test_mistakes_are_reported(domains, wrappers, surgeries, message):
  with pytest.raises(UserError, match=message) as error:
    operated(domains, wrappers, surgeries)
  assert '\n' not in str(error.value)


def test_a_dimension_that_the_images_do_not_support_is_rejected(domains):
  x, labels, z = domains
  with pytest.raises(
    UserError, match='d = 4, but the target only varies in 2 directions'
  ):
    operated((x, labels, z[:3]), (SUBSPACES,), (maps.align_subspaces,))


class Normalised(nn.Module):
  """Two layers of batch normalisation; the second reads the first."""

  norm: type = BatchNorm

  @nn.compact
  def __call__(self, x, *, train):
    x = nn.relu(self.norm(name='first')(x, train=train))
    x = self.norm(name='second')(x @ jnp.ones((D, 2)), train=train)
    return {'features': x, 'logits': x}


def test_statistics_are_those_of_the_target(domains):
  _, _, z = domains
  net = Normalised()
  variables = net.init(jax.random.key(0), z, train=False)
  state = State(
    jnp.int32(0),
    jax.random.key(0),
    {'net': variables['params']},
    {'net': variables['batch_stats']},
    {},
    {},
  )

  def total(state, split, fold, apply):
    """Batches of 20: two full and one padded."""
    assert split == 'target/train'
    sums = [
      fold(apply(state, z[np.minimum(rows, 44)]), {'mask': rows < 45})
      for rows in np.arange(60).reshape(3, 20)
    ]
    return jax.tree.map(lambda *values: np.asarray(sum(values)), *sums)

  survey = Survey(lambda state, split: {}, None, total)
  found = maps.recalibrate(survey=survey, net=net)(state, {}).stats['net']
  full = np.float64(z[:40])
  np.testing.assert_allclose(found['first']['mean'], full.mean(0), atol=1e-5)
  np.testing.assert_allclose(found['first']['var'], full.var(0), rtol=1e-4)
  hidden = []
  for batch in (full[:20], full[20:]):
    v = (batch - batch.mean(0)) / np.sqrt(batch.var(0) + 1e-5)
    hidden.append(np.maximum(v, 0) @ np.ones((D, 2)))
  hidden = np.concatenate(hidden)
  np.testing.assert_allclose(found['second']['mean'], hidden.mean(0), rtol=1e-4)
  np.testing.assert_allclose(found['second']['var'], hidden.var(0), rtol=1e-3)
  frozen = Normalised(functools.partial(BatchNorm, frozen=True))
  with pytest.raises(UserError, match='are frozen'):
    maps.recalibrate(survey=survey, net=frozen)(state, {})
  with pytest.raises(UserError, match='no batch normalisation'):
    maps.recalibrate(survey=survey, net=net)(state.replace(stats={'net': {}}), {})


def test_ada_bn_keeps_the_statistics_of_the_source_for_the_source():
  """In the built experiment; the network is deployed with the target's."""
  made = digits_domains.get_config('ada_bn,epochs=1.0')
  made.model.update(trunk='tiny_cnn', trunk_options={'width': 4})
  experiment = build.build(resolve(made), devices=1)
  source, stage = experiment.stages.values()
  first, fresh = (
    train.initial_state(one.method, one.streams, jax.random.key(i), experiment.mesh)
    for i, one in enumerate((source, stage))
  )
  moved = jax.tree.map(lambda x: x + 0.5, first.stats)
  state = fresh
  for surgery in stage.surgeries:
    state = surgery(state, {'source': first.replace(stats=moved)})
  same = jax.tree.map(
    lambda a, b: bool((a == b).all()), state.stats['net_source'], moved['net']
  )
  assert all(jax.tree.leaves(same))
  split = experiment.domains['blended'].splits['train']
  images = (split.source.images[split.rows] / 255 - 0.306) / 0.318
  images = jnp.asarray(images, jnp.float32)
  zeros = jax.tree.map(jnp.zeros_like, state.stats['net'])
  variables = {'params': state.params['net'], 'batch_stats': zeros}
  _, left = stage.net.apply(variables, images, train=True, mutable=['batch_stats'])
  for name, own in left['batch_stats']['trunk'].items():  # a tenth of the way
    np.testing.assert_allclose(
      state.stats['net']['trunk'][name]['mean'], own['mean'] / 0.1, rtol=0.2, atol=0.05
    )


def test_a_copy_of_a_whole_network_has_its_head():
  """As stages without steps start; the trunk may have no parameters at all."""
  state = base().init(jax.random.key(0), {})
  other = jax.tree.map(lambda x: x, state).replace(
    params=jax.tree.map(lambda x: x + 1, state.params)
  )
  taken = copy(pattern='net/.*', stage='source')(state, {'source': other})
  assert (taken.params['net']['head']['kernel'] == 2).all()
