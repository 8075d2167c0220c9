"""Recipes for several tasks at once; `config.heads` names their heads."""

from typing import Any

from lt_jax.recipes.parts import Recipe


def _multitask(**options: Any) -> Recipe:
  return Recipe(
    lambda config: {
      'task': 'multitask',
      'method': {
        'name': 'multitask',
        'weights': {},
        'only': '',
        'weighting': 'fixed',
        **options,
      },
    },
    needs=('heads',),
  )


RECIPES: dict[str, Recipe] = {
  'multitask': _multitask(),
  'multitask_uncertainty': _multitask(weighting='uncertainty'),
  'multitask_dynamic': _multitask(weighting='dynamic', period=100),
}
