"""Embedded domains: one set of digits, rendered in different ways.

For trying domain adaptation without a download. Half of the 1,797 digits bundled with
scikit-learn are the domain 'source'; all other domains render the other half. So no
digit is in both the source and a target, and the targets differ only in their
rendering.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from lt_jax.data.arrays import Arrays
from lt_jax.data.resizing import resized
from lt_jax.errors import lookup

SIDE = 16
"""Height and width of a rendered image, in pixels."""

SPLITS = {'source': {'train': 600, 'val': 100, 'test': 198}}
TARGET_SPLITS = {'train': 600, 'test': 299}

SEED = 0
"""Seed of the splits and of all renderings: part of the data set."""


def rendered_digits(rendering: str, data_dir: str | None = None) -> dict[str, Any]:
  """Returns a domain of the digits.

  Args:
    rendering: a key of `RENDERINGS`.
    data_dir: not used.

  Returns:
    'train', 'val' (only for 'source') and 'test' -> images (N, 16, 16, 3) uint8 in
    memory.

  Raises:
    UserError: an unknown rendering.
  """
  from sklearn.datasets import load_digits

  render = lookup(RENDERINGS, 'rendering of digits_domains', rendering)
  data = load_digits()
  labels = data.target.astype(np.int32)
  names = tuple(str(name) for name in data.target_names)
  digits = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
  digits = resized(digits, SIDE, SIDE, 3)
  purpose = zlib.crc32(rendering.encode())

  def image(row: int) -> np.ndarray:
    return render(digits[row], np.random.default_rng((SEED, purpose, row)))

  return {
    split: Arrays(np.stack([image(row) for row in rows]), labels[rows], names)
    for split, rows in split_rows(labels, rendering).items()
  }


def split_rows(labels: np.ndarray, rendering: str) -> dict[str, np.ndarray]:
  """Returns the digits in each split of a domain, drawn class by class.

  Args:
    labels: (1797,) int, the labels of all digits.
    rendering: 'source', or any other; the others all have the same digits.

  Returns:
    split -> (N,) positions, in which the classes alternate. Each class has its share of
    every split, to within two images.
  """
  shuffled = np.random.default_rng(SEED).permutation(len(labels))
  by_class = shuffled[np.argsort(labels[shuffled], kind='stable')]
  counts = np.bincount(labels)
  # Each image's place in its class, from 0 to 1. In this order the classes alternate,
  # so that every part of it has a share of each class.
  place = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
  order = by_class[np.argsort(place, kind='stable')]
  half = sum(SPLITS['source'].values())
  order = order[:half] if rendering == 'source' else order[half:]
  sizes = SPLITS.get(rendering, TARGET_SPLITS)
  parts = np.split(order, np.cumsum([*sizes.values()]))
  return dict(zip(sizes, parts, strict=False))


# The renderings: (digit (16, 16, 3) uint8, white on black, generator) -> the same.


def as_it_is(digit: np.ndarray, generator: np.random.Generator) -> np.ndarray:
  """Returns the digit, white on black."""
  return digit


def blended(digit: np.ndarray, generator: np.random.Generator) -> np.ndarray:
  """Returns |digit - patch|, with a random patch of one of two photographs.

  The construction of MNIST-M (Ganin and Lempitsky, ICML 2015, arXiv 1409.7495), which
  uses other digits and the photographs of BSDS500: this is not MNIST-M.
  """
  photographs = _photographs()
  photograph = photographs[generator.integers(len(photographs))]
  row, column = generator.integers(np.array(photograph.shape[:2]) - SIDE + 1)
  patch = photograph[row : row + SIDE, column : column + SIDE]
  # In uint8 a negative difference would wrap around.
  return np.abs(digit.astype(np.int16) - patch).astype(np.uint8)


@functools.cache
def _photographs() -> list[np.ndarray]:
  """Returns china.jpg and flower.jpg of scikit-learn at a quarter of their size.

  (106, 160, 3) uint8 each: at full size, a patch of 16 x 16 pixels is almost a single
  colour.
  """
  from sklearn.datasets import load_sample_images

  return [
    resized(photograph[None], 106, 160, 3)[0]
    for photograph in load_sample_images().images
  ]


def inverted(digit: np.ndarray, generator: np.random.Generator) -> np.ndarray:
  """Returns the digit, black on white."""
  return 255 - digit


def rotated(digit: np.ndarray, generator: np.random.Generator) -> np.ndarray:
  """Returns the digit, turned by 15 to 45 degrees to either side."""
  from PIL import Image

  angle = generator.uniform(15, 45) * generator.choice((-1, 1))
  return np.array(Image.fromarray(digit).rotate(angle, Image.Resampling.BILINEAR))


def noisy(digit: np.ndarray, generator: np.random.Generator) -> np.ndarray:
  """Returns the digit with coloured noise, whose deviation is 80 of 255."""
  seen = digit + generator.normal(0, 80, digit.shape)
  return np.clip(np.rint(seen), 0, 255).astype(np.uint8)


def sketched(digit: np.ndarray, generator: np.random.Generator) -> np.ndarray:
  """Returns the outline of the digit in a random dark colour on light paper."""
  down, across = np.gradient(digit[..., 0].astype(np.float64))
  ink = np.minimum(np.hypot(down, across) / 64, 1)[..., None]
  paper, pen = generator.uniform(200, 255), generator.uniform(0, 120, 3)
  return np.rint(paper + (pen - paper) * ink).astype(np.uint8)


RENDERINGS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
  'source': as_it_is,
  'blended': blended,
  'inverted': inverted,
  'rotated': rotated,
  'noisy': noisy,
  'sketched': sketched,
}
