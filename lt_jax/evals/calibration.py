"""Calibration: are predictions with a confidence of 80 % right four times in five?"""

import numpy as np

BINS = 15


def calibration(
  confidence: np.ndarray, correct: np.ndarray, bins: int = BINS
) -> dict[str, float | np.ndarray]:
  r"""Returns the expected calibration error and the bins of a reliability diagram.

  .. math::
    \text{ECE} = \sum_b \frac{n_b}{N}
      \left| \text{accuracy}_b - \text{confidence}_b \right|

  over bins of equal width, where bin b is (b / bins, (b + 1) / bins].

  Args:
    confidence: (N,) in (0, 1].
    correct: (N,) bool.
    bins: number of bins; 15 is customary.

  Returns:
    'ece', and (bins,) arrays: 'bin_count', 'bin_confidence' and 'bin_accuracy' (NaN
    where a bin is empty).

  Examples:
    >>> confidence, correct = np.ones(4), np.array([True, True, True, False])
    >>> calibration(confidence, correct)['ece']  # |0.75 - 1|
    0.25

  Source: Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599,
  equation 3.
  """
  index = np.clip(np.ceil(confidence.astype(np.float64) * bins) - 1, 0, bins - 1)
  index = index.astype(int)
  count = np.bincount(index, minlength=bins)
  sums = (np.bincount(index, values, bins) for values in (confidence, correct))
  empty = np.full(bins, np.nan)
  mean_confidence, accuracy = (
    np.divide(s, count, out=empty.copy(), where=count > 0) for s in sums
  )
  gap = np.nan_to_num(np.abs(accuracy - mean_confidence))
  return {
    'ece': float((count * gap).sum() / len(confidence)),
    'bin_count': count,
    'bin_confidence': mean_confidence,
    'bin_accuracy': accuracy,
  }
