"""Identification: whose image is this, and do two images show the same identity?

Both are answered by the cosine of features. The functions take arrays and return
numbers; the task that applies them to a split is at the end.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.data.roles import DISTRACTOR, GALLERY, PROBE
from lt_jax.evals import classification
from lt_jax.evals.collect import Collected
from lt_jax.evals.tasks import Across, Metric, Record
from lt_jax.method import Batch, Outputs

RATES = {'tpr_at_fpr_1e-3': 1e-3, 'tpr_at_fpr_1e-6': 1e-6}
"""Name of a true positive rate -> the false positive rate it is measured at."""

TIE = 1e-6
"""Cosines that differ by less count as equal, since float32 cannot separate them."""

BLOCK = 2**23
"""Number of cosines in memory at a time."""

FOLDS = 10


class Images(NamedTuple):
  """Images to compare.

  Attributes:
    embedding: (N, D) floats, rows of length 1.
    identity: (N,) int.
  """

  embedding: np.ndarray
  identity: np.ndarray


class Compared(NamedTuple):
  """Every probe compared with every image of a gallery.

  Attributes:
    mate: (P,) the largest cosine with an image of the probe's own identity; -inf if the
      gallery has none.
    other: (P,) the largest cosine with any other image; -inf likewise.
    genuine: (G,) the cosines of all pairs with the same identity.
    impostors: (K,) the largest cosines of pairs with two identities, descending.
    impostor_pairs: the number of pairs with two identities.
  """

  mate: np.ndarray
  other: np.ndarray
  genuine: np.ndarray
  impostors: np.ndarray
  impostor_pairs: int


def compare(
  probes: Images, gallery: Images, rate: float = 1e-3, block: int = BLOCK
) -> Compared:
  """Compares probes with a gallery, a block of probes at a time.

  Args:
    probes: P images.
    gallery: M images, including distractors.
    rate: the share of pairs with two identities whose cosines are kept, the largest
      ones, and one more. Memory also holds a block and the pairs with one identity.
    block: number of cosines computed at a time; at least those of one probe.
  """
  _, mates = _mates(probes.identity, np.sort(gallery.identity))
  pairs = int(len(gallery.identity) * len(mates) - mates.sum())
  most = _allowed(rate, pairs) + 1
  rows = max(1, block // max(1, len(gallery.identity)))
  mate, other, genuine = [], [], []
  top, floor = np.empty(0, gallery.embedding.dtype), -np.inf
  for start in range(0, len(mates), rows):
    part = slice(start, start + rows)
    cosine = probes.embedding[part] @ gallery.embedding.T
    same = probes.identity[part][:, None] == gallery.identity
    genuine.append(cosine[same])
    mate.append(np.where(same, cosine, -np.inf).max(1, initial=-np.inf))
    cosine[same] = -np.inf
    other.append(cosine.max(1, initial=-np.inf))
    top = np.append(top, cosine[cosine > floor])
    if len(top) > most:
      top = np.partition(top, len(top) - most)[-most:]
      floor = top.min()
  return Compared(
    *(np.concatenate(parts) for parts in (mate, other, genuine)),
    np.sort(top)[::-1],
    pairs,
  )


def _mates(identity: np.ndarray, ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns where each probe's identity begins in sorted ones, and its count there."""
  first = np.searchsorted(ordered, identity)
  return first, np.searchsorted(ordered, identity, side='right') - first


def _allowed(rate: float, pairs: int) -> int:
  """Returns how many pairs a rate amounts to, rounded down."""
  return math.floor(rate * pairs * (1 + 1e-12))  # 1e-3 of 1,000 is one


def rank1(compared: Compared) -> np.ndarray:
  """Returns which probes are identified, (P,) bool.

  A probe is identified if its nearest image has the same identity. It is not if an
  image of another identity is just as near.
  """
  return compared.mate > compared.other + TIE


def true_positive_rate(compared: Compared, rate: float) -> float | None:
  """Returns the share of genuine pairs accepted at a false positive rate.

  Pairs above a threshold are accepted. It is the lowest one that accepts at most that
  share of the pairs with two identities.

  Args:
    compared: from `compare` with this rate or a larger one.
    rate: of false positives.

  Returns:
    The share; None if there are too few pairs for the rate, or no genuine one.
  """
  allowed = _allowed(rate, compared.impostor_pairs)
  if not allowed or not len(compared.genuine):
    return None
  if allowed >= compared.impostor_pairs:
    return 1.0
  return float((compared.genuine > compared.impostors[allowed]).mean())


