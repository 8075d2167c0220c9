"""How many images to set aside for splits that the user's data lack."""

import numpy as np

from lt_jax.config import Overrides
from lt_jax.data.sources import load_source
from lt_jax.errors import UserError

MOST_CUT = 20
"""Most images per class to set aside for validation, and for testing."""


def cut(source: str, data_dir: str) -> Overrides:
  """Returns how many images per class to set aside for each missing split.

  Nothing is set aside from images without classes.

  Raises:
    UserError: the smallest class cannot spare any.
  """
  splits = load_source(source, data_dir or None)
  if not splits['train'].class_names:
    return {}
  counts = np.bincount(splits['train'].labels)
  smallest, missing = counts.min(), [n for n in ('val', 'test') if n not in splits]
  if smallest <= len(missing):
    name = splits['train'].class_names[counts.argmin()]
    raise UserError(
      f'class {name!r} has {smallest} images, too few to set any aside for '
      f'{" and ".join(missing)}: give it more, or make these splits yourself'
    )
  share = int(max(1, min(MOST_CUT, smallest // 5)))
  return {f'{name}_per_class': share for name in missing}
