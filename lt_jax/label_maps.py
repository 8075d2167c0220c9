"""Label maps as images: a class for every pixel, in the colours of the data set."""

import io
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from lt_jax import files
from lt_jax.data.palettes import palette
from lt_jax.errors import UserError

OVERLAY = '_overlay.jpg'
"""End of the file name of an overlay: the image with its label map on top."""


def places(paths: Sequence[str], out: str) -> list[pathlib.Path]:
  """Returns the file for the label map of every image: FOLDER/.../NAME.png.

  `out` gets the same subfolders as the common parent folder of all images.

  Args:
    paths: paths of the images.
    out: the folder to write to, which may exist.

  Raises:
    UserError: `out` is not a folder or is a run's, two images would have the same label
      map, or a label map or overlay would replace an image.
  """
  folder = files.absolute(out)
  if folder.exists() and not folder.is_dir():
    raise UserError(f'--out is {out}, but label maps need a folder')
  if folder.exists() and files.is_run(folder):
    raise UserError(f'--out is {out}, which is the folder of a run: give another one')
  every = [pathlib.Path(os.path.abspath(path)) for path in paths]
  base = os.path.commonpath([path.parent for path in every])
  found: dict[pathlib.Path, str] = {}
  for path, absolute in zip(paths, every, strict=True):
    place = pathlib.Path(folder, absolute.relative_to(base)).with_suffix('.png')
    if place in found:
      other = found[place]
      raise UserError(f'{path} and {other} would have the same label map {place}')
    found[place] = path
  for place in found:
    for written in (place, overlay_place(place)):
      if any(written.exists() and written.samefile(path) for path in paths):
        raise UserError(f'--out is {out}, where {written} would replace an image')
  return [*found]


def overlay_place(place: pathlib.Path) -> pathlib.Path:
  """Returns the file for the overlay of a label map."""
  return place.with_name(f'{place.stem}{OVERLAY}')


def write(
  ids: np.ndarray, image: np.ndarray, class_names: Sequence[str], place: pathlib.Path
) -> None:
  """Writes a label map as a palette PNG of class numbers, and an overlay as JPEG.

  Args:
    ids: (h, w) uint8 classes, resized to the image by nearest neighbour.
    image: (H, W) or (H, W, channels) uint8.
    class_names: names of the C classes, which determine the colours.
    place: the file for the PNG; the overlay goes next to it.
  """
  from PIL import Image

  colour = image.ndim == 3 and image.shape[-1] >= 3
  shown = image[..., :3] if colour else image.reshape(image.shape[:2])
  below = Image.fromarray(np.ascontiguousarray(shown)).convert('RGB')
  found = Image.fromarray(ids).resize(below.size, Image.Resampling.NEAREST)
  found.putpalette(palette(class_names).tobytes())
  place.parent.mkdir(parents=True, exist_ok=True)
  for path, picture, kind in (
    (place, found, 'PNG'),
    (overlay_place(place), Image.blend(below, found.convert('RGB'), 0.5), 'JPEG'),
  ):
    encoded = io.BytesIO()
    picture.save(encoded, kind)
    files.write_atomically(path, encoded.getvalue())


def legend(class_names: Sequence[str]) -> Iterator[str]:
  """Yields the number, name and colour of every class."""
  for number, (name, colour) in enumerate(
    zip(class_names, palette(class_names), strict=True)
  ):
    yield '{} {} #{:02x}{:02x}{:02x}'.format(number, name, *colour)
