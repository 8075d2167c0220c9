"""Samplers: the order of training images as a pure function of (seed, epoch).

The stream of a run is the concatenation of its epochs, each with L positions: position
p = step * B + i is element p mod L of epoch p // L. So no image is dropped, a batch may
span epochs, a run resumes from its step alone, and every host computes the same global
order.
"""

import functools
import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lt_jax.data.longtail import label_counts
from lt_jax.errors import ClassError, UserError, lookup


class Sampler(NamedTuple):
  """The order of a training set.

  Attributes:
    length: L, the number of positions in an epoch.
    indices: (seed, epoch) -> (L,) int32, positions in the training set; a pure
      function, so that its results may be cached.
  """

  length: int
  indices: Callable[[int, int], np.ndarray]


class _Classes(NamedTuple):
  """The training set class by class."""

  counts: np.ndarray  # (C,) images of each class
  images: np.ndarray  # (N,) positions of class 0, then of class 1, ...; without -1


def _generator(name: str, seed: int, epoch: int) -> np.random.Generator:
  """Returns the random generator of a sampler in an epoch."""
  return np.random.default_rng((seed, epoch, zlib.crc32(name.encode())))


def _classes(name: str, labels: np.ndarray) -> _Classes:
  """Groups the labelled training images by class; every class must have one."""
  labels = np.asarray(labels)
  if not labels.size:
    raise UserError(f'sampler {name!r}: the training set is empty')
  counts = label_counts(labels)
  if not counts.size:
    raise UserError(
      f"sampler {name!r} draws by class, but no image has a label: use 'instance'"
    )
  if not counts.all():
    raise ClassError(f'sampler {name!r}: ', counts.argmin(), ' has no training images')
  unlabelled = len(labels) - counts.sum()  # they are -1, so they come first
  return _Classes(counts, np.argsort(labels, kind='stable')[unlabelled:])


