"""Adversarial adaptation: features that hide the domain from a discriminator."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax, nn

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
  r"""Returns x unchanged; the gradient that flows back is multiplied by -scale.

  Args:
    x: of any shape.
    scale: (), an ordinary array, so it may change from step to step. It gets no
      gradient.

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
  r"""Domain-adversarial training of a network and a discriminator in one pass.

  .. math::
    \min_{f, y}\; L_y - \lambda(p)\, L_d, \qquad \min_d\; L_d, \qquad
    L_d = \frac{1}{S} \sum_{i \in S} \log(1 + e^{z_i})
      + \frac{1}{T} \sum_{i \in T} \log(1 + e^{-z_i})

  where z are the logits of being a target image. L_y is the supervised objective on the
  source. The discriminator trains on the full L_d whatever lambda is, so that it keeps
  pace; lambda only scales the gradient that flows back into the features.

  The batches are 'train', from the source, and 'target', which needs no labels.

  Args:
    net: network that returns a dict with 'logits', 'features' and other named layers.
    optimizer: optimiser of the players `{'net': params}`.
    objective: (outputs, batch, step) -> (value, metrics), for the source.
    players: 'discriminator', a network from (B, D) to logits (B,).
    align_on: names of the layers it reads, concatenated.
    alignment_weight: step -> lambda, see `lt_jax.losses.alignment.make_weight`.
    streams: names of the streams; it reads 'target'.
    statistics: how the domains share batch normalisation, a key of
      `lt_jax.methods.pairs.STATISTICS`.

  Returns:
    The method. Its outputs have 'target_logit' (B,), the logit of being a target image.

  Raises:
    UserError: no discriminator, no layer for it to read, or unknown statistics.

  Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 17(59), 2016,
  arXiv 1505.07818, equation 9. Other code often takes the mean over both domains, which
  is half of L_d: this halves lambda and the discriminator's learning rate.
  """
  (judge,) = named_players(players, 'discriminator')
  read = reader('dann', align_on)
  check_streams(streams, 'target')

  def confusion(params: PyTree, source: Outputs, target: Outputs, step: jax.Array):
    scale = alignment_weight(step)
    loss, metrics = domain_loss(
      *_judged(judge, params, read(source), read(target), scale)
    )
    return loss, metrics | {'lambda': mean_metric(scale)}

  return adapt(
    net,
    optimizer,
    objective,
    Term(
      confusion,
      lambda outputs: {'discriminator': read(outputs)},
      tells=lambda params, outputs: target_logit(judge, params, read(outputs)),
    ),
    statistics=statistics,
    players=players,
  )


def cdan(
  net: Network,
  optimizer: Optimizer,
  *,
  objective: Objective,
  players: Mapping[str, Player],
  align_on: Sequence[str],
  alignment_weight: Callable[[jax.Array], jax.Array],
  streams: Collection[str],
  statistics: str = 'joint',
  entropy: bool = False,
  largest: int = 4096,
  projected: int = 1024,
) -> Method:
  r"""Adversarial training with a discriminator that sees the features by class.

  Like `dann`, but the discriminator reads the outer product of the features f (D,) and
  the predictions p (C,). If D C is too large, random matrices approximate it:

  .. math::
    f \otimes p \in R^{D C} \qquad \text{or} \qquad
    \tfrac{1}{\sqrt d}\, (f R_f) \odot (p R_p) \in R^d

  where the entries of R_f (D, d) and R_p (C, d) are drawn from N(0, 1) once per run and
  kept in `State.memory`. With `entropy` (CDAN+E), images with confident predictions
  weigh more in L_d:

  .. math:: w_i \propto 1 + e^{-H(p_i)}, \text{ of mean 1 in each domain}

  Neither the conditioning predictions nor the weights get a gradient. The authors' code
  also stops it at the predictions, but lets it flow, reversed, through the weights.

  Args:
    net: network that returns a dict with 'logits', 'features' and other named layers.
    optimizer: optimiser of the players `{'net': params}`.
    objective: (outputs, batch, step) -> (value, metrics), for the source.
    players: 'discriminator', a network from (B, D C) or (B, d) to logits (B,).
    align_on: names of the layers that make f, concatenated.
    alignment_weight: step -> lambda, the scale of what flows back into the features.
    streams: names of the streams; it reads 'target'.
    statistics: how the domains share batch normalisation, a key of
      `lt_jax.methods.pairs.STATISTICS`.
    entropy: condition on the entropy.
    largest: the largest D C for which the full product is formed.
    projected: d.

  Raises:
    UserError: no discriminator, no layer for it to read, or unknown statistics.

  Long et al., "Conditional Adversarial Domain Adaptation", NeurIPS 2018,
  arXiv 1705.10667, equations 3 to 8.
  """
  (judge,) = named_players(players, 'discriminator')
  read = reader('cdan', align_on)
  check_streams(streams, 'target')

  def draws(key: jax.Array, outputs: Outputs) -> dict[str, PyTree]:
    shapes = jax.eval_shape(lambda o: (read(o), o['logits']), outputs)
    sizes = [shape.shape[-1] for shape in shapes]
    if math.prod(sizes) <= largest:
      return {}
    drawn = {
      name: jax.random.normal(k, (size, projected))
      for name, k, size in zip(FACTORS, jax.random.split(key), sizes, strict=True)
    }
    return {'projections': drawn}

  def conditioned(kept: PyTree, outputs: Outputs) -> tuple[jax.Array, jax.Array]:
    """Returns what the discriminator reads (B, ...), and the images' weights (B,)."""
    logits = lax.stop_gradient(layer(outputs, 'logits'))
    weights = entropy_weights(logits) if entropy else jnp.ones(len(logits))
    factors = (read(outputs), nn.softmax(logits))
    return multilinear(*factors, kept.get('projections')), weights

  def reads(outputs: Outputs) -> dict[str, jax.Array]:
    return {'discriminator': conditioned(draws(jax.random.key(0), outputs), outputs)[0]}

  def confusion(params: PyTree, source: Outputs, target: Outputs, step: jax.Array):
    scale = alignment_weight(step)
    (source, of_source), (target, of_target) = (
      conditioned(params, outputs) for outputs in (source, target)
    )
    logits = _judged(judge, params, source, target, scale)
    loss, metrics = domain_loss(*logits, of_source, of_target)
    return loss, metrics | {'lambda': mean_metric(scale)}

  return adapt(
    net,
    optimizer,
    objective,
    Term(
      confusion,
      reads,
      draws,
      lambda params, outputs: target_logit(
        judge, params, conditioned(params, outputs)[0]
      ),
    ),
    statistics=statistics,
    players=players,
  )


