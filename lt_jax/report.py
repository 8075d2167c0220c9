"""Draws what a run has to show: python -m lt_jax.report --workdir=DIR.

weights.svg: the weights that a method has learned, against the images of their class.
"""

import numpy as np
from etils import epath

from lt_jax import commands, files
from lt_jax.errors import UserError

WORKDIR = commands.workdir_flag()


def main() -> None:
  """Draws the figures of the run that the flags name."""
  workdir = files.absolute(WORKDIR.value)
  draw_weights(workdir)
  print(f'{workdir / "weights.svg"}')


def draw_weights(workdir: epath.Path) -> None:
  """Draws weights.svg from weights.npz: weight against class frequency, and over time.

  Raises:
    UserError: the run has learned no weights, or has not ended.
  """
  path = workdir / 'weights.npz'
  if not path.exists():
    raise UserError(
      f'{workdir} has no weights.npz: it has not ended, or its method learns no weights'
    )
  import matplotlib

  matplotlib.use('svg')
  matplotlib.rcParams['svg.hashsalt'] = 'lt_jax'  # the same file from the same numbers
  import matplotlib.pyplot as plt

  with np.load(path, allow_pickle=False) as stored:
    counts, step, prior, mean, spread = (
      stored[name] for name in ('counts', 'step', 'prior', 'mean', 'spread')
    )
  order = np.argsort(-counts, kind='stable')
  figure, (over_time, at_end) = plt.subplots(
    ncols=2, figsize=(9, 3.4), layout='constrained'
  )
  figure.patch.set_facecolor('white')
  colours = matplotlib.colormaps['viridis'](np.linspace(0, 0.9, len(order)))
  for c, colour in zip(order, colours, strict=True):
    over_time.plot(step, mean[:, c], color=colour, linewidth=1)
  over_time.set(xlabel='step', ylabel='mean weight of a class')
  over_time.set_title('dark: frequent classes; light: rare', fontsize=9)

  # The last fifth of training: a single log row has few images of a rare class.
  tail = slice(-max(1, len(step) // 5), None)
  last, width, before = (_mean(x[tail][:, order]) for x in (mean, spread, prior))
  at_end.errorbar(
    counts[order], last, width, fmt='o', markersize=4, capsize=2, label='learned'
  )
  at_end.plot(counts[order], before, color='0.5', linewidth=1, label='class-balanced')
  at_end.set(xscale='log', xlabel='training images of the class', ylabel='weight')
  at_end.set_title('last fifth of training: mean, deviation', fontsize=9)
  at_end.legend(frameon=False)
  for axes in (over_time, at_end):
    axes.grid(linewidth=0.4)
    axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(workdir / 'weights.svg', metadata={'Date': None})
  plt.close(figure)


def _mean(values: np.ndarray) -> np.ndarray:
  """Returns the means of columns, without what is not a number."""
  there = np.isfinite(values)
  count = there.sum(axis=0)
  total = np.where(there, values, 0).sum(axis=0)
  return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


if __name__ == '__main__':
  commands.launch(main, 'workdir')
