"""Figures that compare several methods: gains per class, training curves."""

import functools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from lt_jax.report.curves import curve
from lt_jax.report.drawing import (
  CYCLE,
  INK,
  Drawn,
  finite_mean,
  legend,
  plot,
  shortened,
)
from lt_jax.report.runs import Group, NoData, NotApplicable, Run

PLAIN = 'ce'
"""The recipe that gains are measured against."""

MOST_COLUMNS = 20
MOST_LINES = 12
GAIN, LOSS = (0.18, 0.62, 0.43), (0.87, 0.48, 0.13)
STRONGEST = 30
"""Gain, in points, that is drawn in full colour."""


def compare_gains(groups: Sequence[Group]) -> Drawn:
  """Draws each method's gain over the plain network, per class and on the open set.

  The columns are classes, the most frequent first, or blocks of them, and then the open
  class if there is an open set. Each has two numbers: accuracy, and F1, which false
  alarms lower. Known classes are scored without rejection, the open class at the chosen
  threshold.

  Args:
    groups: one per method; one of them is `PLAIN`.

  Raises:
    NotApplicable: the plain network is missing, or no other method has its classes.
  """
  groups = [group for group in groups if group.counted]
  plain = next((g for g in groups if g.counted[0].recipe == PLAIN), None)
  if plain is None:
    raise NotApplicable(f'there is no finished run of the plain network, {PLAIN!r}')
  names = plain.counted[0].class_names
  others = [g for g in groups if g is not plain and g.counted[0].class_names == names]
  if not others:
    raise NotApplicable('no other method has the classes of the plain network')
  order = np.argsort(-plain.counted[0].counts, kind='stable')
  parts = np.array_split(order, min(len(order), MOST_COLUMNS))
  ticks = (
    [shortened(names[c]) for c in order]
    if len(parts) == len(order)
    else [f'{part[0] + 1} to {part[-1] + 1}' for part in _ranks(parts)]
  )
  opened = any(
    run.result['test'].get('open_accuracy') is not None
    for group in groups
    for run in group.counted
  )
  figure, panels = plot(2, size=(9, 2 + 0.5 * len(others)), sharex=True)
  for axes, (name, measure) in zip(panels, MEASURES.items(), strict=True):
    gains = []
    for group in others:
      gain = _mean(group, measure) - _mean(plain, measure)
      blocks = [finite_mean(gain[part][:, None])[0] for part in parts]
      gains.append([*blocks, *gain[-1:]] if opened else blocks)
    _squares(axes, np.array(gains))
    if opened:
      axes.axvline(len(parts) - 0.5, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(others)), [_short(group.label) for group in others])
    axes.set_title(f'gain in {name}, points')
  turned = 90 if max(map(len, ticks)) * len(ticks) > 100 else 0
  ticks = [*ticks, 'open'] if opened else ticks
  panels[-1].set_xticks(range(len(ticks)), ticks, rotation=turned)
  beside = ', and the open class' if opened else ''
  panels[-1].set_xlabel(f'classes, the most frequent first{beside}')
  several = any(len(group.counted) > 1 for group in groups)
  mean = ', mean over seeds' if several else ''
  rejection = (
    ' Known classes are scored without rejection, the open class at the chosen '
    'threshold.'
    if opened
    else ''
  )
  return figure, (
    f'Gain over the plain network ({plain.label}) per class{mean}.{rejection}'
  )


