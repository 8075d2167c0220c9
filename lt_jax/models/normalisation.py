"""Batch normalisation over the batch, over parts of it, or with frozen statistics."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lt_jax.errors import UserError


def at_least_float32(x: jax.Array) -> jax.Array:
  """Returns x as float32 if its type is narrower."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class BatchNorm(nn.Module):
  r"""Normalises every channel, then scales and shifts it.

  .. math::
    y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

  In training, mu and sigma^2 (the biased variance) come from a group of the batch, and
  the running averages move towards their mean over the G groups:

  .. math::
    \bar\mu \leftarrow m \bar\mu + (1 - m) \frac{1}{G} \sum_g \mu_g

  and likewise for the variance. In evaluation, mu and sigma^2 are the running averages.

  One group means the global batch. With as many groups as devices, group g is the g-th
  contiguous part of the batch, which lies on device g: its statistics need no
  communication, as with one process per device. Statistics are computed in float32
  whatever the type of x, and y has the type of x.

  Attributes:
    groups: G, number of equal parts of the batch with their own statistics.
    frozen: use the running averages in training too, without changing them.
    momentum: m.
    epsilon: added to the variance.

  Raises:
    UserError: the batch does not divide into the groups.

  Source: Ioffe and Szegedy, arXiv 1502.03167, algorithm 1; groups: Hoffer et al., arXiv
  1705.08741, algorithm 1. PyTorch's running variance is unbiased.
  """

  groups: int = 1
  frozen: bool = False
  momentum: float = 0.9
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps (B, ..., C) to the same shape."""
    shape = x.shape[-1:]
    zeros, ones = nn.initializers.zeros, nn.initializers.ones
    scale = self.param('scale', ones, shape, jnp.float32)
    bias = self.param('bias', zeros, shape, jnp.float32)
    running = [
      self.variable('batch_stats', name, jnp.full, shape, value, jnp.float32)
      for name, value in (('mean', 0.0), ('var', 1.0))
    ]
    grouped = at_least_float32(x)[None]
    if train and not self.frozen:
      if len(x) % self.groups:
        raise UserError(
          f'a batch of {len(x)} does not divide into {self.groups} groups'
        )
      grouped = grouped.reshape(self.groups, -1, *x.shape[1:])
      mean, var = stats = moments(grouped)
      if not self.is_initializing():
        for average, values in zip(running, stats, strict=True):
          old = average.value
          new = self.momentum * old + (1 - self.momentum) * values.mean(axis=0)
          average.value = new.astype(old.dtype)
    else:
      mean, var = (average.value[None] for average in running)
    multiplier = scale[None] * lax.rsqrt(var + self.epsilon)
    # One multiplication and one addition per element; (x - mean) would have to be
    # stored.
    y = grouped * _over(grouped, multiplier)
    y += _over(grouped, bias[None] - mean * multiplier)
    return y.reshape(x.shape).astype(x.dtype)


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns mean and biased variance, each (G, C), of x (G, ..., C).

  Computed from the sums of x and x^2: one pass over x, and one round of all-reduces if
  a group spans several devices.
  """
  axes = tuple(range(1, x.ndim - 1))
  mean = x.mean(axes)
  # If a channel is constant, rounding may make the difference negative.
  return mean, jnp.maximum((x * x).mean(axes) - mean * mean, 0)


def _over(x: jax.Array, per_channel: jax.Array) -> jax.Array:
  """Inserts axes of length 1 into (G, C), to broadcast over x (G, ..., C)."""
  return lax.expand_dims(per_channel, range(1, x.ndim - 1))
