"""EfficientNet-Lite0: a network cheap enough for photographs on a CPU."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from lt_jax.errors import lookup
from lt_jax.models.convolution import INITIALISERS, Conv, check_output_stride
from lt_jax.models.normalisation import BatchNorm
from lt_jax.models.taps import tap


class Stage(NamedTuple):
  """A sequence of equal blocks, of which the first has a stride.

  Attributes:
    blocks: number of blocks.
    size: side of the kernels of their depthwise convolutions.
    stride: stride of the first block.
    expansion: ratio of channels inside a block to those that enter it.
    features: number of output channels.
  """

  blocks: int
  size: int
  stride: int
  expansion: int
  features: int


B0 = (
  Stage(1, 3, 1, 1, 16),
  Stage(2, 3, 2, 6, 24),
  Stage(2, 5, 2, 6, 40),
  Stage(3, 3, 2, 6, 80),
  Stage(3, 5, 1, 6, 112),
  Stage(4, 5, 2, 6, 192),
  Stage(1, 3, 1, 6, 320),
)
"""Tan and Le, arXiv 1905.11946, table 1."""


class InvertedResidual(nn.Module):
  """A 1x1 convolution to more channels, a depthwise one, and a 1x1 one to fewer.

  All are normalised, the first two are followed by ReLU6, and x is added if the shape
  does not change. Without expansion the first convolution is left out.

  Attributes:
    stage: the stage it belongs to.
    stride: stride of the depthwise convolution.
    dilation: dilation of the depthwise convolution.
    conv: a constructor like `Conv`.
    norm: a constructor like `BatchNorm`.

  Source: Sandler et al., MobileNetV2, arXiv 1801.04381, section 3.3.
  """

  stage: Stage
  stride: int
  dilation: int
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps (B, H, W, C) to (B, H / stride, W / stride, features), rounded up."""
    inside = self.stage.expansion * x.shape[-1]
    y = x
    if self.stage.expansion > 1:
      y = self.conv(inside, size=1, name='expand_conv')(y)
      y = nn.relu6(self.norm(name='expand_norm')(y, train=train))
    y = self.conv(
      inside,
      size=self.stage.size,
      stride=self.stride,
      dilation=self.dilation,
      groups=inside,
      pad='SAME',
      name='depthwise_conv',
    )(y)
    y = nn.relu6(self.norm(name='depthwise_norm')(y, train=train))
    y = self.conv(self.stage.features, size=1, name='project_conv')(y)
    y = self.norm(name='project_norm')(y, train=train)
    return x + y if x.shape == y.shape else y


class EfficientNetLite(nn.Module):
  """EfficientNet without squeeze-and-excitation, and with ReLU6 instead of swish.

  A 3x3 convolution with stride 2, seven stages of inverted residuals, and a 1x1
  convolution. Strided convolutions are padded as in TensorFlow, where the published
  weights come from.

  Attributes:
    stages: the stages, such as `B0`.
    first: channels after the first convolution.
    last: channels after the last one.
    output_stride: image pixels per map pixel; below 32, the last stages use dilation
      instead of strides, see `lt_jax.models.convolution.dilated`.
    conv: a constructor like `Conv`.
    norm: a constructor like `BatchNorm`.

  Taps: 'stem', every block ('stage1_block1', ...), 'last'.

  Source: Tan and Le, arXiv 1905.11946; "lite" follows the authors' code, where the
  first and the last layer have the same width in all sizes. Theirs also drops blocks at
  random in training (stochastic depth) and a fifth of the features; this one does
  neither.
  """

  stages: Sequence[Stage] = B0
  first: int = 32
  last: int = 1280
  output_stride: int = 32
  conv: Callable[..., nn.Module] = Conv
  norm: Callable[..., nn.Module] = BatchNorm

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps (B, H, W, C) images to (B, H / 32, W / 32, last), rounded up."""
    x = self.conv(self.first, stride=2, pad='SAME', name='stem_conv')(images)
    x = nn.relu6(self.norm(name='stem_norm')(x, train=train))
    x = tap(self, 'stem', x)
    reached, dilation = 2, 1
    for number, stage in enumerate(self.stages, 1):
      for block in range(1, stage.blocks + 1):
        name = f'stage{number}_block{block}'
        stride = stage.stride if block == 1 else 1
        stays = reached * stride > self.output_stride
        shape = {'conv': self.conv, 'norm': self.norm, 'name': name}
        x = InvertedResidual(stage, 1 if stays else stride, dilation, **shape)(
          x, train=train
        )
        x = tap(self, name, x)
        if stays:
          dilation *= stride
        else:
          reached *= stride
    x = self.conv(self.last, size=1, name='last_conv')(x)
    x = nn.relu6(self.norm(name='last_norm')(x, train=train))
    return tap(self, 'last', x)


def efficientnet_lite0(
  *,
  output_stride: int = 32,
  init: str = 'kaiming_fan_out',
  dtype: Any = None,
  norm: Callable[..., nn.Module] = BatchNorm,
) -> EfficientNetLite:
  """Returns `EfficientNetLite` with B0's stages; `init` is a key of `INITIALISERS`.

  It normalises with TensorFlow's epsilon of 0.001. Its running averages have a momentum
  of 0.9, like all trunks here, rather than TensorFlow's 0.99.
  """
  check_output_stride(output_stride)
  kernel_init = lookup(INITIALISERS, 'initialisation', init)
  conv = partial(Conv, kernel_init=kernel_init, dtype=dtype)
  norm = partial(norm, epsilon=1e-3)
  return EfficientNetLite(output_stride=output_stride, conv=conv, norm=norm)


EFFICIENTNETS = {'efficientnet_lite0': efficientnet_lite0}
"""name -> (init, dtype, norm) -> a trunk for photographs."""
