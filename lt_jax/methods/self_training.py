"""Self-training: what a network predicts for target images becomes their labels."""

import math
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.errors import UserError
from lt_jax.evals.collect import Survey
from lt_jax.method import (
  Batch,
  Method,
  Metrics,
  Network,
  Outputs,
  PyTree,
  State,
  check_streams,
  mean_metric,
  predictor,
  tick,
  update,
)
from lt_jax.methods.pairs import Term, adapt, begin, forward_pair
from lt_jax.methods.supervised import Loss, Objective
from lt_jax.optim import Optimizer
from lt_jax.surgery import Surgery, put

OUT_OF_REACH = 2.0
"""A threshold that no probability reaches, so nothing is labelled."""


def pseudo_label(
  net: Network,
  optimizer: Optimizer,
  *,
  objective: Objective,
  loss: Loss,
  alignment_weight: Callable[[jax.Array], jax.Array],
  streams: Collection[str],
  statistics: str = 'joint',
) -> Method:
  r"""Supervised learning on the source, and on the confident part of the target.

  .. math::
    L_y + \frac{\lambda(p)}{T} \sum_{i \in T} [\, p_i(\hat y_i) \ge t_{\hat y_i} ]\,
    \ell(x_i, \hat y_i), \qquad \hat y_i = \arg\max_c p_i(c)

  with a threshold t per class, which the surgery 'class_thresholds' measures with the
  network of an earlier stage. A single threshold would only label classes that the
  network knows well: on a long tail, the head. Labels come from the current network, so
  as it gets more confident, more images pass.

  Args:
    net: network that returns a dict with 'logits' and 'features'.
    optimizer: optimiser of the players `{'net': params}`.
    objective: (outputs, batch, step) -> (value, metrics), for the source.
    loss: (outputs, batch) -> (T,), the loss on the target; the label -1 is ignored.
    alignment_weight: step -> lambda, see `lt_jax.losses.alignment.make_weight`.
    streams: names of the streams; it reads 'target'.
    statistics: how the domains share batch normalisation, a key of
      `lt_jax.methods.pairs.STATISTICS`.

  Raises:
    UserError: unknown statistics, or no target.

  Zou et al., "Unsupervised Domain Adaptation for Semantic Segmentation via
  Class-Balanced Self-Training" (CBST), ECCV 2018, arXiv 1810.07911. There labels are
  assigned once per round, and classes compete by probability over threshold.
  """
  check_streams(streams, 'target')

  def value(params: PyTree, source: Outputs, target: Outputs, step: jax.Array):
    del source
    labels = confident(target['logits'], params['thresholds'])
    mean = loss(target, {'label': labels}).mean()
    labelled = (labels >= 0).sum(dtype=jnp.float32)
    metrics = {
      'pseudo_loss': mean_metric(mean),
      'labelled': (labelled, jnp.float32(labels.size)),
    }
    return alignment_weight(step) * mean, metrics

  def draws(key: jax.Array, outputs: Outputs) -> dict[str, jax.Array]:
    del key
    return {'thresholds': jnp.full(outputs['logits'].shape[-1], OUT_OF_REACH)}

  term = Term(value, draws=draws)
  return adapt(net, optimizer, objective, term, statistics=statistics)


