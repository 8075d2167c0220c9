r"""Learning weights of training examples from a small balanced set.

Each training step is rehearsed: the network takes a virtual step on the weighted
training losses and is then evaluated on a balanced meta batch. The gradient of that
meta loss with respect to the weights, or to the network that makes them, says how to
weight.

.. math::
  \theta'(w) = U(\theta, \nabla_\theta F(\ell(\theta), w)), \qquad
  \nabla_w M(\theta'(w))

U is an optimiser's update, F the weighted training objective as a function of the
losses l, and M the mean cross-entropy on the meta batch. Since F depends on the network
only through l,

.. math::
  \nabla_w M = \nabla_w \langle \partial F / \partial \ell,\; J u \rangle, \qquad
  u = (\partial U / \partial g)^T\, \nabla M(\theta'), \qquad
  J = \partial \ell / \partial \theta

and J u, the change of every training loss along u, takes one forward-mode pass, without
second derivatives of the network. `by_jvp` computes this, `by_unrolling` the
definition; they agree up to rounding.

Batch normalisation is in training mode in every pass, in the network's groups (one,
unless it normalises per device or ghost batch), and frozen statistics stay frozen.
Running statistics come from the training batch at the real parameters.
"""

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from lt_jax.class_weights import inverse_effective_number, weights_of
from lt_jax.errors import UserError, lookup
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
  first_state,
  forward,
  init_net,
  mean_metric,
  named_key,
  named_players,
  predictor,
  tick,
  update,
)
from lt_jax.methods.supervised import Loss, batch_metrics, by_class
from lt_jax.optim import Optimizer

# The meta gradient for any losses, objective, virtual step and meta loss.


class Losses(NamedTuple):
  """Training losses l at parameters theta, and their derivative J as two linear maps.

  Attributes:
    function: theta -> (l (B,), aux).
    theta: the parameters.
    values: l (B,).
    aux: whatever else the pass returned.
    pull: (B,) -> J^T a, the gradient of sum_i a_i l_i.
    push: a tree like theta -> (B,), J u: the change of every loss along u.
  """

  function: Callable[[PyTree], tuple[jax.Array, Any]]
  theta: PyTree
  values: jax.Array
  aux: Any
  pull: Callable[[jax.Array], PyTree]
  push: Callable[[PyTree], jax.Array]


def shared(function: Callable, theta: PyTree) -> Losses:
  """Makes one forward pass and uses its intermediate values for every derivative."""
  values, push, aux = jax.linearize(function, theta, has_aux=True)
  transpose = jax.linear_transpose(push, theta)
  return Losses(function, theta, values, aux, lambda a: transpose(a)[0], push)


def separate(function: Callable, theta: PyTree) -> Losses:
  """Makes a forward pass for every derivative, so that none is kept for another.

  A step that learns takes three more forward passes than `shared`, but only the memory
  of a plain step: what a pass stores for its derivative is not held during the meta
  pass.
  """

  def pull(a: jax.Array) -> PyTree:
    _, back, _ = jax.vjp(function, _after(theta, a), has_aux=True)
    return back(a)[0]

  def push(u: PyTree) -> jax.Array:
    return jax.jvp(lambda t: function(t)[0], (_after(theta, u),), (u,))[1]

  return Losses(function, theta, *function(theta), pull, push)


def _after(theta: PyTree, done: PyTree) -> PyTree:
  """Returns theta unchanged, once `done` has been computed.

  Adds a zero that depends on one element of each leaf of `done`; a leaf is always
  computed whole. XLA would merge equal forward passes into one, but cannot tell that
  these are equal.
  """
  ends = [leaf.ravel()[0] for leaf in jax.tree.leaves(done)]
  zero = jnp.minimum(jnp.abs(sum(ends)), 0)
  return jax.tree.map(lambda x: x + zero.astype(x.dtype), theta)


Objective = Callable[[jax.Array, PyTree], jax.Array]
"""F: (losses (B,), weights) -> ()."""


