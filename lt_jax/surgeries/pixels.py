"""Surgeries of networks that classify every pixel: what a memory of pixels holds."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.evals.collect import Survey
from lt_jax.method import Batch, Outputs, State
from lt_jax.surgery import Surgery, class_sums, put

PLACE = 'stats/net/head/'
"""Where a State has the memory of `lt_jax.models.pixel_memory`."""


def pixel_memory(*, survey: Survey, split: str = 'train') -> Surgery:
  """Fills the head 'pixel_memory': class means, then the mean domain and its spread.

  In evaluation mode, over a whole split. The label of a pixel of the map is that of the
  image's pixel in which its centre lies. A class that has no such pixel keeps a mean of
  zero, which adds nothing.

  Args:
    survey: passes with the stage's own network.
    split: whose images and label maps.

  Raises:
    UserError: the network has another head.
  """

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    del earlier
    outputs = survey.outputs(fresh, split)
    classes, width = outputs['logits'].shape[-1], outputs['map'].shape[-1]

    def fold(outputs: Outputs, batch: Batch) -> tuple[jax.Array, jax.Array]:
      return class_sums(*pixels_of(outputs['map'], batch), classes)

    def means() -> np.ndarray:
      sums, counts = survey.total(fresh, split, fold)
      return sums / np.maximum(counts, 1)[:, None]

    remembered = put(fresh, PLACE + 'centroids', (classes, width), means)

    @functools.cache
    def domains() -> np.ndarray:
      found = survey.collect(remembered, split, _domain)['domain_feature']
      return found.astype(np.float64)

    def spread() -> np.ndarray:
      away = domains() - domains().mean(axis=0)
      return np.linalg.norm(away, axis=1).mean()

    state = put(remembered, PLACE + 'centre', (width,), lambda: domains().mean(axis=0))
    return put(state, PLACE + 'spread', (), spread)

  return surgery


def _domain(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  del batch
  return {'domain_feature': outputs['domain_feature']}


def pixels_of(maps: jax.Array, batch: Batch) -> tuple[jax.Array, Batch]:
  """Returns the pixels of maps (B, h, w, D) as (N, D), and their labels.

  Args:
    maps: of features.
    batch: with 'label' (B, H, W) and 'mask' (B,).

  Returns:
    (features, {'label': (N,), 'mask': (N,)}).
  """
  batch_size, height, width, _ = maps.shape
  rows, columns = (
    (2 * np.arange(part) + 1) * whole // (2 * part)
    for part, whole in zip((height, width), batch['label'].shape[1:], strict=True)
  )
  label = batch['label'][:, rows][:, :, columns].reshape(-1)
  mask = jnp.repeat(batch['mask'], height * width, total_repeat_length=len(label))
  return maps.reshape(batch_size * height * width, -1), {'label': label, 'mask': mask}


SURGERIES = {'pixel_memory': pixel_memory}
