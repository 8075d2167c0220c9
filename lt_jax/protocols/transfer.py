"""Transfer in one run: training on a source, then any recipe on a target.

The stage 'source' trains on its own domain, with the protocol alone. The recipe's
stages follow on the target, and the first of them starts from the trunk of 'source'.
"""

from ml_collections import ConfigDict

from lt_jax.config import STAGE_KEYS, Overrides, apply, open_stages
from lt_jax.protocols import Protocol, scaled
from lt_jax.recipes import apply_recipe
from lt_jax.recipes.parts import copy

SOURCE_STAGE = 'source'


def transferred(
  config: ConfigDict,
  recipe: str,
  protocol: Protocol,
  source: Overrides,
  epochs: float = 0.0,
) -> ConfigDict:
  """Completes a config with a protocol, a stage on a source and a recipe on the target.

  Args:
    config: config of the target's data, with the source among its domains; changed in
      place.
    recipe: the recipe for the target.
    protocol: the protocol for both.
    source: overrides of the stage on the source, including 'domain'.
    epochs: epochs of the recipe; 0 for the protocol's own.

  Returns:
    The config, with stages that can be set key by key.
  """
  own = protocol.training['epochs']
  apply(config, scaled(protocol.training, (epochs or own) / own))
  before = config.copy_and_resolve_references()
  apply_recipe(config, recipe)
  first, *_ = config.stage_order
  begun = config.stages[first]
  begun.surgeries = (
    copy('net/trunk/.*', SOURCE_STAGE),
    *begun.get('surgeries', config.surgeries),
  )
  # What a recipe sets for all its stages does not apply to the source.
  changed = [key for key in STAGE_KEYS if config[key] != before[key]]
  stage = ConfigDict({key: before[key] for key in changed if key != 'surgeries'})
  apply(stage, {'surgeries': (), **source})
  config.stages = ConfigDict({SOURCE_STAGE: stage, **config.stages})
  config.stage_order = (SOURCE_STAGE, *config.stage_order)
  return open_stages(config)