def by_jvp(
  losses: Losses,
  objective: Objective,
  move: Callable[[PyTree], PyTree],
  meta_loss: Callable[[PyTree], jax.Array],
  weights: PyTree,
  *,
  still: bool = False,
) -> tuple[jax.Array, PyTree]:
  """Returns the meta loss after the virtual step, and its gradient by the weights.

  Args:
    losses: losses of the training batch at theta.
    objective: F; the virtual step follows its gradient by theta.
    move: U, from that gradient to theta'.
    meta_loss: M, theta' -> ().
    weights: what is learned: weights of examples, or parameters that make them.
    still: F and its gradient are zero at these weights, whatever the losses.

  Returns:
    (M(theta'), its gradient, a tree like `weights`).
  """
  if still:
    grads = jax.tree.map(jnp.zeros_like, losses.theta)
  else:
    grads = losses.pull(jax.grad(objective)(losses.values, weights))
  virtual, back = jax.vjp(move, grads)
  value, slope = jax.value_and_grad(meta_loss)(virtual)
  change = losses.push(back(slope)[0])

  def directional(weights: PyTree) -> jax.Array:
    along = partial(objective, weights=weights)
    return jax.jvp(along, (losses.values,), (change,))[1]

  return value, jax.grad(directional)(weights)


def by_unrolling(
  losses: Losses,
  objective: Objective,
  move: Callable[[PyTree], PyTree],
  meta_loss: Callable[[PyTree], jax.Array],
  weights: PyTree,
  *,
  still: bool = False,
) -> tuple[jax.Array, PyTree]:
  """Returns the same as `by_jvp`, with `jax.grad` through the virtual step."""
  del still

  def outcome(weights: PyTree) -> jax.Array:
    def trained(theta: PyTree) -> jax.Array:
      return objective(losses.function(theta)[0], weights)

    return meta_loss(move(jax.grad(trained)(losses.theta)))

  return jax.value_and_grad(outcome)(weights)


ROUTES = {'jvp': by_jvp, 'unrolled': by_unrolling}


# Shared by the methods.


def _descend(optimizer: Optimizer, state: State, params: PyTree, grads: PyTree):
  """Takes a step of plain gradient descent at the step's learning rate.

  It moves what `meta_layers` names, even if the optimiser freezes it.
  """
  rate = optimizer.learning_rate(state.step)
  return jax.tree.map(lambda p, g: p - (rate * g).astype(p.dtype), params, grads)


def _update(optimizer: Optimizer, state: State, params: PyTree, grads: PyTree):
  """Takes the step that the run's optimiser would, with its momentum or moments."""
  return optimizer.update(grads, state.opt, params, state.step)[0]


VIRTUAL = {'sgd': _descend, 'optimizer': _update}
"""Virtual steps: (optimizer, State, params, grads) -> params."""

LAYERS = {'all': '.*', 'head': 'net/head/.*'}
"""Names for patterns of the parameters that the virtual step moves."""


class Weighing(NamedTuple):
  """How a method weights examples.

  Attributes:
    variables: (State, Batch) -> weights, the point where the meta gradient is taken.
    objective: (losses (B,), weights, State, Batch) -> (), what the virtual step
      descends.
    weigh: (gradient, losses (B,), State, Batch) -> weights (B,). Training descends
      sum_i weights_i losses_i / B. In a step without a meta batch the gradient is None.
    prior: (State, Batch) -> (B,), the weights before learning, equal for all examples
      of a class.
    init: key -> ({player: params}, {player: opt_state}) for the players that learn to
      weight.
    learn: (gradient, State) -> State, updates those players before they weight.
    still: the objective is zero at `variables`, whatever the losses.
    mean_one: the weights of a batch have mean one, and so have those they are compared
      with.
  """

  variables: Callable[[State, Batch], PyTree]
  objective: Callable[[jax.Array, PyTree, State, Batch], jax.Array]
  weigh: Callable[..., jax.Array]
  prior: Callable[[State, Batch], jax.Array]
  init: Callable[[jax.Array], tuple[dict, dict]] = lambda key: ({}, {})
  learn: Callable[[PyTree, State], State] = lambda gradient, state: state
  still: bool = False
  mean_one: bool = False


class Reweighted(NamedTuple):
  """A method that learns weights, and how it weights.

  Attributes:
    method: the method.
    weigh: (State, batches) -> (weights (B,), weights before learning (B,)), with which
      a step would train.
  """

  method: Method
  weigh: Callable[[State, Mapping[str, Batch]], tuple[jax.Array, jax.Array]]


