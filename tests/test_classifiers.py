"""Classifiers of features: each is the answer of its problem."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from lt_jax.errors import UserError
from lt_jax.surgeries import classifiers

N, D, C = 120, 12, 4


@pytest.fixture(scope='module')
def examples():
  rng = np.random.default_rng(0)
  labels = rng.choice(C, N, p=[0.5, 0.25, 0.15, 0.1])
  centres = rng.normal(size=(C, D))
  return rng.normal(size=(N, D)) + 0.7 * centres[labels], labels


@pytest.fixture(autouse=True)
def doubles():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize('weighted', [False, True])
def test_support_vector_machines_agree_with_liblinear(examples, weighted):
  x, labels = examples
  weights = classifiers.balanced(labels, C) if weighted else None
  costs = (1.0, 0.01)  # each in its place, whatever the order of solving
  found = classifiers.svm(x, labels, C, costs, weights=weights, tolerance=1e-10)
  for cost, ours in zip(costs, found, strict=True):
    theirs = LinearSVC(C=cost, dual=False, tol=1e-10, max_iter=10000)
    theirs.fit(x, labels, sample_weight=weights)
    np.testing.assert_allclose(ours.kernel, theirs.coef_.T, atol=1e-5)
    np.testing.assert_allclose(ours.bias, theirs.intercept_, atol=1e-5)
    sign = np.where(labels[:, None] == np.arange(C), 1, -1)
    values = [
      (np.square(one.kernel).sum() + np.square(one.bias).sum()) / 2
      + cost
      * (
        np.maximum(1 - sign * one(x), 0) ** 2
        * (1 if weights is None else weights[:, None])
      ).sum()
      for one in (ours, classifiers.Linear(theirs.coef_.T, theirs.intercept_))
    ]
    assert values[0] <= values[1] * (1 + 1e-12)


def test_softmax_is_logistic_regression(examples):
  x, labels = examples
  (ours,) = classifiers.softmax(x, labels, C, (0.3,), tolerance=1e-10)
  theirs = LogisticRegression(C=0.3, tol=1e-10, max_iter=10000).fit(x, labels)
  np.testing.assert_allclose(ours.kernel, theirs.coef_.T, atol=1e-5)
  bias = theirs.intercept_ - theirs.intercept_.mean()  # which is free by a constant
  np.testing.assert_allclose(ours.bias - ours.bias.mean(), bias, atol=1e-5)


@pytest.mark.parametrize('count', [N, 7])
def test_ridge_solves_its_equations_for_every_penalty(examples, count):
  x, labels = (values[:count] for values in examples)
  weights = np.linspace(0, 2, count)
  penalties = (10.0, 1e-3)
  found = classifiers.ridge(x, labels, C, penalties, weights=weights)
  wanted = np.where(labels[:, None] == np.arange(C), 1.0, -1.0)
  with_one = np.concatenate([x, np.ones((count, 1))], axis=1)
  for penalty, ours in zip(penalties, found, strict=True):
    decay = penalty * np.diag([*[1.0] * D, 0.0])
    left = with_one.T @ (weights[:, None] * with_one) + decay
    right = with_one.T @ (weights[:, None] * wanted)
    solved = np.linalg.solve(left, right)
    np.testing.assert_allclose(ours.kernel, solved[:-1], atol=1e-9)
    np.testing.assert_allclose(ours.bias, solved[-1], atol=1e-9)


def test_class_means_and_neighbours_are_nearest(examples):
  x, labels = examples
  new = np.random.default_rng(1).normal(size=(30, D))
  (means,) = classifiers.class_means(x, labels, C)
  mean = np.stack([x[labels == c].mean(0) for c in range(C)])
  apart = ((new[:, None] - mean[None]) ** 2).sum(-1)
  np.testing.assert_array_equal(means(new).argmax(1), apart.argmin(1))

  apart = ((new[:, None] - x[None]) ** 2).sum(-1)
  order = np.argsort(apart, axis=1)
  one, five = classifiers.neighbours(x, labels, C, (1, 5))
  np.testing.assert_array_equal(one(new).argmax(1), labels[order[:, 0]])
  by_class = np.stack([apart[:, labels == c].min(1) for c in range(C)], axis=1)
  np.testing.assert_array_equal(np.argsort(-one(new)), np.argsort(by_class))
  for row, scores in zip(order, five(new), strict=True):
    votes = np.bincount(labels[row[:5]], minlength=C)
    tied = np.flatnonzero(votes == votes.max())
    first = next(label for label in labels[row] if label in tied)
    assert scores.argmax() == first
  at_home = one(x[:3])  # an example of the training set, at distance 0
  np.testing.assert_array_equal(at_home.argmax(1), labels[:3])
  assert np.isfinite(at_home).all()


def test_a_strength_is_chosen_by_classifiers_that_did_not_see_an_example(examples):
  x, labels = examples
  strengths = (1e-4, 1e-1, 1e2)
  found = classifiers.chosen('svm', x, labels, C, strengths=strengths, folds=4)
  fold = classifiers.folds_of(labels, 4)
  accuracy = []
  for cost in strengths:
    right = np.zeros(N, bool)
    for number in range(4):
      machine = LinearSVC(C=cost, dual=False, max_iter=10000)
      machine.fit(x[fold != number], labels[fold != number])
      right[fold == number] = (
        machine.predict(x[fold == number]) == labels[fold == number]
      )
    accuracy.append(np.mean([right[labels == c].mean() for c in range(C)]))
  np.testing.assert_allclose(found.accuracy, accuracy, atol=0.02)
  assert found.strength == strengths[int(np.argmax(found.accuracy))]
  (whole,) = classifiers.svm(x, labels, C, (found.strength,))
  np.testing.assert_array_equal(found.classifier.kernel, whole.kernel)


def test_folds_share_out_every_class(examples):
  _, labels = examples
  fold = classifiers.folds_of(labels, 4)
  assert np.ptp(np.bincount(fold)) <= 1
  for c in range(C):
    assert np.ptp(np.bincount(fold[labels == c], minlength=4)) <= 1
  np.testing.assert_array_equal(np.bincount(classifiers.folds_of(np.arange(8), 4)), 2)


def test_a_classifier_of_scaled_features_is_one_of_the_features(examples):
  x, labels = examples
  x = np.concatenate([5 + 3 * x, np.ones((N, 1))], axis=1)
  scale = classifiers.scaling(x)
  scaled = scale(x)
  np.testing.assert_allclose(scaled[:, :-1].std(0), 1)
  (found,) = classifiers.ridge(scaled, labels, C)
  np.testing.assert_allclose(found.after(scale)(x), found(scaled), atol=1e-12)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'name': 'svn'}, "unknown classifier 'svn'; did you mean 'svm'"),
    ({'folds': 1}, 'folds is 1'),
    ({'labels': np.zeros(N, int)}, 'at least two classes'),
    ({'x': np.full((N, D), np.nan)}, '120 of 120 examples have features'),
  ],
)
def test_mistakes_are_reported(examples, change, message):
  given = {'name': 'svm', 'x': examples[0], 'labels': examples[1], 'folds': 3} | change
  with pytest.raises(UserError, match=message):
    classifiers.chosen(num_classes=C, **given)
