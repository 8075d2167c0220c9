"""Self-supervised adaptation: predict, in both domains, how an image was changed.

The labels are generated, so the target has them too. A trunk that solves the same task
in both domains is pulled towards features that they share.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lt_jax.errors import UserError, lookup
from lt_jax.losses.alignment import joined
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
  predictor,
  tick,
)
from lt_jax.methods.pairs import (
  STATISTICS,
  begin,
  forward_pair,
  held,
  update_all,
)
from lt_jax.methods.supervised import Objective
from lt_jax.optim import Optimizer

# Transformations of images (B, H, W, C): one function per label.


def _rotation(quarters: int) -> Callable[[jax.Array], jax.Array]:
  """Returns a rotation by `quarters` times 90 degrees, anticlockwise."""

  def turn(images: jax.Array) -> jax.Array:
    _, height, width, _ = images.shape
    if height != width:
      raise UserError(
        f'images of {height} x {width} pixels change shape when rotated: use square '
        'ones'
      )
    return jnp.rot90(images, quarters, (1, 2))

  return turn


def _transposed(images: jax.Array) -> jax.Array:
  return _rotation(1)(images)[:, ::-1]


def _quarter(row: int, column: int) -> Callable[[jax.Array], jax.Array]:
  """Returns a crop of one quarter, enlarged to the image's size by repeating pixels."""

  def places(size: int, second: int) -> np.ndarray:
    half = size // 2
    return (size - half) * second + np.arange(size) * half // size

  def view(images: jax.Array) -> jax.Array:
    _, height, width, _ = images.shape
    return images[:, places(height, row)][:, :, places(width, column)]

  return view


def _same(images: jax.Array) -> jax.Array:
  return images


TASKS: dict[str, Sequence[Callable[[jax.Array], jax.Array]]] = {
  'rotation': (_same, _rotation(1), _rotation(2), _rotation(3)),
  'digit_rotation': (_same, _transposed, lambda x: x[:, :, ::-1], _rotation(3)),
  'location': tuple(_quarter(row, column) for row in (0, 1) for column in (0, 1)),
  'flip': (_same, lambda x: x[:, ::-1]),
}
"""Task -> the transformation for each of its labels.

'digit_rotation' is what the code of Sun et al. calls rotation for digits: unchanged,
transposed, mirrored left to right, rotated by 270 degrees. Rotating by 180 degrees
would turn a 9 into a 6 and hardly changes 0 and 1, so its label would be ambiguous.
'flip' turns images upside down, which hardly changes 0, 1, 3 and 8 either.
"""


def changed(task: str, images: jax.Array, labels: jax.Array) -> jax.Array:
  """Transforms each image as its label says.

  Args:
    task: a key of `TASKS`.
    images: (B, H, W, C).
    labels: (B,) int.

  Returns:
    (B, H, W, C).

  Raises:
    UserError: an unknown task, or images whose shape it would change.
  """
  shown = images
  for label, change in enumerate(lookup(TASKS, 'self-supervised task', task)):
    chosen = (labels == label)[:, None, None, None]
    shown = jnp.where(chosen, change(images), shown)
  return shown


class Part(NamedTuple):
  """One part of the objective.

  Attributes:
    loss: (params, state, batches) -> (value (), (updated stats, metrics)).
    players: the players it updates besides the network.
  """

  loss: Callable[[PyTree, State, Mapping[str, Batch]], tuple]
  players: Mapping[str, Player]


def alternating(parts: Sequence[Part]) -> Sequence[Part]:
  """Makes one update per part, in sequence."""
  return parts


def summed(parts: Sequence[Part]) -> Sequence[Part]:
  """Makes one update for the sum of all parts."""

  def loss(params: PyTree, state: State, batches: Mapping[str, Batch]):
    total, metrics = jnp.float32(0), {}
    for part in parts:
      value, (stats, found) = part.loss(params, state, batches)
      total, metrics = total + value, metrics | found
      state = state.replace(stats=stats)
    return total, (state.stats, metrics)

  players = {name: p for part in parts for name, p in part.players.items()}
  return (Part(loss, players),)


ORDERS = {'alternating': alternating, 'summed': summed}
"""Order of updates -> function from parts to the parts that are updated in sequence."""


