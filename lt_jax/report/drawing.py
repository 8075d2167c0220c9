"""How figures are drawn: style, axes, and SVG for light and dark pages.

A figure is a function of runs that returns a Matplotlib figure and its caption, or
raises `NoData`. Its background is transparent, and its text and axes take the colour of
the page's text.
"""

import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lt_jax.report.runs import JOINERS, Group, NoData, NotApplicable, Run, printable

Drawn = tuple[Figure, str]


FONTS = (
  "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Liberation Sans', "
  "'Hiragino Sans', 'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', "
  "'Noto Sans Arabic', sans-serif, "
  "'Apple Color Emoji', 'Segoe UI Emoji', 'Noto Color Emoji'"
)
"""Fonts for text. A browser takes each character from the first font that has it, and
falls back to other installed fonts for other scripts."""


INK = '#010203'
"""Stands for the colour of the page's text until `svg` replaces it."""


COLOURS = {'many': '#3b82c4', 'medium': '#2f9e6e', 'few': '#dd7a21', 'all': '#8a8a8a'}


CYCLE = ('#3b82c4', '#dd7a21', '#2f9e6e', '#a06cc4', '#c9a227', '#8a8a8a')


STYLE = {
  'svg.hashsalt': 'lt_jax',  # the same file from the same numbers
  'svg.fonttype': 'none',
  'font.family': 'sans-serif',
  'font.sans-serif': ['DejaVu Sans'],
  'font.size': 9,
  'text.parse_math': False,  # a class may be called $
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.prop_cycle': matplotlib.cycler(color=CYCLE),
  'axes.titlesize': 9,
  'grid.color': '#8a8a8a',
  'grid.alpha': 0.3,
  'grid.linewidth': 0.5,
  'lines.linewidth': 1.2,
  'legend.frameon': False,
  'figure.facecolor': 'none',
  'axes.facecolor': 'none',
} | dict.fromkeys(
  ('text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color', 'ytick.color'), INK
)


def plot(rows: int = 1, columns: int = 1, size: tuple[float, float] = (5.6, 3), **kind):
  """Returns a figure and its axes, with a grid."""
  figure = Figure(figsize=size, layout='constrained')
  axes = figure.subplots(rows, columns, **kind)
  for one in np.atleast_1d(axes).flat:
    one.grid()
    one.set_axisbelow(True)
  return figure, axes


def legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
  """Puts a legend above the axes, in at most this many columns."""
  figure.legend(
    *axes.get_legend_handles_labels(),
    loc='outside upper left',
    ncols=columns,
    columnspacing=1.2,
    handletextpad=0.5,
  )


def log_counts(axes: Axes) -> None:
  """Makes the x axis, training images, logarithmic with plain numbers."""
  axes.set(xscale='log', xlabel='training images of the class')
  axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_major_formatter('{x:g}')
  axes.xaxis.set_minor_formatter('')


MARKER = {'marker': 'o', 'markersize': 2.5}


