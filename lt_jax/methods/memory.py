r"""Open long-tailed recognition: class centroids as a memory, learned with the network.

The head (`lt_jax.models.heads.MetaEmbedding`) reads the centroids. Features are pulled
towards the centroid of their class and, as a batch, pushed away from the others. The
centroids are a player, `params['centroids']` (C, D), with the network's optimiser,
schedule and decay, but with their own gradient.

Source: Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019,
arXiv 1904.05160, and the authors' code.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lt_jax.errors import lookup
from lt_jax.losses import metric
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
from lt_jax.methods.supervised import Loss, batch_metrics
from lt_jax.optim import Optimizer

Discrimination = Callable[..., jax.Array]


def released(
  features: jax.Array, labels: jax.Array, centroids: jax.Array
) -> tuple[jax.Array, jax.Array]:
  r"""Attraction plus 0.01 times a repulsion that acts on the whole batch.

  .. math::
    L = \frac{1}{2B} \sum_b |v_b - c_{y_b}|^2
      + 0.01 \max\Big(0,\; 10 - \frac{1}{BC} \sum_b \sum_{c \neq y_b} |v_b - c_c|^2\Big)

  Attraction moves the centroids by a closed form, `metric.centroid_gradient`, which is
  not scaled by the weight of the loss.

  Args:
    features: (B, D).
    labels: (B,) int.
    centroids: (C, D).

  Returns:
    (loss (), term to add to the centroids' gradient (C, D)).
  """
  fixed = lax.stop_gradient(centroids)
  loss = metric.attraction(features, labels, fixed)
  loss += 0.01 * metric.repulsion(features, labels, centroids)
  return loss, metric.centroid_gradient(features, labels, centroids)


def paper(
  features: jax.Array, labels: jax.Array, centroids: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The printed large-margin loss, `metric.large_margin`, differentiated throughout.

  Args:
    features: (B, D).
    labels: (B,) int.
    centroids: (C, D).

  Returns:
    (loss (), zeros (C, D)).
  """
  loss = metric.large_margin(features, labels, centroids)
  return loss, jnp.zeros_like(centroids)


FORMS = {'released': released, 'paper': paper}


def oltr(
  net: Network,
  optimizer: Optimizer,
  loss: Loss,
  *,
  class_weights: Callable[[jax.Array], jax.Array],
  reduction: Callable[[jax.Array], jax.Array],
  weight: float = 0.01,
  form: str = 'released',
) -> Method:
  r"""The second stage of open long-tailed recognition.

  .. math::
    J = \sum_i a_i\, \ell_i + \lambda L(v, y, c), \qquad
    a = \text{reduction}(w, y)

  where v are the direct features, not the meta-embedding. The centroids are initialised
  to zero; the surgery 'class_means' fills them.

  Args:
    net: a network whose head reads 'centroids', such as 'meta_embedding'.
    optimizer: optimiser of {'net': params, 'centroids': (C, D)}.
    loss: (outputs, batch) -> (B,).
    class_weights: step -> (C,).
    reduction: (class weights (C,), labels (B,)) -> coefficients (B,).
    weight: lambda.
    form: 'released', as in the authors' code, or 'paper'; formulas and constants
      differ.

  Raises:
    UserError: an unknown form.
  """
  discriminate = lookup(FORMS, 'form of the centroid loss', form)
  return _with_centroids(
    net,
    optimizer,
    loss,
    class_weights=class_weights,
    reduction=reduction,
    weight=weight,
    discriminate=discriminate,
    reads=lambda centroids: {'centroids': centroids},
    first=lambda key, size: jnp.zeros(size, jnp.float32),
  )


def centroid_loss(
  net: Network,
  optimizer: Optimizer,
  loss: Loss,
  *,
  class_weights: Callable[[jax.Array], jax.Array],
  reduction: Callable[[jax.Array], jax.Array],
  weight: float = 0.1,
  form: str = 'released',
) -> Method:
  r"""Supervised learning that pulls features towards the centroid of their class.

  The objective is that of `oltr`, for a network whose head does not read the centroids.

  Args:
    net: network that returns a dict with 'logits' and 'features'.
    optimizer: optimiser of {'net': params, 'centroids': (C, D)}.
    loss: (outputs, batch) -> (B,).
    class_weights: step -> (C,).
    reduction: (class weights (C,), labels (B,)) -> coefficients (B,).
    weight: lambda.
    form: 'released', as in the authors' code, or 'paper'; formulas and constants
      differ.

  Raises:
    UserError: an unknown form.

  The first stage of Liu et al., "Open Compound Domain Adaptation", CVPR 2020, arXiv
  1909.03403. Lambda is from the authors' code, as are the initial centroids, drawn from
  N(0, 1): from zero they would pull all features together.
  """
  discriminate = lookup(FORMS, 'form of the centroid loss', form)
  return _with_centroids(
    net,
    optimizer,
    loss,
    class_weights=class_weights,
    reduction=reduction,
    weight=weight,
    discriminate=discriminate,
    reads=lambda centroids: {},
    first=lambda key, size: jax.random.normal(key, size),
  )


def _with_centroids(
  net: Network,
  optimizer: Optimizer,
  loss: Loss,
  *,
  class_weights: Callable[[jax.Array], jax.Array],
  reduction: Callable[[jax.Array], jax.Array],
  weight: float,
  discriminate: Discrimination,
  reads: Callable[[jax.Array], dict[str, jax.Array]],
  first: Callable[[jax.Array, tuple[int, int]], jax.Array],
) -> Method:
  """Returns a method that learns centroids.

  Its arguments are those of `oltr`, and:
    discriminate: an entry of `FORMS`.
    reads: centroids -> what the head gets of them.
    first: (key, (C, D)) -> initial centroids.
  """

  def init(key: jax.Array, batches) -> State:
    images = batches['train']['image'][:1]
    net_params, net_stats = init_net(net, named_key(key, 'init', 0), images)
    shapes = jax.eval_shape(
      lambda: forward(net, net_params, net_stats, images, train=False)[0]
    )
    size = (shapes['logits'].shape[-1], shapes['features'].shape[-1])
    own_key = named_key(key, 'init_centroids', 0)
    params = {'net': net_params, 'centroids': first(own_key, size)}
    return first_state(key, params, {'net': net_stats}, optimizer.init(params))

  def objective(params: PyTree, stats: PyTree, batch: Batch, coefficients: jax.Array):
    params = optimizer.held(params)
    centroids = params['centroids']
    outputs, net_stats = forward(
      net,
      params['net'],
      stats['net'],
      batch['image'],
      train=True,
      **reads(centroids),
    )
    losses = loss(outputs, batch)
    apart, extra = discriminate(outputs['features'], batch['label'], centroids)
    extra = lax.stop_gradient(extra)
    value = jnp.dot(coefficients, losses) + weight * apart
    # Zero in value, with the hand-written gradient as its derivative, so frozen
    # centroids stay frozen.
    by_hand = jnp.vdot(extra, centroids - lax.stop_gradient(centroids))
    metrics = {
      'loss': mean_metric(value),
      'centroid_loss': mean_metric(apart),
      **batch_metrics(outputs, batch, losses),
    }
    return value + by_hand, ({'net': net_stats}, metrics)

  def step(state: State, batches) -> tuple[State, Metrics]:
    batch = batches['train']
    coefficients = reduction(class_weights(state.step), batch['label'])
    grads, (stats, metrics) = jax.grad(objective, has_aux=True)(
      state.params, state.stats, batch, coefficients
    )
    state, norms = update(state, grads, optimizer)
    return tick(state.replace(stats=stats)), metrics | norms

  def predict(state: State, images: jax.Array) -> Outputs:
    return forward(
      net,
      state.params['net'],
      state.stats['net'],
      images,
      train=False,
      **reads(state.params['centroids']),
    )[0]

  return Method(init, step, predict)