def saved_label(
  net: Network,
  optimizer: Optimizer,
  *,
  objective: Objective,
  loss: Loss,
  alignment_weight: Callable[[jax.Array], jax.Array],
  streams: Collection[str],
  unseen: np.ndarray | None = None,
  statistics: str = 'joint',
  only_unseen: bool = False,
) -> Method:
  r"""Supervised learning on the source, and on target images labelled by another stage.

  .. math:: L_y + \frac{\lambda(p)}{T} \sum_{i \in T} \ell(x_i, \hat y_i)

  The stream 'target' has 'pseudo_label' (T,), or (T, H, W) for pixels, which an earlier
  stage saved for its images; -1 is ignored. The labels are fixed.

  Args:
    net: network that returns a dict with 'logits' and 'features'.
    optimizer: optimiser of the players `{'net': params}`.
    objective: (outputs, batch, step) -> (value, metrics), for the source.
    loss: (outputs, batch) -> (T,).
    alignment_weight: step -> lambda.
    streams: names of the streams; it reads 'target'.
    unseen: (C,) bool, classes without true labels; None if there are none.
    statistics: how the domains share batch normalisation, see `pseudo_label`.
    only_unseen: drop pseudo-labels of other classes. For a stream of source images,
      which have true labels for those.

  Raises:
    UserError: unknown statistics, no target, or `only_unseen` without unseen classes.
  """
  check_streams(streams, 'target')
  if only_unseen and unseen is None:
    raise UserError('saved_label: only_unseen is set, but no class is unseen')

  def of_target(outputs: Outputs, target: Batch) -> tuple[jax.Array, Metrics]:
    labels = _checked(_saved(target, 'pseudo_label'), outputs['logits'])
    if only_unseen:
      labels = jnp.where(jnp.asarray(unseen)[labels], labels, -1)
    mean = loss(outputs, {'label': labels}).mean()
    labelled = (labels >= 0).sum(dtype=jnp.float32)
    return mean, {
      'pseudo_loss': mean_metric(mean),
      'labelled': (labelled, jnp.float32(labels.size)),
    }

  return _with_saved(
    net, optimizer, objective, of_target, alignment_weight, statistics=statistics
  )


def label_prior(
  net: Network,
  optimizer: Optimizer,
  *,
  objective: Objective,
  alignment_weight: Callable[[jax.Array], jax.Array],
  streams: Collection[str],
  statistics: str = 'separate',
) -> Method:
  r"""Supervised learning on the source, and on estimated class shares of target images.

  .. math::
    L_y - \frac{\lambda(p)}{T} \sum_{i \in T} \sum_c q_{ic}
    \log \Big( \frac1N \sum_n p_{inc} \Big)

  over the N pixels of an image. The stream 'target' has q as 'label_shares' (T, C),
  which an earlier stage saved for whole images, so leave out data.window. How much of
  an image a class covers is easier to predict than where.

  Args:
    net: network that returns a dict with 'logits' (B, ..., C).
    optimizer: optimiser of the players `{'net': params}`.
    objective: (outputs, batch, step) -> (value, metrics), for the source.
    alignment_weight: step -> lambda.
    streams: names of the streams; it reads 'target'.
    statistics: how the domains share batch normalisation, see `pseudo_label`.

  Raises:
    UserError: unknown statistics, or no target.

  Zhang, David and Gong, "Curriculum Domain Adaptation for Semantic Segmentation of
  Urban Scenes", ICCV 2017, arXiv 1707.09465, equation 1 for whole images, without their
  superpixels.
  """
  check_streams(streams, 'target')

  def of_target(outputs: Outputs, target: Batch) -> tuple[jax.Array, Metrics]:
    log_p = jax.nn.log_softmax(outputs['logits'])
    log_p = log_p.reshape(len(log_p), -1, log_p.shape[-1])
    # The logarithm of the mean, finite for any logits.
    log_mean = jax.nn.logsumexp(log_p, axis=1) - math.log(log_p.shape[1])
    shares = _saved(target, 'label_shares')
    value = -(shares * log_mean).sum(-1).mean()
    return value, {'label_prior': mean_metric(value)}

  return _with_saved(
    net, optimizer, objective, of_target, alignment_weight, statistics=statistics
  )


def _with_saved(
  net: Network,
  optimizer: Optimizer,
  objective: Objective,
  of_target: Callable[[Outputs, Batch], tuple[jax.Array, Metrics]],
  alignment_weight: Callable[[jax.Array], jax.Array],
  *,
  statistics: str,
) -> Method:
  """Returns a method that learns from what a stage has saved for the target's images.

  Args:
    net: see `saved_label`.
    optimizer: likewise.
    objective: likewise.
    of_target: (outputs, batch), both of the target -> (value (), metrics).
    alignment_weight: step -> what the value is multiplied by.
    statistics: a key of `lt_jax.methods.pairs.STATISTICS`.
  """

  def value(params: PyTree, state: State, batches: Mapping[str, Batch]):
    batch, target = batches['train'], batches['target']
    source_outputs, target_outputs, stats = forward_pair(
      net,
      optimizer.held(params)['net'],
      state.stats,
      batch['image'],
      target['image'],
      statistics=statistics,
    )
    own, metrics = objective(source_outputs, batch, state.step)
    added, others = of_target(target_outputs, target)
    metrics |= {'loss': mean_metric(own), **others}
    return own + alignment_weight(state.step) * added, (stats, metrics)

  def step(state: State, batches: Mapping[str, Batch]) -> tuple[State, Metrics]:
    grads, (stats, metrics) = jax.grad(value, has_aux=True)(
      state.params, state, batches
    )
    state, norms = update(state, grads, optimizer)
    return tick(state.replace(stats=stats)), metrics | norms

  init = begin(net, optimizer, lambda outputs: {}, statistics=statistics, players={})
  return Method(init, step, predictor(net))


