"""Criteria for selecting a State without labels of the target domain.

They are functions of the network's outputs on the target's training images and on
labelled images of the source. They never use test images or a target's labels.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.evals.collect import Collected
from lt_jax.method import Batch, Outputs

MOST = 2000
"""The largest number of images per split that criteria use."""


class Seen(NamedTuple):
  """What criteria are computed from.

  Attributes:
    target: records of `keep`, or of `keep_of_pixels`, for the target's training images.
    train: the same for the source's training images.
    val: the same for the source's validation images, with 'label' (N,); None if there
      are none.
  """

  target: Collected
  train: Collected
  val: Collected | None


def keep(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns 'log_p' (B, C), 'features' (B, D), and 'label' if there are labels."""
  kept = {
    'log_p': jax.nn.log_softmax(outputs['logits'].astype(jnp.float32)),
    'features': outputs['features'].astype(jnp.float32),
  }
  return kept | {key: batch[key] for key in ('label',) if key in batch}


def keep_of_pixels(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns means over the pixels of an image, for logits (B, H, W, C).

  Returns:
    'entropy' (B,), 'probability' (B, C) and 'features' (B, D).
  """
  del batch
  log_p = jax.nn.log_softmax(outputs['logits'].astype(jnp.float32))
  p = jnp.exp(log_p)
  return {
    'entropy': -(p * log_p).sum(-1).mean((1, 2)),
    'probability': p.mean((1, 2)),
    'features': outputs['features'].astype(jnp.float32),
  }


def entropy(seen: Seen) -> float:
  """Returns the mean entropy of the target's predictions, in nats; less is better.

  It favours a network that confidently predicts the same class for every image.

  Examples:
    >>> even = {'log_p': np.log([[0.5, 0.5]])}
    >>> round(entropy(Seen(target=even, train={}, val=None)), 3)  # log 2
    0.693
  """
  return float(_predictions(seen)[0].mean())


def information(seen: Seen) -> float:
  r"""Returns the mutual information of image and prediction; more is better.

  .. math:: H\big(\tfrac1N \sum_i p_i\big) - \tfrac1N \sum_i H(p_i)

  in nats. It favours balanced predictions, so it misleads if the target has a tail.

  Examples:
    >>> target = {'log_p': np.log([[0.9, 0.1], [0.1, 0.9]])}
    >>> round(information(Seen(target, train={}, val=None)), 3)  # log 2 - 0.325
    0.368

  Source: Krause, Perona, Gomes, Discriminative Clustering by Regularized Information
  Maximization, NIPS 2010.
  """
  entropies, p = _predictions(seen)
  mean = p.mean(axis=0)
  return float(_entropy(np.log(np.maximum(mean, 1e-30))) - entropies.mean())


def soft_neighbours(seen: Seen, temperature: float = 0.05) -> float | None:
  r"""Returns soft neighbourhood density: how many similar images; more is better.

  .. math::
    \frac1N \sum_i H(P_{i\cdot}), \qquad
    P_{ij} \propto \exp(f_i^\top f_j / \tau), \; j \ne i

  with the softmax outputs f, scaled to unit length. None if every pixel has an output.

  Args:
    seen: the network's outputs.
    temperature: tau, 0.05 as in the paper.

  Examples:
    >>> alike = {'log_p': np.log(np.full((3, 2), 0.5))}  # two neighbours each
    >>> round(soft_neighbours(Seen(alike, train={}, val=None)), 3)  # log 2
    0.693

  Source: Saito et al., Tune It the Right Way, ICCV 2021, arXiv 2108.10860.
  """
  if 'log_p' not in seen.target:
    return None
  p = np.exp(_log_p(seen))
  f = p / np.linalg.norm(p, axis=1, keepdims=True)
  logits = f @ f.T / temperature
  np.fill_diagonal(logits, -np.inf)
  logits -= logits.max(axis=1, keepdims=True)
  weights = np.exp(logits)
  total = weights.sum(axis=1)
  finite = np.where(np.isfinite(logits), logits, 0.0)
  return float((np.log(total) - (weights * finite).sum(axis=1) / total).mean())


def deep_embedded(seen: Seen) -> float | None:
  r"""Returns an estimate of the loss on the target; less is better.

  With the cross-entropy l of a validation image of the source and its weight w, the
  ratio of the domains' densities at its features:

  .. math::
    \overline{wl} + \eta\,(\overline{w} - 1), \qquad
    \eta = -\operatorname{cov}(wl, w) / \operatorname{var}(w)

  w comes from a logistic regression between the domains' training images. None without
  validation images, and if every pixel has a label.

  Examples:
    >>> alike = {'features': np.zeros((2, 1)), 'log_p': np.log(np.full((2, 2), 0.5))}
    >>> seen = Seen(target=alike, train=alike, val=alike | {'label': np.array([0, 1])})
    >>> round(deep_embedded(seen), 3)  # all weights are 1: the loss on the source
    0.693

  Source: deep embedded validation, You et al., Towards Accurate Model Selection in
  Deep Unsupervised Domain Adaptation, ICML 2019, algorithm 1.
  """
  if seen.val is None or 'log_p' not in seen.val:
    return None
  from sklearn.linear_model import LogisticRegression
  from threadpoolctl import threadpool_limits

  source, target = seen.train['features'], seen.target['features']
  both = np.concatenate([source, target]).astype(np.float64)
  center, scale = both.mean(axis=0), both.std(axis=0) + 1e-12
  is_target = np.arange(len(both)) >= len(source)
  with threadpool_limits(1):  # more threads are slower: they wait for each other
    judge = LogisticRegression(max_iter=200).fit((both - center) / scale, is_target)
  log_odds = judge.decision_function((seen.val['features'] - center) / scale)
  weight = len(source) / len(target) * np.exp(np.clip(log_odds, -30, 30))
  label = seen.val['label'][:, None]
  loss = -np.take_along_axis(seen.val['log_p'].astype(np.float64), label, 1)[:, 0]
  weighted = weight * loss
  variance = weight.var(ddof=1)
  eta = -np.cov(weighted, weight)[0, 1] / variance if variance > 0 else 0.0
  return float(weighted.mean() + eta * (weight.mean() - 1))


def centroid_distance(seen: Seen) -> float:
  """Returns the distance of the domains' mean features; less is better.

  On its own it favours features that are all alike; `centroid_rule` weighs it against
  the error on the source.

  Examples:
    >>> train, target = {'features': np.zeros((2, 2))}, {'features': np.array([[3, 4]])}
    >>> centroid_distance(Seen(target, train, val=None))
    5.0
  """
  means = (one['features'].mean(0, np.float64) for one in (seen.train, seen.target))
  return float(np.linalg.norm(next(means) - next(means)))


def centroid_rule(source_error: np.ndarray, distance: np.ndarray) -> int:
  r"""Returns the index of the State of a run that the centroid rule chooses.

  .. math:: \arg\min_t\; e_t + D_t\, \min_s e_s / \min_s D_s

  Args:
    source_error: e, (T,), on validation images of the source.
    distance: D, (T,), see `centroid_distance`.

  Examples:
    >>> centroid_rule(source_error=np.array([0.1, 0.2]), distance=np.array([0.9, 0.1]))
    1

  Source: Sun et al., Unsupervised Domain Adaptation through Self-Supervision, arXiv
  1909.11825; the code's features are of test images, ours of training images.
  """
  scale = source_error.min() / max(distance.min(), 1e-30)
  return int(np.argmin(source_error + distance * scale))


class Criterion(NamedTuple):
  """How a criterion is used.

  Attributes:
    score: the network's outputs -> value, None if it cannot be computed.
    better: 1 if more is better, -1 if less is.
  """

  score: Callable[[Seen], float | None]
  better: int


CRITERIA: Mapping[str, Criterion] = {
  'entropy': Criterion(entropy, -1),
  'information': Criterion(information, 1),
  'soft_neighbours': Criterion(soft_neighbours, 1),
  'deep_embedded': Criterion(deep_embedded, -1),
  'centroid_distance': Criterion(centroid_distance, -1),
}


NEED_VAL = ('deep_embedded',)
"""Criteria that need validation images of the source."""


OF_IMAGES = ('soft_neighbours', 'deep_embedded')
"""Criteria that need one prediction per image."""


def scores(seen: Seen) -> dict[str, float]:
  """Returns every criterion that can be computed, by name.

  Examples:
    >>> alike = {'features': np.zeros((3, 1)), 'log_p': np.log(np.full((3, 2), 0.5))}
    >>> sorted(scores(Seen(target=alike, train=alike, val=None)))
    ['centroid_distance', 'entropy', 'information', 'soft_neighbours']
  """
  found = {name: one.score(seen) for name, one in CRITERIA.items()}
  return {name: value for name, value in found.items() if value is not None}


def _predictions(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
  """Returns entropies (N,) and probabilities (N, C) in the target.

  They are means over pixels if every pixel has a prediction.
  """
  if 'log_p' not in seen.target:
    return tuple(seen.target[name].astype(np.float64) for name in PIXEL_MEANS)
  log_p = _log_p(seen)
  return _entropy(log_p), np.exp(log_p)


PIXEL_MEANS = ('entropy', 'probability')


def _log_p(seen: Seen) -> np.ndarray:
  return seen.target['log_p'].astype(np.float64)


def _entropy(log_p: np.ndarray) -> np.ndarray:
  """Returns (...) entropies in nats of (..., C)."""
  return -(np.exp(log_p) * log_p).sum(axis=-1)
