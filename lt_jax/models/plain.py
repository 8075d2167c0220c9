"""AlexNet and VGG-16: a sequence of convolutions, then two hidden linear layers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax

from lt_jax.errors import UserError, lookup
from lt_jax.models.convolution import INITIALISERS, Conv, max_pool
from lt_jax.models.normalisation import BatchNorm
from lt_jax.models.taps import tap


def adaptive_mean(x: jax.Array, side: int) -> jax.Array:
  """Resizes a map to side x side pixels, each the mean of the pixels it overlaps.

  Along an axis of n pixels, output i is the mean of inputs floor(i n / side) to
  ceil((i + 1) n / side) - 1. A map that already has the size is not changed.

  Args:
    x: (B, H, W, C).
    side: side of the result, which may be larger than the map.

  Source: AdaptiveAvgPool2d of PyTorch, with which torchvision's networks accept images
  of any size.
  """
  for axis in (1, 2):
    pixels = x.shape[axis]
    if pixels != side:
      ends = [(i * pixels // side, -(-(i + 1) * pixels // side)) for i in range(side)]
      parts = [lax.slice_in_dim(x, *end, axis=axis).mean(axis) for end in ends]
      x = jnp.stack(parts, axis)
  return x


def response_norm(x: jax.Array) -> jax.Array:
  r"""Divides each channel by the size of its neighbours at the same pixel.

  .. math::
    b_c = a_c \Big/ \Big(k + \alpha \sum_{|c' - c| \le n / 2} a_{c'}^2\Big)^\beta

  with k = 2, n = 5, alpha = 1e-4, beta = 0.75.

  Args:
    x: (B, H, W, C).

  Source: Krizhevsky et al., NIPS 2012, section 3.3. Caffe and PyTorch divide alpha
  by n.
  """
  channels = x.shape[-1]
  squares = jnp.pad(x * x, ((0, 0), (0, 0), (0, 0), (2, 2)))
  total = sum(squares[..., i : i + channels] for i in range(5))
  return x * (2 + 1e-4 * total) ** -0.75


class WholeMap(nn.Module):
  """A linear layer over a whole map: a convolution with a kernel of the map's size.

  Attributes:
    features: number of outputs.
    kernel_init: (key, shape, dtype) -> kernel, one of `INITIALISERS`.
    dtype: type of the computation; None for that of input and kernel.
  """

  features: int
  kernel_init: Callable[..., jax.Array]
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (B, H, W, C) to (B, features)."""
    shape = (*x.shape[1:], self.features)
    kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, shape[-1:], jnp.float32)
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
    return x.reshape(x.shape[0], -1) @ kernel.reshape(-1, self.features) + bias[None]


def hidden_layers(
  trunk: nn.Module, x: jax.Array, side: int, features: int
) -> dict[str, jax.Array]:
  """Applies two hidden linear layers with ReLU to a map, as layers of a trunk.

  Args:
    trunk: the trunk they become part of; its `conv` determines their initialisation
      and type.
    x: (B, H, W, C).
    side: side of the map that the first one reads.
    features: size of each layer.

  Returns:
    'fc6', 'fc7' and 'features', the same as 'fc7', each (B, features).
  """
  given = {key: trunk.conv.keywords[key] for key in ('kernel_init', 'dtype')}
  first = WholeMap(features, **given, name='fc6')
  second = nn.Dense(features, **given, name='fc7')
  fc6 = tap(trunk, 'fc6', nn.relu(first(adaptive_mean(x, side))))
  fc7 = tap(trunk, 'fc7', nn.relu(second(fc6)))
  return {'fc6': fc6, 'fc7': fc7, 'features': fc7}


def max_rounded_down(x: jax.Array) -> jax.Array:
  """Takes the maximum over 3x3 pixels at stride 2, inside the map only."""
  return nn.max_pool(x, (3, 3), (2, 2))


