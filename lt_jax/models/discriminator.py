"""Domain classifiers: from a layer, or an image, to which domain an image is of."""

from collections.abc import Sequence

import jax
from flax import linen as nn

from lt_jax.models.convolution import Conv
from lt_jax.models.heads import dense


class DomainClassifier(nn.Module):
  """Linear layers with ReLU between them, down to one logit.

  Attributes:
    hidden: sizes of the layers before the logit; none for a linear classifier.

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
  """Two 3x3 convolutions with stride 2 and leaky ReLU, their mean, then one logit.

  Attributes:
    width: channels of the first convolution; the second has twice as many.
  """

  width: int

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps (B, H, W, C) to logits (B,) of being a true image."""
    x = images
    for number in (1, 2):
      x = Conv(number * self.width, stride=2, bias=True, name=f'conv{number}')(x)
      x = nn.leaky_relu(x, 0.2)
    return dense(1, inputs=x.shape[-1], name='logit')(x.mean((1, 2)))[:, 0]


def image_discriminator(*, width: int = 16) -> ImageDiscriminator:
  """Returns a discriminator of images, of a width."""
  return ImageDiscriminator(width)
