"""Protocols: the data preparation, optimiser and schedule that papers share.

A config file names a data set, a protocol says how to train on it, and a recipe
(`lt_jax.recipes`) says what is learned. A protocol is data: overrides for the config,
for stages that a recipe may have, and for single recipes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lt_jax.config import Overrides, apply, open_stages
from lt_jax.errors import UserError, lookup
from lt_jax.recipes import apply_recipe, compound, find


class Protocol(NamedTuple):
  """How a paper trains.

  Attributes:
    training: overrides of the config, applied before the recipe's.
    stages: name of a stage -> overrides of it, for recipes that have such a stage; None
      if the protocol does not support it.
    recipes: name of a recipe -> overrides of the config, applied after the recipe's.
    name: set by `choose`, for messages.
  """

  training: Overrides
  stages: Mapping[str, Overrides | None] = {}
  recipes: Mapping[str, Overrides] = {}
  name: str = ''


def choose(protocols: Mapping[str, Protocol], name: str, recipe: str) -> Protocol:
  """Returns the named protocol, or by default that of the recipe's own paper.

  Args:
    protocols: protocols of a data set; the first is for recipes whose paper has none.
    name: the protocol the user asked for; may be empty.
    recipe: the recipe to train.

  Raises:
    UserError: an unknown name or recipe.
  """
  paper = find(recipe).paper
  default = paper if paper in protocols else next(iter(protocols))
  name = name or default
  return lookup(protocols, 'protocol', name)._replace(name=name)


def train_by(
  config: ConfigDict, recipe: str, *protocols: Protocol, epochs: float = 0.0
) -> ConfigDict:
  """Completes a config with protocols and a recipe.

  Args:
    config: the data set's config; it is changed in place.
    recipe: the recipe.
    *protocols: applied in this order, so later ones override earlier ones.
    epochs: epochs of the first training; everything counted in epochs scales with it.
      0 for the protocol's own.

  Returns:
    The config, with stages that can be set key by key.

  Raises:
    UserError: an unknown recipe, or one with a stage that a protocol does not support.
  """
  own = [p.training['epochs'] for p in protocols if 'epochs' in p.training][-1]
  scale = epochs / own if epochs else 1.0
  for protocol in protocols:
    apply(config, scaled(protocol.training, scale))
  apply_recipe(config, recipe)
  for protocol in protocols:
    for stage in config.stages:
      overrides = protocol.stages.get(stage, {})
      if overrides is None:
        under = f' under protocol {protocol.name!r}' if protocol.name else ''
        raise UserError(
          f'{config.name} has no stage {stage!r}{under}, which recipe {recipe!r} needs'
        )
      apply(config.stages[stage], scaled(overrides, scale))
    apply(config, scaled(protocol.recipes.get(recipe, {}), scale))
  return open_stages(config)


def compound_rates(times: float) -> dict[str, Overrides]:
  """Returns overrides that multiply the rates of two stages of OCDA's recipes.

  The authors' stages last 100 and 200 epochs. Shorter ones need higher rates where a
  network is learned: on the source, and for domain features. The adversarial stages
  keep their rates: at ten times these, all predictions become one class, which shows
  without any label.
  """
  rate = {'schedule': {'base': times * 1e-4}}
  stages = {'source': rate, 'domain_factor': rate}
  return dict.fromkeys(compound.RECIPES, {'stages': stages})


def scaled(overrides: Overrides, scale: float) -> Overrides:
  """Returns the overrides with everything counted in epochs multiplied by `scale`.

  A warm-up stays a whole number of epochs, since papers warm up epoch by epoch.
  """
  if scale == 1:
    return overrides
  found: Overrides = {}
  for key, value in overrides.items():
    if key == 'stages':
      found[key] = {name: scaled(stage, scale) for name, stage in value.items()}
    elif key == 'schedule':
      found[key] = {k: _scaled(k, v, scale) for k, v in value.items()}
    else:
      found[key] = _scaled(key, value, scale)
  return found


def _scaled(key: str, value: Any, scale: float) -> Any:
  if key in ('epochs', 'end'):
    return value * scale
  if key == 'boundaries':
    return tuple(scale * epoch for epoch in value)
  if key == 'warmup_epochs':
    return max(1, round(scale * value))
  return value


def steps(epochs: float, *drops: tuple[float, float], **schedule: Any) -> Overrides:
  """A step schedule over `epochs`; drops are (epoch, factor of the base rate)."""
  return {
    'epochs': float(epochs),
    'schedule': {
      'name': 'step_decay',
      'base': 0.1,
      'boundaries': tuple(epoch for epoch, _ in drops),
      'factors': tuple(factor for _, factor in drops),
      **schedule,
    },
  }


def cosine(epochs: float, *, base: float) -> Overrides:
  """A cosine schedule over `epochs`, down to zero."""
  schedule = {'name': 'cosine', 'base': base, 'end': float(epochs)}
  return {'epochs': float(epochs), 'schedule': schedule}
