r"""A head that enriches features of pixels with a memory of the source's classes.

With the feature v of a pixel, the probabilities p that a head gives it, and the memory
M (C, D), the mean feature of the pixels of each class of the source:

.. math::
  m = \sum_c p_c(v)\, M_c, \qquad
  x = v + e \odot \tanh(v W + b) \odot m, \qquad
  u = \frac1N \sum_n (v_n - m_n), \qquad
  e = \max\Big(0,\, 1 - \frac1\delta\Big), \quad
  \delta = \frac{|u - \bar u|}{E_s |u_s - \bar u|}

and the same head classifies x. m is what attention over the memory adds. u, the domain
feature, is what remains of an image's pixels after their classes are subtracted. The
indicator e is one number per image: 0 if u is no further from the source's mean than
source images are on average, and towards 1 if it is far, so that an image of a distant
domain borrows more from the memory.

Source: the idea is from Liu et al., "Open Compound Domain Adaptation", CVPR 2020, arXiv
1909.03403, section 3. For segmentation no code was released and the paper gives no
formula, so the forms of u, delta and e here are our own.
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
  """A head for pixels, applied twice: for the attention, and for the final scores.

  The memory is kept with the batch statistics, where no gradient moves it: 'centroids'
  (C, D), 'centre' (D,), the mean of u, and 'spread' (), the mean distance from it. The
  surgery 'pixel_memory' measures them. Until then they are zero and nothing is added. W
  and b start at zero, so nothing is added in the first step either.

  Attributes:
    head: the network's own head.
    num_classes: C.
    indicator: whether to use e; if False, it is 1 for every image.
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
      layers: name -> (B, h, w, D), including 'features'.
      size: (H, W) of the images.

    Returns:
      the outputs of the head for the enriched features; 'domain_feature' u (B, D),
      'domain_distance' delta (B,) and 'borrowed' (B,), the mean of |x - v| / |v|.

    Raises:
      UserError: the head does not score every pixel of the map.
    """
    v = layers['features']
    scores = classify(self.head, layers, size)['low_logits']
    if scores.shape[:-1] != v.shape[:-1]:
      raise UserError(
        'pixel_memory needs a head that scores every pixel of the map it reads, such '
        "as 'multi_dilation' or 'deeplab'"
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
    """Returns a value that a surgery puts among the batch statistics."""
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
