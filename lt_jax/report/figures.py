"""Figures of a report, each drawn from the files of one run or of several seeds.

A figure is a function of runs that returns a Matplotlib figure and its caption, or
raises `NoData`; see `lt_jax.report.drawing`.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from lt_jax.data.longtail import shot_bounds
from lt_jax.evals.calibration import BINS, calibration
from lt_jax.report.across import compare_gains, compare_training
from lt_jax.report.curves import curve, stages_of
from lt_jax.report.drawing import (
  COLOURS,
  CYCLE,
  INK,
  MARKER,
  Drawn,
  finished,
  finite_mean,
  legend,
  line,
  log_counts,
  matrix,
  mean_and_deviation,
  over_seeds,
  plot,
  seeds,
  shortened,
  thinned,
)
from lt_jax.report.learned import epsilons
from lt_jax.report.runs import Group, NoData, NotApplicable, Run

MOST_CLASSES = 50
"""Up to this many classes, each has its own row in a matrix."""

MOST_NAMED = 20
MOST_POINTS = 1000
MOST_COLOURS = 10
"""Up to this many classes, each has its own colour in a map of features."""

FEWEST_NEIGHBOURS = 30


def _class_accuracy(runs: Sequence[Run]) -> np.ndarray:
  """Returns (R, C) test accuracies, or IoU, in %, NaN for a class without one."""
  return 100 * np.array([run.test(run.task.by_class) for run in runs], np.float64)


def _capital(text: str) -> str:
  return text[:1].upper() + text[1:]


def class_accuracy(runs: Sequence[Run]) -> Drawn:
  """Draws the accuracy of each class against its training images."""
  runs = finished(runs)
  counts, (mean, deviation) = runs[0].counts, mean_and_deviation(_class_accuracy(runs))
  figure, axes = plot()
  order = np.argsort(-counts, kind='stable')
  named = len(counts) <= MOST_NAMED
  place = np.empty(len(counts))
  place[order] = np.arange(len(counts)) if named else counts[order]
  drawn = np.isin(np.arange(len(counts)), thinned(order, MOST_POINTS))
  for name, of_group in runs[0].groups.items():
    mask = of_group & drawn
    if mask.any():
      axes.errorbar(
        place[mask],
        mean[mask],
        None if deviation is None else deviation[mask],
        fmt='o',
        color=COLOURS[name],
        markersize=5 if named else 3,
        elinewidth=0.8,
        capsize=2 if named else 0,
        alpha=1 if named else 0.7,
        label=f'{name}-shot',
      )
  if named:
    names = runs[0].class_names
    ticks = [f'{shortened(names[c])}\n{counts[c]}' for c in order]
    turned = max(len(names[c]) for c in order) * len(order) > 90
    axes.set_xticks(np.arange(len(order)), ticks, rotation=45 if turned else 0)
    axes.set_xlabel(f'class, with its training {runs[0].counted}')
  else:
    width = max(3, len(order) // 10)
    kernel = np.ones(width) / width
    known = order[np.isfinite(mean[order])]
    axes.plot(
      np.exp(np.convolve(np.log(np.maximum(counts[known], 1)), kernel, 'valid')),
      np.convolve(mean[known], kernel, 'valid'),
      color=INK,
      label=f'mean of {width} neighbours',
    )
    log_counts(axes)
  measure = runs[0].measure
  axes.set(ylabel=f'test {measure} (%)', ylim=(-3, 103))
  legend(figure, axes)
  caption = f'{_capital(measure)} of each class against its frequency.'
  return figure, caption + seeds(runs)


def shot_groups(runs: Sequence[Run]) -> Drawn:
  """Draws the accuracy of many-, medium- and few-shot classes, and of all."""
  runs = finished(runs)
  if not runs[0].shown_groups:
    raise NotApplicable('all classes are in one shot group')
  masks = runs[0].groups | {'all': np.ones(len(runs[0].counts), bool)}
  test = [run.result['test'] | {'all': run.test(run.headline)} for run in runs]
  there = [name for name in masks if all(t.get(name) is not None for t in test)]
  mean, deviation = mean_and_deviation(
    [[100 * t[name] for name in there] for t in test]
  )
  figure, axes = plot(size=(5.6, 3))
  place, colours = np.arange(len(there)), [COLOURS[name] for name in there]
  axes.bar(place, mean, 0.6, yerr=deviation, color=colours, ecolor=INK, capsize=3)
  for x, value in zip(place, mean, strict=True):
    axes.text(x, 2, f'{value:.1f}', ha='center', color=INK)
  ticks = [
    f'{n if n == "all" else n + "-shot"}\n{masks[n].sum()} classes' for n in there
  ]
  axes.set_xticks(place, ticks)
  measure = runs[0].measure
  axes.set(ylabel=f'test {measure} (%)', ylim=(0, 103))
  axes.grid(visible=False, axis='x')
  data = runs[0].config['data']
  bounds = shot_bounds(runs[0].counts, data['many_shot'], data['few_shot'])
  return figure, (
    f'{_capital(measure)} by shot group: many-shot classes have more than '
    f'{bounds["many"]:g} training {runs[0].counted}, few-shot classes fewer than '
    f'{bounds["few"]:g}.{seeds(runs)}'
  )


def confusion(runs: Sequence[Run]) -> Drawn:
  """Draws which classes the images, or pixels, of each class or block are taken for."""
  runs = finished(runs)
  counts = runs[0].counts
  classes = len(counts)
  blocks = classes if classes <= MOST_CLASSES else MOST_NAMED
  order = np.argsort(-counts, kind='stable')
  block = np.empty(classes, int)
  block[order] = np.arange(classes) * blocks // classes
  cells = np.zeros((blocks, blocks))
  for run in runs:
    if run.task.per_pixel:
      whole = run.arrays('predictions.npz')['confusion'].sum(0, dtype=np.int64)
      np.add.at(cells, (block[:, None], block[None]), whole)
    else:
      label, prediction, _ = run.predicted
      np.add.at(cells, (block[label], block[prediction]), 1)
  share = 100 * cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)
  figure, axes = plot(size=(5.6, 4.6))
  matrix(axes, share, numbers=blocks <= 12)
  if blocks == classes:
    names = [shortened(runs[0].class_names[c]) for c in order]
    size = 9 if blocks <= MOST_NAMED else 5
    what = 'classes'
  else:
    ends = np.flatnonzero(np.diff(block[order], append=blocks))
    starts = np.append(0, ends[:-1] + 1)
    ranges = zip(counts[order][starts], counts[order][ends], strict=True)
    names, size = [f'{a} to {b}' for a, b in ranges], 7
    what = (
      f'{blocks} blocks of classes of similar frequency, named by their training images'
    )
  axes.set_xticks(np.arange(blocks), names, rotation=90, fontsize=size)
  axes.set_yticks(np.arange(blocks), names, fontsize=size)
  axes.set(xlabel='predicted', ylabel='true')
  pooled = f', {len(runs)} seeds pooled' if len(runs) > 1 else ''
  return figure, (
    f'Confusion of {what}, the most frequent first: share of the true row in %{pooled}.'
  )


def reliability(runs: Sequence[Run]) -> Drawn:
  """Draws accuracy against confidence, and the distribution of confidence."""
  runs = finished(runs)
  bins = _reliability_bins(runs)
  figure, (upper, lower) = plot(2, size=(5.6, 4.6), sharex=True, height_ratios=(3, 1))
  centres = (np.arange(BINS) + 0.5) * 100 / BINS
  upper.plot((0, 100), (0, 100), '--', color=INK, linewidth=0.8, label='calibrated')
  upper.bar(
    centres,
    100 * np.nan_to_num(bins['bin_accuracy']),
    92 / BINS,
    color=COLOURS['many'],
    alpha=0.8,
    label='accuracy of a bin',
  )
  upper.set(ylabel='test accuracy (%)', xlim=(0, 100), ylim=(0, 103))
  upper.legend(loc='upper left')
  share = 100 * bins['bin_count'] / max(bins['bin_count'].sum(), 1)
  lower.bar(centres, share, 92 / BINS, color=COLOURS['all'])
  lower.set(xlabel='confidence (%)', ylabel=f'{runs[0].counted} (%)')
  mean, deviation = mean_and_deviation([100 * run.test('ece') for run in runs])
  spread = '' if deviation is None else f' ± {deviation:.1f}'
  pooled = f' {len(runs)} seeds pooled.' if len(runs) > 1 else ''
  return figure, (
    f'Reliability: the expected calibration error is {mean:.1f}{spread} % '
    f'({BINS} bins).{pooled}'
  )


def _reliability_bins(runs: Sequence[Run]) -> dict[str, np.ndarray]:
  """Returns 'bin_count' and 'bin_accuracy' over the test images of all runs."""
  if runs[0].task.per_pixel:
    stored = [run.arrays('predictions.npz') for run in runs]
    pixels, right = (
      sum(one[name].sum(0, dtype=np.float64) for one in stored)
      for name in ('pixels', 'right')
    )
    accuracy = np.divide(right, pixels, out=np.zeros_like(right), where=pixels > 0)
    return {'bin_count': pixels, 'bin_accuracy': accuracy}
  label, prediction, confidence = (
    np.concatenate(parts)
    for parts in zip(*(run.predicted for run in runs), strict=True)
  )
  return calibration(np.clip(confidence, 1e-9, 1), prediction == label)


SCORES = {'known_score': 'the method’s score', 'energy': 'energy of the logits'}


def open_set(runs: Sequence[Run]) -> Drawn:
  """Draws the shares of known and open images accepted, as the threshold falls."""
  runs = finished(runs)
  figure, (rates, f_measures) = plot(1, 2, size=(9, 3.2))
  for run in runs:
    curves, first = run.arrays('open_set.npz'), run is runs[0]
    for score, colour in zip(SCORES, CYCLE, strict=False):
      if f'{score}/threshold' in curves:
        accepted = 100 * (1 - curves[f'{score}/open_accuracy'])
        rates.plot(
          accepted,
          100 * curves[f'{score}/known_accuracy'],
          color=colour,
          alpha=1 if first else 0.4,
          label=SCORES[score] if first else None,
        )
    threshold = curves['known_score/threshold']
    for definition, colour in zip(('oltr2020', 'oltr2019'), CYCLE, strict=False):
      f_measures.plot(
        threshold,
        100 * curves[f'known_score/f_measure_{definition}'],
        color=colour,
        alpha=1 if first else 0.4,
        label=f'F ({definition})' if first else None,
      )
  chosen = (runs[0].result.get('threshold') or {}).get('value')
  if chosen is not None:
    label = 'chosen threshold' if len(runs) == 1 else f'chosen, seed {runs[0].seed}'
    f_measures.axvline(chosen, color=INK, linestyle='--', linewidth=0.8, label=label)
  rates.set(
    xlabel='open images accepted (%)',
    ylabel='known images accepted\nand correctly classified (%)',
    xlim=(0, 100),
    ylim=(0, 103),
  )
  f_measures.set(
    xlabel='threshold of the method’s score', ylabel='F-measure (%)', ylim=(0, 103)
  )
  for axes in (rates, f_measures):
    axes.legend(loc='best')
  mean, _ = mean_and_deviation([100 * run.test('auroc') for run in runs])
  return (
    figure,
    f'The open set at every threshold; AUROC {mean:.1f} %.{each_seed(runs)}',
  )


SPLITS = {'train': '#8a8a8a', 'val': CYCLE[0], 'test': CYCLE[1]}


def training(runs: Sequence[Run]) -> Drawn:
  """Draws loss, accuracy and learning rate over all stages."""
  if not any(run.rows for run in runs):
    kind = NoData if any(run.result for run in runs) else NotApplicable
    raise kind('metrics.jsonl is missing, or empty')
  figure, panels = plot(3, size=(5.6, 4.6), sharex=True, height_ratios=(2, 2, 1))
  loss, accuracy, rate = panels
  labelled: set[str] = set()
  for run in runs:
    for split, colour in SPLITS.items():
      style = {'color': colour, 'alpha': 1 if run is runs[0] else 0.4}
      if split not in labelled and any(row.get('split') == split for row in run.rows):
        style['label'] = split
        labelled.add(split)
      if split != 'train':
        style |= MARKER
      line(loss, *curve(run, split, 'loss'), **style)
      line(accuracy, *curve(run, split, run.logged(split), 100), **style)
    line(rate, *curve(run, 'train', 'learning_rate'), color=SPLITS['train'])
  stages = mark_stages(panels, runs[0])
  loss.set_ylabel('loss (nats)')
  legend(figure, loss)
  accuracy.set(ylabel=_logged(runs[0]), ylim=(0, 103))
  rate.set(ylabel='learning rate', xlabel='step')
  return figure, (
    'Training. On training images the loss is the one that is minimised, with weights '
    f'and margins; on others it is the cross-entropy.{stages}{each_seed(runs)}'
  )


def _logged(run: Run) -> str:
  """Returns the label of an axis for the metrics in the log."""
  title = run.task.metrics[run.headline].title
  return f'accuracy, {title} (%)' if title != 'accuracy' else 'accuracy (%)'


def mark_stages(panels: Sequence[Axes], run: Run) -> str:
  """Draws where stages begin; returns the sentence of the caption about it."""
  stages = stages_of(run)
  for axes, (begin, _) in itertools.product(panels, list(stages.values())[1:]):
    axes.axvline(begin, color=INK, linewidth=0.7, linestyle='--')
  caption = f' Stages, between dashed lines: {", ".join(stages)}.'
  return caption if len(stages) > 1 else ''


def each_seed(runs: Sequence[Run]) -> str:
  """Returns the sentence of a caption if each of several seeds has a line."""
  return (
    ''
    if len(runs) == 1
    else f' One line per seed; the strong one is seed {runs[0].seed}.'
  )


def weights(runs: Sequence[Run]) -> Drawn:
  """Draws the weights that a method learned, by class, over training."""
  run = runs[0]
  stored = run.arrays('weights.npz')
  counts, step, prior, mean, spread = (
    stored[name] for name in ('counts', 'step', 'prior', 'mean', 'spread')
  )
  order = np.argsort(-counts, kind='stable')
  figure, (over_time, at_end) = plot(1, 2, size=(9, 3.4))
  lines = thinned(order, MOST_CLASSES)
  for c, alpha in zip(lines, np.linspace(0.25, 1, len(lines)), strict=True):
    style = {'color': COLOURS['few'], 'linewidth': 1, 'alpha': alpha}
    line(over_time, step, mean[:, c], **style)
  over_time.set(xlabel='step', ylabel='mean weight per class')
  over_time.set_title('strong: rare classes; faint: frequent ones')
  # Over the last fifth of training, as one log row has few images of a rare class.
  tail = slice(-max(1, len(step) // 5), None)
  last, width, before = (finite_mean(x[tail][:, order]) for x in (mean, spread, prior))
  at_end.errorbar(
    counts[order], last, width, fmt='o', markersize=4, capsize=2, label='learned'
  )
  at_end.plot(
    counts[order], before, color=INK, linewidth=1, alpha=0.6, label='class-balanced'
  )
  log_counts(at_end)
  at_end.set_ylabel('weight')
  at_end.set_title('last fifth of training: mean, deviation')
  at_end.legend()
  seed = '' if len(runs) == 1 else f' Seed {run.seed}.'
  return figure, f'Learned weights of examples by class over training.{seed}'


def features(runs: Sequence[Run]) -> Drawn:
  """Draws test features in a plane, with the class centroids."""
  run = runs[0]
  stored = run.arrays('features.npz')
  number = stored.get('domain', np.zeros(len(stored['label']), int))
  tested = max(
    1, len(run.config.get('target', ()))
  )  # the headline's domains come first
  points, rows = drawable(stored, number < tested)
  label = stored['label'][rows]
  centroids = stored['centroids'].astype(np.float32)
  shown = np.flatnonzero(np.isfinite(centroids).all(axis=1))[:MOST_CLASSES]
  if centroids.shape[1:] != points.shape[1:] or len(centroids) > MOST_CLASSES:
    shown = shown[:0]
  plane, name = plane_of(np.concatenate([points, centroids[shown]]))
  figure, axes = plot(size=(5.6, 4.6))
  scatter(axes, plane[: len(points)], class_sets(run, label), name)
  for c, (x, y) in zip(shown, plane[len(points) :], strict=True):
    axes.plot(x, y, 'P', color=INK, markersize=7, markeredgecolor='#8a8a8a')
    axes.annotate(
      shortened(run.class_names[c]), (x, y), (4, 4), textcoords='offset points'
    )
  crosses = ', and class centroids (crosses)' if len(shown) else ''
  return figure, (
    f'{name} map of {len(points)} test features{crosses}.{about_map(run, name)}'
  )


Sets = dict[str, tuple[np.ndarray, Any]]
"""Title -> ((N,) bool that says which points belong to it, their colour)."""


def drawable(
  stored: Mapping[str, np.ndarray], wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the wanted features, at most `MOST_POINTS`, and their rows.

  Args:
    stored: the arrays of features.npz.
    wanted: (N,) bool.

  Returns:
    (M, D) finite features, and (M,) row numbers.

  Raises:
    NoData: too few of them differ.
  """
  points = stored['features'].astype(np.float32)
  keep = np.flatnonzero(np.isfinite(points).all(axis=1) & wanted)
  keep = thinned(keep, MOST_POINTS) if len(keep) else keep
  points = points[keep]
  if len(points) < 3 or not np.ptp(points, axis=0).any():
    raise NoData('features.npz has too few features that differ')
  return points, keep


