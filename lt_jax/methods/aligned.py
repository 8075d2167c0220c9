"""Supervised learning on one domain, whose layers are aligned with those of another.

Deep CORAL, DAN, JAN, minimum entropy, minimum class confusion: each is an entry of
`lt_jax.losses.alignment.ALIGNMENTS`.
"""

from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp

from lt_jax.method import (
  Batch,
  Method,
  Metrics,
  Network,
  Outputs,
  PyTree,
  State,
  check_streams,
  first_state,
  forward,
  init_net,
  mean_metric,
  named_key,
  tick,
  update,
)
from lt_jax.methods.pairs import first_stats, forward_pair
from lt_jax.methods.supervised import Loss, batch_metrics
from lt_jax.optim import Optimizer

Alignment = Callable[[Outputs, Outputs, jax.Array], jax.Array]


def aligned(
  net: Network,
  optimizer: Optimizer,
  loss: Loss,
  *,
  alignment: Alignment | None,
  class_weights: Callable[[jax.Array], jax.Array],
  reduction: Callable[[jax.Array], jax.Array],
  streams: Collection[str],
  penalty: Loss | None = None,
  statistics: str = 'joint',
) -> Method:
  r"""Gradient descent on a source's losses and its distance from a target.

  .. math::
    J = \sum_i a_i\, \ell_i + P + \lambda(p)\, D(S, T), \qquad
    a = \text{reduction}(w, y)

  The batches are 'train', of the source, and 'target', which needs no labels.

  Args:
    net: returns a dict with 'logits', 'features' and further named layers.
    optimizer: of the players `{'net': params}`.
    loss: (outputs, batch) -> (B,), of the source.
    alignment: (source outputs, target outputs, step) -> (), weighted, see
      `lt_jax.losses.alignment.make_alignment`. None for none: then the target moves
      nothing but batch statistics.
    class_weights: step -> (C,).
    reduction: (class weights (C,), labels (B,)) -> coefficients (B,).
    streams: names of the streams, of which it reads 'target'.
    penalty: (outputs, batch) -> (), of the source.
    statistics: how the domains meet in batch normalisation, a key of
      `lt_jax.methods.pairs.STATISTICS`.

  Raises:
    UserError: unknown statistics.
  """
  check_streams(streams, 'target')
  first_stats({}, statistics)  # which refuses unknown ones

  def init(key: jax.Array, batches) -> State:
    images = batches['train']['image']
    params, stats = init_net(net, named_key(key, 'init', 0), images)
    params, stats = {'net': params}, first_stats(stats, statistics)
    return first_state(key, params, stats, optimizer.init(params))

  def objective(
    params: PyTree,
    stats: PyTree,
    batch: Batch,
    target_images: jax.Array,
    coefficients: jax.Array,
    step: jax.Array,
  ):
    params = optimizer.held(params)
    source, target, stats = forward_pair(
      net, params['net'], stats, batch['image'], target_images, statistics=statistics
    )
    losses = loss(source, batch)
    value = jnp.dot(coefficients, losses)
    if penalty is not None:
      value += penalty(source, batch)
    metrics = batch_metrics(source, batch, losses)
    if alignment is not None:
      distance = alignment(source, target, step)
      value += distance
      metrics['alignment'] = mean_metric(distance)
    return value, (stats, {'loss': mean_metric(value), **metrics})

  def step(state: State, batches) -> tuple[State, Metrics]:
    batch = batches['train']
    coefficients = reduction(class_weights(state.step), batch['label'])
    grads, (stats, metrics) = jax.grad(objective, has_aux=True)(
      state.params,
      state.stats,
      batch,
      batches['target']['image'],
      coefficients,
      state.step,
    )
    state, norms = update(state, grads, optimizer)
    return tick(state.replace(stats=stats)), metrics | norms

  def predict(state: State, images: jax.Array) -> Outputs:
    return forward(net, state.params['net'], state.stats['net'], images, train=False)[0]

  return Method(init, step, predict)
