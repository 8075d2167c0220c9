"""The layers of a trunk in order, starting at the image, and their parameters.

Fine-tuning counts in these layers: learning rates that fall towards the images, and
layers that keep their initial weights. A layer is a stage of blocks if the trunk has
stages, otherwise a convolution or linear layer; normalisation belongs to the layer
before it.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lt_jax.errors import UserError, suggest

_NORM = re.compile(r'(\w+_)?norm\d*(_\d+)?')
_BLOCK = re.compile(r'(stage\d+)_block\d+')


class Layer(NamedTuple):
  """A layer of a trunk.

  Attributes:
    name: its name, such as 'stem' or 'stage2'.
    units: name of a convolution, linear layer or block -> names of its parameters.
  """

  name: str
  units: dict[str, tuple[str, ...]]

  @property
  def pattern(self) -> str:
    """A regular expression that matches the whole paths of its parameters."""
    return pattern(name for names in self.units.values() for name in names)


def pattern(names: Iterable[str]) -> str:
  """Returns a regular expression for the paths of a trunk's parameters `names`."""
  return f'net/trunk/(?:{"|".join(map(re.escape, names))})(?:/.*)?'


def trunk_layers(net: nn.Module, image_shape: Sequence[int]) -> tuple[Layer, ...]:
  """Returns the layers of a classifier's trunk, starting at the images.

  Args:
    net: a `Classifier`; it is only traced.
    image_shape: (H, W, channels).

  Returns:
    The layers; empty for a trunk without parameters.
  """
  names: list[str] = []

  def run(key, images):
    params = net.init(key, images, train=False)['params']
    names.extend(params.get('trunk', {}))  # a dict in the order of calls
    return params

  jax.eval_shape(run, jax.random.key(0), jnp.zeros((1, *image_shape)))
  units: dict[str, list[str]] = {}
  for name in names:
    if _NORM.fullmatch(name) and units:
      units[[*units][-1]].append(name)
    else:
      units['stem' if name == 'conv' else name.removesuffix('_conv')] = [name]
  layers: dict[str, dict[str, tuple[str, ...]]] = {}
  for unit, parameters in units.items():
    block = _BLOCK.fullmatch(unit)
    layers.setdefault(block[1] if block else unit, {})[unit] = tuple(parameters)
  return tuple(Layer(name, inside) for name, inside in layers.items())


def chopped(layers: Sequence[Layer], kept: str) -> tuple[str, ...]:
  """Returns the names of a trunk's parameters that are not kept.

  Args:
    layers: layers of the trunk.
    kept: 'first:N' or 'last:N' for N layers; 'first:NAME' for all up to and including
      a layer or block of that name, or 'last:NAME' for all from it on.

  Raises:
    UserError: `kept` has another form, or there is no such layer.
  """
  units = {unit: names for layer in layers for unit, names in layer.units.items()}
  order = [*units]
  end, _, place = str(kept).partition(':')
  if end not in ('first', 'last') or not place:
    raise UserError(
      f"kept_layers is {kept!r}; use a form like 'first:2', 'last:1' or 'first:NAME'"
    )
  if place.isdecimal():
    if not 1 <= int(place) <= len(layers):
      names = ', '.join(layer.name for layer in layers) or 'none'
      raise UserError(
        f'kept_layers is {kept!r}; the trunk has {len(layers)} layers: {names}'
      )
    chosen = layers[: int(place)] if end == 'first' else layers[-int(place) :]
    inside = {unit for layer in chosen for unit in layer.units}
  else:
    spans = {unit: (i, i) for i, unit in enumerate(order)}
    for layer in layers:
      places = [order.index(unit) for unit in layer.units]
      spans.setdefault(layer.name, (places[0], places[-1]))
    if place not in spans:
      raise UserError(f'kept_layers: no layer {place!r}{suggest(place, spans)}')
    first, last = spans[place]
    inside = set(order[: last + 1] if end == 'first' else order[first:])
  return tuple(
    name for unit, names in units.items() if unit not in inside for name in names
  )
