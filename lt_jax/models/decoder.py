"""Decoders: from a layer of a network back to images."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from lt_jax.models.convolution import Conv
from lt_jax.models.heads import dense


class Decoder(nn.Module):
  """A linear layer to a quarter of the side, then twice pixels doubled and convolved.

  Attributes:
    width: channels of the last hidden layer; the first has twice as many.
    shape: (H, W, C) of the images; a method sets it.
  """

  width: int
  shape: Sequence[int] = ()

  @nn.compact
  def __call__(self, layer: jax.Array) -> jax.Array:
    """Maps (B, D) to images (B, H, W, C), which are not squashed."""
    height, width, channels = self.shape
    small = (-(-height // 4), -(-width // 4), 2 * self.width)
    size = small[0] * small[1] * small[2]
    x = nn.relu(dense(size, inputs=layer.shape[-1], name='fc')(layer))
    x = x.reshape(-1, *small)
    for number, features in enumerate((self.width, channels), 1):
      x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
      x = Conv(features, size=3, bias=True, name=f'conv{number}')(x)
      x = nn.relu(x) if number == 1 else x
    return x[:, :height, :width]


def decoder(*, width: int = 16) -> Decoder:
  """Returns a decoder of a width; the method that uses it knows the images' shape."""
  return Decoder(width)
