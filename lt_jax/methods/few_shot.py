r"""Few-shot learning without forgetting: weights of rare classes are generated.

A network with a cosine classifier is trained on the classes that have many images, the
base classes. Then a generator learns, from base classes that pretend to be novel, to
make the weights of a class out of features of its images. At last it makes those of
the novel classes. The three are stages: 'supervised', `weight_generator` and, of no
steps, `novel_classifiers`.

Source: Gidaris and Komodakis, Dynamic Few-Shot Visual Learning without Forgetting,
CVPR 2018, arXiv 1804.09458, and the authors' code.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.errors import ClassError, UserError, lookup
from lt_jax.evals.collect import Survey
from lt_jax.losses import only
from lt_jax.method import (
  Batch,
  Method,
  Metrics,
  Network,
  PyTree,
  State,
  first_state,
  init_net,
  mean_metric,
  named_key,
  predictor,
  tick,
  update,
)
from lt_jax.methods.supervised import Loss, batch_metrics
from lt_jax.models.few_shot import WeightGenerator
from lt_jax.models.heads import CosineBias
from lt_jax.optim import Optimizer
from lt_jax.surgery import Surgery, class_sums, put


def weight_generator(
  net: Network,
  optimizer: Optimizer,
  loss: Loss,
  *,
  base: np.ndarray,
  image_shape: tuple[int, int, int],
  dropout: float = 0.5,
  gamma: float = 10.0,
) -> Method:
  r"""Learns to generate the weights of classes, an episode a step.

  .. math::
    w_k = \frac{1}{M_k} \sum_{i=1}^{M_k} g(z_{ki}), \qquad
    J = \frac{1}{Q} \sum_q \ell_q

  with w_k in the place of the K classes' own weights, in the classifier as well as
  where g (`lt_jax.models.few_shot.WeightGenerator`) looks weights up, which is among
  the other base classes; logits of classes that are not base are left out. The
  batch 'train' is what `lt_jax.data.episodes.episode_stream` makes: of features, so no
  image passes the trunk.

  The weights of the base classes, scale and bias are trained on with the generator, as
  in the authors' code. What is before the head has no gradient here: rules of the
  optimiser must keep weight decay from it, a 'learning_rate_scale' of 0 for
  'net/(?!head/).*'.

  Args:
    net: a network with the head 'cosine_bias', whose own outputs are the prediction.
    optimizer: of {'net': params, 'generator': params}.
    loss: (outputs, batch) -> (Q,); the authors' is cross-entropy.
    base: (C,) bool, NumPy.
    image_shape: (H, W, channels), by which the network is made.
    dropout: probability that an entry of a feature, exemplar or query, is 0.
    gamma: first sharpness of the generator's attention; 30 in the authors' ImageNet
      configurations.

  Raises:
    UserError: a dropout out of range; in `init`, another head, base classes that do
      not fit it or features of another size.
  """
  base = np.asarray(base, bool)
  generator = WeightGenerator(gamma)
  head = CosineBias(len(base))
  if not 0 <= dropout < 1:
    raise UserError(f'weight_generator: dropout must be in [0, 1), got {dropout}')

  def init(key: jax.Array, batches) -> State:
    images = jnp.zeros((1, *image_shape), jnp.float32)
    net_params, net_stats = init_net(net, named_key(key, 'init', 0), images)
    kernel = _cosine_kernel(net_params, base, 'weight_generator')
    features = batches['train']['queries'][:1]
    if features.shape[-1] != kernel.shape[0]:
      raise UserError(
        f'weight_generator: features of size {features.shape[-1]} for a network whose '
        f'own have {kernel.shape[0]}'
      )
    made = generator.init(named_key(key, 'generator', 0), features, kernel, base)
    params = {'net': net_params, 'generator': made['params']}
    return first_state(key, params, {'net': net_stats}, optimizer.init(params))

  def thinned(features: jax.Array, key: jax.Array) -> jax.Array:
    # Not divided by what is kept, as only directions of features count.
    return features * jax.random.bernoulli(key, 1 - dropout, features.shape)

  def objective(params: PyTree, batch: Batch, key: jax.Array):
    params = optimizer.held(params)
    exemplar_key, query_key = jax.random.split(key)
    classes, mask = batch['classes'], batch['exemplar_mask']
    own = params['net']['head']
    exemplars = thinned(batch['exemplars'], exemplar_key)
    made = generator.apply(
      {'params': params['generator']},
      exemplars.reshape(-1, exemplars.shape[-1]),
      own['kernel'],
      jnp.asarray(base).at[classes].set(False),
    ).reshape(exemplars.shape)
    mean = (made * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    changed = {**own, 'kernel': own['kernel'].at[:, classes].set(mean.T)}
    logits = head.apply({'params': changed}, thinned(batch['queries'], query_key))
    outputs = {'features': batch['queries'], 'logits': only(logits, base)}
    losses = loss(outputs, batch)
    value = losses.mean()
    return value, {'loss': mean_metric(value), **batch_metrics(outputs, batch, losses)}

  def step(state: State, batches) -> tuple[State, Metrics]:
    key = named_key(state.key, 'dropout', state.step)
    grads, metrics = jax.grad(objective, has_aux=True)(
      state.params, batches['train'], key
    )
    state, norms = update(state, grads, optimizer)
    return tick(state), metrics | norms

  return Method(init, step, predictor(net))


def novel_classifiers(
  *, stage: str, survey: Survey, base: np.ndarray, split: str = 'train'
) -> Surgery:
  """Generates the weights of the classes that are not base from all their images.

  The exemplars are the images of a split in stored order, without augmentation and in
  evaluation mode; network and base weights are those that the surgeries before this
  one left. Base weights stay as they are.

  Args:
    stage: an earlier one, whose generator it is.
    survey: passes with the stage's own network.
    base: (C,) bool, NumPy.
    split: whose images.

  Raises:
    UserError: that stage has no generator, the head is another or does not fit the base
      classes, every class is base, or a novel class has no image.
  """
  base = np.asarray(base, bool)
  if base.all():
    raise UserError(
      'novel_classifiers: every class is base, so there is nothing to generate'
    )

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    origin = lookup(earlier, 'finished stage', stage).params
    if 'generator' not in origin:
      raise UserError(f'novel_classifiers: stage {stage!r} has no weight generator')
    kernel = _cosine_kernel(fresh.params['net'], base, 'novel_classifiers')
    survey.outputs(fresh, split)  # there is such a split

    def fold(outputs, batch):
      made = WeightGenerator().apply(
        {'params': origin['generator']}, outputs['features'], kernel, base
      )
      return class_sums(made, batch, len(base))

    def measure() -> np.ndarray:
      sums, counts = survey.total(fresh, split, fold)
      empty = np.flatnonzero(~base & (counts == 0))
      if len(empty):
        raise ClassError('', empty[0], f' has no image in {split}, hence no weights')
      filled = np.array(kernel)
      filled[:, ~base] = (sums[~base] / counts[~base, None]).T
      return filled

    return put(fresh, 'params/net/head/kernel', kernel.shape, measure)

  return surgery


SURGERIES = {'novel_classifiers': novel_classifiers}


def _cosine_kernel(net: PyTree, base: np.ndarray, what: str) -> jax.Array:
  """Returns the kernel (D, C) of a 'cosine_bias' head, and refuses any other."""
  head = net['head']
  shapes = {name: getattr(leaf, 'shape', None) for name, leaf in head.items()}
  width = shapes.get('kernel', (0,))[0]
  if shapes != {'kernel': (width, len(base)), 'scale': (), 'bias': ()}:
    raise UserError(f"{what}: it needs a 'cosine_bias' head of {len(base)} classes")
  return head['kernel']