def _reweighted(
  weighing: Weighing,
  net: Network,
  optimizer: Optimizer,
  loss: Loss,
  *,
  streams: Collection[str],
  route: str = 'jvp',
  virtual: str = 'sgd',
  meta_layers: str = 'all',
  low_memory: bool = False,
) -> Reweighted:
  """Trains a network on losses that are reweighted in every step.

  Args:
    weighing: how they are weighted.
    net: the network.
    optimizer: optimiser of the players `{'net': params}`.
    loss: (outputs, batch) -> (B,).
    streams: names of the streams; it reads 'meta', a balanced set.
    route: a key of `ROUTES`.
    virtual: a key of `VIRTUAL`.
    meta_layers: a key of `LAYERS`, or a regular expression for whole paths, such as
      'net/trunk/stage3.*': the virtual step only moves these parameters. For a linear
      head the forward-mode pass reduces to a closed form, r_i . (G^T h_i + g), with
      features h, residuals r and the head's meta gradient (G, g).
    low_memory: use `separate` derivatives, not `shared`.

  Raises:
    UserError: no meta set, or an invalid option; in `init`, a pattern that matches no
      parameter, or a loss without a forward-mode rule.
  """
  check_streams(streams, 'meta')
  gradient_by = lookup(ROUTES, 'route', route)
  virtual_step = lookup(VIRTUAL, 'virtual step', virtual)
  if low_memory and route != 'jvp':
    raise UserError(f"low_memory needs the route 'jvp', not {route!r}")
  differentiated = separate if low_memory else shared

  def outputs_of(state: State, params: PyTree, batch: Batch) -> tuple[Outputs, PyTree]:
    stats = state.stats['net']
    return forward(net, params['net'], stats, batch['image'], train=True)

  def losses_of(state: State, batch: Batch, params: PyTree):
    outputs, stats = outputs_of(state, params, batch)
    return loss(outputs, batch), (outputs, stats)

  def meta_loss_of(state: State, meta: Batch, params: PyTree) -> jax.Array:
    logits = outputs_of(state, params, meta)[0]['logits']
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, meta['label'])
    return losses.mean()

  def init(key: jax.Array, batches: Mapping[str, Batch]) -> State:
    net_params, stats = init_net(
      net, named_key(key, 'init', 0), batches['train']['image']
    )
    params = {'net': net_params}
    learning, opt = weighing.init(named_key(key, 'init_weighing', 0))
    opt |= optimizer.init(params)
    state = first_state(key, params | learning, {'net': stats}, opt)
    _chosen(params, meta_layers)
    if route == 'jvp':
      _check_forward_mode(loss, partial(outputs_of, state), params, batches['train'])
    return state

  def meta_gradient(
    state: State, batches: Mapping[str, Batch], whole: Losses
  ) -> tuple[jax.Array, PyTree]:
    batch, meta, params = batches['train'], batches['meta'], whole.theta
    take, put = _chosen(params, meta_layers)
    part = whole
    if len(jax.tree.leaves(take(params))) < len(jax.tree.leaves(params)):
      part = differentiated(lambda t: whole.function(put(t, params)), take(params))

    def move(grads: PyTree) -> PyTree:
      still = jax.tree.map(jnp.zeros_like, params)
      return take(virtual_step(optimizer, state, params, put(grads, still)))

    return gradient_by(
      part,
      lambda values, weights: weighing.objective(values, weights, state, batch),
      move,
      lambda theta: meta_loss_of(state, meta, put(theta, params)),
      weighing.variables(state, batch),
      still=weighing.still,
    )

  def weighed(state: State, batches: Mapping[str, Batch]):
    """Returns the losses, their weights, and the State after players have learned."""
    batch, params = batches['train'], {'net': state.params['net']}
    losses = differentiated(partial(losses_of, state, batch), params)
    due = 'meta' in batches
    meta_loss, gradient = meta_gradient(state, batches, losses) if due else (0.0, None)
    if due:
      state = weighing.learn(gradient, state)
    weights = weighing.weigh(gradient, losses.values, state, batch)
    return losses, weights, state, meta_loss

  def step(state: State, batches: Mapping[str, Batch]) -> tuple[State, Metrics]:
    batch, due = batches['train'], 'meta' in batches
    losses, weights, state, meta_loss = weighed(state, batches)
    grads = losses.pull(weights / len(weights))
    prior = weighing.prior(state, batch)
    state, norms = update(state, grads, optimizer)
    outputs, stats = losses.aux
    metrics = {
      'loss': mean_metric(jnp.dot(weights, losses.values) / len(weights)),
      'meta_loss': (jnp.asarray(meta_loss), jnp.float32(due)),
      **norms,
      **batch_metrics(outputs, batch, losses.values),
      **weight_metrics(
        weights,
        prior,
        batch['label'],
        outputs['logits'].shape[-1],
        mean_one=weighing.mean_one,
      ),
    }
    return tick(state.replace(stats=state.stats | {'net': stats})), metrics

  def weigh(state: State, batches: Mapping[str, Batch]) -> tuple[jax.Array, jax.Array]:
    _, weights, state, _ = weighed(state, batches)
    prior = weighing.prior(state, batches['train'])
    return weights, prior / prior.mean() if weighing.mean_one else prior

  return Reweighted(Method(init, step, predictor(net)), weigh)


