"""Errors that are the user's to mend, and the names the user may type."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar('T')


class UserError(ValueError):
  """A mistake in what the user gave, told in one line; the command exits with 2.

  Raise it for configurations, data and files, naming the file, key or class at
  fault. A broken invariant of our own is an `AssertionError` or plain `ValueError`.
  """


def suggest(name: str, known: Iterable[str]) -> str:
  """Returns "; did you mean X?" for a near miss, else the list of known names."""
  known = [str(k) for k in known]
  near = difflib.get_close_matches(name, known, n=1)
  return f'; did you mean {near[0]!r}?' if near else f'; known: {", ".join(known)}'


def lookup(table: Mapping[str, T], kind: str, name: str) -> T:
  """Returns `table[name]`, or raises a `UserError` with the near miss.

  Args:
    table: the dict literal of a family, such as `LOSSES`.
    kind: what the family is, for the message, such as "loss".
    name: the name the user gave.
  """
  try:
    return table[name]
  except KeyError:
    raise UserError(f'unknown {kind} {name!r}{suggest(name, table)}') from None