def about_map(run: Run, name: str) -> str:
  """Returns the sentences of a caption about a map of features, by its name."""
  named = len(run.counts) <= MOST_COLOURS
  brackets = ' Numbers in brackets are training images per class.' * named
  return brackets + ' Distances between far groups mean little.' * (name == 't-SNE')


def class_sets(run: Run, label: np.ndarray) -> Sets:
  """Returns points by class, or by shot group if there are many classes."""
  counts = run.counts
  if len(counts) > MOST_COLOURS:
    return {f'{g}-shot': (m[label], COLOURS[g]) for g, m in run.groups.items()}
  order = np.argsort(-counts, kind='stable')
  colours = matplotlib.colormaps['turbo'](np.linspace(0.08, 0.92, len(order)))
  return {
    f'{shortened(run.class_names[c])} ({counts[c]})': (label == c, colour)
    for c, colour in zip(order, colours, strict=True)
  }


def scatter(axes: Axes, plane: np.ndarray, sets: Sets, name: str) -> None:
  """Draws points in the colours of their sets, with a legend."""
  for title, (mask, colour) in sets.items():
    axes.scatter(*plane[mask].T, s=9, color=colour, alpha=0.75, label=title)
  axes.set(xlabel=f'{name} 1 (no unit)', ylabel=f'{name} 2 (no unit)')
  axes.set(xticks=[], yticks=[])
  axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), handletextpad=0.2)


