"""Curricula: how images are ordered, and which images each epoch offers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax.data.samplers import batch_indices, curriculum, offered
from lt_jax.errors import UserError
from lt_jax.evals.collect import Survey
from lt_jax.evals.ordering import distance, entropy_of, nearest_first
from lt_jax.schedules import make_schedule

EPOCHS, IMAGES = 200, 1000

# The formula of the released code.
RATIOS = {
  0: 0.5,
  1: 0.607,
  2: 0.632,
  5: 0.674,
  10: 0.714,
  20: 0.763,
  50: 0.846,
  100: 0.926,
  150: 0.982,
  170: 1.0,
  199: 1.024,
}


@pytest.fixture
def order():
  return np.random.default_rng(3).permutation(IMAGES)


def ranks(sampler, order, epoch, seed=0):
  """The ranks of an epoch's images in the order."""
  place = np.empty(len(order), int)
  place[order] = np.arange(len(order))
  return place[sampler.indices(seed, epoch)]


@pytest.mark.parametrize(('epoch', 'ratio'), RATIOS.items())
def test_it_opens_as_the_released_code_does(epoch, ratio):
  assert round(offered(epoch, 170, first=0.5, power=0.3), 3) == ratio


@pytest.mark.parametrize('batch', [1, 64])
def test_a_rate_rises_as_it_opens(batch):
  """Per epoch, wherever in an epoch a step is."""
  rate = make_schedule('curriculum', 2.0, length=640, batch=batch, end=EPOCHS)
  steps = 640 // batch
  for epoch, ratio in RATIOS.items():
    for step in (epoch * steps, (epoch + 1) * steps - 1):
      assert round(float(rate(step)) / 2, 3) == ratio
  with pytest.raises(UserError, match='schedule curriculum: end 0'):
    make_schedule('curriculum', 1.0, length=1, batch=1, end=0)


@pytest.mark.parametrize('window', ['shift', 'expand'])
def test_an_epoch_offers_its_window_alone(window, order):
  sampler = curriculum(order, epochs=EPOCHS, window=window)
  for epoch in RATIOS:
    share = 0.5 + 0.5 * (epoch / 170) ** 0.3
    last = int(share * IMAGES) if share < 1 else IMAGES
    begins = window == 'shift' and share < 1
    first = int((share - 0.5) * IMAGES) if begins else 0
    seen = ranks(sampler, order, epoch)
    assert len(seen) == sampler.length == IMAGES
    # Exactly the images of the window, with counts that differ by one at most.
    counts = np.bincount(seen, minlength=IMAGES)
    assert not counts[:first].any() and not counts[last:].any()
    inside = counts[first:last]
    assert inside.min() == IMAGES // (last - first)
    assert inside.max() <= inside.min() + 1


def test_windows_do_not_meet_if_they_are_narrow(order):
  sampler = curriculum(order, epochs=10, first=0.2, power=1.0, full=1.0)
  first, later = ({*sampler.indices(0, epoch)} for epoch in (0, 5))
  assert len(first) == len(later) == 200 and not first & later


def test_it_is_a_pure_function_that_leaves_the_order_alone(order):
  """Independent of earlier calls; different for each seed and epoch."""
  given = order.copy()
  sampler = curriculum(given, epochs=EPOCHS)
  first = [sampler.indices(7, epoch).copy() for epoch in range(5)]
  np.testing.assert_array_equal(given, order)
  given[:] = 0  # nor does changing it matter
  for epoch in reversed(range(5)):
    np.testing.assert_array_equal(sampler.indices(7, epoch), first[epoch])
  assert not np.array_equal(sampler.indices(8, 0), first[0])
  at = [batch_indices(sampler, 7, 64, step) for step in range(16)]
  np.testing.assert_array_equal(np.concatenate(at)[:IMAGES], first[0])


def test_an_epoch_can_be_of_another_length(order):
  """As long as the stage's: part of the window, or parts of it twice."""
  for length in (300, 1600):
    sampler = curriculum(order, epochs=EPOCHS, positions=length, first=0.5)
    seen = ranks(sampler, order, 0)
    assert len(seen) == sampler.length == length
    assert seen.max() < 500
    assert np.bincount(seen).max() == -(-length // 500)


@pytest.mark.parametrize(('epoch', 'share'), [(1, 0.83), (10, 0.73), (50, 0.66)])
def test_shuffled_in_place_ranks_leak_as_in_the_released_code(order, epoch, share):
  """Counts a window's images that are its own; with a copied order all are."""
  sampler = curriculum(order, epochs=EPOCHS, in_place=True)
  ratio = 0.5 + 0.5 * (epoch / 170) ** 0.3
  first, last = int((ratio - 0.5) * IMAGES), int(ratio * IMAGES)
  seen = np.unique(ranks(sampler, order, epoch))
  own = ((first <= seen) & (seen < last)).mean()
  assert abs(own - share) < 0.03
  again = curriculum(order, epochs=EPOCHS, in_place=True)
  np.testing.assert_array_equal(sampler.indices(3, epoch), again.indices(3, epoch))


def test_an_epoch_is_shuffled(order):
  seen = ranks(curriculum(order, epochs=EPOCHS), order, 0)
  assert abs(np.corrcoef(seen, np.arange(IMAGES))[0, 1]) < 0.1


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (
      {'order': np.array([0, 2, 2])},
      'order of 3 images must contain each of them once',
    ),
    ({'order': np.array([], int)}, 'order of 0 images'),
    ({'window': 'shfit'}, "window of a curriculum 'shfit'; did you mean 'shift'"),
    ({'first': 0.0}, 'first 0.0 must be in'),
    ({'full': 1.5}, 'full 1.5 in'),
    ({'first': 0.1}, 'first 0.1 of 3 images is less than one image'),
  ],
)
def test_mistakes_are_reported(options, message):
  with pytest.raises(UserError, match=message):
    curriculum(**{'order': np.arange(3), 'epochs': 4.0} | options)


# What the order is made from.


def outputs_of(rng, images):
  return {
    'features': jnp.asarray(rng.normal(size=(images, 4)) + 1, jnp.float32),
    'logits': jnp.asarray(rng.normal(size=(images, 3)), jnp.float32),
  }


@pytest.fixture
def splits(rng):
  return {'train': outputs_of(rng, 7), 'target/train': outputs_of(rng, 5)}


@pytest.fixture
def survey(splits):
  """Passes over given outputs, the source's with a padded row."""

  def total(state, split, fold):
    found = splits[split]
    mask = np.arange(len(found['logits'])) < len(found['logits']) - 1
    return jax.device_get(fold(found, {'mask': jnp.asarray(mask)}))

  def collect(state, split, keep):
    return jax.device_get(keep(splits[split], {}))

  return Survey(lambda state, split: splits[split], collect, total)


def test_scores_are_their_formulas(splits, survey):
  source, target = (
    {name: np.asarray(x, np.float64) for name, x in splits[split].items()}
    for split in ('train', 'target/train')
  )

  def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  expected = [
    1 - np.mean([unit(f) @ unit(s) for s in source['features'][:-1]])
    for f in target['features']
  ]
  found = distance(survey, None, split='target/train')
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  p = np.exp(target['logits'])
  p /= p.sum(-1, keepdims=True)
  found = entropy_of(splits['target/train'])
  np.testing.assert_allclose(found, -(p * np.log(p)).sum(-1), rtol=1e-5)


def test_the_nearest_come_first_and_equal_ones_as_they_are_stored():
  found = nearest_first(np.array([0.3, 0.1, 0.3, 0.2]))
  np.testing.assert_array_equal(found, [1, 3, 0, 2])
