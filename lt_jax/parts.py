"""Which parts of a network are trained, and at which rate: the table of a stage."""

from typing import Any, NamedTuple

import jax

from lt_jax.build import Stage
from lt_jax.method import State


class Part(NamedTuple):
  """A part of a network, such as 'trunk/stage1' or 'head'.

  Attributes:
    part: its name.
    arrays: of parameters.
    parameters: numbers in them.
    least: what the learning rate is multiplied by, at least; 0 for frozen parameters.
    most: at most.
    anchored: whether it decays towards where it began.
    statistics: 'frozen', 'trained', or '' where there are none.
    drawn: whether it is drawn anew, although the rest of the trunk is not.
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
    """Whether any of it is trained."""
    return self.most > 0

  @property
  def differs(self) -> bool:
    """Whether it is not trained as everything is by default."""
    return (self.least, self.most, self.anchored or self.drawn) != (1, 1, False)

  @property
  def description(self) -> str:
    """What the table says about it."""
    rate = f'{self.least:.3g}'
    if self.least != self.most:
      rate = f'{self.least:.3g} to {self.most:.3g}'
    told = f'rate x {rate}' if self.trained else 'frozen'
    size = f'{self.parameters:,} parameters in {self.arrays} arrays'
    more = [f'statistics {self.statistics}'] if self.statistics else []
    more += ['decays towards where it began'] if self.anchored else []
    more += ['drawn anew'] if self.drawn else []
    return ', '.join([told, size, *more])


def parts(stage: Stage, state: State) -> list[Part]:
  """Returns what of a stage's network is trained at which rate, from the images on.

  Args:
    stage: the stage.
    state: its State, or the shapes of one.
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
    # Layer by layer only where they differ: their order takes a trace of the network.
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
  """Returns whether batch statistics are those that the stage began with."""
  norm = getattr(stage.net.trunk, 'norm', None)
  return bool(getattr(norm, 'keywords', {}).get('frozen'))
