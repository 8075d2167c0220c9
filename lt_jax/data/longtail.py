"""Long tails: how many images a class gets, and which.

Splits are drawn from one pool of labels in a fixed order: test, validation and meta
images first, the same number per class, then the long tail from what is left.
"""

import operator
import zlib
from collections.abc import Sequence

import numpy as np

from lt_jax.errors import ClassError, UserError, lookup, named_class


def _balanced(num_classes: int, n_max: int, imbalance: float) -> list[int]:
  """Returns n_c = n_max."""
  return [n_max] * num_classes


def _exponential(num_classes: int, n_max: int, imbalance: float) -> list[int]:
  """Returns n_c = int(n_max * (1 / imbalance)^(c / (C - 1))), one class after another.

  Uses Python floats rather than an array: powers of arrays can differ in the last bit
  between machines, which int() can turn into a whole image.
  """
  last = max(num_classes - 1, 1)
  return [int(n_max * (1 / imbalance) ** (c / last)) for c in range(num_classes)]


def _step(num_classes: int, n_max: int, imbalance: float) -> list[int]:
  """Returns n_max for the first floor(C / 2) classes, int(n_max / imbalance) after."""
  head = num_classes // 2
  return [n_max] * head + [int(n_max / imbalance)] * (num_classes - head)


def _reversed(num_classes: int, n_max: int, imbalance: float) -> list[int]:
  """Returns the counts of 'exponential' from the last class to the first."""
  return _exponential(num_classes, n_max, imbalance)[::-1]


PROFILES = {
  'original': None,  # keeps the data set as it is
  'balanced': _balanced,
  'exponential': _exponential,
  'reversed': _reversed,
  'step': _step,
}


def class_counts(
  profile: str, num_classes: int, n_max: int = 0, imbalance: float = 1.0
) -> np.ndarray | None:
  """Returns the number of training images per class under a profile.

  Exponential: n_c = int(n_max * (1 / mu)^(c / (C - 1))). Reversed: the same from the
  last class to the first. Step: n_max in the first half of the classes, int(n_max / mu)
  in the others. Balanced: n_max.

  Args:
    profile: a key of `PROFILES`.
    num_classes: C.
    n_max: images of the largest class; not used by 'original'.
    imbalance: mu = n_max / n_min >= 1.

  Returns:
    (C,) int, or None for 'original', which keeps every image.

  Raises:
    UserError: an unknown profile, numbers out of range, or a class that would have no
      images.

  Examples:
    >>> class_counts('exponential', 3, n_max=100, imbalance=100).tolist()
    [100, 10, 1]
    >>> class_counts('step', 4, n_max=100, imbalance=10).tolist()
    [100, 100, 10, 10]

  Source: Cui et al., Class-Balanced Loss, arXiv 1901.05555 (exponential); Cao et al.,
  arXiv 1906.07413 (step); the truncation is that of their code.
  """
  count = lookup(PROFILES, 'profile', profile)
  if count is None:
    return None
  if num_classes < 1 or n_max < 1 or imbalance < 1:
    raise UserError(
      f'profile {profile!r} needs num_classes, n_max and imbalance of at least 1, got '
      f'{num_classes}, {n_max} and {imbalance}'
    )
  counts = np.array(count(num_classes, n_max, imbalance))
  if not counts.all():
    without = f' without images: n_max {n_max}, imbalance {imbalance}'
    raise ClassError(f'profile {profile!r} leaves ', counts.argmin(), without)
  return counts


def label_counts(labels: np.ndarray, num_classes: int = 0) -> np.ndarray:
  """Returns how often each class occurs in labels; -1 is not counted.

  Args:
    labels: (...) int, of images or of pixels.
    num_classes: C; 0: the largest label plus one.

  Returns:
    (C,) int.

  Examples:
    >>> label_counts([0, 0, 2, -1]).tolist()
    [2, 0, 1]
  """
  labels = np.asarray(labels)
  return np.bincount(labels[labels >= 0], minlength=num_classes)


SHOT_RULES = {
  'strict': (operator.gt, operator.lt),
  'inclusive': (operator.ge, operator.le),
}


