r"""Open compound domain adaptation: a memory, and domain features.

The target mixes several domains without domain labels. The recipe 'ocda' sets up the
six stages of the authors' code:

  source         `centroid_loss`: the source's network, its classes around centroids
  centroids      no steps: the mean features of classes become the memory
  ('class_means') adversarial    `compound`, with features enriched by the memory alone
  domain_factor  `domain_factor`: features of what the class does not determine; at its
                 end every target image has a distance from the source (the fifth stage)
  scheduled      `compound` again from the source's network, with features enriched by
                 memory and domain, while a curriculum offers near images first

Source: Liu et al., "Open Compound Domain Adaptation", CVPR 2020, arXiv 1909.03403, and
the authors' code.
"""

from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, nn

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
  named_key,
  named_players,
  predictor,
  tick,
  update,
  update_where,
)
from lt_jax.methods.adda import SOURCE, accuracy, deceive, moved_if, with_target_logit
from lt_jax.methods.adversarial import reader
from lt_jax.methods.pairs import apart, begin, beside, together, update_all
from lt_jax.models.heads import product
from lt_jax.optim import Optimizer

DOMAIN, CLASS = 'domain_net', 'class_net'


def compound(
  net: Network,
  optimizer: Optimizer,
  *,
  players: Mapping[str, Player],
  align_on: Sequence[str],
  streams: Collection[str],
  counts: np.ndarray,
  threshold: float = 0.6,
) -> Method:
  r"""Aligns enriched features of the target with those of the source's network.

  A target image x has a direct feature and a prediction from the target's network. The
  prediction reads the memory M (C, D), the class centroids of the source. A frozen
  network gives the feature of its domain:

  .. math::
    v = f(x), \qquad m = \sum_c p_c(v)\, M_c, \qquad d = f_{domain}(x)

  A `Fusion` of the three is classified by its own head. The target's network and the
  fusion are updated as in `adda`. No label of the source is read, and the source's
  network is frozen, in evaluation mode. (In the authors' code it is in training mode,
  with batch statistics and dropout.)

  The batches are 'train', from the source, and 'target', which needs no labels. 'loss'
  is that of the target's players; 'accuracy' is that of the source's network on its
  batch.

  Args:
    net: returns a dict with 'logits' and 'features'.
    optimizer: for the players `{'net': params}`.
    players: 'discriminator', a network from (B, D) to logits (B,), and 'fusion', see
      `lt_jax.models.fusion`.
    align_on: names of the outputs that the discriminator reads; 'logits' in the
      authors' code.
    streams: names of the streams; it reads 'target'.
    counts: (C,); only its length is used.
    threshold: the target's players move only in steps in which the accuracy of the
      discriminator, before its update, is above this; 0 for always.

  Returns:
    The method. Its outputs have the 'features', 'logits' and 'borrowed' (B,) of the
    fusion, and 'target_logit' (B,).

  Raises:
    UserError: a player is missing, or no layer is read.

  Source: see the module. How the memory is read and added to a feature: sections 3.3
  and 3.4 of the paper.
  """
  judge, fusion = named_players(players, 'discriminator', 'fusion')
  read = reader('compound', align_on)
  check_streams(streams, 'target')
  fuse = fusion.net.clone(num_classes=len(counts))
  reads_domain = fuse.reads_domain
  moved_players = {'fusion': fusion}

  def enriched(
    params: PyTree, stats: PyTree, images: jax.Array, train: bool
  ) -> tuple[Outputs, PyTree]:
    outputs, net_stats = forward(net, params['net'], stats['net'], images, train=train)
    found = {'direct': outputs['features']}
    memory = lax.stop_gradient(params['centroids'])
    found['memory'] = product(nn.softmax(outputs['logits']), memory)
    if reads_domain:
      own, domain_stats = params[DOMAIN], stats[DOMAIN]
      of_domain, _ = forward(net, own, domain_stats, images, train=False)
      found['domain'] = lax.stop_gradient(of_domain['features'])
    fused = fuse.apply({'params': params['fusion']}, found)
    return outputs | fused, net_stats

  def step(state: State, batches: Mapping[str, Batch]) -> tuple[State, Metrics]:
    batch, images = batches['train'], batches['target']['image']
    of_source, _ = forward(
      net, state.params[SOURCE], state.stats[SOURCE], batch['image'], train=False
    )

    def encode(own: PyTree) -> tuple[jax.Array, tuple[PyTree, jax.Array]]:
      own = optimizer.held({'net': own['net']}) | fusion.optimizer.held(
        {'fusion': own['fusion']}
      )
      outputs, stats = enriched(state.params | own, state.stats, images, True)
      return read(outputs), (stats, outputs['borrowed'])

    state, (stats, borrowed), metrics = deceive(
      state,
      read(of_source),
      encode,
      moved=('net', 'fusion'),
      judge=judge,
      move=lambda state, grads: update_all(state, grads, optimizer, moved_players),
      threshold=threshold,
    )
    metrics['borrowed'] = borrowed.sum(), jnp.float32(len(borrowed))
    metrics['accuracy'] = accuracy(of_source, batch)
    return tick(state.replace(stats={**state.stats, 'net': stats})), metrics

  def reads(outputs: Outputs) -> dict[str, PyTree]:
    names = ('direct', 'memory', 'domain')[: 2 + reads_domain]
    feature = outputs['features']
    # The outputs of the fusion under these names have the same size.
    return {'fusion': dict.fromkeys(names, feature), 'discriminator': read(outputs)}

  begun = begin(
    net,
    optimizer,
    reads,
    statistics='joint',
    players={'discriminator': judge, 'fusion': fusion._replace(net=fuse)},
  )

  def with_memory(key: jax.Array, batches: Mapping[str, Batch]) -> State:
    state = begun(key, batches)
    images = batches['train']['image']
    shape = jax.eval_shape(lambda: predictor(net)(state, images)['features']).shape
    centroids = jnp.zeros((len(counts), shape[-1]), jnp.float32)
    return state.replace(params={**state.params, 'centroids': centroids})

  def predict(state: State, images: jax.Array) -> Outputs:
    return enriched(state.params, state.stats, images, False)[0]

  init = beside(with_memory, net, SOURCE, *[DOMAIN] * reads_domain)
  return Method(init, step, with_target_logit(predict, judge, read))


