"""Plots the effective number and what random regions cover, side by side.

  python -m benchmarks.effective_number [--out=docs/effective_number.svg]

A class is a circle of length N, an image an arc of length 1 that begins anywhere. The
probability that n arcs miss a point is (1 - 1/N)^n, so the expected length they cover
is N (1 - (1 - 1/N)^n), the effective number of n images.
"""

import argparse
import pathlib

import numpy as np

from lt_jax.class_weights import effective_number
from lt_jax.report import drawing
from lt_jax.report.page import STANDALONE

PROTOTYPES = (10, 100, 1000, 10000)
MOST = 10000
TRIALS = 20


def union(begins, length):
  """Returns the length of a circle that arcs of length 1 cover.

  Args:
    begins: (..., n) where the arcs begin, in [0, length).
    length: of the circle.

  Returns:
    (...).
  """
  ascending = np.sort(begins, axis=-1)
  first = ascending[..., :1] + length  # comes after the last arc
  gaps = np.diff(np.concatenate([ascending, first], axis=-1), axis=-1)
  return np.minimum(gaps, 1).sum(axis=-1)


def simulated(examples, prototypes, trials, rng):
  """Returns (trials,) the length that random arcs of length 1 cover."""
  return union(rng.uniform(0, prototypes, (trials, examples)), prototypes)


def covering(rng):
  """Plots the formula as lines, and simulations as points with error bars."""
  figure, axes = drawing.plot(size=(5.6, 3.4))
  counts = np.unique(np.geomspace(1, MOST, 200).round())
  places = np.unique(np.geomspace(1, MOST, 13).round().astype(int))
  for prototypes, colour in zip(PROTOTYPES, drawing.CYCLE, strict=False):
    beta = 1 - 1 / prototypes
    expected = effective_number(counts, prototypes=prototypes)
    axes.plot(counts, expected, color=colour, label=f'N = {prototypes}, β = {beta:g}')
    found = [simulated(n, prototypes, TRIALS, rng) for n in places]
    means, spreads = np.mean(found, axis=1), np.std(found, axis=1, ddof=1)
    axes.errorbar(places, means, spreads, fmt='o', color=colour, markersize=3.5)
  axes.plot(counts, counts, ':', color=drawing.INK, label='n', linewidth=0.8)
  axes.set(xscale='log', yscale='log', xlabel='images n', ylabel='effective number')
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_formatter('{x:g}')
  axes.legend()
  return figure, (
    'The effective number of images (lines), and what as many random regions cover in '
    f'a simulation (points: mean and standard deviation of {TRIALS} draws).'
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--out', type=pathlib.Path, default='docs/effective_number.svg')
  options = parser.parse_args()
  rng = np.random.default_rng(0)
  drawn = drawing.draw('effective_number', covering, rng, 'docs')
  options.out.write_text(drawn.svg.replace('>', f'>{STANDALONE}', 1))
  print(f'{options.out}: {drawn.caption}')


if __name__ == '__main__':
  main()
