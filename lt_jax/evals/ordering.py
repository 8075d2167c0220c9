"""How far each image of a target is from the source: the order of a curriculum.

A score is a function (survey, state, *, split, ...) -> (N,), the smaller the nearer, of
the images of a split in stored order. `nearest_first` of it is what
`lt_jax.data.samplers.curriculum` takes. No label is read.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.evals.collect import Survey
from lt_jax.losses.alignment import joined
from lt_jax.method import Batch, Outputs, Player, State
from lt_jax.models.heads import unit

TARGET = 'target/train'


def distance(
  survey: Survey, state: State, *, split: str = TARGET, source: str = 'train'
) -> np.ndarray:
  r"""The angle to the source's features, as one number.

  .. math::
    1 - \frac{f}{|f|} \cdot \frac{1}{S} \sum_{s} \frac{f_s}{|f_s|}

  The mean of unit vectors is not normalised again, which changes no order.

  Args:
    survey: passes with the network whose features are compared.
    state: of that network.
    split: the images that are scored.
    source: the images they are compared with.

  Liu et al., arXiv 1909.03403, as the authors' code has it; on features of the domain
  there.
  """

  def fold(outputs: Outputs, batch: Batch):
    mask = batch['mask'].astype(jnp.float32)
    return (unit(outputs['features']) * mask[:, None]).sum(0), mask.sum()

  def keep(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    del batch
    return {'unit': unit(outputs['features'])}

  total, count = survey.total(state, source, fold)
  return 1 - survey.collect(state, split, keep)['unit'] @ (total / count)


def entropy_of(outputs: Outputs) -> jax.Array:
  """Returns the entropy of the softmax in nats, (B,)."""
  log_p = jax.nn.log_softmax(outputs['logits'])
  return -(jnp.exp(log_p) * log_p).sum(-1)


def entropy(survey: Survey, state: State, *, split: str = TARGET) -> np.ndarray:
  """The entropy of each prediction, in nats: near is what the network is sure of."""

  def keep(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    del batch
    return {'entropy': entropy_of(outputs)}

  return survey.collect(state, split, keep)['entropy']


def discriminator(
  survey: Survey,
  state: State,
  *,
  players: Mapping[str, Player],
  align_on: Sequence[str],
  split: str = TARGET,
) -> np.ndarray:
  """The logit of a discriminator of being a target image: near is what deceives it.

  Args:
    survey: passes with the network whose layers it reads.
    state: with the parameters of both.
    players: with 'discriminator', a network from (B, D) to logits (B,).
    align_on: names of the layers that it reads.
    split: the images that are scored.
  """

  def keep(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    del batch
    net, params = players['discriminator'].net, state.params['discriminator']
    return {'logit': net.apply({'params': params}, joined(outputs, align_on))}

  return survey.collect(state, split, keep)['logit']


SCORES = {'distance': distance, 'entropy': entropy, 'discriminator': discriminator}


def nearest_first(scores: np.ndarray) -> np.ndarray:
  """Returns positions (N,) int32 by rising score; equal ones in stored order."""
  return np.argsort(scores, kind='stable').astype(np.int32)


def top_of_class(
  survey: Survey, state: State, *, split: str, portion: float = 0.2
) -> np.ndarray:
  """Returns a label for the surest predictions of every class, -1 for the others.

  Class by class, so that those of rare classes, and of classes that were never trained
  on, get their share.

  Args:
    survey: passes with the network.
    state: its State.
    split: whose images; no label is read.
    portion: of the images that are predicted to be of a class, rounded up.

  Returns:
    (N,) int.

  Source: Bucher et al., Handling New Target Classes in Semantic Segmentation with
  Domain Adaptation, arXiv 2004.01130, section 3.3, of pixels; after CBST (Zou et al.,
  arXiv 1810.07911).
  """

  def keep(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    del batch
    logits = outputs['logits']
    return {'predicted': logits.argmax(-1), 'sure': jax.nn.softmax(logits).max(-1)}

  found = survey.collect(state, split, keep)
  labels = np.full(len(found['sure']), -1)
  for label in np.unique(found['predicted']):
    rows = np.flatnonzero(found['predicted'] == label)
    order = rows[np.argsort(-found['sure'][rows], kind='stable')]
    labels[order[: math.ceil(portion * len(rows))]] = label
  return labels
