"""Ranking losses over classes: wrong classes must score below the right one.

Source of the form: Akata et al., Label-Embedding for Image Classification, arXiv
1503.08677. All are functions of logits (B, C) and labels (B,) that return (B,); a class
that is ruled out has the logit -1e9 and never counts.
"""

import jax
import jax.numpy as jnp
from jax import lax

from lt_jax.losses.classification import one_hot_targets


def _violations(logits: jax.Array, labels: jax.Array, margin: float) -> jax.Array:
  """Returns [margin + z_c - z_y]_+ (B, C), with 0 for the class y itself."""
  targets = one_hot_targets(logits, labels)
  right = (targets * logits).sum(-1, keepdims=True)
  return (1 - targets) * jax.nn.relu(margin + logits - right)


def devise(logits: jax.Array, labels: jax.Array, *, margin: float = 0.1) -> jax.Array:
  r"""Sums the violations of all other classes.

  .. math:: \ell = \sum_{c \neq y} [\, m + z_c - z_y \,]_+

  Args:
    logits: (B, C).
    labels: (B,) int.
    margin: m.

  Examples:
    >>> logits, labels = jnp.array([[2.0, 1.5, 2.0]]), jnp.array([0])
    >>> devise(logits, labels, margin=1.0).item()  # 0.5 + 1
    1.5

  Source: Frome et al., DeViSE, NIPS 2013, equation 1; the authors' code stops at the
  first violation in a random order.
  """
  return _violations(logits, labels, margin).sum(-1)


def sje(logits: jax.Array, labels: jax.Array, *, margin: float = 1.0) -> jax.Array:
  r"""Takes the largest violation.

  .. math:: \ell = \max_{c \neq y} [\, m + z_c - z_y \,]_+

  Args:
    logits: (B, C).
    labels: (B,) int.
    margin: m.

  Examples:
    >>> logits, labels = jnp.array([[2.0, 1.5, 2.0]]), jnp.array([0])
    >>> sje(logits, labels, margin=1.0).item()  # the larger of 0.5 and 1
    1.0

  Source: Akata et al., Evaluation of Output Embeddings for Fine-Grained Image
  Classification, arXiv 1409.8403, equation 4.
  """
  return _violations(logits, labels, margin).max(-1)


def ale(logits: jax.Array, labels: jax.Array, *, margin: float = 1.0) -> jax.Array:
  r"""Weights the violations by the rank of the right class.

  .. math::
    \ell = \frac{\beta_r}{r} \sum_{c \neq y} [\, m + z_c - z_y \,]_+, \qquad
    \beta_r = \sum_{i=1}^{r} \frac{1}{i}

  r is the number of classes that violate the margin. All scores are known, so it is
  exact and needs no sampling. The weight is a constant for the gradient.

  Args:
    logits: (B, C).
    labels: (B,) int.
    margin: m.

  Examples:
    >>> logits, labels = jnp.array([[2.0, 1.5, 2.0]]), jnp.array([0])
    >>> ale(logits, labels, margin=1.0).item()  # (1 + 1/2) / 2 * (0.5 + 1)
    1.125

  Source: Akata et al., arXiv 1503.08677, equation 12, after WSABIE by Weston et al.,
  2010.
  """
  violations = _violations(logits, labels, margin)
  rank = (violations > 0).sum(-1)
  sums = jnp.cumsum(1 / jnp.arange(1, logits.shape[-1] + 1, dtype=logits.dtype))
  weight = sums[jnp.maximum(rank, 1) - 1] / jnp.maximum(rank, 1)
  return lax.stop_gradient(weight) * violations.sum(-1)


def negative_score(logits: jax.Array, labels: jax.Array) -> jax.Array:
  r"""Returns minus the right class's score, :math:`\ell = -z_y`.

  If scores are negative squared distances, it is the squared distance between an image
  and its class. It ignores the other classes, so one side must be fixed: otherwise
  everything collapses to a point.

  Args:
    logits: (B, C).
    labels: (B,) int.

  Examples:
    >>> negative_score(jnp.array([[2.0, 1.5, 2.0]]), jnp.array([1])).item()
    -1.5
  """
  return -(one_hot_targets(logits, labels) * logits).sum(-1)


LOSSES = {
  'devise': devise,
  'sje': sje,
  'ale': ale,
  'negative_score': negative_score,
}
