"""Protocols: the data treatment, optimiser and schedule that papers share.

A config file names a data set, a protocol says how it is trained on, and a recipe
(`lt_jax.recipes`) what is learned. A protocol is data: overrides of the config, of
stages that a recipe may have, and of single recipes.
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
    training: overrides of the config, before the recipe's own.
    stages: name of a stage -> overrides of it, for recipes that have such a stage;
      None: the protocol has no such training.
    recipes: name of a recipe -> overrides of the config, after the recipe's own.
    name: set by `choose`, for messages.
  """

  training: Overrides
  stages: Mapping[str, Overrides | None] = {}
  recipes: Mapping[str, Overrides] = {}
  name: str = ''


def choose(protocols: Mapping[str, Protocol], name: str, recipe: str) -> Protocol:
  """Returns the protocol of a name, or without one that of the recipe's own paper.

  Args:
    protocols: of a data set; the first serves recipes whose paper has none here.
    name: what the user asked for; may be empty.
    recipe: the recipe that is trained.

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
  """Completes a config by protocols and a recipe.

  Args:
    config: of the data set; it is changed.
    recipe: the recipe.
    *protocols: in this order: what a later one says counts.
    epochs: of the first training; everything that is counted in epochs scales with
      it. 0: the protocol's own.

  Returns:
    The config, with stages that can be set key by key.

  Raises:
    UserError: an unknown recipe, or one with a stage that a protocol does not have.
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
  """Returns what multiplies the rates of two stages of OCDA's recipes.

  Its authors' stages are of 100 and 200 epochs. Shorter ones need higher rates where a
  network is learned, on the source and of domain features. The adversarial stages keep
  theirs: at ten times these all predictions become one class, as is seen without a
  label.
  """
  rate = {'schedule': {'base': times * 1e-4}}
  stages = {'source': rate, 'domain_factor': rate}
  return dict.fromkeys(compound.RECIPES, {'stages': stages})


def scaled(overrides: Overrides, scale: float) -> Overrides:
  """Returns overrides with everything that is counted in epochs multiplied.

  A warm-up stays whole epochs, as papers warm up epoch by epoch.
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
  """A step schedule of so many epochs; drops are (epoch, factor of the base)."""
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
  """A cosine over so many epochs, to zero."""
  schedule = {'name': 'cosine', 'base': base, 'end': float(epochs)}
  return {'epochs': float(epochs), 'schedule': schedule}
