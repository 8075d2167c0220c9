"""Long tails: the published count tables, and splits that never overlap."""

import os
import pathlib

import numpy as np
import pytest

from lt_jax.data import longtail
from lt_jax.errors import UserError

# Class counts of CIFAR-10-LT: all 5,000 images a class, and 4,990 with a meta set out.
CIFAR10 = {
  (5000, 200): [5000, 2775, 1540, 854, 474, 263, 146, 81, 45, 25],
  (5000, 100): [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
  (5000, 50): [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100],
  (5000, 20): [5000, 3584, 2569, 1842, 1320, 946, 678, 486, 348, 250],
  (5000, 10): [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
  (4990, 200): [4990, 2769, 1537, 853, 473, 262, 145, 80, 44, 24],
  (4990, 100): [4990, 2991, 1793, 1075, 644, 386, 231, 138, 83, 49],
  (4990, 50): [4990, 3230, 2091, 1354, 877, 567, 367, 238, 154, 99],
  (4990, 20): [4990, 3577, 2564, 1838, 1317, 944, 677, 485, 348, 249],
  (4990, 10): [4990, 3863, 2991, 2316, 1793, 1388, 1075, 832, 644, 499],
}
# CIFAR-100-LT: (n_max, imbalance) -> (first five, last five, total).
CIFAR100 = {
  (500, 200): ([500, 473, 449, 425, 403], [3, 2, 2, 2, 2], 9502),
  (500, 100): ([500, 477, 455, 434, 415], [6, 5, 5, 5, 5], 10847),
  (500, 50): ([500, 480, 462, 444, 426], [11, 11, 10, 10, 10], 12608),
  (500, 20): ([500, 485, 470, 456, 442], [28, 27, 26, 25, 25], 15907),
  (500, 10): ([500, 488, 477, 466, 455], [54, 53, 52, 51, 50], 19573),
}
CIFAR100_META_TOTALS = {200: 9304, 100: 10626, 50: 12354, 20: 15594, 10: 19183}


@pytest.mark.parametrize(('n_max', 'imbalance'), CIFAR10)
def test_exponential_counts_of_cifar10(n_max, imbalance):
  counts = longtail.class_counts('exponential', 10, n_max, imbalance)
  np.testing.assert_array_equal(counts, CIFAR10[n_max, imbalance])


@pytest.mark.parametrize(('n_max', 'imbalance'), CIFAR100)
def test_exponential_counts_of_cifar100(n_max, imbalance):
  counts = longtail.class_counts('exponential', 100, n_max, imbalance)
  first, last, total = CIFAR100[n_max, imbalance]
  assert counts[:5].tolist() == first
  assert counts[-5:].tolist() == last
  assert counts.sum() == total
  without_meta = longtail.class_counts('exponential', 100, n_max - 10, imbalance)
  assert without_meta.sum() == CIFAR100_META_TOTALS[imbalance]


def test_other_profiles():
  counts = longtail.class_counts
  assert counts('step', 4, 500, 100).tolist() == [500, 500, 5, 5]
  assert counts('step', 5, 500, 3).tolist() == [500, 500, 166, 166, 166]
  assert counts('balanced', 3, 7).tolist() == [7, 7, 7]
  assert counts('exponential', 1, 7, 10).tolist() == [7]
  assert counts('original', 10) is None
  assert counts('exponential', 8, 90, 30).tolist() == [90, 55, 34, 20, 12, 7, 4, 3]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('exponental', 10, 100, 10), "did you mean 'exponential'"),
    (('exponential', 10, 100, 0.1), 'at least 1'),
    (('balanced', 10, 0), 'at least 1'),
    (('exponential', 10, 50, 100), 'class 8 without images'),
    (('step', 10, 50, 100), 'class 5 without images'),
  ],
)
def test_profiles_that_cannot_be(arguments, message):
  with pytest.raises(UserError, match=message):
    longtail.class_counts(*arguments)