def _serve(
  generator: np.random.Generator, classes: _Classes, draws: np.ndarray
) -> np.ndarray:
  """Returns an image of each class drawn: the next of that class's shuffled cycle.

  A class deals its images in random order, and reshuffles them when all have been
  dealt. All cycles that the draws need are laid out at once, class by class and lap by
  lap, and one sort shuffles them within each lap.
  """
  counts, images = classes
  drawn = np.bincount(draws, minlength=len(counts))
  laps = -(-drawn // counts)
  dealt = laps * counts
  label = np.repeat(np.arange(len(counts)), dealt)
  turn = np.arange(len(label)) - np.repeat(np.cumsum(dealt) - dealt, dealt)
  lap, place = np.divmod(turn, counts[label])
  lap += (np.cumsum(laps) - laps)[label]
  cycles = images[(np.cumsum(counts) - counts)[label] + place]
  # A stable sort gives the same order on every machine.
  cycles = cycles[np.argsort(lap + generator.random(len(lap)), kind='stable')]
  served = np.empty(len(draws), np.int32)
  served[np.argsort(draws, kind='stable')] = cycles[turn < drawn[label]]
  return served


def _with_replacement(name: str, labels: np.ndarray, weights: np.ndarray) -> Sampler:
  """Draws every image independently, with class weights (C,) on any scale."""
  labels = np.asarray(labels)
  cumulative = np.cumsum(np.where(labels >= 0, weights[labels], 0))

  def indices(seed: int, epoch: int) -> np.ndarray:
    uniform = _generator(name, seed, epoch).random(len(labels)) * cumulative[-1]
    drawn = np.searchsorted(cumulative, uniform, side='right')
    return np.minimum(drawn, len(labels) - 1).astype(np.int32)

  return Sampler(len(labels), indices)


def instance(images: np.ndarray) -> Sampler:
  """Every image once per epoch, in random order: p_j = n_j / N.

  Args:
    images: (N,), one entry per image; only their number matters.

  Returns:
    A sampler with L = N.

  Raises:
    UserError: there are no images.

  Examples:
    >>> sampler = instance(np.zeros(4))
    >>> sorted(sampler.indices(seed=0, epoch=0).tolist())
    [0, 1, 2, 3]
  """
  length = len(images)
  if not length:
    raise UserError("sampler 'instance': the training set is empty")

  def indices(seed: int, epoch: int) -> np.ndarray:
    return _generator('instance', seed, epoch).permutation(length).astype(np.int32)

  return Sampler(length, indices)


def class_balanced(labels: np.ndarray) -> Sampler:
  """Samples every class equally often: p_j = 1 / C.

  The class of each position is drawn independently and uniformly. Its image is the next
  in that class's shuffled cycle, so no image repeats before all of its class have been
  used.

  Args:
    labels: (N,) int, the training labels.

  Returns:
    A sampler with L = N.

  Raises:
    UserError: a class has no images.

  Examples:
    >>> labels = np.repeat([0, 1], [9000, 1000])
    >>> drawn = labels[class_balanced(labels).indices(seed=0, epoch=0)]
    >>> (np.bincount(drawn) / len(drawn)).round(1).tolist()
    [0.5, 0.5]

  Source: Kang et al., Decoupling Representation and Classifier, arXiv 1910.09217,
  Equation 1 with q = 0; their code implements it as `class_aware`.
  """
  classes = _classes('class_balanced', labels)

  def indices(seed: int, epoch: int) -> np.ndarray:
    generator = _generator('class_balanced', seed, epoch)
    draws = generator.integers(len(classes.counts), size=len(labels))
    return _serve(generator, classes, draws)

  return Sampler(len(labels), indices)


def square_root(labels: np.ndarray) -> Sampler:
  """Square-root sampling: p_j = sqrt(n_j) / sum_k sqrt(n_k), with replacement.

  Args:
    labels: (N,) int, the training labels.

  Returns:
    A sampler with L = N.

  Raises:
    UserError: a class has no images.

  Examples:
    >>> labels = np.repeat([0, 1], [16000, 1000])  # sqrt(16000) : sqrt(1000) = 4 : 1
    >>> drawn = labels[square_root(labels).indices(seed=0, epoch=0)]
    >>> (np.bincount(drawn) / len(drawn)).round(1).tolist()
    [0.8, 0.2]

  Source: Kang et al., arXiv 1910.09217, Equation 1 with q = 1/2.
  """
  counts = _classes('square_root', labels).counts
  return _with_replacement('square_root', labels, counts**-0.5)


def progressive(labels: np.ndarray, *, epochs: float) -> Sampler:
  """From instance to class-balanced: p_j(e) = (1 - t) n_j / N + t / C.

  t rises linearly from 0 in the first epoch to 1 in the last, and stays there. The
  class is drawn with probability p; its image is the next in that class's shuffled
  cycle.

  Args:
    labels: (N,) int, the training labels.
    epochs: of the run; T is this rounded up, and t = e / (T - 1).

  Returns:
    A sampler with L = N.

  Raises:
    UserError: a class has no images, or `epochs` is negative.

  Examples:
    >>> labels = np.repeat([0, 1], [9000, 1000])
    >>> drawn = labels[progressive(labels, epochs=3).indices(seed=0, epoch=1)]
    >>> (np.bincount(drawn) / len(drawn)).round(1).tolist()  # half-way to 0.5
    [0.7, 0.3]

  Source: Kang et al., arXiv 1910.09217, Equation 2 with t = e / T; their code, like
  this, reaches t = 1 in the last epoch.
  """
  classes = _classes('progressive', labels)
  if epochs < 0:
    raise UserError(f"sampler 'progressive': epochs cannot be negative, got {epochs}")
  begun = max(1, math.ceil(epochs))
  natural = classes.counts / classes.counts.sum()

  def indices(seed: int, epoch: int) -> np.ndarray:
    generator = _generator('progressive', seed, epoch)
    t = np.linspace(0, 1, begun)[min(epoch, begun - 1)]
    p = (1 - t) * natural + t / len(natural)
    draws = generator.choice(len(natural), size=len(labels), p=p)
    return _serve(generator, classes, draws)

  return Sampler(len(labels), indices)


def class_aware(labels: np.ndarray, *, batch: int, per_class: int = 4) -> Sampler:
  """A few images each of many classes: B = 128 holds 32 classes with 4 images each.

  The classes take turns in shuffled order, and each gives its next `per_class` images;
  a class with fewer images repeats some.

  Args:
    labels: (N,) int, the training labels.
    batch: B, the global batch size.
    per_class: number of consecutive images of a class.

  Returns:
    A sampler with L = floor(N / B) * B, so that an epoch consists of whole batches.

  Raises:
    UserError: a class has no images, the training set is smaller than a batch, or an
      option is not positive.

  Examples:
    >>> labels = np.repeat([0, 1], [6, 2])
    >>> sampler = class_aware(labels, batch=4, per_class=2)
    >>> drawn = labels[sampler.indices(seed=0, epoch=0)]
    >>> np.sort(drawn.reshape(2, 4)).tolist()  # the two batches of an epoch
    [[0, 0, 1, 1], [0, 0, 1, 1]]

  Source: Liu et al., Open Long-Tailed Recognition, arXiv 1904.05160, and the authors'
  sampler; there the cycles continue from epoch to epoch, here each epoch starts new
  ones.
  """
  classes = _classes('class_aware', labels)
  if min(batch, per_class) < 1:
    raise UserError(
      f"sampler 'class_aware': batch {batch} and per_class {per_class} must be positive"
    )
  length = len(labels) // batch * batch
  if not length:
    raise UserError(
      f"sampler 'class_aware': {len(labels)} training images are fewer than one batch "
      f'of {batch}'
    )

  def indices(seed: int, epoch: int) -> np.ndarray:
    generator = _generator('class_aware', seed, epoch)
    laps = -(-length // (per_class * len(classes.counts)))
    order = np.tile(np.arange(len(classes.counts)), (laps, 1))
    order = generator.permuted(order, axis=1).ravel()
    return _serve(generator, classes, np.repeat(order, per_class)[:length])

  return Sampler(length, indices)


def effective_number(labels: np.ndarray, *, beta: float) -> Sampler:
  """Class-balanced weights as sampling probabilities, with replacement.

  An image of class j has a probability proportional to (1 - beta) / (1 - beta^n_j).

  Args:
    labels: (N,) int, the training labels.
    beta: in [0, 1); 0 draws images uniformly, values near 1 draw classes uniformly.

  Returns:
    A sampler with L = N.

  Raises:
    UserError: a class has no images, or beta is out of range.

  Examples:
    >>> labels = np.repeat([0, 1], [9000, 1000])
    >>> drawn = labels[effective_number(labels, beta=0.9999).indices(seed=0, epoch=0)]
    >>> (np.bincount(drawn) / len(drawn)).round(1).tolist()
    [0.6, 0.4]

  Source: Cao et al., Learning Imbalanced Datasets with LDAM, arXiv 1906.07413, the
  authors' re-sampling rule, with the weights of Cui et al., arXiv 1901.05555.
  """
  counts = _classes('effective_number', labels).counts
  if not 0 <= beta < 1:
    raise UserError(f"sampler 'effective_number': beta must be in [0, 1), got {beta}")
  weights = (1 - beta) / (1 - np.power(float(beta), counts))
  return _with_replacement('effective_number', labels, weights)


def deferred(first: Sampler, second: Sampler, *, switch_epoch: int) -> Sampler:
  """Deferred re-sampling (DRS): one sampler, then another.

  Args:
    first: the sampler before `switch_epoch`.
    second: the sampler from `switch_epoch` on.
    switch_epoch: counted from 0.

  Returns:
    A sampler with the same length as both.

  Raises:
    UserError: their epochs differ in length.

  Examples:
    >>> labels = np.repeat([0, 1], [9000, 1000])
    >>> sampler = deferred(instance(labels), class_balanced(labels), switch_epoch=160)
    >>> drawn = [labels[sampler.indices(seed=0, epoch=epoch)] for epoch in (159, 160)]
    >>> [(np.bincount(one) / len(one)).round(1).tolist() for one in drawn]
    [[0.9, 0.1], [0.5, 0.5]]

  Source: Cao et al., arXiv 1906.07413, the deferred schedule.
  """
  if first.length != second.length:
    raise UserError(
      'deferred sampling needs two samplers with epochs of the same length, got '
      f'{first.length} and {second.length}'
    )

  def indices(seed: int, epoch: int) -> np.ndarray:
    return (first if epoch < switch_epoch else second).indices(seed, epoch)

  return Sampler(first.length, indices)


def rare_class(
  class_pixels: np.ndarray, *, temperature: float = 0.01, fewest_pixels: int = 1
) -> Sampler:
  r"""Rare-class sampling: draws a class, rare ones more often, then one of its images.

  .. math::
    P(c) = \frac{e^{(1 - f_c) / T}}{\sum_k e^{(1 - f_k) / T}}

  with f_c the share of class c among the labelled pixels of the training set. The image
  is the next one in the shuffled cycle of images that show the class. A class that no
  image shows is never drawn.

  Args:
    class_pixels: (N, C) int, pixels of each class in each training image.
    temperature: T. The lower it is, the more often rare classes are drawn.
    fewest_pixels: how many pixels of a class an image needs to be drawn for it. If no
      image has so many, the images with the most pixels are drawn.

  Returns:
    A sampler with L = N.

  Raises:
    UserError: no image has a labelled pixel, or an option is out of range.

  Examples:
    >>> class_pixels = np.array([[90, 0]] * 99 + [[80, 10]])  # only the last has both
    >>> drawn = rare_class(class_pixels, temperature=1.0).indices(seed=0, epoch=0)
    >>> bool((drawn == 99).mean() > 0.5)  # e^0.999 : e^0.001 = 2.7 : 1
    True

  Source: Hoyer et al., DAFormer, CVPR 2022, arXiv 2111.14887, equations 10 and 11. The
  authors' code requires 3,000 pixels of a class in an image and draws its window up to
  ten times until it shows half as many; here the window is random.
  """
  class_pixels = np.asarray(class_pixels)
  totals = class_pixels.sum(axis=0)
  shown = np.flatnonzero(totals)
  if not shown.size:
    raise UserError("sampler 'rare_class': no training image has a labelled pixel")
  if temperature <= 0 or fewest_pixels < 1:
    raise UserError(
      f"sampler 'rare_class': temperature {temperature} must be positive and "
      f'fewest_pixels {fewest_pixels} at least 1'
    )
  probabilities = rare_class_probabilities(totals[shown], temperature)
  members = [_images_of(class_pixels[:, c], fewest_pixels) for c in shown]
  classes = _Classes(np.array([*map(len, members)]), np.concatenate(members))
  length = len(class_pixels)

  def indices(seed: int, epoch: int) -> np.ndarray:
    generator = _generator('rare_class', seed, epoch)
    draws = generator.choice(len(shown), size=length, p=probabilities)
    return _serve(generator, classes, draws)

  return Sampler(length, indices)


def rare_class_probabilities(pixels: np.ndarray, temperature: float) -> np.ndarray:
  """Returns the probabilities (C,) with which `rare_class` draws classes.

  Examples:
    >>> rare_class_probabilities(np.array([75, 25]), temperature=0.5).round(3).tolist()
    [0.269, 0.731]
  """
  rarity = (1 - pixels / pixels.sum()) / temperature
  weights = np.exp(rarity - rarity.max())
  return weights / weights.sum()


def _images_of(pixels: np.ndarray, fewest: int) -> np.ndarray:
  """Returns the images with enough of the pixels (N,), or with the most if none has."""
  return np.flatnonzero(pixels >= min(fewest, pixels.max()))


def offered(epoch: float, whole: float, *, first: float, power: float) -> float:
  """Returns the share of a curriculum that is open at an epoch.

  r0 + (1 - r0) (e / E)^power, which is 1 at epoch E and larger after it.

  Args:
    epoch: e.
    whole: E; 0 for a curriculum that is open from the start.
    first: r0.
    power: below 1, most of it opens early.

  Examples:
    >>> [offered(epoch, 100, first=0.5, power=0.5) for epoch in (0, 25, 100)]
    [0.5, 0.75, 1.0]
  """
  return first + (1 - first) * (epoch / whole) ** power if whole else 1.0


def shift(share: float, first: float) -> tuple[float, float]:
  """A window of constant size, which drops near images as far ones come in.

  Examples:
    >>> shift(0.75, first=0.5)
    (0.25, 0.75)
  """
  return share - first, share


def expand(share: float, first: float) -> tuple[float, float]:
  """A window of everything that is open.

  Examples:
    >>> expand(0.75, first=0.5)
    (0.0, 0.75)
  """
  del first
  return 0.0, share


WINDOWS = {'shift': shift, 'expand': expand}
"""name -> function (open share, initial share) -> (start, end) of the window."""


def curriculum(
  order: np.ndarray,
  *,
  epochs: float,
  positions: int = 0,
  window: str = 'shift',
  first: float = 0.5,
  power: float = 0.3,
  full: float = 0.85,
  in_place: bool = False,
) -> Sampler:
  """Near images first: each epoch offers a window of the order, in the end all images.

  The images of the window are dealt in random order, lap after lap, until the epoch is
  full: all epochs have the same number of positions.

  Args:
    order: (N,) int, positions of the images, nearest first. It is not modified.
    epochs: of the run.
    positions: L, per epoch; 0 for N.
    window: a key of `WINDOWS`.
    first: share of the images in the first window.
    power: how early the window opens, see `offered`.
    full: share of the epochs after which every image is offered.
    in_place: shuffle every window in place, as the authors' sampler does, so that near
      and far images mix from epoch to epoch: by the hundredth, a third of a window's
      images come from outside it. Each epoch then repeats all earlier shuffles.

  Returns:
    A sampler with L positions per epoch.

  Raises:
    UserError: the order is not a permutation, an option is out of range, or the first
      window would be empty.

  Examples:
    >>> sampler = curriculum(np.array([2, 0, 3, 1]), epochs=10)
    >>> [sorted(sampler.indices(seed=0, epoch=epoch).tolist()) for epoch in (0, 9)]
    [[0, 0, 2, 2], [0, 1, 2, 3]]

  Source: Liu et al., Open Compound Domain Adaptation, arXiv 1909.03403, and the
  authors' code, whose values are the defaults: 170 of 200 epochs, r0 = 0.5, power 0.3.
  """
  order = np.array(order, np.int32)
  length = len(order)
  if not np.array_equal(np.sort(order), np.arange(length)) or not length:
    raise UserError(
      f"sampler 'curriculum': the order of {length} images must contain each of them "
      'once'
    )
  place = lookup(WINDOWS, 'window of a curriculum', window)
  if not (0 < first <= 1 and 0 <= full <= 1 and power > 0):
    raise UserError(
      f"sampler 'curriculum': first {first} must be in (0, 1], full {full} in [0, 1] "
      f'and power {power} positive'
    )
  if int(first * length) < 1:
    raise UserError(
      f"sampler 'curriculum': first {first} of {length} images is less than one image"
    )
  dealt_out = positions or length

  def window_of(epoch: int) -> slice:
    share = offered(epoch, full * epochs, first=first, power=power)
    window_at = place(share, first) if share < 1 else (0.0, 1.0)
    start, end = (int(part * length) for part in window_at)
    return slice(start, max(end, start + 1))  # whatever the rounding

  def mixed(seed: int, epoch: int) -> np.ndarray:
    found = order.copy()
    for earlier in range(epoch):
      _generator('in place', seed, earlier).shuffle(found[window_of(earlier)])
    return found

  def indices(seed: int, epoch: int) -> np.ndarray:
    images = (mixed(seed, epoch) if in_place else order)[window_of(epoch)]
    laps = np.tile(images, (-(-dealt_out // len(images)), 1))
    dealt = _generator('curriculum', seed, epoch).permuted(laps, axis=1)
    return dealt.ravel()[:dealt_out]

  return Sampler(dealt_out, indices)


SAMPLERS = {
  'instance': instance,
  'class_balanced': class_balanced,
  'square_root': square_root,
  'progressive': progressive,
  'class_aware': class_aware,
  'effective_number': effective_number,
  'rare_class': rare_class,
  'curriculum': curriculum,
}
"""name -> function that makes a sampler from images, labels, pixels by class or an
order, from batch or epochs if it names them, and from options."""


# Large enough for two epochs of every seed of runs that train together.
@functools.lru_cache(maxsize=32)
def _epoch(sampler: Sampler, seed: int, epoch: int) -> np.ndarray:
  """Returns the order of an epoch, cached; a sampler equals only itself."""
  return sampler.indices(seed, epoch)


def batch_indices(sampler: Sampler, seed: int, batch: int, step: int) -> np.ndarray:
  """Returns the images of a step: positions step * B ... step * B + B - 1 of the run.

  Args:
    sampler: the order of each epoch.
    seed: the seed of the run.
    batch: B, the global batch size.
    step: counted from 0.

  Returns:
    (B,) int32 positions into the training set.

  Examples:
    >>> sampler = instance(np.zeros(4))
    >>> parts = [batch_indices(sampler, seed=0, batch=2, step=step) for step in (0, 1)]
    >>> sorted(np.concatenate(parts).tolist())  # one epoch
    [0, 1, 2, 3]
  """
  place = int(step) * batch + np.arange(batch)
  epoch, element = np.divmod(place, sampler.length)
  parts = [
    _epoch(sampler, seed, e)[element[epoch == e]]
    for e in range(int(epoch[0]), int(epoch[-1]) + 1)
  ]
  return np.concatenate(parts)
