"""Surgeries for networks that classify every pixel: a memory, and class shares."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.errors import UserError
from lt_jax.evals.collect import Survey
from lt_jax.method import Batch, Method, Outputs, State
from lt_jax.models.heads import product
from lt_jax.surgery import Surgery, class_sums, put

PLACE = 'stats/net/head/'
"""The place of the memory of `lt_jax.models.pixel_memory` in a State."""


def pixel_memory(*, survey: Survey, split: str = 'train') -> Surgery:
  """Fills the head 'pixel_memory': class means, then the domain's mean and spread.

  In evaluation mode, over a whole split. The label of a pixel of the map is that of the
  image pixel at its centre. A class without such a pixel keeps a mean of zero, which
  adds nothing.

  Args:
    survey: passes with the stage's own network.
    split: the split whose images and label maps are used.

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
    maps: feature maps.
    batch: has 'label' (B, H, W) and 'mask' (B,).

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


# Class shares of whole images.

SHARES = 'label_shares'
"""The output that the wrapper adds, and its place in the memory of a State."""

PENALTIES = 10.0 ** np.arange(-4, 5)
"""Ridge penalties to choose from, per image."""


def label_shares(method: Method) -> Method:
  """Estimates the share of an image that each class covers: 'label_shares' (B, C).

  The shares sum to 1. A linear map estimates them from the mean features of the image.
  It is in `state.memory['label_shares']`, where the surgery 'fit_label_shares' puts it.
  Negative shares become 0.

  Args:
    method: any method whose outputs have 'logits' (B, ..., C) and 'features' (B, D).
  """

  def init(key: jax.Array, batches: Mapping[str, Batch]) -> State:
    state = method.init(key, batches)
    images = batches['train']['image']
    shapes = jax.eval_shape(method.predict, state, images)
    width, classes = (shapes[name].shape[-1] for name in ('features', 'logits'))
    memory = {'kernel': jnp.zeros((width, classes)), 'bias': jnp.ones(classes)}
    return state.replace(memory={**state.memory, SHARES: memory})

  def predict(state: State, images: jax.Array) -> Outputs:
    outputs, memory = method.predict(state, images), state.memory[SHARES]
    raw = product(outputs['features'], memory['kernel']) + memory['bias'][None]
    raw = jnp.maximum(raw, 1e-6)
    return {**outputs, SHARES: raw / raw.sum(-1, keepdims=True)}

  return Method(init, method.step, predict)


def fit_label_shares(*, survey: Survey, split: str = 'train') -> Surgery:
  """Fits the map of `label_shares` by ridge regression on images with label maps.

  Args:
    survey: passes with the stage's own network.
    split: the split whose images are used.

  Raises:
    UserError: the stage is not wrapped in 'label_shares', or no image has a label.
  """

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    del earlier
    outputs = survey.outputs(fresh, split)
    width, classes = (outputs[name].shape[-1] for name in ('features', 'logits'))

    def keep(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
      label = batch['label'].reshape(len(batch['label']), -1)
      count = jax.nn.one_hot(label, classes).sum(1)
      return {'features': outputs['features'], 'pixels': count}

    @functools.cache
    def fitted() -> tuple[np.ndarray, np.ndarray]:
      found = survey.collect(fresh, split, keep)
      x, pixels = (found[name].astype(np.float64) for name in ('features', 'pixels'))
      known = pixels.sum(1) > 0
      if not known.any():
        raise UserError(f'fit_label_shares: every pixel of {split} is void')
      return ridge(x[known], pixels[known] / pixels[known].sum(1, keepdims=True))

    state = put(fresh, f'memory/{SHARES}/kernel', (width, classes), lambda: fitted()[0])
    return put(state, f'memory/{SHARES}/bias', (classes,), lambda: fitted()[1])

  return surgery


def ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  r"""Returns the kernel (D, C) and bias (C,) of ridge regression of y on x.

  .. math::
    \min_{W, b} \sum_i |x_i W + b - y_i|^2 + \alpha N |W S|^2

  with the standard deviations S of the features. :math:`\alpha` is the one of
  `PENALTIES` with the smallest leave-one-out squared error.

  Args:
    x: (N, D).
    y: (N, C).
  """
  mean, deviation = x.mean(0), x.std(0)
  scale = np.where(deviation > 0, deviation, 1)
  centre = y.mean(0)
  u, s, v = np.linalg.svd((x - mean) / scale, full_matrices=False)
  coordinates = u.T @ (y - centre)

  def left_out(penalty: float) -> float:
    shrunk = s**2 / (s**2 + penalty * len(x))
    leverage = (u**2 * shrunk).sum(1) + 1 / len(x)
    error = y - centre - u @ (shrunk[:, None] * coordinates)
    return float(((error / np.maximum(1 - leverage, 1e-9)[:, None]) ** 2).sum())

  best = min(PENALTIES, key=left_out)
  weights = v.T @ ((s / (s**2 + best * len(x)))[:, None] * coordinates)
  kernel = weights / scale[:, None]
  return kernel, centre - mean @ kernel


WRAPPERS = {'label_shares': label_shares}
SURGERIES = {'pixel_memory': pixel_memory, 'fit_label_shares': fit_label_shares}
