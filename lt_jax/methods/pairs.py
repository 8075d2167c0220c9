"""Two domains in one network: shared passes, and a method that trains on both."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lt_jax.errors import lookup
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
  predictor,
  tick,
  update,
)
from lt_jax.methods.supervised import Objective
from lt_jax.optim import Optimizer

Pair = tuple[Outputs, Outputs, dict[str, PyTree]]


def together(source: jax.Array, target: jax.Array) -> jax.Array:
  """Merges two batches into one in which the domains alternate.

  They alternate in proportion to their sizes, so that every device and every ghost
  batch has some of both, and no image moves between devices.

  Args:
    source: (S, ...).
    target: (T, ...).

  Returns:
    (S + T, ...): gcd(S, T) blocks, each with source images followed by target images.
  """
  blocks = math.gcd(len(source), len(target))
  shares = [x.reshape(blocks, -1, *x.shape[1:]) for x in (source, target)]
  return jnp.concatenate(shares, axis=1).reshape(-1, *source.shape[1:])


def apart(x: jax.Array, source_size: int) -> tuple[jax.Array, jax.Array]:
  """Inverts `together`: returns (S, ...) and (T, ...)."""
  blocks = math.gcd(source_size, len(x))
  rows = x.reshape(blocks, -1, *x.shape[1:])
  share = source_size // blocks
  return tuple(
    part.reshape(-1, *x.shape[1:]) for part in (rows[:, :share], rows[:, share:])
  )


def joint(
  net: Network, params: PyTree, stats: PyTree, source: jax.Array, target: jax.Array
) -> Pair:
  """One pass over both batches, which share statistics."""
  outputs, net_stats = forward(
    net, params, stats['net'], together(source, target), train=True
  )
  both = {name: apart(x, len(source)) for name, x in outputs.items()}
  source_outputs, target_outputs = (
    {name: pair[domain] for name, pair in both.items()} for domain in (0, 1)
  )
  return source_outputs, target_outputs, {**stats, 'net': net_stats}


def separate(
  net: Network, params: PyTree, stats: PyTree, source: jax.Array, target: jax.Array
) -> Pair:
  """A pass per domain with its own statistics, and one running average of both.

  Equivalent to one pass over both with two groups of batch normalisation.
  """
  (source_outputs, from_source), (target_outputs, from_target) = (
    forward(net, params, stats['net'], images, train=True)
    for images in (source, target)
  )
  mean = jax.tree.map(lambda a, b: (a + b) / 2, from_source, from_target)
  return source_outputs, target_outputs, {**stats, 'net': mean}


def domain_specific(
  net: Network, params: PyTree, stats: PyTree, source: jax.Array, target: jax.Array
) -> Pair:
  """A pass per domain with its own statistics, and a running average for each.

  The target's, which predictions use, is stats['net']; the source's is
  stats['net_source'].
  """
  source_outputs, from_source = forward(
    net, params, stats['net_source'], source, train=True
  )
  target_outputs, from_target = forward(net, params, stats['net'], target, train=True)
  stats = {**stats, 'net': from_target, 'net_source': from_source}
  return source_outputs, target_outputs, stats


STATISTICS: dict[str, Callable[..., Pair]] = {
  'joint': joint,
  'separate': separate,
  'domain_specific': domain_specific,
}


def forward_pair(
  net: Network,
  params: PyTree,
  stats: dict[str, PyTree],
  source_images: jax.Array,
  target_images: jax.Array,
  *,
  statistics: str,
) -> Pair:
  """Applies a network in training mode to one batch from each of two domains.

  Args:
    net: network that returns a dict of named outputs, all with the batch first.
    params: its parameters.
    stats: `State.stats`, as initialised by `first_stats`.
    source_images: (S, H, W, C).
    target_images: (T, H, W, C).
    statistics: a key of `STATISTICS`. Without batch normalisation all compute the same,
      and 'joint' is the fastest.

  Returns:
    (outputs for the source, outputs for the target, updated stats).

  Raises:
    UserError: an unknown name.
  """
  apply = lookup(STATISTICS, 'kind of batch statistics', statistics)
  return apply(net, params, stats, source_images, target_images)


def first_stats(stats: PyTree, statistics: str) -> dict[str, PyTree]:
  """Returns the `State.stats` for two domains, given a network's initial statistics."""
  lookup(STATISTICS, 'kind of batch statistics', statistics)
  if statistics == 'domain_specific':
    return {'net': stats, 'net_source': stats}
  return {'net': stats}


def as_source(state: State) -> State:
  """Returns the State that predicts source images.

  If each domain has its own statistics or its own map of features
  (`lt_jax.surgeries.maps`), those of the source, called NAME_source, replace the
  target's, with which the network is deployed. An average of parameters
  (`lt_jax.method.ema`) has no source version and predicts as deployed.
  """

  def of_source(tree: dict[str, PyTree]) -> dict[str, PyTree]:
    return {name: tree.get(f'{name}_source', value) for name, value in tree.items()}

  return state.replace(stats=of_source(state.stats), memory=of_source(state.memory))


class Term(NamedTuple):
  """What a method for two domains adds to the source's objective.

  Attributes:
    value: (params, source outputs, target outputs, step) -> (value (), metrics), where
      params are those of all players.
    reads: outputs -> {player: input of its network}, for the players other than 'net'.
    draws: (key, outputs) -> arrays by name, drawn once or filled by a surgery. They are
      kept in `State.memory` and passed to `value` among the parameters.
    tells: (params, outputs) -> what predictions contain besides the network's outputs.
      The parameters are those that `value` gets.
  """

  value: Callable[[PyTree, Outputs, Outputs, jax.Array], tuple[jax.Array, Metrics]]
  reads: Callable[[Outputs], dict[str, jax.Array]] = lambda outputs: {}
  draws: Callable[[jax.Array, Outputs], dict[str, PyTree]] = lambda key, outputs: {}
  tells: Callable[[PyTree, Outputs], Outputs] = lambda params, outputs: {}


