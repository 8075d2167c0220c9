"""Per-example classification losses: (logits, labels) -> (B,), never a mean.

Weights, masks and the reduction belong to the caller. Labels are class indices. All
losses here are finite, with finite gradients, even for logits of +-1e4.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax


def one_hot_targets(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns one-hot targets of the shape and dtype of the logits.

  Every loss here calls it, so it also checks the shapes.

  Args:
    logits: (B, C) float.
    labels: (B,) int.

  Returns:
    (B, C); a label outside 0..C-1 gives a row of zeros.

  Examples:
    >>> one_hot_targets(jnp.zeros((2, 2)), jnp.array([1, -1])).tolist()
    [[0.0, 1.0], [0.0, 0.0]]
  """
  chex.assert_rank([logits, labels], [2, 1])
  chex.assert_type([logits, labels], [float, int])
  chex.assert_equal_shape_prefix([logits, labels], 1)
  return jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)


def cross_entropy(
  logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
  r"""Softmax cross-entropy, optionally with label smoothing.

  .. math::
    \ell = -\sum_c t_c \log \mathrm{softmax}(z)_c, \qquad
    t = (1 - s)\,\mathrm{onehot}(y) + s / C

  Args:
    logits: (B, C).
    labels: (B,) int.
    label_smoothing: s, in [0, 1].

  Returns:
    (B,) losses in nats.

  Examples:
    >>> even = jnp.zeros((1, 2))  # costs log 2
    >>> round(cross_entropy(even, jnp.array([0])).item(), 3)
    0.693

  Label smoothing: Szegedy et al., CVPR 2016, arXiv 1512.00567.
  """
  targets = optax.smooth_labels(one_hot_targets(logits, labels), label_smoothing)
  return optax.softmax_cross_entropy(logits, targets)


def sigmoid_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  r"""Binary cross-entropy of every class against the rest, summed over classes.

  .. math::
    \ell = \sum_c \mathrm{softplus}(-s_c z_c), \qquad
    s_c = +1 \text{ if } c = y \text{ else } -1

  The head's bias should start at -log(C - 1), a prior of 1/C for every class; otherwise
  the C - 1 negatives dominate the first steps.

  Args:
    logits: (B, C).
    labels: (B,) int.

  Returns:
    (B,) losses in nats.

  Examples:
    >>> even = jnp.zeros((1, 2))  # costs log 2 for each class
    >>> round(sigmoid_cross_entropy(even, jnp.array([0])).item(), 3)
    1.386

  Cui et al., CVPR 2019, arXiv 1901.05555.
  """
  return jax.nn.softplus(-_signed(logits, labels)).sum(-1)


def softmax_focal(
  logits: jax.Array, labels: jax.Array, *, gamma: float = 1.0
) -> jax.Array:
  r"""Focal loss on the softmax probability p of the true class.

  .. math::
    \ell = -(1 - p)^\gamma \log p

  p comes from the unweighted cross-entropy. The code of LDAM-DRW (kaidic/LDAM-DRW)
  differs: with class weights w it takes p = exp(-w CE), so w also changes the focusing
  factor; here w only multiplies the loss. gamma = 0 is cross-entropy.

  Args:
    logits: (B, C), C > 1.
    labels: (B,) int.
    gamma: focusing exponent, >= 0.

  Returns:
    (B,) losses in nats.

  Examples:
    >>> even = jnp.zeros((1, 2))  # costs (1 - 1/2)^2 log 2
    >>> round(softmax_focal(even, jnp.array([0]), gamma=2.0).item(), 3)
    0.173

  Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002.
  """
  # log(1 - p) is computed from the other classes: it is finite where 1 - p rounds to
  # zero, so the power has a gradient there for every gamma.
  others = jax.nn.logsumexp(logits, axis=-1, where=one_hot_targets(logits, labels) == 0)
  log_not_p = others - jax.nn.logsumexp(logits, axis=-1)
  return jnp.exp(gamma * log_not_p) * cross_entropy(logits, labels)


def sigmoid_focal(
  logits: jax.Array, labels: jax.Array, *, gamma: float = 1.0
) -> jax.Array:
  r"""Focal loss of every class against the rest, summed over classes.

  .. math::
    \ell = -\sum_c (1 - p_c)^\gamma \log p_c, \qquad p_c = \mathrm{sigmoid}(s_c z_c),
    \quad s_c = +1 \text{ if } c = y \text{ else } -1

  There is no separate alpha: class weights play that part. gamma = 0 is
  `sigmoid_cross_entropy`.

  Args:
    logits: (B, C).
    labels: (B,) int.
    gamma: focusing exponent, >= 0.

  Returns:
    (B,) losses in nats.

  Examples:
    >>> even = jnp.zeros((1, 2))  # costs (1 - 1/2)^2 log 2 for each class
    >>> round(sigmoid_focal(even, jnp.array([0]), gamma=2.0).item(), 3)
    0.347

  Cui et al., CVPR 2019, arXiv 1901.05555, whose code (richardaecn/class-balanced-loss)
  writes log(1 - p) with an exponential that overflows for very negative logits.
  """
  signed = _signed(logits, labels)
  focus = jnp.exp(-gamma * jax.nn.softplus(signed))
  return (focus * jax.nn.softplus(-signed)).sum(-1)


def balanced_softmax(
  logits: jax.Array, labels: jax.Array, *, counts: np.ndarray
) -> jax.Array:
  r"""Cross-entropy with the training prior added, so that the logits learn without it.

  .. math::
    \ell = -\log \frac{n_y e^{z_y}}{\sum_c n_c e^{z_c}}

  It is `logit_adjustment` with tau = 1. With a class-balanced sampler as well, the
  prior would be corrected twice.

  Args:
    logits: (B, C).
    labels: (B,) int.
    counts: (C,) training images per class, all > 0.

  Returns:
    (B,) losses in nats.

  Examples:
    >>> even, rare = jnp.zeros((1, 2)), jnp.array([1])  # costs log 10
    >>> round(balanced_softmax(even, rare, counts=np.array([90, 10])).item(), 3)
    2.303

  Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020,
  arXiv 2007.10740.
  """
  return logit_adjustment(logits, labels, counts=counts, tau=1.0)


def logit_adjustment(
  logits: jax.Array, labels: jax.Array, *, counts: np.ndarray, tau: float = 1.0
) -> jax.Array:
  r"""Cross-entropy of logits shifted by the log prior.

  .. math::
    \ell = \mathrm{CE}(z + \tau \log \pi, y), \qquad \pi_c = n_c / \sum_k n_k

  The shift applies in training only: predictions use z.

  Args:
    logits: (B, C).
    labels: (B,) int.
    counts: (C,) training images per class, all > 0.
    tau: strength; 0 is cross-entropy.

  Returns:
    (B,) losses in nats.

  Examples:
    >>> even, rare = jnp.zeros((1, 2)), jnp.array([1])  # sqrt(90) : sqrt(10) = 3 : 1
    >>> counts = np.array([90, 10])
    >>> round(logit_adjustment(even, rare, counts=counts, tau=0.5).item(), 3)
    1.386

  Menon et al., "Long-Tail Learning via Logit Adjustment", ICLR 2021, arXiv 2007.07314.
  """
  chex.assert_shape(counts, logits.shape[-1:])
  shift = jnp.asarray(tau * np.log(counts / np.sum(counts)), logits.dtype)
  return cross_entropy(logits + shift[None], labels)


def label_aware_smoothing(
  logits: jax.Array,
  labels: jax.Array,
  *,
  counts: np.ndarray,
  head: float = 0.3,
  tail: float = 0.0,
) -> jax.Array:
  r"""Cross-entropy with more label smoothing for larger classes.

  .. math::
    \ell = -(1 - \epsilon_y) \log p_y - \frac{\epsilon_y}{C} \sum_c \log p_c, \qquad
    \epsilon_y = t + (h - t) \sin \frac{\pi (n_y - n_{\min})}{2 (n_{\max} - n_{\min})}

  with p = softmax(z). head = tail is `cross_entropy` with that label smoothing. If all
  counts are equal, every class takes `tail`.

  Args:
    logits: (B, C).
    labels: (B,) int.
    counts: (C,) training images per class, all > 0.
    head: h, smoothing of the largest class, in [0, 1].
    tail: t, smoothing of the smallest class, in [0, 1].

  Returns:
    (B,) losses in nats.

  Examples:
    >>> right = jnp.array([[10.0, 0.0], [0.0, 10.0]])  # sure of the class of each image
    >>> labels, counts = jnp.array([0, 1]), np.array([90, 10])
    >>> losses = label_aware_smoothing(right, labels, counts=counts)
    >>> [round(x, 1) for x in losses.tolist()]
    [1.5, 0.0]

  Zhong et al., "Improving Calibration for Long-Tailed Recognition", CVPR 2021, arXiv
  2104.00466. As in the authors' code (dvlab-research/MiSLAS), the smoothing is spread
  over all C classes, the true one included. The defaults are the code's for
  ImageNet-LT.
  """
  chex.assert_shape(counts, logits.shape[-1:])
  targets = one_hot_targets(logits, labels)
  above = np.asarray(counts, np.float64) - np.min(counts)
  rise = np.sin(np.pi / 2 * above / (above.max() or 1))
  smoothing = jnp.asarray(tail + (head - tail) * rise, logits.dtype)[None]
  # A sum, not a matrix product, which would round the smoothing on a TPU.
  own = (targets * smoothing).sum(-1, keepdims=True)
  return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, own))