def test_shot_groups_differ_at_the_bounds():
  counts = np.array([101, 100, 99, 21, 20, 19])
  strict = longtail.shot_groups(counts)
  assert np.flatnonzero(strict['many']).tolist() == [0]
  assert np.flatnonzero(strict['medium']).tolist() == [1, 2, 3, 4]
  assert np.flatnonzero(strict['few']).tolist() == [5]
  inclusive = longtail.shot_groups(counts, rule='inclusive')
  assert np.flatnonzero(inclusive['many']).tolist() == [0, 1]
  assert np.flatnonzero(inclusive['medium']).tolist() == [2, 3]
  assert np.flatnonzero(inclusive['few']).tolist() == [4, 5]
  with pytest.raises(UserError, match="did you mean 'inclusive'"):
    longtail.shot_groups(counts, rule='inclusiv')
  with pytest.raises(UserError, match='few 30 must be less than many 30'):
    longtail.shot_groups(counts, many=30, few=30)


@pytest.mark.parametrize(
  ('imbalance', 'sizes'), [(100, (35, 35, 30)), (50, (41, 41, 18)), (10, (69, 31, 0))]
)
def test_shot_groups_of_cifar100(imbalance, sizes):
  counts = longtail.class_counts('exponential', 100, 500, imbalance)
  groups = longtail.shot_groups(counts)
  assert tuple(mask.sum() for mask in groups.values()) == sizes
  assert (sum(mask.astype(int) for mask in groups.values()) == 1).all()


def digits_labels():
  counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
  return np.random.default_rng(0).permutation(np.repeat(np.arange(10), counts))


DIGITS = {
  'num_classes': 10,
  'known_classes': 8,
  'test_per_class': 50,
  'val_per_class': 20,
  'meta_per_class': 10,
  'train_counts': np.array([90, 55, 34, 20, 12, 7, 4, 3]),
  'open_val_per_class': 20,
  'open_test_per_class': 50,
}


@pytest.mark.parametrize('subset', longtail.SUBSETS)
def test_splits_of_the_digits(subset):
  labels = digits_labels()
  splits = longtail.draw_splits(labels, subset=subset, **DIGITS)
  expected = {
    'test': [50] * 8 + [0, 0],
    'val': [20] * 8 + [0, 0],
    'meta': [10] * 8 + [0, 0],
    'train': [90, 55, 34, 20, 12, 7, 4, 3, 0, 0],
    'open_val': [0] * 8 + [20, 20],
    'open_test': [0] * 8 + [50, 50],
  }
  assert set(splits) == set(expected)
  for split, counts in expected.items():
    assert np.bincount(labels[splits[split]], minlength=10).tolist() == counts
    assert (np.diff(splits[split]) > 0).all()
  together = np.concatenate(list(splits.values()))
  assert len(set(together)) == len(together)


def test_stored_order_takes_test_val_meta_and_tail_from_the_front():
  labels = np.array([0, 1] * 6)
  splits = longtail.draw_splits(
    labels,
    num_classes=2,
    test_per_class=1,
    val_per_class=2,
    meta_per_class=1,
    train_counts=np.array([2, 1]),
    subset='stored',
  )
  assert splits['test'].tolist() == [0, 1]
  assert splits['val'].tolist() == [2, 3, 4, 5]
  assert splits['meta'].tolist() == [6, 7]
  assert splits['train'].tolist() == [8, 9, 10]


