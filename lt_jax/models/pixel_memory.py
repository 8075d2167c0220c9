r"""A head that enriches features of pixels by a memory of the source's classes.

With the feature v of a pixel, what a head makes of it, p, and the memory M (C, D), the
mean feature of the pixels of each class of the source:

.. math::
  m = \sum_c p_c(v)\, M_c, \qquad
  x = v + e \odot \tanh(v W + b) \odot m, \qquad
  u = \frac1N \sum_n (v_n - m_n), \qquad
  e = \max\Big(0,\, 1 - \frac1\delta\Big), \quad
  \delta = \frac{|u - \bar u|}{E_s |u_s - \bar u|}

and the same head classifies x. m is what attention over the memory adds. u, the feature
of the domain, is free of classes: what is left of the pixels of an image once their
classes have been taken away. The indicator e is one number an image: 0 where u is no
further from the source's mean than images of the source are on average, towards 1 where
it is far, so that an image of a distant domain borrows more from the memory.

Source: the idea is that of Liu et al., "Open Compound Domain Adaptation", CVPR 2020,
arXiv 1909.03403, section 3. For segmentation no code was released and the paper gives
no formula, so the forms of u, delta and e here are our own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lt_jax.errors import UserError
from lt_jax.models.heads import dense, norm, product
from lt_jax.models.segmentation import classify

TINY = 1e-12


class PixelMemory(nn.Module):
  """A head of pixels, read twice: for the attention, and for what it says in the end.

  The memory is kept with the batch statistics, where no gradient moves it: 'centroids'
  (C, D), 'centre' (D,), the mean of u, and 'spread' (), the mean distance from it. The
  surgery 'pixel_memory' measures them. Until then they are zero, and nothing is added;
  W and b are zero in the beginning, and so is what is added in the first step.

  Attributes:
    head: that of the network.
    num_classes: C.
    indicator: whether e is asked; False: it is 1 for every image.
  """

  head: nn.Module
  num_classes: int
  indicator: bool = True
  of_layers = True

  @nn.compact
  def __call__(
    self, layers: Mapping[str, jax.Array], size: tuple[int, int]
  ) -> dict[str, jax.Array]:
    """Maps the layers of a trunk to outputs.

    Args:
      layers: name -> (B, h, w, D), 'features' among them.
      size: (H, W) of the images.

    Returns:
      the outputs of the head, of the enriched features; and 'domain_feature' u (B, D),
      'domain_distance' delta (B,) and 'borrowed' (B,), the mean of |x - v| / |v|.

    Raises:
      UserError: the head does not score the pixels of the map.
    """
    v = layers['features']
    scores = classify(self.head, layers, size)['low_logits']
    if scores.shape[:-1] != v.shape[:-1]:
      raise UserError(
        'a memory of pixels needs a head that scores the pixels of the map that it '
        "reads, such as 'multi_dilation' or 'deeplab'"
      )
    centroids = self._kept('centroids', (self.num_classes, v.shape[-1]))
    centre, spread = self._kept('centre', v.shape[-1:]), self._kept('spread', ())
    p = nn.softmax(scores)
    pixels = product(p.reshape(-1, p.shape[-1]), centroids)
    borrowed = pixels.reshape(v.shape)
    domain = (v - borrowed).mean((1, 2))
    away = norm(domain - centre[None], -1)[:, 0]
    distance = lax.stop_gradient(away / jnp.maximum(spread, TINY))
    gate = dense(
      v.shape[-1],
      inputs=v.shape[-1],
      kernel_init=nn.initializers.zeros,
      bias_init=nn.initializers.zeros,
      name='gate',
    )
    added = jnp.tanh(gate(v)) * borrowed
    if self.indicator:
      e = jnp.maximum(0, 1 - 1 / jnp.maximum(distance, TINY))
      added *= e[:, None, None, None]
    outputs = classify(self.head, {**layers, 'features': v + added}, size)
    return outputs | {
      'domain_feature': domain,
      'domain_distance': distance,
      'borrowed': (norm(added, -1) / norm(v, -1)).mean((1, 2, 3)),
    }

  def _kept(self, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Returns what a surgery has put beside the batch statistics."""
    return self.variable('batch_stats', name, jnp.zeros, shape, jnp.float32).value


def pixel_memory(
  num_classes: int,
  *,
  make_head: Callable[[str, Mapping[str, Any]], nn.Module],
  head: str,
  options: Mapping[str, Any] | None = None,
  indicator: bool = True,
) -> PixelMemory:
  """Returns a `PixelMemory` around a head.

  Args:
    num_classes: C.
    make_head: (name, options) -> a head.
    head: its name.
    options: its options.
    indicator: see `PixelMemory`.
  """
  return PixelMemory(make_head(head, options or {}), num_classes, indicator)


HEADS: dict[str, Callable[..., nn.Module]] = {'pixel_memory': pixel_memory}
