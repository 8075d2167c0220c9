r"""Few-shot learning without forgetting: generates classifier weights of rare classes.

First, a network with a cosine classifier is trained on the classes with many images,
the base classes. Then a generator learns to make a class's weights from features of its
images, using base classes that pretend to be novel. Finally it generates the weights of
the novel classes. These are three stages: 'supervised', `weight_generator` and, without
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
  r"""Learns to generate classifier weights, with one episode per step.

  .. math::
    w_k = \frac{1}{M_k} \sum_{i=1}^{M_k} g(z_{ki}), \qquad
    J = \frac{1}{Q} \sum_q \ell_q

  where w_k replaces the K classes' own weights, both in the classifier and where g
  (`lt_jax.models.few_shot.WeightGenerator`) looks weights up, which is among the other
  base classes. Logits of classes that are not base are left out. The batch 'train'
  comes from `lt_jax.data.episodes.episode_stream` and holds features, so no image
  passes through the trunk.

  The weights of the base classes, scale and bias keep training along with the
  generator, as in the authors' code. Everything before the head has no gradient here; a
  'learning_rate_scale' of 0 for 'net/(?!head/).*' must protect it from weight decay.

  Args:
    net: a network with the head 'cosine_bias'; predictions are its own outputs.
    optimizer: optimiser of {'net': params, 'generator': params}.
    loss: (outputs, batch) -> (Q,); cross-entropy in the authors' code.
    base: (C,) bool, NumPy.
    image_shape: (H, W, channels), used to initialise the network.
    dropout: probability of setting an entry of a feature to 0, for exemplars and
      queries.
    gamma: initial sharpness of the generator's attention; 30 in the authors' ImageNet
      configs.

  Raises:
    UserError: a dropout out of range; in `init`, a different head, base classes that do
      not fit it, or features of a different size.
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
        f'weight_generator: features have size {features.shape[-1]}, but those of the '
        f'network have size {kernel.shape[0]}'
      )
    made = generator.init(named_key(key, 'generator', 0), features, kernel, base)
    params = {'net': net_params, 'generator': made['params']}
    return first_state(key, params, {'net': net_stats}, optimizer.init(params))

  def thinned(features: jax.Array, key: jax.Array) -> jax.Array:
    # Not rescaled by the kept share, because only directions of features count.
    return features * jax.random.bernoulli(key, 1 - dropout, features.shape)

  def objective(params: PyTree, batch: Batch, key: jax.Array):
    params = optimizer.held(params)
    exemplar_key, query_key = jax.random.split(key)
    classes, mask = batch['pretended'], batch['exemplar_mask']
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
  """Generates the weights of all classes that are not base from all their images.

  The exemplars are the images of a split in stored order, without augmentation and in
  evaluation mode. The network and the base weights come from earlier surgeries of the
  stage. Base weights do not change.

  Args:
    stage: the earlier stage that the generator comes from.
    survey: passes with the stage's own network.
    base: (C,) bool, NumPy.
    split: the split that the images come from.

  Raises:
    UserError: that stage has no generator, the head is of another kind or does not fit
      the base classes, every class is base, or a novel class has no image.
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
    survey.outputs(fresh, split)  # raises if there is no such split

    def fold(outputs, batch):
      made = WeightGenerator().apply(
        {'params': origin['generator']}, outputs['features'], kernel, base
      )
      return class_sums(made, batch, len(base))

    def measure() -> np.ndarray:
      sums, counts = survey.total(fresh, split, fold)
      empty = np.flatnonzero(~base & (counts == 0))
      if len(empty):
        raise ClassError('', empty[0], f' has no image in {split} to make weights from')
      filled = np.array(kernel)
      filled[:, ~base] = (sums[~base] / counts[~base, None]).T
      return filled

    return put(fresh, 'params/net/head/kernel', kernel.shape, measure)

  return surgery


SURGERIES = {'novel_classifiers': novel_classifiers}


def _cosine_kernel(net: PyTree, base: np.ndarray, what: str) -> jax.Array:
  """Returns the kernel (D, C) of a 'cosine_bias' head, and rejects other heads."""
  head = net['head']
  shapes = {name: getattr(leaf, 'shape', None) for name, leaf in head.items()}
  width = shapes.get('kernel', (0,))[0]
  if shapes != {'kernel': (width, len(base)), 'scale': (), 'bias': ()}:
    raise UserError(f"{what}: it needs a 'cosine_bias' head of {len(base)} classes")
  return head['kernel']