def self_supervised(
  net: Network,
  optimizer: Optimizer,
  *,
  objective: Objective,
  players: Mapping[str, Player],
  align_on: Sequence[str],
  alignment_weight: Callable[[jax.Array], jax.Array],
  streams: Collection[str],
  order: str = 'alternating',
  statistics: str = 'joint',
) -> Method:
  r"""Supervised learning on the source, with self-supervised tasks on both domains.

  .. math::
    L_y, \qquad \lambda(p)\, L_k, \qquad
    L_k = \tfrac12 \Big( \frac{1}{S} \sum_{i \in S} \ell(h_k f(T_{z_i} x_i), z_i)
      + \frac{1}{T} \sum_{i \in T} \ell(h_k f(T_{z_i} x_i), z_i) \Big)

  for every task k, where labels z are drawn uniformly and l is the cross-entropy. In
  the order 'alternating', as in the authors' code, every step updates trunk and head
  for each task in turn, and then the network for L_y. These are separate updates at the
  same rate, with one shared momentum of the network. The order 'summed' makes one
  update for the sum. The authors draw different images for every task, and twice as
  many source images for L_y; here all losses of a step use the images of its two
  batches.

  Every player is the head of the task with its name.

  Args:
    net: network that returns a dict with 'logits', 'features' and other named layers.
    optimizer: optimiser of the players `{'net': params}`.
    objective: (outputs, batch, step) -> (value, metrics), for the source.
    players: task, a key of `TASKS` -> its head, a network from (B, D) to logits (B, K)
      for its K labels.
    align_on: names of the layers that the heads read, concatenated. The authors first
      average the last convolution over its pixels.
    alignment_weight: step -> lambda, see `lt_jax.losses.alignment.make_weight`; 1 in
      the paper.
    streams: names of the streams; it reads 'target'.
    order: a key of `ORDERS`.
    statistics: how the domains meet in batch normalisation in the tasks, a key of
      `lt_jax.methods.pairs.STATISTICS`. L_y uses statistics of the source alone.

  Raises:
    UserError: no task or an unknown one, a head with the wrong number of labels, no
      layer to read, or an unknown order or kind of statistics.

  Sun et al., "Unsupervised Domain Adaptation through Self-Supervision", 2019, arXiv
  1909.11825.
  """
  if not players:
    raise UserError(
      'self_supervised needs a head for each of its tasks, such as players.rotation'
    )
  tasks = {name: lookup(TASKS, 'self-supervised task', name) for name in players}
  if not align_on:
    raise UserError(
      'self_supervised needs alignment.align_on: the layer its heads read'
    )
  arrange = lookup(ORDERS, 'order of updates', order)
  lookup(STATISTICS, 'kind of batch statistics', statistics)
  check_streams(streams, 'target')

  def answers(name: str, params: PyTree, outputs: Outputs) -> jax.Array:
    logits = players[name].net.apply({'params': params}, joined(outputs, align_on))
    if logits.shape[-1] != len(tasks[name]):
      raise UserError(
        f'players.{name} has {logits.shape[-1]} outputs, but the task has '
        f'{len(tasks[name])} labels'
      )
    return logits

  def of_source(params: PyTree, state: State, batches: Mapping[str, Batch]):
    params, batch = held(params, optimizer, players), batches['train']
    own = 'net_source' if 'net_source' in state.stats else 'net'
    outputs, stats = forward(
      net, params['net'], state.stats[own], batch['image'], train=True
    )
    value, metrics = objective(outputs, batch, state.step)
    return value, (state.stats | {own: stats}, {'loss': mean_metric(value)} | metrics)

  def of_task(name: str) -> Part:
    def loss(params: PyTree, state: State, batches: Mapping[str, Batch]):
      params = held(params, optimizer, players)
      images = [batches[stream]['image'] for stream in ('train', 'target')]
      keys = jax.random.split(named_key(state.key, name, state.step))
      labels = [
        jax.random.randint(key, (len(x),), 0, len(tasks[name]))
        for key, x in zip(keys, images, strict=True)
      ]
      shown = [changed(name, x, z) for x, z in zip(images, labels, strict=True)]
      *outputs, stats = forward_pair(
        net, params['net'], state.stats, *shown, statistics=statistics
      )
      logits = [answers(name, params[name], o) for o in outputs]
      value, metrics = task_loss(name, logits, labels)
      return alignment_weight(state.step) * value, (stats, metrics)

    return Part(loss, {name: players[name]})

  parts = arrange([*(of_task(name) for name in tasks), Part(of_source, {})])

  def step(state: State, batches: Mapping[str, Batch]) -> tuple[State, Metrics]:
    metrics = {}
    for part in parts:
      gradient = jax.grad(part.loss, has_aux=True)
      grads, (stats, found) = gradient(state.params, state, batches)
      state, norms = update_all(state, grads, optimizer, part.players)
      state, metrics = state.replace(stats=stats), metrics | found | norms
    return tick(state), metrics

  def reads(outputs: Outputs) -> dict[str, jax.Array]:
    return dict.fromkeys(tasks, joined(outputs, align_on))

  init = begin(net, optimizer, reads, statistics=statistics, players=players)
  return Method(init, step, predictor(net))


def task_loss(
  name: str, logits: Sequence[jax.Array], labels: Sequence[jax.Array]
) -> tuple[jax.Array, Metrics]:
  """Returns the cross-entropy of a task, with each domain counting half.

  Args:
    name: the task's name, for the metrics.
    logits: (S, K) for the source, (T, K) for the target.
    labels: (S,) and (T,).

  Returns:
    (loss (), {'NAME_loss', 'NAME_accuracy'}).
  """
  entropy = optax.softmax_cross_entropy_with_integer_labels
  both = list(zip(logits, labels, strict=True))
  loss = sum(entropy(z, k).mean() for z, k in both) / 2
  right = sum((z.argmax(-1) == k).sum() for z, k in both).astype(jnp.float32)
  images = jnp.float32(sum(len(k) for k in labels))
  return loss, {f'{name}_loss': mean_metric(loss), f'{name}_accuracy': (right, images)}
