r"""Alignments: how far apart two domains are in the layers of a network.

An alignment is a function (source, target, *, options) -> () of the outputs for one
batch of each domain. It reads no target labels; there are none. The keyword `layers`
names the layers to compare, each (S, D) and (T, D). It is added to the objective with a
weight that may change with the progress of training. To add one, write it and add it to
`ALIGNMENTS`.

Everything is finite, with finite gradients, even where vectors coincide. Memory is a
few matrices of (S + T, S + T) and (D, D).
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lt_jax.class_weights import check_counts
from lt_jax.errors import UserError, check_options, construct, lookup
from lt_jax.losses.metric import distances

Outputs = Mapping[str, jax.Array]
Schedule = Callable[[jax.Array], jax.Array]


def layer(outputs: Outputs, name: str) -> jax.Array:
  """Returns a named layer as vectors (B, D), at least float32.

  Raises:
    UserError: the network has no such layer.

  Examples:
    >>> layer({'stage1': jnp.zeros((2, 4, 4, 3))}, 'stage1').shape
    (2, 48)
  """
  x = lookup(outputs, 'layer of this network', name)
  return x.reshape(x.shape[0], -1).astype(jnp.promote_types(x.dtype, jnp.float32))


def joined(outputs: Outputs, names: Sequence[str]) -> jax.Array:
  """Returns the named layers concatenated, (B, D).

  Examples:
    >>> outputs = {'features': jnp.zeros((2, 3)), 'logits': jnp.zeros((2, 2))}
    >>> joined(outputs, ['features', 'logits']).shape
    (2, 5)
  """
  return jnp.concatenate([layer(outputs, name) for name in names], axis=-1)


# Moments.

CORAL_FORMS = {'paper': (0.25, 0.0), 'adapt': (0.25, 1.0), 'domainbed': (1.0, 1.0)}
"""Form -> (a, b), the constants of `coral`.

