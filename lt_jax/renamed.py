r"""State paths that had other names in older versions of the library.

An optimiser once had one state for all the players that it moved, in `opt.net`; now
each player has its own:

| path now                           | path before                            |
|------------------------------------|----------------------------------------|
| `opt.PLAYER.inner_state.FIELD.*`   | `opt.net.inner_state.FIELD.PLAYER.*`   |
| `opt.PLAYER.inner_state.count`     | `opt.net.inner_state.count`            |

FIELD is `trace`, `mu` or `nu`. `weight_net` is not in the table: the weight network of
Meta-Weight-Net has always had an optimiser of its own.
"""

import re

_OWN = r'opt\.(?!weight_net\.)([^.]+)\.inner_state'

RENAMED = (
  (rf'{_OWN}\.(trace|mu|nu)(\..+)?', r'opt.net.inner_state.\2.\1\3'),
  (rf'{_OWN}\.count', 'opt.net.inner_state.count'),
)
"""Rules (pattern of a whole path now, its path before)."""


def old_path(path: str) -> str:
  """Returns the path that an array of a State had before; most are the same.

  Args:
    path: of today, joined by dots: 'opt.net.inner_state.trace.head.bias'.
  """
  for pattern, before in RENAMED:
    match = re.fullmatch(pattern, path)
    if match:
      return match.expand(before)
  return path