def vector_scaling(
  logits: jax.Array,
  labels: jax.Array,
  *,
  counts: np.ndarray,
  gamma: float = 0.3,
  tau: float = 1.0,
) -> jax.Array:
  r"""VS loss: logits scaled down for rare classes, and shifted by the log prior.

  .. math::
    \ell = \mathrm{CE}(\Delta z + \iota, y), \qquad
    \Delta_c = (n_c / n_{\max})^\gamma, \quad \iota_c = \tau \log \pi_c

  gamma = 0 is `logit_adjustment`, tau = 0 is `class_dependent_temperature`, gamma = tau
  = 0 is cross-entropy. Predictions use z.

  Args:
    logits: (B, C).
    labels: (B,) int.
    counts: (C,) training images per class, all > 0.
    gamma: exponent of the scales.
    tau: strength of the shift.

  Returns:
    (B,) losses in nats.

  Examples:
    >>> logits, rare = jnp.array([[0.0, 10.0]]), jnp.array([1])
    >>> loss = vector_scaling(logits, rare, counts=np.array([100, 1]), gamma=0.5)
    >>> round(loss.item(), 3)  # log(1 + 100 / e), as the logit 10 becomes 1
    3.632

  Kini et al., "Label-Imbalanced and Group-Sensitive Classification under
  Overparameterization", NeurIPS 2021, arXiv 2103.01550; defaults from the authors' code
  (orparask/VS-Loss).
  """
  chex.assert_shape(counts, logits.shape[-1:])
  scales = jnp.asarray((counts / np.max(counts)) ** gamma, logits.dtype)
  return logit_adjustment(logits * scales[None], labels, counts=counts, tau=tau)


