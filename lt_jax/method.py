"""The contract: a learning method is three pure functions.

  init(key, batches) -> State              the first state
  step(state, batches) -> (State, metrics) one update
  predict(state, images) -> Outputs        evaluation mode

`batches` is a dict of named batches, one per stream: {'train': {'image': (B, H, W, 3)
float32, 'label': (B,) int32}, ...}. `metrics` maps a name to a pair (sum, count) of
arrays of any shape. The loop adds them up over a log interval and divides: scalars
become columns of metrics.jsonl, vectors go to files of their own. `Outputs` is a dict:
'logits' (B, C), 'features' (B, D) and, if the method has them, 'known_score' (B,),
which is higher for images of known classes, and 'is_unknown' (B,), its own rule for
rejecting an image.

The training loop knows these three functions and nothing else. `State` has everything
that a method needs to resume; constants are closed over.

A player is anything with its own parameters that an optimiser updates: the network,
'net', and whatever learns beside it, such as a discriminator. Parameters, statistics
and optimiser states are dicts by player. A step calls `update` once for each optimiser,
then `tick` once.
"""

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from lt_jax.errors import UserError, suggest
from lt_jax.optim import Optimizer

PyTree = Any
Network = nn.Module
Batch = Mapping[str, jax.Array]
Outputs = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]


@struct.dataclass
class State:
  """Everything that changes during training, which is also all that is checkpointed.

  Attributes:
    step: () int32, the number of updates made: the only clock. Learning rates, class
      weights, samplers and random keys are functions of it.
    key: the root random key of the run; never split, see `named_key`.
    params: player -> parameters, which gradients update, such as {'net': ...}.
    stats: player -> batch statistics.
    opt: player -> optimiser state.
    memory: whatever else a method remembers, such as an average of the parameters.
  """

  step: jax.Array
  key: jax.Array
  params: dict[str, PyTree]
  stats: dict[str, PyTree]
  opt: dict[str, PyTree]
  memory: dict[str, PyTree]


class Player(NamedTuple):
  """A network that learns beside the main one, see `lt_jax.players`.

  Attributes:
    net: a Linen module.
    optimizer: updates {name: params}; its rules match paths 'name/path'.
  """

  net: Network
  optimizer: Optimizer


class Method(NamedTuple):
  """A learning method: a tuple of pure functions, like an optimiser in optax."""

  init: Callable[[jax.Array, Mapping[str, Batch]], State]
  step: Callable[[State, Mapping[str, Batch]], tuple[State, Metrics]]
  predict: Callable[[State, jax.Array], Outputs]


def named_key(key: jax.Array, name: str, step: jax.Array | int) -> jax.Array:
  """Returns the random key of one use at one step: fold_in(fold_in(key, name), step).

  Args:
    key: `State.key`; with S replicas (S,), one for each.
    name: what the key is for; every use has its own name.
    step: `State.step`, so that a resumed run draws what an uninterrupted one draws.
  """
  fold_in = jax.vmap(jax.random.fold_in, (0, None)) if key.ndim else jax.random.fold_in
  return fold_in(fold_in(key, zlib.crc32(name.encode())), step)


def init_net(net: Network, key: jax.Array, images: jax.Array) -> tuple[PyTree, PyTree]:
  """Returns the first (params, stats) of a network; `stats` may be empty."""
  variables = net.init(key, images[:1], train=False)
  return variables['params'], variables.get('batch_stats', {})


def forward(
  net: Network,
  params: PyTree,
  stats: PyTree,
  images: jax.Array,
  *,
  train: bool,
  method: str = '',
  **memory: jax.Array,
) -> tuple[Outputs, PyTree]:
  """Applies a network, or a part of it, as a pure function of its parameters.

  Args:
    net: a Linen module that returns a dict of named outputs.
    params: its parameters, real or virtual.
    stats: its batch statistics.
    images: (B, H, W, 3) float32; for the head, features (B, D).
    train: normalise by the batch, and return updated statistics.
    method: 'head' applies only the head, to features; '' the whole network.
    **memory: what the head reads besides the features.

  Returns:
    (outputs, statistics).
  """
  outputs, updated = net.apply(
    {'params': params, 'batch_stats': stats},
    images,
    train=train,
    **memory,
    method=f'apply_{method}' if method else None,
    mutable=['batch_stats'] if train else [],
  )
  return outputs, updated.get('batch_stats', stats) if train else stats


def predictor(net: Network) -> Callable[[State, jax.Array], Outputs]:
  """Returns the `predict` of a method that uses the network as trained."""

  def predict(state: State, images: jax.Array) -> Outputs:
    return forward(net, state.params['net'], state.stats['net'], images, train=False)[0]

  return predict


def first_state(
  key: jax.Array,
  params: Mapping[str, PyTree],
  stats: Mapping[str, PyTree],
  opt: Mapping[str, PyTree],
) -> State:
  """Returns the State before the first step.

  Args:
    key: the root key.
    params: player -> parameters.
    stats: player -> batch statistics, for players that have any.
    opt: player -> optimiser state, as `Optimizer.init` returns it.
  """
  return State(
    step=jnp.zeros((), jnp.int32),
    key=key,
    params=dict(params),
    stats=dict(stats),
    opt=dict(opt),
    memory={},
  )


