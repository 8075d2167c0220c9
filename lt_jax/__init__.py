"""Long-tailed, open-ended and cross-domain image recognition in JAX/Flax."""

__version__ = '0.1.0'

from typing import Any

_FROM_PYTHON = ('fit', 'load', 'show')


def __getattr__(name: str) -> Any:
  """Imports `fit`, `load` and `show` on first use, since that imports JAX."""
  if name not in _FROM_PYTHON:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from lt_jax import notebook

  return getattr(notebook, name)