'paper' is equation 1 of the paper. 'adapt' is the library ADAPT's form with
`match_mean`; without that option ADAPT's is the paper's. 'domainbed' is the form of
DomainBed and TLLib, so weights tuned there do not carry over to the paper's.
"""


def coral(
  source: Outputs, target: Outputs, *, layers: Sequence[str], form: str = 'paper'
) -> jax.Array:
  r"""Deep CORAL: compares the covariances of the domains, and in some forms the means.

  .. math::
    \sum_l \frac{a}{d^2} |C_S - C_T|_F^2 + \frac{b}{d} |\mu_S - \mu_T|^2

  over the layers l of size d, with unbiased covariances C (divided by n - 1).

  Args:
    source: outputs for the source.
    target: outputs for the target.
    layers: names of the layers to compare.
    form: a key of `CORAL_FORMS`, which gives a and b.

  Returns:
    () distance, at least 0.

  Raises:
    UserError: an unknown form or layer, or a batch of one image.

  Examples:
    >>> source = {'logits': jnp.array([[0.0], [2.0]])}  # of variance 2
    >>> target = {'logits': jnp.array([[0.0], [4.0]])}  # of variance 8
    >>> coral(source, target, layers=['logits']).item()
    9.0

  Sun and Saenko, "Deep CORAL", ECCV workshops 2016, arXiv 1607.01719.
  """
  of_covariances, of_means = lookup(CORAL_FORMS, 'form of coral', form)
  _check_sizes(source, target)

  def apart(name: str) -> jax.Array:
    (mean_s, cov_s), (mean_t, cov_t) = (
      _moments(layer(outputs, name)) for outputs in (source, target)
    )
    distance = of_covariances * ((cov_s - cov_t) ** 2).mean()
    if of_means:
      distance += of_means * ((mean_s - mean_t) ** 2).mean()
    return distance

  return sum(apart(name) for name in layers)


def central_moments(
  source: Outputs, target: Outputs, *, layers: Sequence[str], order: int = 5
) -> jax.Array:
  r"""Central moment discrepancy: compares means and central moments, unit by unit.

  .. math::
    \sum_l \Big( |\mu_S - \mu_T| + \sum_{k=2}^{K} |c_k(S) - c_k(T)| \Big), \qquad
    c_k(X) = E \, (X - \mu)^k

  over the layers l, with biased moments. The paper divides by powers of the length of
  the interval that bounds the activations; here a sigmoid maps any layer to (0, 1),
  which has length 1.

  Args:
    source: outputs for the source.
    target: outputs for the target.
    layers: names of the layers to compare.
    order: K, at least 1.

  Returns:
    () discrepancy, at least 0.

  Raises:
    UserError: an unknown layer, or K below 1.

  Examples:
    >>> source = {'logits': jnp.zeros((2, 1))}  # sigmoid 1/2
    >>> target = {'logits': jnp.full((2, 1), np.log(3))}  # sigmoid 3/4
    >>> round(central_moments(source, target, layers=['logits'], order=2).item(), 3)
    0.25

  Zellinger et al., "Central Moment Discrepancy (CMD) for Domain-Invariant
  Representation Learning", ICLR 2017, arXiv 1702.08811, definition 2.
  """
  if order < 1:
    raise UserError(f'order of central_moments is {order}; it must be at least 1')

  def apart(name: str) -> jax.Array:
    s, t = (jax.nn.sigmoid(layer(outputs, name)) for outputs in (source, target))
    mean_s, mean_t = s.mean(0), t.mean(0)
    s, t = s - mean_s[None], t - mean_t[None]
    higher = ((s**k).mean(0) - (t**k).mean(0) for k in range(2, order + 1))
    return sum(_length(d) for d in (mean_s - mean_t, *higher))

  return sum(apart(name) for name in layers)


def _length(x: jax.Array) -> jax.Array:
  """Returns the norm of x (D,), with gradient 0 at 0."""
  square = (x**2).sum()
  positive = square > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the mean (D,) and unbiased covariance (D, D) of x (B, D)."""
  mean = x.mean(0)
  centred = x - mean[None]
  product = jnp.matmul(centred.T, centred, precision=lax.Precision.HIGHEST)
  return mean, product / (len(x) - 1)


# Kernels.

FAMILY = (0.125, 0.25, 0.5, 1.0, 2.0)
"""Squared bandwidths of a family of kernels, as multiples of the mean distance."""


def mmd(
  source: Outputs,
  target: Outputs,
  *,
  layers: Sequence[str],
  bandwidths: Sequence[float] = FAMILY,
  estimate: str = 'unbiased',
) -> jax.Array:
  r"""Maximum mean discrepancy of every layer, with a family of Gaussian kernels.

  .. math::
    \mathrm{MMD}^2 = E\, k(s, s') + E\, k(t, t') - 2 E\, k(s, t), \qquad
    k(x, y) = \sum_u e^{-|x - y|^2 / (2 \alpha_u \bar d)}

  summed over the layers. d is the mean squared distance over all pairs of the two
  batches pooled, and is a constant for the gradient. The paper learns the weights of
  the kernels; here they are all one, as in TLLib.

  Args:
    source: outputs for the source.
    target: outputs for the target.
    layers: names of the layers to compare.
    bandwidths: the alphas.
    estimate: a key of `ESTIMATES`. An unbiased estimate can be negative and is not
      clipped.

  Returns:
    () discrepancy.

  Raises:
    UserError: an unknown estimate or layer, or a batch of one image.

  Examples:
    >>> source, target = {'logits': jnp.zeros((2, 1))}, {'logits': jnp.ones((2, 1))}
    >>> found = mmd(source, target, layers=['logits'], bandwidths=[1])
    >>> round(found.item(), 3)  # 2 - 2 / e
    1.264

  Gretton et al., JMLR 13, 2012, lemma 6; Long et al., "Learning Transferable Features
  with Deep Adaptation Networks" (DAN), ICML 2015, arXiv 1502.02791.
  """
  estimator = lookup(ESTIMATES, 'estimate', estimate)
  _check_sizes(source, target)

  def apart(name: str) -> jax.Array:
    s, t = layer(source, name), layer(target, name)
    return estimator([(s, t, _family(s, t, bandwidths))])

  return sum(apart(name) for name in layers)