class Pairs(NamedTuple):
  """Pairs of images with one identity or two.

  Attributes:
    cosine: (N,).
    same: (N,) bool.
    fold: (N,) int; all pairs of one probe identity are in the same fold.
  """

  cosine: np.ndarray
  same: np.ndarray
  fold: np.ndarray


def draw_pairs(
  probes: Images, gallery: Images, folds: int = FOLDS, seed: int = 0
) -> Pairs | None:
  """Draws two pairs for each probe: one with the same identity and one with another.

  Args:
    probes: P images.
    gallery: M images, including distractors; at least one of each probe's identity.
    folds: number of folds, or of identities if there are fewer.
    seed: of the draw; folds and pairs depend only on it and on the identities.

  Returns:
    2 P pairs; None if the probes have fewer than two identities.
  """
  people, place = np.unique(probes.identity, return_inverse=True)
  if len(people) < 2:
    return None
  rng = np.random.default_rng(seed)
  order = np.argsort(gallery.identity, kind='stable')
  first, mates = _mates(probes.identity, gallery.identity[order])
  mate = first + rng.integers(0, mates)
  other = rng.integers(0, len(order) - mates)
  other += np.where(other >= first, mates, 0)  # skips the probe's own identity
  cosines = [
    np.einsum('pd,pd->p', probes.embedding, gallery.embedding[order[chosen]])
    for chosen in (mate, other)
  ]
  fold = rng.permutation(len(people))[place] % min(folds, len(people))
  return Pairs(
    np.concatenate(cosines),
    np.arange(2 * len(mate)) < len(mate),
    np.tile(fold, 2),
  )


def best_threshold(cosine: np.ndarray, same: np.ndarray) -> float:
  """Returns the threshold that classifies most pairs right; the highest of equal ones.

  Pairs at or above the threshold count as one identity. It lies in the middle between
  two cosines, or is infinite if all pairs or none count.

  Args:
    cosine: (N,).
    same: (N,) bool.
  """
  order = np.argsort(-cosine, kind='stable')
  cosine, same = cosine[order].astype(np.float64), same[order]
  bounds = np.concatenate([[np.inf], cosine, [-np.inf]])
  right = np.append(0, np.cumsum(np.where(same, 1, -1)))  # up to a constant
  right = np.where(bounds[:-1] > bounds[1:], right, -len(same) - 1)
  best = int(right.argmax())
  if not 0 < best < len(same):
    return math.inf if best == 0 else -math.inf
  return float(bounds[best : best + 2].mean())


def verification_accuracy(pairs: Pairs) -> float:
  """Returns the mean over folds of the share of pairs classified right.

  Each fold uses the threshold that is best on all the others.

  Source: the protocol of Huang et al., Labeled Faces in the Wild, technical report
  07-49, 2007, except for its pairs.
  """
  found = []
  for fold in np.unique(pairs.fold):
    held = pairs.fold == fold
    threshold = best_threshold(pairs.cosine[~held], pairs.same[~held])
    accepted = pairs.cosine[held] >= threshold
    found.append((accepted == pairs.same[held]).mean())
  return float(np.mean(found))


def identification(
  probes: Images, gallery: Images, groups: Mapping[str, np.ndarray]
) -> dict[str, float | None]:
  """Returns how well probes are identified, and pairs verified.

  Args:
    probes: P images, each with an image of its identity in the gallery.
    gallery: M images, including distractors.
    groups: name -> (P,) bool, groups of probes with a rate of their own.

  Returns:
    'rank1', the share of identified probes, and 'rank1_GROUP', None for a group without
    probes; 'verification_accuracy', over as many pairs with one identity as with two,
    None if there is a single identity; and the true positive rates of `RATES`, over all
    pairs of a probe and an image of the gallery, None if there are too few.

  All probes share one gallery. MegaFace (Kemelmacher-Shlizerman et al., arXiv
  1512.00596) is easier: next to the distractors its gallery has a single image of the
  probe's identity at a time, and no image of the other probes' identities.
  """
  compared = compare(probes, gallery, max(RATES.values()))
  found = rank1(compared)
  pairs = draw_pairs(probes, gallery)
  return {
    'rank1': float(found.mean()),
    **{
      f'rank1_{name}': float(found[mask].mean()) if mask.any() else None
      for name, mask in groups.items()
    },
    'verification_accuracy': verification_accuracy(pairs) if pairs else None,
    **{name: true_positive_rate(compared, rate) for name, rate in RATES.items()},
  }


