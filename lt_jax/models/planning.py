"""Networks that plan: values spread from cell to cell over a map of the image."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lt_jax.errors import lookup
from lt_jax.models.convolution import INITIALISERS, Conv, max_pool
from lt_jax.models.normalisation import at_least_float32

STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""Row and column offsets of a cell's four neighbours: up, down, left, right."""


class ValueIteration(nn.Module):
  r"""Finds rewards and costs in an image, and plans with four moves.

  Two convolutions make a map of half the image's size. Three linear maps of it, each
  standardised to mean 0 and deviation 1 over the image and with a learned scale, give
  for every cell s its reward r, the cost c > 0 of entering it (after a softplus), and
  the score a of the agent being there. Starting from V = r,

  .. math:: V(s) \leftarrow \max\big(r(s),\ \max_m V(s + m) - c(s)\big)

  is repeated. This adds up the costs of a path, so it needs no discount. The features
  are the values of the four moves from where the agent is,

  .. math:: q_m = \sum_s \mathrm{softmax}_s(a)\, V(s + m), \qquad q - \mathrm{mean}(q)

  and a linear head with four classes is the policy.

  Attributes:
    width: channels of the convolutions.
    iterations: K; the value of a goal reaches cells up to K moves away.
    conv: a constructor like `Conv`.

  Source: after Tamar et al., Value Iteration Networks, arXiv 1602.02867, section 4,
  where moves are learned and the place of the agent is given. Moves to neighbours, and
  values that spread at a learned price, are from Nardelli et al., Value Propagation
  Networks, arXiv 1805.11199, where prices are factors. Standardising the maps is ours:
  without it the network stayed at chance for 400 steps, with it about 300 steps
  suffice.
  """

  width: int
  iterations: int
  conv: Callable[..., nn.Module] = Conv

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Maps (B, H, W, C) images to 'conv' (B, H / 2 * W / 2 * width) and 'features'."""
    del train  # nothing here depends on it
    x = nn.relu(max_pool(self.conv(self.width, bias=True, name='conv1')(images)))
    x = nn.relu(self.conv(self.width, bias=True, name='conv2')(x))
    maps = standardised(at_least_float32(self.conv(3, size=1, name='maps')(x)))
    scale = self.param('scale', nn.initializers.ones, (3,))
    reward, cost, agent = jnp.moveaxis(maps * scale[None, None, None], -1, 0)
    cost = nn.softplus(cost)

    def spread(value: jax.Array, _: None) -> tuple[jax.Array, None]:
      return jnp.maximum(reward, neighbours(value).max(0) - cost), None

    value, _ = lax.scan(spread, reward, length=self.iterations)
    here = nn.softmax(agent.reshape(agent.shape[0], -1)).reshape(agent.shape)
    moves = jnp.einsum('bhw,mbhw->bm', here, neighbours(value))
    features = moves - moves.mean(-1, keepdims=True)
    return {'conv': x.reshape(x.shape[0], -1), 'features': features}


def standardised(maps: jax.Array) -> jax.Array:
  """Returns maps (B, H, W, C) with mean 0 and deviation 1 over each image.

  This makes rare things, such as an agent or a goal, stand out from the start.
  """
  centred = maps - maps.mean((1, 2), keepdims=True)
  variance = (centred**2).mean((1, 2), keepdims=True)
  return centred / jnp.sqrt(variance + 1e-6)


def neighbours(value: jax.Array) -> jax.Array:
  """Returns the values (4, B, H, W) of each cell's neighbours, in the order of `STEPS`.

  Values beyond the edge repeat those at the edge, so moving there gains nothing.

  Args:
    value: (B, H, W).
  """
  padded = jnp.pad(value, ((0, 0), (1, 1), (1, 1)), mode='edge')
  height, width = value.shape[1:]
  return jnp.stack(
    [
      padded[:, 1 + row : 1 + row + height, 1 + column : 1 + column + width]
      for row, column in STEPS
    ]
  )


def value_iteration(
  *, width: int = 16, iterations: int = 32, init: str = 'kaiming', dtype: Any = None
) -> ValueIteration:
  """Returns a `ValueIteration`; `init` is a key of `INITIALISERS`."""
  kernel_init = lookup(INITIALISERS, 'initialisation', init)
  conv = partial(Conv, kernel_init=kernel_init, dtype=dtype)
  return ValueIteration(width, iterations, conv)