def line(axes: Axes, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
  """Draws a curve, or a marker if it has only one point."""
  axes.plot(x, y, **(MARKER if len(x) == 1 else {}) | style)


def matrix(axes: Axes, share: np.ndarray, *, numbers: bool) -> None:
  """Draws (R, C) percentages as squares, stronger for larger ones; zeros stay empty."""
  rows, columns = np.nonzero(np.nan_to_num(share) > 0)
  corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
  alpha = share[rows, columns] / 100
  colours = np.column_stack([np.tile((0.231, 0.51, 0.769), (len(rows), 1)), alpha])
  squares = np.stack([columns, rows], axis=1)[:, None] + corners
  axes.add_collection(PolyCollection(squares, facecolors=colours, edgecolors='none'))
  if numbers:
    for row, column in zip(rows, columns, strict=True):
      value = share[row, column]
      if value >= 0.5:
        axes.text(
          column, row, f'{value:.0f}', ha='center', va='center', fontsize=8, color=INK
        )
  axes.grid(visible=False)
  axes.set(xlim=(-0.5, share.shape[1] - 0.5), ylim=(share.shape[0] - 0.5, -0.5))


def mean_and_deviation(values: Sequence[Any]) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns mean and standard deviation over runs; no deviation for a single run."""
  found = np.array(values, np.float64)
  return found.mean(axis=0), found.std(axis=0, ddof=1) if len(found) > 1 else None


def finite_mean(values: np.ndarray) -> np.ndarray:
  """Returns the means of the finite values of each column."""
  there = np.isfinite(values)
  count = there.sum(axis=0)
  total = np.where(there, values, 0).sum(axis=0)
  return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


def thinned(positions: np.ndarray, most: int) -> np.ndarray:
  """Returns at most `most` of the positions, evenly spaced."""
  last = len(positions) - 1
  return positions[np.unique(np.linspace(0, last, most).round().astype(int))]


def seeds(runs: Sequence[Run]) -> str:
  """Returns the sentence of a caption about several seeds."""
  count = len(runs)
  return '' if count == 1 else f' Mean and standard deviation of {count} seeds.'


def over_seeds(groups: Sequence[Group]) -> str:
  """Returns the end of a caption about several methods, if any has several seeds."""
  several = any(len(group.counted) > 1 for group in groups)
  return '; mean and standard deviation over seeds' if several else ''


MOST_PLACES = 14
ROOM = '\u2004'  # a third of an em


def shortened(name: str) -> str:
  """Returns a name that fits beside an axis.

  East Asian characters and emoji are twice as wide as others. Matplotlib's own font
  lacks them and would leave too little room, so `ROOM` follows each; `svg` removes it.
  """
  ends = np.cumsum([_places(character) for character in name])
  if len(name) and ends[-1] > MOST_PLACES:
    kept = name[: np.searchsorted(ends, MOST_PLACES - 1, 'right')]
    name = f'{kept.rstrip(JOINERS)}…'
  return ''.join(c + ROOM * (_places(c) == 2) for c in name)


def _places(character: str) -> int:
  """Returns the width of a character in Latin letters; 0 for an accent."""
  if unicodedata.category(character) in ('Mn', 'Me', 'Cf'):
    return 0
  return 1 + (unicodedata.east_asian_width(character) in 'WF')


def finished(runs: Sequence[Run]) -> list[Run]:
  """Returns the runs with a result."""
  found = [run for run in runs if run.result]
  if not found:
    raise NotApplicable(runs[0].why_unfinished)
  return found


OTHER_CONTENTS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""Errors raised by files with unexpected contents."""


class Figured(NamedTuple):
  """A figure for a page.

  Attributes:
    name: its name.
    title: its heading on a page.
    caption: what it shows.
    svg: the drawing; '' if there is none, and then the caption says why, or is '' if
      the figure does not apply to the run.
  """

  name: str
  title: str
  caption: str
  svg: str

  @property
  def is_wide(self) -> bool:
    """Whether it takes two columns of a page."""
    return float(re.search(r'width="([\d.]+)"', self.svg)[1]) > WIDE


TITLES = {
  'class_accuracy': '{measure} by class',
  'shot_groups': '{measure} by shot group',
  'reliability': 'Reliability of the confidence',
  'weights': 'Learned weights of examples',
  'epsilons': 'What learning added to the weights',
  'compare_shot_groups': '{measure} of each method',
  'compare_classes': '{measure} by class',
  'compare_gains': 'Gain over the plain network',
  'compare_training': 'Training curves',
  'compare_domains': '{measure} by domain',
  'domain_classes': '{measure} by class and domain',
  'domain_shot_groups': '{measure} by shot group and domain',
  'domain_predictions': 'Predicted and true classes by domain',
  'domain_training': 'Training curves by domain',
  'domain_features': 'Features by domain',
  'domain_order': 'Order of the target images',
  'domain_borrowed': 'What features take from the memory',
  'example_epsilons': 'Weights of single images',
}
"""Name of a figure -> its heading, unless that is the name."""


def _title(name: str, shown: Sequence[Any]) -> str:
  """Returns the heading of a figure of runs, or of groups of runs."""
  title = TITLES.get(name, name.replace('_', ' '))
  if '{measure}' in title:
    runs = [run for one in shown for run in getattr(one, 'runs', [one])]
    title = title.format(measure=runs[0].measure)
  return title[:1].upper() + title[1:]


WIDE = 700
"""Pixels above which a figure is wide."""


def draw(
  name: str, figure: Callable[[Sequence[Any]], Drawn], shown: Sequence[Any], prefix: str
) -> Figured:
  """Draws a figure; if its data are missing, returns a caption that says which."""
  title = _title(name, shown)
  try:
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
      warnings.filterwarnings('ignore', 'Glyph')  # the browser has other fonts
      drawn, caption = figure(shown)
      return Figured(name, title, caption, svg(drawn, f'{prefix}-{name}', caption))
  except NotApplicable:
    return Figured(name, title, '', '')
  except NoData as missing:
    return Figured(name, title, f'“{title}” is not drawn: {missing}.', '')
  except OTHER_CONTENTS as error:
    why = f'its files have unexpected contents ({type(error).__name__}: {error})'
    return Figured(name, title, f'“{title}” is not drawn: {printable(why)}.', '')


NAMESPACES = {'': 'http://www.w3.org/2000/svg', 'xlink': 'http://www.w3.org/1999/xlink'}


REFERENCE = re.compile(r'url\(#(.+?)\)')
FAMILY = re.compile(r' ?font-family:[^;]*;')


def svg(figure: Figure, prefix: str, label: str) -> str:
  """Returns a figure as an <svg> element whose ids begin with a prefix.

  Args:
    figure: the Matplotlib figure.
    prefix: unique on the page.
    label: for screen readers.
  """
  buffer = io.BytesIO()
  # savefig would draw everything a second time.
  FigureCanvasSVG(figure).print_svg(buffer, metadata={'Date': None})
  root = ElementTree.fromstring(buffer.getvalue())
  space = f'{{{NAMESPACES[""]}}}'
  for parent in list(root.iter()):
    for child in list(parent):
      if child.tag in (f'{space}metadata', f'{space}style'):
        parent.remove(child)
  href = f'{{{NAMESPACES["xlink"]}}}href'
  used = set()
  for element in root.iter():
    for key, value in element.attrib.items():
      used |= set(REFERENCE.findall(value))
      used |= {value[1:]} if key == href and value.startswith('#') else set()
  for element in root.iter():
    element.text = element.text and element.text.replace(ROOM, '')
    for key, value in list(element.attrib.items()):
      if key == 'id' and value not in used:
        del element.attrib[key]
      elif key == 'id':
        element.set(key, f'{prefix}-{value}')
      elif key == href and value.startswith('#'):
        element.set(key, f'#{prefix}-{value[1:]}')
      elif key != href:  # an image's href holds its data
        value = REFERENCE.sub(rf'url(#{prefix}-\1)', value)
        value = FAMILY.sub('', value) if key == 'style' else value
        element.set(key, value.replace(INK, 'currentColor'))
  width, height = (float(number) for number in root.get('viewBox').split()[2:])
  root.attrib.update(
    {
      'width': f'{width * 4 / 3:.0f}',  # points to pixels
      'height': f'{height * 4 / 3:.0f}',
      'role': 'img',
      'aria-label': label,
      'font-family': FONTS,
      'stroke-linejoin': 'round',
    }
  )
  for key, uri in NAMESPACES.items():
    ElementTree.register_namespace(key, uri)
  return ElementTree.tostring(root, encoding='unicode')