def class_dependent_temperature(
  logits: jax.Array, labels: jax.Array, *, counts: np.ndarray, gamma: float = 0.3
) -> jax.Array:
  r"""CDT: logits divided by temperatures that are higher for rarer classes.

  .. math::
    \ell = \mathrm{CE}(z / a, y), \qquad a_c = (n_{\max} / n_c)^\gamma

  The temperatures apply in training only: predictions use z, which is therefore larger
  for rare classes. It is `vector_scaling` with tau = 0, and has the same default gamma;
  gamma = 0 is cross-entropy.

  Args:
    logits: (B, C).
    labels: (B,) int.
    counts: (C,) training images per class, all > 0.
    gamma: exponent of the temperatures.

  Returns:
    (B,) losses in nats.

  Examples:
    >>> logits, rare = jnp.array([[0.0, 10.0]]), jnp.array([1])
    >>> counts = np.array([100, 1])
    >>> loss = class_dependent_temperature(logits, rare, counts=counts, gamma=0.5)
    >>> round(loss.item(), 3)  # log(1 + 1 / e), as the logit 10 becomes 1
    0.313

  Ye et al., "Identifying and Compensating for Feature Deviation in Imbalanced Deep
  Learning", arXiv 2001.01385.
  """
  return vector_scaling(logits, labels, counts=counts, gamma=gamma, tau=0.0)


LOSSES = {
  'cross_entropy': cross_entropy,
  'sigmoid_cross_entropy': sigmoid_cross_entropy,
  'softmax_focal': softmax_focal,
  'sigmoid_focal': sigmoid_focal,
  'balanced_softmax': balanced_softmax,
  'logit_adjustment': logit_adjustment,
  'label_aware_smoothing': label_aware_smoothing,
  'vector_scaling': vector_scaling,
  'class_dependent_temperature': class_dependent_temperature,
}


def _signed(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns logits with the sign flipped for every class but the true one."""
  return (2 * one_hot_targets(logits, labels) - 1) * logits
