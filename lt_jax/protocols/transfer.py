"""Transfer in one run: training on a source, then any recipe on a target.

The stage 'source' trains on a domain of its own, by the protocol alone. The recipe's
own stages follow on the target, the first of which begins with the trunk of 'source'.
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
  """Completes a config by a protocol, a stage on a source and a recipe on the target.

  Args:
    config: of the target's data, with the source among its domains; it is changed.
    recipe: what is done on the target.
    protocol: how both are trained.
    source: overrides of the stage on the source, 'domain' among them.
    epochs: of the recipe; 0: the protocol's own.

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
  # What a recipe sets for all its stages is not for the source.
  changed = [key for key in STAGE_KEYS if config[key] != before[key]]
  stage = ConfigDict({key: before[key] for key in changed if key != 'surgeries'})
  apply(stage, {'surgeries': (), **source})
  config.stages = ConfigDict({SOURCE_STAGE: stage, **config.stages})
  config.stage_order = (SOURCE_STAGE, *config.stage_order)
  return open_stages(config)
