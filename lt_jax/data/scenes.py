"""Street scenes: a synthetic pair of domains, and more, with a class for every pixel.

Use them to try segmentation and its adaptation without a download. A layout of 64 x 64
pixels (sky, road, buildings, trees, and, rarely, cars, poles and persons) is drawn at
random; each domain renders layouts in its own style. The source, `sim`, has the flat
colours of an old game; `real` has other colours, textures, shadows, haze and noise;
`fog`, `night` and `rain` can form a compound target, and `snow` an open domain.

We made these ourselves. Their numbers compare methods with each other, never with
Cityscapes.
"""

import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lt_jax.data.masks import VOID, LabelledArrays
from lt_jax.errors import UserError, lookup, suggest

SIDE = 64
"""Height and width of an image in pixels."""

CLASSES = ('sky', 'road', 'building', 'vegetation', 'car', 'pole', 'person')
SKY, ROAD, BUILDING, VEGETATION, CAR, POLE, PERSON = range(len(CLASSES))

SPLITS = {'train': 2000, 'val': 100, 'test': 300}
"""Images per domain, unless its name gives the number of training images."""

SEED = 0
"""Seed of all layouts and renderings; it is part of the data set."""

CHUNK = 50
"""Images drawn at a time, even if fewer are needed, so an image does not depend on how
many there are."""

ROWS = np.arange(SIDE, dtype=np.float32)[None, :, None]
COLUMNS = np.arange(SIDE, dtype=np.float32)[None, None, :]


class Options(NamedTuple):
  """Options of a domain, after its name: `real,train=500,tail=4`.

  Attributes:
    train: number of training images.
    tail: training images keep one in `tail` of their cars, poles and persons.
    layout: how far layouts differ from those of the source, from 0 to 1: the camera is
      higher, and there are fewer buildings and more trees.
    style: how far `real` and similar domains differ from flat colours, from 0 to 1.
    border: width in pixels of void borders between classes, 0 or 1.
  """

  train: int = SPLITS['train']
  tail: float = 1.0
  layout: float = 0.0
  style: float = 0.7
  border: int = 0


RANGES = {
  'train': (1, 1e6),
  'tail': (1, 1e6),
  'layout': (0, 1),
  'style': (0, 1),
  'border': (0, 1),
}


def scenes(argument: str, data_dir: str | None = None) -> dict[str, LabelledArrays]:
  """Returns a domain of street scenes.

  All domains with the same `layout` have the same test layouts, so they only differ in
  the rendering. No two domains share training layouts.

  Args:
    argument: a key of `RENDERINGS`, optionally with `Options`: 'sim,train=500,tail=4'.
    data_dir: not used.

  Returns:
    'train', 'val' and 'test' -> images (N, 64, 64, 3) uint8 and their label maps, in
    memory.

  Raises:
    UserError: an unknown domain or option, or a value out of range.
  """
  domain, *given = argument.split(',')
  render = lookup(RENDERINGS, 'domain of scenes', domain)
  options = _options(given, argument)
  sources = {}
  for split, size in (SPLITS | {'train': options.train}).items():
    purpose = split if split == 'test' else f'{domain}/{split}'
    tail = options.tail if split == 'train' else 1.0
    images = np.empty((size, SIDE, SIDE, 3), np.uint8)
    maps = np.empty((size, SIDE, SIDE), np.uint8)
    for first in range(0, size, CHUNK):
      draw = _generator(purpose, 'layout', first)
      drawn, horizon = layouts(draw, CHUNK, tail, options.layout)
      look = _generator(f'{domain}/{split}', 'look', first)
      part = slice(first, first + CHUNK)
      maps[part] = drawn[: size - first]
      images[part] = render(look, drawn, horizon, options.style)[: size - first]
    if options.border:
      maps[_borders(maps)] = VOID
    sources[split] = LabelledArrays(images, maps, CLASSES)
  return sources


