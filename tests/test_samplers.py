"""Samplers: how positions map to images, exact cycles, and frequencies."""

import numpy as np
import pytest

from lt_jax.data import samplers
from lt_jax.errors import UserError, construct

COUNTS = np.array([400, 100, 25, 4, 1])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), COUNTS))
OPTIONS = {
  'instance': {},
  'class_balanced': {},
  'square_root': {},
  'progressive': {},
  'class_aware': {},
  'effective_number': {'beta': 0.99},
}


def make(name, labels, batch=128, epochs=5, **options):
  return construct(
    samplers.SAMPLERS,
    'sampler',
    name,
    labels,
    options=options,
    batch=batch,
    epochs=epochs,
  )


def assert_frequencies(sampler, expected, epoch=0):
  """Compares class frequencies, over sixty seeds, with their expectation."""
  drawn = np.concatenate([LABELS[sampler.indices(s, epoch)] for s in range(60)])
  measured = np.bincount(drawn, minlength=5) / len(drawn)
  deviation = np.sqrt(expected * (1 - expected) / len(drawn))
  assert (np.abs(measured - expected) <= 5 * deviation).all(), (measured, expected)


def test_every_sampler_has_options_here():
  others = {'curriculum', 'rare_class'}  # which read no labels (N,)
  assert set(OPTIONS) | others == set(samplers.SAMPLERS)


@pytest.mark.parametrize('name', OPTIONS)
def test_an_epoch_is_a_pure_function_of_seed_and_epoch(name):
  sampler = make(name, LABELS, **OPTIONS[name])
  first = sampler.indices(0, 1)
  assert first.shape == (sampler.length,)
  assert first.dtype == np.int32
  assert first.min() >= 0
  assert first.max() < len(LABELS)
  sampler.indices(5, 5)
  again = make(name, LABELS, **OPTIONS[name])
  np.testing.assert_array_equal(first, again.indices(0, 1))
  for seed, epoch in ((0, 0), (0, 2), (1, 1), (1, 0)):
    assert (first != sampler.indices(seed, epoch)).any()


@pytest.mark.parametrize('name', [name for name in OPTIONS if name != 'instance'])
def test_samplers_by_class_draw_labelled_images(name):
  labels = np.where(np.arange(len(LABELS)) % 3 > 0, LABELS, -1)
  labels[LABELS == 4] = 4  # the only image of its class
  drawn = labels[make(name, labels, **OPTIONS[name]).indices(0, 0)]
  assert drawn.min() >= 0
  with pytest.raises(UserError, match=f"{name}.* no image has a label: use 'instance'"):
    make(name, np.full(200, -1), **OPTIONS[name])


def test_samplers_do_not_share_random_numbers():
  labels = np.repeat(np.arange(5), 100)  # there these two draw with equal weights
  a = samplers.square_root(labels).indices(0, 0)
  b = samplers.effective_number(labels, beta=0.5).indices(0, 0)
  assert np.mean(a == b) < 0.1


def test_instance_is_a_permutation():
  sampler = samplers.instance(LABELS)
  for epoch in range(3):
    order = np.sort(sampler.indices(0, epoch))
    np.testing.assert_array_equal(order, np.arange(len(LABELS)))


def test_class_frequencies():
  n = COUNTS / COUNTS.sum()
  assert_frequencies(samplers.class_balanced(LABELS), np.full(5, 0.2))
  root = np.sqrt(COUNTS) / np.sqrt(COUNTS).sum()
  assert_frequencies(samplers.square_root(LABELS), root)
  assert_frequencies(samplers.effective_number(LABELS, beta=0.0), n)
  effective = np.array([(1 - 0.99**k) / (1 - 0.99) for k in COUNTS])
  p = COUNTS / effective
  assert_frequencies(samplers.effective_number(LABELS, beta=0.99), p / p.sum())


def test_images_of_a_class_are_drawn_alike():
  drawn = np.concatenate(
    [samplers.square_root(LABELS).indices(0, e) for e in range(200)]
  )
  per_image = np.bincount(drawn, minlength=len(LABELS))[LABELS == 1]
  mean = per_image.mean()
  assert abs(per_image.var() / mean - 1) < 0.5  # Poisson, like independent draws
  assert per_image.min() > 0.5 * mean


