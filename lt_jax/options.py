"""Options of the functions that a config names, as keys on the command line.

A config lists only the options that it sets; the function may have more. Before
`--config.optimizer.name=adam --config.optimizer.b1=0.8` is applied, in any order,
`prepare` drops SGD's options and adds `b1`, which it finds in Adam's signature.
"""

import ast
import collections.abc
import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from lt_jax.build import WRAPPERS
from lt_jax.class_weights import CLASS_WEIGHTS
from lt_jax.data.samplers import SAMPLERS
from lt_jax.errors import UserError, lookup, suggest
from lt_jax.losses import LOSSES, PENALTIES, make_loss
from lt_jax.losses.alignment import ALIGNMENTS
from lt_jax.methods import METHODS
from lt_jax.models import HEADS, OF_PIXELS, TRUNKS
from lt_jax.optim import OPTIMIZERS
from lt_jax.schedules import SCHEDULES

Table = Mapping[str, Callable | None]

FAMILIES: dict[str, tuple[str, Table]] = {
  'loss': ('loss.name', LOSSES),
  'penalty': ('penalty.name', PENALTIES),
  'alignment': ('alignment.name', ALIGNMENTS),
  'class_weights': ('class_weights.name', CLASS_WEIGHTS),
  'sampler': ('sampler.name', SAMPLERS),
  'optimizer': ('optimizer.name', OPTIMIZERS),
  'schedule': ('schedule.name', SCHEDULES),
  'method': ('method.name', METHODS),
  'model.trunk_options': ('model.trunk', TRUNKS),
  'model.head_options': ('model.head', HEADS | OF_PIXELS),
}
"""Key of the options -> (key of the function's name, the functions)."""

MAKERS: dict[str, Callable] = {'loss': make_loss}
"""Key of the options -> a function that has further ones, whatever the name."""

TYPES = {bool: bool, int: int, float: float, str: str, Any: object}


def prepare(config: ConfigDict, given: Mapping[str, Any]) -> None:
  """Prepares a config for keys that are about to be set.

  Args:
    config: changed in place. If a key names another function, the old function's
      options are dropped, and those that `given` sets are added without a value.
    given: key -> value, such as {'optimizer.name': 'adam'}; keys of a stage start with
      'stages.STAGE.'.

  Raises:
    UserError: a key, function or option is unknown (the message suggests a near miss),
      or a text is not a valid value for its key.
  """
  names = {name: options for options, (name, _) in FAMILIES.items()}
  # The top level first, because stages follow it.
  for key in sorted(given, key=lambda key: key.count('.')):
    stage, own = _split(key)
    if own in names:
      _rename(config, stage, names[own], given[key])
  for key, value in given.items():
    _make_room(config, key)
    if isinstance(value, str) and '[' not in key:
      _check_text(config, key, value)


def _split(key: str) -> tuple[str, str]:
  """Returns 'stages.STAGE.', or '' at the top level, and the rest of a key."""
  first, _, rest = key.partition('.')
  stage, _, own = rest.partition('.')
  return (f'stages.{stage}.', own) if first == 'stages' and own else ('', key)


def _get(config: ConfigDict, key: str) -> Any:
  """Returns the value of a key; None if there is none."""
  for part in key.split('.'):
    config = config.get(part) if isinstance(config, ConfigDict) else None
  return config


def _rename(config: ConfigDict, stage: str, options: str, name: str) -> None:
  """Sets the name of a function, and drops options that belonged to the old one.

  Set at the top level, it also applies to the stages that follow the top level.
  """
  key, table = FAMILIES[options]
  lookup(table, key.removesuffix('.name'), name)
  places = [stage] if stage else ['', *(f'stages.{one}.' for one in config.stages)]
  before = {place: _get(config, place + key) for place in places}
  holder, _, last = (stage + key).rpartition('.')
  _get(config, holder)[last] = name
  parameters = [_parameters(function) for function in table.values()]
  # An option that every function of a family has means the same in all of them.
  dropped = set().union(*parameters) - set.intersection(*map(set, parameters))
  for place in places:
    if before[place] != _get(config, place + key):
      holder = _get(config, place + options) or {}
      for option in dropped.intersection(holder):
        del holder[option]


def _parameters(function: Callable | None) -> Mapping[str, inspect.Parameter]:
  return dict(inspect.signature(function).parameters) if function else {}


def _defaults(function: Callable | None) -> dict[str, inspect.Parameter]:
  """Returns the parameters of a function that have a default."""
  empty = inspect.Parameter.empty
  return {n: p for n, p in _parameters(function).items() if p.default is not empty}