def domain_factor(
  net: Network,
  optimizer: Optimizer,
  *,
  players: Mapping[str, Player],
  streams: Collection[str],
  image_shape: Sequence[int],
  confusion: float = 1.0,
  reconstruction: float = 10.0,
  threshold: float = 0.3,
) -> Method:
  r"""Learns features that, with those of the class, redraw an image, but show no class.

  The trunk of the network becomes the domain encoder e; its head D classifies e(x). A
  frozen class network f gives target images their labels, and gives the decoder g the
  features of the class:

  .. math::
    \min_D\; \ell(D(e(x)), y), \qquad
    \min_{e, g}\; w_c\, \ell(D(e(x)), \tilde y) + w_r\, h(g(f(x), e(x)) - x)

  with the cross-entropy l, means over the images of both domains, y the label of a
  source image or the prediction of f for a target image, labels y~ drawn at random in
  every step, and h the mean over pixels of a Huber loss, quadratic up to 1.

  With a player 'domain_classifier', a network from (B, D) to logits, e learns from
  domain labels instead: 0 for the source, and 1, 2, ... for the target's domains, which
  target batches then have as 'domain'. This is an oracle: a compound target has no such
  labels.

  The batches are 'train', from the source, and 'target', which needs no labels. 'loss'
  is that of the encoder; 'accuracy' is how often D is right, which shows how much the
  features still say about classes.

  Args:
    net: returns a dict with 'logits' and 'features'.
    optimizer: for the players `{'net': params}`; it also moves the head, in an update
      of its own.
    players: 'decoder', a network from (B, 2 D) to images, and optionally
      'domain_classifier'.
    streams: names of the streams; it reads 'target'.
    image_shape: (H, W, C).
    confusion: w_c.
    reconstruction: w_r.
    threshold: encoder and decoder move only in steps in which the accuracy of D, before
      its update, is above this; 0 for always.

  Returns:
    The method; its outputs have e(x) as 'features', and the 'logits' of D.

  Raises:
    UserError: a player is missing.

  Source: see the module; section 3.1 of the paper. Weights and threshold are those of
  the authors' code.
  """
  oracle = 'domain_classifier' in players
  needed = ('decoder', *['domain_classifier'] * oracle)
  named_players(players, *needed)
  check_streams(streams, 'target')
  decoder = players['decoder']
  decode = decoder.net.clone(shape=tuple(image_shape))
  players = {**players, 'decoder': decoder._replace(net=decode)}

  def play(name: str, params: PyTree, x: jax.Array) -> jax.Array:
    return players[name].net.apply({'params': params}, x)

  def step(state: State, batches: Mapping[str, Batch]) -> tuple[State, Metrics]:
    batch, target = batches['train'], batches['target']
    images = together(batch['image'], target['image'])
    of_class, _ = forward(
      net, state.params[CLASS], state.stats[CLASS], images, train=False
    )
    _, of_target = apart(of_class['logits'], len(batch['image']))
    pseudo = of_target.argmax(-1).astype(batch['label'].dtype)
    labels = together(batch['label'], pseudo)

    def encode(params: PyTree) -> tuple[jax.Array, PyTree]:
      held = optimizer.held({'net': params})['net']
      outputs, stats = forward(net, held, state.stats['net'], images, train=True)
      return outputs['features'], stats

    domain, pull, stats = jax.vjp(encode, state.params['net'], has_aux=True)

    def judged(params: PyTree):
      outputs, _ = forward(net, params['net'], {}, domain, train=False, method='head')
      right = (outputs['logits'].argmax(-1) == labels).sum(dtype=jnp.float32)
      return mean_cross_entropy(outputs['logits'], labels), right

    (loss, right), grads = jax.value_and_grad(judged, has_aux=True)(
      {'net': state.params['net']}
    )
    state, _ = update_where(state, grads, optimizer, _is_head)
    metrics = {
      'discriminator_loss': mean_metric(loss),
      'accuracy': (right, jnp.float32(len(labels))),
    }
    random = jax.random.randint(
      named_key(state.key, 'random_labels', state.step),
      labels.shape,
      0,
      of_class['logits'].shape[-1],
    )

    def told_apart(own: PyTree, x: jax.Array) -> jax.Array:
      if oracle:
        source_domain = jnp.zeros(len(batch['image']), jnp.int32)
        alone = jnp.zeros(len(target['image']), jnp.int32)
        domains = together(source_domain, 1 + target.get('domain', alone))
        return mean_cross_entropy(
          play('domain_classifier', own['domain_classifier'], x), domains
        )
      head = lax.stop_gradient(state.params['net'])
      outputs, _ = forward(net, head, {}, x, train=False, method='head')
      return mean_cross_entropy(outputs['logits'], random)

    def shown(own: PyTree, x: jax.Array) -> jax.Array:
      both = jnp.concatenate([of_class['features'], x], axis=-1)
      drawn = play('decoder', own['decoder'], both)
      return optax.losses.huber_loss(drawn, images, delta=1.0).mean()

    def value(own: PyTree, x: jax.Array):
      parts = told_apart(own, x), shown(own, x)
      return confusion * parts[0] + reconstruction * parts[1], parts

    own = {name: state.params[name] for name in needed}
    (loss, parts), (of_own, to_domain) = jax.value_and_grad(
      value, argnums=(0, 1), has_aux=True
    )(own, domain)
    (grads,) = pull(to_domain)
    after, norms = update_where(
      state, {'net': grads}, optimizer, lambda *path: not _is_head(*path)
    )
    for name, player in players.items():
      after, _ = update(after, {name: of_own[name]}, player.optimizer)
    if threshold and not oracle:
      moves = right > threshold * len(labels)
      after, metrics['moved'] = moved_if(moves, after, state)
    metrics |= norms | {
      'loss': mean_metric(loss),
      'domain_labels' if oracle else 'confusion': mean_metric(parts[0]),
      'reconstruction': mean_metric(parts[1]),
    }
    return tick(after.replace(stats={**after.stats, 'net': stats})), metrics

  def reads(outputs: Outputs) -> dict[str, PyTree]:
    feature = outputs['features']
    of_both = jnp.concatenate([feature, feature], axis=-1)
    return {name: of_both if name == 'decoder' else feature for name in needed}

  init = begin(net, optimizer, reads, statistics='joint', players=players)
  return Method(beside(init, net, CLASS), step, predictor(net))


def _is_head(player: str, inside: Sequence[str]) -> bool:
  return 'head' in inside[:1]


def mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the mean cross-entropy in nats of logits (B, C) and labels (B,)."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
