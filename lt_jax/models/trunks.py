"""Trunks, from images to a map of features: those for small images."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lt_jax.errors import UserError, lookup
from lt_jax.models import deeplab, fcn
from lt_jax.models.convolution import INITIALISERS, Conv
from lt_jax.models.digits import DIGITS
from lt_jax.models.efficientnet import EFFICIENTNETS
from lt_jax.models.normalisation import BatchNorm
from lt_jax.models.plain import PLAIN
from lt_jax.models.planning import value_iteration
from lt_jax.models.resnet import RESNETS
from lt_jax.models.segmentation import SEGMENTERS
from lt_jax.models.taps import tap


def subsample(x: jax.Array, stride: int) -> jax.Array:
  """Keeps every stride-th pixel: option A of He et al., arXiv 1512.03385, 3.3."""
  return x[:, ::stride, ::stride]


def average(x: jax.Array, stride: int) -> jax.Array:
  """Averages squares of pixels: the shortcut in the code of Cui et al. (1901.05555)."""
  return nn.avg_pool(x, (stride, stride), (stride, stride))


SHORTCUTS: dict[str, Callable[[jax.Array, int], jax.Array]] = {
  'subsample': subsample,
  'average': average,
}


class BasicBlock(nn.Module):
  """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))); the shortcut has no weights.

  If the number of channels grows, the shortcut is padded with zero channels, equally on
  both sides.

  Attributes:
    features: number of output channels.
    stride: stride of the first convolution and the shortcut.
    shortcut: (x, stride) -> x with fewer pixels.
    conv: a constructor like `Conv`.
    norm: a constructor like `BatchNorm`.
  """

  features: int
  stride: int
  shortcut: Callable[[jax.Array, int], jax.Array]
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps (B, H, W, C) to (B, H / stride, W / stride, features)."""
    y = self.conv(self.features, stride=self.stride, name='conv1')(x)
    y = nn.relu(self.norm(name='norm1')(y, train=train))
    y = self.conv(self.features, name='conv2')(y)
    y = self.norm(name='norm2')(y, train=train)
    if self.stride > 1:
      x = self.shortcut(x, self.stride)
    side = (self.features - x.shape[-1]) // 2
    return nn.relu(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (side, side))) + y)


class CifarResNet(nn.Module):
  """The residual network for images of 32 x 32 pixels.

  A 3x3 convolution to w channels, then three stages of n basic blocks with w, 2w and 4w
  channels; the second and third start with stride 2. The activation comes after the
  addition ("v1").

  Attributes:
    blocks: n; the depth, counting a linear head, is 6 n + 2.
    width: w.
    shortcut: one of `SHORTCUTS`.
    conv: a constructor like `Conv`.
    norm: a constructor like `BatchNorm`.

  Taps: 'stem' and every block.

  Source: He et al., arXiv 1512.03385, section 4.2.
  """

  blocks: int
  width: int
  shortcut: Callable[[jax.Array, int], jax.Array] = subsample
  conv: Callable[..., nn.Module] = Conv
  norm: Callable[..., nn.Module] = BatchNorm

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps (B, H, W, C) images to (B, H / 4, W / 4, 4 width), rounded up."""
    x = self.conv(self.width, name='conv')(images)
    x = nn.relu(self.norm(name='norm')(x, train=train))
    x = tap(self, 'stem', x)
    for stage in range(3):
      for block in range(self.blocks):
        name = f'stage{stage + 1}_block{block + 1}'
        x = BasicBlock(
          self.width * 2**stage,
          stride=2 if stage > 0 and block == 0 else 1,
          shortcut=self.shortcut,
          conv=self.conv,
          norm=self.norm,
          name=name,
        )(x, train=train)
        x = tap(self, name, x)
    return x


class SmallCNN(nn.Module):
  """Two 3x3 convolutions with w and 2w channels, each normalised and with ReLU.

  Average pooling over 2x2 pixels lies in between. Made for 8x8 digits and for tests.

  Attributes:
    width: w; about 18 w^2 parameters.
    conv: a constructor like `Conv`.
    norm: a constructor like `BatchNorm`.

  Taps: 'conv1' and 'conv2'.
  """

  width: int
  conv: Callable[..., nn.Module] = Conv
  norm: Callable[..., nn.Module] = BatchNorm

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps (B, H, W, C) images to (B, H / 2, W / 2, 2 width), rounded down."""
    x = self.conv(self.width, name='conv1')(images)
    x = nn.relu(self.norm(name='norm1')(x, train=train))
    x = tap(self, 'conv1', average(x, 2))
    x = self.conv(2 * self.width, name='conv2')(x)
    return tap(self, 'conv2', nn.relu(self.norm(name='norm2')(x, train=train)))


class Identity(nn.Module):
  """No trunk: features from a file go straight to the head. It has no parameters."""

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Returns (B, H, W, C) arrays; the mean over their pixels gives the features."""
    del train
    return images


def cifar_resnet(
  *,
  depth: int,
  width: int = 16,
  shortcut: str = 'subsample',
  init: str = 'kaiming',
  dtype: Any = None,
  norm: Callable[..., nn.Module] = BatchNorm,
) -> CifarResNet:
  """Returns a `CifarResNet` of depth 6 n + 2, given the names of its parts."""
  if depth < 8 or depth % 6 != 2:
    raise UserError(f'a residual network of depth {depth}: it must be 6 n + 2')
  between = lookup(SHORTCUTS, 'shortcut', shortcut)
  return CifarResNet((depth - 2) // 6, width, between, _conv(init, dtype), norm)


def small_cnn(
  *,
  width: int,
  init: str = 'kaiming',
  dtype: Any = None,
  norm: Callable[..., nn.Module] = BatchNorm,
) -> SmallCNN:
  """Returns a `SmallCNN`; `init` is a key of `INITIALISERS`."""
  return SmallCNN(width, _conv(init, dtype), norm)


def _conv(init: str, dtype: Any) -> Callable[..., nn.Module]:
  """Returns the constructor of a trunk's convolutions."""
  kernel_init = lookup(INITIALISERS, 'initialisation', init)
  return partial(Conv, kernel_init=kernel_init, dtype=dtype)


TRUNKS: dict[str, Callable[..., nn.Module]] = {
  'resnet8': partial(cifar_resnet, depth=8),
  'resnet20': partial(cifar_resnet, depth=20),
  'resnet32': partial(cifar_resnet, depth=32),
  'resnet44': partial(cifar_resnet, depth=44),
  'resnet56': partial(cifar_resnet, depth=56),
  'digits_cnn': partial(small_cnn, width=44),
  'tiny_cnn': partial(small_cnn, width=12),
  'identity': Identity,
  'value_iteration': value_iteration,
  **DIGITS,
  **RESNETS,
  **EFFICIENTNETS,
  **PLAIN,
  **SEGMENTERS,
  **deeplab.TRUNKS,
  **fcn.TRUNKS,
}
"""name -> (init, dtype, norm, ...) -> a trunk."""
