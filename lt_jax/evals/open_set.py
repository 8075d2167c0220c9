"""The open set: separating known classes from classes never seen in training.

An image is rejected if its known score is below a threshold. Two published definitions
of the F-measure differ widely; we compute both, each under its own name.
"""

from typing import Any

import numpy as np

from lt_jax.errors import UserError, lookup
from lt_jax.evals.closed_set import closed_set

FIXED_THRESHOLD = 0.1
"""For the maximum softmax probability, in Liu et al., arXiv 1904.05160."""


def f_measure(
  label: np.ndarray,
  prediction: np.ndarray,
  known_score: np.ndarray,
  threshold: float,
  *,
  definition: str,
) -> float:
  r"""Returns the open-set F-measure, micro-averaged.

  With a prediction of -1 where the score is below the threshold: a true positive is a
  known image with the right class, a false negative an open image with any class, and

  .. math:: F = \frac{2 P R}{P + R}, \quad P = \frac{TP}{TP + FP}, \quad
            R = \frac{TP}{TP + FN}

  The definitions differ in what they count as a false positive:

    'oltr2019'  a known image with a wrong class. Rejecting one costs nothing, so F only
                grows with the threshold. The paper's tables use it.
    'oltr2020'  a known image with a wrong class, or a rejected one.

  Args:
    label: (N,) int, -1 for open images.
    prediction: (N,) int, the class before any rejection.
    known_score: (N,), higher for images of known classes.
    threshold: images with a lower score are rejected.
    definition: 'oltr2019' or 'oltr2020'.

  Examples:
    >>> label, prediction = np.array([0, 0, -1]), np.array([0, 0, 0])
    >>> score = np.array([0.9, 0.6, 0.3])  # at 0.8 a known image is rejected
    >>> f_measure(label, prediction, score, 0.8, definition='oltr2019')
    1.0
    >>> round(f_measure(label, prediction, score, 0.8, definition='oltr2020'), 3)
    0.667

  Source: Liu et al., arXiv 1904.05160, and the authors' code before and after its
  change of January 2020.
  """
  known, kept = label >= 0, known_score >= threshold
  right = known & kept & (prediction == label)
  rejections_count = {'oltr2019': False, 'oltr2020': True}[definition]
  wrong = known & (prediction != label) & kept
  false_positives = wrong.sum() + (rejections_count * (known & ~kept)).sum()
  false_negatives = (~known & kept).sum()
  denominator = 2 * right.sum() + false_positives + false_negatives
  return float(2 * right.sum() / denominator) if denominator else 0.0


def ranking(known_score: np.ndarray, open_score: np.ndarray) -> dict[str, float]:
  """Returns how well the scores separate, without a threshold.

  Args:
    known_score: (N,) scores of known images.
    open_score: (M,) scores of open images.

  Returns:
    'auroc', the probability that a known image scores above an open one, ties half;
    'aupr', the average precision of finding known images; and 'fpr_at_95_tpr', the
    share of open images accepted when at least 95 % of the known ones are.

  Examples:
    >>> found = ranking(known_score=np.array([0.9, 0.4]), open_score=np.array([0.5]))
    >>> found['auroc'], found['fpr_at_95_tpr']
    (0.5, 1.0)

  Source: Hendrycks and Gimpel, arXiv 1610.02136.
  """
  from sklearn.metrics import average_precision_score, roc_auc_score

  scores = np.concatenate([known_score, open_score])
  is_known = np.arange(len(scores)) < len(known_score)
  threshold = keep_threshold(known_score)
  return {
    'auroc': float(roc_auc_score(is_known, scores)),
    'aupr': float(average_precision_score(is_known, scores)),
    'fpr_at_95_tpr': float((open_score >= threshold).mean()),
  }


def open_auc(
  right: np.ndarray, known_score: np.ndarray, open_score: np.ndarray
) -> float:
  """Returns how often a known image is classified right and outscores an open one.

  This is the mean over all pairs, where ties count half: the AUROC with only correctly
  classified known images, and the area under the open-set classification rate curve
  (OSCR).

  Args:
    right: (N,) bool, whether a known image got its class.
    known_score: (N,).
    open_score: (M,).

  Examples:
    >>> open_auc(np.array([True, False]), np.array([0.9, 0.8]), np.array([0.5, 0.1]))
    0.5

  Source: Dhamija et al., arXiv 1811.04110; as pairs, Wang et al., arXiv 2210.13458.
  """
  ascending = np.sort(open_score)
  ranks = [np.searchsorted(ascending, known_score, side) for side in ('left', 'right')]
  return float((right * np.mean(ranks, axis=0)).mean() / len(ascending))


