"""Generated features: a classifier of classes that have a description and no image."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from lt_jax.data.attributes import unit_rows
from lt_jax.errors import UserError
from lt_jax.losses.alignment import class_mmd
from lt_jax.method import (
  Batch,
  Method,
  Metrics,
  Network,
  Outputs,
  Player,
  PyTree,
  State,
  first_state,
  forward,
  init_net,
  mean_metric,
  named_key,
  named_players,
  predictor,
  tick,
  update,
  update_where,
)
from lt_jax.methods.supervised import batch_metrics
from lt_jax.optim import Optimizer


def feature_generator(
  net: Network,
  optimizer: Optimizer,
  *,
  players: Mapping[str, Player],
  class_vectors: np.ndarray | None,
  base: np.ndarray,
  per_class: int = 4,
  most_pixels: int = 512,
) -> Method:
  r"""Trains a generator of features, and a head on real and generated ones.

  .. math::
    \min_G\; \mathrm{MMD}^2_{\text{class}}\big(v,\ G(s_y, z)\big), \qquad
    \min_h\; \frac{|S|}{C}\, E_{(v, y)}\, \ell(h(v), y)
    + \frac{|U|}{C}\, E_{u \in U, z}\, \ell(h(G(s_u, z)), u)

  with v the features of images of the learned classes S, s the descriptions of classes,
  U the other classes, noise z from N(0, 1) and the cross-entropy :math:`\ell` over all
  C classes. Trunk and batch statistics stay as they are: an earlier stage has trained
  them. With balanced batches all classes weigh the same in h.

  Of a network that classifies pixels, v are features of single pixels: at most
  `most_pixels` of a batch, drawn so that each class is as likely as another.

  Args:
    net: returns a dict with 'features' (B, D), or the 'map' (B, h, w, D).
    optimizer: of the players `{'net': params}`, of which the head moves.
    players: 'generator', a network from descriptions (N, A) and noise (N, Z) to
      features, with the attributes `noise` and `size`.
    class_vectors: (C, A), s.
    base: (C,) bool, the classes S.
    per_class: features that are generated in a step for each class of U.
    most_pixels: see above.

  Raises:
    UserError: no descriptions, no class of U, or a head that classifies a pixel by its
      neighbours, which a generated pixel does not have.

  Sources: Bucher et al., "Zero-Shot Semantic Segmentation" (ZS3Net), NeurIPS 2019,
  arXiv 1906.00817, section 3 (the generator by MMD, the classifier after it); Xian et
  al., "Feature Generating Networks for Zero-Shot Learning", CVPR 2018, arXiv 1712.00981
  (the same for images, with an adversarial loss). Both train the generator first and
  the classifier then; here the two learn side by side. Kernels are those of `mmd`,
  relative to the distances of the batch, rather than of fixed bandwidths.
  """
  (player,) = named_players(players, 'generator')
  made = np.flatnonzero(~base)
  _check(net, class_vectors, made)
  described = unit_rows(class_vectors) * np.sqrt(class_vectors.shape[1])
  described = jnp.asarray(described, jnp.float32)
  noise = player.net.noise or described.shape[1]
  wanted = jnp.repeat(jnp.asarray(made, jnp.int32), per_class)
  share = len(made) / len(base)

  def generate(
    generator: Network, params: PyTree, labels: jax.Array, key: jax.Array
  ) -> jax.Array:
    """Returns a feature (N, D) of each of some classes (N,)."""
    z = jax.random.normal(key, (len(labels), noise))
    return generator.apply({'params': params}, described[labels], z)

  def init(key: jax.Array, batches: Mapping[str, Batch]) -> State:
    images = batches['train']['image'][:1]
    params, stats = init_net(net, named_key(key, 'init', 0), images)
    outputs = jax.eval_shape(
      lambda x: forward(net, params, stats, x, train=False)[0], images
    )
    size = outputs.get('map', outputs['features']).shape[-1]
    first = player.net.clone(size=size).init(
      named_key(key, 'generator', 0), described[:1], jnp.zeros((1, noise))
    )
    own, others = {'net': params}, {'generator': first['params']}
    opt = optimizer.init(own) | player.optimizer.init(others)
    return first_state(key, own | others, {'net': stats}, opt)

  def head_loss(
    own: PyTree, stats: PyTree, v: jax.Array, label: jax.Array, unseen: jax.Array
  ) -> tuple[jax.Array, Metrics]:
    def judged(features: jax.Array, labels: jax.Array) -> tuple[Outputs, jax.Array]:
      outputs, _ = forward(net, own['net'], stats, features, train=False, method='head')
      losses = optax.softmax_cross_entropy_with_integer_labels(
        outputs['logits'], jnp.maximum(labels, 0)
      )
      return outputs, jnp.where(labels >= 0, losses, 0)

    outputs, losses = judged(v, label)
    generated, others = judged(unseen, wanted)
    of_real = losses.sum() / jnp.maximum((label >= 0).sum(), 1)
    value = (1 - share) * of_real + share * others.mean()
    right = generated['logits'].argmax(-1) == wanted
    metrics = batch_metrics(outputs, {'label': label}, losses)
    metrics |= {
      'loss': mean_metric(value),
      'generated_accuracy': mean_metric(right.mean(dtype=jnp.float32)),
    }
    return value, metrics

  def step(state: State, batches: Mapping[str, Batch]) -> tuple[State, Metrics]:
    batch, stats = batches['train'], state.stats['net']
    outputs, _ = forward(net, state.params['net'], stats, batch['image'], train=False)
    drawing, real, others = (
      named_key(state.key, name, state.step) for name in ('pixels', 'real', 'unseen')
    )
    v, label = batch_features(outputs, batch['label'], drawing, most_pixels)
    v = lax.stop_gradient(v)
    generator = player.net.clone(size=v.shape[-1])

    def discrepancy(params: PyTree) -> jax.Array:
      found = generate(generator, params['generator'], jnp.maximum(label, 0), real)
      return class_mmd(v, found, label)

    apart, grads = jax.value_and_grad(discrepancy)(
      {'generator': state.params['generator']}
    )
    unseen = generate(generator, state.params['generator'], wanted, others)
    head_grads, metrics = jax.grad(head_loss, has_aux=True)(
      {'net': state.params['net']}, stats, v, label, unseen
    )
    state, _ = update(state, grads, player.optimizer)
    state, norms = update_where(state, head_grads, optimizer, _is_head)
    return tick(state), metrics | {'discrepancy': mean_metric(apart), **norms}

  return Method(init, step, predictor(net))


def batch_features(
  outputs: Outputs, label: jax.Array, key: jax.Array, pixels: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the features of a batch, and their classes.

  Args:
    outputs: with 'features' (B, D), or the 'map' (B, h, w, D).
    label: (B,), or (B, H, W), read at the centres of the pixels of the map.
    key: of the pixels that are drawn.
    pixels: how many are, at most.

  Returns:
    ((N, D), (N,)). Of pixels, those with a label, each class as likely as another, and
    others with the label -1 only where there are too few.
  """
  if 'map' not in outputs:
    return outputs['features'], label
  shape = outputs['map'].shape
  rows, columns = (
    ((np.arange(small) + 0.5) * large / small).astype(np.int32)
    for small, large in zip(shape[1:3], label.shape[1:], strict=True)
  )
  v, label = outputs['map'].reshape(-1, shape[-1]), label[:, rows][:, :, columns]
  label = label.reshape(-1)
  of_class = label[:, None] == jnp.arange(outputs['logits'].shape[-1])[None]
  frequent = (of_class * of_class.sum(0)[None]).sum(1)
  # The largest of log weights with Gumbel noise are a draw without replacement.
  places = jnp.where(label >= 0, -jnp.log(jnp.maximum(frequent, 1)), -jnp.inf)
  places += jax.random.gumbel(key, places.shape)
  _, chosen = lax.top_k(places, min(pixels, len(label)))
  return v[chosen], label[chosen]


def _is_head(player: str, path: Sequence[str]) -> bool:
  return player == 'net' and tuple(path[:1]) == ('head',)


def _check(net: Network, class_vectors: np.ndarray | None, made: np.ndarray) -> None:
  """Refuses what nothing can be generated of, or for."""
  if class_vectors is None:
    raise UserError(
      'feature_generator reads descriptions of the classes: set data.class_vectors'
    )
  if not made.size:
    raise UserError(
      'feature_generator makes features of classes without images, but there are none: '
      'set data.unseen'
    )
  if any(getattr(net.head, name, False) for name in ('of_maps', 'of_layers')):
    raise UserError(
      'feature_generator makes single pixels, which have no neighbours: set model.head '
      "to one that reads none, such as 'linear'"
    )
