"""DeepLab-v2: trunks with dilation instead of strides, and a head of many dilations."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from flax import linen as nn

from lt_jax.errors import lookup
from lt_jax.models.convolution import (
  INITIALISERS,
  Conv,
  check_output_stride,
  max_pool,
)
from lt_jax.models.normalisation import BatchNorm
from lt_jax.models.plain import convolve_stage
from lt_jax.models.resnet import bottleneck, resnet
from lt_jax.models.segmentation import MultiDilation
from lt_jax.models.taps import tap
from lt_jax.models.upsampling import resize


class DilatedVGG(nn.Module):
  """The convolutions of VGG, where the last stages dilate instead of shrinking the map.

  After a max-pooling that is left out, stages read pixels twice as far apart.

  Attributes:
    stages: number of convolutions and their channels, for every stage.
    normalised: apply batch normalisation before each ReLU.
    output_stride: image pixels per map pixel: 8 leaves out the max-pooling after the
      fourth and fifth stages, 32 leaves out none.
    also: stages whose maps are returned too, such as 'conv4'.
    conv: a constructor like `Conv`.
    norm: a constructor like `BatchNorm`.

  Taps: 'conv1' to 'conv5', each a stage with its max-pooling, if any.

  Source: Chen et al., DeepLab-v2, arXiv 1606.00915, section 4.1. In the authors' code
  for C-Driving (Liu et al., arXiv 1909.03403) the network is the normalised one with
  `hidden` of (1024, 1024) in the head at dilation 4, and without an auxiliary head.
  That head returns from inside its loop, so of the dilations 6, 12, 18 and 24 it sums
  only the first two.
  """

  stages: Sequence[tuple[int, int]] = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
  normalised: bool = True
  output_stride: int = 8
  also: Sequence[str] = ()
  conv: Callable[..., nn.Module] = Conv
  norm: Callable[..., nn.Module] = BatchNorm

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Maps (B, H, W, C) images to 'features', (B, H / 8, W / 8, D), rounded down."""
    x, stride, dilation, maps = images, 1, 1, {}
    for stage, shape in enumerate(self.stages, 1):
      x = convolve_stage(self, x, stage, shape, train=train, dilation=dilation)
      if stride < self.output_stride:
        x, stride = max_pool(x), 2 * stride
      else:
        dilation *= 2
      maps[f'conv{stage}'] = x = tap(self, f'conv{stage}', x)
    return {'features': x} | {name: lookup(maps, 'stage', name) for name in self.also}


def dilated_vgg16(
  normalised: bool,
  /,
  *,
  output_stride: int = 8,
  also: Sequence[str] = (),
  init: str = 'kaiming',
  dtype: Any = None,
  norm: Callable[..., nn.Module] = BatchNorm,
) -> DilatedVGG:
  """Returns a `DilatedVGG` of 13 convolutions; `init` is a key of `INITIALISERS`."""
  check_output_stride(output_stride)
  kernel_init = lookup(INITIALISERS, 'initialisation', init)
  conv = partial(Conv, kernel_init=kernel_init, dtype=dtype)
  return DilatedVGG(
    normalised=normalised,
    output_stride=output_stride,
    also=tuple(also),
    conv=conv,
    norm=norm,
  )


class DeepLabHead(nn.Module):
  """Sums of dilated convolutions over one or two maps, resized to the images' size.

  Attributes:
    num_classes: C.
    dilations: dilations of the 3x3 convolutions that are summed.
    hidden: sizes of 3x3 convolutions with bias and ReLU before them.
    hidden_dilation: dilation of these.
    auxiliary: a map of the trunk that gets its own sum; empty for none.
    aligned_corners: how logits are resized, see `resize`.

  Source: Chen et al., DeepLab-v2, arXiv 1606.00915, section 3.2; the auxiliary sum:
  Tsai et al. (AdaptSegNet), arXiv 1802.10349, section 4.2, and ADVENT. Those initialise
  biases at random, here they start at zero.
  """

  num_classes: int
  dilations: Sequence[int] = (6, 12, 18, 24)
  hidden: Sequence[int] = ()
  hidden_dilation: int = 4
  auxiliary: str = ''
  aligned_corners: bool = True
  of_layers = True

  @nn.compact
  def __call__(
    self, layers: Mapping[str, jax.Array], size: tuple[int, int]
  ) -> dict[str, jax.Array]:
    """Maps the layers of a trunk to logits.

    Args:
      layers: name -> (B, h, w, D), 'features' among them.
      size: (H, W).

    Returns:
      'logits' (B, H, W, C), and 'low_logits' (B, h, w, C) from which they are resized.
      With an auxiliary sum also its 'auxiliary_logits', in the images' size.

    Raises:
      UserError: the trunk has no such layer.
    """
    x = layers['features']
    for number, features in enumerate(self.hidden, 1):
      wide = {'dilation': self.hidden_dilation, 'bias': True}
      x = nn.relu(Conv(features, **wide, name=f'hidden{number}')(x))
    branches = partial(MultiDilation, self.num_classes, tuple(self.dilations))
    low = branches(name='main')(x)
    grow = partial(resize, size=size, aligned_corners=self.aligned_corners)
    outputs = {'logits': grow(low), 'low_logits': low}
    if self.auxiliary:
      other = lookup(layers, 'map of the trunk', self.auxiliary)
      outputs['auxiliary_logits'] = grow(branches(name='auxiliary')(other))
    return outputs


def deeplab(
  num_classes: int,
  *,
  dilations: Sequence[int] = (6, 12, 18, 24),
  hidden: Sequence[int] = (),
  hidden_dilation: int = 4,
  auxiliary: str = '',
  aligned_corners: bool = True,
) -> DeepLabHead:
  """Returns a `DeepLabHead`; its attributes are the arguments."""
  return DeepLabHead(
    num_classes,
    tuple(dilations),
    tuple(hidden),
    hidden_dilation,
    auxiliary,
    aligned_corners,
  )


_AS_ADVENT = {'style': 'deeplab', 'output_stride': 8, 'also': ('stage3',)}

TRUNKS: dict[str, Callable[..., nn.Module]] = {
  'deeplab_resnet50': partial(resnet, bottleneck, (3, 4, 6, 3), **_AS_ADVENT),
  'deeplab_resnet101': partial(resnet, bottleneck, (3, 4, 23, 3), **_AS_ADVENT),
  'deeplab_vgg16': partial(dilated_vgg16, False),
  'deeplab_vgg16_bn': partial(dilated_vgg16, True),
}
"""name -> (output_stride, also, init, dtype, norm, ...) -> a trunk of maps."""

HEADS: dict[str, Callable[..., nn.Module]] = {'deeplab': deeplab}
