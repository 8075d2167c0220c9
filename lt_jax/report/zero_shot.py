"""Figures of zero-shot runs, from their zero_shot.npz; see `lt_jax.report.drawing`."""

from collections.abc import Callable, Sequence

import numpy as np

from lt_jax.data.attributes import unit_rows
from lt_jax.report.drawing import (
  COLOURS,
  CYCLE,
  INK,
  Drawn,
  finished,
  mean_and_deviation,
  plot,
  seeds,
  shortened,
)
from lt_jax.report.figures import drawable, each_seed, plane_of, scatter
from lt_jax.report.runs import NotApplicable, Run

FILE = 'zero_shot.npz'
MOST_ATTRIBUTES = 40
MOST_PAIRS = 12


def has_views(run: Run) -> bool:
  """Returns whether a run has seen and unseen classes."""
  return (run.folder / FILE).exists()


def seen_unseen(runs: Sequence[Run]) -> Drawn:
  """Draws S over U for every gamma, with the chosen point and gamma 0."""
  runs = finished(runs)
  figure, axes = plot(size=(5.6, 3.6))
  for run in runs:
    stored, first = run.arrays(FILE), run is runs[0]
    if 'gamma' not in stored:
      raise NotApplicable(
        'the test set has no images of seen classes, so there is no curve'
      )
    axes.step(
      100 * stored['unseen'],
      100 * stored['seen'],
      where='post',
      color=CYCLE[0],
      alpha=1 if first else 0.4,
    )
    for name, marker, told in (
      ('plain', 'o', 'gamma 0'),
      ('chosen', 'D', 'gamma chosen by validation classes'),
    ):
      seen, unseen = 100 * stored[name]
      label = told if first else None
      axes.plot(unseen, seen, marker, color=CYCLE[1], label=label, linestyle='none')
  for h in (20, 40, 60, 80):  # where the harmonic mean is the same
    unseen = np.linspace(h / 2 + 0.1, 100, 200)
    axes.plot(unseen, h * unseen / (2 * unseen - h), ':', color=INK, linewidth=0.6)
    axes.annotate(f'H {h}', (99, h * 99 / (198 - h)), fontsize=7, ha='right')
  axes.set(
    xlabel='accuracy of unseen classes U (%)',
    ylabel='accuracy of seen classes S (%)',
    xlim=(0, 100),
    ylim=(0, 103),
  )
  axes.legend(loc='upper right')
  area, _ = mean_and_deviation([100 * run.test('ausuc') for run in runs])
  return figure, (
    'What is won on unseen classes and lost on seen ones as gamma grows; the area '
    f'below is {area:.1f} %. Dotted: equal harmonic means.{each_seed(runs)}'
  )


def attributes(runs: Sequence[Run]) -> Drawn:
  """Draws how often each attribute is predicted right, the worst first."""
  runs = finished(runs)
  found = [run.result['test'].get('attribute_accuracies') for run in runs]
  if None in found:
    raise NotApplicable('the method predicts no attributes')
  mean, deviation = mean_and_deviation(100 * np.array(found, np.float64))
  order = np.argsort(mean, kind='stable')
  if len(order) > MOST_ATTRIBUTES:
    half = MOST_ATTRIBUTES // 2
    order = np.concatenate([order[:half], order[-half:]])
  names = runs[0].arrays(FILE)['columns']
  told = [shortened(str(names[m])) if len(names) else str(m) for m in order]
  figure, axes = plot(size=(max(5.6, 0.22 * len(order)), 3))
  spread = None if deviation is None else deviation[order]
  axes.bar(
    np.arange(len(order)), mean[order], 0.7, yerr=spread, color=COLOURS['many'],
    ecolor=INK,
  )  # fmt: skip
  axes.axhline(50, color=INK, linewidth=0.7, linestyle='--')
  axes.set_xticks(np.arange(len(order)), told, rotation=90, fontsize=7)
  axes.set(ylabel='test accuracy (%)', ylim=(0, 103))
  some = ', the best and the worst' if len(order) < len(mean) else ''
  return figure, f'Accuracy of single attributes{some}.{seeds(runs)}'


