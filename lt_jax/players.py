"""Players: networks that learn beside the main one, each with its own optimiser.

A discriminator or a weight network is described by three dicts:

  {'network': {'name': 'weight_net', 'hidden': 100},
   'optimizer': {'name': 'sgd', 'momentum': 0.9},
   'schedule': {'name': 'constant', 'base': 1e-5}}

A method with an argument `players` gets the players of its stage, by name.
"""

import math
from collections.abc import Mapping
from typing import Any

from lt_jax.errors import UserError, check_options, construct
from lt_jax.method import Player
from lt_jax.models import NETWORKS
from lt_jax.optim import make_optimizer
from lt_jax.schedules import make_schedule


def make_players(
  described: Mapping[str, Mapping[str, Any]], *, length: int, batch: int
) -> dict[str, Player]:
  """Returns the players of a stage.

  Args:
    described: name -> 'network', 'optimizer' and 'schedule' of a player.
    length: examples per epoch; schedules count in epochs.
    batch: examples per step.

  Raises:
    UserError: a description is wrong; the message names the player.
  """
  players = {}
  for name, options in described.items():
    try:
      check_options('a player', make_player, options, 'length', 'batch')
      players[name] = make_player(**options, length=length, batch=batch)
    except (TypeError, ValueError, LookupError, ZeroDivisionError) as error:
      raise UserError(f'players.{name}: {error}') from error
  return players


def make_player(
  *,
  network: Mapping[str, Any],
  optimizer: Mapping[str, Any],
  schedule: Mapping[str, Any],
  length: int,
  batch: int,
) -> Player:
  """Builds a player from the names and options of its parts.

  Args:
    network: a 'name' in `lt_jax.models.NETWORKS`, and its options.
    optimizer: a 'name' in `lt_jax.optim.OPTIMIZERS`, and its options.
    schedule: a 'name' in `lt_jax.schedules.SCHEDULES`, its 'base' and its options.
    length: examples per epoch.
    batch: examples per step.

  Raises:
    UserError: a name or option is unknown or missing.
  """
  parts = {'network': network, 'optimizer': optimizer, 'schedule': schedule}
  for key, part in parts.items():
    if not isinstance(part, Mapping) or 'name' not in part:
      raise UserError(f'{key} must be a dict with a name')
  base = schedule.get('base')
  if not isinstance(base, int | float) or not 0 <= base < math.inf:
    raise UserError(f'schedule.base is {base}; it must be a finite number, 0 or more')
  options = {key: value for key, value in network.items() if key != 'name'}
  net = construct(NETWORKS, 'network', network['name'], options=options)
  rate = make_schedule(**schedule, length=length, batch=batch)
  return Player(net, make_optimizer(learning_rate=rate, **optimizer))