def begin(
  net: Network,
  optimizer: Optimizer,
  reads: Callable[[Outputs], dict[str, PyTree]],
  *,
  statistics: str,
  players: Mapping[str, Player],
  draws: Callable[[jax.Array, Outputs], dict[str, PyTree]] = lambda key, outputs: {},
) -> Callable[[jax.Array, Mapping[str, Batch]], State]:
  """Returns the `init` of a method for two domains.

  Args:
    net: see `adapt`.
    optimizer: optimiser of the players `{'net': params}`.
    reads: see `Term`.
    statistics: a key of `STATISTICS`.
    players: the other players.
    draws: see `Term`.
  """

  def init(key: jax.Array, batches: Mapping[str, Batch]) -> State:
    images = batches['train']['image'][:1]
    params, stats = init_net(net, named_key(key, 'init', 0), images)
    outputs = jax.eval_shape(
      lambda: forward(net, params, stats, images, train=False)[0]
    )
    params, opt = {'net': params}, optimizer.init({'net': params})
    for name, shape in jax.eval_shape(reads, outputs).items():
      own_key = named_key(key, f'init_{name}', 0)
      read = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shape)
      made = players[name].net.init(own_key, read)
      own = {name: made['params']}
      params, opt = params | own, opt | players[name].optimizer.init(own)
    state = first_state(key, params, first_stats(stats, statistics), opt)
    return state.replace(memory=draws(named_key(key, 'draws', 0), outputs))

  return init


def beside(
  init: Callable[[jax.Array, Mapping[str, Batch]], State],
  net: Network,
  *names: str,
) -> Callable[[jax.Array, Mapping[str, Batch]], State]:
  """Returns an `init` with additional frozen networks of the same shape.

  Surgeries fill them.

  Args:
    init: the `init` of everything else.
    net: the network.
    *names: names of the additional ones in `params` and `stats`.
  """

  def extended(key: jax.Array, batches: Mapping[str, Batch]) -> State:
    state, images = init(key, batches), batches['train']['image']
    for name in names:
      params, stats = init_net(net, named_key(key, f'init_{name}', 0), images)
      state = state.replace(
        params={**state.params, name: params}, stats={**state.stats, name: stats}
      )
    return state

  return extended


def held(
  params: PyTree, optimizer: Optimizer, players: Mapping[str, Player]
) -> dict[str, PyTree]:
  """Returns all parameters, without gradients where the learning rate is zero."""
  found = optimizer.held({'net': params['net']})
  for name, player in players.items():
    found |= player.optimizer.held({name: params[name]})
  return found


def update_all(
  state: State,
  grads: Mapping[str, PyTree],
  optimizer: Optimizer,
  players: Mapping[str, Player],
) -> tuple[State, Metrics]:
  """Updates the network and some other players, each with its own optimiser.

  Returns:
    (state, the metrics of `update` for the network).
  """
  state, norms = update(state, {'net': grads['net']}, optimizer)
  for name, player in players.items():
    state, _ = update(state, {name: grads[name]}, player.optimizer)
  return state, norms


def adapt(
  net: Network,
  optimizer: Optimizer,
  objective: Objective,
  term: Term,
  *,
  statistics: str,
  players: Mapping[str, Player] | None = None,
) -> Method:
  """Descends the source's objective plus a term over both domains, in one pass.

  The batches are 'train', from the source, and 'target', which needs no labels. The
  metric 'loss' is the source's objective.

  Args:
    net: network that returns a dict with 'logits', 'features' and other named layers.
    optimizer: optimiser of the players `{'net': params}`.
    objective: (outputs, batch, step) -> (value, metrics), of the source, see
      `lt_jax.methods.supervised.make_objective`.
    term: what the method adds to it.
    statistics: how the domains share batch normalisation, a key of `STATISTICS`.
    players: other players that the same gradient updates, each with its own optimiser.

  Raises:
    UserError: unknown statistics.
  """
  players = players or {}
  lookup(STATISTICS, 'kind of batch statistics', statistics)

  def loss(params: PyTree, state: State, batches: Mapping[str, Batch]):
    params = held(params, optimizer, players)
    batch, target_images = batches['train'], batches['target']['image']
    source, target, stats = forward_pair(
      net,
      params['net'],
      state.stats,
      batch['image'],
      target_images,
      statistics=statistics,
    )
    value, metrics = objective(source, batch, state.step)
    added, others = term.value(state.memory | params, source, target, state.step)
    return value + added, (stats, {'loss': mean_metric(value), **metrics, **others})

  def step(state: State, batches: Mapping[str, Batch]) -> tuple[State, Metrics]:
    grads, (stats, metrics) = jax.grad(loss, has_aux=True)(state.params, state, batches)
    state, norms = update_all(state, grads, optimizer, players)
    return tick(state.replace(stats=stats)), metrics | norms

  init = begin(
    net,
    optimizer,
    term.reads,
    statistics=statistics,
    players=players,
    draws=term.draws,
  )
  deployed = predictor(net)

  def predict(state: State, images: jax.Array) -> Outputs:
    outputs = deployed(state, images)
    return outputs | term.tells(state.memory | state.params, outputs)

  return Method(init, step, predict)