def _options(given: list[str], argument: str) -> Options:
  """Returns options from texts such as 'train=500'."""
  found = {}
  for part in given:
    name, _, text = part.partition('=')
    if name not in Options._fields:
      raise UserError(
        f'scenes:{argument}: unknown option {name!r}{suggest(name, Options._fields)}'
      )
    kind, (least, most) = type(Options._field_defaults[name]), RANGES[name]
    try:
      value = kind(text)
    except ValueError:
      value = np.nan
    if not least <= value <= most:
      raise UserError(
        f'scenes:{argument}: {name} is {text!r}; it must be from {least:g} to {most:g}'
      )
    found[name] = value
  return Options(**found)


def _generator(purpose: str, what: str, first: int) -> np.random.Generator:
  """Returns the generator of random numbers for a chunk of images."""
  return np.random.default_rng((SEED, zlib.crc32(f'{purpose} {what}'.encode()), first))


def _borders(maps: np.ndarray) -> np.ndarray:
  """Returns which pixels have a neighbour of another class to the right or below."""
  border = np.zeros(maps.shape, bool)
  border[:, :-1] |= maps[:, :-1] != maps[:, 1:]
  border[:, :, :-1] |= maps[:, :, :-1] != maps[:, :, 1:]
  return border


def layouts(
  draw: np.random.Generator, size: int, tail: float, shift: float
) -> tuple[np.ndarray, np.ndarray]:
  """Draws layouts, from far things to near ones.

  Args:
    draw: random numbers.
    size: number of layouts.
    tail: see `Options`.
    shift: `Options.layout`.

  Returns:
    (maps (size, 64, 64) uint8, the rows of their horizons (size, 1, 1)).
  """

  def uniform(low: float, high: float) -> np.ndarray:
    return low + (high - low) * draw.random((size, 1, 1), np.float32)

  horizon = uniform(20, 28) - 8 * shift
  middle = uniform(22, 42)  # column of the vanishing point
  maps = np.where(horizon > ROWS, SKY, VEGETATION)
  maps = np.broadcast_to(maps, (size, SIDE, SIDE)).astype(np.uint8)
  depth = np.clip((ROWS - horizon) / (SIDE - horizon), 0, 1)  # 1 is nearest
  near = uniform(24, 34)  # half the width of the road at the lower edge
  road = np.abs(COLUMNS - middle - depth * uniform(-8, 8)) <= 1 + near * depth
  maps[road & (horizon <= ROWS)] = ROAD

  def paint(what: int, mask: np.ndarray, chance: float) -> None:
    maps[mask & (uniform(0, 1) < chance)] = what

  for _ in range(6):
    left, width = uniform(-8, 60), uniform(6, 20)
    top = horizon - uniform(5, 18)
    inside = (left <= COLUMNS) & (left + width > COLUMNS) & (top <= ROWS)
    paint(BUILDING, inside & (horizon + 1 > ROWS), 0.8 - 0.4 * shift)
  for _ in range(4):
    column, radius = uniform(0, 64), uniform(3, 8)
    row = horizon - uniform(-1, 5)
    blob = (COLUMNS - column) ** 2 + (1.4 * (ROWS - row)) ** 2 <= radius**2
    paint(VEGETATION, blob, 0.5 + 0.3 * shift)
  for _ in range(3):
    foot = horizon + uniform(0.1, 0.9) * (SIDE - horizon)
    scale = (foot - horizon) / (SIDE - horizon)
    side = np.where(uniform(0, 1) < 0.5, -1, 1)
    column = middle + side * (2 + 1.05 * near * scale)
    rows = (foot - 34 * scale - 4 <= ROWS) & (foot > ROWS)
    across = COLUMNS - column
    paint(POLE, rows & (across >= 0) & (across < 1 + (scale > 0.4)), 0.8 / tail)
  for _ in range(3):
    foot = horizon + uniform(0.15, 0.95) * (SIDE - horizon)
    scale = (foot - horizon) / (SIDE - horizon)
    column = middle + uniform(-1, 1) * 0.8 * near * scale
    across, up = np.abs(COLUMNS - column), foot - ROWS
    wide, high = 2 + 9 * scale, 2 + 9 * scale
    body = (across <= wide) & (up > 0) & (up <= 0.65 * high)
    roof = (across <= 0.6 * wide) & (up > 0) & (up <= high)
    paint(CAR, body | roof, 0.6 / tail)
  for _ in range(4):
    foot = horizon + uniform(0.1, 0.8) * (SIDE - horizon)
    scale = (foot - horizon) / (SIDE - horizon)
    column, high = uniform(2, 62), 3 + 14 * scale
    across, up = COLUMNS - column, foot - ROWS
    body = (across / (0.17 * high)) ** 2 + ((up - 0.4 * high) / (0.4 * high)) ** 2 <= 1
    head = across**2 + (up - 0.88 * high) ** 2 <= (0.14 * high) ** 2
    paint(PERSON, body | head, 0.6 / tail)
  return maps, horizon