def joint_mmd(
  source: Outputs,
  target: Outputs,
  *,
  layers: Sequence[str],
  bandwidths: Sequence[float] = FAMILY,
  sigma: float = 0.92,
  estimate: str = 'unbiased',
) -> jax.Array:
  r"""Maximum mean discrepancy of the joint distribution of layers and predictions.

  .. math::
    k\big((x, p), (x', p')\big) = e^{-|p - p'|^2 / (2 \sigma^2)}
    \prod_l \sum_u e^{-|x_l - x'_l|^2 / (2 \alpha_u \bar d_l)}

  with p the softmax of the logits, which are always compared. Form and constants are
  TLLib's; the paper trains with the linear-time estimate.

  Args:
    source: outputs for the source.
    target: outputs for the target.
    layers: names of the layers to compare besides the predictions.
    bandwidths: the alphas.
    sigma: bandwidth of the kernel on predictions.
    estimate: a key of `ESTIMATES`.

  Returns:
    () discrepancy.

  Raises:
    UserError: an unknown estimate or layer, or a batch of one image.

  Examples:
    >>> source = {'features': jnp.zeros((2, 1)), 'logits': jnp.zeros((2, 1))}
    >>> target = {'features': jnp.ones((2, 1)), 'logits': jnp.zeros((2, 1))}
    >>> found = joint_mmd(source, target, layers=['features'], bandwidths=[1])
    >>> round(found.item(), 3)  # predictions agree, so it is `mmd`: 2 - 2 / e
    1.264

  Long et al., "Deep Transfer Learning with Joint Adaptation Networks" (JAN), ICML 2017,
  arXiv 1605.06636.
  """
  estimator = lookup(ESTIMATES, 'estimate', estimate)
  _check_sizes(source, target)
  pairs = [(layer(source, name), layer(target, name)) for name in layers]
  compared = [(s, t, _family(s, t, bandwidths)) for s, t in pairs]
  predictions = [jax.nn.softmax(layer(o, 'logits')) for o in (source, target)]
  return estimator([*compared, (*predictions, _gaussians((2 * sigma**2,)))])


def class_mmd(
  real: jax.Array,
  generated: jax.Array,
  labels: jax.Array,
  *,
  bandwidths: Sequence[float] = FAMILY,
) -> jax.Array:
  r"""Discrepancy between generated vectors and real ones of the same class.

  .. math::
    \frac{1}{N} \sum_c n_c \Big( \frac{1}{n_c (n_c - 1)} \sum_{i \ne j \in c}
    \big( k(v_i, v_j) + k(g_i, g_j) \big)
    - \frac{2}{n_c^2} \sum_{i, j \in c} k(v_i, g_j) \Big)

  This is the unbiased estimate within each class, averaged over the N vectors of
  classes that have at least two; other classes are ignored. The kernels are those of
  `mmd`, relative to the mean squared distance of the compared pairs. It can be
  negative.

  Args:
    real: v, (B, D).
    generated: g, (B, D).
    labels: (B,) int, the classes of both; -1 for ignored vectors.
    bandwidths: the alphas.

  Returns:
    () discrepancy; 0 if no class has two vectors.

  Examples:
    >>> real, generated, labels = jnp.zeros((2, 1)), jnp.ones((2, 1)), jnp.array([0, 0])
    >>> found = class_mmd(real, generated, labels, bandwidths=[1])
    >>> round(found.item(), 3)  # 2 - 2 / e
    1.264

  Gretton et al., JMLR 13, 2012, lemma 6; per class as in Bucher et al., arXiv
  1906.00817, section 3.1.
  """
  same = ((labels[:, None] == labels[None]) & (labels >= 0)[None]).astype(jnp.float32)
  size = same.sum(1)
  counted = jnp.maximum((size > 1).sum(), 1)
  across = same * (size > 1)[:, None] / (jnp.maximum(size, 1) * counted)[:, None]
  others = same * (1 - jnp.eye(len(labels)))
  within = others / (jnp.maximum(size - 1, 1) * counted)[:, None]
  pairs = (
    (within, distances(real, real, squared=True)),
    (within, distances(generated, generated, squared=True)),
    (-2 * across, distances(real, generated, squared=True)),
  )
  mean = sum(lax.stop_gradient((abs(w) * d).sum()) for w, d in pairs) / 4
  mean = jnp.where(mean > 0, mean, 1)
  kernel = _gaussians([2 * alpha * mean for alpha in bandwidths])
  return sum((w * kernel(d)).sum() for w, d in pairs)


