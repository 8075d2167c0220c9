"""Residual networks for large images: from images to a map of features."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from lt_jax.errors import UserError, lookup
from lt_jax.models.convolution import (
  INITIALISERS,
  Conv,
  check_output_stride,
  dilated,
)
from lt_jax.models.normalisation import BatchNorm
from lt_jax.models.taps import tap

# A branch lists a block's convolutions in order, as attributes of `Conv`.
Branch = Callable[[int, int], Sequence[Mapping[str, int]]]


def basic(width: int, stride: int) -> Sequence[Mapping[str, int]]:
  """Returns two 3x3 convolutions with `width` channels, the first with the stride."""
  return {'features': width, 'stride': stride}, {'features': width}


def bottleneck(
  width: int, stride: int, *, inner: int = 1, groups: int = 1
) -> Sequence[Mapping[str, int]]:
  """Returns a 1x1 convolution, a strided 3x3 one, and a 1x1 one to 4 width channels.

  The stride is on the 3x3 convolution, as in torchvision; `stride_first` moves it to
  the first one, as in He et al.

  Args:
    width: w.
    stride: stride of the 3x3 convolution.
    inner: the 3x3 convolution has inner w channels.
    groups: groups of the 3x3 convolution.

  Raises:
    UserError: its channels cannot be divided into the groups.

  Source: He et al., arXiv 1512.03385, section 4.1; groups: Xie et al., arXiv
  1611.05431, whose 32x4d is groups = 32 and inner = 32 * 4 / 64.
  """
  if inner * width % groups:
    raise UserError(
      f'a bottleneck of {inner * width} channels does not divide into {groups} groups'
    )
  return (
    {'features': inner * width, 'size': 1},
    {'features': inner * width, 'stride': stride, 'groups': groups},
    {'features': 4 * width, 'size': 1},
  )


def stride_first(
  branch: Branch, width: int, stride: int
) -> Sequence[Mapping[str, int]]:
  """Returns a branch with the stride on its first convolution; if 1x1, it skips pixels.

  Source: the networks published with He et al., arXiv 1512.03385, for Caffe.
  """
  first, *others = branch(width, 1)
  return {**first, 'stride': stride}, *others


class Style(NamedTuple):
  """Differences between implementations of a residual network, besides weights.

  Attributes:
    adapt: branch -> branch.
    pool: rows, and columns, by which the first pooling pads its input before and after.
  """

  adapt: Callable[[Branch], Branch]
  pool: tuple[int, int]


STYLES = {
  'torch': Style(lambda branch: branch, (1, 1)),
  'caffe': Style(lambda branch: partial(stride_first, branch), (0, 1)),
  'deeplab': Style(lambda branch: partial(stride_first, branch), (1, 2)),
}
"""name -> style. All styles have the same parameter names and shapes.

Caffe rounds the size of its pooling up, which equals padding one row after the last.
'deeplab' is what PyTorch versions of Caffe's DeepLab-v2 do (ADVENT's, for example): pad
one row before, as PyTorch does, and round up, as Caffe does.

The pixel format is part of a style too. Weights published for Caffe expect BGR from 0
to 255 minus (103.939, 116.779, 123.68). Converters can fold that into the first kernel,
as in the PyTorch file from which Liu et al. (1904.05160) start on Places-LT: it expects
RGB, normalised as for torchvision's weights. Their network, though, has the style
'torch'.
"""


class Stem(NamedTuple):
  """The layers before the first stage.

  Attributes:
    size: side of the first convolution's kernel.
    stride: stride of that convolution.
    pooled: whether max-pooling over 3x3 pixels at stride 2 follows; otherwise the first
      stage starts with stride 2.
  """

  size: int
  stride: int
  pooled: bool


STEMS = {'large': Stem(7, 2, True), 'small': Stem(3, 1, False)}
"""name -> stem: 'large' for 224 pixels as in He et al.; 'small' for faces of 112.

With 'small' the output stride is 16, not 32, so that 112 pixels give a map of 7 x 7, as
224 pixels do with 'large'.

