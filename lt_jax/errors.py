"""Errors that users can fix, and checks of the names and options they type."""

import contextlib
import difflib
import inspect
import numbers
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar('T')

WRONG_INPUT, DIVERGED, TRY_AGAIN, INTERRUPTED, PREEMPTED = 2, 3, 75, 130, 143
"""Exit codes of a command, see `lt_jax.commands`."""

MOST_SUGGESTED = 6
"""How many names a message suggests at most."""

MOST_LISTED, LISTED = 60, 12
"""A message lists up to so many known names; of more, only the first few."""


class UserError(ValueError):
  """A mistake in the user's input, reported in one line; the command exits with 2.

  Raise it for mistakes in configs, data and files, and name the file, key or class at
  fault. A broken invariant of our own is an `AssertionError` or plain `ValueError`.
  """


class ClassError(UserError):
  """A mistake in one class, known by its number until `class_names` adds its name."""

  def __init__(self, before: str, label: int, after: str):
    """Makes the message 'BEFORE class 3 AFTER'."""
    self._parts = before, int(label), after
    super().__init__(self.named(()))

  def named(self, names: Sequence[str]) -> str:
    """Returns the message with the class's name, too."""
    before, label, after = self._parts
    return f'{before}{named_class(label, names)}{after}'


@contextlib.contextmanager
def class_names(names: Sequence[str]) -> Iterator[None]:
  """Adds the name of the class to every `ClassError` raised inside."""
  try:
    yield
  except ClassError as error:
    raise UserError(error.named(names)) from error


def one_line(text: object) -> str:
  """Joins the lines of a text; other white space stays, as it may be in a path."""
  return re.sub(r'\s*[\r\n]\s*', ' ', str(text).strip('\r\n'))


def suggest(name: str, known: Iterable[str]) -> str:
  """Returns "; did you mean X?" for a near miss, else a list of known names.

  Prefers names that start with what was typed, then the most similar name, then names
  that contain it. Ignores case.
  """
  known = [str(k) for k in known]
  typed, folded = str(name).casefold(), {k.casefold(): k for k in known}
  near = [k for k in known if k.casefold().startswith(typed)]
  if not 1 <= len(near) <= MOST_SUGGESTED:
    near = [folded[k] for k in difflib.get_close_matches(typed, folded, n=1)]
  if not near and len(typed) > 3:
    near = [k for k in known if typed in k.casefold()][:MOST_SUGGESTED]
  if near:
    *others, last = map(repr, near)
    return f'; did you mean {", ".join(others)}{" or " * bool(others)}{last}?'
  if len(known) > MOST_LISTED:
    return f'; known: {", ".join(known[:LISTED])} and {len(known) - LISTED} more'
  return f'; known: {", ".join(known)}' if known else ''


def named_class(label: int, names: Sequence[str]) -> str:
  """Returns "class 3 ('cat')", or "class 3" if the name is only the number."""
  name = names[label] if label < len(names) else str(label)
  return f'class {label}' + (f' ({name!r})' if name != str(label) else '')


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


KINDS = {
  bool: (bool, 'True or False'),
  int: (numbers.Integral, 'a whole number'),
  float: (numbers.Real, 'a number'),
  str: (str, 'a string'),
}
"""Annotation of an option -> (the type its value must have, that type in words)."""


def _check_kind(what: str, value: Any, annotation: Any) -> None:
  """Raises a `UserError` if a value is not of the annotated type."""
  if typing.get_origin(annotation) is Sequence:
    (inner,) = typing.get_args(annotation)
    if not isinstance(value, list | tuple):
      raise UserError(f'{what} is {value!r}; it must be a list')
    for one in value:
      _check_kind(f'{what}: an element', one, inner)
    return
  kind, must_be = KINDS.get(annotation, (object, ''))
  is_number = kind in (numbers.Integral, numbers.Real)
  if not isinstance(value, kind) or (is_number and isinstance(value, bool)):
    raise UserError(f'{what} is {value!r}; it must be {must_be}')


def check_options(
  what: str, function: Callable, options: Mapping[str, Any], *given: str
) -> None:
  """Raises a `UserError` unless the options fit the signature of a function.

  Args:
    what: what the function is, for the message, such as "loss 'ldam'".
    function: what will be called with the options.
    options: what the user wrote.
    *given: names of the parameters that the user cannot set.

  Raises:
    UserError: an option is unknown (the message suggests a near miss), missing, or of
      the wrong type.
  """
  parameters = inspect.signature(function).parameters
  known = [name for name in parameters if name not in given]
  for name in options:
    if name not in known:
      near = suggest(name, known) if known else '; it takes none'
      raise UserError(f'{what} has no option {name!r}{near}')
    _check_kind(f'{what}: {name}', options[name], parameters[name].annotation)
  for name in known:
    if parameters[name].default is inspect.Parameter.empty and name not in options:
      raise UserError(f'{what} needs the option {name!r}')


def construct(
  table: Mapping[str, Callable[..., T]],
  kind: str,
  name: str,
  *args: Any,
  options: Mapping[str, Any],
  **context: Any,
) -> T:
  """Calls a factory by its name with the user's options.

  Args:
    table: the dict literal of a family.
    kind: what the family is, for messages.
    name: the name the user gave.
    *args: its first arguments.
    options: what the user wrote; checked against the factory's signature.
    **context: values that a factory may ask for, such as `counts`; it gets those that
      it names among its parameters.

  Raises:
    UserError: the name or an option is unknown, or an option is missing.
  """
  factory = lookup(table, kind, name)
  parameters = list(inspect.signature(factory).parameters)
  given = {key: value for key, value in context.items() if key in parameters}
  what = f'{kind} {name!r}'
  check_options(what, factory, options, *parameters[: len(args)], *context)
  return factory(*args, **given, **options)