# Renderings: (random numbers, maps (N, 64, 64), horizons (N, 1, 1), style) -> images
# (N, 64, 64, 3) uint8. Colours are on the scale where white is 1.

FLAT = np.array(
  [
    (0.45, 0.65, 0.95),
    (0.40, 0.40, 0.42),
    (0.65, 0.40, 0.30),
    (0.20, 0.60, 0.20),
    (0.80, 0.10, 0.15),
    (0.85, 0.85, 0.30),
    (0.90, 0.55, 0.70),
  ],
  np.float32,
)
"""Colours of the classes in the source."""

REAL = np.array(
  [
    (0.75, 0.77, 0.80),
    (0.33, 0.31, 0.30),
    (0.52, 0.49, 0.44),
    (0.27, 0.33, 0.17),
    (0.25, 0.28, 0.38),
    (0.45, 0.45, 0.46),
    (0.38, 0.27, 0.24),
  ],
  np.float32,
)
"""Colours in `real` at a style of 1; each image varies them."""

TEXTURE = np.array([0.05, 0.08, 0.20, 0.30, 0.12, 0.05, 0.15], np.float32)
"""Contrast of the texture of each class at a style of 1."""


def _images(colours: np.ndarray) -> np.ndarray:
  return np.rint(255 * np.clip(colours, 0, 1)).astype(np.uint8)


def _normal(look: np.random.Generator, *shape: int) -> np.ndarray:
  return look.standard_normal(shape, np.float32)


def sim(
  look: np.random.Generator, maps: np.ndarray, horizon: np.ndarray, style: float
) -> np.ndarray:
  """Returns flat colours and a little noise."""
  del horizon, style
  return _images(FLAT[maps] + 0.015 * _normal(look, *maps.shape, 3))