def _chosen(params: PyTree, layers: str) -> tuple[Callable, Callable]:
  """Returns functions (take, put) for the parameters that match a pattern.

  `take(tree)` lists their leaves, `put(leaves, tree)` sets them. If all parameters
  match, both work on whole trees.
  """
  pattern = LAYERS.get(layers, layers)
  paths = [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree.flatten_with_path(params)[0]
  ]
  try:
    here = [bool(re.fullmatch(pattern, path)) for path in paths]
  except re.error as error:
    raise UserError(f'meta_layers {layers!r}: {error}') from None
  if not any(here):
    raise UserError(f'meta_layers {layers!r} matches no parameter; one is {paths[0]!r}')
  if all(here):
    return lambda tree: tree, lambda leaves, tree: leaves

  def take(tree: PyTree) -> list[jax.Array]:
    return [x for x, chosen in zip(jax.tree.leaves(tree), here, strict=True) if chosen]

  def put(leaves: list[jax.Array], tree: PyTree) -> PyTree:
    old, treedef = jax.tree.flatten(tree)
    new = iter(leaves)
    return treedef.unflatten(
      [next(new) if chosen else x for x, chosen in zip(old, here, strict=True)]
    )

  return take, put


def _check_forward_mode(
  loss: Loss, outputs_of: Callable, params: PyTree, batch: Batch
) -> None:
  """Rejects a loss that forward mode cannot differentiate, before anything runs.

  JAX itself reports this only when a program is lowered.
  """
  shapes = jax.eval_shape(
    lambda params, batch: outputs_of(params, batch)[0], params, batch
  )

  batch = jax.eval_shape(lambda x: x, dict(batch))
  jax.eval_shape(loss, shapes, batch)  # its own errors show up here

  def change(outputs: Outputs, batch: Batch) -> jax.Array:
    return jax.jvp(lambda outputs: loss(outputs, batch), (outputs,), (outputs,))[1]

  try:
    jax.jit(change).lower(shapes, batch)
  except TypeError as error:
    raise UserError(
      "the loss has no forward-mode rule: set method.route to 'unrolled'; JAX says: "
      f'{str(error).splitlines()[0]}'
    ) from None


def weight_metrics(
  weights: jax.Array,
  prior: jax.Array,
  labels: jax.Array,
  num_classes: int,
  *,
  mean_one: bool = False,
) -> Metrics:
  """Returns the distribution of learned weights by class, and how much is learned.

  The spread is kept as moments about the prior, which is constant within a class, so
  that learned parts much smaller than the weights survive float32. `lt_jax.results`
  turns them into weights.npz.

  Args:
    weights: (B,).
    prior: (B,), the weights before learning, by class.
    labels: (B,).
    num_classes: C.
    mean_one: take the learned part as the difference from the prior divided by its mean
      over the batch, because weights with mean one have that scale.
  """
  expected = prior / prior.mean() if mean_one else prior
  learned = weights - expected
  moments = {
    'weight_prior': expected,
    'weight_learned': learned,
    'weight_about': weights - prior,
    'weight_about_square': (weights - prior) ** 2,
    'weight_negative': weights < 0,
  }
  return {
    **{name: by_class(x, labels, num_classes) for name, x in moments.items()},
    'learned_over_prior': (jnp.abs(learned).sum(), jnp.abs(expected).sum()),
  }


def _check_rate(name: str, rate: float) -> None:
  """Rejects a rate that is negative or not finite; 0 learns nothing, as a control."""
  if not 0 <= rate < float('inf'):
    raise UserError(f'{name} is {rate}; it must be a finite number, 0 or more')


# The methods. Each has the options of `_reweighted` besides its own.