def _saved(target: Batch, name: str) -> jax.Array:
  """Returns what the stream 'target' reads from an earlier stage."""
  if name not in target:
    raise UserError(
      f"the method needs {name!r} in the stream 'target': set its stage and arrays"
    )
  return target[name]


def _checked(labels: jax.Array, logits: jax.Array) -> jax.Array:
  """Returns labels (...) as int32; there must be as many as predictions."""
  if labels.shape != logits.shape[:-1]:
    raise UserError(
      f'saved_label: the labels of a batch are {labels.shape}, but its predictions are '
      f'{logits.shape[:-1]}: pixel labels cover whole images, so leave out '
      'data.window'
    )
  return labels.astype(jnp.int32)


def confident(logits: jax.Array, thresholds: jax.Array) -> jax.Array:
  """Returns the predicted class where it is probable enough, and -1 elsewhere.

  Args:
    logits: (..., C).
    thresholds: (C,), the probability required for a prediction of each class.

  Returns:
    (...) int32.
  """
  predicted, confidence = _predicted(logits)
  return jnp.where(confidence >= thresholds[predicted], predicted, -1)


def _predicted(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns predictions (B,) int32 and their probabilities (B,)."""
  return logits.argmax(-1).astype(jnp.int32), jax.nn.softmax(logits).max(-1)


def class_thresholds(
  *, survey: Survey, split: str = 'target/train', portion: float = 0.2
) -> Surgery:
  """Measures, for every class, the threshold of its most confident predictions.

  That portion of the images predicted as a class will be labelled, rounded up and with
  ties. A class that is never predicted gets the highest threshold of the others, so
  that it is not given up for good.

  Args:
    survey: passes with the stage's own network.
    split: the split of the images; no label is read.
    portion: in (0, 1].

  Raises:
    UserError: the portion is out of range, or the method has no thresholds.
  """
  if not 0 < portion <= 1:
    raise UserError(
      f'class_thresholds: portion must be more than 0 and at most 1, got {portion}'
    )

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    del earlier
    classes = survey.outputs(fresh, split)['logits'].shape[-1]

    def measure() -> np.ndarray:
      found = survey.collect(fresh, split, _keep)
      return portion_thresholds(
        found['predicted'], found['confidence'], classes, portion
      )

    return put(fresh, 'memory/thresholds', (classes,), measure)

  return surgery


def _keep(outputs: Outputs, batch: Mapping) -> dict[str, jax.Array]:
  del batch
  return dict(
    zip(('predicted', 'confidence'), _predicted(outputs['logits']), strict=True)
  )


def portion_thresholds(
  predicted: np.ndarray, confidence: np.ndarray, classes: int, portion: float
) -> np.ndarray:
  """Returns the threshold of every class, see `class_thresholds`.

  Args:
    predicted: (N,) int.
    confidence: (N,).
    classes: C.
    portion: in (0, 1].

  Returns:
    (C,) of the type of the confidence.
  """
  thresholds = np.full(classes, -1, confidence.dtype)
  for label in np.unique(predicted):
    of_class = np.sort(confidence[predicted == label])[::-1]
    thresholds[label] = of_class[math.ceil(portion * len(of_class)) - 1]
  return np.where(thresholds < 0, thresholds.max(), thresholds)


SURGERIES = {'class_thresholds': class_thresholds}
