"""Fully convolutional networks: VGG-16 for any image size, with skips from its pooling.

Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015, arXiv
1411.4038, and the authors' code for Caffe.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lt_jax.errors import lookup
from lt_jax.models.convolution import INITIALISERS, Conv, max_pool
from lt_jax.models.plain import convolve_stage
from lt_jax.models.taps import tap
from lt_jax.models.upsampling import upsample

PAD = 100
"""Pixels of zero padding around an image, so that any size leaves a map."""


class FullyConvolutionalVGG(nn.Module):
  """VGG with hidden layers that are convolutions over its last map.

  Max-pooling rounds the size of a map up, as in Caffe. The paper's network also has
  dropout of 0.5 on the hidden features; here there is none.

  Attributes:
    stages: number of convolutions and their channels, for every stage.
    hidden: number of features of 'fc6' and of 'fc7'.
    side: side of the kernel of 'fc6'.
    conv: a constructor like `Conv`.

  Taps: 'conv1' to 'conv5', each a stage with its pooling, 'fc6', 'fc7'.
  """

  stages: Sequence[tuple[int, int]] = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
  hidden: int = 4096
  side: int = 7
  conv: Callable[..., nn.Module] = Conv
  normalised = False

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Maps (B, H, W, C) images to 'pool3', 'pool4' and 'features', the map of 'fc7'."""
    x, maps = images, {}
    for stage, shape in enumerate(self.stages, 1):
      pad = PAD if stage == 1 else None
      x = convolve_stage(self, x, stage, shape, train=train, pad=pad)
      maps[f'pool{stage}'] = x = tap(self, f'conv{stage}', _max_rounded_up(x))
    whole = {'size': self.side, 'pad': 0, 'bias': True}
    x = tap(self, 'fc6', nn.relu(self.conv(self.hidden, **whole, name='fc6')(x)))
    one = {'size': 1, 'bias': True}
    x = tap(self, 'fc7', nn.relu(self.conv(self.hidden, **one, name='fc7')(x)))
    return {'features': x, **{name: maps[name] for name in ('pool3', 'pool4')}}


def _max_rounded_up(x: jax.Array) -> jax.Array:
  """Takes the maximum over 2x2 pixels, or fewer at an odd edge, of x >= 0."""
  height, width = x.shape[1:3]
  return max_pool(jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0))))


def fcn_vgg16(*, init: str = 'kaiming', dtype: Any = None) -> FullyConvolutionalVGG:
  """Returns the network with 16 layers; `init` is a key of `INITIALISERS`."""
  kernel_init = lookup(INITIALISERS, 'initialisation', init)
  return FullyConvolutionalVGG(conv=partial(Conv, kernel_init=kernel_init, dtype=dtype))


FIRST = {'pool3': 3.5, 'pool4': 7.5, 'features': 111.5}
"""Map -> centre of its first pixel, in pixels of the first convolution.

For 'features' it is the middle of the 7 x 7 pixels that 'fc6' reads.
"""


class FCNHead(nn.Module):
  r"""Scores of pixels, with scores of earlier maps added while upsampling.

  .. math::
    s_{32} = W_{fc7} x, \quad
    s_{16} = u_2(s_{32}) + W_{pool4} (a\, x_{pool4}), \quad
    s_8 = u_2(s_{16}) + W_{pool3} (b\, x_{pool3})

  where u_f is the bilinear transposed convolution of `upsample`, which is fixed, as in
  the authors' code. That code crops maps so that their centres align: 5 and 9 pixels
  from the pooled maps' scores, and 19, 27 or 31 from the last upsampled scores at
  stride 32, 16 or 8. All scores start at zero.

  Attributes:
    num_classes: C.
    stride: stride of the last scores: 32, 16 or 8.
    scales: a and b.
  """

  num_classes: int
  stride: int
  scales: Sequence[float] = (0.01, 0.0001)
  of_layers = True

  @nn.compact
  def __call__(
    self, layers: Mapping[str, jax.Array], size: tuple[int, int]
  ) -> dict[str, jax.Array]:
    """Maps the layers of a `FullyConvolutionalVGG` to logits.

    Args:
      layers: 'features', 'pool4' and 'pool3', each (B, h, w, D).
      size: (H, W) of the images.

    Returns:
      'logits' (B, H, W, C), and 'low_logits', the scores before the last upsampling.

    Raises:
      UserError: the trunk has no such layers.
    """
    zeros = nn.initializers.zeros
    score = partial(Conv, self.num_classes, size=1, bias=True, kernel_init=zeros)
    x = score(name='score_features')(layers['features'])
    stride, first = 32, FIRST['features']
    for name, scale in zip(('pool4', 'pool3'), self.scales, strict=True):
      if stride == self.stride:
        break
      skip = lookup(layers, 'map of the trunk', name)
      skip = score(name=f'score_{name}')(scale * skip)
      height, width = (2 * (side + 1) for side in x.shape[1:3])
      x = upsample(x, 2, size=(height, width), offset=0)
      stride, first = stride // 2, first - 0.75 * stride
      begin = round((first - FIRST[name]) / stride)
      x += skip[:, begin : begin + height, begin : begin + width]
    # The position of the image's first pixel; the convolution pads one pixel itself.
    offset = round(PAD - 1 - (first - stride + 0.5))
    return {
      'logits': upsample(x, stride, size=size, offset=offset),
      'low_logits': x,
    }


def fcn(
  stride: int, num_classes: int, /, *, scales: Sequence[float] = (0.01, 0.0001)
) -> FCNHead:
  """Returns an `FCNHead`; its attributes are the arguments."""
  return FCNHead(num_classes, stride, tuple(scales))


TRUNKS: dict[str, Callable[..., nn.Module]] = {'fcn_vgg16': fcn_vgg16}

HEADS: dict[str, Callable[..., nn.Module]] = {
  f'fcn{stride}': partial(fcn, stride) for stride in (32, 16, 8)
}
