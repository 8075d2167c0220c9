"""Figures of a run by domain, in the manner of `lt_jax.report.figures`."""

import math
from collections.abc import Callable, Iterator, Sequence

import matplotlib
import numpy as np

from lt_jax.evals import titles
from lt_jax.report.curves import curve
from lt_jax.report.domains import Domain, domains
from lt_jax.report.drawing import (
  CYCLE,
  INK,
  MARKER,
  Drawn,
  finished,
  finite_mean,
  legend,
  line,
  matrix,
  mean_and_deviation,
  over_seeds,
  plot,
  seeds,
  shortened,
)
from lt_jax.report.figures import (
  MOST_NAMED,
  SPLITS,
  about_map,
  class_sets,
  drawable,
  each_seed,
  mark_stages,
  plane_of,
  scatter,
  short_label,
)
from lt_jax.report.runs import Group, NoData, NotApplicable, Run

MOST_PANELS = 6

EARLIER = (
  '{} has no domains: it was written by an earlier version; repeat the command of the '
  'run to write it again'
)


def _title(domain: Domain) -> str:
  """Returns the title of a domain, short enough for a figure."""
  return domain._replace(name=shortened(domain.name)).title


def colours_of(shown: Sequence[Domain]) -> dict[Domain, str | tuple]:
  """Returns a colour for each domain."""
  if len(shown) <= len(CYCLE):
    return dict(zip(shown, CYCLE, strict=False))
  colours = matplotlib.colormaps['turbo'](np.linspace(0.05, 0.95, len(shown)))
  return dict(zip(shown, map(tuple, colours), strict=True))


def _metric(runs: Sequence[Run], domain: Domain, name: str) -> np.ndarray:
  """Returns a metric of a domain in %, (R, ...), NaN where there is none."""
  found = [run.result['domains'][domain.name].get(name) for run in runs]
  return 100 * np.array(found, np.float64)


def _blocks(counts: np.ndarray) -> list[np.ndarray]:
  """Returns classes by decreasing frequency, in at most `MOST_NAMED` blocks."""
  order = np.argsort(-counts, kind='stable')
  return np.array_split(order, min(len(order), MOST_NAMED))


def _block_names(run: Run, parts: Sequence[np.ndarray]) -> tuple[list[str], str]:
  """Returns a name for each block, and the label of their axis."""
  if len(parts) == len(run.counts):
    return [shortened(run.class_names[c]) for (c,) in parts], 'class'
  ends = [(run.counts[part[0]], run.counts[part[-1]]) for part in parts]
  label = 'classes of similar frequency, by their training images'
  return [f'{first} to {last}' for first, last in ends], label


def domain_classes(runs: Sequence[Run]) -> Drawn:
  """Draws the accuracy of each class, or block of classes, in each domain."""
  runs = finished(runs)
  shown, parts = domains(runs[0]), _blocks(runs[0].counts)
  by_class = runs[0].task.by_class
  rows = [finite_mean(_metric(runs, domain, by_class)) for domain in shown]
  cells = [[finite_mean(row[part][:, None])[0] for part in parts] for row in rows]
  names, label = _block_names(runs[0], parts)
  figure, axes = plot(size=(9, 1.5 + 0.28 * len(shown)))
  matrix(axes, np.array(cells), numbers=True)
  turned = max(map(len, names)) * len(names) > 100
  axes.set_xticks(np.arange(len(names)), names, rotation=90 if turned else 0)
  axes.set_yticks(np.arange(len(shown)), [_title(domain) for domain in shown])
  axes.set_xlabel(label)
  mean = f' Mean of {len(runs)} seeds.' if len(runs) > 1 else ''
  return figure, (
    f'Test {runs[0].measure} of each class in each domain in %, the class with most '
    f'training images first.{mean}'
  )


