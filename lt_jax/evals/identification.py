"""Identification: whose image is this, by the cosine of features, and are two of one?

Arrays in, numbers out; the task that measures a split so is at the end.
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
"""Names of true positive rates -> the false positive rate that they are at."""

TIE = 1e-6
"""Cosines that differ by less are equal, as float32 does not tell them apart."""

BLOCK = 2**23
"""Cosines that are in memory at a time."""

FOLDS = 10


class Images(NamedTuple):
  """Images that are compared.

  Attributes:
    embedding: (N, D) floats, rows of length 1.
    identity: (N,) int.
  """

  embedding: np.ndarray
  identity: np.ndarray


class Compared(NamedTuple):
  """Every probe compared with every image of a gallery.

  Attributes:
    mate: (P,) the largest cosine with an image of the probe's own identity; -inf where
      the gallery has none.
    other: (P,) the largest with any other image; -inf likewise.
    genuine: (G,) the cosines of all pairs of one identity.
    impostors: (K,) of all pairs of two identities the largest cosines, descending.
    impostor_pairs: how many pairs of two identities there are.
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
    gallery: M images, distractors among them.
    rate: the share of the pairs of two identities whose cosines are kept, the largest,
      and one more; what is in memory besides is a block and the pairs of one identity.
    block: cosines that are computed at a time, at least those of one probe.
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
  """Returns where in sorted identities those of probes begin, and how many they are."""
  first = np.searchsorted(ordered, identity)
  return first, np.searchsorted(ordered, identity, side='right') - first


def _allowed(rate: float, pairs: int) -> int:
  """Returns how many of so many pairs a rate is, rounded down."""
  return math.floor(rate * pairs * (1 + 1e-12))  # 1e-3 of 1,000 is one


def rank1(compared: Compared) -> np.ndarray:
  """Returns which probes are identified, (P,) bool.

  A probe is where the image that is nearest to it is one of its own identity; one that
  is nearest together with another's is not.
  """
  return compared.mate > compared.other + TIE


def true_positive_rate(compared: Compared, rate: float) -> float | None:
  """Returns the share of genuine pairs above a threshold with a false positive rate.

  The threshold is the lowest above which there is at most that share of the pairs of
  two identities, and a pair is accepted above it.

  Args:
    compared: by `compare` with this rate, or a larger one.
    rate: of false positives.

  Returns:
    None where there are too few pairs for the rate, or no genuine one.
  """
  allowed = _allowed(rate, compared.impostor_pairs)
  if not allowed or not len(compared.genuine):
    return None
  if allowed >= compared.impostor_pairs:
    return 1.0
  return float((compared.genuine > compared.impostors[allowed]).mean())


class Pairs(NamedTuple):
  """Pairs of images that are of one identity or of two.

  Attributes:
    cosine: (N,).
    same: (N,) bool.
    fold: (N,) int; the pairs of a probe's identity are in one fold.
  """

  cosine: np.ndarray
  same: np.ndarray
  fold: np.ndarray


def draw_pairs(
  probes: Images, gallery: Images, folds: int = FOLDS, seed: int = 0
) -> Pairs | None:
  """Draws for each probe a pair of one identity and a pair of two.

  Args:
    probes: P images.
    gallery: M images, distractors among them; one at least of each probe's identity.
    folds: of the pairs, as far as there are identities.
    seed: of the draw; folds and pairs depend on it and the identities alone.

  Returns:
    2 P pairs; None with fewer than two identities among the probes.
  """
  people, place = np.unique(probes.identity, return_inverse=True)
  if len(people) < 2:
    return None
  rng = np.random.default_rng(seed)
  order = np.argsort(gallery.identity, kind='stable')
  first, mates = _mates(probes.identity, gallery.identity[order])
  mate = first + rng.integers(0, mates)
  other = rng.integers(0, len(order) - mates)
  other += np.where(other >= first, mates, 0)  # past those of the probe's own identity
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
  """Returns the threshold that tells most pairs right; of equal ones the highest.

  A pair is taken for one of one identity from the threshold on, which is in the middle
  between two cosines, or infinite where all or none are.

  Args:
    cosine: (N,).
    same: (N,) bool.
  """
  order = np.argsort(-cosine, kind='stable')
  cosine, same = cosine[order].astype(np.float64), same[order]
  bounds = np.concatenate([[np.inf], cosine, [-np.inf]])
  right = np.append(0, np.cumsum(np.where(same, 1, -1)))  # but for a constant
  right = np.where(bounds[:-1] > bounds[1:], right, -len(same) - 1)
  best = int(right.argmax())
  if not 0 < best < len(same):
    return math.inf if best == 0 else -math.inf
  return float(bounds[best : best + 2].mean())


def verification_accuracy(pairs: Pairs) -> float:
  """Returns the mean over folds of the share of pairs that are told right.

  Of each fold by the threshold that is best on all the others.

  Source: the protocol of Huang et al., Labeled Faces in the Wild, technical report
  07-49, 2007, but for its pairs.
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
    gallery: M images, distractors among them.
    groups: name -> (P,) bool, probes whose rate is told besides.

  Returns:
    'rank1', the share of probes that are identified, and 'rank1_GROUP', None of a group
    without probes; 'verification_accuracy', of as many pairs of one identity as of two,
    None with a single identity; and the true positive rates of `RATES`, over all pairs
    of a probe and an image of the gallery, None where these are too few.

  The gallery is one for all probes. That of MegaFace (Kemelmacher-Shlizerman et al.,
  arXiv 1512.00596) has, beside distractors, a single image of the probe's identity at a
  time, and no other identity that is looked for, which is easier.
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
  """Returns the probes by how many training images their identities have.

  Args:
    identity: (P,) int; those from the number of classes on were not trained on.
    groups: 'many', 'medium', 'few' and 'one' -> (C,) bool classes; the last is part of
      'few' here.

  Returns:
    name of `SHOTS` -> (P,) bool; each probe is in one: 'few' is without 'one'.
  """
  names = np.full(len(groups['one']) + 1, 'zero', 'U6')
  for name in SHOTS[:-1]:
    names[:-1][groups[name]] = name
  of_probe = names[np.minimum(identity, len(names) - 1)]
  return {name: of_probe == name for name in SHOTS}


def record(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns what classification records and, of images with a role, the embedding.

  Args:
    outputs: with 'features' (B, D); of OLTR the direct ones, not the meta-embedding.
    batch: perhaps with 'role' and 'identity' (B,).
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
  """Returns what is kept of a test split, see `classification.keep`."""
  return _kept(classification.keep(examples, classes))


def across(
  records: Mapping[str, Collected],
  *,
  num_classes: int,
  groups: Mapping[str, np.ndarray],
) -> Across:
  """Returns what classification does, and `identification` of all that have a role.

  Args:
    records: split -> what `record` keeps, of 'test' and, where identities or
      distractors are of no class, of 'open_test'.
    num_classes: C.
    groups: name -> (C,) bool, 'one' among them.
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
"""Probes of trained and of other identities, looked for in a gallery."""
