"""Recipes that treat a long tail as a shift between two domains.

The long-tailed training set is the source; the balanced meta set, without its labels,
is the target. Methods of domain adaptation are thus applied to class frequencies: they
make the features of both sets alike, or learn more from the images than their class.
Balancing the meta set took its labels, so the control is `ce` on both sets together
(`ce_plus_meta`).
"""

from ml_collections import ConfigDict

from lt_jax.config import SOURCE, Overrides
from lt_jax.recipes.adaptation import RISING, adversarial, aligned, self_supervised
from lt_jax.recipes.meta import meta_row, reweight, two_stages
from lt_jax.recipes.parts import Recipe, target_stream


def _balanced(config: ConfigDict) -> Overrides:
  """The meta set without its labels, as the target."""
  return target_stream(config, domain=SOURCE, split='meta')


def _mmd(config: ConfigDict) -> Overrides:
  return {**aligned(config, name='mmd', weight=RISING), **_balanced(config)}


def _mmd_meta(config: ConfigDict) -> Overrides:
  """Makes features alike in both sets, then learns weights from the meta set."""
  made = two_stages(config, {'method': reweight(), 'streams': meta_row(config)})
  made['stages']['pretrain'] |= _mmd(config)
  return made


RECIPES: dict[str, Recipe] = {
  'tail_mmd': Recipe(_mmd, paper='jamal', needs=('meta',)),
  'tail_dann': Recipe(
    lambda config: {
      **adversarial(config, 'dann', (100,), 'features'),
      **_balanced(config),
    },
    paper='jamal',
    needs=('meta',),
  ),
  'tail_self_supervised': Recipe(
    lambda config: {
      **self_supervised(config, 'features', digit_rotation=4),
      **_balanced(config),
    },
    paper='jamal',
    needs=('meta',),
  ),
  'tail_mmd_meta': Recipe(_mmd_meta, paper='jamal', needs=('meta',)),
}