Kernel = Callable[[jax.Array], jax.Array]
"""Maps squared distances to kernel values, elementwise."""

Compared = Sequence[tuple[jax.Array, jax.Array, Kernel]]
"""(source (S, D), target (T, D), kernel) of each layer; their kernels multiply."""


def unbiased(compared: Compared) -> jax.Array:
  """Means over all pairs of different images, without the terms k(x, x).

  Examples:
    >>> batch = jnp.array([[0.0], [1.0]])
    >>> unbiased([(batch, batch, lambda squares: -squares)]).item()  # 2 * 0.5 - 1 - 1
    -1.0
  """
  return _all_pairs(compared, itself=False)


def biased(compared: Compared) -> jax.Array:
  """Means over all pairs, including each image with itself: never negative.

  Examples:
    >>> batch = jnp.array([[0.0], [1.0]])
    >>> biased([(batch, batch, lambda squares: -squares)]).item()  # 2 * 0.5 - 0.5 - 0.5
    0.0
  """
  return _all_pairs(compared, itself=True)


def linear(compared: Compared) -> jax.Array:
  r"""The linear-time estimate, over disjoint pairs of images.

  .. math::
    \frac{1}{m} \sum_{i=1}^{m} k(s_{2i-1}, s_{2i}) + k(t_{2i-1}, t_{2i})
    - k(s_{2i-1}, t_{2i}) - k(s_{2i}, t_{2i-1})

  over the first 2 m images of each domain, as many as both have. It is unbiased, and
  noisier than `unbiased`. Gretton et al., lemma 14.

  Examples:
    >>> source, target = jnp.zeros((2, 1)), jnp.ones((2, 1))
    >>> linear([(source, target, lambda squares: -squares)]).item()  # 0 + 0 + 1 + 1
    2.0
  """
  count = min(min(len(s), len(t)) for s, t, _ in compared) // 2 * 2
  products = 1
  for s, t, kernel in compared:
    s, t = (x[:count].reshape(-1, 2, x.shape[-1]) for x in (s, t))
    ends = (
      (s[:, 0], s[:, 1]),
      (t[:, 0], t[:, 1]),
      (s[:, 0], t[:, 1]),
      (s[:, 1], t[:, 0]),
    )
    squares = jnp.stack([((a - b) ** 2).sum(-1) for a, b in ends])
    products = products * kernel(squares)
  within_s, within_t, across, back = products
  return (within_s + within_t - across - back).mean()


ESTIMATES = {'unbiased': unbiased, 'biased': biased, 'linear': linear}


def _all_pairs(compared: Compared, *, itself: bool) -> jax.Array:
  """Returns means of products of kernels over pairs within and across domains."""
  within_s = within_t = across = 1
  for s, t, kernel in compared:
    within_s = within_s * kernel(distances(s, s, squared=True))
    within_t = within_t * kernel(distances(t, t, squared=True))
    across = across * kernel(distances(s, t, squared=True))

  def mean(values: jax.Array) -> jax.Array:
    if itself:
      return values.mean()
    size = len(values)
    others = 1 - jnp.eye(size, dtype=values.dtype)
    return (values * others).sum() / (size * (size - 1))

  return mean(within_s) + mean(within_t) - 2 * across.mean()


