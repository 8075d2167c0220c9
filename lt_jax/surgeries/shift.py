"""Label shift: source images are weighted by the target's class shares.

A stage that is wrapped in 'label_shift' weighs every source image by q / p of its
class. Its surgery 'estimate_shift' finds q, the shares of classes in the target, with
the network of an earlier stage and without a label of the target.
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
"""Where a State has q."""


def label_shift(method: Method, *, counts: Any) -> Method:
  r"""Weighs source images by :math:`q_y / p_y`, whatever the loss or the alignment.

  p are the shares of classes among the training images, q those in
  `state.memory['label_shift']`, where 'estimate_shift' puts an estimate for the target;
  before that q is p. Under p the weights have mean 1.

  Args:
    method: one whose objective is that of `supervised`, with or without an alignment.
    counts: (C,) training images of each class of the source.

  Raises:
    UserError: a class without training images; a method that does not weigh images,
      when it is traced.

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
      raise UserError("wrapper 'label_shift': the method does not weigh images")
    return state, metrics

  return Method(init, step, method.predict)


def estimate_shift(
  *,
  survey: Survey,
  stage: str,
  estimator: str = 'bbse',
  target: str = 'target/train',
) -> Surgery:
  """Estimates the shares of classes in a target for the wrapper 'label_shift'.

  Args:
    survey: passes with this stage's network, which here has the parameters of an
      earlier stage.
    stage: the earlier stage, which was trained on the source.
    estimator: 'bbse', which needs validation images of the source, or 'em'.
    target: the images whose shares are estimated; their labels are not there.

  Raises:
    UserError: no such estimator, stage or images, or a stage without the wrapper.
  """
  estimate = lookup(ESTIMATORS, 'estimator of label shift', estimator)

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    origin = earlier_stage(earlier, stage)
    trained = fresh.replace(
      params={**fresh.params, 'net': origin.params['net']},
      stats={**fresh.stats, 'net': origin.stats['net']},
    )
    for split in (target, *estimate.reads):  # there are such images
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
  """By what the network confuses on validation images, from hard predictions."""
  del shares
  one_hot = np.eye(probabilities.shape[1])
  hard, predicted = (one_hot[p.argmax(1)] for p in (val['probability'], probabilities))
  return bbse(confusion(hard, val['label']), predicted.mean(0))


class Estimator(NamedTuple):
  """How the shares of classes in a target are found.

  Attributes:
    shares: (probabilities of the target (N, C), p (C,), records of each split that it
      reads) -> q (C,).
    reads: labelled splits of the source that it needs.
  """

  shares: Callable[..., np.ndarray]
  reads: tuple[str, ...] = ()


ESTIMATORS = {'bbse': Estimator(_bbse, ('val',)), 'em': Estimator(em)}
"""Of `lt_jax.evals.label_shift`."""

WRAPPERS = {'label_shift': label_shift}
SURGERIES = {'estimate_shift': estimate_shift}
