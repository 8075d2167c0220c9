r"""Open long-tailed recognition: a memory of class centroids, learned with the network.

The head (`lt_jax.models.heads.MetaEmbedding`) reads the centroids. Features are pulled
towards the centroid of their class and, as a batch, pushed away from the others. The
centroids are a player, `params['centroids']` (C, D), with the optimiser, schedule and
decay of the network, but a gradient of their own.

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
  r"""Attraction plus a hundredth of a repulsion that acts on the whole batch.

  .. math::
    L = \frac{1}{2B} \sum_b |v_b - c_{y_b}|^2
      + 0.01 \max\Big(0,\; 10 - \frac{1}{BC} \sum_b \sum_{c \neq y_b} |v_b - c_c|^2\Big)

  Attraction moves the centroids by a closed form, `metric.centroid_gradient`, which the
  weight of the loss does not scale.

  Args:
    features: (B, D).
    labels: (B,) int.
    centroids: (C, D).

  Returns:
    (loss (), what is added to the centroids' gradient (C, D)).
  """
  fixed = lax.stop_gradient(centroids)
  loss = metric.attraction(features, labels, fixed)
  loss += 0.01 * metric.repulsion(features, labels, centroids)
  return loss, metric.centroid_gradient(features, labels, centroids)


def paper(
  features: jax.Array, labels: jax.Array, centroids: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The large-margin loss in print, `metric.large_margin`, differentiated throughout.

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
  r"""Second stage of open long-tailed recognition.

  .. math::
    J = \sum_i a_i\, \ell_i + \lambda L(v, y, c), \qquad
    a = \text{reduction}(w, y)

  with v the direct features, not the meta-embedding. The centroids begin at zero: the
  surgery 'class_means' fills them.

  Args:
    net: a network whose head reads 'centroids', such as 'meta_embedding'.
    optimizer: of {'net': params, 'centroids': (C, D)}.
    loss: (outputs, batch) -> (B,).
    class_weights: step -> (C,).
    reduction: (class weights (C,), labels (B,)) -> coefficients (B,).
    weight: lambda.
    form: 'released', the authors' code, or 'paper'; they differ in form and constants.

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

  The objective is that of `oltr`, of a network whose head does not read the centroids.

  Args:
    net: returns a dict with 'logits' and 'features'.
    optimizer: of {'net': params, 'centroids': (C, D)}.
    loss: (outputs, batch) -> (B,).
    class_weights: step -> (C,).
    reduction: (class weights (C,), labels (B,)) -> coefficients (B,).
    weight: lambda.
    form: 'released', the authors' code, or 'paper'; they differ in form and constants.

  Raises:
    UserError: an unknown form.

  Liu et al., "Open Compound Domain Adaptation", CVPR 2020, arXiv 1909.03403: its first
  stage. Lambda is that of the authors' code, and so is where the centroids begin, at
  draws from N(0, 1): from zero they would draw all features together.
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

  The arguments are those of `oltr`, and
    discriminate: an entry of `FORMS`.
    reads: centroids -> what the head is given of them.
    first: (key, (C, D)) -> centroids in the beginning.
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
    # Nothing in value, and in the gradient what is written by hand: it is thus held
    # where the centroids are.
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
