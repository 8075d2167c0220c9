"""How useful the features of a layer are: few-shot probes and retrieval.

The functions take arrays and return numbers. The caller knows which network and layer
the features come from; see `lt_jax.probe`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.errors import UserError, lookup
from lt_jax.surgeries import classifiers


def pooled(x: jax.Array, budget: int) -> jax.Array:
  """Returns a layer as vectors of at most `budget` values, unless it has more channels.

  A map is averaged over a grid of squares, as fine as the budget allows; if they do not
  divide it evenly, the squares overlap by a pixel.

  Args:
    x: (B, H, W, C), or (B, D), which stays as it is.
    budget: the largest number of values; 0 flattens the whole map.

  Returns:
    (B, D) float32.

  Examples:
    >>> pooled(jnp.zeros((2, 4, 4, 3)), budget=12).shape  # 2 x 2 squares
    (2, 12)
  """
  if x.ndim == 4:
    height, width, channels = x.shape[1:]
    if budget and height * width * channels > budget:
      side = max(1, math.isqrt(budget // channels))
      rows, columns = (_averages(min(side, n), n) for n in (height, width))
      x = jnp.einsum('rh,bhwc,sw->brsc', rows, x.astype(jnp.float32), columns)
    x = x.reshape(len(x), -1)
  return x.astype(jnp.float32)


def _averages(parts: int, size: int) -> np.ndarray:
  """Returns a matrix (parts, size) whose rows average parts of an axis."""
  found = np.zeros((parts, size), np.float32)
  for i in range(parts):
    first, last = i * size // parts, -(-(i + 1) * size // parts)
    found[i, first:last] = 1 / (last - first)
  return found


def places_in_class(labels: np.ndarray, seed: int) -> np.ndarray:
  """Returns the place (N,) of each image in a random order of its class.

  The places below k select k images per class, a subset of those for any larger k.

  Examples:
    >>> places = places_in_class(np.array([0, 1, 0, 1, 0]), seed=0)
    >>> sorted(places[[0, 2, 4]].tolist()), sorted(places[[1, 3]].tolist())
    ([0, 1, 2], [0, 1])
  """
  rng, found = np.random.default_rng(seed), np.zeros(len(labels), np.int64)
  for label in np.unique(labels):
    own = np.flatnonzero(labels == label)
    found[rng.permutation(own)] = np.arange(len(own))
  return found


class Images(NamedTuple):
  """Features of some images.

  Attributes:
    features: (N, D).
    labels: (N,).
  """

  features: np.ndarray
  labels: np.ndarray


class Draws(NamedTuple):
  """How often a probe is fitted, and to how many images.

  Attributes:
    shots: images per class; 0 for all.
    draws: how many times they are drawn; once if all are used.
    folds: folds for choosing the strength, on the first draw.
    seed: of the first draw.
  """

  shots: Sequence[int] = (0,)
  draws: int = 5
  folds: int = 3
  seed: int = 0


def probe(
  name: str,
  train: Images,
  test: Images,
  num_classes: int,
  groups: Mapping[str, np.ndarray],
  draws: Draws,
) -> list[dict[str, Any]]:
  """Fits a classifier to few images per class, and measures it.

  Features are standardised with the mean and deviation of the images used to fit.

  Args:
    name: a key of `classifiers.CLASSIFIERS`.
    train: images to draw from.
    test: images to measure on.
    num_classes: C.
    groups: name -> (C,) bool, classes whose accuracy is reported too.
    draws: how images are drawn.

  Returns:
    for each number of images per class: 'shots', the chosen 'strength', 'accuracy' of
    each draw (mean over classes), 'groups' likewise by name, and 'by_class', the mean
    over draws, None for a class without test images.
  """
  found = []
  for shots in draws.shots:
    strength: float | None = None
    rows = []
    for draw in range(draws.draws if shots else 1):
      place = places_in_class(train.labels, draws.seed + draw)
      used = place < (shots or len(place))
      x, labels = train.features[used], train.labels[used]
      scale = classifiers.scaling(x)
      fitted = classifiers.chosen(
        name,
        scale(x),
        labels,
        num_classes,
        strengths=_strengths(name, labels) if strength is None else (strength,),
        folds=min(draws.folds, len(labels)),
      )
      strength = fitted.strength
      predicted = np.argmax(fitted.classifier(scale(test.features)), axis=1)
      rows.append(_by_class(predicted, test.labels, num_classes))
    by_class = np.array(rows)
    found.append(
      {
        'shots': shots,
        'strength': strength,
        'accuracy': [_mean(row) for row in by_class],
        'groups': {
          group: [_mean(row[members]) for row in by_class]
          for group, members in groups.items()
        },
        'by_class': [_mean(column) for column in by_class.T],
      }
    )
  return found


def _strengths(name: str, labels: np.ndarray) -> tuple[float, ...]:
  """Returns the strengths to try; with one image per class none can be held out."""
  kind = lookup(classifiers.CLASSIFIERS, 'classifier', name)
  return kind.strengths if np.bincount(labels).max() > 1 else (kind.default,)


def _by_class(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
  """Returns the accuracy of each class (C,); NaN for a class without images."""
  counts = np.bincount(labels, minlength=classes)
  right = np.bincount(labels, predicted == labels, minlength=classes)
  return np.where(counts > 0, right / np.maximum(counts, 1), np.nan)


def _mean(values: np.ndarray) -> float | None:
  """Returns the mean of finite values; None if there are none."""
  known = values[np.isfinite(values)]
  return float(known.mean()) if len(known) else None


def nearest(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
  """Returns the gallery sorted for each query, nearest first, (Q, N) int.

  Nearness is the cosine of features, after subtracting the gallery's mean.

  Args:
    queries: features (Q, D).
    gallery: features (N, D).
  """
  centre = gallery.mean(0)

  def unit(x: np.ndarray) -> np.ndarray:
    x = x - centre
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

  return np.argsort(-unit(queries) @ unit(gallery).T, axis=1, kind='stable')


def one_of_each(labels: np.ndarray, most: int) -> np.ndarray:
  """Returns the positions of at most `most` images, of as many classes as possible.

  They are drawn at random and sorted by class.

  Examples:
    >>> labels = np.array([0, 0, 0, 1, 2, 2])
    >>> labels[one_of_each(labels, most=4)].tolist()
    [0, 0, 1, 2]
  """
  place = places_in_class(labels, seed=0)
  rng = np.random.default_rng(0)
  # First one of every class, then a second of each, in random order.
  order = np.lexsort((rng.random(len(labels)), place))[:most]
  return order[np.argsort(labels[order], kind='stable')]


def retrieval(
  queries: Images, gallery: Images, ranks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
  r"""Measures how well images of a class are found by the cosine of features.

  .. math:: AP = \frac{1}{R} \sum_{k} \mathrm{rel}(k) \frac{1}{k} \sum_{j \le k}
    \mathrm{rel}(j)

  with rel(k) = 1 if the k-th image has the query's class, which R images of the gallery
  have. The gallery's mean is subtracted from all features.

  Args:
    queries: images to look up.
    gallery: images to search.
    ranks: the k of recall@k.

  Returns:
    'recall@k', the share of queries with an image of their class among the first k,
    and 'mean_average_precision', over queries whose class is in the gallery.

  Raises:
    UserError: no query has its class in the gallery.

  Examples:
    >>> gallery = Images(np.array([[1.0], [1.0], [-2.0]]), np.array([0, 1, 2]))
    >>> query = Images(np.array([[3.0]]), np.array([1]))
    >>> retrieval(query, gallery, ranks=(1, 2))  # its class comes second
    {'recall@1': 0.0, 'recall@2': 1.0, 'mean_average_precision': 0.5}
  """
  kept = np.isin(queries.labels, gallery.labels)
  if not kept.any():
    raise UserError('retrieval: no query has a class that is in the gallery')
  first, precision = [], []
  for part in np.array_split(np.flatnonzero(kept), -(-kept.sum() // 500)):
    order = nearest(queries.features[part], gallery.features)
    relevant = gallery.labels[order] == queries.labels[part][:, None]
    first.append(relevant.argmax(1))
    so_far = relevant.cumsum(1) / np.arange(1, relevant.shape[1] + 1)
    precision.append((so_far * relevant).sum(1) / relevant.sum(1))
  first = np.concatenate(first)
  return {
    **{f'recall@{k}': float((first < k).mean()) for k in ranks},
    'mean_average_precision': float(np.concatenate(precision).mean()),
  }