def domain_shot_groups(runs: Sequence[Run]) -> Drawn:
  """Draws the accuracy of many-, medium- and few-shot classes in each domain."""
  runs = finished(runs)
  shown, masks = domains(runs[0]), runs[0].shown_groups
  if not masks:
    raise NotApplicable('all classes are in one shot group')
  figure, axes = plot(size=(5.6, 3.2))
  width = 0.8 / len(shown)
  for number, (domain, colour) in enumerate(colours_of(shown).items()):
    values = np.stack(
      [_metric(runs, domain, name) for name in (*masks, runs[0].headline)], axis=1
    )
    mean, deviation = mean_and_deviation(values)
    place = np.arange(len(masks) + 1) - 0.4 + width * (number + 0.5)
    axes.bar(
      place,
      mean,
      0.9 * width,
      yerr=deviation,
      color=colour,
      ecolor=INK,
      error_kw={'elinewidth': 0.8},
      label=_title(domain),
    )
  sizes = {f'{name}-shot': int(mask.sum()) for name, mask in masks.items()}
  sizes['all'] = len(runs[0].counts)
  ticks = [f'{n}\n{size} class{"es" * (size > 1)}' for n, size in sizes.items()]
  axes.set_xticks(np.arange(len(ticks)), ticks)
  axes.set(ylabel=f'test {runs[0].measure} (%)', ylim=(0, 103))
  axes.grid(visible=False, axis='x')
  legend(figure, axes, 3)
  return figure, f'Test {runs[0].measure} by shot group in each domain.{seeds(runs)}'


def predicted(run: Run) -> Iterator[tuple[Domain, np.ndarray, np.ndarray]]:
  """Yields each domain with (C,) how often each class occurs, and is predicted.

  Raises:
    NoData: predictions.npz is missing, damaged, or from an earlier version.
  """
  stored = run.arrays('predictions.npz')
  if 'domains' not in stored:
    raise NoData(EARLIER.format('predictions.npz'))
  numbers = {name: number for number, name in enumerate(stored['domains'].tolist())}
  keys = ('confusion',) if run.task.per_pixel else ('label', 'prediction')
  for domain in domains(run):
    found = [stored[key] for key in keys]
    if f'{domain.name}/{keys[0]}' in stored:
      found = [stored[f'{domain.name}/{key}'] for key in keys]
    elif 'domain' in stored:
      own = stored['domain'] == numbers[domain.name]
      found = [values[own] for values in found]
    if run.task.per_pixel:
      matrix = found[0].sum(0, dtype=np.int64)
      yield domain, matrix.sum(1), matrix.sum(0)
    else:
      true, taken = (np.bincount(x, minlength=len(run.counts)) for x in found)
      yield domain, true, taken


def domain_predictions(runs: Sequence[Run]) -> Drawn:
  """Draws how often each class is predicted and how often it occurs, by domain.

  A network whose predictions have collapsed has few tall bars, and a low entropy.
  """
  runs = finished(runs)
  run = runs[0]
  parts = _blocks(run.counts)
  share: dict[Domain, np.ndarray] = {}
  for one in runs:
    for domain, *both in predicted(one):
      counted = np.stack(both)
      share[domain] = share.get(domain, 0) + counted / counted.sum(1, keepdims=True)
  drawn = list(share)[:MOST_PANELS]
  columns = 2 if len(drawn) == 4 else min(3, len(drawn))
  rows = math.ceil(len(drawn) / columns)
  figure, panels = plot(
    rows,
    columns,
    size=(3 * columns, 0.4 + 2.1 * rows),
    sharex=True,
    sharey=True,
    squeeze=False,
  )
  names, label = _block_names(run, parts)
  place = np.arange(len(parts))
  for axes, domain in zip(panels.flat, drawn, strict=False):
    true, taken = share[domain] / len(runs)
    bars, prior = (100 * np.array([x[p].sum() for p in parts]) for x in (taken, true))
    axes.bar(place, bars, 0.8, color=CYCLE[0], label='predicted')
    axes.step(
      np.append(place - 0.5, place[-1] + 0.5),
      np.append(prior, prior[-1]),
      where='post',
      color=INK,
      label='true',
    )
    axes.set_title(f'{_title(domain)}: entropy {_entropy(taken):.2f}')
    turned = max(map(len, names)) * len(names) > 25
    axes.set_xticks(place, names, rotation=90 if turned else 0)
    axes.grid(visible=False, axis='x')
  for number, axes in enumerate(panels.flat[len(drawn) :], len(drawn)):
    axes.remove()
    panels.flat[number - columns].tick_params(labelbottom=True)
  for axes in panels[:, 0]:
    axes.set_ylabel(f'test {run.counted} (%)')
  figure.supxlabel(label, fontsize='medium')
  legend(figure, panels[0, 0])
  left = len(share) - len(drawn)
  others = f' {left} more domains are not shown.' if left else ''
  mean = f' Mean of {len(runs)} seeds.' if len(runs) > 1 else ''
  return figure, (
    'How often each class is predicted and how often it occurs, in each domain. The '
    'entropy is that of the predicted shares: 1 if all classes are predicted equally '
    f'often, 0 if one class is always predicted (mode collapse).{mean}{others}'
  )