def _make_room(config: ConfigDict, key: str) -> None:
  """Adds a key to the config if it is an option of a named function, or of a domain.

  Raises:
    UserError: the key is unknown.
  """
  holder, path = config, ''
  *parents, last = key.split('.')
  if parents and parents[0] in set(config.stages) - set(config):
    raise UserError(f'unknown config key {key}; did you mean {f"stages.{key}"!r}?')
  for part in parents:
    path = f'{path}.{part}'.removeprefix('.')
    own = _split(path)[1]
    if wrapper := _wrapper(own):
      lookup(WRAPPERS, 'wrapper', wrapper)
    if part not in holder and (own in FAMILIES or wrapper or own == 'wrappers'):
      holder[part] = {}
    holder = _child(holder, part, path)
  if last in holder or '[' in key:
    return
  if path.startswith('domains.') and last in config.data:
    holder[last] = placeholder(config.data.get_type(last))
    return
  stage, own = _split(path)
  if wrapper := _wrapper(own):
    name, chosen, table = 'the wrapper', wrapper, WRAPPERS
  elif own in FAMILIES:
    name, table = FAMILIES[own]
    chosen = _get(config, stage + name) or _get(config, name)
  else:
    known = config.data if path.startswith('domains.') else holder
    raise UserError(f'unknown config key {key}{suggest(last, known)}')
  parameters = _parameters(table.get(chosen)) | _defaults(MAKERS.get(own))
  kinds = {option: _type(p.annotation) for option, p in parameters.items()}
  if not kinds.get(last):
    known = sorted({*holder, *filter(kinds.get, kinds)})
    raise UserError(
      f'unknown config key {key}: {name} is {chosen!r}{suggest(last, known)}'
    )
  holder[last] = placeholder(kinds[last])


def _wrapper(own: str) -> str:
  """Returns NAME if the key is 'wrappers.NAME', which holds its options, else ''."""
  holder, _, name = own.partition('.')
  return name if holder == 'wrappers' and '.' not in name else ''


def _check_text(config: ConfigDict, key: str, text: str) -> None:
  """Rejects a text that a flag of the key's type would reject.

  The flag parsers would do so too, but their messages do not name the key.
  """
  *parents, last = key.split('.')
  group = functools.reduce(ConfigDict.get, parents, config)
  kind = group.get_type(last)
  if kind is bool and text.startswith('-'):  # --config.data.flip --workdir=...
    return
  parse, must_be = _PARSERS.get(kind, (str, ''))
  try:
    parse(text)
  except (ValueError, SyntaxError):
    if kind is ConfigDict:
      problem = f'cannot be {text!r}: {_keys_of(key, group[last])}'
    else:
      problem = f'is {text!r}; it must be {must_be}'
    raise UserError(f'config.{key} {problem}') from None


def _finite(text: str) -> None:
  """Raises a ValueError unless a text is a finite number."""
  if not math.isfinite(float(text)):
    raise ValueError(text)


def _dict(text: str) -> None:
  """Raises a ValueError, as `ast` does, unless a text is a dict."""
  if not isinstance(ast.literal_eval(text), dict):
    raise ValueError(text)


_PARSERS: dict[type, tuple[Callable, str]] = {
  bool: (flags.BooleanParser().parse, 'true or false'),
  int: (flags.IntegerParser().parse, 'a whole number'),
  float: (_finite, 'a finite number'),
  ConfigDict: (_dict, ''),
}
"""Type of a key -> (what parses its text, what the text must be)."""


def _keys_of(key: str, value: ConfigDict) -> str:
  """Says how to set a key that holds further keys."""
  if 'name' in value:
    return f'set config.{key}.name'
  if not value:
    return 'give a dict'
  there = f' ({", ".join(value)})' if len(value) < 10 else ''
  return f'set one of its keys{there}, as config.{key}.KEY'


def _child(holder: ConfigDict, part: str, path: str) -> ConfigDict:
  """Returns the part of a config that has further keys."""
  if part not in holder:
    raise UserError(f'unknown config key {path}{suggest(part, holder)}')
  if not isinstance(holder[part], ConfigDict):
    raise UserError(f'config key {path} is {holder[part]!r}; it has no further keys')
  return holder[part]


def _type(annotation: Any) -> type | None:
  """Returns the type of an option; None if a config cannot hold it."""
  if typing.get_origin(annotation) in _SEQUENCES:
    return tuple
  return TYPES.get(annotation)


_SEQUENCES = (collections.abc.Sequence, collections.abc.Iterable)