def update(
  state: State, grads: Mapping[str, PyTree], optimizer: Optimizer
) -> tuple[State, Metrics]:
  """Updates some players; leaves the others and the clock unchanged.

  Args:
    state: the State before the update.
    grads: player -> gradients, for the players to update.
    optimizer: an optimiser of these players, and perhaps of others.

  Returns:
    (state, {'grad_norm', 'learning_rate'}); the metrics appear in every log.
  """
  params, opt = optimizer.update(grads, state.opt, state.params, state.step)
  metrics = {
    'grad_norm': mean_metric(optax.tree.norm(grads)),
    'learning_rate': mean_metric(optimizer.learning_rate(state.step)),
  }
  return state.replace(params=state.params | params, opt=state.opt | opt), metrics


def update_where(
  state: State,
  grads: Mapping[str, PyTree],
  optimizer: Optimizer,
  chosen: Callable[[str, Sequence[str]], bool],
) -> tuple[State, Metrics]:
  """Updates some parameters of some players; the rest keep their optimiser state too.

  Args:
    state: the State before the update.
    grads: player -> gradients; those of other parameters are not used.
    optimizer: an optimiser of these players.
    chosen: (player, path within it, such as ('head', 'kernel')) -> whether to update
      that parameter.

  Returns:
    (state, the metrics of `update`).
  """
  moved, metrics = update(state, grads, optimizer)

  def pick(path: tuple, before: jax.Array, after: jax.Array) -> jax.Array:
    player, *inside = (
      key.key for key in path if isinstance(key, jax.tree_util.DictKey)
    )
    return after if chosen(player, inside) else before

  return moved.replace(
    params=jax.tree.map_with_path(pick, state.params, moved.params),
    opt=jax.tree.map_with_path(pick, state.opt, moved.opt),
  ), metrics


def tick(state: State) -> State:
  """Advances the clock by one; called once at the end of every step."""
  return state.replace(step=state.step + 1)


def named_players(players: Mapping[str, Player], *names: str) -> tuple[Player, ...]:
  """Returns the players of a method, in the order of their names.

  Args:
    players: the players that the config describes.
    *names: the players that the method has.

  Raises:
    UserError: a player is missing, or the method does not use it.
  """
  for name in players:
    if name not in names:
      raise UserError(f'the method has no player {name!r}{suggest(name, names)}')
  for name in names:
    if name not in players:
      raise UserError(f'the method needs a player {name!r}: set players.{name}')
  return tuple(players[name] for name in names)


def check_streams(streams: Collection[str], *needed: str) -> None:
  """Checks that the streams are those that a method reads, besides 'train'.

  Raises:
    UserError: a stream is missing, or the method does not read it.
  """
  for name in needed:
    if name not in streams:
      raise UserError(f'the method reads a stream {name!r}: set streams.{name}')
  for name in streams:
    if name not in ('train', *needed):
      raise UserError(f'the method does not read the stream {name!r}')


def mean_metric(value: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns a scalar of this step as a metric: (value, 1)."""
  return value, jnp.ones((), jnp.float32)


# Wrappers: functions Method -> Method that change every method in the same way.


def ema(method: Method, *, decay: float) -> Method:
  r"""Predicts with an exponential moving average of parameters and statistics.

  .. math::
    \bar\theta_t = \frac{1 - d}{1 - d^t} \sum_{k=1}^{t} d^{\,t-k}\, \theta_k

  over the t steps of this stage. The sum is in `state.memory['ema']` and starts at
  zero, so it never holds initial values that a surgery has since replaced; before the
  first step the parameters themselves are used.

  Args:
    method: the method to wrap.
    decay: d, in [0, 1).

  Raises:
    UserError: the decay is out of range.
  """
  if not 0 <= decay < 1:
    raise UserError(f'ema: decay must be in [0, 1), got {decay}')

  def visited(state: State) -> PyTree:
    return {'params': state.params['net'], 'stats': state.stats['net']}

  def init(key, batches):
    state = method.init(key, batches)
    memory = {'sum': jax.tree.map(jnp.zeros_like, visited(state)), 't': jnp.int32(0)}
    return state.replace(memory={**state.memory, 'ema': memory})

  def step(state, batches):
    old = state.memory['ema']
    state, metrics = method.step(state, batches)
    total = jax.tree.map(
      lambda s, x: decay * s + (1.0 - decay) * x, old['sum'], visited(state)
    )
    memory = {**state.memory, 'ema': {'sum': total, 't': old['t'] + 1}}
    return state.replace(memory=memory), metrics

  def predict(state, images):
    memory = state.memory['ema']
    t = memory['t']
    share = jnp.where(t > 0, 1.0 - decay ** t.astype(jnp.float32), 1.0)
    mean = jax.tree.map(
      lambda s, x: jnp.where(t > 0, s / share, x), memory['sum'], visited(state)
    )
    return method.predict(
      state.replace(
        params={**state.params, 'net': mean['params']},
        stats={**state.stats, 'net': mean['stats']},
      ),
      images,
    )

  return Method(init, step, predict)


WRAPPERS = {'ema': ema}
