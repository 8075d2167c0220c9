"""Similarity of domains and transferability of networks, by independent formulas."""

import itertools
import sys
import types

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from lt_jax.errors import UserError
from lt_jax.evals import similarity, transferability
from lt_jax.evals.similarity import Domain

HAS_POT = similarity.solver() != 'SciPy'


def made(means, counts, name='s'):
  classes = tuple(f'{name}{i}' for i in range(len(means)))
  return Domain(name, classes, np.asarray(means, float), np.asarray(counts))


def some(rng, classes, name, width=6):
  counts = rng.integers(1, 50, classes)
  return made(rng.normal(size=(classes, width)), counts, name)


@pytest.fixture(params=['POT', 'SciPy'])
def solved(request, monkeypatch):
  """Every solver; POT if it is installed."""
  if request.param == 'POT' and not HAS_POT:
    pytest.skip('POT is not installed')
  if request.param == 'SciPy':
    monkeypatch.setitem(sys.modules, 'ot', None)


HAND = made([(0, 0), (3, 4), (6, 8)], (2, 3, 5)), made([(0, 0), (6, 8)], (1, 1), 't')


def test_a_case_by_hand(solved):
  found = similarity.similarity(*HAND)
  assert found.emd == pytest.approx(1.5, abs=1e-9)
  assert found.similarity == pytest.approx(0.98511194, abs=1e-8)
  np.testing.assert_allclose(found.flow.sum(1), HAND[0].weights, atol=1e-9)
  np.testing.assert_allclose(found.flow.sum(0), HAND[1].weights, atol=1e-9)
  target = HAND[1]._replace(counts=np.array([3, 1]))
  np.testing.assert_allclose(similarity.class_distances(HAND[0], target), (2.5, 5, 7.5))


def test_the_distance_is_a_metric_and_knows_no_order(solved, rng):
  a, b, c = (some(rng, k, n) for k, n in ((7, 'a'), (5, 'b'), (6, 'c')))
  emd = {
    pair: similarity.similarity(*pair_of).emd
    for pair, pair_of in {
      'ab': (a, b),
      'ba': (b, a),
      'bc': (b, c),
      'ac': (a, c),
      'aa': (a, a),
    }.items()
  }
  assert emd['aa'] == pytest.approx(0, abs=1e-9)
  assert emd['ab'] == pytest.approx(emd['ba'], rel=1e-9)
  assert emd['ac'] <= emd['ab'] + emd['bc'] + 1e-9
  order = rng.permutation(7)
  shuffled = a._replace(means=a.means[order], counts=a.counts[order])
  assert similarity.similarity(shuffled, b).emd == pytest.approx(emd['ab'], rel=1e-9)
  v = rng.normal(size=6)
  moved = similarity.similarity(a, b._replace(means=b.means + v)).emd
  assert abs(moved - emd['ab']) <= np.linalg.norm(v) + 1e-9
  halves = a._replace(
    means=np.concatenate([a.means, a.means[:1]]),
    counts=np.concatenate([[a.counts[0] / 4], a.counts[1:], [a.counts[0] * 3 / 4]]),
  )
  assert similarity.similarity(halves, b).emd == pytest.approx(emd['ab'], rel=1e-9)


@pytest.mark.skipif(not HAS_POT, reason='POT is not installed')
def test_both_solvers_agree(rng):
  a, b = some(rng, 20, 'a'), some(rng, 15, 'b')
  cost = similarity.distances(a, b)
  by_pot = similarity.transport(a.weights, b.weights, cost)[0]
  assert by_pot == pytest.approx(
    similarity._linear_programme(a.weights, b.weights, cost)[0], rel=1e-9
  )
  message = '20 x 15 classes did not converge in 1 iter'
  with pytest.raises(UserError, match=message), pytest.warns(UserWarning):
    similarity.transport(a.weights, b.weights, cost, most_iterations=1)


def test_a_solver_that_gives_up_is_believed(monkeypatch):
  def gives_up(a, b, cost, **options):
    assert options['numItermax'] >= 1_000_000
    return cost * 0, {'cost': 0.0, 'warning': 'numItermax reached'}

  monkeypatch.setitem(sys.modules, 'ot', types.SimpleNamespace(emd=gives_up))
  with pytest.raises(UserError, match='did not converge .*: numItermax reached'):
    similarity.similarity(*HAND)
  monkeypatch.setitem(sys.modules, 'ot', None)
  monkeypatch.setattr(similarity, 'MOST_WITHOUT_POT', 5)
  with pytest.raises(UserError, match=r"pip install 'lt_jax\[similarity\]'"):
    similarity.similarity(*HAND)


