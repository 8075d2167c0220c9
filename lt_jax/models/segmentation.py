"""Networks that give logits for every pixel: a trunk, a head, and their combination.

Any trunk that ends in a map of features works, with any head of `HEADS`, which then
classifies each pixel of the map on its own. A head of `PIXEL_HEADS` reads the whole
map, so it also sees a pixel's surroundings.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from flax import linen as nn

from lt_jax.errors import UserError, lookup
from lt_jax.models.convolution import INITIALISERS, Conv
from lt_jax.models.normalisation import BatchNorm, at_least_float32
from lt_jax.models.taps import tap
from lt_jax.models.upsampling import resize


class Segmenter(nn.Module):
  """A trunk and a head, and logits at the size of the images.

  Its parameters are {'trunk': ..., 'head': ...}.

  Attributes:
    trunk: a module from images (B, H, W, C) to a map (B, h, w, D), or to a dict of
      named layers, of which 'features' is such a map.
    head: a module from features of pixels (N, D) to logits (N, number of classes); or,
      if it has `of_maps`, from the map to logits (B, h, w, number of classes); or, if
      it has `of_layers`, from all layers of the trunk and the images' size to outputs
      that include 'logits' (B, H, W, number of classes).
  """

  trunk: nn.Module
  head: nn.Module

  @nn.compact
  def __call__(
    self, images: jax.Array, *, train: bool, **memory: jax.Array
  ) -> dict[str, jax.Array]:
    """Maps images to outputs.

    Args:
      images: (B, H, W, C).
      train: normalise by batch statistics.
      **memory: what the head reads besides the features.

    Returns:
      'logits' (B, H, W, number of classes), 'low_logits' (B, h, w, number of classes),
      from which they are resized, 'map' (B, h, w, D), the features of the pixels,
      'features' (B, D), their mean, and the other named layers of trunk and head, all
      at least float32.

    Raises:
      UserError: the trunk does not end in a map.
    """
    x = self.trunk(images, train=train)
    layers = dict(x) if isinstance(x, dict) else {'features': x}
    layers = {name: at_least_float32(layer) for name, layer in layers.items()}
    features = layers['features']
    if features.ndim != 4:
      raise UserError(
        'labels of pixels need a trunk that ends in a map of features, such as '
        "model.trunk='small_segmenter'"
      )
    outputs = classify(self.head, layers, images.shape[1:3], **memory)
    maps = {'features': features.mean((1, 2)), 'map': features}
    return layers | maps | outputs

  def apply_head(
    self, features: jax.Array, *, train: bool, **memory: jax.Array
  ) -> dict[str, jax.Array]:
    """Maps features (B, h, w, D) to logits of the same size, not the images' size.

    Raises:
      UserError: the head reads more of the trunk than its features.
    """
    del train  # no head uses batch statistics
    if getattr(self.head, 'of_layers', False):
      raise UserError(
        'this method applies the head to features alone, but this head reads other '
        "layers of the trunk too: set model.head, such as to 'multi_dilation'"
      )
    return {'features': features, 'logits': scores(self.head, features, **memory)}


def classify(
  head: nn.Module, layers: Mapping[str, jax.Array], size: tuple[int, int], **memory
) -> dict[str, jax.Array]:
  """Applies a head of any kind, see `Segmenter`, to the layers of a trunk.

  Args:
    head: the head.
    layers: name -> (B, h, w, D), 'features' among them.
    size: (H, W) of the images.
    **memory: what the head reads beside the features.

  Returns:
    'logits' (B, H, W, C), 'low_logits', which they are resized from, and what else the
    head names.
  """
  if getattr(head, 'of_layers', False):
    return head(layers, size, **memory)
  low = scores(head, layers['features'], **memory)
  return {'logits': resize(low, size), 'low_logits': low}


def scores(head: nn.Module, features: jax.Array, **memory: jax.Array) -> jax.Array:
  """Applies a head that reads features alone to (B, h, w, D); returns (B, h, w, C)."""
  if getattr(head, 'of_maps', False):
    return head(features, **memory)
  logits = head(features.reshape(-1, features.shape[-1]), **memory)
  return logits.reshape(*features.shape[:-1], logits.shape[-1])


class SmallSegmenter(nn.Module):
  """Five 3x3 convolutions, each normalised and with ReLU, to an output stride of 4.

  They have w, 2w, 4w, 4w and 4w channels; the first two have stride 2, the last two
  have dilations 2 and 4. It is made for images of 64 to about 300 pixels on CPUs: with
  w = 16 it has 0.1 million parameters and takes about 7,000 multiplications per pixel.

  Attributes:
    width: w.
    conv: a constructor like `Conv`.
    norm: a constructor like `BatchNorm`.

  Taps: 'conv1' to 'conv5'.
  """

  width: int
  conv: Callable[..., nn.Module] = Conv
  norm: Callable[..., nn.Module] = BatchNorm

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps (B, H, W, C) images to (B, H / 4, W / 4, 4 width), rounded up."""
    x, w = images, self.width
    layers = ((w, 2, 1), (2 * w, 2, 1), (4 * w, 1, 1), (4 * w, 1, 2), (4 * w, 1, 4))
    for number, (features, stride, dilation) in enumerate(layers, 1):
      x = self.conv(features, stride=stride, dilation=dilation, name=f'conv{number}')(x)
      x = nn.relu(self.norm(name=f'norm{number}')(x, train=train))
      x = tap(self, f'conv{number}', x)
    return x


def small_segmenter(
  *,
  width: int = 16,
  init: str = 'kaiming',
  dtype: Any = None,
  norm: Callable[..., nn.Module] = BatchNorm,
) -> SmallSegmenter:
  """Returns a `SmallSegmenter`; `init` is a key of `INITIALISERS`."""
  kernel_init = lookup(INITIALISERS, 'initialisation', init)
  conv = partial(Conv, kernel_init=kernel_init, dtype=dtype)
  return SmallSegmenter(width, conv, norm)


def _normal(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
  """Draws from N(0, 0.01^2), as in DeepLab's head."""
  return 0.01 * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


class MultiDilation(nn.Module):
  """A sum of 3x3 convolutions with bias and different dilations.

  Attributes:
    num_classes: C.
    dilations: their dilations in pixels of the map.

  Source: the head of DeepLab-v2, Chen et al., arXiv 1606.00915, section 3.2, in the
  form without hidden layers, with dilations 6, 12, 18 and 24.
  """

  num_classes: int
  dilations: Sequence[int]
  of_maps = True

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps (B, h, w, D) to (B, h, w, C)."""
    conv = partial(Conv, self.num_classes, bias=True, kernel_init=_normal)
    return sum(
      conv(dilation=dilation, name=f'dilation{dilation}')(features)
      for dilation in self.dilations
    )


def multi_dilation(
  num_classes: int, *, dilations: Sequence[int] = (1, 2, 4, 6)
) -> MultiDilation:
  """Returns a `MultiDilation` head; its attributes are the arguments."""
  return MultiDilation(num_classes, tuple(dilations))


SEGMENTERS: dict[str, Callable[..., nn.Module]] = {'small_segmenter': small_segmenter}
"""Trunks made for segmentation."""

PIXEL_HEADS: dict[str, Callable[..., nn.Module]] = {'multi_dilation': multi_dilation}
"""Heads that read a whole map, not one pixel at a time."""
