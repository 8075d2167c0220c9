"""A source restricted to some of its classes.

`lt_jax.similarity` writes a list of class names for a target; `data.keep_classes` names
that list.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lt_jax.errors import UserError, suggest


class Kept:
  """The images of a source whose classes are kept; see `lt_jax.data.sources`.

  Attributes:
    labels: (N,) int32, among the kept classes; open images keep -1.
    class_names: of the kept classes, in the order of the source.
    image_shape: of the source.
    dtype: of its images.
  """

  def __init__(self, source: Any, rows: np.ndarray, labels: np.ndarray, names):
    self._source, self._rows = source, rows
    self.labels, self.class_names = labels, names
    self.image_shape = source.image_shape
    self.dtype = np.dtype(getattr(source, 'dtype', np.uint8))
    self.name = getattr(source, 'name', '')
    self.passed_over = getattr(source, 'passed_over', ())
    if hasattr(source, 'encoded'):
      self.encoded = lambda row: source.encoded(int(rows[row]))
      self.where = lambda row: source.where(int(rows[row]))

  def __len__(self) -> int:
    """Returns the number of kept images."""
    return len(self._rows)

  def __getitem__(self, row: int) -> np.ndarray:
    """Returns an image."""
    return self._source[int(self._rows[row])]

  def identity(self, rows: np.ndarray) -> bytes | np.ndarray:
    """Returns what a fingerprint uses for the images at `rows`."""
    return self._source.identity(self._rows[rows])


def class_list(text: str) -> tuple[str, ...]:
  """Returns the names of the classes to keep.

  Args:
    text: a file with one name per line, such as keep_classes.txt of
      `lt_jax.similarity`; or the names themselves, joined by +.

  Raises:
    UserError: there is no name, or one occurs twice.
  """
  path = epath.Path(text).expanduser()
  names = text.split('+')
  if path.is_file():
    names = [line.strip() for line in path.read_text().splitlines()]
    names = [line for line in names if line]
  elif text.endswith('.txt'):
    raise UserError(f'data.keep_classes: there is no file {text}')
  if not names or len(set(names)) < len(names):
    raise UserError(f'data.keep_classes: {text} must name classes, each only once')
  return tuple(names)


def keep_classes(
  sources: Mapping[str, Any], names: Sequence[str], name: str
) -> dict[str, Any]:
  """Returns sources with only some of their classes.

  Args:
    sources: split -> source.
    names: names of the classes to keep.
    name: name of the data set, for messages.

  Raises:
    UserError: there is no such class.
  """
  kept = {}
  for split, source in sources.items():
    known = {own: i for i, own in enumerate(source.class_names)}
    if source.labels.max(initial=-1) >= len(known):
      raise UserError(
        f'data.keep_classes cannot be used with {name}, which has a gallery and probes'
      )
    for one in names:
      if one not in known:
        raise UserError(
          f'data.keep_classes: {name} has no class {one!r}{suggest(one, known)}'
        )
    order = [own for own in source.class_names if own in names]
    place = np.full(len(known) + 1, -2, np.int32)  # the last entry is for label -1
    place[-1] = -1
    place[[known[own] for own in order]] = np.arange(len(order))
    labels = place[source.labels]
    rows = np.flatnonzero(labels > -2)
    labels = labels[rows]
    if hasattr(source, 'images'):
      attributes = getattr(source, 'attributes', {})
      kept[split] = dataclasses.replace(
        source,
        images=source.images[rows],
        labels=labels,
        class_names=tuple(order),
        attributes={key: value[rows] for key, value in attributes.items()},
      )
    else:
      kept[split] = Kept(source, rows, labels, tuple(order))
  return kept
