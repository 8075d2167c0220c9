"""Checks before a long run, section by section.

A check is a generator (Case) -> findings. It raises `CheckSkipped` if an earlier check
failed to provide what it needs. To add a check, write it and add it to `SECTIONS`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import jax

from lt_jax.doctor.case import (
  Case,
  CheckSkipped,
  Finding,
  Findings,
  one_line,
  skip,
  wrong,
)
from lt_jax.doctor.data import (
  balanced_test,
  classes,
  constant,
  duplicates,
  normalisation,
  readable,
  shots,
  sizes,
  splits,
  tail,
)
from lt_jax.doctor.domains import described, gap, shared
from lt_jax.doctor.machine import (
  accelerators,
  begun,
  cores,
  file_system,
  idle_devices,
  shared_memory,
  space,
  versions,
  writable,
)
from lt_jax.doctor.step import (
  by_heart,
  compiles,
  decoding,
  evaluates,
  learns,
  loss_at_start,
  memory,
  one_step,
)
from lt_jax.errors import UserError

Check = Callable[[Case], Findings]

SECTIONS: dict[str, tuple[Check, ...]] = {
  'machine': (versions, accelerators, cores),
  'configuration': (Case.open, idle_devices),
  'folder': (writable, file_system, begun, space),
  'data': (splits, readable, duplicates, classes, tail, shots, balanced_test),
  'images': (normalisation, constant, sizes),
  'domains': (described, gap, shared),
  'one step': (compiles, one_step, evaluates, loss_at_start, learns, by_heart),
  'what it takes': (memory, shared_memory, decoding),
}
"""The checks in order: later ones use what earlier ones provide."""


def examine(
  case: Case, sections: Mapping[str, Sequence[Check]] = SECTIONS
) -> Iterator[tuple[str, Finding]]:
  """Yields (section, finding) as checks make them.

  An error in a check becomes a finding and does not stop the other checks.
  """
  for section, checks in sections.items():
    for check in checks:
      try:
        for finding in check(case):
          yield section, finding
      except CheckSkipped as missing:
        yield section, skip(f'{check.__name__.replace("_", " ")}: {missing}')
      except (UserError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        yield section, wrong(one_line(error))
