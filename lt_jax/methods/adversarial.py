"""Adversarial adaptation: features by which a discriminator cannot tell the domains."""

from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

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
  tick,
  update,
)
from lt_jax.methods.pairs import first_stats, forward_pair
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
    reduction: weights (B,) -> coefficients (B,).
    streams: names of the streams, of which it reads 'target'.
    penalty: (outputs, batch) -> (), of the source.
    statistics: how the domains meet in batch normalisation, a key of
      `lt_jax.methods.pairs.STATISTICS`.

  Raises:
    UserError: no discriminator, no layer that it reads, or unknown statistics.

  Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 17(59), 2016,
  arXiv 1505.07818; whose sums over the domains are means here, as in other code.
  """
  if 'discriminator' not in players:
    raise UserError('dann needs a network in config.players.discriminator')
  if not align_on:
    raise UserError('dann needs alignment.align_on: the layer its discriminator reads')
  check_streams(streams, 'target')
  first_stats({}, statistics)  # which refuses unknown ones
  discriminator, judge_optimizer = players['discriminator']

  def read(outputs: Outputs) -> jax.Array:
    return jnp.concatenate([layer(outputs, name) for name in align_on], axis=-1)

  def init(key: jax.Array, batches) -> State:
    images = batches['train']['image'][:1]
    params, stats = init_net(net, named_key(key, 'init', 0), images)
    shape = jax.eval_shape(
      lambda: read(forward(net, params, stats, images, train=False)[0])
    )
    made = discriminator.init(
      named_key(key, 'init_discriminator', 0), jnp.zeros(shape.shape, shape.dtype)
    )
    main, judge = {'net': params}, {'discriminator': made['params']}
    opt = optimizer.init(main) | judge_optimizer.init(judge)
    return first_state(key, main | judge, first_stats(stats, statistics), opt)

  def objective(
    params: PyTree,
    stats: PyTree,
    batch: Batch,
    target_images: jax.Array,
    coefficients: jax.Array,
    scale: jax.Array,
  ):
    main, judge = (
      player.held({name: params[name]})
      for name, player in (('net', optimizer), ('discriminator', judge_optimizer))
    )
    source, target, stats = forward_pair(
      net, main['net'], stats, batch['image'], target_images, statistics=statistics
    )
    losses = loss(source, batch)
    value = jnp.dot(coefficients, losses)
    if penalty is not None:
      value += penalty(source, batch)
    read_by_domain = [read(source), read(target)]
    layers = grad_reverse(jnp.concatenate(read_by_domain), scale)
    logits = discriminator.apply({'params': judge['discriminator']}, layers)
    sizes = [len(x) for x in read_by_domain]
    is_target = jnp.repeat(
      jnp.array([0.0, 1.0]), jnp.array(sizes), total_repeat_length=sum(sizes)
    )
    domain_losses = optax.sigmoid_binary_cross_entropy(logits, is_target)
    domain_loss = sum(part.mean() / 2 for part in jnp.split(domain_losses, [sizes[0]]))
    right = (logits > 0) == (is_target > 0)
    metrics = {
      'loss': mean_metric(value),
      'domain_loss': mean_metric(domain_loss),
      'domain_accuracy': (right.sum(dtype=jnp.float32), jnp.float32(len(right))),
      **batch_metrics(source, batch, losses),
    }
    return value + domain_loss, (stats, metrics)

  def step(state: State, batches) -> tuple[State, Metrics]:
    batch = batches['train']
    coefficients = reduction(class_weights(state.step)[batch['label']])
    scale = alignment_weight(state.step)
    grads, (stats, metrics) = jax.grad(objective, has_aux=True)(
      state.params,
      state.stats,
      batch,
      batches['target']['image'],
      coefficients,
      scale,
    )
    judge = {'discriminator': grads.pop('discriminator')}
    state, norms = update(state, grads, optimizer)
    state, _ = update(state, judge, judge_optimizer)
    metrics |= norms | {'lambda': mean_metric(scale)}
    return tick(state.replace(stats=stats)), metrics

  def predict(state: State, images: jax.Array) -> Outputs:
    return forward(net, state.params['net'], state.stats['net'], images, train=False)[0]

  return Method(init, step, predict)