@pytest.mark.parametrize('name', ['class_balanced', 'progressive', 'class_aware'])
def test_each_class_is_dealt_out_before_it_repeats(name):
  sampler = make(name, LABELS, **OPTIONS[name])
  indices = sampler.indices(0, 1)
  laps_differ = False
  for c, count in enumerate(COUNTS):
    served = indices[LABELS[indices] == c]
    (members,) = np.nonzero(c == LABELS)
    laps = [served[i : i + count] for i in range(0, len(served), count)]
    for lap in laps[:-1]:
      np.testing.assert_array_equal(np.sort(lap), members)
    assert len(set(laps[-1])) == len(laps[-1])
    if len(laps) > 2 and count > 3:
      laps_differ |= (laps[0] != laps[1]).any()
  assert laps_differ


def test_progressive_goes_from_natural_to_balanced():
  sampler = samplers.progressive(LABELS, epochs=5)
  natural, balanced = COUNTS / COUNTS.sum(), np.full(5, 0.2)
  for epoch, t in ((0, 0.0), (1, 0.25), (4, 1.0), (7, 1.0)):
    assert_frequencies(sampler, (1 - t) * natural + t * balanced, epoch)
  samplers.progressive(LABELS, epochs=1).indices(0, 0)


def test_class_aware_batches_hold_32_classes_4_times():
  labels = np.random.default_rng(1).permutation(np.repeat(np.arange(40), 30))
  sampler = samplers.class_aware(labels, batch=128)
  assert sampler.length == 1200 // 128 * 128
  drawn = labels[sampler.indices(0, 0)].reshape(-1, 4)
  assert (drawn == drawn[:, :1]).all()
  order = drawn[:, 0]
  for lap in range(0, len(order) - 40 + 1, 40):
    np.testing.assert_array_equal(np.sort(order[lap : lap + 40]), np.arange(40))
  first_batch = order[:32]
  assert len(set(first_batch)) == 32
  assert (order[:40] != order[40:80]).any()


def test_class_aware_repeats_images_of_a_small_class():
  sampler = samplers.class_aware(LABELS, batch=20)
  drawn = sampler.indices(0, 0)
  only = drawn[LABELS[drawn] == 4]
  assert len(only) >= sampler.length // 20 * 4 - 4
  assert len(set(only)) == 1


@pytest.mark.parametrize(
  ('length', 'batch'), [(7, 3), (10, 5), (5, 12), (1, 4), (530, 128)]
)
def test_every_step_is_its_part_of_the_stream(length, batch):
  sampler = samplers.instance(np.zeros(length, int))
  steps = 3 * length // batch + 3
  epochs = steps * batch // length + 1
  stream = np.concatenate([sampler.indices(9, e) for e in range(epochs)])
  for step in reversed(range(steps)):  # as if resumed anywhere
    rows = samplers.batch_indices(sampler, 9, batch, step)
    assert rows.shape == (batch,)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows, stream[step * batch : (step + 1) * batch])


def test_cached_epochs_of_two_samplers_never_collide():
  a = samplers.instance(LABELS)
  b = samplers.class_balanced(LABELS)
  c = samplers.effective_number(LABELS, beta=0.5)
  d = samplers.effective_number(LABELS, beta=0.999)
  for sampler in (a, b, c, d) * 2:
    rows = samplers.batch_indices(sampler, 0, len(LABELS), 1)
    np.testing.assert_array_equal(rows, sampler.indices(0, 1))


def test_a_batch_may_be_written_to():
  sampler = samplers.instance(LABELS)
  before = samplers.batch_indices(sampler, 0, 8, 0)
  before[:] = -1
  assert (samplers.batch_indices(sampler, 0, 8, 0) >= 0).all()


def test_deferred_switches_exactly_at_the_epoch():
  first, second = samplers.instance(LABELS), samplers.class_balanced(LABELS)
  both = samplers.deferred(first, second, switch_epoch=2)
  for epoch in range(5):
    expected = first if epoch < 2 else second
    np.testing.assert_array_equal(both.indices(4, epoch), expected.indices(4, epoch))
  with pytest.raises(UserError, match='530 and 512'):
    samplers.deferred(first, samplers.class_aware(LABELS, batch=128), switch_epoch=2)


