"""Taps: the intermediate outputs of a trunk, by layer name.

A trunk calls `tap(self, 'stem', x)` for each of its layers, which costs nothing unless
they are read. Taps are in the order of the layers, each in the form in which the next
layer reads it.
"""

from typing import Any

import jax
from flax import linen as nn

PyTree = Any

_MARK = 'tap '
"""Prefix of a tap's name, since a module may have the same name."""


def tap(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
  """Names a layer of a trunk.

  Args:
    module: the trunk.
    name: name of the layer.
    x: (B, H, W, C) or (B, D); it is returned unchanged.
  """
  module.sow('intermediates', _MARK + name, x)
  return x


def tapped(
  net: nn.Module, params: PyTree, stats: PyTree, images: jax.Array
) -> dict[str, jax.Array]:
  """Returns the layers of a classifier's trunk, in evaluation mode.

  Under `jax.jit`, layers that are not part of the result are not computed. A dict that
  leaves `jit` is sorted by name; `tap_shapes` has the right order.

  Args:
    net: a `Classifier`.
    params: its parameters.
    stats: its batch statistics.
    images: (B, H, W, C).

  Returns:
    name -> (B, H, W, C), or (B, D) for layers that are not maps.
  """
  _, found = net.apply(
    {'params': params, 'batch_stats': stats},
    images,
    train=False,
    mutable=['intermediates'],
  )
  layers = found.get('intermediates', {}).get('trunk', {})
  return {
    name.removeprefix(_MARK): value[0]
    for name, value in layers.items()
    if name.startswith(_MARK)
  }


def tap_shapes(
  net: nn.Module, params: PyTree, stats: PyTree, images: jax.Array
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of what `tapped` returns, in order; it only traces."""
  names: list[str] = []

  def run(*args):
    layers = tapped(net, *args)
    names.extend(layers)
    return layers

  shapes = jax.eval_shape(run, params, stats, images)
  return {name: shapes[name] for name in names}