def test_draws_depend_on_the_data_seed_and_nest():
  labels = digits_labels()

  def draw(**changes):
    return longtail.draw_splits(labels, **{**DIGITS, **changes})

  first, again, other = draw(), draw(), draw(seed=1)
  for split in first:
    np.testing.assert_array_equal(first[split], again[split])
    assert set(first[split]) != set(other[split])
  smaller = draw(train_counts=DIGITS['train_counts'] // 2 + 1)
  assert set(smaller['train']) < set(first['train'])
  np.testing.assert_array_equal(smaller['test'], first['test'])
  assert set(first['test']) != set(draw(subset='stored')['test'])


def test_original_takes_every_image_that_is_left():
  labels = digits_labels()
  splits = longtail.draw_splits(labels, num_classes=10, test_per_class=50)
  assert set(splits) == {'test', 'train'}
  together = np.sort(np.concatenate(list(splits.values())))
  np.testing.assert_array_equal(together, np.arange(len(labels)))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'train_counts': np.array([90, 103, 9, 9, 9, 9, 9, 9])},
      r'class 1: 183 images asked \(50 test \+ 20 val \+ 10 meta \+ 103 train\), 182',
    ),
    ({'open_test_per_class': 160}, 'class 8: 180 images asked .*160 open_test.* 174'),
    ({'test_per_class': 200, 'train_counts': None}, 'class 0: .* 178 there'),
    ({'num_classes': 11}, 'class 10 has no images'),
    (
      {'num_classes': 11, 'class_names': [*'abcdefghij', 'owl'], 'source': 'npz:x'},
      r"npz:x: class 10 \('owl'\) has no images$",
    ),
    (
      {'open_test_per_class': 160, 'class_names': [*'abcdefghij'], 'source': 'npz:x'},
      r"npz:x: class 8 \('i'\): 180 images asked",
    ),
    ({'num_classes': 9}, 'label 9 in a pool of 9 classes'),
    ({'known_classes': 11}, 'known_classes must be 1 to 10, got 11'),
    ({'known_classes': 7}, '8 class counts for 7 known classes'),
    ({'subset': 'storde'}, "did you mean 'stored'"),
  ],
)
def test_what_cannot_be_drawn_is_reported_in_one_line(changes, message):
  with pytest.raises(UserError, match=message) as error:
    longtail.draw_splits(digits_labels(), **{**DIGITS, **changes})
  assert '\n' not in str(error.value)


def test_labels_that_start_at_one_are_reported():
  with pytest.raises(UserError, match='class 0 has no images; labels must start at 0'):
    longtail.draw_splits(digits_labels() + 1, num_classes=11)


def pool_labels(name):
  """Returns the training labels of a CIFAR pool, or skips the test."""
  folder = pathlib.Path(os.environ.get('LT_JAX_DATA', '.'))
  for file in (folder / f'{name}.npz', folder / f'{name}_pool.npz'):
    if file.exists():
      return np.load(file, allow_pickle=False)['y_train']
  pytest.skip(f'LT_JAX_DATA names no folder with {name}.npz')


@pytest.mark.parametrize(
  ('name', 'classes', 'n_max'), [('cifar10', 10, 5000), ('cifar100', 100, 500)]
)
def test_pools_serve_the_first_images_of_each_class(name, classes, n_max):
  labels = pool_labels(name)
  counts = longtail.class_counts('exponential', classes, n_max - 10, 100)
  splits = longtail.draw_splits(
    labels,
    num_classes=classes,
    meta_per_class=10,
    train_counts=counts,
    subset='stored',
  )
  for c in range(classes):
    members = np.flatnonzero(labels == c)
    meta, train = (splits[s][labels[splits[s]] == c] for s in ('meta', 'train'))
    np.testing.assert_array_equal(meta, members[:10])
    np.testing.assert_array_equal(train, members[10 : 10 + counts[c]])
  step = longtail.class_counts('step', classes, n_max, 100)
  with pytest.raises(UserError, match=r'class 1: .*the stored pool cannot serve this'):
    longtail.draw_splits(
      labels, num_classes=classes, train_counts=step, subset='stored'
    )


def test_label_counts_leave_out_ignored_labels():
  pixels = np.array([[[0, -1], [2, 2]], [[-1, -1], [0, 0]]], np.int32)
  np.testing.assert_array_equal(longtail.label_counts(pixels), [3, 0, 2])
  np.testing.assert_array_equal(longtail.label_counts(pixels, 4), [3, 0, 2, 0])
  np.testing.assert_array_equal(longtail.label_counts(np.full(3, -1), 2), [0, 0])