@pytest.mark.parametrize('name', sorted(set(OPTIONS) - {'instance'}))
def test_an_empty_class_is_named(name):
  labels = np.repeat([0, 1, 3], 50)
  with pytest.raises(UserError, match=f'{name}.*class 2 has no training images'):
    make(name, labels, **OPTIONS[name])


@pytest.mark.parametrize('name', OPTIONS)
def test_an_empty_training_set_is_rejected(name):
  with pytest.raises(UserError, match='empty'):
    make(name, np.zeros(0, int), **OPTIONS[name])


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('class_balancd', {}, "did you mean 'class_balanced'"),
    ('class_aware', {'batch': 8, 'per_clas': 4}, "did you mean 'per_class'"),
    ('instance', {'per_class': 8}, "no option 'per_class'"),
    ('progressive', {'epoch': 5}, "no option 'epoch'"),
    ('class_aware', {'batch': 1000}, '530 training images are fewer than one batch'),
    ('class_aware', {'batch': 8, 'per_class': 0}, 'must be positive'),
    ('effective_number', {'beta': 1.0}, r'beta must be in \[0, 1\)'),
  ],
)
def test_mistakes_are_reported_in_one_line(name, options, message):
  with pytest.raises(UserError, match=message) as error:
    make(name, LABELS, **options)
  assert '\n' not in str(error.value)


# Rare classes of label maps.


def class_pixels(rng):
  """Returns pixels of four classes in 60 images; the last class is in none."""
  pixels = rng.integers(1, 50, (60, 4)) * (rng.random((60, 4)) < (1, 0.6, 0.1, 0))
  pixels[:, 0] += 900
  return pixels


def test_rare_classes_are_drawn_by_the_formula_of_daformer(rng):
  pixels, temperature = class_pixels(rng), 0.4
  frequency = pixels.sum(0) / pixels.sum()
  weights = np.exp((1 - frequency) / temperature) * (frequency > 0)
  p = weights / weights.sum()
  # An image is as likely as the classes that it shows make it, each by its share.
  expected = ((pixels > 0) / np.maximum((pixels > 0).sum(0), 1) * p).sum(1)
  sampler = samplers.rare_class(pixels, temperature=temperature)
  assert sampler.length == 60
  epochs = [sampler.indices(seed, epoch) for seed in range(40) for epoch in range(10)]
  draws = 60 * len(epochs)
  drawn = np.bincount(np.concatenate(epochs), minlength=60) / draws
  assert (np.abs(drawn - expected) <= 5 * np.sqrt(expected / draws)).all()
  np.testing.assert_array_equal(epochs[3], sampler.indices(0, 3))
  assert (epochs[0] != epochs[1]).any() and epochs[0].dtype == np.int32
  np.testing.assert_allclose(
    samplers.rare_class_probabilities(pixels.sum(0)[:3], temperature), p[:3], rtol=1e-12
  )


def test_an_image_must_show_enough_of_a_rare_class(rng):
  pixels = np.array([[90, 0, 1], [90, 30, 0], [90, 2, 0]])
  sampler = samplers.rare_class(pixels, temperature=0.01, fewest_pixels=10)
  drawn = np.concatenate([sampler.indices(0, epoch) for epoch in range(20)])
  assert set(drawn.tolist()) == {0}  # which has more of the rarest than any other
  sampler = samplers.rare_class(pixels[1:, :2], temperature=0.01, fewest_pixels=10)
  assert set(sampler.indices(0, 0).tolist()) == {0}


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'temperature': 0.0}, 'temperature 0.0 must be positive'),
    ({'fewest_pixels': 0}, 'fewest_pixels 0 at least 1'),
    ({'temprature': 1.0}, "did you mean 'temperature'"),
  ],
)
def test_mistakes_in_sampling_rare_classes_are_told(options, message):
  with pytest.raises(UserError, match=message):
    make('rare_class', np.ones((2, 2), int), **options)
  with pytest.raises(UserError, match='no training image has a labelled pixel'):
    make('rare_class', np.zeros((2, 2), int))
