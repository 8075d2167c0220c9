r"""State paths that had other names in older versions of the library.

An optimiser used to have one state for all its players, in `opt.net`; now each player
has its own:

| path now                           | path before                            |
|------------------------------------|----------------------------------------|
| `opt.PLAYER.inner_state.FIELD.*`   | `opt.net.inner_state.FIELD.PLAYER.*`   |
| `opt.PLAYER.inner_state.count`     | `opt.net.inner_state.count`            |

FIELD is `trace`, `mu` or `nu`. `weight_net` is not in the table, because the weight
network of Meta-Weight-Net has always had its own optimiser.
"""

import re

_OWN = r'opt\.(?!weight_net\.)([^.]+)\.inner_state'

RENAMED = (
  (rf'{_OWN}\.(trace|mu|nu)(\..+)?', r'opt.net.inner_state.\2.\1\3'),
  (rf'{_OWN}\.count', 'opt.net.inner_state.count'),
)
"""Rules (pattern of a whole path now, its path before)."""


def old_path(path: str) -> str:
  """Returns the path that an array of a State had before; for most it is the same.

  Args:
    path: today's path, joined by dots: 'opt.net.inner_state.trace.head.bias'.
  """
  for pattern, before in RENAMED:
    match = re.fullmatch(pattern, path)
    if match:
      return match.expand(before)
  return path
