"""Supervised learning on one domain, whose layers are aligned with those of another.

Deep CORAL, DAN, JAN, minimum entropy, minimum class confusion: each is an entry of
`lt_jax.losses.alignment.ALIGNMENTS`.
"""

from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp

from lt_jax.method import Method, Network, Outputs, PyTree, check_streams, mean_metric
from lt_jax.methods.pairs import Term, adapt
from lt_jax.methods.supervised import Objective
from lt_jax.optim import Optimizer

Alignment = Callable[[Outputs, Outputs, jax.Array], jax.Array]


def aligned(
  net: Network,
  optimizer: Optimizer,
  *,
  objective: Objective,
  alignment: Alignment | None,
  streams: Collection[str],
  statistics: str = 'joint',
) -> Method:
  r"""Gradient descent on a source's losses and its distance from a target.

  .. math::
    J = \sum_i a_i\, \ell_i + P + \lambda(p)\, D(S, T), \qquad
    a = \text{reduction}(w, y)

  The batches are 'train', of the source, and 'target', which needs no labels.

  Args:
    net: returns a dict with 'logits', 'features' and further named layers.
    optimizer: of the players `{'net': params}`.
    objective: (outputs, batch, step) -> (value, metrics), of the source.
    alignment: (source outputs, target outputs, step) -> (), weighted, see
      `lt_jax.losses.alignment.make_alignment`. None for none: then the target moves
      nothing but batch statistics.
    streams: names of the streams, of which it reads 'target'.
    statistics: how the domains meet in batch normalisation, a key of
      `lt_jax.methods.pairs.STATISTICS`.

  Raises:
    UserError: unknown statistics.
  """
  check_streams(streams, 'target')

  def distance(params: PyTree, source: Outputs, target: Outputs, step: jax.Array):
    del params
    if alignment is None:
      return jnp.float32(0), {}
    value = alignment(source, target, step)
    return value, {'alignment': mean_metric(value)}

  return adapt(net, optimizer, objective, Term(distance), statistics=statistics)
