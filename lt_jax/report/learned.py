"""Figures of the example weights that a method learned, from the files of a run."""

from collections.abc import Sequence

import numpy as np

from lt_jax.report.drawing import COLOURS, INK, Drawn, finite_mean, log_counts, plot
from lt_jax.report.runs import NoData, Run


def epsilons(runs: Sequence[Run]) -> Drawn:
  """Draws epsilon, which is added to the class-balanced weight, and that weight.

  Epsilon may be a millionth of the weight, too small to be seen in their sum.
  """
  run = runs[0]
  stored = run.arrays('weights.npz')
  if 'learned' not in stored:
    raise NoData('weights.npz was written by an earlier version, without epsilon')
  counts, step = stored['counts'], stored['step']
  order = np.argsort(-counts, kind='stable')
  tail = slice(-max(1, len(step) // 5), None)
  learned, spread, prior = (
    finite_mean(stored[name][tail][:, order]) for name in ('learned', 'spread', 'prior')
  )
  figure, (left, right) = plot(1, 2, size=(9, 3.2))
  left.axhline(0, color=INK, linewidth=0.8)
  left.errorbar(
    counts[order], learned, spread, fmt='o', color=COLOURS['few'], markersize=4
  )
  left.ticklabel_format(axis='y', style='sci', scilimits=(-2, 3), useMathText=False)
  right.plot(counts[order], prior, 'o', color=COLOURS['many'], markersize=4)
  for axes, name in ((left, 'epsilon'), (right, 'class-balanced weight w')):
    log_counts(axes)
    axes.set_ylabel(name)
  left.set_title('mean and deviation over the images of a class')
  scale = np.nanmean(np.abs(learned)) / np.nanmean(np.abs(prior))
  seed = '' if len(runs) == 1 else f' Seed {run.seed}.'
  return figure, (
    'Epsilon, which is added to the class-balanced weight (left), and that weight, '
    f'over the last fifth of training: epsilon is {scale:.1e} of the weight.{seed}'
  )