def keep_threshold(known_score: np.ndarray, keep: float = 0.95) -> float:
  """Returns the largest threshold that keeps a share of known validation images.

  Args:
    known_score: (N,).
    keep: the share of images whose score is at least the threshold.

  Examples:
    >>> keep_threshold(np.array([0.9, 0.2, 0.8, 0.7]), keep=0.75)
    0.7
  """
  descending = np.sort(known_score)[::-1]
  return float(descending[max(int(np.ceil(keep * len(descending))) - 1, 0)])


CRITERIA = {
  'f_measure': lambda right, known, others: 2 * right / (right + known[-1] + others),
  'youden': lambda right, known, others: known / known[-1] - others / others[-1],
}
"""name -> (right, known, others) -> value, which is large for good thresholds. The
arguments count the images accepted at each threshold (the last one accepts all): known
images classified right, known images, open images. The F-measure is 'oltr2020', since
'oltr2019' only grows with the threshold; Youden's index is J = TPR - FPR."""


def best_threshold(
  label: np.ndarray,
  prediction: np.ndarray,
  known_score: np.ndarray,
  *,
  by: str = 'f_measure',
) -> float:
  """Returns the best threshold on validation data with open images.

  It tries every score, and takes the lowest of equally good ones.

  Args:
    label: (N,) int, -1 for open images.
    prediction: (N,) int.
    known_score: (N,).
    by: a key of `CRITERIA`.

  Raises:
    UserError: an unknown criterion, or only known or only open images, which make every
      criterion degenerate.

  Examples:
    >>> score = np.array([0.9, 0.6, 0.3])
    >>> best_threshold(np.array([0, 0, -1]), np.array([0, 0, 0]), score)
    0.6
  """
  criterion = lookup(CRITERIA, 'criterion', by)
  known = label >= 0
  if known.all() or not known.any():
    raise UserError(f'a threshold by {by!r} needs both known and open images')
  threshold, *accepted = _accepted(label, prediction, known_score)
  values = criterion(*accepted)
  return float(threshold[np.flatnonzero(values == values.max())[-1]])


def _accepted(
  label: np.ndarray, prediction: np.ndarray, known_score: np.ndarray
) -> tuple[np.ndarray, ...]:
  """Counts the images accepted at each distinct threshold.

  Returns:
    (thresholds, descending; known images classified right; known; open), (T,) each.
  """
  known = label >= 0
  descending = np.argsort(-known_score)
  score = known_score[descending]
  last_of_tie = np.append(score[1:] != score[:-1], True)
  counts = (
    np.cumsum(mask[descending])[last_of_tie]
    for mask in (known & (prediction == label), known, ~known)
  )
  return score[last_of_tie], *counts


def curve(
  label: np.ndarray,
  prediction: np.ndarray,
  known_score: np.ndarray,
  *,
  points: int = 1000,
) -> dict[str, np.ndarray]:
  """Returns metrics of a test set with open images as functions of the threshold.

  Args:
    label: (N,) int, -1 for open images.
    prediction: (N,) int, before rejection.
    known_score: (N,).
    points: the largest number of thresholds.

  Returns:
    (T,) arrays, T <= `points`: 'threshold', descending; 'f_measure_oltr2019' and
    'f_measure_oltr2020'; 'known_accuracy', on known images after rejection; and
    'open_accuracy', the share of open images rejected.

  Examples:
    >>> score = np.array([0.9, 0.6, 0.3])
    >>> found = curve(np.array([0, 0, -1]), np.array([0, 0, 0]), score)
    >>> found['known_accuracy'].tolist(), found['open_accuracy'].tolist()
    ([0.5, 1.0, 1.0], [1.0, 1.0, 0.0])
  """
  threshold, right, known, others = _accepted(label, prediction, known_score)
  found = {
    'threshold': threshold,
    'f_measure_oltr2019': 2 * right / (right + known + others),
    'f_measure_oltr2020': CRITERIA['f_measure'](right, known, others),
    'known_accuracy': right / known[-1],
    'open_accuracy': 1 - others / others[-1],
  }
  last = len(threshold) - 1
  shown = np.unique(np.linspace(0, last, min(points, last + 1)).round().astype(int))
  return {name: values[shown] for name, values in found.items()}


