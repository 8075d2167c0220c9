"""Figures of what `lt_jax.inside` found in a run, image by image."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lt_jax.report.drawing import COLOURS, INK, Drawn, log_counts, plot, shortened
from lt_jax.report.figures import plane_of
from lt_jax.report.runs import Run


def show(axes: Axes, pixels: np.ndarray, title: str = '', **style) -> None:
  """Draws an image (H, W, channels) or a map (H, W) without axes."""
  colour = pixels.ndim == 3 and pixels.shape[-1] in (3, 4)
  flat = pixels if colour or pixels.ndim == 2 else pixels[..., 0]
  if not colour:
    style = {'cmap': 'gray', **style}
  axes.imshow(flat, interpolation='nearest', **style)
  axes.set(xticks=[], yticks=[])
  axes.set_title(title, fontsize=8)
  axes.grid(visible=False)
  for spine in axes.spines.values():
    spine.set_visible(False)


def example_epsilons(runs: Sequence[Run]) -> Drawn:
  """Draws the epsilon of every image by class, and the images at both ends."""
  run = runs[0]
  stored = run.arrays('epsilons.npz')
  label, epsilon, prior = (stored[name] for name in ('label', 'epsilon', 'prior'))
  shown, images = stored['shown'], stored['image']
  half = (len(shown) + 1) // 2
  figure = Figure(figsize=(9, 5.6), layout='constrained')
  grid = figure.add_gridspec(3, max(half, 2), height_ratios=(2.4, 1, 1))
  cut = max(half, 2) // 2
  left, right = figure.add_subplot(grid[0, :cut]), figure.add_subplot(grid[0, cut:])
  counts = run.counts
  jitter = 1 + 0.1 * np.random.default_rng(0).uniform(-1, 1, len(label))
  left.axhline(0, color=INK, linewidth=0.8)
  left.plot(counts[label] * jitter, epsilon, '.', color=COLOURS['few'], alpha=0.5)
  left.ticklabel_format(axis='y', style='sci', scilimits=(-2, 3), useMathText=False)
  right.plot(counts[label], prior, 'o', color=COLOURS['many'], markersize=4)
  for axes, name in ((left, 'epsilon of an image'), (right, 'weight w')):
    log_counts(axes)
    axes.set_ylabel(name)
    axes.grid()
  for line, places in enumerate((range(half), range(half, len(shown)))):
    for column, place in enumerate(places):
      name = shortened(run.class_names[label[shown[place]]])
      title = f'{name}\n{epsilon[shown[place]]:+.1e}'
      show(figure.add_subplot(grid[1 + line, column]), images[place], title)
  return figure, (
    f'What the next step would add to the class weight of {len(label)} training images '
    '(left), and that class weight (right). Below: the images with the largest epsilon '
    '(upper row) and the smallest, each with its class.'
  )


def feature_maps(runs: Sequence[Run]) -> Drawn:
  """Draws test images, the plain network's map, the modulated map and attention."""
  run = runs[0]
  stored = run.arrays('feature_maps.npz')
  columns = ('image', 'plain', 'modulated', 'attention')
  count = len(stored['image'])
  figure, axes = plot(count, 4, size=(5.6, 1.3 * count), squeeze=False)
  for row in range(count):
    names = [
      shortened(run.class_names[int(stored[name][row])])
      for name in ('label', 'plain_prediction', 'prediction')
    ]
    titles = [f'{column}: {name}' for column, name in zip(columns, names, strict=False)]
    maps = [stored[name][row] for name in columns]
    # One scale for both networks, so that what attention adds can be seen.
    most = max(float(maps[1].max()), float(maps[2].max()))
    show(axes[row, 0], maps[0], titles[0])
    for column in (1, 2):
      style = {'cmap': 'viridis', 'vmin': 0, 'vmax': most}
      show(axes[row, column], maps[column], titles[column], **style)
    show(axes[row, 3], maps[3], 'attention', cmap='magma', vmin=0)
  return figure, (
    'Test images with their class; the mean magnitude of the features at each pixel in '
    'the plain network and after attention, on one scale, with the prediction of each; '
    'and the share of attention that each pixel gets.'
  )


def embeddings(runs: Sequence[Run]) -> Drawn:
  """Draws direct features beside meta-embeddings, with the memory's centroids."""
  run = runs[0]
  stored = run.arrays('embeddings.npz')
  label = stored['label']
  centroids = stored['centroids'].astype(np.float32)
  figure, panels = plot(1, 2, size=(9, 4.4))
  kinds = {'direct features': 'features', 'meta-embeddings, directions': 'embeddings'}
  for axes, (title, key) in zip(panels, kinds.items(), strict=True):
    points = stored[key].astype(np.float32)
    both = np.concatenate([points, centroids])
    if key == 'embeddings':  # their lengths say how near a centroid is
      both = both / np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-6)
    places, name = plane_of(both)
    for group, mask in run.groups.items():
      chosen = mask[label]
      if chosen.any():
        x, y = places[: len(points)][chosen].T
        colour = COLOURS[group]
        axes.scatter(x, y, s=9, color=colour, alpha=0.7, label=f'{group}-shot')
    x, y = places[len(points) :].T
    axes.plot(x, y, 'P', color=INK, markersize=6, markeredgecolor='#8a8a8a')
    if len(centroids) <= 20:
      for c, place in enumerate(zip(x, y, strict=True)):
        text = shortened(run.class_names[c])
        axes.annotate(text, place, (4, 4), textcoords='offset points')
    axes.set(title=title, xticks=[], yticks=[], xlabel=f'{name} 1', ylabel=f'{name} 2')
  panels[0].legend(loc='best')
  return figure, (
    f'{len(label)} test images: direct features (left) and directions of '
    'meta-embeddings (right), each in a plane of its own. Crosses are the centroids of '
    'the memory, on the right their directions.'
  )


FIGURES: dict[str, tuple[str, Callable[[Sequence[Run]], Drawn]]] = {
  'example_epsilons': ('epsilons.npz', example_epsilons),
  'feature_maps': ('feature_maps.npz', feature_maps),
  'embeddings': ('embeddings.npz', embeddings),
}
"""name -> (the file that it needs, figure of one run)."""
