"""Transfer tasks from scikit-learn's digits: nothing is downloaded.

The 1,797 digits are split once into two halves, one for the source tasks and one for
the target tasks, so that no digit is in both a source and a target. A task has 8x8 grey
images and its own classes.

| task | half | classes |
|---|---|---|
| `round` | source | 0, 3, 6, 8, 9 |
| `straight` | source | 1, 2, 4, 5, 7 |
| `digits` | source | all ten |
| `fine` | target | all ten |
| `coarse` | target | `round` against `straight` |
| `parity` | target | even against odd |
| `one` | target | 1 against the even digits |
| `traits` | target | round, odd, prime and square; a digit may have several |

For learning several tasks at once, each image also has the labels of all target tasks
as attributes, and `ink`, the mean of its pixels in [0, 1].
"""

from typing import Any

import numpy as np

from lt_jax.data.arrays import Arrays, rarest
from lt_jax.errors import UserError, lookup

ROUND = (0, 3, 6, 8, 9)
STRAIGHT = (1, 2, 4, 5, 7)
EVEN = (0, 2, 4, 6, 8)

SEED = 20
TEST_SHARE = 1 / 3

_SOURCE, _TARGET = 0, 1

Groups = dict[str, tuple[int, ...]]


def _each(digits: tuple[int, ...]) -> Groups:
  return {str(digit): (digit,) for digit in digits}


TASKS: dict[str, tuple[int, Groups]] = {
  'round': (_SOURCE, _each(ROUND)),
  'straight': (_SOURCE, _each(STRAIGHT)),
  'digits': (_SOURCE, _each(tuple(range(10)))),
  'fine': (_TARGET, _each(tuple(range(10)))),
  'coarse': (_TARGET, {'round': ROUND, 'straight': STRAIGHT}),
  'parity': (_TARGET, {'even': EVEN, 'odd': (1, 3, 5, 7, 9)}),
  'one': (_TARGET, {'even': EVEN, 'one': (1,)}),
}
"""name -> (half, class -> its digits)."""

TRAITS: Groups = {
  'round': ROUND,
  'odd': (1, 3, 5, 7, 9),
  'prime': (2, 3, 5, 7),
  'square': (0, 4, 9),
}
"""Class -> its digits; a digit may have several classes."""


def labels_of(groups: Groups, digits: np.ndarray) -> np.ndarray:
  """Returns (N,) int32: the class of each digit; -1 if it has none."""
  label = np.full(10, -1, np.int32)
  for number, members in enumerate(groups.values()):
    label[list(members)] = number
  return label[digits]


def traits_of(digits: np.ndarray) -> np.ndarray:
  """Returns (N, 4) int32: 1 for each trait of a digit, 0 for others."""
  has = [np.isin(digits, members) for members in TRAITS.values()]
  return np.stack(has, axis=1).astype(np.int32)


def digit_task(name: str, data_dir: str | None) -> dict[str, Any]:
  """Returns split -> source of a task; see the table above.

  Args:
    name: a key of `TASKS`, or 'traits'; 'TASK,SHARE' gives attributes only to this
      share of the training images, and -1 or NaN to the others.
    data_dir: not used.

  Raises:
    UserError: there is no such task.
  """
  from sklearn.datasets import load_digits

  name, _, share = name.partition(',')
  if not name:
    raise UserError(f"source 'digits_tasks' needs a task: {', '.join(TASKS)}")
  tasks = {**TASKS, 'traits': (_TARGET, TRAITS)}
  half, groups = lookup(tasks, 'task of digits', name)
  data = load_digits()
  order = np.random.default_rng(SEED).permutation(len(data.target))
  mine = np.array_split(order, 2)[half]
  tested = int(len(mine) * TEST_SHARE)
  sources = {}
  for split, rows in (('train', mine[tested:]), ('test', mine[:tested])):
    several = traits_of(data.target[rows])
    is_several = name == 'traits'
    label = rarest(several) if is_several else labels_of(groups, data.target[rows])
    rows, label = rows[label >= 0], label[label >= 0]
    images = np.round(data.images[rows] * (255 / 16)).astype(np.uint8)[..., None]
    attributes = {
      task: labels_of(own, data.target[rows])
      for task, (of_half, own) in TASKS.items()
      if of_half == _TARGET
    }
    if is_several:
      attributes['classes'] = several
    attributes['ink'] = (data.images[rows].mean((1, 2)) / 16).astype(np.float32)
    if share and split == 'train':
      bare = np.random.default_rng(SEED).random(len(rows)) >= float(share)
      for values in attributes.values():
        values[bare] = np.nan if values.dtype == np.float32 else -1
    sources[split] = Arrays(images, label, tuple(groups), attributes=attributes)
  return sources
