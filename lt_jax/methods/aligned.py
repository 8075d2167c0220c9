"""Supervised learning on one domain while aligning its layers with another domain's.

Deep CORAL, DAN, JAN, minimum entropy and minimum class confusion are each one entry of
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
  r"""Gradient descent on the source's losses plus its distance from the target.

  .. math::
    J = \sum_i a_i\, \ell_i + P + \lambda(p)\, D(S, T), \qquad
    a = \text{reduction}(w, y)

  The batches are 'train', from the source, and 'target', which needs no labels.

  Args:
    net: network that returns a dict with 'logits', 'features' and other named layers.
    optimizer: optimiser of the players `{'net': params}`.
    objective: (outputs, batch, step) -> (value, metrics), for the source.
    alignment: (source outputs, target outputs, step) -> (), weighted, see
      `lt_jax.losses.alignment.make_alignment`. None for none: then the target only
      affects batch statistics.
    streams: names of the streams; it reads 'target'.
    statistics: how the domains share batch normalisation, a key of
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