def described_errors(runs: Sequence[Run]) -> Drawn:
  """Draws the most frequent errors, and how alike the two descriptions are."""
  runs = finished(runs)
  run = runs[0]
  vectors = run.arrays(FILE).get('class_vectors')
  if vectors is None:
    raise NotApplicable('the run has no descriptions of classes')
  label, prediction, _ = run.predicted
  wrong = label != prediction
  pairs, counts = np.unique(
    np.stack([label[wrong], prediction[wrong]]), axis=1, return_counts=True
  )
  if not counts.size:
    raise NotApplicable('there is no error')
  of_class = np.bincount(label, minlength=len(vectors))
  share = 100 * counts / of_class[pairs[0]]
  worst = np.argsort(-share, kind='stable')[:MOST_PAIRS]
  unit = unit_rows(vectors)
  cosines = unit @ unit.T
  np.fill_diagonal(cosines, -np.inf)
  ranks = [1 + int((cosines[a] > cosines[a, b]).sum()) for a, b in pairs[:, worst].T]
  names = run.class_names
  told = [
    f'{shortened(names[a])} → {shortened(names[b])}' for a, b in pairs[:, worst].T
  ]
  figure, axes = plot(size=(5.6, 0.9 + 0.26 * len(worst)))
  place = np.arange(len(worst))
  axes.barh(place, share[worst], 0.7, color=COLOURS['few'])
  for y, rank in zip(place, ranks, strict=True):
    axes.text(1, y, f'{rank}', va='center', color=INK, fontsize=8)
  axes.set_yticks(place, told, fontsize=8)
  axes.set(xlabel='images of the true class (%)', ylim=(len(worst) - 0.5, -0.5))
  seed = '' if len(runs) == 1 else f' Seed {run.seed}.'
  return figure, (
    'The worst errors, true class → predicted one. The number in a bar is the place of '
    f'the predicted class among the descriptions nearest to the true one’s.{seed}'
  )


def described_features(runs: Sequence[Run]) -> Drawn:
  """Draws a plane map of test features, and where descriptions say classes are."""
  run = runs[0]
  stored, vectors = run.arrays('features.npz'), run.arrays(FILE).get('class_vectors')
  if vectors is None:
    raise NotApplicable('the run has no descriptions of classes')
  number = stored.get('domain', np.zeros(len(stored['label']), int))
  tested = max(1, len(run.config.get('target', ())))  # the headline's come first
  points, rows = drawable(stored, (number < tested) & (stored['label'] >= 0))
  label, names = stored['label'][rows], run.class_names
  seen = ~np.isin(names, run.data.get('unseen', []))
  places = placed_by_description(points, label, vectors, seen)
  plane, name = plane_of(np.concatenate([points, places]))
  others = np.flatnonzero(~seen)
  colours = [CYCLE[1 + i % (len(CYCLE) - 1)] for i in range(len(others))]
  sets = {'seen classes': (seen[label], CYCLE[0])}
  sets |= {
    shortened(names[c]): (label == c, colour)
    for c, colour in zip(others, colours, strict=True)
  }
  figure, axes = plot(size=(5.6, 4.6))
  scatter(axes, plane[: len(points)], sets, name)
  for c, (x, y) in enumerate(plane[len(points) :]):
    colour = CYCLE[0] if seen[c] else colours[others.tolist().index(c)]
    axes.plot(x, y, 'P', color=colour, markersize=6 if seen[c] else 10,
              markeredgecolor=INK)  # fmt: skip
    if not seen[c]:
      axes.annotate(shortened(names[c]), (x, y), (5, 5), textcoords='offset points')
  return figure, (
    f'{name} map of {len(points)} test features. Crosses: where a linear map from '
    'descriptions to features, fitted to the means of the seen classes, puts each '
    'class. An unseen class is recognised best where its cross is among its images.'
  )


def placed_by_description(
  points: np.ndarray,
  label: np.ndarray,
  vectors: np.ndarray,
  seen: np.ndarray,
  penalty: float = 0.1,
) -> np.ndarray:
  """Returns features (C, D) that descriptions stand for, by a ridge regression.

  Args:
    points: (N, D) features.
    label: (N,) int.
    vectors: (C, A) descriptions, compared as unit vectors.
    seen: (C,) bool, the classes whose means it is fitted to.
    penalty: of the regression, whose intercept is the mean of these means.
  """
  there = np.flatnonzero(seen & (np.bincount(label, minlength=len(seen)) > 0))
  if not len(there):
    raise NotApplicable('there are no images of seen classes')
  means = np.stack([points[label == c].mean(0, dtype=np.float64) for c in there])
  unit, centre = unit_rows(vectors), means.mean(0)
  known = unit[there]
  gram = known @ known.T + penalty * np.eye(len(there))
  return centre + unit @ known.T @ np.linalg.solve(gram, means - centre)


FIGURES: dict[str, Callable[[Sequence[Run]], Drawn]] = {
  'seen_unseen': seen_unseen,
  'attributes': attributes,
  'described_errors': described_errors,
}
"""name -> figure of seeds of one thing."""

OF_ONE_RUN: dict[str, Callable[[Sequence[Run]], Drawn]] = {
  'described_features': described_features,
}
"""Those that take seconds."""