def shot_bounds(counts: np.ndarray, many: float, few: float) -> dict[str, float]:
  """Returns the bounds of many- and few-shot classes, as 'many' and 'few'.

  Args:
    counts: (C,) int training images.
    many: a bound; 0: twice the median of the counts, without empty classes.
    few: likewise; 0: half the median.

  Examples:
    >>> shot_bounds([1, 10, 100], many=0, few=0)
    {'many': 20.0, 'few': 5.0}
  """
  there = np.asarray(counts)[np.asarray(counts) > 0]
  median = float(np.median(there)) if there.size else 1.0
  return {'many': many or 2 * median, 'few': few or median / 2}


def shot_groups(
  counts: np.ndarray, many: int = 100, few: int = 20, rule: str = 'strict'
) -> dict[str, np.ndarray]:
  """Returns the many-, medium- and few-shot classes by their training images.

  Strict: many n > 100, few n < 20, medium the rest. Inclusive: n >= 100 and n <= 20.

  Args:
    counts: (C,) int training images.
    many: bound of the many-shot classes; 0: from the data, see `shot_bounds`.
    few: bound of the few-shot classes, below `many`; 0: likewise.
    rule: a key of `SHOT_RULES`.

  Returns:
    'many', 'medium' and 'few' -> (C,) bool; every class is in exactly one.

  Raises:
    UserError: an unknown rule, or bounds in the wrong order.

  Examples:
    >>> groups = shot_groups([500, 50, 5])
    >>> {name: np.flatnonzero(mask).tolist() for name, mask in groups.items()}
    {'many': [0], 'medium': [1], 'few': [2]}

  Source: Liu et al., Open Long-Tailed Recognition, arXiv 1904.05160. The paper and most
  work based on it are strict, the authors' later code is inclusive.
  """
  above, below = lookup(SHOT_RULES, 'shot rule', rule)
  many, few = shot_bounds(counts, many, few).values()
  if few >= many:
    raise UserError(f'shot bounds: few {few} must be less than many {many}')
  counts = np.asarray(counts)
  is_many, is_few = above(counts, many), below(counts, few)
  return {'many': is_many, 'medium': ~(is_many | is_few), 'few': is_few}


def _seeded(length: int, seed: int) -> np.ndarray:
  """Returns a random order that depends only on the data seed."""
  return np.random.default_rng((seed, zlib.crc32(b'splits'))).permutation(length)


def _stored(length: int, seed: int) -> np.ndarray:
  """Returns the stored order."""
  return np.arange(length)


SUBSETS = {'seeded': _seeded, 'stored': _stored}


def _rank_in_class(labels: np.ndarray, order: np.ndarray) -> np.ndarray:
  """Returns (N,) the rank of each image, from 0, within its class in an order."""
  by_class = order[np.argsort(labels[order], kind='stable')]
  counts = np.bincount(labels)
  first = np.cumsum(counts) - counts
  rank = np.empty(len(labels), np.int64)
  rank[by_class] = np.arange(len(labels)) - np.repeat(first, counts)
  return rank


