"""Supervised learning: each single-stage long-tailed method is a set of arguments.

The losses are cross-entropy, class-balanced losses, LDAM, balanced softmax, logit
adjustment and more; class weights may depend on the step (DRW); and any sampler can
draw the batches (DRS is one).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lt_jax.errors import UserError
from lt_jax.method import (
  Batch,
  Method,
  Metrics,
  Network,
  Outputs,
  PyTree,
  State,
  first_state,
  forward,
  init_net,
  named_key,
  predictor,
  tick,
  update,
)
from lt_jax.optim import Optimizer

Loss = Callable[[Outputs, Batch], jax.Array]
Objective = Callable[[Outputs, Batch, jax.Array], tuple[jax.Array, Metrics]]


def supervised(
  net: Network,
  optimizer: Optimizer,
  loss: Loss,
  *,
  class_weights: Callable[[jax.Array], jax.Array],
  reduction: Callable[[jax.Array], jax.Array],
  penalty: Loss | None = None,
  accumulate: int = 1,
) -> Method:
  r"""Gradient descent on a weighted sum of per-example losses and a batch penalty.

  .. math::
    J = \sum_i a_i\, \ell_i + P, \qquad a = \text{reduction}(w, y)

  over the labels of the batch: one per image (B,) or one per pixel (B, H, W). Labels of
  -1 are ignored.

  Args:
    net: network that returns a dict with 'logits' (..., C) and 'features' (B, D).
    optimizer: optimiser of the players `{'net': params}`.
    loss: (outputs, batch) -> (...), one loss per label, never a mean.
    class_weights: step -> (C,).
    reduction: (class weights (C,), labels (...)) -> coefficients (...), see
      `lt_jax.losses.REDUCTIONS`. It sees the global batch, even when gradients
      are accumulated.
    penalty: (outputs, batch) -> (), a term that exists only over a whole batch; not
      weighted by class.
    accumulate: number of micro-batches per update. They run in sequence, and each has
      its own batch statistics.

  Raises:
    UserError: a penalty, which needs the whole batch, with `accumulate > 1`.
  """
  if penalty is not None and accumulate > 1:
    raise UserError('a batch penalty needs the whole batch: set accumulate to 1')

  def init(key: jax.Array, batches) -> State:
    images = batches['train']['image']
    net_params, stats = init_net(net, named_key(key, 'init', 0), images)
    params = {'net': net_params}
    return first_state(key, params, {'net': stats}, optimizer.init(params))

  def objective(params: PyTree, stats: PyTree, batch: Batch, coefficients: jax.Array):
    params = optimizer.held(params)
    outputs, net_stats = forward(
      net, params['net'], stats['net'], batch['image'], train=True
    )
    value, metrics = weighted_loss(outputs, batch, coefficients, loss, penalty)
    metrics = {'loss': (value, jnp.float32(1 / accumulate)), **metrics}
    return value, ({'net': net_stats}, metrics)

  gradient = accumulated(jax.grad(objective, has_aux=True), accumulate)

  def step(state: State, batches) -> tuple[State, Metrics]:
    batch = batches['train']
    coefficients = reduction(class_weights(state.step), batch['label'])
    grads, (stats, metrics) = gradient(state.params, state.stats, batch, coefficients)
    state, norms = update(state, grads, optimizer)
    return tick(state.replace(stats=stats)), metrics | norms

  return Method(init, step, predictor(net))


def weighted_loss(
  outputs: Outputs,
  batch: Batch,
  coefficients: jax.Array,
  loss: Loss,
  penalty: Loss | None,
) -> tuple[jax.Array, Metrics]:
  """Returns sum_i a_i loss_i + P, and the metrics of `batch_metrics`.

  Args:
    outputs: outputs of the network.
    batch: batch with 'label' (...), and optionally 'weight' (...), a factor of a_i.
    coefficients: a, (...).
    loss: (outputs, batch) -> (...).
    penalty: (outputs, batch) -> (), or None.
  """
  losses = loss(outputs, batch)
  metrics = batch_metrics(outputs, batch, losses)
  if 'weight' in batch:
    weight = batch['weight']
    coefficients = coefficients * weight
    metrics['mean_weight'] = weight.sum(), jnp.float32(weight.size)
  value = jnp.vdot(coefficients, losses)
  if penalty is not None:
    value += penalty(outputs, batch)
  return value, metrics


def make_objective(
  loss: Loss,
  *,
  class_weights: Callable[[jax.Array], jax.Array],
  reduction: Callable[[jax.Array], jax.Array],
  penalty: Loss | None,
) -> Objective:
  """Returns what `supervised` minimises, as one part of a larger objective.

  The arguments are those of `supervised`.

  Returns:
    (outputs, batch, step) -> (value (), metrics).
  """

  def objective(outputs: Outputs, batch: Batch, step: jax.Array):
    coefficients = reduction(class_weights(step), batch['label'])
    return weighted_loss(outputs, batch, coefficients, loss, penalty)

  return objective


def batch_metrics(outputs: Outputs, batch: Batch, losses: jax.Array) -> Metrics:
  """Returns the training accuracy and the mean loss of each class.

  Args:
    outputs: outputs with 'logits' (..., C).
    batch: batch with 'label' (...); -1 counts in neither.
    losses: (...), unweighted.
  """
  logits, labels = outputs['logits'], batch['label']
  correct = jnp.argmax(logits, axis=-1) == labels
  return {
    'accuracy': (
      correct.sum(dtype=jnp.float32),
      (labels >= 0).sum(dtype=jnp.float32),
    ),
    'class_loss': by_class(losses, labels, logits.shape[-1]),
  }


def by_class(
  values: jax.Array, labels: jax.Array, num_classes: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the mean per class as a metric: sums (C,) and counts (C,).

  Args:
    values: (...).
    labels: (...) int; values with the label -1 are left out.
    num_classes: C.
  """
  of_class = jnp.zeros(num_classes, jnp.float32).at[labels]
  add = functools.partial(of_class.add, mode='drop', wrap_negative_indices=False)
  return add(values.astype(jnp.float32)), add(1.0)


def accumulated(gradient: Callable, parts: int) -> Callable:
  """Returns a gradient function that sums over micro-batches of examples.

  Args:
    gradient: (params, stats, batch, coefficients) -> (grads, (stats, metrics)).
    parts: number of micro-batches. Micro-batch j takes every `parts`-th example
      starting at j, so that each device splits its own rows.
  """
  if parts == 1:
    return gradient

  def summed(params, stats, batch, coefficients):
    micro = jax.tree.map(
      lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1),
      (dict(batch), coefficients),
    )

    def add(carry, part):
      stats, total = carry
      grads, (stats, metrics) = gradient(params, stats, *part)
      return (stats, jax.tree.map(jnp.add, total, (grads, metrics))), None

    grads, (stats, metrics) = gradient(
      params, stats, *jax.tree.map(lambda x: x[0], micro)
    )
    carry = (stats, (grads, metrics))
    if jax.default_backend() == 'cpu':
      # Inside a loop body XLA:CPU has no fast path for convolution gradients.
      for part in range(1, parts):
        carry, _ = add(carry, jax.tree.map(lambda x, i=part: x[i], micro))
    else:
      carry, _ = lax.scan(add, carry, jax.tree.map(lambda x: x[1:], micro))
    stats, (grads, metrics) = carry
    return grads, (stats, metrics)

  return summed
