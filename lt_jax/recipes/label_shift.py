"""Recipes that weight the source by the estimated class shares of the target.

A network is trained on the source and used to estimate the class shares of the target.
A second stage then starts from scratch with source images weighted by these shares. No
label of the target is used.
"""

from ml_collections import ConfigDict

from lt_jax.config import Overrides
from lt_jax.recipes import adaptation
from lt_jax.recipes.parts import Recipe


def _corrected(recipe: str, estimator: str) -> Recipe:
  """Returns an adaptation recipe with a first stage that estimates the shift."""

  def overrides(config: ConfigDict) -> Overrides:
    estimate = 'estimate_shift', {'stage': 'source', 'estimator': estimator}
    adapt = {
      **adaptation.RECIPES[recipe].overrides(config),
      'wrappers': {'label_shift': {}},
      'surgeries': (estimate,),
    }
    return {
      'stages': {'source': {}, 'adapt': adapt},
      'stage_order': ('source', 'adapt'),
    }

  return Recipe(overrides, needs=('target',))


RECIPES: dict[str, Recipe] = {
  'source_bbse': _corrected('source_only', 'bbse'),
  'dann_bbse': _corrected('dann', 'bbse'),
  'dann_em': _corrected('dann', 'em'),
}
