"""Per-example losses that require a margin for the true class.

Margins are cosines. The cosine head of this library multiplies by its scale s, so the
logits are already s cos, and softmax(logits) is the model's probability. A margin m is
therefore subtracted from the logits as s m, where `scale` must be the head's. This is
exactly the papers' CE(s (cos - m)). Predictions are made without the margin.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.losses.classification import cross_entropy, one_hot_targets


def ldam_margins(counts: np.ndarray, max_margin: float = 0.5) -> np.ndarray:
  r"""Margins that shrink with the fourth root of the count.

  .. math::
    \Delta_c = K n_c^{-1/4}, \qquad \max_c \Delta_c = \text{max\_margin}

  Args:
    counts: (C,) training images per class, all > 0.
    max_margin: margin of the rarest class, as a cosine.

  Returns:
    (C,) float64 margins as cosines.

  Examples:
    >>> ldam_margins(np.array([16, 1])).tolist()
    [0.25, 0.5]
  """
  counts = np.asarray(counts, np.float64)
  return max_margin * (counts.min() / counts) ** 0.25


def ldam(
  logits: jax.Array,
  labels: jax.Array,
  *,
  counts: np.ndarray,
  max_margin: float = 0.5,
  scale: float = 30.0,
) -> jax.Array:
  r"""Label-distribution-aware margin loss: wider margins for rarer classes.

  .. math::
    \ell = \mathrm{CE}(z - s \Delta_y \mathrm{onehot}(y), y), \qquad z = s \cos

  The logits come scaled from the cosine head, so this equals the paper's CE(s (cos -
  Delta_y onehot(y))). max_margin = 0 is cross-entropy. LDAM-DRW adds class weights late
  in training (`lt_jax.class_weights`) and divides by the sum of the weights
  (`lt_jax.losses.REDUCTIONS['weight_normalised']`).

  Args:
    logits: (B, C), scale times cosine.
    labels: (B,) int.
    counts: (C,) training images per class, all > 0.
    max_margin: margin of the rarest class, as a cosine.
    scale: s of the head.

  Returns:
    (B,) losses in nats.

  Examples:
    >>> even, rare = jnp.zeros((1, 2)), jnp.array([1])  # 30 * 0.5 behind
    >>> round(ldam(even, rare, counts=np.array([16, 1])).item(), 3)
    15.0

  Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
  NeurIPS 2019, arXiv 1906.07413.
  """
  chex.assert_shape(counts, logits.shape[-1:])
  return _with_margins(logits, labels, ldam_margins(counts, max_margin), scale)


def uniform_margin(
  logits: jax.Array, labels: jax.Array, *, margin: float = 0.5, scale: float = 30.0
) -> jax.Array:
  r"""Cross-entropy with the same margin for every class.

  .. math::
    \ell = \mathrm{CE}(z - s m\, \mathrm{onehot}(y), y), \qquad z = s \cos

  It is the control for LDAM; with deferred re-weighting, the paper's M-DRW. margin = 0
  is cross-entropy.

  Args:
    logits: (B, C), scale times cosine.
    labels: (B,) int.
    margin: m, as a cosine.
    scale: s of the head.

  Returns:
    (B,) losses in nats.

  Examples:
    >>> even = jnp.zeros((1, 2))  # the true class is 30 * 0.5 behind
    >>> round(uniform_margin(even, jnp.array([0])).item(), 3)
    15.0

  Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018,
  arXiv 1801.09414; as a control in Cao et al., arXiv 1906.07413.
  """
  return _with_margins(logits, labels, np.full(logits.shape[-1], margin), scale)


LOSSES = {'ldam': ldam, 'uniform_margin': uniform_margin}


def _with_margins(logits, labels, margins, scale):
  """Returns the cross-entropy (B,) with margins (C,) taken off the true logits."""
  offsets = jnp.asarray(scale * margins, logits.dtype)[None]
  return cross_entropy(logits - offsets * one_hot_targets(logits, labels), labels)