def max_rounded_up(x: jax.Array) -> jax.Array:
  """Takes the maximum over 3x3 pixels at stride 2; the last may extend over the edge.

  Caffe and cuda-convnet do the same.
  """
  beyond = [(0, (side - 3) % 2) for side in x.shape[1:3]]
  return nn.max_pool(x, (3, 3), (2, 2), beyond)


class Layer(NamedTuple):
  """A convolution with bias and ReLU, and the operations after it.

  Attributes:
    features: number of output channels.
    size: side of the kernel.
    stride: stride in pixels.
    pad: pixels of zero padding on every side.
    groups: number of equal parts of the channels that do not mix.
    then: functions of the map, in order.
  """

  features: int
  size: int
  stride: int = 1
  pad: int = 1
  groups: int = 1
  then: Sequence[Callable[[jax.Array], jax.Array]] = ()


STYLES: dict[str, Sequence[Layer]] = {
  'krizhevsky': (
    Layer(96, 11, stride=4, pad=0, then=(response_norm, max_rounded_up)),
    Layer(256, 5, pad=2, groups=2, then=(response_norm, max_rounded_up)),
    Layer(384, 3),
    Layer(384, 3, groups=2),
    Layer(256, 3, groups=2, then=(max_rounded_up,)),
  ),
  'zeiler_fergus': (
    Layer(96, 7, stride=2, then=(max_rounded_up, response_norm)),
    Layer(256, 5, stride=2, pad=0, then=(max_rounded_up, response_norm)),
    Layer(384, 3),
    Layer(384, 3),
    Layer(256, 3, then=(max_rounded_up,)),
  ),
  'torchvision': (
    Layer(64, 11, stride=4, pad=2, then=(max_rounded_down,)),
    Layer(192, 5, pad=2, then=(max_rounded_down,)),
    Layer(384, 3),
    Layer(256, 3),
    Layer(256, 3, then=(max_rounded_down,)),
  ),
}
"""name -> convolutions.

'krizhevsky': Krizhevsky et al., NIPS 2012, figure 2: two GPUs exchange maps before the
third convolution only. Images of 224 pixels, or of the 227 that its sizes need, both
become 6x6.
'zeiler_fergus': Zeiler and Fergus, arXiv 1311.2901, figure 3: 224 pixels to maps of
110, 55, 26, 13 and 6. They do not give the constants of their contrast normalisation;
`response_norm` replaces it.
'torchvision': one tower without normalisation, after Krizhevsky, arXiv 1404.5997; the
only one with published weights.
"""


class AlexNet(nn.Module):
  """Five convolutions and two hidden linear layers.

  The papers' networks also have dropout of 0.5 on the hidden layers, and smaller
  initial weights; this one has neither.

  Attributes:
    layers: convolutions, such as one of `STYLES`.
    hidden: size of each hidden layer.
    side: side of the map that the first of them reads; other sizes are averaged to it.
    conv: a constructor like `Conv`, with the keywords kernel_init and dtype.

  Taps: 'conv1' to 'conv5', each with what follows the convolution, 'fc6', 'fc7'.
  """

  layers: Sequence[Layer]
  hidden: int = 4096
  side: int = 6
  conv: Callable[..., nn.Module] = Conv

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Maps (B, H, W, C) images to 'fc6', 'fc7' and 'features', each (B, hidden)."""
    del train  # nothing here depends on it
    x = images
    for number, (features, size, stride, pad, groups, then) in enumerate(
      self.layers, 1
    ):
      shape = {'size': size, 'stride': stride, 'pad': pad, 'groups': groups}
      x = self.conv(features, **shape, bias=True, name=f'conv{number}')(x)
      x = nn.relu(x)
      for function in then:
        x = function(x)
      _check_size(images, x)
      x = tap(self, f'conv{number}', x)
    return hidden_layers(self, x, self.side, self.hidden)


class VGG(nn.Module):
  """Stages of 3x3 convolutions with bias and ReLU, each followed by max-pooling.

  The paper's network also has dropout of 0.5 on the hidden layers.

  Attributes:
    stages: number of convolutions and their channels, for every stage.
    normalised: apply batch normalisation before each ReLU of a convolution.
    hidden: size of each hidden layer.
    side: side of the map that the first of them reads; other sizes are averaged to it.
    conv: a constructor like `Conv`, with the keywords kernel_init and dtype.
    norm: a constructor like `BatchNorm`.

  Taps: 'conv1' to 'conv5', each a stage with its pooling, 'fc6', 'fc7'.

  Source: Simonyan and Zisserman, arXiv 1409.1556, table 1, column D.
  """

  stages: Sequence[tuple[int, int]] = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
  normalised: bool = False
  hidden: int = 4096
  side: int = 7
  conv: Callable[..., nn.Module] = Conv
  norm: Callable[..., nn.Module] = BatchNorm

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Maps (B, H, W, C) images to 'fc6', 'fc7' and 'features', each (B, hidden)."""
    x = images
    for stage, shape in enumerate(self.stages, 1):
      x = max_pool(convolve_stage(self, x, stage, shape, train=train))
      _check_size(images, x)
      x = tap(self, f'conv{stage}', x)
    return hidden_layers(self, x, self.side, self.hidden)


