"""Decoders: from a layer of a network back to images."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from lt_jax.errors import UserError
from lt_jax.models.convolution import Conv
from lt_jax.models.heads import dense


class Decoder(nn.Module):
  """A linear layer to a small image, followed by upsampling and convolutions.

  Attributes:
    width: channels of the last hidden layer; each layer before it has twice as many.
    doublings: how often the sides are doubled; the initial sides are rounded up.
    shape: (H, W, C) of the images; a method sets it.
  """

  width: int
  doublings: int = 2
  shape: Sequence[int] = ()

  @nn.compact
  def __call__(self, layer: jax.Array) -> jax.Array:
    """Maps (B, D) to images (B, H, W, C) of unbounded values."""
    height, width, channels = self.shape
    part, widest = 2**self.doublings, self.width * 2 ** (self.doublings - 1)
    small = (-(-height // part), -(-width // part), widest)
    size = small[0] * small[1] * small[2]
    x = nn.relu(dense(size, inputs=layer.shape[-1], name='fc')(layer))
    x = x.reshape(-1, *small)
    for number in range(1, self.doublings + 1):
      x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
      is_last = number == self.doublings
      features = channels if is_last else widest // 2**number
      x = Conv(features, size=3, bias=True, name=f'conv{number}')(x)
      x = x if is_last else nn.relu(x)
    return x[:, :height, :width]


def decoder(*, width: int = 16, doublings: int = 2) -> Decoder:
  """Returns a decoder of that width; the method that uses it sets the images' shape."""
  if doublings < 1:
    raise UserError(f'decoder: doublings is {doublings}; it must be at least 1')
  return Decoder(width, doublings)
