"""Recipes: what is learned, by name, on top of a data set and a protocol."""

from ml_collections import ConfigDict

from lt_jax.config import apply
from lt_jax.errors import UserError, lookup
from lt_jax.recipes import (
  adaptation,
  compound,
  decoupled,
  label_shift,
  losses,
  meta,
  multitask,
  open_world,
  segmentation,
  tail_shift,
  transfer,
  zero_shot,
)
from lt_jax.recipes.parts import Recipe

RECIPES: dict[str, Recipe] = {
  **losses.RECIPES,
  **meta.RECIPES,
  **open_world.RECIPES,
  **decoupled.RECIPES,
  **adaptation.RECIPES,
  **compound.RECIPES,
  **label_shift.RECIPES,
  **transfer.RECIPES,
  **multitask.RECIPES,
  **zero_shot.RECIPES,
  **segmentation.RECIPES,
  **tail_shift.RECIPES,
}
"""Name -> recipe; each family has its own file."""


def find(name: str) -> Recipe:
  """Returns the recipe called `name`.

  Raises:
    UserError: there is no recipe of this name.
  """
  try:
    return lookup(RECIPES, 'recipe', name)
  except UserError as error:
    if str(error).endswith('?'):  # it suggests a near miss
      raise
    raise UserError(f'{error}; python -m lt_jax recipes lists all') from None


def apply_recipe(config: ConfigDict, name: str) -> ConfigDict:
  """Applies the recipe called `name` to the config and returns it."""
  config.recipe = name
  return apply(config, find(name).overrides(config))