def _ranks(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
  ends = np.cumsum([len(part) for part in parts])
  return [np.arange(e - len(p), e) for p, e in zip(parts, ends, strict=True)]


def _short(label: str) -> str:
  return label if len(label) <= 24 else f'{label[:8]}…{label[-15:]}'


def _mean(group: Group, measure) -> np.ndarray:
  """Returns (C + 1,) means over seeds in %, the open class last."""
  return 100 * np.mean([measure(run) for run in group.counted], axis=0)


def _accuracy(run: Run) -> np.ndarray:
  """Returns (C + 1,) accuracies; NaN where there is none."""
  test = run.result['test']
  opened = test.get('open_accuracy')
  known = np.array(run.test('class_accuracy'), np.float64)
  return np.append(known, np.nan if opened is None else opened)


def _f1(run: Run) -> np.ndarray:
  """Returns (C + 1,) F1 values; NaN where there is none."""
  label, prediction, _ = run.predicted
  classes = len(run.counts)
  there, guessed, right = (
    np.bincount(x, minlength=classes)
    for x in (label, prediction, label[label == prediction])
  )
  both = there + guessed
  known = np.divide(2 * right, both, out=np.full(classes, np.nan), where=there > 0)
  return np.append(known, open_f1(run, len(label)))


def open_f1(run: Run, known: int) -> float:
  r"""Returns F1 of detecting open images at the chosen threshold; NaN without one.

  With M open images, of which O were accepted, and N known ones, of which K were
  accepted and R given the right class: result.json has R / N, 1 - O / M and

  .. math:: F = \frac{2 R}{R + K + O}

  (the definition 'oltr2019'), from which K follows.

  Args:
    run: the run.
    known: N.
  """
  test = run.result['test']
  names = ('known_accuracy', 'open_accuracy', 'f_measure_oltr2019')
  share, rejected, f = (test.get(name) for name in names)
  opened = (run.data.get('open_images') or {}).get('open_test')
  if not (opened and f) or share is None or rejected is None:
    return np.nan
  right, accepted = share * known, (1 - rejected) * opened
  kept = 2 * right / f - right - accepted
  found = opened - accepted
  return 2 * found / (2 * found + accepted + (known - kept))


MEASURES = {'accuracy': _accuracy, 'F1': _f1}


def _squares(axes: Axes, gains: np.ndarray) -> None:
  """Draws (R, C) gains as squares with their numbers, losses in another colour."""
  rows, columns = np.nonzero(np.isfinite(gains))
  corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
  values = gains[rows, columns]
  strength = np.minimum(np.abs(values) / STRONGEST, 1)
  base = np.where(values[:, None] > 0, GAIN, LOSS)
  squares = np.stack([columns, rows], axis=1)[:, None] + corners
  faces = np.column_stack([base, strength])
  axes.add_collection(PolyCollection(squares, facecolors=faces, edgecolors='none'))
  style = {'ha': 'center', 'va': 'center', 'fontsize': 7, 'color': INK}
  for row, column, value in zip(rows, columns, values, strict=True):
    axes.text(column, row, f'{value:+.0f}', **style)
  axes.grid(visible=False)
  axes.set(xlim=(-0.5, gains.shape[1] - 0.5), ylim=(len(gains) - 0.5, -0.5))


def compare_training(groups: Sequence[Group]) -> Drawn:
  """Draws accuracy over training: one line per method, with a band over its seeds.

  With more than `MOST_LINES` methods, those with the highest final accuracy.
  """
  groups = [group for group in groups if group.counted]
  ranked = sorted(
    groups, key=lambda g: -np.mean([r.result['test'][r.headline] for r in g.counted])
  )
  shown = [group for group in groups if group in ranked[:MOST_LINES]]
  figure, panels = plot(2, size=(7, 5), sharex=True)
  drawn = 0
  for number, group in enumerate(shown):
    style = {
      'color': CYCLE[number % len(CYCLE)],
      'linestyle': '-' if number < len(CYCLE) else '--',
    }
    for axes, split in zip(panels, ('train', 'test'), strict=True):
      steps, values = _band(group.counted, split)
      if not len(steps):
        continue
      drawn += 1
      mean = values.mean(axis=0)
      axes.plot(steps, mean, label=_short(group.label), **style)
      if len(values) > 1:
        spread = values.std(axis=0, ddof=1)
        low, high = mean - spread, mean + spread
        axes.fill_between(steps, low, high, color=style['color'], alpha=0.15, lw=0)
  if not drawn:
    raise NoData('metrics.jsonl has no accuracy of any method')
  for axes, split in zip(panels, ('training', 'test'), strict=True):
    per_pixel = split == 'test' and shown[0].counted[0].task.per_pixel
    measure = 'mIoU' if per_pixel else 'accuracy'
    axes.set(ylabel=f'{split} {measure} (%)', ylim=(None, 102))
  panels[-1].set_xlabel('step')
  legend(figure, panels[-1] if panels[-1].lines else panels[0])
  fewer = f' Shown are the {MOST_LINES} with the highest accuracy.' * (
    len(shown) < len(groups)
  )
  several = any(len(group.counted) > 1 for group in shown)
  band = 'Mean over seeds, with the standard deviation as a band. ' if several else ''
  return figure, (
    f'{band}Training images are augmented and weighted, test images are not.{fewer}'
  )


def _band(runs: Sequence[Run], split: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the steps that all seeds logged, and their accuracies (R, S) in %."""
  found = [
    dict(zip(*curve(run, split, run.logged(split), 100), strict=True)) for run in runs
  ]
  steps = sorted(functools.reduce(set.intersection, map(set, found)))
  return np.array(steps), np.array([[one[s] for s in steps] for one in found])
