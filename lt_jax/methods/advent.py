"""Adversarial adaptation of pixel predictions: AdvEnt, AdaptSegNet."""

from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax, nn

from lt_jax.errors import UserError, lookup
from lt_jax.losses.alignment import LEVELS, levels, scores, self_information
from lt_jax.method import (
  Method,
  Network,
  Outputs,
  Player,
  PyTree,
  check_streams,
  mean_metric,
  named_players,
)
from lt_jax.methods.adversarial import domain_loss
from lt_jax.methods.aligned import Alignment
from lt_jax.methods.pairs import Term, adapt
from lt_jax.methods.supervised import Objective
from lt_jax.optim import Optimizer

JUDGES = ('discriminator', 'auxiliary_discriminator')
"""Players, in the order of the layers they read."""

SHOWN: dict[str, Callable[[jax.Array], jax.Array]] = {
  'self_information': self_information,
  'softmax': nn.softmax,
}
"""name -> function from logits (..., C) to what a discriminator sees of them."""


def advent(
  net: Network,
  optimizer: Optimizer,
  *,
  objective: Objective,
  players: Mapping[str, Player],
  align_on: Sequence[str],
  alignment: Alignment | None,
  alignment_weight: Callable[[jax.Array], jax.Array],
  streams: Collection[str],
  statistics: str = 'separate',
  shown: str = 'self_information',
  weights: Sequence[float] = LEVELS,
) -> Method:
  r"""Trains target predictions that a discriminator mistakes for source predictions.

  .. math::
    \min_f\; L_y + \lambda \Big( \sum_l w_l\, E_t \log(1 + e^{d_l(I_t)}) + D(S, T)
    \Big), \qquad
    \min_{d_l}\; \tfrac12 E_s \log(1 + e^{d_l(I_s)})
      + \tfrac12 E_t \log(1 + e^{-d_l(I_t)})

  where d are the logits of being a target image, E are means over patches and images,
  and I are maps of the layers l of logits. By default I is the self-information -p log
  p / log C of every class, whose sum is the entropy; with 'softmax' it is the
  probabilities p, which gives AdaptSegNet. D is an alignment, such as 'class_prior' or
  'minent', or none.

  All players are updated at once, from the same parameters. An auxiliary output gets
  its own discriminator if it is named as the second layer.

  Args:
    net: network that returns a dict with 'logits' and, for two layers, another layer of
      logits.
    optimizer: optimiser of the players `{'net': params}`.
    objective: (outputs, batch, step) -> (value, metrics), for the source.
    players: 'discriminator' and, for a second layer, 'auxiliary_discriminator':
      networks from maps (B, H, W, C) to logits (B, ...).
    align_on: names of the one or two layers of logits, such as ('logits',
      'auxiliary_logits').
    alignment: (source outputs, target outputs, step) -> (), already weighted by lambda,
      see `lt_jax.losses.alignment.make_alignment`; None for none.
    alignment_weight: step -> lambda.
    streams: names of the streams; it reads 'target'.
    statistics: how the domains share batch normalisation, a key of
      `lt_jax.methods.pairs.STATISTICS`. 'joint' requires images of the same size.
    shown: a key of `SHOWN`.
    weights: w, one for each layer, in order.

  Raises:
    UserError: no layer or more than two, a different number of discriminators, fewer
      weights than layers, or an unknown name.

  Vu et al., ADVENT, CVPR 2019, arXiv 1811.12833, equations 5 to 8, with the halves and
  weights of the authors' code (lambda = 0.001); Tsai et al., "Learning to Adapt
  Structured Output Space for Semantic Segmentation", CVPR 2018, arXiv 1802.10349.
  """
  if not 1 <= len(align_on) <= len(JUDGES):
    raise UserError(
      f'advent reads one or two layers of logits, but alignment.align_on names '
      f'{len(align_on)}'
    )
  judges = JUDGES[: len(align_on)]
  named_players(players, *judges)
  check_streams(streams, 'target')
  show = lookup(SHOWN, 'map to show a discriminator', shown)
  weighted = levels('advent', align_on, weights)

  def judged(name: str, params: PyTree, maps: jax.Array) -> jax.Array:
    return players[name].net.apply({'params': params[name]}, maps)

  def value(params: PyTree, source: Outputs, target: Outputs, step: jax.Array):
    scale = alignment_weight(step)
    total, metrics = jnp.float32(0), {'lambda': mean_metric(scale)}
    for name, (layer, weight) in zip(judges, weighted, strict=True):
      of_source, of_target = (
        show(scores(outputs, layer)) for outputs in (source, target)
      )
      fixed = lax.stop_gradient(params)
      fooled = nn.softplus(judged(name, fixed, of_target)).mean()
      # This is a different backward pass from the one above, but the same forward pass,
      # which compilers compute only once.
      logits = [
        judged(name, params, lax.stop_gradient(maps)).reshape(-1)
        for maps in (of_source, of_target)
      ]
      loss, found = domain_loss(*logits)
      total += scale * weight * fooled + loss / 2
      prefix = name.removesuffix('discriminator')
      metrics |= {f'{prefix}{key}': metric for key, metric in found.items()}
      metrics[f'{prefix}adversarial'] = mean_metric(fooled)
    if alignment is not None:
      apart = alignment(source, target, step)
      total, metrics['alignment'] = total + apart, mean_metric(apart)
    return total, metrics

  def reads(outputs: Outputs) -> dict[str, jax.Array]:
    return {
      name: show(scores(outputs, layer))
      for name, layer in zip(judges, align_on, strict=True)
    }

  return adapt(
    net,
    optimizer,
    objective,
    Term(value, reads),
    statistics=statistics,
    players=players,
  )
