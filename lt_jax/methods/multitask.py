r"""Several tasks on one trunk: the classes, and further labels of images.

.. math:: J = \sum_k w_k L_k

The first task, 'label', is the classification that the network does anyway, with the
loss, class weights and reduction of the config. Each other task has a linear head on
the features, and uses further labels of the same images, or the images of its own
stream. Streams share the running averages of batch normalisation, or each has its own.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lt_jax.errors import UserError, check_options, lookup, suggest
from lt_jax.losses.tasks import KINDS, mean_of_valid
from lt_jax.method import (
  Batch,
  Method,
  Metrics,
  Network,
  Outputs,
  PyTree,
  State,
  first_state,
  forward,
  init_net,
  mean_metric,
  named_key,
  tick,
  update,
)
from lt_jax.methods.supervised import Objective
from lt_jax.models.heads import dense
from lt_jax.optim import Optimizer, sgd

LABEL = 'label'
"""The task that the network's own head learns."""

TAKEN = ('label', 'image', 'index', 'bad', 'mask', 'domain', 'weight')
"""Names in a batch that mean something else."""


class Head(NamedTuple):
  """A further task.

  Attributes:
    name: name of the task, and of its labels in the batch.
    kind: a key of `KINDS`.
    outputs: K.
    stream: the stream whose images it learns from.
  """

  name: str
  kind: str
  outputs: int
  stream: str = 'train'

  @property
  def key(self) -> str:
    """The name of its outputs."""
    return f'{self.kind}/{self.name}'

  @property
  def label(self) -> str:
    """The name of its labels in its stream; another stream has them as its labels."""
    return self.name if self.stream == 'train' else LABEL


def _head(*, kind: str, outputs: int = 1, stream: str = 'train') -> dict[str, Any]:
  """Returns the options of a head, which are checked against this signature."""
  return {'kind': kind, 'outputs': outputs, 'stream': stream}


def make_heads(heads: Mapping[str, Mapping[str, Any]]) -> tuple[Head, ...]:
  """Returns the further tasks that a config describes.

  Raises:
    UserError: an unknown kind or option, or a name that is taken.
  """
  made = []
  for name, options in heads.items():
    if name in TAKEN:
      raise UserError(f'heads.{name}: a batch uses this name for something else')
    check_options(f'heads.{name}', _head, options)
    head = Head(name, **_head(**options))
    lookup(KINDS, 'kind of task', head.kind)
    if head.outputs < 1:
      raise UserError(f'heads.{name}.outputs is {head.outputs}; it must be 1 or more')
    made.append(head)
  return tuple(made)


# Weightings of the tasks.


class Weighting(NamedTuple):
  """How tasks are weighted.

  Attributes:
    params: name -> initial value of learned parameters.
    memory: name -> array that is kept from step to step.
    combine: (losses (K,), params, memory) -> (objective (), weights (K,)).
    remember: (memory, losses (K,), step) -> memory after the step.
  """

  params: dict[str, jax.Array]
  memory: dict[str, jax.Array]
  combine: Callable[..., tuple[jax.Array, jax.Array]]
  remember: Callable[..., dict[str, jax.Array]]


def fixed(weights: jax.Array, halves: jax.Array, period: int) -> Weighting:
  """Uses the given weights."""
  del halves, period

  def combine(losses, params, memory):
    del params, memory
    return losses @ weights, weights

  return Weighting({}, {}, combine, lambda memory, losses, step: memory)


def uncertainty(weights: jax.Array, halves: jax.Array, period: int) -> Weighting:
  r"""Weights each task by a learned log variance.

  .. math:: \sum_k h_k e^{-s_k} L_k + \tfrac12 s_k

  with h = 1/2 for a regression and 1 for a classification. It may be negative. s starts
  at 0, moves at the network's learning rate and has no weight decay. Tasks with weight
  0 are left out.

  Source: Kendall et al., CVPR 2018, arXiv 1705.07115, section 3.2.
  """
  del period
  in_use = (weights > 0).astype(jnp.float32)
  factor = jnp.where(halves, 0.5, 1.0) * in_use

  def combine(losses, params, memory):
    del memory
    s = params['log_variance']
    learned = factor * jnp.exp(-s)
    return losses @ learned + 0.5 * (s * in_use).sum(), learned

  first = {'log_variance': jnp.zeros(len(weights))}
  return Weighting(first, {}, combine, lambda memory, losses, step: memory)