def _family(s: jax.Array, t: jax.Array, bandwidths: Sequence[float]) -> Kernel:
  """Returns the sum of Gaussian kernels with multiples of the mean distance.

  The mean over all pairs of a batch is computed in linear time, as twice the mean
  squared distance to the centre.
  """
  both = [lax.stop_gradient(x) for x in (s, t)]
  size = len(s) + len(t)
  centre = sum(x.sum(0) for x in both) / size
  mean = 2 * sum(((x - centre[None]) ** 2).sum() for x in both) / size
  # If all vectors coincide, every distance is 0 and any bandwidth will do.
  mean = jnp.where(mean > 0, mean, 1)
  return _gaussians([2 * alpha * mean for alpha in bandwidths])


def _gaussians(denominators: Sequence[jax.Array | float]) -> Kernel:
  return lambda squares: sum(jnp.exp(-squares / d) for d in denominators)


# Alignments that use the target's predictions only.

LEVELS = (1.0, 0.2)
"""Weights of a network's logits and auxiliary logits in ADVENT's code."""


def entropy(source: Outputs, target: Outputs) -> jax.Array:
  r"""Mean entropy of the target's predictions, in nats.

  .. math::
    -\frac{1}{T} \sum_i \sum_c p_{ic} \log p_{ic}

  Args:
    source: not used.
    target: outputs with 'logits' (T, ..., C), for images or their pixels.

  Returns:
    () entropy, between 0 and log C.

  Examples:
    >>> round(entropy({}, {'logits': jnp.zeros((2, 2))}).item(), 3)  # log 2
    0.693

  Grandvalet and Bengio, NIPS 2004.
  """
  del source
  return _entropies(scores(target, 'logits')).mean()


def mcc(source: Outputs, target: Outputs, *, temperature: float = 2.5) -> jax.Array:
  r"""Minimum class confusion: how much target predictions waver between two classes.

  .. math::
    \frac{1}{C} \sum_{j \ne k} \frac{M_{jk}}{\sum_l M_{jl}}, \qquad
    M_{jk} = \sum_i w_i\, p_{ij}\, p_{ik}, \qquad
    w_i = \frac{T (1 + e^{-H(p_i)})}{\sum_i 1 + e^{-H(p_i)}}

  with p the softmax of the logits over the temperature. The weights w, which favour
  confident predictions, are constants for the gradient, as in the authors' code.

  Args:
    source: not used.
    target: outputs with 'logits' (T, ..., C), for images or their pixels, each of which
      is one prediction.
    temperature: of the softmax.

  Returns:
    () confusion, between 0 and 1.

  Examples:
    >>> round(mcc({}, {'logits': jnp.zeros((2, 2))}).item(), 3)  # half of each row of M
    0.5

  Jin et al., "Minimum Class Confusion for Versatile Domain Adaptation", ECCV 2020,
  arXiv 1912.03699.
  """
  del source
  logits = scores(target, 'logits') / temperature
  logits = logits.reshape(-1, logits.shape[-1])
  sure = 1 + jnp.exp(-lax.stop_gradient(_entropies(logits)))
  weights = len(sure) * sure / sure.sum()
  p = jax.nn.softmax(logits)
  product = jnp.matmul(p.T, p * weights[:, None], precision=lax.Precision.HIGHEST)
  totals = product.sum(1, keepdims=True)
  # A class with zero probability in every image is confused with none.
  shares = product / jnp.where(totals > 0, totals, 1)
  return (shares.sum() - jnp.trace(shares)) / len(shares)