def _clouds(look: np.random.Generator, number: int) -> np.ndarray:
  """Returns (N, 64, 64) noise whose amplitude falls with the frequency, deviation 1."""
  total = np.zeros((number, SIDE, SIDE), np.float32)
  for side in (4, 8, 16, 32, 64):
    coarse = _normal(look, number, side, side) / side
    total += coarse.repeat(SIDE // side, 1).repeat(SIDE // side, 2)
  return total / math.sqrt(sum(1 / side**2 for side in (4, 8, 16, 32, 64)))


def _lit(
  look: np.random.Generator, maps: np.ndarray, horizon: np.ndarray, style: float
) -> np.ndarray:
  """Returns colours (N, 64, 64, 3) in daylight, before haze and noise."""
  number = len(maps)
  palette = (1 - style) * FLAT + style * REAL
  palette = palette[None] + 0.08 * style * _normal(look, number, len(CLASSES), 3)
  colours = palette[np.arange(number)[:, None, None], maps]
  texture = style * TEXTURE[maps] * _clouds(look, number)
  slope = 0.25 * style * _normal(look, number, 1, 1) * (COLUMNS / SIDE - 0.5)
  start, width = SIDE * look.random((2, number, 1, 1), np.float32)
  across = COLUMNS + 0.7 * (ROWS - horizon) - start
  shadow = (horizon < ROWS) & (across > 0) & (across < 0.5 * width)
  light = np.where(shadow, 1 - 0.45 * style, 1).astype(np.float32)
  light *= 1 + texture + slope
  return colours * light[..., None]


def _seen(
  look: np.random.Generator, colours: np.ndarray, style: float, noise: float = 0.04
) -> np.ndarray:
  """Returns images as taken by a camera, with gamma, blur and noise."""
  gamma = 1 + 0.4 * style * (look.random((len(colours), 1, 1, 1), np.float32) - 0.5)
  colours = np.clip(colours, 0, 1) ** gamma
  share = 0.15 * style
  for axis in (1, 2):
    sides = np.roll(colours, 1, axis) + np.roll(colours, -1, axis)
    colours = (1 - 2 * share) * colours + share * sides
  return _images(colours + noise * style * _normal(look, *colours.shape))


def _hazy(
  colours: np.ndarray, horizon: np.ndarray, density: float, air: float
) -> np.ndarray:
  """Returns colours seen through haze, which is thicker near the horizon."""
  distance = 1 / (1 + 0.35 * np.maximum(ROWS - horizon, 0))
  clear = np.exp(-density * distance)[..., None]
  return clear * colours + (1 - clear) * air


def real(
  look: np.random.Generator, maps: np.ndarray, horizon: np.ndarray, style: float
) -> np.ndarray:
  """Returns other colours, textures, light and shadow, some haze, blur and noise."""
  colours = _hazy(_lit(look, maps, horizon, style), horizon, 0.5 * style, 0.85)
  return _seen(look, colours, style)


def fog(
  look: np.random.Generator, maps: np.ndarray, horizon: np.ndarray, style: float
) -> np.ndarray:
  """Returns `real` in dense fog."""
  colours = _hazy(_lit(look, maps, horizon, style), horizon, 2.5 * style, 0.8)
  return _seen(look, colours, style)


def night(
  look: np.random.Generator, maps: np.ndarray, horizon: np.ndarray, style: float
) -> np.ndarray:
  """Returns `real` at night: dark and blue, with more noise and with lit windows."""
  colours = _lit(look, maps, horizon, style)
  tint = np.array([0.22, 0.26, 0.42], np.float32)
  colours = colours * (1 - style * (1 - tint))
  windows = (maps == BUILDING) & (look.random(maps.shape, np.float32) < 0.08 * style)
  colours[windows] = (0.9, 0.8, 0.4)
  return _seen(look, colours, style, noise=0.07)


def rain(
  look: np.random.Generator, maps: np.ndarray, horizon: np.ndarray, style: float
) -> np.ndarray:
  """Returns `real` in rain: grey, with slanting streaks."""
  colours = _lit(look, maps, horizon, style)
  grey = colours.mean(-1, keepdims=True)
  colours = _hazy(colours + 0.7 * style * (grey - colours), horizon, style, 0.6)
  drops = (look.random(maps.shape, np.float32) < 0.012).astype(np.float32)
  streaks = sum(np.roll(drops, (k, -k // 2), (1, 2)) for k in range(6))
  return _seen(look, colours + 0.3 * style * np.minimum(streaks, 1)[..., None], style)


def snow(
  look: np.random.Generator, maps: np.ndarray, horizon: np.ndarray, style: float
) -> np.ndarray:
  """Returns `real` in snow: white on the ground and on trees, and in the air."""
  colours = _lit(look, maps, horizon, style)
  ground = np.isin(maps, (ROAD, VEGETATION))
  white = np.where(ground, 0.75 + 0.15 * _clouds(look, len(maps)), 0)
  colours = colours + style * np.clip(white, 0, 1)[..., None] * (0.93 - colours)
  flakes = look.random(maps.shape, np.float32) < 0.03
  colours[flakes] += style * (0.95 - colours[flakes])
  return _seen(look, _hazy(colours, horizon, 0.8 * style, 0.85), style)


RENDERINGS: dict[str, Callable[..., np.ndarray]] = {
  'sim': sim,
  'real': real,
  'fog': fog,
  'night': night,
  'rain': rain,
  'snow': snow,
}
