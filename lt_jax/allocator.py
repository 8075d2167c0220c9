"""Keeps the memory of a training step in the process, from one step to the next.

XLA:CPU allocates the arrays of a step and frees them at its end. By default glibc hands
them back to the kernel, and the next step touches tens of thousands of fresh pages.
"""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import Any

LEAST_PIXELS = 2**16
SMALL_TRUNKS = ('digits_cnn', 'tiny_cnn')
"""Steps of fewer pixels, and of these networks, are left alone.

They take so little time that their threads would mostly wait for the one heap.
"""

SETTINGS = {
  -8: 1,  # M_ARENA_MAX: the threads share one heap; in their own, pages are not kept
  -4: 0,  # M_MMAP_MAX: large arrays come from that heap too
  -1: 2**31 - 1,  # M_TRIM_THRESHOLD: what is free at its end is not handed back
}
"""Parameter of mallopt, as malloc.h of glibc numbers it -> value."""


def keep_pages(config: Mapping[str, Any]) -> bool:
  """Has glibc keep what a step frees, where that makes the training faster.

  That is on a CPU, under Linux with glibc, and for large steps; elsewhere nothing
  happens, nor where the user has set MALLOC_ARENA_MAX. Only commands call this, because
  it holds for the whole process. They do so before JAX uses a device, or its threads
  keep heaps of their own, and if they can before it is imported, which leaves one.

  Args:
    config: the configuration, resolved or not.

  Returns:
    Whether it does.
  """
  mallopt = _mallopt()
  large = pixels(config) >= LEAST_PIXELS
  large = large and config['model']['trunk'] not in SMALL_TRUNKS
  chosen = 'MALLOC_ARENA_MAX' in os.environ
  if mallopt is None or chosen or not (large and _cpu_is_next()):
    return False
  return all([mallopt(parameter, value) for parameter, value in SETTINGS.items()])


def pixels(config: Mapping[str, Any]) -> int:
  """Returns the pixels of a batch, as far as the configuration tells.

  Args:
    config: states the size of images as `data.image_size` where they have many sizes,
      and as that of the generated stand-ins where all have one.
  """
  data = config['data']
  side = data['image_size'] or data['fake']['image_size']
  return config['batch'] * side**2


def _mallopt() -> Any:
  """Returns mallopt of glibc; None where there is none."""
  if not sys.platform.startswith('linux'):
    return None
  process = ctypes.CDLL(None)
  return process.mallopt if hasattr(process, 'gnu_get_libc_version') else None


def _cpu_is_next() -> bool:
  """Returns whether JAX will run on the CPU, without asking it, which starts it.

  Where it may choose, an installed plugin for other devices counts as one of them.
  """
  platforms = os.environ.get('JAX_PLATFORMS')
  if platforms:
    return platforms.split(',')[0] == 'cpu'
  return not any(map(importlib.util.find_spec, ('jax_plugins', 'libtpu')))
