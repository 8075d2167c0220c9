"""A player: the network that turns an example's loss into its weight."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from lt_jax.errors import UserError


class WeightNet(nn.Module):
  """sigmoid(relu(l w1 + b1) w2 + b2): a weight in (0, 1) for a loss l.

  Attributes:
    hidden: units of the hidden layer.

  Source: Shu et al., Meta-Weight-Net, arXiv 1902.07379; initialised as in PyTorch,
  weights and biases from U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)).
  """

  hidden: int = 100

  @nn.compact
  def __call__(self, losses: jax.Array) -> jax.Array:
    """Maps losses (B,) to weights (B,).

    Raises:
      UserError: there are no hidden units.
    """
    if self.hidden < 1:
      raise UserError(f'weight_net: hidden must be positive, got {self.hidden}')
    x = nn.relu(_dense(self.hidden, 1, 'hidden')(losses[:, None]))
    return nn.sigmoid(_dense(1, self.hidden, 'weight')(x))[:, 0]


def _dense(features: int, fan_in: int, name: str) -> nn.Dense:
  init = partial(_uniform, bound=1 / math.sqrt(fan_in))
  return nn.Dense(features, kernel_init=init, bias_init=init, name=name)


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype, *, bound: float):
  return jax.random.uniform(key, shape, dtype or jnp.float32, -bound, bound)
