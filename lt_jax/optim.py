r"""Optimisers as functions of the step, and rules over parameters.

`State.step` is the only clock. An optimiser gets the step as an argument and scales its
updates by -learning_rate(step); it keeps no step counter of its own.

An optimiser updates players, dicts of trees by player, and keeps a state for each, so
that some can be updated while the others stay exactly as they are.

What depends on the parameter (weight decay, learning-rate multipliers, freezing) is a
list of rules `(pattern, value)` over paths 'player/...'; the first full match wins:
`(('net/head/bias', 0.0), ('.*', 2e-4))`. A single number applies to all parameters.
Two further options are for fine-tuning: rates that fall layer by layer towards the
images (`layer_decay`), and decay towards a parameter's initial value (`anchored`).
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lt_jax.errors import UserError, construct
from lt_jax.schedules import Schedule

PyTree = Any
Rules = Iterable[tuple[str, float]]
Layers = Callable[[], Sequence[str]]
"""Patterns of parameter paths, one per layer from the images on: see `layer_rules`."""


Players = Mapping[str, PyTree]
"""A tree for each player: its parameters, gradients or optimiser state."""


class Optimizer(NamedTuple):
  """An optimiser of players as pure functions; the clock comes from outside.

  Attributes:
    init: {player: params} -> {player: opt_state}, for all players that it updates.
    update: ({player: grads}, {player: opt_state}, {player: params}, step) ->
      ({player: new params}, {player: new opt_state}), for the players in grads, which
      may be only some of those that `init` saw.
    learning_rate: step -> () float32, before the multipliers of single parameters.
    held: {player: params} -> the same values, with no gradient through frozen ones, so
      that nothing below them is differentiated.
    rates: {player: params} -> the multiplier of each parameter's learning rate, as a
      tree of floats; 0 for frozen parameters.
    anchored: {player: params} -> whether each decays towards its initial value.
  """

  init: Callable[[Players], dict[str, PyTree]]
  update: Callable[
    [Players, Players, Players, jax.Array], tuple[dict[str, PyTree], dict[str, PyTree]]
  ]
  learning_rate: Schedule
  held: Callable[[Players], dict[str, PyTree]]
  rates: Callable[[Players], dict[str, PyTree]]
  anchored: Callable[[Players], dict[str, PyTree]]


def per_parameter(rules: Rules, params: PyTree, *, some: bool = False) -> PyTree:
  """Gives every parameter the value of the first rule that matches its path.

  Args:
    rules: (pattern, value) pairs; a pattern is a regular expression for a whole path
      such as 'net/head/bias'.
    params: the parameters by player, or any tree with their structure.
    some: these are only some of the players, so a rule may apply to none of them.

  Returns:
    A tree of floats with the structure of `params`.

  Raises:
    UserError: no rule covers a parameter, a rule never applies (unless `some`), or a
      pattern is not a regular expression.

  Examples:
    >>> params = {'net': {'bias': 0, 'kernel': 0}}
    >>> per_parameter((('net/bias', 0.0), ('.*', 2e-4)), params)
    {'net': {'bias': 0.0, 'kernel': 0.0002}}
  """
  leaves, treedef = jax.tree.flatten_with_path(params)
  paths = [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in leaves]
  rules = [(_compile(pattern), float(value)) for pattern, value in rules]
  winners = [
    next((i for i, (pattern, _) in enumerate(rules) if pattern.fullmatch(path)), None)
    for path in paths
  ]
  if None in winners:
    bare = [path for path, winner in zip(paths, winners, strict=True) if winner is None]
    raise UserError(
      f"no rule covers {_abridged(bare)}: end the list with ('.*', value) for the rest"
    )
  for i, (pattern, _) in enumerate(rules):
    if i not in winners and not some:
      raise UserError(
        f'rule {pattern.pattern!r} matches no parameter, or only parameters that '
        f'earlier rules match; the parameters are {_abridged(paths)}'
      )
  return treedef.unflatten(rules[i][1] for i in winners)


def as_rules(key: str, value: Any) -> tuple[tuple[str, float], ...]:
  """Returns rules as (pattern, number) pairs; a plain number applies to all parameters.

  Args:
    key: the option they are for, for the message.
    value: a number, or a list of numbers and (pattern, number) pairs.

  Raises:
    UserError: the value is something else.

  Examples:
    >>> as_rules('weight_decay', [('net/bias', 0.0), 2e-4])
    (('net/bias', 0.0), ('.*', 0.0002))
  """
  rules = value if isinstance(value, list | tuple) else [value]
  rules = [('.*', rule) if isinstance(rule, Real) else rule for rule in rules]
  for rule in rules:
    match rule:
      case [str(), Real() as number] if 0 <= number < math.inf:
        pass
      case _:
        raise UserError(
          f'optimizer.{key} is {value!r}; it must be a number >= 0 or pairs of a '
          "pattern and a number, such as (('net/head/bias', 0.0), ('.*', 2e-4))"
        )
  return tuple((pattern, number) for pattern, number in rules)


def layer_rules(layers: Sequence[str], decay: float) -> Rules:
  r"""Returns rules for learning rates that fall by a factor from layer to layer.

  .. math:: \sigma_l = d^{L - l}, \qquad l = 0 \dots L - 1

  for L layers, starting at the images, and 1 for everything else, such as the head. So
  the last layer has d and the first d^L.

  Args:
    layers: patterns, one per layer.
    decay: d, in (0, 1].

  Raises:
    UserError: d is out of range.

  Examples:
    >>> layer_rules(['net/stem/.*', 'net/block/.*'], decay=0.5)
    (('net/stem/.*', 0.25), ('net/block/.*', 0.5), ('.*', 1.0))

  Source: layer-wise decay with timm's groups, of which the head is the last.
  """
  if not 0 < decay <= 1:
    raise UserError(f'layer_decay is {decay}; it must be above 0 and at most 1')
  scaled = [(p, decay ** (len(layers) - i)) for i, p in enumerate(layers)]
  return (*scaled, ('.*', 1.0))


def sgd(
  learning_rate: Schedule,
  *,
  momentum: float = 0.9,
  nesterov: bool = False,
  weight_decay: Rules = (('.*', 0.0),),
  decoupled: bool = False,
  learning_rate_scale: Rules = (('.*', 1.0),),
  layer_decay: float = 1.0,
  anchored: str = '',
  layers: Layers = tuple,
) -> Optimizer:
  r"""Stochastic gradient descent with momentum, as PyTorch defines it.

  .. math::
    d = g + \lambda p, \qquad b \leftarrow m b + d, \qquad
    p \leftarrow p - \eta \sigma\, (d + m b \text{ if nesterov else } b)

  The learning rate is not part of the buffer, so a drop affects the whole update at
  once. Decoupled decay leaves lambda p out of d and adds it to the update instead.

  Args:
    learning_rate: step -> eta.
    momentum: m; 0 stores no buffer.
    nesterov: look ahead by one step.
    weight_decay: rules for lambda.
    decoupled: apply decay outside the momentum, scaled by the learning rate.
    learning_rate_scale: rules for sigma; 0 freezes: no update, no decay, no buffer.
    layer_decay: d of `layer_rules`, which multiply sigma.
    anchored: pattern of parameters that decay towards their initial values, lambda
      (p - p_0), instead of towards 0; '' for none. The surgery 'anchor' sets p_0.
    layers: the layers that `layer_decay` counts.

  Returns:
    The optimiser; its `init` raises `UserError` if rules and parameters do not match.

  Examples:
    >>> optimizer = sgd(lambda step: 0.1, momentum=0.0)
    >>> params, grads = {'net': jnp.array(1.0)}, {'net': jnp.array(5.0)}
    >>> params, _ = optimizer.update(grads, optimizer.init(params), params, 0)
    >>> params['net'].item()  # 1 - 0.1 * 5
    0.5

  Nesterov's form: Sutskever et al., ICML 2013, as in torch.optim.SGD. Decoupled decay:
  Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101. Decay towards the start: Li et
  al., ICML 2018, arXiv 1802.01483 (L2-SP).
  """
  direction = optax.trace(momentum, nesterov) if momentum else optax.identity()
  rules = _Rules(weight_decay, learning_rate_scale, layer_decay, anchored, layers)
  return _optimizer(direction, learning_rate, rules, decoupled)


def adam(
  learning_rate: Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: Rules = (('.*', 0.0),),
  decoupled: bool = False,
  learning_rate_scale: Rules = (('.*', 1.0),),
  layer_decay: float = 1.0,
  anchored: str = '',
  layers: Layers = tuple,
) -> Optimizer:
  r"""Adam; AdamW with `decoupled`.

  .. math::
    d = g + \lambda p, \quad m \leftarrow b_1 m + (1 - b_1) d, \quad
    v \leftarrow b_2 v + (1 - b_2) d^2,

    p \leftarrow p - \eta \sigma
    \frac{m / (1 - b_1^t)}{\sqrt{v / (1 - b_2^t)} + \epsilon}

  t = step + 1: the bias correction assumes that the moments were zero at step 0, so
  moments and clock are carried from stage to stage together or not at all.

  Args:
    learning_rate: step -> eta.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root.
    weight_decay: rules for lambda.
    decoupled: leave lambda p out of d and add it to the update.
    learning_rate_scale: rules for sigma; 0 freezes: no update, no decay, no moments.
    layer_decay: as for `sgd`.
    anchored: as for `sgd`.
    layers: as for `sgd`.

  Returns:
    The optimiser; its `init` raises `UserError` if rules and parameters do not match.

  Examples:
    >>> optimizer = adam(lambda step: 0.5)
    >>> params, grads = {'net': jnp.array(1.0)}, {'net': jnp.array(5.0)}
    >>> params, _ = optimizer.update(grads, optimizer.init(params), params, 0)
    >>> round(params['net'].item(), 3)  # the first step is the learning rate
    0.5

  Kingma and Ba, ICLR 2015, arXiv 1412.6980; decoupled decay: Loshchilov and Hutter,
  ICLR 2019, arXiv 1711.05101.
  """
  # The inner term is far below eps and changes no update, but it gives the square root
  # a finite derivative at zero, which meta-gradients through the update need.
  moments = optax.scale_by_adam(b1, b2, eps, eps_root=1e-30)

  def update(grads, state, params=None, *, step):
    # optax has a step counter of its own, which is overwritten before it is read.
    step = jnp.asarray(step, jnp.int32)
    return moments.update(grads, state._replace(count=step), params)

  direction = optax.GradientTransformationExtraArgs(moments.init, update)
  rules = _Rules(weight_decay, learning_rate_scale, layer_decay, anchored, layers)
  return _optimizer(direction, learning_rate, rules, decoupled)


OPTIMIZERS = {'sgd': sgd, 'adam': adam}


def make_optimizer(
  name: str, learning_rate: Schedule, layers: Layers = tuple, **options: Any
) -> Optimizer:
  """Returns an optimiser by name.

  Args:
    name: a key of `OPTIMIZERS`.
    learning_rate: step -> learning rate, see `make_schedule`.
    layers: the layers that the option `layer_decay` counts.
    **options: options of the optimiser, such as `momentum`.

  Raises:
    UserError: a name or option is unknown.
  """
  return construct(
    OPTIMIZERS, 'optimizer', name, learning_rate, options=options, layers=layers
  )


class _Rules(NamedTuple):
  """Options that depend on the parameter, as passed to `sgd`."""

  weight_decay: Rules
  learning_rate_scale: Rules
  layer_decay: float
  anchored: str
  layers: Layers

  def checked(self) -> '_Rules':
    """Returns them as (pattern, number) pairs, or raises a `UserError`."""
    if self.anchored:
      _compile(self.anchored)
    return self._replace(
      weight_decay=as_rules('weight_decay', self.weight_decay),
      learning_rate_scale=as_rules('learning_rate_scale', self.learning_rate_scale),
    )

  def decays(self, params: PyTree, *, some: bool) -> PyTree:
    """Returns lambda for each parameter."""
    return per_parameter(self.weight_decay, params, some=some)

  def rates(self, params: PyTree, *, some: bool) -> PyTree:
    """Returns sigma for each parameter."""
    rates = per_parameter(self.learning_rate_scale, params, some=some)
    if self.layer_decay == 1:
      return rates
    layers = layer_rules(self.layers(), self.layer_decay)
    return jax.tree.map(
      lambda a, b: a * b, rates, per_parameter(layers, params, some=True)
    )

  def is_anchored(self, params: PyTree, *, some: bool) -> PyTree:
    """Returns whether each parameter decays towards its initial value."""
    if not self.anchored:
      return jax.tree.map(lambda _: False, params)
    rules = ((self.anchored, 1.0), ('.*', 0.0))
    return jax.tree.map(bool, per_parameter(rules, params, some=some))


class Anchored(NamedTuple):
  """Optimiser state if some parameters decay towards their initial values.

  Attributes:
    direction: the state of the optimiser itself.
    start: p_0 of these parameters; None for the others.
  """

  direction: PyTree
  start: PyTree


def anchored_here(opt: Players, params: Players) -> dict[str, PyTree]:
  """Returns optimiser states that take the current parameters as initial values."""

  def here(own: PyTree, now: PyTree) -> PyTree:
    if not isinstance(own, Anchored):
      return own
    start = jax.tree.map(
      lambda p, s: s if s is None else p, now, own.start, is_leaf=lambda x: x is None
    )
    return own._replace(start=start)

  return {player: here(own, params[player]) for player, own in opt.items()}


def _optimizer(
  direction: optax.GradientTransformation,
  learning_rate: Schedule,
  rules: _Rules,
  decoupled: bool,
) -> Optimizer:
  """Adds decay before or after a direction, and applies the learning rate last."""
  direction = optax.with_extra_args_support(direction)
  rules = rules.checked()

  def trained_only(scales: PyTree) -> optax.GradientTransformationExtraArgs:
    return optax.masked(direction, jax.tree.map(bool, scales))

  def init(params: Players) -> dict[str, PyTree]:
    rules.decays(params, some=False)
    scales = rules.rates(params, some=False)
    check_trains(scales)
    anchors = rules.is_anchored(params, some=False)
    opt = {
      player: trained_only(scales[player]).init(own) for player, own in params.items()
    }
    if not rules.anchored:
      return opt
    start = jax.tree.map(lambda p, held: p if held else None, dict(params), anchors)
    return {player: Anchored(own, start[player]) for player, own in opt.items()}

  def update(
    grads: Players, opt: Players, params: Players, step: jax.Array
  ) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    params = {player: params[player] for player in grads}
    decays = rules.decays(params, some=True)
    scales = rules.rates(params, some=True)
    away = params
    if rules.anchored:
      start = {player: opt[player].start for player in params}
      away = jax.tree.map(lambda p, s: p if s is None else p - s, params, start)
      opt = {player: own.direction for player, own in opt.items()}

    def decayed(update, param, decay):
      return update + decay * param if decay else update

    def moved(param, update, scale):
      # A frozen parameter is left alone even if its gradient is not finite.
      return (param - rate * scale * update).astype(param.dtype) if scale else param

    rate = learning_rate(step)
    if not decoupled:
      grads = jax.tree.map(decayed, dict(grads), away, decays)
    updates, opt_after = {}, {}
    for player in params:
      updates[player], opt_after[player] = trained_only(scales[player]).update(
        grads[player], opt[player], params[player], step=step
      )
    if decoupled:
      updates = jax.tree.map(decayed, updates, away, decays)
    if rules.anchored:
      opt_after = {
        player: Anchored(opt_after[player], start[player]) for player in start
      }
    return jax.tree.map(moved, params, updates, scales), opt_after

  def held(params: Players) -> dict[str, PyTree]:
    scales = rules.rates(params, some=True)
    return jax.tree.map(lambda p, s: p if s else lax.stop_gradient(p), params, scales)

  return Optimizer(
    init,
    update,
    learning_rate,
    held,
    lambda params: rules.rates(params, some=True),
    lambda params: rules.is_anchored(params, some=True),
  )


def check_trains(scales: PyTree) -> None:
  """Refuses rules that freeze every parameter.

  Raises:
    UserError: every rate is 0.
  """
  if not any(jax.tree.leaves(scales)):
    raise UserError(
      'optimizer.learning_rate_scale trains nothing: every parameter has the rate 0; '
      "end the list with ('.*', 1.0), or give some pattern a rate above 0"
    )


def _compile(pattern: str) -> re.Pattern:
  """Compiles a pattern; raises a `UserError` if it is not a regular expression."""
  try:
    return re.compile(pattern)
  except re.error as error:
    raise UserError(f'rule {pattern!r} is not a regular expression: {error}') from None


def _abridged(paths: Sequence[str]) -> str:
  """Lists the first few of many paths."""
  more = f' and {len(paths) - 3} more' if len(paths) > 3 else ''
  return ', '.join(map(repr, paths[:3])) + more
