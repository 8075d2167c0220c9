"""Maximum classifier discrepancy: two heads that disagree where the target differs."""

from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax, nn

from lt_jax.errors import UserError
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
  predictor,
  tick,
  update,
  update_where,
)
from lt_jax.methods.supervised import Objective
from lt_jax.optim import Optimizer

HEAD, SECOND = 'head', 'second_head'


def mcd(
  net: Network,
  optimizer: Optimizer,
  *,
  objective: Objective,
  streams: Collection[str],
  inner_steps: int = 4,
) -> Method:
  r"""Drives two heads apart on the target, and trains the trunk to reconcile them.

  A step makes three updates of the trunk G and the heads F_1 and F_2:

  .. math::
    A:&\quad \min_{G, F_1, F_2}\; L_y(F_1) + L_y(F_2) \\
    B:&\quad \min_{F_1, F_2}\; L_y(F_1) + L_y(F_2) - d(T) \\
    C:&\quad \min_{G}\; d(T), \quad \text{n times}, \qquad
    d(T) = \frac{1}{T C} \sum_i \sum_c |p^1_{ic} - p^2_{ic}|

  where p is the softmax of each head and L_y the supervised objective on the source.
  Every update is a full optimiser update, with momentum and weight decay, at the
  learning rate of the step. Adam's bias correction counts steps, not updates, so it is
  too large in the first few.

  The second head is a player of its own, of the same kind as the network's head; rules
  for 'net/head/...' do not apply to it. Predictions use the network's own head only.
  The trunk is everything but the head. Each pass normalises by its own batch.

  The batches are 'train', from the source, and 'target', which needs no labels. 'loss'
  is the objective of A, averaged over both heads, and 'discrepancy' is d before B.

  Args:
    net: network that returns a dict with 'logits' and 'features', which its head reads.
    optimizer: optimiser of the players `{'net': params, 'second_head': params}`.
    objective: (outputs, batch, step) -> (value, metrics), for the source.
    streams: names of the streams; it reads 'target'.
    inner_steps: n. These steps are unrolled in the program.

  Raises:
    UserError: no stream 'target', or `inner_steps` below 1.

  Saito et al., "Maximum Classifier Discrepancy for Unsupervised Domain Adaptation",
  CVPR 2018, arXiv 1712.02560, section 3.4. The authors' code also evaluates the second
  head and the sum of both logits.
  """
  check_streams(streams, 'target')
  if inner_steps < 1:
    raise UserError(f'mcd: inner_steps is {inner_steps}; it must be at least 1')

  def init(key: jax.Array, batches: Mapping[str, Batch]) -> State:
    images = batches['train']['image'][:1]
    params, stats = init_net(net, named_key(key, 'init', 0), images)
    other, _ = init_net(net, named_key(key, f'init_{SECOND}', 0), images)
    players = {'net': params, SECOND: other[HEAD]}
    return first_state(key, players, {'net': stats}, optimizer.init(players))

  def passed(
    params: PyTree, stats: PyTree, images: jax.Array
  ) -> tuple[Outputs, PyTree]:
    return forward(net, params['net'], stats, images, train=True)

  def heads(params: PyTree, features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the logits of both heads."""
    both = (params['net'], {**params['net'], HEAD: params[SECOND]})
    return tuple(
      forward(net, own, {}, features, train=False, method='head')[0]['logits']
      for own in both
    )

  def classify(params: PyTree, outputs: Outputs, batch: Batch, step: jax.Array):
    """Returns the objectives of both heads, and the metrics of the first."""
    (first, metrics), (second, _) = (
      objective({**outputs, 'logits': logits}, batch, step)
      for logits in heads(params, outputs['features'])
    )
    return first + second, metrics

  def step(state: State, batches: Mapping[str, Batch]) -> tuple[State, Metrics]:
    batch, images = batches['train'], batches['target']['image']
    if batch['label'].ndim > 1:
      raise UserError('mcd compares whole images, but here every pixel has a label')

    def on_source(params: PyTree, stats: PyTree):
      params = optimizer.held(params)
      outputs, stats = passed(params, stats, batch['image'])
      value, metrics = classify(params, outputs, batch, state.step)
      return value, (stats, {'loss': mean_metric(value / 2), **metrics})

    def of_heads(params: PyTree, source: Outputs, target: Outputs):
      apart = discrepancy(*heads(params, target['features']))
      return classify(params, source, batch, state.step)[0] - apart, apart

    def on_target(params: PyTree, stats: PyTree):
      params = optimizer.held(params)
      outputs, stats = passed(params, stats, images)
      return discrepancy(*heads(params, outputs['features'])), stats

    stats = state.stats['net']
    grads, (stats, metrics) = jax.grad(on_source, has_aux=True)(state.params, stats)
    state, norms = update(state, grads, optimizer)

    source, stats = passed(state.params, stats, batch['image'])
    target, stats = passed(state.params, stats, images)
    grads, apart = jax.grad(of_heads, has_aux=True)(
      state.params, *lax.stop_gradient((source, target))
    )
    state = _move(state, grads, optimizer, heads=True)

    for _ in range(inner_steps):
      grads, stats = jax.grad(on_target, has_aux=True)(state.params, stats)
      state = _move(state, grads, optimizer, heads=False)
    metrics |= norms | {'discrepancy': mean_metric(apart)}
    return tick(state.replace(stats={'net': stats})), metrics

  return Method(init, step, predictor(net))


def discrepancy(first: jax.Array, second: jax.Array) -> jax.Array:
  """Returns the mean L1 distance between two predictions, over images and classes.

  Args:
    first: logits (T, C).
    second: likewise.
  """
  return jnp.abs(nn.softmax(first) - nn.softmax(second)).mean()


def _move(state: State, grads: PyTree, optimizer: Optimizer, *, heads: bool) -> State:
  """Updates both heads, or everything but the heads."""

  def chosen(player: str, inside: Sequence[str]) -> bool:
    return (player == SECOND or HEAD in inside[:1]) == heads

  return update_where(state, grads, optimizer, chosen)[0]
