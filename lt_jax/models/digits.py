"""Networks for digits of 28 or 32 pixels, as used in papers on domain adaptation.

They return named layers: 'conv', which is the flattened last convolution, the hidden
layers, and 'features', the last hidden layer. The stated sizes are for the papers'
images; other sizes work.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from lt_jax.errors import UserError, lookup
from lt_jax.models.convolution import INITIALISERS, Conv, max_pool
from lt_jax.models.normalisation import BatchNorm
from lt_jax.models.taps import tap


class Convolution(NamedTuple):
  """A convolution, ReLU and max-pooling.

  Attributes:
    features: number of output channels.
    pool: side of the pooling windows, 2 or 3, at stride 2; 0 for no pooling.
    size: side of the kernel.
  """

  features: int
  pool: int = 2
  size: int = 5


class DigitsNet(nn.Module):
  """Convolutions followed by hidden linear layers, all with bias and ReLU.

  Attributes:
    convolutions: the convolutions, starting at the image.
    hidden: sizes of the linear layers; the last one makes the features.
    padded: convolutions keep the size of an image, and pooling halves it, rounded up.
    conv: a constructor like `Conv`.
    dense: a constructor like `nn.Dense`.

  Taps: every convolution with its pooling, and every linear layer.
  """

  convolutions: Sequence[Convolution]
  hidden: Sequence[int]
  padded: bool = False
  conv: Callable[..., nn.Module] = Conv
  dense: Callable[..., nn.Module] = nn.Dense

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Maps (B, H, W, C) images to 'conv', 'fc1', ... and 'features', each (B, D)."""
    del train  # nothing here depends on it
    x = images
    for number, (features, pool, size) in enumerate(self.convolutions, 1):
      if not self.padded and min(x.shape[1:3]) < 6:
        raise UserError(
          f'images of {images.shape[1]} x {images.shape[2]} pixels are too small for '
          'this network: give it at least 16 x 16 (config.data.size)'
        )
      x = self.conv(
        features,
        size=size,
        pad=size // 2 if self.padded else 0,
        bias=True,
        name=f'conv{number}',
      )(x)
      # Equivalent to ReLU before pooling, with a quarter of the work.
      x = tap(self, f'conv{number}', nn.relu(_maximum(x, pool)))
    layers = {'conv': x.reshape(x.shape[0], -1)}
    x = layers['conv']
    for number, size in enumerate(self.hidden, 1):
      name = 'features' if number == len(self.hidden) else f'fc{number}'
      x = tap(self, f'fc{number}', nn.relu(self.dense(size, name=f'fc{number}')(x)))
      layers[name] = x
    return layers


def _maximum(x: jax.Array, pool: int) -> jax.Array:
  """Takes the maximum over squares at stride 2, which overlap if they have 3 pixels."""
  if pool <= 2:
    return max_pool(x) if pool else x
  side = (pool - 1) // 2
  return nn.max_pool(x, (pool, pool), (2, 2), ((side, side), (side, side)))


def _net(
  convolutions: Sequence[Convolution],
  hidden: Sequence[int],
  padded: bool = False,
  *,
  init: str = 'kaiming',
  dtype: Any = None,
) -> DigitsNet:
  """Returns a `DigitsNet`; `init` is a key of `INITIALISERS`."""
  kernel_init = lookup(INITIALISERS, 'initialisation', init)
  shared = {'kernel_init': kernel_init, 'dtype': dtype}
  conv, dense = partial(Conv, **shared), partial(nn.Dense, **shared)
  return DigitsNet(convolutions, hidden, padded, conv, dense)


class DTN(nn.Module):
  """Three 5x5 convolutions with stride 2, then a linear layer, all normalised.

  Its features end in batch normalisation without a ReLU, as in OCDA, where a cosine
  classifier reads them. In CyCADA a ReLU and dropout of 0.5 follow. The dropout of
  whole channels before every ReLU (0.1, 0.3, 0.5) is left out.

  Attributes:
    widths: channels of the convolutions.
    size: size of the features.
    conv: a constructor like `Conv`.
    dense: a constructor like `nn.Dense`.
    norm: a constructor like `BatchNorm`.

  Taps: every convolution.

  Hoffman et al., "CyCADA", ICML 2018, arXiv 1711.03213, from its code; Liu et al.,
  arXiv 1909.03403.
  """

  widths: Sequence[int] = (64, 128, 256)
  size: int = 512
  conv: Callable[..., nn.Module] = Conv
  dense: Callable[..., nn.Module] = nn.Dense
  norm: Callable[..., nn.Module] = BatchNorm

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Maps (B, H, W, C) images to 'conv' and 'features', each (B, D)."""
    x = images
    for number, width in enumerate(self.widths, 1):
      x = self.conv(width, size=5, stride=2, bias=True, name=f'conv{number}')(x)
      x = nn.relu(self.norm(name=f'norm{number}')(x, train=train))
      x = tap(self, f'conv{number}', x)
    layers = {'conv': x.reshape(x.shape[0], -1)}
    x = self.dense(self.size, name='fc1')(layers['conv'])
    return layers | {'features': self.norm(name='norm_fc1')(x, train=train)}


def dtn(
  *,
  widths: Sequence[int] = (64, 128, 256),
  size: int = 512,
  init: str = 'glorot',
  dtype: Any = None,
  norm: Callable[..., nn.Module] = BatchNorm,
) -> DTN:
  """Returns a `DTN`; `init` is a key of `INITIALISERS`, by default uniform Xavier."""
  kernel_init = lookup(INITIALISERS, 'initialisation', init)
  shared = {'kernel_init': kernel_init, 'dtype': dtype}
  conv, dense = partial(Conv, **shared), partial(nn.Dense, **shared)
  return DTN(tuple(widths), size, conv, dense, norm)


mnist_dann = partial(_net, (Convolution(32), Convolution(48)), (100, 100))
"""The MNIST network of Ganin et al., arXiv 1505.07818, figure 4a: 'conv' (B, 768)."""

svhn_dann = partial(
  _net,
  (Convolution(64, 3), Convolution(64, 3), Convolution(128, 0)),
  (3072, 2048),
  True,
)
"""Their SVHN network, figure 4b, without its dropout: 'conv' (B, 8192)."""

gtsrb_dann = partial(
  _net, (Convolution(96), Convolution(144, size=3), Convolution(256)), (512,)
)
"""Their GTSRB network, figure 4c, for 40 pixels: 'conv' (B, 1024).

Quoted from memory, unverified.
"""

lenet = partial(_net, (Convolution(20), Convolution(50)), (500,))
"""Caffe's LeNet, for 28 pixels: 'conv' (B, 800), 'features' (B, 500).

The network of Tzeng et al. (ADDA), arXiv 1702.05464. LeCun et al., Proc. IEEE 1998.
"""

DIGITS = {
  'mnist_dann': mnist_dann,
  'svhn_dann': svhn_dann,
  'gtsrb_dann': gtsrb_dann,
  'lenet': lenet,
  'dtn': dtn,
}