def minent(
  source: Outputs,
  target: Outputs,
  *,
  layers: Sequence[str],
  counts: np.ndarray,
  weights: Sequence[float] = LEVELS,
  hardest: float = 1.0,
  prior: float = 0.0,
  mu: float = 0.5,
) -> jax.Array:
  r"""MinEnt: the mean entropy of the target's predictions, as a share of log C.

  .. math::
    \sum_l w_l \Big( \frac{1}{N} \sum_n \sum_c I_{nc} + b\, H \Big), \qquad
    I_{nc} = \frac{-p_{nc} \log p_{nc}}{\log C}

  over the N pixels of all images, or only those with the highest entropy in each image
  (ties included), and the layers l of logits. H is `class_prior`.

  Args:
    source: not used.
    target: outputs with these layers, each of logits (T, ..., C).
    layers: names of layers of logits, such as 'logits' and 'auxiliary_logits'.
    counts: (C,) labels of each class in the source, from which the prior is made.
    weights: w, one for each layer, in order.
    hardest: the share of an image's pixels that count, in (0, 1].
    prior: b. The paper does not give it.
    mu: see `class_prior`.

  Returns:
    () between 0 and the sum of the weights, apart from the prior.

  Raises:
    UserError: a layer the network lacks, fewer weights than layers, or a share out of
      range.

  Examples:
    >>> even, counts = {'logits': jnp.zeros((2, 2))}, np.array([90, 10])
    >>> round(minent({}, even, layers=['logits'], counts=counts).item(), 3)
    1.0

  Vu et al., "ADVENT: Adversarial Entropy Minimization for Domain Adaptation in Semantic
  Segmentation", CVPR 2019, arXiv 1811.12833, equations 1 to 3; `hardest` is its "ER".
  """
  if not 0 < hardest <= 1:
    raise UserError(f'minent: hardest must be more than 0 and at most 1, got {hardest}')
  total = jnp.float32(0)
  for name, weight in levels('minent', layers, weights):
    logits = scores(target, name)
    entropies = self_information(logits).sum(-1).reshape(len(logits), -1)
    total += weight * _mean_of_largest(entropies, hardest)
  if prior:
    total += prior * class_prior(
      source, target, layers=layers, counts=counts, weights=weights, mu=mu
    )
  return total


def class_prior(
  source: Outputs,
  target: Outputs,
  *,
  layers: Sequence[str],
  counts: np.ndarray,
  weights: Sequence[float] = LEVELS,
  mu: float = 0.5,
) -> jax.Array:
  r"""How far the class shares of an image fall below those of the source.

  .. math::
    \sum_l w_l \frac{1}{T} \sum_i \sum_c
    \max\Big(0,\ \mu\, q_c - \frac{1}{N} \sum_n p_{inc}\Big)

  where q are the shares of the classes among the source's labels. It stops the network
  from lowering the entropy by giving up rare classes.

  Args:
    source: not used.
    target: outputs with these layers, each of logits (T, ..., C).
    layers: names of layers of logits.
    counts: (C,) labels of each class in the source.
    weights: w, one for each layer, in order.
    mu: how much of a class's share is required, in [0, 1].

  Returns:
    () at least 0.

  Raises:
    UserError: a layer the network lacks, or fewer weights than layers.

  Examples:
    >>> even, counts = {'logits': jnp.zeros((2, 2))}, np.array([90, 10])
    >>> prior = class_prior({}, even, layers=['logits'], counts=counts, mu=1.0)
    >>> round(prior.item(), 3)  # 0.9 - 0.5
    0.4

  Vu et al., arXiv 1811.12833, equation 9.
  """
  del source
  shares = np.asarray(counts, np.float64) / np.sum(counts)
  total = jnp.float32(0)
  for name, weight in levels('class_prior', layers, weights):
    p = jax.nn.softmax(scores(target, name))
    found = p.reshape(len(p), -1, p.shape[-1]).mean(1)
    wanted = jnp.asarray(mu * shares, p.dtype)[None]
    total += weight * jnp.maximum(0, wanted - found).sum(-1).mean()
  return total


