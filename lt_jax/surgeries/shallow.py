"""Shallow classifiers on a network's features: each is a wrapper and a surgery.

They belong in a stage without steps, after a stage that has trained the features, or on
features from a file. What they fit is in the State, so it is saved and deployed as part
of the network.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.errors import UserError
from lt_jax.evals.collect import Survey
from lt_jax.method import Batch, Method, Outputs, State
from lt_jax.surgeries import classifiers
from lt_jax.surgery import Surgery, put

HEAD = 'params/net/head'


def linear_svm(method: Method, *, costs: Sequence[float] = classifiers.COSTS) -> Method:
  """Holds what the surgery of this name chooses; predictions come from the head.

  Args:
    method: a method with a linear head.
    costs: costs to choose from, the smallest first.

  Raises:
    UserError: no costs, or a cost that is not positive.
  """
  if not len(costs) or not (np.asarray(costs) > 0).all():
    raise UserError(
      f'linear_svm: costs must be a list of positive numbers, got {costs!r}'
    )

  def init(key, batches):
    state = method.init(key, batches)
    check_linear(state, 'linear_svm')
    memory = {
      'cost': jnp.zeros((), jnp.float32),
      'costs': jnp.asarray(sorted(costs), jnp.float32),
      'accuracy': jnp.zeros(len(costs), jnp.float32),
    }
    return state.replace(memory={**state.memory, 'linear_svm': memory})

  return Method(init, method.step, method.predict)


def check_linear(state: State, what: str) -> None:
  """Rejects networks whose head is not linear."""
  if set(state.params['net']['head']) != {'kernel', 'bias'}:
    raise UserError(f"{what}: it needs a 'linear' head: set model.head")


def fit_linear_svm(
  *,
  survey: Survey,
  folds: int = 3,
  balanced: bool = False,
  standardise: bool = True,
  split: str = 'train',
) -> Surgery:
  """Fits the head: a linear support vector machine for each class against the rest.

  The cost of an error is chosen by cross-validation, see `classifiers.chosen`.

  Args:
    survey: passes with the stage's own network.
    folds: number of folds.
    balanced: count rare classes as much as frequent ones.
    standardise: scale every feature to mean 0 and deviation 1 before it is penalised.
      Not for features that a map has mixed, as 'align_subspaces' does: there the
      directions that matter are not single features.
    split: the split of the images.

  Raises:
    UserError: the stage is not wrapped in 'linear_svm', or features that are not
      finite.
  """

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    check_wrapped(fresh, 'linear_svm', 'linear_svm')
    outputs = survey.outputs(fresh, split)
    width, classes = outputs['features'].shape[-1], outputs['logits'].shape[-1]
    room = fresh.memory['linear_svm']

    @functools.cache
    def fitted() -> classifiers.Chosen:
      x, labels = examples(survey, fresh, split)
      scale = classifiers.scaling(x) if standardise else None
      weights = classifiers.balanced(labels, classes) if balanced else None
      found = classifiers.chosen(
        'svm',
        scale(x) if scale else x,
        labels,
        classes,
        strengths=np.asarray(room['costs']).tolist(),
        folds=folds,
        weights=weights,
      )
      own = found.classifier
      return found._replace(classifier=own.after(scale) if scale else own)

    measured: dict[str, tuple[tuple[int, ...], Callable[[], Any]]] = {
      f'{HEAD}/kernel': ((width, classes), lambda: fitted().classifier.kernel),
      f'{HEAD}/bias': ((classes,), lambda: fitted().classifier.bias),
      'memory/linear_svm/cost': ((), lambda: np.asarray(fitted().strength)),
      'memory/linear_svm/accuracy': (room['costs'].shape, lambda: fitted().accuracy),
    }
    return put_all(fresh, measured)

  return surgery


def nearest_neighbour(method: Method, *, counts: Any, k: int = 1) -> Method:
  """Predicts by a vote of the nearest training images in feature space.

  Their features are in `state.memory['nearest_neighbour']`, where the surgery of this
  name puts them; until then predictions are meaningless.

  Args:
    method: any method.
    counts: (C,) training images per class.
    k: number of votes, see `classifiers.neighbour_scores`.

  Raises:
    UserError: k is not between 1 and the number of training images.
  """
  total, classes = int(np.sum(counts)), len(counts)
  if not 1 <= k <= total:
    raise UserError(f'nearest_neighbour: k is {k}; it must be from 1 to {total}')

  def init(key, batches):
    state = method.init(key, batches)
    images = batches['train']['image'][:1]
    features = jax.eval_shape(lambda: method.predict(state, images)['features'])
    memory = {
      'features': jnp.zeros((total, features.shape[-1]), jnp.float32),
      'labels': jnp.zeros(total, jnp.int32),
    }
    return state.replace(memory={**state.memory, 'nearest_neighbour': memory})

  def predict(state, images):
    outputs = method.predict(state, images)
    known = state.memory['nearest_neighbour']
    scores = classifiers.neighbour_scores(
      outputs['features'], known['features'], known['labels'], num_classes=classes, k=k
    )
    return {**outputs, 'logits': scores}

  return Method(init, method.step, predict)


def remember_images(*, survey: Survey, split: str = 'train') -> Surgery:
  """Stores features and labels of a split where 'nearest_neighbour' reads them.

  Args:
    survey: passes with the stage's own network.
    split: the split of the images, as many as the stage trains on.

  Raises:
    UserError: the stage is not wrapped in 'nearest_neighbour', or features that are not
      finite.
  """

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    check_wrapped(fresh, 'nearest_neighbour', 'nearest_neighbour')
    survey.outputs(fresh, split)  # raises if there is no such split
    room = fresh.memory['nearest_neighbour']
    seen = functools.cache(lambda: examples(survey, fresh, split))
    return put_all(
      fresh,
      {
        f'memory/nearest_neighbour/{name}': (room[name].shape, lambda i=i: seen()[i])
        for i, name in enumerate(('features', 'labels'))
      },
    )

  return surgery


def check_wrapped(state: State, place: str, wrapper: str) -> None:
  """Rejects a State that has no place for what a surgery fits."""
  if place not in state.memory:
    raise UserError(f'the stage has no wrapper {wrapper!r}, which this surgery fits')


def examples(survey: Survey, state: State, split: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the features (N, D) and labels (N,) of a split.

  Raises:
    UserError: hidden labels, features that are not finite, or only one class.
  """
  seen = survey.collect(state, split, features_and_labels)
  if 'label' not in seen:
    raise UserError(
      f'the labels of {split} are hidden, so nothing can be fitted to them'
    )
  try:
    classifiers.check_examples(seen['features'], seen['label'])
  except UserError as error:
    raise UserError(f'{split}: {error}') from error
  return seen['features'], seen['label']


def features_and_labels(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns what to keep of images: features, and labels if they have any."""
  labels = {'label': batch['label']} if 'label' in batch else {}
  return {'features': outputs['features']} | labels


def put_all(
  state: State, measured: Mapping[str, tuple[tuple[int, ...], Callable[[], Any]]]
) -> State:
  """Returns the State with measured leaves; path -> (shape, function to measure)."""
  for path, (shape, measure) in measured.items():
    state = put(state, path, shape, measure)
  return state


WRAPPERS = {'linear_svm': linear_svm, 'nearest_neighbour': nearest_neighbour}
SURGERIES = {'linear_svm': fit_linear_svm, 'nearest_neighbour': remember_images}
