"""Images on the page: as data URIs, with label maps in the colours of their classes."""

import base64
import io

import numpy as np

from lt_jax.data.masks import VOID
from lt_jax.data.palettes import palette
from lt_jax.report.drawing import OTHER_CONTENTS
from lt_jax.report.runs import NoData, Run, printable

THUMBNAIL = 256
"""Longest side of a label map in pixels; other images have half of it."""

SHOWN = ('image', 'label', 'prediction', 'entropy')


def rows(run: Run) -> list[dict[str, object]]:
  """Returns one row per test image: the image, its labels, the prediction and entropy.

  Returns:
    rows of 'images', each with 'uri' and 'caption'; none if the run's task
    has no label maps or samples.npz is missing or damaged.
  """
  if run.task.picture is None:
    return []
  try:
    stored, found = run.arrays('samples.npz'), []
    colours = _colours(run)
    splits = [name.removesuffix('/image') for name in stored if name.endswith('/image')]
    for split in splits:
      for i in range(len(stored[f'{split}/image'])):
        images = {name: stored[f'{split}/{name}'][i] for name in SHOWN}
        for name in ('label', 'prediction'):
          images[name] = colours[images[name]]
        images['entropy'] = np.repeat(images['entropy'][..., None], 3, axis=2)
        domain = printable(split.removesuffix('test').rstrip('/') or 'target')
        shown = [
          {'uri': uri(image, THUMBNAIL), 'caption': f'{domain}: {name}'}
          for name, image in images.items()
        ]
        found.append({'images': shown})
    return found
  except (NoData, OSError, *OTHER_CONTENTS):
    return []


def legend(run: Run) -> list[dict[str, str]]:
  """Returns the name of each class and its colour in HTML notation."""
  if run.task.picture is None:
    return []
  colours = _colours(run)
  return [
    {'name': name, 'value': '#{:02x}{:02x}{:02x}'.format(*colours[number])}
    for number, name in enumerate(run.class_names)
  ]


def _colours(run: Run) -> np.ndarray:
  """Returns (256, 3) uint8: the colour of each id; void is black."""
  known = palette(run.data.get('class_names', ()))
  return np.concatenate([known, np.zeros((VOID + 1 - len(known), 3), np.uint8)])


def uri(pixels: np.ndarray, side: int = THUMBNAIL // 2) -> str:
  """Returns an image (H, W, channels) uint8 as a data URI, shrunk to a thumbnail.

  The alpha channel of RGBA is dropped. Unless there are 3 or 4 channels, the first is
  shown.

  Args:
    pixels: the image.
    side: the longest side it may have, in pixels.
  """
  from PIL import Image

  colour = pixels.shape[-1] in (3, 4)
  image = Image.fromarray(
    np.ascontiguousarray(pixels[..., :3] if colour else pixels[..., 0])
  )
  image.thumbnail((side, side))
  kind = 'png' if max(image.size) <= side // 2 else 'jpeg'
  buffer = io.BytesIO()
  image.save(buffer, format=kind)
  return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'