def test_means_and_their_exceptions(rng):
  features, labels = rng.normal(size=(9, 3)), np.array([0, 0, 1, 1, 1, -1, 2, 0, 0])
  found = similarity.domain('d', features, labels, ('a', 'b', 'c'), min_images=2)
  assert found.classes == ('a', 'b') and found.counts.tolist() == [4, 3]
  np.testing.assert_allclose(found.means[1], features[2:5].mean(0))
  both = similarity.joined('both', [found, found])
  assert both.classes == ('d/a', 'd/b', 'd/a', 'd/b')
  np.testing.assert_allclose(both.weights, np.array([4, 3, 4, 3]) / 14)
  with pytest.raises(UserError, match='no class has 5 images .the largest has 4.'):
    similarity.domain('d', features, labels, ('a', 'b', 'c'), min_images=5)
  features[3, 1] = np.nan
  with pytest.raises(UserError, match='d: the features of image 3 are not finite'):
    similarity.domain('d', features, labels, ('a', 'b', 'c'))


@pytest.mark.parametrize('gamma', [0.0, -1.0, np.nan, np.inf])
def test_gamma_must_be_positive(gamma):
  with pytest.raises(UserError, match='gamma is .*; it must be positive'):
    similarity.similarity(*HAND, gamma=gamma)


def test_features_of_two_networks_do_not_compare(rng):
  with pytest.raises(UserError, match='a has 6 features per image and b 5'):
    similarity.similarity(some(rng, 3, 'a'), some(rng, 3, 'b', width=5))


# Which classes suit a target.


def test_the_paper_s_rule_is_the_distance_of_one_class(solved, rng):
  source, target = some(rng, 8, 's'), some(rng, 5, 't')
  alone = [
    similarity.similarity(made(source.means[i : i + 1], [1]), target).emd
    for i in range(8)
  ]
  chosen, scores = similarity.select(source, [target], [3])
  np.testing.assert_allclose(scores['t'], alone, rtol=1e-9)
  assert set(chosen) == set(np.argsort(alone)[:3])


def test_unions_have_each_class_once(rng):
  source = some(rng, 8, 's')
  targets = [some(rng, 4, 't'), some(rng, 4, 'u')]
  chosen, scores = similarity.select(source, targets, [2, 3])
  wanted = {*np.argsort(scores['t'])[:2], *np.argsort(scores['u'])[:3]}
  assert chosen.tolist() == sorted(wanted)
  assert len(similarity.select(source, targets, [99])[0]) == 8
  with pytest.raises(UserError, match='2 targets need 2 numbers'):
    similarity.select(source, targets, [1, 2, 3])
  with pytest.raises(UserError, match="did you mean 'greedy'"):
    similarity.select(source, targets, [1], 'gredy')


def test_a_target_of_several_groups_is_served_by_other_rules():
  """The paper's rule takes classes in the middle, near no class of the target."""
  corners = np.array([(-10, 0), (10, 0), (0, -10), (0, 10)])
  target = made(corners, (1, 1, 1, 1), 't')
  source = made([*(0.9 * corners), (0, 0.1)], (1, 1, 1, 1, 1))
  assert similarity.select(source, [target], [1])[0].tolist() == [4]
  for rule in ('per_target_class', 'transport'):
    assert similarity.select(source, [target], [4], rule)[0].tolist() == [0, 1, 2, 3]


# Does similarity predict accuracy? Published numbers, with the tables' columns.


EMD_OF = ('cub', 'flower', 'cars', 'dogs', 'aircraft', 'nabirds', 'food')
EMD = {
  'imagenet': (57.532, 64.492, 57.993, 48.044, 58.717, 55.595, 57.349),
  'inat': (42.961, 61.340, 62.488, 55.880, 61.148, 37.703, 62.587),
  'both': (53.868, 63.508, 58.805, 49.716, 59.176, 51.084, 58.395),
}
ACCURACY_OF = ('cub', 'dogs', 'flower', 'cars', 'aircraft', 'food', 'nabirds')
ACCURACY = {
  'imagenet': (82.84, 84.19, 96.26, 91.31, 85.49, 88.65, 82.01),
  'inat': (89.26, 78.46, 97.64, 88.31, 82.61, 88.80, 87.91),
  'both': (85.84, 82.36, 97.07, 91.38, 85.21, 88.45, 83.98),
}
"""From Cui et al.: EMD by the authors' demo, top-1 accuracy of Inception-v3."""