def dynamic(weights: jax.Array, halves: jax.Array, period: int) -> Weighting:
  r"""Gives more weight to tasks whose loss falls slowly.

  .. math::
    w_k \propto \exp\left(\frac{L_k^{(t-1)}}{L_k^{(t-2)}} \Big/ T\right), \qquad T = 2

  with mean losses over the last two periods. In the first two periods the given weights
  are used. The sum of the weights stays the same.

  Source: dynamic weight averaging, Liu et al., CVPR 2019, arXiv 1803.10704, equation 6,
  where a period is an epoch.
  """
  del halves
  in_use = weights > 0
  total = weights.sum()
  none = jnp.zeros(len(weights))
  memory = {'sum': none, 'last': none, 'before': none}

  def combine(losses, params, memory):
    del params
    known = (memory['before'] > 0) | ~in_use
    ratio = memory['last'] / jnp.where(memory['before'] > 0, memory['before'], 1)
    share = jax.nn.softmax(jnp.where(in_use, ratio / 2.0, -jnp.inf))
    now = jnp.where(known.all(), total * share, weights)
    return losses @ now, now

  def remember(memory, losses, step):
    added = memory['sum'] + losses
    ends = (step + 1) % period == 0
    return {
      'sum': jnp.where(ends, 0, added),
      'last': jnp.where(ends, added / period, memory['last']),
      'before': jnp.where(ends, memory['last'], memory['before']),
    }

  return Weighting({}, memory, combine, remember)


WEIGHTINGS = {'fixed': fixed, 'uncertainty': uncertainty, 'dynamic': dynamic}

STATISTICS: dict[str, Callable[[str], str]] = {
  'shared': lambda stream: 'net',
  'by_stream': lambda stream: 'net' if stream == 'train' else f'net_{stream}',
}
"""Name -> stream -> the key of its running averages in `State.stats`."""


