"""The convolution that every network uses, made fast on CPUs."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax

from lt_jax.errors import UserError


def kaiming(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
  """Draws from N(0, 2 / fan_in), for layers before a ReLU.

  Args:
    key: random key.
    shape: (..., inputs, outputs), spatial axes first.
    dtype: type of the kernel.

  Source: He et al., arXiv 1502.01852, equation 10. Untruncated, as in PyTorch.
  """
  return _normal(key, shape, dtype, fan=math.prod(shape[:-1]))


def kaiming_fan_out(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
  """Draws from N(0, 2 / fan_out), where fan_out counts the outputs of all groups.

  Args:
    key: random key.
    shape: (..., inputs, outputs), spatial axes first.
    dtype: type of the kernel.

  Source: He et al., arXiv 1502.01852, equation 14; used by torchvision's residual
  networks and the code of Liu et al. (1904.05160).
  """
  return _normal(key, shape, dtype, fan=math.prod(shape[:-2]) * shape[-1])


def _normal(key: jax.Array, shape: Sequence[int], dtype: Any, *, fan: int) -> jax.Array:
  """Draws from N(0, 2 / fan), untruncated."""
  draw = jax.random.normal(key, (math.prod(shape),), dtype)
  return math.sqrt(2 / fan) * draw.reshape(shape)


def glorot(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
  """Draws from U(-a, a) with a^2 = 6 / (fan_in + fan_out).

  Args:
    key: random key.
    shape: (..., inputs, outputs), spatial axes first.
    dtype: type of the kernel.

  Source: Glorot and Bengio, AISTATS 2010, equation 16.
  """
  bound = math.sqrt(6 / (math.prod(shape[:-2]) * (shape[-2] + shape[-1])))
  draw = jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound)
  return draw.reshape(shape)


# All draw a flat array and reshape it, which gives the same numbers: XLA:CPU takes 15
# times as long to compile a draw with four axes (4 s for one kernel).
INITIALISERS = {
  'kaiming': kaiming,
  'kaiming_fan_out': kaiming_fan_out,
  'glorot': glorot,
}


def conv(
  x: jax.Array,
  kernel: jax.Array,
  stride: int = 1,
  groups: int = 1,
  pad: int | str | None = None,
  dilation: int = 1,
) -> jax.Array:
  """Convolves with zero padding of d (size - 1) / 2 on every side, or `pad`.

  The padding is explicit: 'SAME' pads strided convolutions on one side only, unlike
  most papers' networks. Networks from TensorFlow need 'SAME'.

  Args:
    x: (B, H, W, C) images.
    kernel: (size, size, C / groups, D), with an odd size to keep the image's size.
    stride: stride in pixels along both axes.
    groups: the g-th part of the outputs only reads the g-th part of the inputs. If
      groups = C = D, a depthwise convolution, CPUs sum shifted images.
    pad: pixels of padding on every side, or 'SAME'; None for d (size - 1) / 2.
    dilation: d, the spacing of the pixels that a kernel reads.

  Returns:
    (B, H', W', D); with the default padding and with 'SAME', H' is ceil(H / stride).
  """
  padding = [
    _padding(side, dilation * (size - 1) + 1, stride, pad)
    for side, size in zip(x.shape[1:3], kernel.shape[:2], strict=True)
  ]
  shape = {'stride': stride, 'padding': padding}
  whole = partial(_convolved, groups=groups, dilation=dilation, **shape)
  if 1 < groups == x.shape[-1] == kernel.shape[-1]:
    on_cpu = partial(_shifted_products, dilation=dilation, **shape)
  elif kernel.shape[:2] == (1, 1) and (stride, groups, pad) == (1, 1, None):
    on_cpu = _pixel_by_pixel
  else:
    return _unfused(whole(_unfused(x), kernel))
  return lax.platform_dependent(x, kernel, cpu=on_cpu, default=whole)


def dilated(
  layers: Sequence[Mapping[str, Any]], dilation: int
) -> Sequence[Mapping[str, Any]]:
  """Replaces strides of consecutive convolutions by dilation, keeping what they see.

  After a convolution that had a stride, later ones read pixels that are further apart
  by that factor. So every s-th pixel of the larger map, where s is the product of the
  strides, is what the strided convolutions compute, if the input map has an odd size or
  is padded evenly. The pixels in between are new.

  Args:
    layers: attributes of `Conv`, in order.
    dilation: spacing of the pixels that the first one reads.

  Returns:
    Their attributes, with 'dilation' instead of 'stride'.

  Source: the "hole algorithm" of Chen et al., arXiv 1412.7062, section 3.1.
  """
  found = []
  for layer in layers:
    found.append({**layer, 'stride': 1, 'dilation': dilation})
    dilation *= layer.get('stride', 1)
  return found


def check_output_stride(stride: int) -> None:
  """Rejects output strides that a network with five halvings cannot have.

  Raises:
    UserError: it is not 8, 16 or 32.
  """
  if stride not in (8, 16, 32):
    raise UserError(f'output_stride is {stride}; it must be 8, 16 or 32')


def _padding(
  side: int, size: int, stride: int, pad: int | str | None
) -> tuple[int, int]:
  """Returns the pixels to pad before and after along an axis."""
  if pad == 'SAME':
    missing = max((-(-side // stride) - 1) * stride + size - side, 0)
    return missing // 2, missing - missing // 2
  pad = size // 2 if pad is None else pad
  return pad, pad


def _convolved(
  x: jax.Array,
  kernel: jax.Array,
  stride: int,
  groups: int,
  padding: Sequence[tuple[int, int]],
  dilation: int,
) -> jax.Array:
  """Convolves with the compiler's own operation."""
  return lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(stride, stride),
    padding=padding,
    rhs_dilation=(dilation, dilation),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


