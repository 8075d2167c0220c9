"""Label shift: source images are weighted by the target's class shares.

A stage wrapped in 'label_shift' weights every source image by q / p of its class. Its
surgery 'estimate_shift' estimates q, the class shares in the target, with the network
of an earlier stage and without any label of the target.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.class_weights import check_counts, weights_of
from lt_jax.errors import UserError, lookup
from lt_jax.evals.collect import Survey
from lt_jax.evals.label_shift import bbse, confusion, em
from lt_jax.method import Batch, Method, Outputs, State
from lt_jax.surgery import Surgery, earlier_stage, put

PLACE = 'memory/label_shift/shares'
"""Place of q in a State."""


def label_shift(method: Method, *, counts: Any) -> Method:
  r"""Weights source images by :math:`q_y / p_y`, whatever the loss or the alignment.

  p are the class shares of the training images, q those in
  `state.memory['label_shift']`, where 'estimate_shift' puts its estimate for the
  target; until then q is p. Under p the weights have mean 1.

  Args:
    method: a method with the objective of `supervised`, with or without an alignment.
    counts: (C,) training images per class of the source.

  Raises:
    UserError: a class without training images; when traced, a method that does not
      weight images.

  Source: Lipton et al., arXiv 1802.03916, section 5: importance-weighted training.
  """
  counts = check_counts(counts, 'label_shift')
  shares = (counts / counts.sum()).astype(np.float32)

  def init(key, batches):
    state = method.init(key, batches)
    memory = {'shares': jnp.asarray(shares)}
    return state.replace(memory={**state.memory, 'label_shift': memory})

  def step(state, batches):
    weights = state.memory['label_shift']['shares'] / shares
    weight = weights_of(weights, batches['train']['label'])
    weighted = {**batches['train'], 'weight': weight}
    state, metrics = method.step(state, {**batches, 'train': weighted})
    if 'mean_weight' not in metrics:
      raise UserError("wrapper 'label_shift': the method does not weight images")
    return state, metrics

  return Method(init, step, method.predict)


def estimate_shift(
  *,
  survey: Survey,
  stage: str,
  estimator: str = 'bbse',
  target: str = 'target/train',
) -> Surgery:
  """Estimates the class shares in a target for the wrapper 'label_shift'.

  Args:
    survey: passes with this stage's network, here with the parameters of the earlier
      stage.
    stage: the earlier stage, trained on the source.
    estimator: 'bbse', which needs validation images of the source, or 'em'.
    target: the images to estimate shares for; they have no labels.

  Raises:
    UserError: an unknown estimator, stage or split, or a stage without the wrapper.
  """
  estimate = lookup(ESTIMATORS, 'estimator of label shift', estimator)

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    origin = earlier_stage(earlier, stage)
    trained = fresh.replace(
      params={**fresh.params, 'net': origin.params['net']},
      stats={**fresh.stats, 'net': origin.stats['net']},
    )
    for split in (target, *estimate.reads):  # raises if there are no such images
      classes = survey.outputs(trained, split)['logits'].shape[-1]
    if 'label_shift' not in fresh.memory:
      raise UserError("estimate_shift: the stage has no wrapper 'label_shift'")

    def measure() -> np.ndarray:
      shares = np.asarray(fresh.memory['label_shift']['shares'], np.float64)
      seen = survey.collect(trained, target, _kept)['probability']
      held_out = (survey.collect(trained, split, _kept) for split in estimate.reads)
      return estimate.shares(seen, shares, *held_out)

    return put(fresh, PLACE, (classes,), measure)

  return surgery


def _kept(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  labels = {'label': batch['label']} if 'label' in batch else {}
  return labels | {'probability': jax.nn.softmax(outputs['logits'])}


def _bbse(
  probabilities: np.ndarray, shares: np.ndarray, val: Mapping[str, np.ndarray]
) -> np.ndarray:
  """Uses the network's confusions on validation images, from hard predictions."""
  del shares
  one_hot = np.eye(probabilities.shape[1])
  hard, predicted = (one_hot[p.argmax(1)] for p in (val['probability'], probabilities))
  return bbse(confusion(hard, val['label']), predicted.mean(0))


class Estimator(NamedTuple):
  """A way to estimate the class shares in a target.

  Attributes:
    shares: (target probabilities (N, C), p (C,), records of each split it reads) -> q
      (C,).
    reads: labelled splits of the source that it needs.
  """

  shares: Callable[..., np.ndarray]
  reads: tuple[str, ...] = ()


ESTIMATORS = {'bbse': Estimator(_bbse, ('val',)), 'em': Estimator(em)}
"""The estimators of `lt_jax.evals.label_shift`."""

WRAPPERS = {'label_shift': label_shift}
SURGERIES = {'estimate_shift': estimate_shift}
