"""Makes the process keep the memory of a training step for the next one.

XLA:CPU allocates the arrays of a step and frees them at its end. By default glibc
returns them to the kernel, and the next step touches tens of thousands of fresh pages.
"""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import Any

LEAST_PIXELS = 2**16
SMALL_TRUNKS = ('digits_cnn', 'tiny_cnn')
"""Steps with fewer pixels, or of these networks, are left alone.

They are so short that their threads would mostly wait for the single heap.
"""

SETTINGS = {
  -8: 1,  # M_ARENA_MAX: threads share one heap; heaps of their own would not keep pages
  -4: 0,  # M_MMAP_MAX: large arrays come from that heap too
  -1: 2**31 - 1,  # M_TRIM_THRESHOLD: free memory at its end is not returned
}
"""Parameter of mallopt, as numbered in glibc's malloc.h -> value."""


def keep_pages(config: Mapping[str, Any]) -> bool:
  """Makes glibc keep what a step frees, if that makes training faster.

  It does on a CPU, under Linux with glibc, for large steps. Otherwise, or if the user
  has set MALLOC_ARENA_MAX, this changes nothing. Only commands call this, because it
  affects the whole process. They call it before JAX uses a device, since its threads
  would keep heaps of their own, and if possible before JAX is imported, which already
  leaves one.

  Args:
    config: the config, resolved or not.

  Returns:
    Whether glibc was changed.
  """
  mallopt = _mallopt()
  large = pixels(config) >= LEAST_PIXELS
  large = large and config['model']['trunk'] not in SMALL_TRUNKS
  chosen = 'MALLOC_ARENA_MAX' in os.environ
  if mallopt is None or chosen or not (large and _cpu_is_next()):
    return False
  return all([mallopt(parameter, value) for parameter, value in SETTINGS.items()])


def pixels(config: Mapping[str, Any]) -> int:
  """Returns the number of pixels in a batch, as far as the config says.

  Args:
    config: has the size of images in `data.image_size` if they have many sizes, else in
      `data.fake.image_size`, for the generated images that replace them in plans.
  """
  data = config['data']
  side = data['image_size'] or data['fake']['image_size']
  return config['batch'] * side**2


def _mallopt() -> Any:
  """Returns glibc's mallopt; None without glibc."""
  if not sys.platform.startswith('linux'):
    return None
  process = ctypes.CDLL(None)
  return process.mallopt if hasattr(process, 'gnu_get_libc_version') else None


def _cpu_is_next() -> bool:
  """Returns whether JAX will run on the CPU, without asking JAX, which would start it.

  If JAX is free to choose, an installed plugin counts as a device other than the CPU.
  """
  platforms = os.environ.get('JAX_PLATFORMS')
  if platforms:
    return platforms.split(',')[0] == 'cpu'
  return not any(map(importlib.util.find_spec, ('jax_plugins', 'libtpu')))