def multitask(
  net: Network,
  optimizer: Optimizer,
  *,
  objective: Objective,
  heads: tuple[Head, ...],
  streams: Collection[str],
  weighting: str = 'fixed',
  weights: Mapping[str, float] | None = None,
  only: str = '',
  period: int = 100,
  statistics: str = 'shared',
) -> Method:
  """Trains several tasks at once.

  Args:
    net: returns 'logits' and 'features'.
    optimizer: for the players 'net' and 'heads'.
    objective: of the network's own task.
    heads: the further tasks.
    streams: names of the streams.
    weighting: a key of `WEIGHTINGS`.
    weights: task -> fixed weight; tasks that are not named have the weight 1 / K.
    only: for a control, the single task to learn; the others have weight 0.
    period: number of steps after which 'dynamic' updates the weights.
    statistics: a key of `STATISTICS`. In training a batch is always normalised by
      itself; with 'by_stream' the heads of a stream predict with averages over its own
      batches, which takes another pass through the network for each such stream.

  Raises:
    UserError: an unknown task, weighting or kind of statistics, a negative weight, or a
      stream that is missing or not read.
  """
  names = (LABEL, *(head.name for head in heads))
  given = {name: 1 / len(names) for name in names}
  for name, weight in (weights or {}).items():
    if name not in given:
      raise UserError(f'method.weights: no task {name!r}{suggest(name, names)}')
    if not weight >= 0:
      raise UserError(f'method.weights.{name} is {weight}; it must be 0 or more')
    given[name] = weight
  if only:
    if only not in names:
      raise UserError(f'method.only: no task {only!r}{suggest(only, names)}')
    given = {name: float(name == only) for name in names}
  if not any(given.values()) or period < 1:
    raise UserError('method.weights: at least one task must have a weight above 0')
  read = ['train', *dict.fromkeys(head.stream for head in heads)]
  for stream in read:
    if stream not in streams:
      raise UserError(f'a head reads the stream {stream!r}: set streams.{stream}')
  for stream in streams:
    if stream not in read:
      raise UserError(f'no head reads the stream {stream!r}')
  place_of = lookup(STATISTICS, 'kind of batch statistics', statistics)
  halves = jnp.array([False, *(KINDS[head.kind].half for head in heads)])
  weigh = lookup(WEIGHTINGS, 'weighting', weighting)(
    jnp.array([given[name] for name in names], jnp.float32), halves, period
  )
  learner = sgd(optimizer.learning_rate)

  def init(key: jax.Array, batches: Mapping[str, Batch]) -> State:
    images = batches['train']['image'][:1]
    params, stats = init_net(net, named_key(key, 'init', 0), images)
    width = forward(net, params, stats, images, train=False)[0]['features'].shape[-1]
    own = {'net': params}
    if heads:
      own['heads'] = {
        head.name: _linear(head, width).init(
          named_key(key, f'head {head.name}', 0), jnp.zeros((1, width))
        )['params']
        for head in heads
      }
    opt = optimizer.init(own)
    if weigh.params:
      weighed = {'weights': weigh.params}
      own, opt = own | weighed, opt | learner.init(weighed)
    state = first_state(key, own, {place_of(stream): stats for stream in read}, opt)
    return state.replace(memory={'weights': weigh.memory} if weigh.memory else {})

  def losses_of(params: PyTree, stats: PyTree, batches, step: jax.Array):
    """Returns (losses (K,), (statistics, metrics))."""
    losses, metrics = {}, {}
    for stream in read:
      batch = batches[stream]
      place = place_of(stream)
      outputs, after = forward(
        net, params['net'], stats[place], batch['image'], train=True
      )
      stats = {**stats, place: after}
      if stream == 'train':
        losses[LABEL], metrics = objective(outputs, batch, step)
      for head in heads:
        if head.stream == stream:
          found = _apply(head, params, outputs)
          each, valid = KINDS[head.kind].losses(found, _labels(head, batch))
          losses[head.name] = mean_of_valid(each, valid)
    return jnp.stack([losses[name] for name in names]), (stats, metrics)

  def step(state: State, batches: Mapping[str, Batch]) -> tuple[State, Metrics]:
    memory = state.memory.get('weights', {})
    learned = state.params.get('weights', {})
    own = {k: v for k, v in state.params.items() if k != 'weights'}

    def total(own: PyTree, learned: PyTree):
      held = optimizer.held(own)
      losses, aux = losses_of(held, state.stats, batches, state.step)
      value, weights = weigh.combine(losses, learned, memory)
      return value, (losses, weights, *aux)

    (value, (losses, weights, stats, metrics)), (grads, of_weights) = (
      jax.value_and_grad(total, (0, 1), has_aux=True)(own, learned)
    )
    metrics = metrics | {'loss': mean_metric(value)}
    for place, name in enumerate(names):
      metrics[f'loss_{name}'] = mean_metric(losses[place])
      metrics[f'weight_of_{name}'] = mean_metric(weights[place])
    state, norms = update(state, grads, optimizer)
    if learned:
      state, _ = update(state, {'weights': of_weights}, learner)
    if memory:
      after = weigh.remember(memory, losses, state.step)
      state = state.replace(memory={**state.memory, 'weights': after})
    return tick(state.replace(stats=stats)), metrics | norms

  def predict(state: State, images: jax.Array) -> Outputs:
    params = state.params
    seen = {
      place: forward(net, params['net'], state.stats[place], images, train=False)[0]
      for place in dict.fromkeys(place_of(stream) for stream in read)
    }
    return seen['net'] | {
      head.key: _apply(head, params, seen[place_of(head.stream)]) for head in heads
    }

  return Method(init, step, predict)


def _linear(head: Head, width: int):
  return dense(head.outputs, inputs=width)


def _apply(head: Head, params: PyTree, outputs: Outputs) -> jax.Array:
  features = outputs['features']
  net = _linear(head, features.shape[-1])
  return net.apply({'params': params['heads'][head.name]}, features)


def _labels(head: Head, batch: Batch) -> jax.Array:
  if head.label not in batch:
    raise UserError(
      f'heads.{head.name}: the images of the stream {head.stream!r} have no labels '
      f'{head.label!r}{suggest(head.label, [n for n in batch if n not in TAKEN])}'
    )
  return batch[head.label]
