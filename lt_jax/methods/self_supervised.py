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

# What is done to images (B, H, W, C): one function a label.


def _turned(quarters: int) -> Callable[[jax.Array], jax.Array]:
  """Returns a turn by so many times 90 degrees, anticlockwise."""

  def turn(images: jax.Array) -> jax.Array:
    _, height, width, _ = images.shape
    if height != width:
      raise UserError(
        f'images of {height} x {width} pixels change shape when turned: rotation needs '
        'square ones'
      )
    return jnp.rot90(images, quarters, (1, 2))

  return turn


def _transposed(images: jax.Array) -> jax.Array:
  return _turned(1)(images)[:, ::-1]


def _quarter(row: int, column: int) -> Callable[[jax.Array], jax.Array]:
  """Returns the view of a quarter, brought to the image's size by repeating pixels."""

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
  'rotation': (_same, _turned(1), _turned(2), _turned(3)),
  'digit_rotation': (_same, _transposed, lambda x: x[:, :, ::-1], _turned(3)),
  'location': tuple(_quarter(row, column) for row in (0, 1) for column in (0, 1)),
  'flip': (_same, lambda x: x[:, ::-1]),
}
"""Task -> what each of its labels does to images.

'digit_rotation' is what the code of Sun et al. calls rotation where images are of
digits: nothing, transposed, mirrored left to right, turned by 270 degrees. Half a turn
would make a 6 of a 9, and leaves 0 and 1 as they are, so that its label could not be
told. 'flip' turns upside down, which 0, 1, 3 and 8 hardly show either.
"""


def changed(task: str, images: jax.Array, labels: jax.Array) -> jax.Array:
  """Does to each image what its label says.

  Args:
    task: a key of `TASKS`.
    images: (B, H, W, C).
    labels: (B,) int.

  Returns:
    (B, H, W, C).

  Raises:
    UserError: an unknown task, or images of a shape that it does not keep.
  """
  shown = images
  for label, change in enumerate(lookup(TASKS, 'self-supervised task', task)):
    chosen = (labels == label)[:, None, None, None]
    shown = jnp.where(chosen, change(images), shown)
  return shown


class Part(NamedTuple):
  """A part of the objective.

  Attributes:
    loss: (params, state, batches) -> (value (), (updated stats, metrics)).
    players: those that it moves beside the network.
  """

  loss: Callable[[PyTree, State, Mapping[str, Batch]], tuple]
  players: Mapping[str, Player]


def alternating(parts: Sequence[Part]) -> Sequence[Part]:
  """An update for each part, one after the other."""
  return parts


def summed(parts: Sequence[Part]) -> Sequence[Part]:
  """One update, of the sum of all parts."""

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
"""Order of updates -> parts -> the parts that are updated one after the other."""


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
  r"""Supervised learning on the source beside self-supervised tasks on both domains.

  .. math::
    L_y, \qquad \lambda(p)\, L_k, \qquad
    L_k = \tfrac12 \Big( \frac{1}{S} \sum_{i \in S} \ell(h_k f(T_{z_i} x_i), z_i)
      + \frac{1}{T} \sum_{i \in T} \ell(h_k f(T_{z_i} x_i), z_i) \Big)

  for every task k, with labels z drawn uniformly and the cross-entropy l. In the order
  'alternating', that of the authors' code, every step updates trunk and head by each
  task, and then the network by L_y: an update of its own each, at the same rate, with
  one momentum of the network for all. In the order 'summed' there is one update, of the
  sum. The authors draw other images for every task and twice as many of the source for
  L_y; here all losses of a step are of the images of its two batches.

  Every player is the head of the task of its name.

  Args:
    net: returns a dict with 'logits', 'features' and further named layers.
    optimizer: of the players `{'net': params}`.
    objective: (outputs, batch, step) -> (value, metrics), of the source.
    players: task, a key of `TASKS` -> its head, a network from (B, D) to logits (B, K),
      K being the number of its labels.
    align_on: names of the layers that the heads read, one after the other. The authors
      average the last convolution over its pixels first.
    alignment_weight: step -> lambda, see `lt_jax.losses.alignment.make_weight`; 1 in
      the paper.
    streams: names of the streams, of which it reads 'target'.
    order: a key of `ORDERS`.
    statistics: how the domains meet in batch normalisation in the tasks, a key of
      `lt_jax.methods.pairs.STATISTICS`. L_y is normalised by the source alone.

  Raises:
    UserError: no task or an unknown one, a head for another number of labels, no layer
      that they read, or an unknown order or kind of statistics.

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
  """Returns the cross-entropy of a task, each domain counting half.

  Args:
    name: of the task, for the metrics.
    logits: (S, K) of the source, (T, K) of the target.
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