Source: Deng et al., ArcFace, arXiv 1801.07698, and its code. Only the stem is theirs:
their networks have different blocks and end in a fully connected layer.
"""


class Block(nn.Module):
  """relu(shortcut(x) + branch(x)).

  Every convolution of the branch is normalised, and all but the last are followed by
  ReLU. If the branch changes the shape, the shortcut is a normalised 1x1 convolution;
  otherwise it is x itself.

  Attributes:
    branch: (width, stride) -> convolutions, such as `basic`.
    width: width of the branch.
    stride: stride of the branch and the shortcut.
    dilation: 0 to use the stride; otherwise the block keeps the size of the map and
      reads pixels with this spacing, see `dilated`.
    conv: a constructor like `Conv`.
    norm: a constructor like `BatchNorm`.
  """

  branch: Branch
  width: int
  stride: int
  dilation: int
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps (B, H, W, C) to (B, H / stride, W / stride, C'), rounded up."""
    y = x
    layers = self.branch(self.width, self.stride)
    if self.dilation:
      layers = dilated(layers, self.dilation)
    for place, layer in enumerate(layers, start=1):
      if place > 1:
        y = nn.relu(y)
      y = self.conv(**layer, name=f'conv{place}')(y)
      y = self.norm(name=f'norm{place}')(y, train=train)
    if x.shape != y.shape:
      stride = 1 if self.dilation else self.stride
      shape = {'features': y.shape[-1], 'size': 1, 'stride': stride}
      x = self.conv(**shape, name='shortcut_conv')(x)
      x = self.norm(name='shortcut_norm')(x, train=train)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """The residual network for images of 224 x 224 pixels.

  A 7x7 convolution with stride 2 to w channels, max-pooling over 3x3 pixels at stride
  2, then four stages of blocks with widths w, 2w, 4w and 8w, of which all but the first
  start with stride 2. The activation comes after the addition ("v1"). `STEMS` has a
  different stem for smaller images.

  Attributes:
    branch: branch of every block, such as `basic`.
    blocks: number of blocks in each stage.
    width: w.
    pool: rows, and columns, by which the first pooling pads its input before and after.
    stem: the layers before the first stage.
    output_stride: image pixels per map pixel; below 32, the last stages use dilation
      instead of strides, see `dilated`.
    also: stages whose maps are returned too, such as 'stage3'.
    conv: a constructor like `Conv`.
    norm: a constructor like `BatchNorm`.

  Taps: 'stem' and every block.

  Source: He et al., arXiv 1512.03385, table 1, with projections where the shape changes
  (option B). The depth counts the convolutions, except those of shortcuts, and a linear
  head.
  """

  branch: Branch
  blocks: Sequence[int]
  width: int
  pool: tuple[int, int] = (1, 1)
  stem: Stem = STEMS['large']
  output_stride: int = 32
  also: Sequence[str] = ()
  conv: Callable[..., nn.Module] = Conv
  norm: Callable[..., nn.Module] = BatchNorm

  @nn.compact
  def __call__(
    self, images: jax.Array, *, train: bool
  ) -> jax.Array | dict[str, jax.Array]:
    """Maps (B, H, W, C) images to (B, H / 32, W / 32, C'), rounded up.

    C' is 8 w for basic blocks and 32 w for bottlenecks. If the pooling is not padded
    before its input, it rounds an odd map down. With the stem 'small' the map is (H /
    16, W / 16). If `also` names stages, the result is a dict with their maps and this
    one, 'features'.
    """
    size, stride, pooled = self.stem
    x = self.conv(self.width, size=size, stride=stride, name='conv')(images)
    x = nn.relu(self.norm(name='norm')(x, train=train))
    if pooled:
      x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=(self.pool, self.pool))
    x = tap(self, 'stem', x)
    reached, dilation, maps = stride * (2 if pooled else 1), 1, {}
    for stage, blocks in enumerate(self.blocks):
      for block in range(blocks):
        name = f'stage{stage + 1}_block{block + 1}'
        stride = 2 if (stage > 0 or not pooled) and block == 0 else 1
        stays = reached * stride > self.output_stride or dilation > 1
        x = Block(
          self.branch,
          self.width * 2**stage,
          stride=stride,
          dilation=dilation if stays else 0,
          conv=self.conv,
          norm=self.norm,
          name=name,
        )(x, train=train)
        x = tap(self, name, x)
        reached, dilation = (
          (reached, dilation * stride) if stays else (reached * stride, dilation)
        )
      maps[f'stage{stage + 1}'] = x
    if not self.also:
      return x
    others = {name: lookup(maps, 'stage', name) for name in self.also}
    return {'features': x, **others}


def resnet(
  branch: Branch,
  blocks: Sequence[int],
  /,
  *,
  width: int = 64,
  style: str = 'torch',
  stem: str = 'large',
  output_stride: int = 32,
  also: Sequence[str] = (),
  init: str = 'kaiming_fan_out',
  dtype: Any = None,
  norm: Callable[..., nn.Module] = BatchNorm,
) -> ResNet:
  """Returns a `ResNet`, given the names of its style, stem and initialisation."""
  adapt, pool = lookup(STYLES, 'style', style)
  check_output_stride(output_stride)
  kernel_init = lookup(INITIALISERS, 'initialisation', init)
  return ResNet(
    adapt(branch),
    tuple(blocks),
    width,
    pool,
    lookup(STEMS, 'stem', stem),
    output_stride,
    tuple(also),
    conv=partial(Conv, kernel_init=kernel_init, dtype=dtype),
    norm=norm,
  )


RESNETS: dict[str, Callable[..., ResNet]] = {
  'resnet10': partial(resnet, basic, (1, 1, 1, 1)),
  'resnet18': partial(resnet, basic, (2, 2, 2, 2)),
  'resnet34': partial(resnet, basic, (3, 4, 6, 3)),
  'resnet50': partial(resnet, bottleneck, (3, 4, 6, 3)),
  'resnet101': partial(resnet, bottleneck, (3, 4, 23, 3)),
  'resnet152': partial(resnet, bottleneck, (3, 8, 36, 3)),
  'resnext50_32x4d': partial(
    resnet, partial(bottleneck, inner=2, groups=32), (3, 4, 6, 3)
  ),
}
"""name -> (style, stem, init, dtype, norm, ...) -> a trunk for large images."""