def plane_of(points: np.ndarray) -> tuple[np.ndarray, str]:
  """Returns (N, 2) points mapped to a plane, and the name of the map."""
  from sklearn.decomposition import PCA
  from sklearn.manifold import TSNE
  from threadpoolctl import threadpool_limits

  few = min(50, *points.shape)
  points = PCA(few, random_state=0).fit_transform(points)
  if len(points) < FEWEST_NEIGHBOURS:
    return points[:, :2], 'PCA'
  mapped = TSNE(perplexity=min(30, len(points) / 4), max_iter=500, random_state=0)
  with threadpool_limits(1):  # more threads are slower: they wait for each other
    return mapped.fit_transform(points), 't-SNE'


FIGURES: dict[str, Callable[[Sequence[Run]], Drawn]] = {
  'class_accuracy': class_accuracy,
  'shot_groups': shot_groups,
  'confusion': confusion,
  'reliability': reliability,
  'open_set': open_set,
  'training': training,
  'weights': weights,
  'epsilons': epsilons,
}
"""name -> figure of one or more seeds."""

OF_ONE_RUN = {'features': features}
"""Figures that take seconds."""


def compare_shot_groups(groups: Sequence[Group]) -> Drawn:
  """Draws many-, medium- and few-shot accuracy, one row per method."""
  groups = [group for group in groups if group.counted]
  figure, axes = plot(size=(5.6, 0.9 + 0.26 * len(groups)))
  place = np.arange(len(groups))
  grouped = any(group.counted[0].shown_groups for group in groups)
  for name in ('many', 'medium', 'few', 'all') if grouped else ('all',):
    found = [
      [r.result['test'].get(r.headline if name == 'all' else name) for r in g.counted]
      for g in groups
    ]
    there = np.array([None not in values for values in found])
    if not there.any():
      continue
    pairs = [
      mean_and_deviation(100 * np.array(v))
      for v, t in zip(found, there, strict=True)
      if t
    ]
    axes.errorbar(
      [mean for mean, _ in pairs],
      place[there],
      xerr=[0 if deviation is None else deviation for _, deviation in pairs],
      fmt='o',
      color=COLOURS[name],
      markersize=5,
      elinewidth=1,
      label=name if name == 'all' else f'{name}-shot',
    )
  axes.set_yticks(place, [short_label(group.label) for group in groups])
  measure = groups[0].counted[0].measure
  axes.set(xlabel=f'test {measure} (%)', ylim=(len(groups) - 0.5, -0.5))
  legend(figure, axes)
  by = ' by shot group' if grouped else ''
  return figure, f'Test {measure}{by}{over_seeds(groups)}.'