def test_the_published_numbers_say_it_by_target_and_not_pooled():
  pairs = list(itertools.product(EMD, EMD_OF))
  found = similarity.correlations(
    [np.exp(-0.01 * EMD[s][EMD_OF.index(t)]) for s, t in pairs],
    [ACCURACY[s][ACCURACY_OF.index(t)] for s, t in pairs],
    [t for _, t in pairs],
  )
  expected = dict(
    zip(EMD_OF, (0.967, 0.950, 0.981, 0.994, 0.996, 0.994, -0.697), strict=True)
  )
  assert found['by_target'] == pytest.approx(expected, abs=6e-4)
  assert (found['best'], found['targets']) == (5, 7)
  assert found['centred'] == pytest.approx(
    {'pearson': 0.895, 'spearman': 0.817}, abs=6e-4
  )
  assert found['pooled'] == pytest.approx(
    {'pearson': -0.322, 'spearman': -0.488}, abs=6e-4
  )


# Transferability.


@pytest.fixture
def outputs(rng):
  """Features, probabilities of a source head, and labels of three classes."""
  labels = rng.integers(0, 3, 40)
  features = rng.normal(size=(40, 7)) + np.eye(7)[labels] * 2
  logits = rng.normal(size=(40, 5)) + np.eye(5)[labels]
  p = np.exp(logits)
  return features, p / p.sum(1, keepdims=True), labels


def test_leep_and_nce_are_sums_over_images(outputs):
  _, theta, labels = outputs
  total, joint, hard = 0.0, np.zeros((3, 5)), np.zeros((3, 5))
  for row, y in zip(theta, labels, strict=True):
    joint[y] += row / 40
    hard[y, row.argmax()] += 1 / 40
  for row, y in zip(theta, labels, strict=True):
    total += np.log(sum(joint[y, z] / joint[:, z].sum() * row[z] for z in range(5)))
  assert transferability.leep(theta, labels) == pytest.approx(total / 40, rel=1e-12)
  entropy = -sum(
    hard[y, z] * np.log(hard[y, z] / hard[:, z].sum())
    for y in range(3)
    for z in range(5)
    if hard[y, z]
  )
  assert transferability.nce(theta, labels) == pytest.approx(-entropy, rel=1e-12)
  assert transferability.leep(np.eye(3)[labels], labels) == pytest.approx(0, abs=1e-12)
  unused = np.pad(theta, ((0, 0), (0, 1)))  # a class the source never predicts
  assert transferability.leep(unused, labels) == pytest.approx(total / 40, rel=1e-12)


def projection(matrix):
  q = np.linalg.qr(matrix)[0]
  return q @ q.T


def test_h_score_is_a_product_of_projections(outputs):
  features, _, labels = outputs
  centred = features - features.mean(0)
  classes = projection(np.eye(3)[labels])
  expected = np.trace(projection(centred) @ classes)
  assert transferability.h_score(features, labels) == pytest.approx(expected, rel=1e-9)
  assert 0 < transferability.regularised_h_score(features, labels) < expected


@pytest.mark.parametrize('width', [7, 60])
def test_logme_is_the_evidence_of_a_gaussian(rng, width):
  """Compared with the density of y itself, also with more features than images."""
  labels = rng.integers(0, 2, 30)
  features = rng.normal(size=(30, width)) + labels[:, None]
  means = []
  for y in np.eye(2)[labels].T:
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    found = transferability._evidence(left, singular**2, y, width)
    covariance = features @ features.T / found.alpha + np.eye(30) / found.beta
    exact = multivariate_normal(np.zeros(30), covariance).logpdf(y) / 30
    assert found.value == pytest.approx(exact, rel=1e-6)
    means.append(found.value)
  score = transferability.log_me(features, labels)
  assert score == pytest.approx(np.mean(means), rel=1e-12)


def test_trans_rate_by_eigenvalues(outputs):
  features, _, labels = outputs
  z = features - features.mean(0)

  def rate(part):
    values = np.linalg.eigvalsh(part @ part.T / len(part))
    return 0.5 * np.log1p(np.maximum(values, 0) / 1e-4).sum()

  within = sum((labels == c).sum() * rate(z[labels == c]) for c in range(3)) / 40
  found = transferability.trans_rate(features, labels)
  assert found == pytest.approx(rate(z) - within, rel=1e-9)


@pytest.mark.parametrize('score', transferability.OF_FEATURES)
def test_labels_that_fit_the_features_score_higher(outputs, rng, score):
  features, _, labels = outputs
  function = transferability.OF_FEATURES[score]
  clear = np.eye(7)[labels] + 0.01 * features
  assert function(clear, labels) > function(clear, rng.permutation(labels))
  with pytest.raises(UserError, match='two labelled images or more'):
    function(features[:1], labels[:1])
