"""The page of `lt_jax.similarity`: how near domains are, which source suits which."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lt_jax.report import templates
from lt_jax.report.drawing import (
  CYCLE,
  INK,
  Drawn,
  Figured,
  draw,
  legend,
  plot,
  shortened,
)
from lt_jax.report.runs import NoData

Found = Mapping[str, Any]

MOST_LINKS = 24
MOST_FLOWS = 12


def page(found: Found) -> str:
  """Returns the contents of similarity.json as an HTML page."""
  figures = []
  if 'pairs' in found:
    figures = [
      draw('matrix', _matrix, [found], 'similarity'),
      *(
        draw(f'flow_{i}', _flow, [flow], 'similarity')
        for i, flow in enumerate(found['flows'][:MOST_FLOWS])
      ),
      draw('accuracy', _accuracy, [found], 'similarity'),
    ]
  environment = templates.environment()
  return environment.get_template('similarity.html').render(
    found=found, figures=_shown(figures), correlations=found.get('correlations')
  )


def _shown(figures: Sequence[Figured]) -> list[Figured]:
  """Returns the figures, those that could not be drawn last."""
  return sorted(figures, key=lambda figure: not figure.svg)


def _pairs(found: Found) -> tuple[list[str], list[str], np.ndarray]:
  sources = list(dict.fromkeys(pair['source'] for pair in found['pairs']))
  targets = list(dict.fromkeys(pair['target'] for pair in found['pairs']))
  values = np.full((len(sources), len(targets)), np.nan)
  for pair in found['pairs']:
    place = sources.index(pair['source']), targets.index(pair['target'])
    values[place] = pair['similarity']
  return sources, targets, values


def _matrix(shown: Sequence[Found]) -> Drawn:
  """Draws the similarity of every source to every target, shaded by column."""
  sources, targets, values = _pairs(shown[0])
  figure, axes = plot(size=(1.8 + 0.8 * len(targets), 1.2 + 0.4 * len(sources)))
  low, high = values.min(0), values.max(0)
  shade = (values - low) / np.where(high > low, high - low, 1)
  axes.imshow(shade, cmap='Blues', vmin=-0.2, vmax=1.6, aspect='auto')
  for row, column in np.ndindex(values.shape):
    text = f'{values[row, column]:.3f}'
    axes.text(column, row, text, ha='center', va='center', color=INK, fontsize=8)
  axes.set_xticks(range(len(targets)), [_short(name) for name in targets], rotation=30)
  axes.set_yticks(range(len(sources)), [_short(name) for name in sources])
  axes.grid(visible=False)
  return figure, (
    'Similarity of sources (rows) to targets (columns). Shades compare the sources for '
    'one target; they do not compare columns.'
  )


def _flow(shown: Sequence[Found]) -> Drawn:
  """Draws which classes of a source correspond to which classes of a target."""
  flow = shown[0]
  links = flow['links'][:MOST_LINKS]
  if not links:
    raise NoData(f'nothing flows from {flow["source"]} to {flow["target"]}')
  left = list(dict.fromkeys(link['from'] for link in links))
  right = list(dict.fromkeys(link['to'] for link in links))
  figure, axes = plot(size=(5.6, 0.9 + 0.22 * max(len(left), len(right))))
  heights = {
    side: np.linspace(0, 1, len(names)) if len(names) > 1 else [0.5]
    for side, names in (('left', left), ('right', right))
  }
  most = max(link['share'] for link in links)
  x = np.linspace(0, 1, 40)
  bend = 3 * x**2 - 2 * x**3
  for link in links:
    begin = heights['left'][left.index(link['from'])]
    end = heights['right'][right.index(link['to'])]
    axes.plot(
      x,
      begin + (end - begin) * bend,
      color=CYCLE[right.index(link['to']) % len(CYCLE)],
      linewidth=0.5 + 6 * link['share'] / most,
      alpha=0.55,
      solid_capstyle='butt',
    )
  for side, names, place in (('left', left, -0.02), ('right', right, 1.02)):
    align = 'right' if side == 'left' else 'left'
    for name, height in zip(names, heights[side], strict=True):
      axes.text(
        place, height, _class(name), ha=align, va='center', color=INK, fontsize=8
      )
  axes.set(xlim=(-0.45, 1.45), ylim=(1.05, -0.05), xticks=[], yticks=[])
  axes.grid(visible=False)
  for spine in axes.spines.values():
    spine.set_visible(False)
  total = sum(link['share'] for link in links)
  return figure, (
    f'Which classes of {flow["source"]} (left) go with which of {flow["target"]}: the '
    f'{len(links)} largest flows of the optimal transport, {100 * total:.0f} % of it.'
  )


def _accuracy(shown: Sequence[Found]) -> Drawn:
  """Draws accuracy against similarity, one line per target."""
  known = [pair for pair in shown[0]['pairs'] if pair['accuracy'] is not None]
  if not known:
    raise NoData('accuracies are not known; pass --accuracy')
  figure, axes = plot(size=(5.6, 3.4))
  for target in dict.fromkeys(pair['target'] for pair in known):
    own = sorted(
      (pair['similarity'], pair['accuracy'])
      for pair in known
      if pair['target'] == target
    )
    axes.plot(*np.transpose(own), marker='o', markersize=4, label=_short(target))
  axes.set(xlabel='similarity', ylabel='accuracy')
  legend(figure, axes, columns=3)
  return figure, (
    'Accuracy on the target against similarity, one line per target; compare only '
    'points on the same line.'
  )


def _short(name: str) -> str:
  return shortened(name.rstrip('/').rpartition('/')[2].rpartition(':')[2] or name)


def _class(name: str) -> str:
  """Returns the name of a class for an axis, with its source if there are several."""
  source, _, label = name.rpartition('/')
  return shortened(f'{_short(source)}/{label}' if source else label)