def short_label(label: str) -> str:
  """Returns a label that fits beside an axis; its end tells it from others."""
  return label if len(label) <= 40 else f'{label[:15]}…{label[-24:]}'


def compare_classes(groups: Sequence[Group]) -> Drawn:
  """Draws the accuracy of each class, or block of classes, under each method."""
  groups = [group for group in groups if group.counted]
  names = groups[0].counted[0].class_names
  if any(group.counted[0].class_names != names for group in groups):
    raise NotApplicable('the runs do not have the same classes')
  counts = np.stack([group.counted[0].counts for group in groups])
  same = bool((counts == counts[0]).all())
  rows = np.stack([_class_accuracy(g.counted).mean(axis=0) for g in groups])
  order = np.argsort(-counts.sum(axis=0), kind='stable')
  parts = np.array_split(order, min(len(order), MOST_NAMED))
  shown = np.stack([finite_mean(rows[:, part].T) for part in parts], axis=1)
  figure, axes = plot(size=(9, 1.5 + 0.26 * len(groups)))
  matrix(axes, shown, numbers=True)
  if len(parts) == len(order):
    ticks = [shortened(names[c]) + f'\n{counts[0, c]}' * same for c in order]
    counted = groups[0].counted[0].counted
    axes.set_xlabel('class' + f', with its training {counted}' * same)
  else:
    numbers = counts[0, order] if same else np.arange(1, len(order) + 1)
    ticks = [f'{part[0]} to {part[-1]}' for part in np.array_split(numbers, len(parts))]
    unit = 'training images' if same else 'rank'
    axes.set_xlabel(f'classes of similar frequency, by their {unit}')
  turned = max(map(len, ticks)) * len(ticks) > 100
  axes.set_xticks(np.arange(len(ticks)), ticks, rotation=90 if turned else 0)
  axes.set_yticks(np.arange(len(groups)), [short_label(g.label) for g in groups])
  measure = groups[0].counted[0].measure
  caption = f'Test {measure} of each class in %, the most frequent first.'
  if not same:
    caption += (
      ' The methods have different numbers of training images per class, so these are '
      'not shown; classes are ordered by their sums.'
    )
  return figure, caption


COMPARISONS: dict[str, Callable[[Sequence[Group]], Drawn]] = {
  'compare_shot_groups': compare_shot_groups,
  'compare_classes': compare_classes,
  'compare_gains': compare_gains,
  'compare_training': compare_training,
}
"""name -> figure that compares groups."""