def _pixel_by_pixel(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves with a 1x1 kernel, as a matrix product.

  XLA:CPU does the same, but would compute the kernel's gradient as a convolution with a
  kernel as large as the image.
  """
  return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], -1)


def _shifted_products(
  x: jax.Array,
  kernel: jax.Array,
  stride: int,
  padding: Sequence[tuple[int, int]],
  dilation: int,
) -> jax.Array:
  """Convolves every channel by itself, as a sum of one shifted image per kernel pixel.

  XLA:CPU has no fast code for depthwise convolutions. It goes image by image, so that
  data read repeatedly stay in the cache, and because XLA would otherwise store every
  shifted batch for the gradients (docs/speed.md).
  """
  rows, columns = kernel.shape[:2]

  @partial(jax.checkpoint, prevent_cse=False)
  def convolved(image: jax.Array, kernel: jax.Array) -> jax.Array:
    image = jnp.pad(image, (*padding, (0, 0)))
    height = 1 + (image.shape[0] - dilation * (rows - 1) - 1) // stride
    width = 1 + (image.shape[1] - dilation * (columns - 1) - 1) // stride

    def product(i: int, j: int) -> jax.Array:
      y, x = dilation * i, dilation * j
      end = y + stride * (height - 1) + 1, x + stride * (width - 1) + 1
      part = lax.slice(image, (y, x, 0), (*end, image.shape[-1]), (stride, stride, 1))
      return part * kernel[i, j][None]

    return sum(product(i, j) for i in range(rows) for j in range(columns))

  return lax.map(lambda image: convolved(image, kernel), x)


def _unfused(x: jax.Array) -> jax.Array:
  """Keeps XLA:CPU from fusing surrounding operations into a convolution.

  A kernel gradient needs transposed operands, and XLA:CPU fuses those transposes with
  the backward pass of batch normalisation into slow strided loops. GPU and TPU
  compilers fuse well and are left alone.
  """
  return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


@jax.custom_jvp
def max_pool(x: jax.Array) -> jax.Array:
  """Takes the maximum over squares of 2x2 pixels; an odd edge is left out.

  The gradient goes to the first of equal maxima, as in `nn.max_pool`. The gradient of
  `nn.max_pool` itself is computed pixel by pixel by XLA:CPU and took longer than the
  convolutions.

  Args:
    x: (B, H, W, C).

  Returns:
    (B, H / 2, W / 2, C), rounded down.
  """
  return _squares(x).max((2, 4))


@max_pool.defjvp
def _max_pool_jvp(
  primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  squares, along = _squares(*primals), _squares(*tangents)
  y = squares.max((2, 4))
  winner = jnp.full(y.shape, 3, jnp.int8)
  for place in (2, 1, 0):
    there = squares[:, :, place // 2, :, place % 2] == y
    winner = jnp.where(there, jnp.int8(place), winner)
  places = lax.expand_dims(jnp.arange(4, dtype=jnp.int8).reshape(2, 1, 2), (0, 1, 5))
  won = winner[:, :, None, :, None] == places
  return y, jnp.where(won, along, 0).sum((2, 4))


def _squares(x: jax.Array) -> jax.Array:
  """Returns (B, H, W, C) as (B, H / 2, 2, W / 2, 2, C)."""
  height, width = (side // 2 for side in x.shape[1:3])
  whole = x[:, : 2 * height, : 2 * width]
  # Not len(x): the batch size of an exported program is unknown.
  return whole.reshape(x.shape[0], height, 2, width, 2, x.shape[-1])


class Conv(nn.Module):
  """A convolution, by default without bias, as used before batch normalisation.

  Attributes:
    features: number of output channels.
    size: side of the kernel, an odd number.
    stride: stride in pixels.
    groups: number of equal parts of the channels that do not mix.
    pad: pixels of zero padding on every side, or 'SAME', see `conv`; None keeps the
      size of the image.
    dilation: spacing of the pixels that a kernel reads.
    bias: add a bias, initially zero.
    kernel_init: (key, shape, dtype) -> kernel, one of `INITIALISERS`.
    dtype: type of the computation; None for that of input and kernel. Parameters are
      float32.
  """

  features: int
  size: int = 3
  stride: int = 1
  groups: int = 1
  pad: int | str | None = None
  dilation: int = 1
  bias: bool = False
  kernel_init: Callable[..., jax.Array] = kaiming
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (B, H, W, C) to (B, H', W', features)."""
    shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
    kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)
    x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
    y = conv(x, kernel, self.stride, self.groups, self.pad, self.dilation)
    if self.bias:
      zeros = nn.initializers.zeros
      bias = self.param('bias', zeros, (self.features,), jnp.float32)
      y += jnp.asarray(bias, y.dtype)[None, None, None]
    return y