def levels(
  what: str, layers: Sequence[str], weights: Sequence[float]
) -> list[tuple[str, float]]:
  """Pairs layers of logits with their weights; surplus weights are dropped.

  Raises:
    UserError: there are fewer weights than layers.

  Examples:
    >>> levels('minent', ['logits'], weights=(1.0, 0.2))
    [('logits', 1.0)]
  """
  if len(layers) > len(weights):
    raise UserError(
      f'{what} has {len(weights)} weights for the {len(layers)} layers of '
      'alignment.align_on: give each its own'
    )
  return list(zip(layers, weights, strict=False))


def scores(outputs: Outputs, name: str) -> jax.Array:
  """Returns a layer of logits (B, ..., C), at least float32.

  Raises:
    UserError: the network has no such layer.

  Examples:
    >>> scores({'logits': jnp.zeros((2, 3), jnp.bfloat16)}, 'logits').dtype.name
    'float32'
  """
  x = lookup(outputs, 'layer of this network', name)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def self_information(logits: jax.Array) -> jax.Array:
  r"""Returns -p log p / log C of each class: the terms of the normalised entropy.

  Computed from the log-softmax, so it is finite, with finite gradients, for any logits.

  Args:
    logits: (..., C).

  Returns:
    (..., C), at least 0; they sum to at most 1.

  Examples:
    >>> self_information(jnp.zeros((2, 2))).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
  """
  log_p = jax.nn.log_softmax(logits)
  return -jnp.exp(log_p) * log_p / math.log(logits.shape[-1])


def _mean_of_largest(values: jax.Array, share: float) -> jax.Array:
  """Returns the mean of a share of each row's largest values, rounded up, with ties."""
  count = math.ceil(share * values.shape[1])
  if count == values.shape[1]:
    return values.mean()
  least = jnp.sort(lax.stop_gradient(values), axis=1)[:, -count][:, None]
  chosen = (values >= least).astype(values.dtype)
  return ((values * chosen).sum(1) / chosen.sum(1)).mean()


def _entropies(logits: jax.Array) -> jax.Array:
  """Returns the entropy (...) of each prediction, in nats."""
  log_p = jax.nn.log_softmax(logits)
  return -(jnp.exp(log_p) * log_p).sum(-1)


def _check_sizes(source: Outputs, target: Outputs) -> None:
  """Raises a `UserError` if a batch has too few images to compare."""
  sizes = [len(outputs['logits']) for outputs in (source, target)]
  if min(sizes) < 2:
    raise UserError(
      f'comparing domains needs at least 2 images each, not {sizes[0]} and {sizes[1]}'
    )


ALIGNMENTS = {
  'none': None,
  'coral': coral,
  'central_moments': central_moments,
  'mmd': mmd,
  'joint_mmd': joint_mmd,
  'entropy': entropy,
  'mcc': mcc,
  'minent': minent,
  'class_prior': class_prior,
}


# Weights as functions of a stage's progress.


def constant(progress: jax.Array, *, weight: float) -> jax.Array:
  """The same weight throughout.

  Examples:
    >>> float(constant(0.3, weight=2.0))
    2.0
  """
  return jnp.full(jnp.shape(progress), weight, jnp.float32)


def dann(progress: jax.Array, *, weight: float = 1.0, gamma: float = 10.0) -> jax.Array:
  r"""Rises from 0 to almost w, steeply at first.

  .. math::
    w \Big( \frac{2}{1 + e^{-\gamma p}} - 1 \Big)

  Schedules that count steps, such as TLLib's with its 1,000 steps, equal this one for a
  training of 10,000 steps.

  Args:
    progress: p, in [0, 1].
    weight: w.
    gamma: how steeply.

  Examples:
    >>> [round(float(dann(progress)), 3) for progress in (0.0, 0.1, 1.0)]
    [0.0, 0.462, 1.0]

  Ganin et al., JMLR 17(59), 2016, arXiv 1505.07818, section 5.2.2.
  """
  # Written as tanh, which stays precise near zero.
  return weight * jnp.tanh(gamma * progress / 2)