def _method(weighing: Callable[..., Weighing]) -> Callable[..., Method]:
  """Turns a way of weighting into a method with the options of both in its signature.

  The attribute `weigh` of the method makes `Reweighted.weigh`.
  """
  own = inspect.signature(weighing).parameters
  core = dict(inspect.signature(_reweighted).parameters)
  del core['weighing']

  def factory(part: str) -> Callable[..., Any]:
    @functools.wraps(weighing)
    def made(net: Network, optimizer: Optimizer, loss: Loss, **options: Any) -> Any:
      here = {name: options.pop(name) for name in own if name in options}
      whole = _reweighted(weighing(**here), net, optimizer, loss, **options)
      return getattr(whole, part)

    made.__signature__ = inspect.Signature([*core.values(), *own.values()])
    return made

  method = factory('method')
  method.weigh = factory('weigh')
  return method


@_method
def meta_weight_net(
  *,
  counts: np.ndarray,
  players: Mapping[str, Player],
  normalise: bool = True,
  detach: bool = False,
) -> Weighing:
  r"""Meta-Weight-Net: a small network learns to map losses to weights.

  .. math::
    F(\ell, \Theta) = \sum_i \frac{v_i}{\sum_j v_j} \ell_i
    \text{ or } \frac1B \sum_i v_i \ell_i, \qquad v_i = V(\ell_i; \Theta)

  Each step first moves Theta along the meta gradient, then the network along the
  gradient of F with the new weights, held constant. V weights the losses in every step.

  Args:
    counts: (C,) training images, for the class-balanced weights in the logs. If weights
      are normalised, these have batch mean one too; otherwise V is in (0, 1), and only
      its differences between classes mean something.
    players: 'weight_net', V. Its optimiser follows the run's clock, even if some steps
      have no meta batch.
    normalise: divide weights by their sum (class imbalance) or by B (noise).
    detach: the virtual step treats weights as constants (noise) or differentiates
      through them too (class imbalance).

  Raises:
    UserError: the players are not exactly this one.

  Source: Shu et al., Meta-Weight-Net, arXiv 1902.07379, and the authors' two
  repositories, for class imbalance (the defaults; its optimiser is Nesterov momentum
  0.9 with decay 5e-4) and for noise.
  """
  (weight_net,) = named_players(players, 'weight_net')

  def init(key: jax.Array) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    params = {'weight_net': weight_net.net.init(key, jnp.zeros(1))['params']}
    return params, weight_net.optimizer.init(params)

  def learn(gradient: PyTree, state: State) -> State:
    return update(state, {'weight_net': gradient}, weight_net.optimizer)[0]

  def weights_of(losses: jax.Array, params: PyTree) -> jax.Array:
    """Returns V of the losses, with mean one if normalised."""
    v = weight_net.net.apply({'params': params}, losses)
    total = v.sum()
    return len(v) * v / jnp.where(total == 0, 1, total) if normalise else v

  def objective(losses, params, state, batch):
    del state, batch
    seen = lax.stop_gradient(losses) if detach else losses
    return jnp.dot(weights_of(seen, params), losses) / len(losses)

  def weigh(gradient, losses, state, batch):
    del gradient, batch
    return weights_of(losses, state.params['weight_net'])

  return Weighing(
    variables=lambda state, batch: state.params['weight_net'],
    objective=objective,
    weigh=weigh,
    prior=_balanced(counts),
    init=init,
    learn=learn,
    mean_one=normalise,
  )