def draw_splits(
  labels: np.ndarray,
  *,
  num_classes: int,
  known_classes: int | None = None,
  test_per_class: int = 0,
  val_per_class: int = 0,
  meta_per_class: int = 0,
  train_counts: np.ndarray | None = None,
  unseen: np.ndarray | None = None,
  open_val_per_class: int = 0,
  open_test_per_class: int = 0,
  subset: str = 'seeded',
  seed: int = 0,
  class_names: Sequence[str] = (),
  source: str = 'the source',
) -> dict[str, np.ndarray]:
  """Draws every split of an experiment from one pool of labels, without overlap.

  The images of each class are ordered once; test, val, meta and train then take theirs
  from the front, one after the other. So with the same seed a smaller tail is a subset
  of a larger one, and runs that only differ in the tail share their test, val and meta
  images.

  Args:
    labels: (N,) int of the pool, in [0, C).
    num_classes: C, known and open classes.
    known_classes: classes below this are known, the others open; None: all are known.
    test_per_class: test images of each known class.
    val_per_class: validation images of each known class.
    meta_per_class: images of each known class kept for a meta objective.
    train_counts: (known,) int, see `class_counts`; None takes everything that is left.
    unseen: (C,) bool, classes with test images only, which need no images in the pool;
      None: no class is unseen.
    open_val_per_class: open validation images of each open class.
    open_test_per_class: open test images of each open class.
    subset: 'seeded' draws at random, 'stored' takes images in the order of the pool.
    seed: the data seed, for 'seeded'.
    class_names: names of the C classes, for messages.
    source: where the pool comes from, for messages.

  Returns:
    'train', 'val', 'test', 'meta', 'open_val', 'open_test' -> (M,) int64 positions
    in the pool, ascending; splits without images are left out.

  Raises:
    UserError: a class has no images, or fewer than requested; it names the class.

  Examples:
    >>> labels, counts = np.repeat([0, 1], 4), np.array([3, 1])
    >>> splits = draw_splits(
    ...   labels, num_classes=2, test_per_class=1, train_counts=counts, subset='stored'
    ... )
    >>> {name: rows.tolist() for name, rows in splits.items()}
    {'test': [0, 4], 'train': [1, 2, 3, 5]}
  """
  labels = np.asarray(labels)
  order = lookup(SUBSETS, 'subset', subset)(len(labels), seed)
  known = num_classes if known_classes is None else known_classes
  if not 0 < known <= num_classes:
    raise UserError(f'known_classes must be 1 to {num_classes}, got {known}')
  seen = np.ones(num_classes, bool) if unseen is None else ~unseen
  there = _supply(labels, num_classes, class_names, source, seen)

  is_known = np.arange(num_classes) < known
  asked = {  # split -> (C,) images, in the order in which they are taken
    'test': test_per_class * is_known,
    'val': val_per_class * (is_known & seen),
    'meta': meta_per_class * (is_known & seen),
    'open_val': open_val_per_class * ~is_known,
    'open_test': open_test_per_class * ~is_known,
  }
  if train_counts is None:
    train_counts = np.maximum(there - sum(asked.values()), 1)[:known] * seen[:known]
  if len(train_counts) != known:
    raise UserError(f'{len(train_counts)} class counts for {known} known classes')
  asked['train'] = np.pad(train_counts, (0, num_classes - known))
  _check_supply(asked, there, subset, class_names, source)

  rank = _rank_in_class(labels, order)
  splits, begin = {}, np.zeros(num_classes, np.int64)
  for split, counts in asked.items():
    end = begin + counts
    if counts.any():
      splits[split] = np.flatnonzero((begin[labels] <= rank) & (rank < end[labels]))
    begin = end
  return splits


def _supply(
  labels: np.ndarray,
  num_classes: int,
  class_names: Sequence[str],
  source: str,
  needed: np.ndarray,
) -> np.ndarray:
  """Returns (C,) the images per class; refuses a needed class without images."""
  there = np.bincount(labels, minlength=num_classes)
  if len(there) > num_classes:
    raise UserError(
      f'{source}: label {len(there) - 1} in a pool of {num_classes} classes'
    )
  filled = (there > 0) | ~needed
  if not filled.all():
    from_one = not there[0] and there[1:].all()
    hint = '; labels must start at 0, these start at 1' if from_one else ''
    empty = named_class(np.argmin(filled), class_names)
    raise UserError(f'{source}: {empty} has no images{hint}')
  return there


def _check_supply(
  asked: dict[str, np.ndarray],
  there: np.ndarray,
  subset: str,
  class_names: Sequence[str],
  source: str,
) -> None:
  """Raises a `UserError` for the first class with too few images."""
  total = sum(asked.values())
  if (total <= there).all():
    return
  c = np.argmax(total > there)
  parts = ' + '.join(f'{counts[c]} {s}' for s, counts in asked.items() if counts[c])
  hint = '; the stored pool cannot serve this profile' if subset == 'stored' else ''
  raise UserError(
    f'{source}: {named_class(c, class_names)}: {total[c]} images asked ({parts}), '
    f'{there[c]} there{hint}'
  )
