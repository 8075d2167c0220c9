"""Adversarial discriminative adaptation: the target gets its own network."""

from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import nn

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
  forward,
  mean_metric,
  named_players,
  predictor,
  tick,
  update,
)
from lt_jax.methods.adversarial import domain_loss, reader, target_logit
from lt_jax.methods.pairs import begin, beside
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
  r"""Trains a target network's layers to match those of a fixed source network.

  A step updates the discriminator D, then the target network M_t with inverted labels
  against the new D:

  .. math::
    \min_D\; -E_s \log(1 - D(M_s(x))) - E_t \log D(M_t(x)), \qquad
    \min_{M_t}\; -E_t \log(1 - D(M_t(x)))

  where D is the probability that an image is from the target. It is the second of two
  stages. The first trains a network on the source; surgeries copy it to 'net', the
  target network, which is deployed, and to 'source_net', which is frozen and runs in
  evaluation mode. The optimiser (`learning_rate_scale`) determines which parts of the
  target network are frozen, such as the paper's classifier.

  The batches are 'train', from the source, and 'target', which needs no labels. 'loss'
  is the loss of the target network; 'accuracy' is that of the source network on its own
  batch.

  Args:
    net: network that returns a dict with 'logits', 'features' and other named layers.
    optimizer: optimiser of the players `{'net': params}`.
    players: 'discriminator', a network from (B, D) to logits (B,).
    align_on: names of the layers it reads, concatenated.
    streams: names of the streams; it reads 'target'.
    threshold: the target network is only updated in steps in which the accuracy of the
      discriminator, before its own update, is above this; 'moved' is the share of such
      steps. 0 for none.

  Returns:
    The method. Its outputs have 'target_logit' (B,), the logit of being a target image.

  Raises:
    UserError: no discriminator, or no layer for it to read.

  Tzeng et al., "Adversarial Discriminative Domain Adaptation", CVPR 2017, arXiv
  1702.05464, section 4. The threshold of 0.6 is from the code of Hoffman et al.
  (CyCADA, ICML 2018), where the discriminator reads the logits and the classifier is
  trained too. That code also stops after an epoch without an update; here training
  continues.
  """
  (judge,) = named_players(players, 'discriminator')
  read = reader('adda', align_on)
  check_streams(streams, 'target')

  def step(state: State, batches: Mapping[str, Batch]) -> tuple[State, Metrics]:
    batch, images = batches['train'], batches['target']['image']
    of_source, _ = forward(
      net, state.params[SOURCE], state.stats[SOURCE], batch['image'], train=False
    )

    def encode(params: PyTree) -> tuple[jax.Array, PyTree]:
      held = optimizer.held(params)['net']
      outputs, stats = forward(net, held, state.stats['net'], images, train=True)
      return read(outputs), stats

    state, stats, metrics = deceive(
      state,
      read(of_source),
      encode,
      moved=('net',),
      judge=judge,
      move=lambda state, grads: update(state, grads, optimizer),
      threshold=threshold,
    )
    metrics['accuracy'] = accuracy(of_source, batch)
    return tick(state.replace(stats={**state.stats, 'net': stats})), metrics

  init = begin(
    net,
    optimizer,
    lambda outputs: {'discriminator': read(outputs)},
    statistics='joint',
    players=players,
  )
  return Method(
    beside(init, net, SOURCE), step, with_target_logit(predictor(net), judge, read)
  )


def with_target_logit(
  predict: Callable[[State, jax.Array], Outputs],
  judge: Player,
  read: Callable[[Outputs], jax.Array],
) -> Callable[[State, jax.Array], Outputs]:
  """Returns a `predict` whose outputs also have 'target_logit'.

  Args:
    predict: `predict` of the network.
    judge: the discriminator.
    read: outputs -> what the discriminator reads.
  """

  def extended(state: State, images: jax.Array) -> Outputs:
    outputs = predict(state, images)
    return outputs | target_logit(judge, state.params, read(outputs))

  return extended


def deceive(
  state: State,
  source: jax.Array,
  encode: Callable[[dict[str, PyTree]], tuple[jax.Array, PyTree]],
  *,
  moved: Sequence[str],
  judge: Player,
  move: Callable[[State, dict[str, PyTree]], tuple[State, Metrics]],
  threshold: float,
) -> tuple[State, PyTree, Metrics]:
  """Updates a discriminator, then the target's players with inverted labels.

  Args:
    state: the State before both updates.
    source: (S, D), what the discriminator reads for source images.
    encode: {player: params} -> (what it reads for target images (T, D), anything else).
    moved: the target's players.
    judge: the discriminator, the player 'discriminator'.
    move: (state, {player: gradients}) -> (state, metrics), the update of these players.
    threshold: update them only if the discriminator's accuracy before its update was
      higher than this; 0: always.

  Returns:
    (state, the second result of `encode`, metrics).
  """

  def logits(params: PyTree, x: jax.Array) -> jax.Array:
    return judge.net.apply({'params': params}, x)

  own = {name: state.params[name] for name in moved}
  target, pull, rest = jax.vjp(encode, own, has_aux=True)

  def judged(params: PyTree):
    return domain_loss(logits(params, source), logits(params, target))

  grads, metrics = jax.grad(judged, has_aux=True)(state.params['discriminator'])
  state, _ = update(state, {'discriminator': grads}, judge.optimizer)

  def fooled(x: jax.Array) -> jax.Array:
    return nn.softplus(logits(state.params['discriminator'], x)).mean()

  loss, back = jax.value_and_grad(fooled)(target)
  (grads,) = pull(back)
  after, norms = move(state, grads)
  if threshold:
    right, judged_images = metrics['domain_accuracy']
    after, moves = moved_if(right > threshold * judged_images, after, state)
    metrics['moved'] = moves
  return after, rest, metrics | {'loss': mean_metric(loss), **norms}


def moved_if(
  moves: jax.Array, after: State, before: State
) -> tuple[State, tuple[jax.Array, jax.Array]]:
  """Returns one of two States, and a metric that says whether it is the first.

  Both are computed: XLA:CPU has no fast path for convolutions inside a branch.
  """
  state = jax.tree.map(lambda new, old: jnp.where(moves, new, old), after, before)
  return state, mean_metric(moves.astype(jnp.float32))


def accuracy(outputs: Outputs, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Returns a network's accuracy on a labelled batch, as a metric."""
  labels = batch['label']
  correct = (outputs['logits'].argmax(-1) == labels).sum(dtype=jnp.float32)
  return correct, (labels >= 0).sum(dtype=jnp.float32)
