"""Domain classifiers: they predict the domain from a layer, a map or an image."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from lt_jax.errors import UserError
from lt_jax.models.convolution import Conv
from lt_jax.models.heads import dense


class DomainClassifier(nn.Module):
  """Linear layers with ReLU between them, and a single logit.

  Attributes:
    hidden: sizes of the hidden layers; empty for a linear classifier.

  Source: Ganin et al., arXiv 1505.07818, figure 4: (100,) for MNIST, (1024, 1024) for
  SVHN and GTSRB.
  """

  hidden: Sequence[int]

  @nn.compact
  def __call__(self, layer: jax.Array) -> jax.Array:
    """Maps a layer (B, D) to logits (B,) of being a target image."""
    x = layer
    for number, size in enumerate(self.hidden, 1):
      x = nn.relu(dense(size, inputs=x.shape[-1], name=f'fc{number}')(x))
    return dense(1, inputs=x.shape[-1], name='logit')(x)[:, 0]


def mlp(*, hidden: Sequence[int] = (100,)) -> DomainClassifier:
  """Returns a domain classifier with hidden layers of these sizes."""
  return DomainClassifier(tuple(hidden))


class ImageDiscriminator(nn.Module):
  """Two 3x3 convolutions with stride 2 and leaky ReLU, mean pooling, then one logit.

  Attributes:
    width: number of channels of the first convolution; the second has twice as many.
  """

  width: int

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps (B, H, W, C) to logits (B,) of being a real image."""
    x = images
    for number in (1, 2):
      x = Conv(number * self.width, stride=2, bias=True, name=f'conv{number}')(x)
      x = nn.leaky_relu(x, 0.2)
    return dense(1, inputs=x.shape[-1], name='logit')(x.mean((1, 2)))[:, 0]


def image_discriminator(*, width: int = 16) -> ImageDiscriminator:
  """Returns an image discriminator of that width."""
  return ImageDiscriminator(width)


class PatchDiscriminator(nn.Module):
  """Five 4x4 convolutions with stride 2 and leaky ReLU: one logit per patch.

  The channels are w, 2w, 4w, 8w and 1; each logit sees 94 x 94 pixels of the map.

  Attributes:
    width: w.

  Source: Tsai et al. (AdaptSegNet), arXiv 1802.10349, section 4.2, after DCGAN (Radford
  et al., arXiv 1511.06434), without batch normalisation; ADVENT (Vu et al., arXiv
  1811.12833) uses the same.
  """

  width: int

  @nn.compact
  def __call__(self, maps: jax.Array) -> jax.Array:
    """Maps (B, H, W, C) to logits (B, H / 32, W / 32) of being a patch of the target.

    Raises:
      UserError: the input is not a map, or a side has less than 32 pixels.
    """
    if maps.ndim != 4 or min(maps.shape[1:3]) < 32:
      raise UserError(
        'the patch discriminator reads maps of at least 32 x 32 pixels, such as logits '
        f'of every pixel, not {maps.shape[1:-1]}: name another layer '
        '(config.alignment.align_on) or images that are larger'
      )
    x = maps
    for number, features in enumerate((1, 2, 4, 8), 1):
      x = _halved(features * self.width, f'conv{number}')(x)
      x = nn.leaky_relu(x, 0.2)
    return _halved(1, 'conv5')(x)[..., 0]


def _halved(features: int, name: str) -> Conv:
  """Returns a convolution to half the size, initialised as in PyTorch."""
  return Conv(
    features,
    size=4,
    stride=2,
    pad=1,
    bias=True,
    kernel_init=uniform_by_inputs,
    name=name,
  )


def uniform_by_inputs(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
  """Draws from U(-1 / sqrt(n), 1 / sqrt(n)), with n the number of inputs per output.

  Args:
    key: random key.
    shape: (..., inputs, outputs), spatial axes first.
    dtype: type of the kernel.
  """
  bound = 1 / math.sqrt(math.prod(shape[:-1]))
  draw = jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound)
  return draw.reshape(shape)


def patch_discriminator(*, width: int = 64) -> PatchDiscriminator:
  """Returns a map discriminator of that width."""
  return PatchDiscriminator(width)
