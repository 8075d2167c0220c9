"""OpenMax: against SciPy's distances and fits, and a loop that follows the formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.spatial import distance as metric

from lt_jax.errors import UserError
from lt_jax.evals import openmax

CLASSES = 6

distance = jax.jit(openmax.distance)
own_distance = jax.jit(openmax.own_distance)
recalibrate = jax.jit(openmax.recalibrate, static_argnames='alpha')


def problem(rng, classes=CLASSES, images=40):
  """Returns logits that are large at the label, labels, and their means by class."""
  labels = np.repeat(np.arange(classes), images)
  noise = rng.normal(size=(len(labels), classes))
  logits = (noise * 2 + 8 * np.eye(classes)[labels]).astype(np.float32)
  means = np.stack([logits[labels == c].mean(0) for c in range(classes)])
  return logits, labels, means


def fitted(rng, classes=CLASSES, images=40, tail=20):
  """Returns logits and the tails that were fitted to them."""
  logits, labels, means = problem(rng, classes, images)
  distances = own_distance(jnp.array(logits), labels, jnp.array(means))
  return logits, openmax.fit_tails(distances, labels, means, tail)


def loop(logits, tails, alpha):
  """Returns recalibrated logits one image and one rank at a time, in float64."""
  rows = []
  for image in logits.astype(np.float64):
    known, unknown = image.copy(), 0.0
    best = sorted(range(len(image)), key=lambda c: (-image[c], c))[:alpha]
    for r, c in enumerate(best):
      if tails.fitted[c]:
        mean = tails.mean[c].astype(np.float64)
        d = metric.euclidean(image, mean) / 200 + metric.cosine(image, mean)
        parameters = tails.shape[c], tails.location[c], tails.scale[c]
        cdf = stats.weibull_min.cdf(d, *(float(p) for p in parameters))
        w = 1 - cdf * (len(best) - r) / len(best)
        if image[c] > 0:
          known[c] = w * image[c]
          unknown += (1 - w) * image[c]
    rows.append([*known, unknown])
  return np.array(rows)


def test_distance_agrees_with_scipy(rng):
  logits = rng.normal(size=(7, CLASSES)).astype(np.float32) * 5
  means = rng.normal(size=(CLASSES, CLASSES)).astype(np.float32) * 5
  expected = metric.cdist(logits, means) / 200 + metric.cdist(logits, means, 'cosine')
  found = distance(jnp.array(logits), jnp.array(means))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
  labels = rng.integers(0, CLASSES, 7)
  own = own_distance(jnp.array(logits), labels, jnp.array(means))
  np.testing.assert_allclose(own, expected[np.arange(7), labels], rtol=1e-4)


def test_distance_of_coinciding_and_of_empty_logits(rng):
  logits = jnp.array(rng.normal(size=(50, CLASSES)) * 30, jnp.float32)
  found = np.diag(distance(logits, logits))
  assert (found >= 0).all() and found.max() < 1e-3
  zeros = jnp.zeros((1, CLASSES))
  np.testing.assert_allclose(distance(zeros, zeros), [[1.0]])
  to_zeros = distance(logits, zeros)[:, 0]
  np.testing.assert_allclose(to_zeros, 1 + np.linalg.norm(logits, axis=1) / 200, 1e-5)


def test_distance_makes_nothing_larger_than_its_result(rng):
  logits = jnp.zeros((8, 32))
  jaxpr = jax.make_jaxpr(openmax.distance)(logits, jnp.zeros((32, 32)))
  inner = [v.aval.size for e in jaxpr.jaxpr.eqns for v in e.outvars]
  assert max(inner) == 32 * 32


def test_a_program_holds_no_pairs_of_classes_except_the_means():
  """With B images and C classes it needs O(B C) beside them, not O(C^2)."""
  classes, images = 1000, 8
  numbers = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
  logits, means = numbers((images, classes)), numbers((classes, classes))
  labels, of_class = jax.ShapeDtypeStruct((images,), np.int32), numbers((classes,))
  tails = openmax.Tails(means, of_class, of_class, of_class, of_class)._replace(
    fitted=jax.ShapeDtypeStruct((classes,), bool)
  )
  for program in (
    recalibrate.lower(logits, tails),
    own_distance.lower(logits, labels, means),
  ):
    needed = program.compile().memory_analysis().temp_size_in_bytes
    assert needed < 4 * classes * classes / 10


@pytest.mark.parametrize(('shape', 'scale'), [(0.7, 0.3), (1.0, 2.0), (9.0, 1.2)])
def test_fit_weibull_finds_what_was_drawn(rng, shape, scale):
  drawn = scale * rng.weibull(shape, 200_000)
  np.testing.assert_allclose(openmax.fit_weibull(drawn), (shape, scale), rtol=0.01)


@pytest.mark.parametrize('spread', [1e-3, 0.1, 10.0])
@pytest.mark.parametrize('count', [3, 20])
def test_fit_weibull_is_the_maximum_likelihood(rng, spread, count):
  values = 1 + spread * rng.exponential(size=count)
  shape, scale = openmax.fit_weibull(values)
  if spread >= 0.1:  # a start of 1 is too far from a shape in the thousands for SciPy
    theirs = stats.weibull_min.fit(values, floc=0)
    np.testing.assert_allclose((shape, scale), (theirs[0], theirs[2]), rtol=1e-3)
  best = stats.weibull_min.logpdf(values, shape, 0, scale).sum()
  for near in [(1.01, 1), (0.99, 1), (1, 1 + 0.01 * spread), (1, 1 - 0.01 * spread)]:
    other = stats.weibull_min.logpdf(values, shape * near[0], 0, scale * near[1])
    assert best > other.sum()


def test_tails_are_fits_of_the_largest_distances(rng):
  labels = rng.integers(0, 3, 300)
  distances = rng.gamma(2.0, 0.1, 300)
  tails = openmax.fit_tails(distances, labels, np.eye(3), tail=25)
  for c in range(3):
    largest = np.sort(distances[labels == c])[-25:]
    start = largest[0] - 1
    shape, location, scale = stats.weibull_min.fit(largest, floc=start)
    assert tails.fitted[c]
    np.testing.assert_allclose(tails.location[c], location, rtol=1e-5)
    np.testing.assert_allclose(tails.shape[c], shape, rtol=1e-3)
    np.testing.assert_allclose(tails.scale[c], scale, rtol=1e-3)
  np.testing.assert_array_equal(tails.mean, np.eye(3))


def test_degenerate_classes_are_not_fitted():
  # Of the classes: none; two images; all equal; three of fewer than `tail`; none.
  labels = np.array([1, 1, 2, 2, 2, 2, 3, 3, 3])
  distances = np.array([0.1, 0.2, *[np.float32(0.3)] * 4, 0.1, 0.2, 0.4])
  means = np.where(np.isin(np.arange(5), labels)[:, None], 1.0, np.nan) * np.eye(5)
  tails = openmax.fit_tails(distances, labels, means)
  np.testing.assert_array_equal(tails.fitted, [False, False, False, True, False])
  assert all(np.isfinite(x).all() for x in tails)
  assert tails.location[3] == np.float32(0.1 - 1)
  np.testing.assert_array_equal(tails.mean[3], np.eye(5)[3])


@pytest.mark.parametrize(
  ('distances', 'labels', 'tail', 'message'),
  [
    ([0.1, 0.2], [0, 1], 2, 'tail must be at least 3'),
    ([0.1, 0.2], [0, 2], 20, r'label 2 is not in \[0, 2\)'),
    ([0.1, 0.2], [-1, 1], 20, 'label -1'),
    ([0.1, np.nan], [0, 1], 20, 'distance of class 1'),
  ],
)
def test_what_cannot_be_fitted_is_reported(distances, labels, tail, message):
  with pytest.raises(UserError, match=message):
    openmax.fit_tails(np.array(distances), np.array(labels), np.eye(2), tail)


@pytest.mark.parametrize('alpha', [1, 3, 6, 10])
def test_recalibration_is_the_loop(rng, alpha):
  logits, tails = fitted(rng)
  tails = tails._replace(fitted=np.arange(CLASSES) != 2)
  open_set = (rng.normal(size=(30, CLASSES)) * 6).astype(np.float32)
  images = np.concatenate([logits[::7], open_set, open_set - 40, open_set + 40])
  found = recalibrate(jnp.array(images), tails, alpha=alpha)
  assert found.shape == (len(images), CLASSES + 1)
  np.testing.assert_allclose(found, loop(images, tails, alpha), rtol=1e-3, atol=1e-3)


def test_alpha_must_be_positive(rng):
  logits, tails = fitted(rng)
  with pytest.raises(UserError, match='alpha must be at least 1'):
    openmax.recalibrate(jnp.array(logits), tails, alpha=0)


def test_classes_without_a_tail_keep_their_logits(rng):
  logits, tails = fitted(rng)
  tails = tails._replace(fitted=np.zeros(CLASSES, bool))
  positive = logits - logits.min()
  found = recalibrate(jnp.array(positive), tails)
  np.testing.assert_array_equal(found[:, :-1], positive)
  np.testing.assert_array_equal(found[:, -1], np.zeros(len(logits)))
  before = jax.nn.softmax(jnp.array(logits))
  after = jax.nn.softmax(recalibrate(jnp.array(logits), tails)[:, :-1])
  np.testing.assert_allclose(after, before, atol=1e-5)


def test_images_nearer_than_the_distribution_starts_keep_their_logits(rng):
  logits, tails = fitted(rng)
  tails = tails._replace(location=np.full(CLASSES, 5, np.float32))
  positive = logits - logits.min()
  found = recalibrate(jnp.array(positive), tails)
  np.testing.assert_array_equal(found[:, :-1], positive)


def test_of_equal_logits_the_lower_class_ranks_first(rng):
  _, tails = fitted(rng)
  equal = jnp.full((1, CLASSES), 3.0)
  found = np.array(recalibrate(equal, tails, alpha=2))
  np.testing.assert_allclose(found, loop(np.array(equal), tails, 2), atol=1e-4)
  assert (found[0, :2] < 3).all() and (found[0, 2:CLASSES] == 3).all()


def test_far_images_are_unknown_and_typical_ones_are_not(rng):
  logits, tails = fitted(rng, images=300)
  images = jnp.array(np.concatenate([tails.mean, -tails.mean, logits]))
  found = np.array(recalibrate(images, tails, alpha=2)).argmax(1)
  np.testing.assert_array_equal(found[:CLASSES], np.arange(CLASSES))
  np.testing.assert_array_equal(found[CLASSES : 2 * CLASSES], CLASSES)
  assert (found[2 * CLASSES :] == CLASSES).mean() < 0.1


def test_no_logit_makes_it_infinite(rng):
  _, tails = fitted(rng)
  rows = [np.zeros(CLASSES), np.full(CLASSES, -1e6), 1e6 * np.eye(CLASSES)[0]]
  images = jnp.array([*rows, *tails.mean], jnp.float32)
  found = recalibrate(images, tails)
  assert np.isfinite(found).all()
  assert np.isfinite(jax.nn.softmax(found)).all()