def ramp(
  progress: jax.Array, *, weight: float, begin: float = 0.0, end: float = 1.0
) -> jax.Array:
  """Rises linearly from 0 at progress `begin` to the weight at `end`, and stays there.

  Examples:
    >>> float(ramp(0.25, weight=2.0)), float(ramp(0.25, weight=2.0, end=0.5))
    (0.5, 1.0)
  """
  if not 0 <= begin < end:
    raise UserError(f'linear needs 0 <= begin < end, got {begin} and {end}')
  return weight * jnp.clip((progress - begin) / (end - begin), 0, 1)


WEIGHTS = {'constant': constant, 'dann': dann, 'linear': ramp}
"""name -> (progress, *, weight, ...) -> the weight, in the shape of the progress."""


def make_weight(weight: float | Mapping[str, Any], progress: Schedule) -> Schedule:
  """Returns a weight as a function of the step.

  Args:
    weight: a number, or the name and options of a schedule, such as {'name': 'dann',
      'gamma': 10.0, 'weight': 1.0}.
    progress: step -> () float32 in [0, 1], the share of the stage that is done.

  Raises:
    UserError: an unknown name or option.

  Examples:
    >>> weight = make_weight({'name': 'linear', 'weight': 2.0}, lambda step: step / 100)
    >>> float(weight(25))
    0.5
  """
  if not isinstance(weight, Mapping):
    weight = {'name': 'constant', 'weight': weight}
  if 'name' not in weight:
    raise UserError(
      "alignment.weight must be a number, or a schedule with a 'name' such as "
      "{'name': 'dann', 'gamma': 10.0, 'weight': 1.0}"
    )
  options = {key: value for key, value in weight.items() if key != 'name'}
  # Reports wrong options now, not when the step is traced.
  construct(WEIGHTS, 'weight schedule', weight['name'], np.float32(0), options=options)
  schedule = WEIGHTS[weight['name']]
  return lambda step: schedule(progress(step), **options)


def make_alignment(
  name: str,
  *,
  align_on: Sequence[str],
  weight: float | Mapping[str, Any],
  counts: np.ndarray,
  progress: Schedule,
  **options: Any,
) -> Callable[[Outputs, Outputs, jax.Array], jax.Array] | None:
  """Returns a weighted alignment as a function of the outputs for two domains.

  Args:
    name: a key of `ALIGNMENTS`.
    align_on: names of the layers to compare, for alignments that compare layers.
    weight: a number or a schedule, see `make_weight`.
    counts: (C,) training images per class, for alignments that use them.
    progress: step -> () float32 in [0, 1].
    **options: options of the alignment, such as `estimate`.

  Returns:
    (source, target, step) -> (); None for 'none'.

  Raises:
    UserError: an unknown name or option, or no layers for an alignment that needs them.

  Examples:
    >>> made = make_alignment(
    ...   'entropy', align_on=(), weight=0.5, counts=[90, 10], progress=lambda step: 0.0
    ... )
    >>> round(float(made({}, {'logits': jnp.zeros((2, 2))}, 0)), 3)  # 0.5 log 2
    0.347
  """
  function = lookup(ALIGNMENTS, 'alignment', name)
  what = f'alignment {name!r}'
  given = ('source', 'target', 'layers', 'counts')
  check_options(what, function or (lambda: None), options, *given)
  weight_at = make_weight(weight, progress)
  if function is None:
    return None
  asked = inspect.signature(function).parameters
  if 'layers' in asked:
    if not align_on:
      raise UserError(f'{what} needs alignment.align_on: the layers it compares')
    options['layers'] = tuple(align_on)
  if 'counts' in asked:
    options['counts'] = check_counts(counts, what)

  def alignment(source: Outputs, target: Outputs, step: jax.Array) -> jax.Array:
    return weight_at(step) * function(source, target, **options)

  return alignment
