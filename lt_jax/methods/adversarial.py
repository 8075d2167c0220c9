"""Adversarial adaptation: features by which a discriminator cannot tell the domains."""

from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import nn

from lt_jax.errors import UserError
from lt_jax.losses.alignment import layer
from lt_jax.method import (
  Method,
  Metrics,
  Network,
  Outputs,
  Player,
  PyTree,
  check_streams,
  mean_metric,
  named_players,
)
from lt_jax.methods.pairs import Term, adapt, apart, together
from lt_jax.methods.supervised import Objective
from lt_jax.optim import Optimizer


@jax.custom_vjp
def grad_reverse(x: jax.Array, scale: jax.Array) -> jax.Array:
  r"""Returns x, bit by bit; the gradient that flows back is multiplied by -scale.

  Args:
    x: of any shape.
    scale: (), an ordinary array: it may change from step to step. No gradient flows
      into it.

  Ganin and Lempitsky, ICML 2015, arXiv 1409.7495, section 3.1.
  """
  del scale
  return x


def _keep_scale(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
  return x, scale


def _reverse(scale: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
  return (-scale * g).astype(g.dtype), jnp.zeros_like(scale)


grad_reverse.defvjp(_keep_scale, _reverse)


def dann(
  net: Network,
  optimizer: Optimizer,
  *,
  objective: Objective,
  players: Mapping[str, Player],
  align_on: Sequence[str],
  alignment_weight: Callable[[jax.Array], jax.Array],
  streams: Collection[str],
  statistics: str = 'joint',
) -> Method:
  r"""Domain-adversarial training of a network and a discriminator, in one pass.

  .. math::
    \min_{f, y}\; L_y - \lambda(p)\, L_d, \qquad \min_d\; L_d, \qquad
    L_d = \tfrac12 \Big( \frac{1}{S} \sum_{i \in S} \log(1 + e^{z_i})
      + \frac{1}{T} \sum_{i \in T} \log(1 + e^{-z_i}) \Big)

  with the logits z of being a target image. L_y is the objective of supervised learning
  on the source. The discriminator trains on all of L_d whatever lambda is, so that it
  keeps pace; lambda scales only what flows back into the features.

  The batches are 'train', of the source, and 'target', which needs no labels.

  Args:
    net: returns a dict with 'logits', 'features' and further named layers.
    optimizer: of the players `{'net': params}`.
    objective: (outputs, batch, step) -> (value, metrics), of the source.
    players: 'discriminator', a network from (B, D) to logits (B,).
    align_on: names of the layers that it reads, one after the other.
    alignment_weight: step -> lambda, see `lt_jax.losses.alignment.make_weight`.
    streams: names of the streams, of which it reads 'target'.
    statistics: how the domains meet in batch normalisation, a key of
      `lt_jax.methods.pairs.STATISTICS`.

  Raises:
    UserError: no discriminator, no layer that it reads, or unknown statistics.

  Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 17(59), 2016,
  arXiv 1505.07818; whose sums over the domains are means here, as in other code.
  """
  (judge,) = named_players(players, 'discriminator')
  if not align_on:
    raise UserError('dann needs alignment.align_on: the layer its discriminator reads')
  check_streams(streams, 'target')

  def read(outputs: Outputs) -> jax.Array:
    return jnp.concatenate([layer(outputs, name) for name in align_on], axis=-1)

  def confusion(params: PyTree, source: Outputs, target: Outputs, step: jax.Array):
    scale = alignment_weight(step)
    source, target = read(source), read(target)
    layers = grad_reverse(together(source, target), scale)
    logits = judge.net.apply({'params': params['discriminator']}, layers)
    loss, metrics = domain_loss(*apart(logits, len(source)))
    return loss, metrics | {'lambda': mean_metric(scale)}

  return adapt(
    net,
    optimizer,
    objective,
    Term(confusion, lambda outputs: {'discriminator': read(outputs)}),
    statistics=statistics,
    players=players,
  )


def domain_loss(
  of_source: jax.Array, of_target: jax.Array
) -> tuple[jax.Array, Metrics]:
  """Returns the cross-entropy of a discriminator, each domain counting half.

  Args:
    of_source: (S,) logits of being a target image.
    of_target: (T,) likewise.

  Returns:
    (loss (), {'domain_loss', 'domain_accuracy'}).
  """
  loss = nn.softplus(of_source).mean() / 2 + nn.softplus(-of_target).mean() / 2
  right = (of_source <= 0).sum() + (of_target > 0).sum()
  images = jnp.float32(len(of_source) + len(of_target))
  metrics = {
    'domain_loss': mean_metric(loss),
    'domain_accuracy': (right.astype(jnp.float32), images),
  }
  return loss, metrics
