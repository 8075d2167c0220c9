"""How many images to set aside for splits that a user's images lack."""

import numpy as np

from lt_jax.config import Overrides
from lt_jax.data.sources import load_source
from lt_jax.errors import UserError

MOST_CUT = 20
"""Images of a class that are cut off at most, for validation and for testing."""


def cut(source: str, data_dir: str) -> Overrides:
  """Returns how many images a class are cut off, where a split is not there.

  Raises:
    UserError: the smallest class cannot spare any.
  """
  splits = load_source(source, data_dir or None)
  counts = np.bincount(splits['train'].labels)
  smallest, missing = counts.min(), [n for n in ('val', 'test') if n not in splits]
  if smallest <= len(missing):
    name = splits['train'].class_names[counts.argmin()]
    raise UserError(
      f'class {name!r} has {smallest} images, of which none can be cut off for '
      f'{" and ".join(missing)}: give it more, or make these splits yourself'
    )
  share = int(max(1, min(MOST_CUT, smallest // 5)))
  return {f'{name}_per_class': share for name in missing}