def open_set(
  label: np.ndarray,
  prediction: np.ndarray,
  known_score: np.ndarray,
  threshold: float | None,
  *,
  num_classes: int,
  groups: dict[str, np.ndarray],
  fixed: float | None = FIXED_THRESHOLD,
) -> dict[str, Any]:
  """Returns every open-set metric of a test set with open images.

  Args:
    label: (N,) int, -1 for open images.
    prediction: (N,) int, before rejection.
    known_score: (N,).
    threshold: chosen on validation data; None if there are none.
    num_classes: C.
    groups: name -> (C,) bool, for the accuracies on known images after rejection.
    fixed: another threshold, from a published protocol; None for none.

  Returns:
    'auroc', 'aupr', 'fpr_at_95_tpr' and 'open_auc'; with a threshold
    'f_measure_oltr2019', 'f_measure_oltr2020', 'open_accuracy' (open images rejected),
    accuracies on the known images as 'known_accuracy' and 'known_<group>', and
    'threshold'; with a fixed one, all but the last again, with '_at_0.1' appended if
    that is 0.1.

  Examples:
    >>> label, prediction = np.array([0, 0, -1]), np.array([0, 0, 0])
    >>> score = np.array([0.9, 0.6, 0.3])
    >>> found = open_set(label, prediction, score, 0.5, num_classes=1, groups={})
    >>> found['known_accuracy'], found['open_accuracy'], found['open_accuracy_at_0.1']
    (1.0, 1.0, 0.0)
  """
  known = label >= 0
  found = ranking(known_score[known], known_score[~known])
  found['open_auc'] = open_auc(
    (prediction == label)[known], known_score[known], known_score[~known]
  )
  for suffix, at in (('', threshold), (f'_at_{fixed}', fixed)):
    if at is None:
      continue
    for definition in ('oltr2019', 'oltr2020'):
      found[f'f_measure_{definition}{suffix}'] = f_measure(
        label, prediction, known_score, at, definition=definition
      )
    kept = known_score >= at
    after = closed_set(
      label[known],
      np.where(kept, prediction, -1)[known],
      num_classes=num_classes,
      groups=groups,
    )
    found[f'open_accuracy{suffix}'] = float((~kept[~known]).mean())
    for name in ('accuracy', *groups):
      found[f'known_{name}{suffix}'] = after[name]
  return found if threshold is None else found | {'threshold': threshold}


def by_rule(
  label: np.ndarray,
  prediction: np.ndarray,
  is_unknown: np.ndarray,
  *,
  num_classes: int,
  groups: dict[str, np.ndarray],
) -> dict[str, Any]:
  """Returns the metrics of a test set under the method's own rule for rejection.

  Args:
    label: (N,) int, -1 for open images.
    prediction: (N,) int, before rejection.
    is_unknown: (N,) bool, the rejected images.
    num_classes: C.
    groups: name -> (C,) bool.

  Returns:
    as `open_set` at a threshold, with '_own_rule' appended to each name.

  Examples:
    >>> label, prediction = np.array([0, 0, -1]), np.array([0, 0, 0])
    >>> is_unknown = np.array([False, True, True])
    >>> found = by_rule(label, prediction, is_unknown, num_classes=1, groups={})
    >>> found['known_accuracy_own_rule'], found['open_accuracy_own_rule']
    (0.5, 1.0)
  """
  found = open_set(
    label,
    prediction,
    np.where(is_unknown, 0.0, 1.0),
    0.5,
    num_classes=num_classes,
    groups=groups,
    fixed=None,
  )
  rule = ('f_measure_', 'open_accuracy', 'known_')
  return {f'{name}_own_rule': x for name, x in found.items() if name.startswith(rule)}
