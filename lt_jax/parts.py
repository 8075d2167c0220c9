"""Which parts of a network train, and at which rate: the table of a stage."""

from typing import Any, NamedTuple

import jax

from lt_jax.build import Stage
from lt_jax.method import State


class Part(NamedTuple):
  """A part of a network, such as 'trunk/stage1' or 'head'.

  Attributes:
    part: its name.
    arrays: number of parameter arrays.
    parameters: number of parameters in them.
    least: smallest multiplier of the learning rate; 0 for frozen parameters.
    most: largest multiplier of the learning rate.
    anchored: whether it decays towards its initial value.
    statistics: 'frozen', 'trained', or '' if there are none.
    drawn: whether it is re-initialised, although the rest of the trunk is not.
  """

  part: str
  arrays: int
  parameters: int
  least: float
  most: float
  anchored: bool
  statistics: str
  drawn: bool

  @property
  def trained(self) -> bool:
    """Whether any of it trains."""
    return self.most > 0

  @property
  def differs(self) -> bool:
    """Whether it trains in another way than by default."""
    return (self.least, self.most, self.anchored or self.drawn) != (1, 1, False)

  @property
  def description(self) -> str:
    """What the table says about it."""
    rate = f'{self.least:.3g}'
    if self.least != self.most:
      rate = f'{self.least:.3g} to {self.most:.3g}'
    rate = f'rate x {rate}' if self.trained else 'frozen'
    size = f'{self.parameters:,} parameters in {self.arrays} arrays'
    more = [f'statistics {self.statistics}'] if self.statistics else []
    more += ['decays towards its initial value'] if self.anchored else []
    more += ['re-initialised'] if self.drawn else []
    return ', '.join([rate, size, *more])


def parts(stage: Stage, state: State) -> list[Part]:
  """Returns the parts of a stage's network, starting at the images.

  Args:
    stage: the stage.
    state: its State, or the shapes of it.
  """
  params, stats = state.params['net'], state.stats['net']
  if not jax.tree.leaves(params):
    return []
  net = {'net': params}
  rates, anchored = (
    f(net)['net'] for f in (stage.optimizer.rates, stage.optimizer.anchored)
  )
  every = {*jax.tree.leaves(rates), *jax.tree.leaves(anchored)}
  if (every != {1.0, False} or stage.drawn) and 'trunk' in params:
    # Layer by layer only if layers differ, since their order needs a trace.
    units = {
      name: layer.name
      for layer in stage.layers()
      for names in layer.units.values()
      for name in names
    }
    trunk = [f'trunk/{name}' for name in dict.fromkeys(units.values())]
  else:
    units, trunk = {}, ['trunk'] if 'trunk' in params else []
  order = [*trunk, *(name for name in params if name != 'trunk')]

  def of_part(tree: Any, part: str) -> list[Any]:
    top, _, layer = part.partition('/')
    inside = tree.get(top, {})
    if layer:
      inside = {name: x for name, x in inside.items() if units.get(name) == layer}
    return jax.tree.leaves(inside)

  frozen = _has_frozen_statistics(stage)
  rows = []
  for part in order:
    arrays = of_part(params, part)
    if not arrays:
      continue
    own = of_part(rates, part)
    rows.append(
      Part(
        part,
        len(arrays),
        sum(x.size for x in arrays),
        min(own),
        max(own),
        any(of_part(anchored, part)),
        ('frozen' if frozen else 'trained') if of_part(stats, part) else '',
        any(units[name] == part.partition('/')[2] for name in stage.drawn),
      )
    )
  return rows


def _has_frozen_statistics(stage: Stage) -> bool:
  """Returns whether batch statistics stay those that the stage started with."""
  norm = getattr(stage.net.trunk, 'norm', None)
  return bool(getattr(norm, 'keywords', {}).get('frozen'))
