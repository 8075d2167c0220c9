"""Episodes: few-shot tasks made from classes that have many images.

In each, some base classes act as novel ones: a few of their images are exemplars to
learn them from. The queries come from these and from the other base classes. An episode
is a pure function of (seed, step), like a sampler's epoch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lt_jax.data.samplers import _generator
from lt_jax.data.streams import Batch, Stream, process_rows
from lt_jax.errors import ClassError, UserError

Episode = dict[str, np.ndarray]


class Episodes(NamedTuple):
  """Tasks of one shape.

  Attributes:
    images: N, the number of training images.
    novel: K, the number of classes that act as novel ones.
    queries: Q, the number of queries.
    draw: (seed, step) -> 'pretended' (K,) int32, 'exemplars' (K, M) int32 positions
      into the training set, 'exemplar_mask' (K, M) bool, false for padding,
      'queries' (Q,) int32 positions and 'label' (Q,) int32, the queries' classes.
  """

  images: int
  novel: int
  queries: int
  draw: Callable[[int, int], Episode]


def episodes(
  labels: np.ndarray,
  base: np.ndarray,
  *,
  novel: int,
  queries_novel: int,
  queries_base: int,
  shots: Sequence[int] = (1, 2, 5, 10, 20),
) -> Episodes:
  """Returns episodes of base classes, of which `novel` ones act as novel.

  All classes of an episode have the same number of exemplars, drawn from `shots`, but a
  class always keeps an image for a query. The novel queries are spread evenly over the
  K classes and are never exemplars; the base queries have classes drawn uniformly from
  the other base classes. Queries of a class only repeat when it runs out of images.

  Args:
    labels: (N,) int, the training labels.
    base: (C,) bool, the classes that have many images.
    novel: K.
    queries_novel: queries of the K classes; K or more give at least one of each.
    queries_base: queries of the other base classes.
    shots: possible numbers of exemplars per class; M is the largest.

  Raises:
    UserError: impossible numbers, all classes are base, fewer than 2 are, or a base
      class has fewer than 2 images.

  Source: Gidaris and Komodakis, arXiv 1804.09458, and the authors' code: 250 of 389
  base classes, 1,500 novel and 750 base queries on ImageNet. They use one number of
  shots per training run; here one generator serves all of them.
  """
  base = np.asarray(base, bool)
  pool = np.flatnonzero(base)
  _check(base, novel, queries_novel, queries_base, shots)
  images = {c: np.flatnonzero(np.asarray(labels) == c) for c in pool}
  for c, of_class in images.items():
    if len(of_class) < 2:
      has = f' has {len(of_class)} training images; an exemplar and a query need 2'
      raise ClassError('episodes: base ', c, has)
  most = max(shots)

  def draw(seed: int, step: int) -> Episode:
    generator = _generator('episodes', seed, step)
    order = generator.permutation(pool)
    classes, others = order[:novel], order[novel:]
    shot = int(generator.choice(shots))
    exemplars = np.empty((novel, most), np.int32)
    mask = np.zeros((novel, most), bool)
    queries, asked = [], []

    def ask(c: int, of_class: np.ndarray, count: int) -> None:
      queries.append(np.resize(of_class, count))
      asked.append(np.full(count, c))

    for k, c in enumerate(classes):
      shuffled = generator.permutation(images[c])
      number = min(shot, len(shuffled) - 1)
      exemplars[k] = shuffled[0]
      exemplars[k, :number] = shuffled[:number]
      mask[k, :number] = True
      ask(c, shuffled[number:], len(range(k, queries_novel, novel)))
    counts = np.bincount(
      generator.integers(len(others), size=queries_base), minlength=len(others)
    )
    for c, count in zip(others, counts, strict=True):
      ask(c, generator.permutation(images[c]), count)
    return {
      'pretended': classes.astype(np.int32),
      'exemplars': exemplars,
      'exemplar_mask': mask,
      'queries': np.concatenate(queries).astype(np.int32),
      'label': np.concatenate(asked).astype(np.int32),
    }

  return Episodes(len(labels), novel, queries_novel + queries_base, draw)


def episode_stream(tasks: Episodes, features: Any, *, seed: int) -> Stream:
  """Returns the endless stream of one episode per step.

  A batch is an episode with features instead of positions: 'exemplars' (K, M, D) and
  'queries' (Q, D). Its arrays are split over the devices along their first axis, so
  the number of devices must divide K and Q.

  Args:
    tasks: the episodes.
    features: (N, D) of the training images, or their `jax.ShapeDtypeStruct` if they are
      not computed yet.
    seed: of the episodes.

  Raises:
    UserError: there is not one feature per image.
  """
  if len(features.shape) != 2 or features.shape[0] != tasks.images:
    raise UserError(
      f'episodes: features of shape {features.shape} do not fit {tasks.images} images'
    )

  def payload(step: int) -> Episode:
    return {name: process_rows(x) for name, x in tasks.draw(seed, step).items()}

  return Stream({'features': features}, payload, _gather)


def _gather(
  arrays: Mapping[str, jax.Array], payload: Mapping[str, jax.Array], key: jax.Array
) -> Batch:
  """Replaces positions with features."""
  del key
  features = arrays['features']
  taken = {name: features[payload[name]] for name in ('exemplars', 'queries')}
  return {**payload, **taken}


def _check(
  base: np.ndarray,
  novel: int,
  queries_novel: int,
  queries_base: int,
  shots: Sequence[int],
) -> None:
  """Raises a `UserError` for numbers that make no episode."""
  count = int(base.sum())
  if count < 2:
    raise UserError(f'episodes: they need 2 base classes, here are {count}')
  if count == len(base):
    raise UserError('episodes: every class is base, so there is no novel class')
  if not 1 <= novel < count:
    raise UserError(
      f'episodes: novel must be at least 1 and less than the {count} base classes, '
      f'got {novel}'
    )
  if queries_novel < 1 or queries_base < 0:
    raise UserError(
      f'episodes: {queries_novel} novel and {queries_base} base queries; there must be '
      'at least 1 and 0'
    )
  if not shots or min(shots) < 1:
    raise UserError(f'episodes: shots must be positive numbers, got {tuple(shots)}')
