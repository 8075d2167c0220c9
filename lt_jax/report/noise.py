"""Whether a difference between two methods is more than noise: paired 95 % intervals.

A difference of paired measurements is within noise if its interval contains zero. The t
interval is over seeds, the bootstrap interval over test images. An interval without
width says nothing: all seeds, or all images, gave the same difference, as happens with
few test images. Such a difference counts as within noise, too.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
RESAMPLES = 2000
SEED = 0
NARROWEST = 1e-9
"""An interval that is narrower has no width but rounding errors."""

_BLOCK = 2**22
"""Most numbers in a block of resamples, which limits their memory."""


class Interval(NamedTuple):
  """A difference and its confidence interval."""

  difference: float
  low: float
  high: float

  @property
  def is_known(self) -> bool:
    """Whether the measurements vary, so that the interval says something."""
    return self.high - self.low > NARROWEST

  @property
  def within_noise(self) -> bool:
    """Whether the difference may be zero."""
    return self.low <= 0 <= self.high or not self.is_known


def paired_t(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
  r"""Returns the interval of a paired t-test.

  With n differences d_i and their sample standard deviation s:

  .. math:: \bar d \pm t_{n-1,\,0.975} \, s / \sqrt n

  The test is paired because runs with the same seed share their initial weights and the
  order of their batches, so they are not independent. The interval also holds if they
  are. A permutation test is no alternative: with three seeds its smallest p is 1/4.

  Args:
    ours: (n,) measurements, one per seed, n > 1.
    theirs: (n,) measurements for the same seeds.

  Examples:
    >>> found = paired_t([0.5, 0.7, 0.9], [0.4, 0.5, 0.6])
    >>> [round(value, 3) for value in found]
    [0.2, -0.048, 0.448]
    >>> found.within_noise
    True
  """
  d = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
  half = stdtrit(len(d) - 1, (1 + LEVEL) / 2) * d.std(ddof=1) / np.sqrt(len(d))
  return Interval(float(d.mean()), float(d.mean() - half), float(d.mean() + half))


def paired_bootstrap(
  differences: Callable[[np.ndarray], np.ndarray], images: Sequence[int]
) -> list[Interval]:
  """Returns percentile intervals over `RESAMPLES` resamples of the test images.

  Both methods are measured on the same resample. Images with the same effect are one
  kind: their number in a resample is multinomial, so none is drawn on its own.

  Args:
    differences: numbers of images of each kind (R, K) -> M differences (R, M), NaN
      where a resample has none of the images concerned.
    images: (K,) number of test images of each kind.

  Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.

  Examples:
    Of 100 images, only our method gets 30 right, and only theirs 10.

    >>> gain = np.array([[1], [-1], [0]]) / 100
    >>> (found,) = paired_bootstrap(lambda n: n @ gain, [30, 10, 60])
    >>> round(found.difference, 2), found.within_noise
    (0.2, False)
  """
  images = np.asarray(images)
  rng, total = np.random.default_rng(SEED), images.sum()
  rows = max(1, _BLOCK // len(images))
  draws = np.concatenate(
    [
      differences(rng.multinomial(total, images / total, min(rows, RESAMPLES - begin)))
      for begin in range(0, RESAMPLES, rows)
    ]
  )
  low, high = np.nanpercentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=0)
  seen = differences(images[None])[0]
  return [Interval(*map(float, ends)) for ends in zip(seen, low, high, strict=True)]