# The task.


SHOTS = ('many', 'medium', 'few', 'one', 'zero')


def one_shot(counts: np.ndarray) -> dict[str, np.ndarray]:
  """Returns the group 'one', (C,) bool: classes with one training image."""
  return {'one': counts == 1}


def shots(
  identity: np.ndarray, groups: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Returns groups of probes by the number of training images of their identity.

  Args:
    identity: (P,) int; C and above were not trained on.
    groups: 'many', 'medium', 'few' and 'one' -> (C,) bool classes; here 'few' includes
      'one'.

  Returns:
    name of `SHOTS` -> (P,) bool; each probe is in one group: 'few' excludes 'one'.
  """
  names = np.full(len(groups['one']) + 1, 'zero', 'U6')
  for name in SHOTS[:-1]:
    names[:-1][groups[name]] = name
  of_probe = names[np.minimum(identity, len(names) - 1)]
  return {name: of_probe == name for name in SHOTS}


def record(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns the records of classification and, for images with a role, the embedding.

  Args:
    outputs: with 'features' (B, D); for OLTR the direct ones, not the meta-embedding.
    batch: optionally with 'role' and 'identity' (B,).
  """
  return classification.record(outputs, batch) | _embedded(outputs, batch)


def _embedded(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  if 'role' not in batch:
    return {}
  x = outputs['features'].astype(jnp.float32)
  length = jnp.linalg.norm(x, axis=-1, keepdims=True)
  return {
    'role': batch['role'],
    'identity': batch['identity'],
    'embedding': x / jnp.maximum(length, 1e-12),
  }


@functools.cache
def _kept(inner: Record) -> Record:
  return lambda outputs, batch: inner(outputs, batch) | _embedded(outputs, batch)


def keep(examples: int, classes: int) -> Record:
  """Returns the function that keeps a test split, see `classification.keep`."""
  return _kept(classification.keep(examples, classes))


def across(
  records: Mapping[str, Collected],
  *,
  num_classes: int,
  groups: Mapping[str, np.ndarray],
) -> Across:
  """Returns the metrics of classification, and of `identification` by roles.

  Args:
    records: split -> records, for 'test' and, if identities or distractors belong to no
      class, for 'open_test'.
    num_classes: C.
    groups: name -> (C,) bool, including 'one'.
  """
  found = classification.across(records, num_classes=num_classes, groups=groups)
  splits = [records[name] for name in ('test', 'open_test') if name in records]
  role, identity, embedding = (
    np.concatenate([one[name] for one in splits])
    for name in ('role', 'identity', 'embedding')
  )
  probe, shown = role == PROBE, (role == GALLERY) | (role == DISTRACTOR)
  measured = identification(
    Images(embedding[probe], identity[probe]),
    Images(embedding[shown], identity[shown]),
    shots(identity[probe], groups),
  )
  test: dict[str, Any] = found.metrics.get('test', {}) | measured
  return found._replace(metrics={**found.metrics, 'test': test})


METRICS = {
  **classification.METRICS,
  'one': Metric('one-shot'),
  'rank1': Metric('rank-1', better=0),
  **{f'rank1_{name}': Metric(f'rank-1, {name}-shot', better=0) for name in SHOTS},
  'verification_accuracy': Metric('verification', better=0),
  **{name: Metric(f'TPR at FPR {name.rpartition("_")[2]}', better=0) for name in RATES},
}

IDENTIFICATION = classification.CLASSIFICATION._replace(
  record=record,
  keep=keep,
  across=across,
  metrics=METRICS,
  groups=one_shot,
  reads={'role': 'put the lists gallery.txt and probe.txt beside train.txt'},
)
"""Finds probes of trained and other identities in a gallery."""
