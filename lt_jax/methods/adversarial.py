"""Adversarial adaptation: features by which a discriminator cannot tell the domains."""

from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import nn

from lt_jax.errors import UserError
from lt_jax.losses.alignment import layer
from lt_jax.method import (
  Batch,
  Method,
  Metrics,
  Network,
  Outputs,
  Player,
  PyTree,
  State,
  check_streams,
  first_state,
  forward,
  init_net,
  mean_metric,
  named_key,
  named_players,
  tick,
  update,
)
from lt_jax.methods.pairs import apart, first_stats, forward_pair, together
from lt_jax.methods.supervised import Loss, batch_metrics
from lt_jax.optim import Optimizer


@jax.custom_vjp
def grad_reverse(x: jax.Array, scale: jax.Array) -> jax.Array:
  r"""Returns x, bit by bit; the gradient that flows back is multiplied by -scale.

  Args:
    x: of any shape.
    scale: (), an ordinary array: it may change from step to step. No gradient flows
      into it.

  Ganin and Lempitsky, ICML 2015, arXiv 1409.7495, section 3.1.
  """
  del scale
  return x


def _keep_scale(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
  return x, scale


def _reverse(scale: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
  return (-scale * g).astype(g.dtype), jnp.zeros_like(scale)


grad_reverse.defvjp(_keep_scale, _reverse)


PLAYERS = ('net', 'discriminator')


def dann(
  net: Network,
  optimizer: Optimizer,
  loss: Loss,
  *,
  players: Mapping[str, Player],
  align_on: Sequence[str],
  alignment_weight: Callable[[jax.Array], jax.Array],
  class_weights: Callable[[jax.Array], jax.Array],
  reduction: Callable[[jax.Array], jax.Array],
  streams: Collection[str],
  penalty: Loss | None = None,
  statistics: str = 'joint',
) -> Method:
  r"""Domain-adversarial training of a network and a discriminator, in one pass.

  .. math::
    \min_{f, y}\; L_y - \lambda(p)\, L_d, \qquad \min_d\; L_d, \qquad
    L_d = \tfrac12 \Big( \frac{1}{S} \sum_{i \in S} \log(1 + e^{z_i})
      + \frac{1}{T} \sum_{i \in T} \log(1 + e^{-z_i}) \Big)

  with the logits z of being a target image. L_y is the objective of supervised learning
  on the source. The discriminator trains on all of L_d whatever lambda is, so that it
  keeps pace; lambda scales only what flows back into the features.

  The batches are 'train', of the source, and 'target', which needs no labels.

  Args:
    net: returns a dict with 'logits', 'features' and further named layers.
    optimizer: of the players `{'net': params}`.
    loss: (outputs, batch) -> (B,), of the source.
    players: 'discriminator', a network from (B, D) to logits (B,).
    align_on: names of the layers that it reads, one after the other.
    alignment_weight: step -> lambda, see `lt_jax.losses.alignment.make_weight`.
    class_weights: step -> (C,).
    reduction: (class weights (C,), labels (B,)) -> coefficients (B,).
    streams: names of the streams, of which it reads 'target'.
    penalty: (outputs, batch) -> (), of the source.
    statistics: how the domains meet in batch normalisation, a key of
      `lt_jax.methods.pairs.STATISTICS`.

  Raises:
    UserError: no discriminator, no layer that it reads, or unknown statistics.

  Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 17(59), 2016,
  arXiv 1505.07818; whose sums over the domains are means here, as in other code.
  """
  (judge,) = named_players(players, *PLAYERS[1:])
  if not align_on:
    raise UserError('dann needs alignment.align_on: the layer its discriminator reads')
  check_streams(streams, 'target')
  first_stats({}, statistics)  # which refuses unknown ones

  def read(outputs: Outputs) -> jax.Array:
    return jnp.concatenate([layer(outputs, name) for name in align_on], axis=-1)

  def init(key: jax.Array, batches) -> State:
    images = batches['train']['image'][:1]
    params, stats = init_net(net, named_key(key, 'init', 0), images)
    shape = jax.eval_shape(
      lambda: read(forward(net, params, stats, images, train=False)[0])
    )
    judge_key = named_key(key, 'init_discriminator', 0)
    made = judge.net.init(judge_key, jnp.zeros(shape.shape, shape.dtype))
    own, others = {'net': params}, {'discriminator': made['params']}
    opt = optimizer.init(own) | judge.optimizer.init(others)
    return first_state(key, own | others, first_stats(stats, statistics), opt)

  def objective(
    params: PyTree,
    stats: PyTree,
    batch: Batch,
    target_images: jax.Array,
    coefficients: jax.Array,
    scale: jax.Array,
  ):
    own, others = ({name: params[name]} for name in PLAYERS)
    params = optimizer.held(own) | judge.optimizer.held(others)
    source, target, stats = forward_pair(
      net, params['net'], stats, batch['image'], target_images, statistics=statistics
    )
    losses = loss(source, batch)
    value = jnp.dot(coefficients, losses)
    if penalty is not None:
      value += penalty(source, batch)
    layers = grad_reverse(together(read(source), read(target)), scale)
    logits = judge.net.apply({'params': params['discriminator']}, layers)
    of_source, of_target = apart(logits, len(batch['image']))
    domain_loss = nn.softplus(of_source).mean() / 2 + nn.softplus(-of_target).mean() / 2
    right = (of_source <= 0).sum() + (of_target > 0).sum()
    metrics = {
      'loss': mean_metric(value),
      'domain_loss': mean_metric(domain_loss),
      'domain_accuracy': (right.astype(jnp.float32), jnp.float32(len(logits))),
      **batch_metrics(source, batch, losses),
    }
    return value + domain_loss, (stats, metrics)

  def step(state: State, batches) -> tuple[State, Metrics]:
    batch = batches['train']
    coefficients = reduction(class_weights(state.step), batch['label'])
    scale = alignment_weight(state.step)
    grads, (stats, metrics) = jax.grad(objective, has_aux=True)(
      state.params,
      state.stats,
      batch,
      batches['target']['image'],
      coefficients,
      scale,
    )
    own, others = ({name: grads[name]} for name in PLAYERS)
    state, norms = update(state, own, optimizer)
    state, _ = update(state, others, judge.optimizer)
    metrics |= norms | {'lambda': mean_metric(scale)}
    return tick(state.replace(stats=stats)), metrics

  def predict(state: State, images: jax.Array) -> Outputs:
    return forward(net, state.params['net'], state.stats['net'], images, train=False)[0]

  return Method(init, step, predict)
