"""Differences between each method and a reference, and which are within noise.

The reference is the control trained on the same data or, without one, the best method.
`lt_jax.report.noise` has the tests.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lt_jax.evals import titles
from lt_jax.report.drawing import OTHER_CONTENTS, finite_mean
from lt_jax.report.noise import LEVEL, RESAMPLES, Interval, paired_bootstrap, paired_t
from lt_jax.report.runs import CONTROLS, Group, NoData, Run, printable
from lt_jax.report.tables import Table

FEWEST_SEEDS = 3
"""With fewer, deviations say too little: two seeds may agree to the image by chance."""

PAIRED_T = 'paired t'

OVER_SEEDS = 'The interval is from a paired t-test over seeds: would other seeds agree?'
OVER_IMAGES = (
  'The interval is from a paired bootstrap over test images '
  f'({RESAMPLES:,} resamples): would these networks agree on other images?'
)
BOTH = (
  f'With {FEWEST_SEEDS} or more seeds in common, the interval is from a paired t-test '
  'over seeds: would other seeds agree? With fewer, it is from a paired bootstrap over '
  f'test images ({RESAMPLES:,} resamples): would these networks agree on other images?'
)


class Comparison(NamedTuple):
  """How a method differs from its reference.

  Attributes:
    group: the method.
    reference: the method that it is compared with.
    test: the name of the test, and over which seeds.
    intervals: metric -> its difference.
  """

  group: Group
  reference: Group
  test: str
  intervals: dict[str, Interval]


def compare(groups: Sequence[Group]) -> list[Comparison]:
  """Compares every finished method with the reference for the same data."""
  settings: dict[tuple, list[Group]] = {}
  for group in groups:
    if group.counted:
      settings.setdefault(group.counted[0].setting, []).append(group)
  found = []
  for members in settings.values():
    reference = _reference(members)
    found += [
      _compared(group, reference) for group in members if group is not reference
    ]
  return [comparison for comparison in found if comparison.intervals]


def _reference(groups: Sequence[Group]) -> Group:
  """Returns the control, or the best method if there is none or several."""
  controls = [group for group in groups if group.counted[0].recipe in CONTROLS]
  if len(controls) == 1:
    return controls[0]

  def merit(group: Group) -> float:
    better = group.counted[0].task.metrics[group.counted[0].headline].better
    return better * np.mean([run.result['test'][run.headline] for run in group.counted])

  return max(groups, key=merit)


def _compared(group: Group, reference: Group) -> Comparison:
  ours, theirs = ({run.seed: run for run in g.counted} for g in (group, reference))
  seeds = [seed for seed in ours if seed in theirs]
  which = f'{len(seeds)} seeds' if len(seeds) > 1 else f'seed {next(iter(seeds), "")}'
  if len(seeds) >= FEWEST_SEEDS:
    test, name = _over_seeds, f'{PAIRED_T}, {which}'
  else:
    test, name = _over_images, f'bootstrap, {which}'
  pairs = [(ours[seed], theirs[seed]) for seed in seeds]
  return Comparison(group, reference, name, test(pairs) if pairs else {})


Pairs = Sequence[tuple[Run, Run]]
"""For each seed, our run and theirs."""


def _over_seeds(pairs: Pairs) -> dict[str, Interval]:
  found = {}
  for name in (pairs[0][0].headline, *pairs[0][0].shown_groups):
    ours, theirs = _both(pairs, name)
    if None not in (*ours, *theirs):
      found[name] = paired_t(ours, theirs)
  return found


def _both(pairs: Pairs, name: str) -> list[list[float | None]]:
  """Returns a test metric for each seed, for both sides."""
  sides = zip(*pairs, strict=True)
  return [[run.result['test'].get(name) for run in side] for side in sides]


def _over_images(pairs: Pairs) -> dict[str, Interval]:
  """Compares means over seeds, for metrics that follow from the stored predictions.

  The headline over several targets, or over unseen classes, does not: it is left out.
  """
  try:
    intervals = (_of_pixels if pairs[0][0].task.per_pixel else _of_labels)(pairs)
  except (NoData, *OTHER_CONTENTS):
    return {}
  found = {}
  for name, interval in intervals.items():
    ours, theirs = _both(pairs, name)
    if None not in (*ours, *theirs):
      recorded = np.mean(ours) - np.mean(theirs)
      if np.isclose(interval.difference, recorded, atol=1e-5):
        found[name] = interval
  return found


def _of_labels(pairs: Pairs) -> dict[str, Interval]:
  """Returns differences in accuracy, over all images and by group of classes.

  Images of the same kind share their class, and the number of seeds under which each
  side gets them right.
  """
  label = pairs[0][0].predicted[0]
  if any((run.predicted[0] != label).any() for pair in pairs for run in pair):
    raise NoData('the runs were not tested on the same images')
  ours, theirs = (
    sum((run.predicted[1] == label).astype(int) for run in side)
    for side in zip(*pairs, strict=True)
  )
  kinds, images = np.unique([label, ours, theirs], axis=1, return_counts=True)
  classes, starts = np.unique(kinds[0], return_index=True)  # kinds are sorted by class
  gain = (kinds[1] - kinds[2]) / len(pairs)
  groups = pairs[0][0].shown_groups

  def differences(numbers: np.ndarray) -> np.ndarray:
    total = np.add.reduceat(numbers, starts, axis=1)
    gained = np.add.reduceat(numbers * gain, starts, axis=1)
    by_class = _ratio(gained, total)
    means = [finite_mean(by_class[:, mask[classes]].T) for mask in groups.values()]
    return np.stack([gained.sum(axis=1) / total.sum(axis=1), *means], axis=1)

  return dict(
    zip(('accuracy', *groups), paired_bootstrap(differences, images), strict=True)
  )


def _of_pixels(pairs: Pairs) -> dict[str, Interval]:
  """Returns differences in mean IoU; every image is a kind of its own."""
  sides = [
    [run.arrays('predictions.npz')['confusion'].astype(np.float64) for run in side]
    for side in zip(*pairs, strict=True)
  ]
  labelled = [confusion.sum(axis=2) for side in sides for confusion in side]
  if any((one != labelled[0]).any() for one in labelled):
    raise NoData('the runs were not tested on the same images')
  masks = {'miou': np.ones(labelled[0].shape[1], bool)} | pairs[0][0].shown_groups

  def means(numbers: np.ndarray, confusion: np.ndarray) -> np.ndarray:
    total = np.tensordot(numbers, confusion, 1)  # (R, C, C)
    right = total.diagonal(axis1=1, axis2=2)
    iou = _ratio(right, total.sum(axis=1) + total.sum(axis=2) - right)
    return np.stack([finite_mean(iou[:, mask].T) for mask in masks.values()], axis=1)

  def differences(numbers: np.ndarray) -> np.ndarray:
    ours, theirs = (
      np.mean([means(numbers, confusion) for confusion in side], axis=0)
      for side in sides
    )
    return ours - theirs

  intervals = paired_bootstrap(differences, np.ones(len(labelled[0]), int))
  return dict(zip(masks, intervals, strict=True))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
  """Returns part / whole, NaN where whole is 0."""
  return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def differences_table(found: Sequence[Comparison]) -> Table:
  """Returns one row per method: differences in points, grey if within noise."""
  names = {name for comparison in found for name in comparison.intervals}
  columns = {name: title for name, title in titles().items() if name in names}
  rows, faint = [], set()
  for row, comparison in enumerate(found):
    cells = [comparison.group.label, comparison.reference.label, comparison.test]
    for name in columns:
      interval = comparison.intervals.get(name)
      if interval is not None and interval.within_noise:
        faint.add((row, len(cells)))
      cells.append('-' if interval is None else _as_text(interval))
    rows.append(cells)
  headings = ['method', 'compared with', 'test', *columns.values()]
  links = [f'#{comparison.group.anchor}' for comparison in found]
  return Table(headings, rows, links, faint=frozenset(faint))


def _as_text(interval: Interval) -> str:
  middle, low, high = (f'{round(100 * x, 6) + 0:+.1f}' for x in interval)
  if not interval.is_known:
    return f'{"0.0" if middle == "+0.0" else middle} (n/a)'
  return f'{middle} ({low} to {high})'


def brief(found: Sequence[Comparison]) -> str:
  """Returns what stands above the table where no cell is grey."""
  every = [one for comparison in found for one in comparison.intervals.values()]
  absent = ' n/a: all measurements agree, so there is no interval.'
  return (
    f'Difference in points with its {100 * LEVEL:.0f} % interval. Noise may explain a '
    'difference whose interval contains zero.'
    + absent
    * any(not interval.is_known for interval in every)
  )


def remark(found: Sequence[Comparison]) -> str:
  """Returns what stands above the table on a page, where some cells are grey."""
  over_seeds = {comparison.test.startswith(PAIRED_T) for comparison in found}
  test = (
    BOTH if len(over_seeds) > 1 else OVER_SEEDS if True in over_seeds else OVER_IMAGES
  )
  several = ' Intervals are not corrected for multiple comparisons.' * (len(found) > 1)
  return (
    f'{brief(found)} Such differences are grey, here and in the first table. '
    f'{test}{several}'
  )


def title(found: Sequence[Comparison]) -> str:
  """Returns the heading of the table."""
  labels = {comparison.reference.label for comparison in found}
  return (
    f'Differences from {printable(labels.pop())}' if len(labels) == 1 else 'Differences'
  )


def within_noise(found: Sequence[Comparison]) -> set[tuple[str, str]]:
  """Returns (a group's anchor, metric) for each difference within noise."""
  return {
    (comparison.group.anchor, name)
    for comparison in found
    for name, interval in comparison.intervals.items()
    if interval.within_noise
  }
