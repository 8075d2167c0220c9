"""Generators: from a class description and noise to a feature of that class."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from lt_jax.models.heads import dense


class Generator(nn.Module):
  """Linear layers with leaky ReLU between them.

  Attributes:
    hidden: sizes of the hidden layers.
    noise: size of the noise vector; 0 for the size of a description.
    size: D of the features; a method sets it.
  """

  hidden: Sequence[int]
  noise: int
  size: int = 0

  @nn.compact
  def __call__(self, described: jax.Array, noise: jax.Array) -> jax.Array:
    """Maps descriptions (N, A) and noise (N, Z) to features (N, D)."""
    x = jnp.concatenate([described, noise], -1)
    for number, size in enumerate(self.hidden, 1):
      layer = dense(size, inputs=x.shape[-1], name=f'fc{number}')
      x = nn.leaky_relu(layer(x), 0.2)
    return dense(self.size, inputs=x.shape[-1], name='feature')(x)


def generator(*, hidden: Sequence[int] = (256,), noise: int = 0) -> Generator:
  """Returns a `Generator`; the method that uses it sets the size of the features."""
  return Generator(tuple(hidden), noise)