@_method
def meta_reweight(
  *,
  class_weights: Callable[[jax.Array], jax.Array],
  eps_lr: float = 0.01,
  eps_scale: str = 'absolute',
  form: str = 'additive',
  prior: str = 'class_weights',
  clip: bool = False,
  normalise: bool = False,
) -> Weighing:
  r"""Example weights: a class prior plus a step along the meta gradient.

  .. math::
    \text{additive: } F = \sum_i (w_{y_i} + \epsilon_i)\, \ell_i, \qquad
    \text{multiplicative: } F = \frac1B \sum_i w_{y_i} (1 + \epsilon_i)\, \ell_i

  where eps is -tau times the meta gradient at eps = 0, computed anew in every step.
  Training descends the batch mean of the same weighted losses. With tau = 0, or in a
  step without a meta batch, this is training with the prior alone.

  It covers two papers. Jamal et al. use class weights as the prior and neither clip nor
  normalise. Ren et al. ("learning to reweight") have no prior, and clip and normalise:

  .. math::
    u = -\nabla_\epsilon M(\theta'(\epsilon))|_{\epsilon = 0}, \qquad
    a_i = B\, \frac{\max(u_i, 0)}{\sum_j \max(u_j, 0)}

  Without a prior, eps = 0 leaves theta' = theta under plain descent, and the virtual
  learning rate, like tau, cancels in the normalisation. If it is 0 (the first step of a
  linear warm-up), all weights are 0, but that step moves nothing anyway. Without a
  prior, a step without a meta batch weights all examples equally, which is our choice.

  Args:
    class_weights: w, step -> (C,). Without a prior they are only used in the logs, as a
      reference for the learned weights.
    eps_lr: tau. With the constants of Jamal et al., eps is tiny compared with w; the
      logs say how tiny (`learned_over_prior`).
    eps_scale: 'absolute', or 'relative', which divides the gradient by its largest
      absolute entry, so that tau is the largest |eps|. The latter is ours.
    form: 'additive' as in the released code of Jamal et al., or 'multiplicative' as in
      their paper. From the same theta', what they add differs by a factor of w^2 / B.
    prior: 'class_weights', or 'none', where the weights are eps alone.
    clip: set negative eps to 0.
    normalise: divide the weights of a batch by the mean of their absolute values. For
      clipped weights that is their mean, as in Ren et al. Without clipping the mean
      could be near 0, so absolute values are our choice. If all are 0 they stay 0.

  Raises:
    UserError: an unknown option, a negative rate, or the multiplicative form without a
      prior, where all weights would be 0.

  Sources: Jamal et al., Rethinking Class-Balanced Methods for Long-Tailed Visual
  Recognition, arXiv 2003.10780, and abdullahjamal/Longtail_DA, where the virtual
  learning rate drops one epoch later than the real one; Ren et al., Learning to
  Reweight Examples, arXiv 1803.09050, algorithm 1.
  """
  _check_rate('eps_lr', eps_lr)
  inner, outer = lookup(FORMS, 'form', form)
  scale = lookup(EPS_SCALES, 'eps_scale', eps_scale)
  from_nothing = lookup(FROM_NOTHING, 'prior', prior)
  if from_nothing and form == 'multiplicative':
    raise UserError("with form='multiplicative' and prior='none' all weights stay 0")

  def balanced(state: State, batch: Batch) -> jax.Array:
    return weights_of(class_weights(state.step), batch['label'])

  def base(state: State, batch: Batch) -> jax.Array:
    return 0.0 if from_nothing else balanced(state, batch)

  def objective(losses, eps, state, batch):
    return jnp.dot(inner(base(state, batch), eps), losses)

  def weigh(gradient, losses, state, batch):
    if gradient is None and from_nothing:
      return jnp.ones_like(losses)
    eps = jnp.zeros_like(losses) if gradient is None else -eps_lr * scale(gradient)
    weights = outer(base(state, batch), jnp.maximum(eps, 0) if clip else eps)
    return _mean_one(weights) if normalise else weights

  return Weighing(
    variables=lambda state, batch: jnp.zeros(len(batch['label'])),
    objective=objective,
    weigh=weigh,
    prior=balanced,
    still=from_nothing,
    mean_one=normalise,
  )


def _mean_one(weights: jax.Array) -> jax.Array:
  """Divides weights (B,) by the mean of their absolute values; zeros stay zeros."""
  total = jnp.abs(weights).sum()
  return len(weights) * (weights / jnp.where(total == 0, 1, total))


FROM_NOTHING = {'class_weights': False, 'none': True}
"""Prior of `meta_reweight` -> whether the weights are epsilon alone."""

FORMS = {
  'additive': (lambda w, eps: w + eps, lambda w, eps: w + eps),
  'multiplicative': (
    lambda w, eps: w * (1 + eps) / len(w),
    lambda w, eps: w * (1 + eps),
  ),
}
"""(coefficients of the virtual objective, weights of the training objective)."""

EPS_SCALES = {
  'absolute': lambda gradient: gradient,
  'relative': lambda gradient: gradient / jnp.maximum(jnp.abs(gradient).max(), 1e-30),
}


def _balanced(counts: np.ndarray) -> Callable[[State, Batch], jax.Array]:
  """Returns class-balanced weights to compare learned ones with."""
  weights = inverse_effective_number(np.maximum(counts, 1))
  return lambda state, batch: weights_of(weights, batch['label'])


WEIGHERS = {
  'meta_weight_net': meta_weight_net.weigh,
  'meta_reweight': meta_reweight.weigh,
}
"""Name of a method that learns weights -> the function that makes its `weigh`."""
