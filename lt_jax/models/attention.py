"""Modulated attention: self-attention over a map of features, weighted by position."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lt_jax.models.convolution import INITIALISERS
from lt_jax.models.heads import dense


class ModulatedAttention(nn.Module):
  r"""Self-attention over the pixels of a map, added with a learned weight per pixel.

  For the pixels x (P, C) of one image, P = H W:

  .. math::
    A = \mathrm{softmax}(\theta(x)\, \phi(x)^\top), \qquad
    s = \mathrm{softmax}_P(W_s\, \mathrm{vec}(x) + b_s), \qquad
    y = x + s \odot (A\, g(x)) W_o

  theta, phi and g are linear from C to C / 2 channels, with a bias; W_o is linear from
  C / 2 to C, without one; s is one number per pixel. The weights of these four are
  drawn from N(0, 2 / output channels), so that attention does not start as the
  identity; W_s is drawn as in PyTorch.

  Attributes:
    dtype: type of the computation; None for that of the input. Both softmaxes use
      float32.

  Source: Liu et al., arXiv 1904.05160, with the scaling, the initialisation and the
  softmax over pixels from the authors' code. There vec(x) has the order C, H, W; here
  it is H, W, C.
  """

  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (B, H, W, C), C even, to the same shape.

    Stores s in the intermediates, as 'place' (B, H, W).
    """
    batch, height, width, channels = x.shape
    dtype = self.dtype or x.dtype
    pixels = x.reshape(batch, height * width, channels)
    theta, phi, g = (
      dense(
        channels // 2,
        inputs=channels,
        kernel_init=INITIALISERS['kaiming_fan_out'],
        dtype=dtype,
        name=name,
      )(pixels)
      for name in ('theta', 'phi', 'g')
    )
    similarity = jnp.einsum('bpc,bqc->bpq', theta, phi, precision=lax.Precision.HIGHEST)
    attention = _softmax(similarity)
    read = jnp.einsum('bpq,bqc->bpc', attention, g, precision=lax.Precision.HIGHEST)
    attended = nn.Dense(
      channels,
      use_bias=False,
      kernel_init=INITIALISERS['kaiming_fan_out'],
      dtype=dtype,
      precision=lax.Precision.HIGHEST,
      name='out',
    )(read)
    flat = x.reshape(batch, -1)
    place = dense(height * width, inputs=flat.shape[-1], dtype=dtype, name='spatial')(
      flat
    )
    share = _softmax(place)
    self.sow('intermediates', 'place', share.reshape(x.shape[:-1]))
    return (pixels + share[..., None] * attended).reshape(x.shape)


def _softmax(x: jax.Array) -> jax.Array:
  """Returns the softmax over the last axis, computed in at least float32."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return jax.nn.softmax(wide, axis=-1).astype(x.dtype)
