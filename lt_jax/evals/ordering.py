"""How far each target image is from the source: the order of a curriculum.

A score is one number per image of a split in stored order; smaller means nearer. A
stage saves it (`lt_jax.evals.saved`), and `lt_jax.data.samplers.curriculum` uses its
`nearest_first`. The score is the distance or the entropy below, or an output of the
network, such as the 'target_logit' of a method with a domain discriminator. Labels are
not used.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.evals.collect import Survey
from lt_jax.method import Batch, Outputs, State
from lt_jax.models.heads import unit

TARGET = 'target/train'


def distance(
  survey: Survey, state: State, *, split: str = TARGET, source: str = 'train'
) -> np.ndarray:
  r"""Returns the cosine distance of each image from the source's features.

  .. math::
    1 - \frac{f}{|f|} \cdot \frac{1}{S} \sum_{s} \frac{f_s}{|f_s|}

  The mean of unit vectors is not normalised again, which does not affect the order.

  Args:
    survey: passes with the network whose features are compared.
    state: that of the network.
    split: the images to score.
    source: the images to compare with.

  Source: Liu et al., arXiv 1909.03403, following the authors' code, which compares
  domain features.
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
  """Returns the entropy of the softmax in nats, (B,): confident images are near.

  Examples:
    >>> round(entropy_of({'logits': jnp.zeros((1, 2))}).item(), 3)  # log 2
    0.693
  """
  log_p = jax.nn.log_softmax(outputs['logits'])
  return -(jnp.exp(log_p) * log_p).sum(-1)


def nearest_first(scores: np.ndarray) -> np.ndarray:
  """Returns positions (N,) int32 by ascending score; equal ones in stored order.

  Examples:
    >>> nearest_first(np.array([0.3, 0.1, 0.2])).tolist()
    [1, 2, 0]
  """
  return np.argsort(scores, kind='stable').astype(np.int32)


def top_of_class(
  survey: Survey, state: State, *, split: str, portion: float = 0.2
) -> np.ndarray:
  """Returns labels for the most confident predictions per class, -1 for the others.

  They are selected class by class, so rare classes, and classes never trained on, get
  their share.

  Args:
    survey: passes with the network.
    state: its State.
    split: the images; their labels are not used.
    portion: share of the images, or pixels, predicted as a class; rounded up.

  Returns:
    (N,) int, or (N, H, W).

  Source: Bucher et al., Handling New Target Classes in Semantic Segmentation with
  Domain Adaptation, arXiv 2004.01130, section 3.3, for pixels; based on CBST (Zou et
  al., arXiv 1810.07911).
  """

  def keep(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    del batch
    logits = outputs['logits']
    return {'predicted': logits.argmax(-1), 'sure': jax.nn.softmax(logits).max(-1)}

  found = survey.collect(state, split, keep)
  predicted, sure = (found[name].reshape(-1) for name in ('predicted', 'sure'))
  labels = np.full(len(sure), -1)
  for label in np.unique(predicted):
    rows = np.flatnonzero(predicted == label)
    order = rows[np.argsort(-sure[rows], kind='stable')]
    labels[order[: math.ceil(portion * len(rows))]] = label
  return labels.reshape(found['sure'].shape)