def convolve_stage(
  trunk: nn.Module,
  x: jax.Array,
  stage: int,
  shape: tuple[int, int],
  *,
  train: bool,
  pad: int | None = None,
  dilation: int = 1,
) -> jax.Array:
  """Applies the convolutions of a stage of VGG, as layers of a trunk.

  Args:
    trunk: the trunk they become part of; it provides `conv`, and `norm` if it is
      `normalised`.
    x: (B, H, W, C).
    stage: its number, from 1.
    shape: number of convolutions and their channels.
    train: normalise by batch statistics.
    pad: pixels of padding for the first one; None keeps the size of the map.
    dilation: spacing of the pixels that a kernel reads.
  """
  convolutions, features = shape
  for place in range(1, convolutions + 1):
    around = {'pad': pad if place == 1 else None, 'dilation': dilation}
    x = trunk.conv(features, bias=True, **around, name=f'conv{stage}_{place}')(x)
    if trunk.normalised:
      x = trunk.norm(name=f'norm{stage}_{place}')(x, train=train)
    x = nn.relu(x)
  return x


def _check_size(images: jax.Array, x: jax.Array) -> None:
  """Rejects images that are too small to leave a pixel."""
  if not x.size:
    height, width = images.shape[1:3]
    raise UserError(
      f'images of {height} x {width} pixels are too small for this network: give it '
      'at least 64 x 64 (config.data.size or config.data.image_size)'
    )


def alexnet(
  *, style: str = 'krizhevsky', init: str = 'kaiming', dtype: Any = None
) -> AlexNet:
  """Returns an `AlexNet`, given the names of its style and initialisation."""
  return AlexNet(lookup(STYLES, 'style', style), conv=_conv(init, dtype))


def vgg16(
  normalised: bool,
  /,
  *,
  init: str = 'kaiming',
  dtype: Any = None,
  norm: Callable[..., nn.Module] = BatchNorm,
) -> VGG:
  """Returns a `VGG` of 16 layers; `init` is a key of `INITIALISERS`."""
  return VGG(normalised=normalised, conv=_conv(init, dtype), norm=norm)


def _conv(init: str, dtype: Any) -> Callable[..., nn.Module]:
  """Returns the constructor of a trunk's convolutions."""
  kernel_init = lookup(INITIALISERS, 'initialisation', init)
  return partial(Conv, kernel_init=kernel_init, dtype=dtype)


PLAIN: dict[str, Callable[..., nn.Module]] = {
  'alexnet': alexnet,
  'vgg16': partial(vgg16, False),
  'vgg16_bn': partial(vgg16, True),
}
"""name -> (style or norm, init, dtype) -> a trunk for photographs."""
