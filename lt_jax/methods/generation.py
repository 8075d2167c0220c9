"""Generated features: a classifier for classes with a description but no images."""

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
  r"""Trains a feature generator, and a head on real and generated features.

  .. math::
    \min_G\; \mathrm{MMD}^2_{\text{class}}\big(v,\ G(s_y, z)\big), \qquad
    \min_h\; \frac{|S|}{C}\, E_{(v, y)}\, \ell(h(v), y)
    + \frac{|U|}{C}\, E_{u \in U, z}\, \ell(h(G(s_u, z)), u)

  where v are the features of images of the learned classes S, s the descriptions of
  classes, U the other classes, z noise from N(0, 1) and :math:`\ell` the cross-entropy
  over all C classes. Trunk and batch statistics are frozen: an earlier stage has
  trained them. With balanced batches all classes weigh the same in h.

  For a network that classifies pixels, v are features of single pixels: at most
  `most_pixels` per batch, drawn with every class equally likely.

  Args:
    net: network that returns a dict with 'features' (B, D) or 'map' (B, h, w, D).
    optimizer: optimiser of the players `{'net': params}`; only the head is trained.
    players: 'generator', a network from descriptions (N, A) and noise (N, Z) to
      features, with the attributes `noise` and `size`.
    class_vectors: s, (C, A).
    base: (C,) bool, the classes S.
    per_class: number of features generated per step for each class of U.
    most_pixels: see above.

  Raises:
    UserError: no descriptions, no class in U, or a head that also reads a pixel's
      neighbours, which a generated pixel does not have.

  Sources: Bucher et al., "Zero-Shot Semantic Segmentation" (ZS3Net), NeurIPS 2019,
  arXiv 1906.00817, section 3 (the generator by MMD, then the classifier); Xian et al.,
  "Feature Generating Networks for Zero-Shot Learning", CVPR 2018, arXiv 1712.00981 (the
  same for images, with an adversarial loss). Both train the generator first and the
  classifier after it; here they learn side by side. The kernels are those of `mmd`,
  with bandwidths relative to the distances in the batch rather than fixed.
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
    """Returns features (N, D), one for each of the classes (N,)."""
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
    outputs: outputs with 'features' (B, D), or 'map' (B, h, w, D).
    label: (B,), or (B, H, W), read at the centres of the map's pixels.
    key: random key for drawing pixels.
    pixels: the largest number of pixels to draw.

  Returns:
    ((N, D), (N,)). Of pixels, labelled ones with every class equally likely; unlabelled
    ones, with the label -1, only if there are too few.
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
  # The largest log weights after adding Gumbel noise are a draw without replacement.
  places = jnp.where(label >= 0, -jnp.log(jnp.maximum(frequent, 1)), -jnp.inf)
  places += jax.random.gumbel(key, places.shape)
  _, chosen = lax.top_k(places, min(pixels, len(label)))
  return v[chosen], label[chosen]


def _is_head(player: str, path: Sequence[str]) -> bool:
  return player == 'net' and tuple(path[:1]) == ('head',)


def _check(net: Network, class_vectors: np.ndarray | None, made: np.ndarray) -> None:
  """Raises a `UserError` if there is nothing to generate from, or for."""
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
