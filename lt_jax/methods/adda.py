"""Adversarial discriminative adaptation: a network of its own for the target."""

from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import nn

from lt_jax.method import (
  Batch,
  Method,
  Metrics,
  Network,
  Player,
  PyTree,
  State,
  check_streams,
  forward,
  init_net,
  mean_metric,
  named_key,
  named_players,
  predictor,
  tick,
  update,
)
from lt_jax.methods.adversarial import domain_loss, reader
from lt_jax.methods.pairs import begin
from lt_jax.optim import Optimizer

SOURCE = 'source_net'


def adda(
  net: Network,
  optimizer: Optimizer,
  *,
  players: Mapping[str, Player],
  align_on: Sequence[str],
  streams: Collection[str],
  threshold: float = 0.0,
) -> Method:
  r"""Brings a target network's layers to where a fixed source network has its own.

  A step is an update of the discriminator D, then one of the target network M_t by
  inverted labels, against the new D:

  .. math::
    \min_D\; -\tfrac12 E_s \log(1 - D(M_s(x)))
      - \tfrac12 E_t \log D(M_t(x)), \qquad
    \min_{M_t}\; -E_t \log(1 - D(M_t(x)))

  with the probability D of being a target image. It is the second stage of two. The
  first trains a network on the source; surgeries copy it to 'net', the target network,
  which is deployed, and to 'source_net', which stays as it is and is applied in
  evaluation mode. What stays of the target network, such as the paper's classifier, is
  up to the optimiser (`learning_rate_scale`).

  The batches are 'train', of the source, and 'target', which needs no labels. 'loss' is
  that of the target network; 'accuracy' is that of the source network on its batch.

  Args:
    net: returns a dict with 'logits', 'features' and further named layers.
    optimizer: of the players `{'net': params}`.
    players: 'discriminator', a network from (B, D) to logits (B,).
    align_on: names of the layers that it reads, one after the other.
    streams: names of the streams, of which it reads 'target'.
    threshold: the target network moves only in steps in which the accuracy of the
      discriminator, before its update, is above it; 'moved' is their share. 0 for none.

  Raises:
    UserError: no discriminator, or no layer that it reads.

  Tzeng et al., "Adversarial Discriminative Domain Adaptation", CVPR 2017,
  arXiv 1702.05464, section 4. The threshold, 0.6, is that of the code of Hoffman et al.
  (CyCADA, ICML 2018), whose discriminator reads the logits and whose classifier moves
  too. That code also ends after an epoch without a move; here training goes on.
  """
  (judge,) = named_players(players, 'discriminator')
  read = reader('adda', align_on)
  check_streams(streams, 'target')

  begun = begin(
    net,
    optimizer,
    lambda outputs: {'discriminator': read(outputs)},
    statistics='joint',
    players=players,
  )

  def init(key: jax.Array, batches: Mapping[str, Batch]) -> State:
    state = begun(key, batches)
    own_key = named_key(key, f'init_{SOURCE}', 0)
    params, stats = init_net(net, own_key, batches['train']['image'])
    return state.replace(
      params={**state.params, SOURCE: params}, stats={**state.stats, SOURCE: stats}
    )

  def logits(params: PyTree, x: jax.Array) -> jax.Array:
    return judge.net.apply({'params': params}, x)

  def step(state: State, batches: Mapping[str, Batch]) -> tuple[State, Metrics]:
    batch, images = batches['train'], batches['target']['image']
    of_source, _ = forward(
      net, state.params[SOURCE], state.stats[SOURCE], batch['image'], train=False
    )

    def encode(params: PyTree) -> tuple[jax.Array, PyTree]:
      held = optimizer.held({'net': params})['net']
      outputs, stats = forward(net, held, state.stats['net'], images, train=True)
      return read(outputs), stats

    target, pull, stats = jax.vjp(encode, state.params['net'], has_aux=True)
    source = read(of_source)

    def judged(params: PyTree):
      return domain_loss(logits(params, source), logits(params, target))

    grads, metrics = jax.grad(judged, has_aux=True)(state.params['discriminator'])
    state, _ = update(state, {'discriminator': grads}, judge.optimizer)

    def fooled(x: jax.Array) -> jax.Array:
      return nn.softplus(logits(state.params['discriminator'], x)).mean()

    loss, back = jax.value_and_grad(fooled)(target)
    (grads,) = pull(back)
    after, norms = update(state, {'net': grads}, optimizer)
    if threshold:
      right, judged_images = metrics['domain_accuracy']
      moves = right > threshold * judged_images
      # Both are computed: XLA:CPU has no fast path for convolutions inside a branch.
      after = jax.tree.map(lambda new, old: jnp.where(moves, new, old), after, state)
      metrics['moved'] = mean_metric(moves.astype(jnp.float32))
    labels = batch['label']
    correct = (of_source['logits'].argmax(-1) == labels).sum(dtype=jnp.float32)
    metrics['accuracy'] = (correct, (labels >= 0).sum(dtype=jnp.float32))
    stats = {**state.stats, 'net': stats}
    metrics |= {'loss': mean_metric(loss), **norms}
    return tick(after.replace(stats=stats)), metrics

  return Method(init, step, predictor(net))