def _entropy(share: np.ndarray) -> float:
  """Returns the entropy of (C,) shares divided by that of a uniform distribution."""
  there = share[share > 0]
  return float(-(there * np.log(there)).sum() / max(math.log(len(share)), 1e-9)) + 0.0


def domain_training(runs: Sequence[Run]) -> Drawn:
  """Draws the accuracy on source and targets over all stages."""
  if not any(run.rows for run in runs):
    kind = NoData if any(run.result for run in runs) else NotApplicable
    raise kind('metrics.jsonl is missing, or empty')
  shown = next(filter(None, map(domains, runs)))
  judged = any('domain_accuracy' in row for run in runs for row in run.rows)
  figure, panels = plot(
    1 + judged,
    size=(5.6, 3.2 + 1.2 * judged),
    sharex=True,
    squeeze=False,
    height_ratios=(3, 1)[: 1 + judged],
  )
  accuracy, *below = panels[:, 0]
  for run in runs:
    first = run is runs[0]
    alpha = 1 if first else 0.4
    for split, (title, colour) in _curves(run, shown).items():
      points = curve(run, split, run.logged(split), 100)
      style = {} if split == 'train' else MARKER
      label = title if first and points[0] else None
      line(accuracy, *points, **style, color=colour, alpha=alpha, label=label)
    for axes in below:
      points = curve(run, 'train', 'domain_accuracy', 100)
      line(axes, *points, color=SPLITS['train'], alpha=alpha)
  stages = mark_stages(panels[:, 0], runs[0])
  measure = 'accuracy, mIoU' if runs[0].task.per_pixel else 'accuracy'
  accuracy.set(ylabel=f'{measure} (%)', ylim=(-3, 103))
  panels[-1, 0].set_xlabel('step')
  legend(figure, accuracy, 3)
  judge = ''
  for axes in below:
    axes.axhline(50, color=INK, linewidth=0.7, linestyle=':')
    axes.set(ylabel='discriminator\nright (%)', ylim=(0, 103))
    judge = ' Below: how often the discriminator is right about the domain of an image.'
  return figure, f'Accuracy by domain over training.{judge}{stages}{each_seed(runs)}'


def _curves(run: Run, shown: Sequence[Domain]) -> dict[str, tuple[str, str | tuple]]:
  """Returns split of metrics.jsonl -> (name of its curve, its colour)."""
  found = {'train': ('training images', SPLITS['train'])}
  targets = [domain for domain in shown if domain.role == 'target']
  logged = {row.get('split') for row in run.rows}
  for domain, colour in colours_of(shown).items():
    split = f'{domain.name}/test'
    if split in logged:
      found[split] = (_title(domain), colour)
    elif domain in targets and 'test' not in found:
      title = _title(domain) if len(targets) == 1 else 'all targets'
      found['test'] = (title, colour)
    elif domain.role == 'source':
      found['test'] = (_title(domain), colour)
  return found


FIGURES: dict[str, Callable[[Sequence[Run]], Drawn]] = {
  'domain_classes': domain_classes,
  'domain_shot_groups': domain_shot_groups,
  'domain_predictions': domain_predictions,
  'domain_training': domain_training,
}
"""name -> figure of one or more seeds, tested on several domains."""


def domain_features(runs: Sequence[Run]) -> Drawn:
  """Draws test features in a plane, coloured by domain and, beside it, by class."""
  run = runs[0]
  stored = run.arrays('features.npz')
  if 'domain' not in stored:
    raise NoData(EARLIER.format('features.npz'))
  points, rows = drawable(stored, np.ones(len(stored['label']), bool))
  plane, name = plane_of(points)
  label, number = stored['label'][rows], stored['domain'][rows]
  figure, (left, right) = plot(1, 2, size=(11, 4.2))
  names = stored['domains'].tolist()
  by_domain = {
    _title(domain): (number == names.index(domain.name), colour)
    for domain, colour in colours_of(domains(run)).items()
    if domain.name in names
  }
  scatter(left, plane, by_domain, name)
  scatter(right, plane, class_sets(run, label), name)
  left.set_title('by domain')
  right.set_title('by class')
  return figure, (
    f'{name} map of {len(points)} test features of all domains, coloured by domain and '
    f'by class.{about_map(run, name)}'
  )


OF_ONE_RUN = {'domain_features': domain_features}