def reader(method: str, align_on: Sequence[str]) -> Callable[[Outputs], jax.Array]:
  """Returns the function that concatenates the layers to read, outputs -> (B, D).

  Args:
    method: name of the method, for the message.
    align_on: names of the layers.

  Raises:
    UserError: there are none.
  """
  if not align_on:
    raise UserError(
      f'{method} needs alignment.align_on: the layer its discriminator reads'
    )
  return lambda outputs: jnp.concatenate(
    [layer(outputs, name) for name in align_on], axis=-1
  )


def _judged(
  judge: Player, params: PyTree, source: jax.Array, target: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the discriminator's logits for both domains, with the gradient reversed."""
  layers = grad_reverse(together(source, target), scale)
  logits = judge.net.apply({'params': params['discriminator']}, layers)
  return apart(logits, len(source))


def target_logit(judge: Player, params: PyTree, read: jax.Array) -> Outputs:
  """Returns 'target_logit' (B,), a discriminator's output, by which images are ordered.

  Args:
    judge: the discriminator.
    params: parameters of all players.
    read: (B, D), what the discriminator reads.
  """
  return {'target_logit': judge.net.apply({'params': params['discriminator']}, read)}


FACTORS = ('features', 'predictions')


def multilinear(
  f: jax.Array, p: jax.Array, projections: Mapping[str, jax.Array] | None = None
) -> jax.Array:
  """Returns the product of features and predictions, in full or by random projections.

  Args:
    f: (B, D).
    p: (B, C).
    projections: 'features' (D, d) and 'predictions' (C, d); None for the full product.

  Returns:
    (B, D C), or (B, d).
  """
  if projections is None:
    return (f[:, :, None] * p[:, None, :]).reshape(len(f), -1)
  f, p = (
    jnp.matmul(x, projections[name], precision=lax.Precision.HIGHEST)
    for x, name in zip((f, p), FACTORS, strict=True)
  )
  return f * p / math.sqrt(f.shape[-1])


def entropy_weights(logits: jax.Array) -> jax.Array:
  r"""Returns weights proportional to :math:`1 + e^{-H}`, with mean 1.

  Args:
    logits: (B, C).

  Returns:
    (B,).
  """
  log_p = nn.log_softmax(logits)
  sure = 1 + jnp.exp((jnp.exp(log_p) * log_p).sum(-1))
  return sure / sure.mean()


def domain_loss(
  of_source: jax.Array,
  of_target: jax.Array,
  source_weights: jax.Array | float = 1.0,
  target_weights: jax.Array | float = 1.0,
) -> tuple[jax.Array, Metrics]:
  """Returns a discriminator's cross-entropy, the sum of the means in the two domains.

  Args:
    of_source: (S,) logits of being a target image.
    of_target: (T,) likewise.
    source_weights: (S,), with mean 1.
    target_weights: (T,), likewise.

  Returns:
    (loss (), {'domain_loss', 'domain_accuracy'}); the accuracy is not weighted.

  Raises:
    UserError: the logits have another shape, such as (S, 2).
  """
  if of_source.ndim != 1:
    raise UserError(
      f'the discriminator returns {of_source.shape} for {len(of_source)} images; it '
      'must return one logit for each: choose another players.discriminator.network'
    )
  source_loss = (source_weights * nn.softplus(of_source)).mean()
  target_loss = (target_weights * nn.softplus(-of_target)).mean()
  loss = source_loss + target_loss
  right = (of_source <= 0).sum() + (of_target > 0).sum()
  images = jnp.float32(len(of_source) + len(of_target))
  metrics = {
    'domain_loss': mean_metric(loss),
    'domain_accuracy': (right.astype(jnp.float32), images),
  }
  return loss, metrics
