"""Networks that plan: values spread over a map of the image, from cell to cell."""

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
"""Rows and columns to the four neighbours of a cell: up, down, left, right."""


class ValueIteration(nn.Module):
  r"""Finds rewards and costs in an image, and plans on them with four moves.

  Two convolutions make a map of half the image's size. Three linear maps of it, each
  with mean 0 and deviation 1 over the image and a learned scale, say of a cell s what
  reward it holds, r, what it costs to come into it, c > 0 after a softplus, and how
  much the agent seems to be there, a. From V = r,

  .. math:: V(s) \leftarrow \max\big(r(s),\ \max_m V(s + m) - c(s)\big)

  is repeated, which adds the costs of a path and thus needs no discount. The features
  are the values of the four moves where the agent is,

  .. math:: q_m = \sum_s \mathrm{softmax}_s(a)\, V(s + m), \qquad q - \mathrm{mean}(q)

  and a linear head of four classes is the policy.

  Attributes:
    width: channels of the convolutions.
    iterations: K; the value of a goal reaches cells up to K moves away.
    conv: a constructor like `Conv`.

  Source: after Tamar et al., Value Iteration Networks, arXiv 1602.02867, section 4,
  where moves are learned and the place of the agent is given. Moves to neighbours, and
  values that spread at a learned price, are from Nardelli et al., Value Propagation
  Networks, arXiv 1805.11199, where prices are factors. The standardised maps are ours:
  without them it did not leave chance in 400 steps, with them it needs some 300.
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

  So what is rare in an image, such as an agent or a goal, stands out from the start.
  """
  centred = maps - maps.mean((1, 2), keepdims=True)
  variance = (centred**2).mean((1, 2), keepdims=True)
  return centred / jnp.sqrt(variance + 1e-6)


def neighbours(value: jax.Array) -> jax.Array:
  """Returns the values (4, B, H, W) of each cell's neighbours, in the order of `STEPS`.

  Beyond the edge lies what is at the edge: there is nothing to be had by going there.

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
  """Returns a `ValueIteration`, its initialisation by its name."""
  kernel_init = lookup(INITIALISERS, 'initialisation', init)
  conv = partial(Conv, kernel_init=kernel_init, dtype=dtype)
  return ValueIteration(width, iterations, conv)