def domain_order(runs: Sequence[Run]) -> Drawn:
  """Draws which target domains a curriculum offered first."""
  stored = runs[0].arrays('order.npz')
  score, domain = stored['score'], stored['domain']
  shown = _colours_by_name(runs[0])
  places = np.argsort(np.argsort(score, kind='stable'), kind='stable')
  rank = (places + 0.5) / len(score)
  figure, (left, right) = plot(1, 2, size=(9, 3))
  edges = np.linspace(score.min(), score.max() + 1e-9, 41)
  tenths = np.linspace(0, 1, 11)
  for number, name in enumerate(stored['domains'].tolist()):
    own, (title, colour) = domain == number, shown[name]
    share = np.histogram(score[own], edges)[0] / max(own.sum(), 1)
    left.stairs(100 * share, edges, color=colour, label=title)
    there = [np.histogram(rank[x], tenths)[0] for x in (own, np.ones(len(own), bool))]
    right.stairs(100 * there[0] / np.maximum(there[1], 1), 100 * tenths, color=colour)
  left.set(xlabel='score', ylabel='images of the domain (%)')
  right.set(xlabel='place in the order (%)', ylabel='share of the images (%)')
  right.set_ylim(-3, 103)
  legend(figure, left)
  return figure, (
    'The order in which the curriculum offers target images, by increasing score: the '
    'scores of each domain (left), and the share of each domain in each tenth of the '
    'order (right). Training does not know the domains.'
  )


def domain_borrowed(runs: Sequence[Run]) -> Drawn:
  """Draws how much of its features each domain takes from the memory."""
  stored = runs[0].arrays('borrowed.npz')
  shown, names = _colours_by_name(runs[0]), stored['domains'].tolist()
  order = [name for name in shown if name in names]
  figure, axes = plot(size=(5.6, 1.1 + 0.3 * len(order)))
  parts = [stored['borrowed'][stored['domain'] == names.index(name)] for name in order]
  ends = [np.quantile(part, (0.05, 0.25, 0.5, 0.75, 0.95)) for part in parts]
  for place, (name, q) in enumerate(zip(order, ends, strict=True)):
    colour = shown[name][1]
    axes.plot(q[[0, 4]], [place] * 2, color=colour, linewidth=1)
    axes.plot(q[[1, 3]], [place] * 2, color=colour, linewidth=5, alpha=0.5)
    axes.plot(q[2], place, 'o', color=colour, markersize=5)
  axes.set_yticks(range(len(order)), [shown[name][0] for name in order])
  axes.set(xlabel='|added| / |own feature|', ylim=(len(order) - 0.5, -0.5))
  return figure, (
    'How much memory and domain add to the features of test images, relative to the '
    'length of the image’s own feature: median, quartiles, and 5 to 95 %, by domain. '
    'Far domains should borrow more.'
  )


def _colours_by_name(run: Run) -> dict[str, tuple[str, str | tuple]]:
  """Returns a domain's name -> (its title, its colour)."""
  coloured = colours_of(domains(run)).items()
  return {domain.name: (_title(domain), colour) for domain, colour in coloured}


OF_FILES = {
  'domain_order': ('order.npz', domain_order),
  'domain_borrowed': ('borrowed.npz', domain_borrowed),
}
"""Name -> (file, figure of a run that has this file)."""


def compare_domains(groups: Sequence[Group]) -> Drawn:
  """Draws the accuracy of each method in each domain, one row per method."""
  groups = [group for group in groups if any(map(domains, group.counted))]
  found = (domain for g in groups for run in g.counted for domain in domains(run))
  shown = list(dict.fromkeys(found))
  figure, axes = plot(size=(5.6, 0.9 + 0.26 * len(groups)))
  place = np.arange(len(groups))
  for domain, colour in colours_of(shown).items():
    there = [g for g in groups if all(domain in domains(run) for run in g.counted)]
    pairs = [
      mean_and_deviation(_metric(g.counted, domain, g.counted[0].headline))
      for g in there
    ]
    axes.errorbar(
      [mean for mean, _ in pairs],
      [groups.index(group) for group in there],
      xerr=[0 if deviation is None else deviation for _, deviation in pairs],
      fmt='o',
      color=colour,
      markersize=5,
      elinewidth=1,
      label=_title(domain),
    )
  axes.set_yticks(place, [short_label(group.label) for group in groups])
  measure = titles()[groups[0].counted[0].headline]
  axes.set(xlabel=f'test {measure} (%)', ylim=(len(groups) - 0.5, -0.5))
  legend(figure, axes, 3)
  return figure, f'Test {measure} in each domain{over_seeds(groups)}.'


COMPARISONS = {'compare_domains': compare_domains}
