"""The embedded domains: their digits, and how different they look."""

import functools

import numpy as np
import pytest
from sklearn.datasets import load_digits

from lt_jax.data import rendered
from lt_jax.data.rendered import RENDERINGS, SIDE, split_rows
from lt_jax.data.resizing import resized
from lt_jax.data.sources import load_source
from lt_jax.errors import UserError

TARGETS = [name for name in RENDERINGS if name != 'source']
DIGITS = load_digits()

load = functools.cache(lambda name: load_source(f'digits_domains:{name}'))


def test_no_digit_is_in_two_splits_or_in_source_and_target():
  source = split_rows(DIGITS.target, 'source')
  target = split_rows(DIGITS.target, 'blended')
  assert {split: len(rows) for split, rows in source.items()} == {
    'train': 600,
    'val': 100,
    'test': 198,
  }
  assert {split: len(rows) for split, rows in target.items()} == {
    'train': 600,
    'test': 299,
  }
  everything = np.concatenate([*source.values(), *target.values()])
  np.testing.assert_array_equal(np.sort(everything), np.arange(1797))
  for name in TARGETS:
    for split, rows in split_rows(DIGITS.target, name).items():
      np.testing.assert_array_equal(rows, target[split])
  # The random draw is part of the data set: it never changes.
  assert source['train'][:8].tolist() == [1180, 1168, 850, 1151, 360, 813, 374, 1258]
  share = np.bincount(DIGITS.target) / 1797
  for rows in (*source.values(), *target.values()):
    counts = np.bincount(DIGITS.target[rows], minlength=10)
    assert np.abs(counts - len(rows) * share).max() < 2


@pytest.mark.parametrize('name', RENDERINGS)
def test_a_domain(name):
  for split, rows in split_rows(DIGITS.target, name).items():
    part = load(name)[split]
    assert part.images.shape == (len(rows), SIDE, SIDE, 3)
    assert part.images.dtype == np.uint8
    assert part.images.min() <= 8
    assert part.images.max() >= 247
    np.testing.assert_array_equal(part.labels, DIGITS.target[rows])
    assert part.labels.dtype == np.int32
    assert part.class_names == tuple('0123456789')
  rendered._photographs.cache_clear()
  again = load_source(f'digits_domains:{name}')
  assert set(again) == set(load(name)) == {*split_rows(DIGITS.target, name)}
  for split, part in again.items():
    np.testing.assert_array_equal(part.images, load(name)[split].images)


def whole(name):
  """The digits of a domain's test split before rendering, as int16."""
  rows = split_rows(DIGITS.target, name)['test']
  grey = np.round(DIGITS.images[rows] * (255 / 16)).astype(np.uint8)[..., None]
  return resized(grey, SIDE, SIDE, 3).astype(np.int16)


def test_the_source_and_its_inversion_are_the_digits():
  np.testing.assert_array_equal(load('source')['test'].images, whole('source'))
  seen = load('inverted')['test'].images
  np.testing.assert_array_equal(seen, 255 - whole('inverted'))


def test_a_blend_is_the_absolute_difference():
  """Where white meets a bright patch, plain uint8 would wrap around."""
  digit = np.full((SIDE, SIDE, 3), 10, np.uint8)
  digit[:8] = 255
  seen = rendered.blended(digit, np.random.default_rng(3)).astype(np.int16)
  generator = np.random.default_rng(3)
  photograph = rendered._photographs()[generator.integers(2)]
  assert photograph.shape == (106, 160, 3)
  row, column = generator.integers((106 - SIDE + 1, 160 - SIDE + 1))
  patch = photograph[row : row + SIDE, column : column + SIDE].astype(np.int16)
  assert (patch[8:] > 10).any()
  np.testing.assert_array_equal(seen[:8], 255 - patch[:8])
  np.testing.assert_array_equal(seen[8:], np.abs(10 - patch[8:]))
  # Without a digit only the photograph is left: patches differ, and both photographs
  # are used.
  empty = np.zeros_like(digit)
  patches = [rendered.blended(empty, np.random.default_rng(i)) for i in range(40)]
  greens = [np.median(p[..., 1].astype(np.int16) - p[..., 2]) for p in patches]
  assert len({p.tobytes() for p in patches}) == 40
  assert min(greens) < 0 < max(greens)


def test_renderings_draw_anew_for_every_image():
  digit = whole('source')[0].astype(np.uint8)
  for name in ('blended', 'rotated', 'noisy', 'sketched'):
    made = [RENDERINGS[name](digit, np.random.default_rng(i)) for i in range(3)]
    assert len({image.tobytes() for image in made}) == 3
  noise = load('noisy')['test'].images - whole('noisy')
  middle = (whole('noisy') > 100) & (whole('noisy') < 155)
  assert 60 < noise[middle].std() < 85


def test_how_far_the_domains_are_from_the_source():
  """Accuracy of nearest class means from the source's training images."""
  train = load('source')['train']
  flat = {
    name: load(name)['test'].images.reshape(-1, SIDE**2 * 3) for name in RENDERINGS
  }
  pixels = train.images.reshape(-1, SIDE**2 * 3).astype(np.float64)
  means = np.stack([pixels[train.labels == c].mean(0) for c in range(10)])
  accuracy = {}
  for name, images in flat.items():
    apart = ((images[:, None] - means) ** 2).sum(-1)
    accuracy[name] = (apart.argmin(1) == load(name)['test'].labels).mean()
  assert accuracy['source'] > 0.85
  assert accuracy['noisy'] > 0.8  # noise averages out of distances, not of a network
  assert accuracy['blended'] < 0.5
  assert accuracy['rotated'] < 0.6
  assert accuracy['inverted'] < 0.1
  assert accuracy['sketched'] < 0.1


@pytest.mark.parametrize('spec', ['digits_domains', 'digits_domains:blend'])
def test_an_unknown_rendering(spec):
  with pytest.raises(UserError, match='unknown rendering of digits_domains') as error:
    load_source(spec)
  assert 'blended' in str(error.value)
  assert '\n' not in str(error.value)
