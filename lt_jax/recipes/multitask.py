"""Recipes for several tasks at once; `config.heads` names their heads."""

from typing import Any

from ml_collections import ConfigDict

from lt_jax.config import Overrides
from lt_jax.recipes.parts import Recipe


def _multitask(**options: Any) -> Recipe:
  """Equal weights, each a key of its own: --config.method.weights.NAME=0.5."""

  def overrides(config: ConfigDict) -> Overrides:
    tasks = ('label', *config.heads)
    return {
      'task': 'multitask',
      'method': {
        'name': 'multitask',
        'weights': dict.fromkeys(tasks, 1 / len(tasks)),
        'only': '',
        'weighting': 'fixed',
        **options,
      },
    }

  return Recipe(overrides, needs=('heads',))


RECIPES: dict[str, Recipe] = {
  'multitask': _multitask(),
  'multitask_uncertainty': _multitask(weighting='uncertainty'),
  'multitask_dynamic': _multitask(weighting='dynamic', period=100),
}
