"""Adaptation in closed form: maps of features, or statistics, that fit the target.

A stage of no steps has a map of features for each domain, put there by a surgery that
sees the features of both and the labels of none. The network is deployed with the
target's; images of the source are measured with their own (`pairs.as_source`).

Maps are matrices (D, D) whatever dimension is chosen: a projection to a subspace is
followed by the way back, which changes neither distances nor what an L2 penalty costs.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.errors import UserError, lookup
from lt_jax.evals.collect import Survey
from lt_jax.method import Batch, Method, Network, Outputs, State, forward
from lt_jax.models.heads import product
from lt_jax.surgeries import classifiers
from lt_jax.surgeries.shallow import (
  check_linear,
  check_wrapped,
  examples,
  features_and_labels,
  put_all,
)
from lt_jax.surgery import Surgery

PyTree = Any

TARGET = 'target/train'

DIMENSIONS = 'wrappers.aligned_subspaces.dimensions of the stage'


class Map(NamedTuple):
  """What is done to features: (v - centre) K.

  Attributes:
    centre: (D,).
    kernel: K, (D, D).
  """

  centre: np.ndarray
  kernel: np.ndarray

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """Maps features (N, D) to (N, D)."""
    return (x - self.centre) @ self.kernel


def aligned_features(method: Method) -> Method:
  """Maps features before the head reads them, those of each domain by a map of its own.

  They are in `state.memory['map']` and `['map_source']`, where a surgery such as
  'coral' puts them; before, they change nothing.

  Args:
    method: one whose head is linear.
  """

  def init(key, batches):
    state = method.init(key, batches)
    check_linear(state, 'aligned_features')
    width = state.params['net']['head']['kernel'].shape[0]
    first = {'centre': jnp.zeros(width), 'kernel': jnp.eye(width)}
    maps = {name: jax.tree.map(jnp.copy, first) for name in ('map', 'map_source')}
    return state.replace(memory={**state.memory, **maps})

  def predict(state, images):
    outputs, own = method.predict(state, images), state.memory['map']
    head = state.params['net']['head']
    features = product(outputs['features'] - own['centre'][None], own['kernel'])
    logits = product(features, head['kernel']) + head['bias'][None]
    return {**outputs, 'features': features, 'logits': logits}

  return Method(init, method.step, predict)


GRID = (2, 5, 10, 20, 30, 40, 60)


def aligned_subspaces(method: Method, *, dimensions: Sequence[int] = ()) -> Method:
  """The same with room for the dimension that the surgery 'align_subspaces' chooses.

  Args:
    method: one whose head is linear.
    dimensions: those to choose from; none: those of `GRID` that are no more than the
      features.

  Raises:
    UserError: a dimension that is not from 1 to the number of features.
  """
  mapped = aligned_features(method)

  def init(key, batches):
    state = mapped.init(key, batches)
    width = len(state.memory['map']['centre'])
    grid = sorted(dimensions) or [d for d in GRID if d <= width] or [width]
    for dimension in grid:
      if not 1 <= dimension <= width:
        raise UserError(
          f'aligned_subspaces: d = {dimension} is not from 1 to {width}, the features: '
          f'set {DIMENSIONS}'
        )
    memory = {
      'dimension': jnp.zeros((), jnp.int32),
      'dimensions': jnp.asarray(grid, jnp.int32),
      'accuracy': jnp.zeros(len(grid), jnp.float32),
    }
    return state.replace(memory={**state.memory, 'subspaces': memory})

  return Method(init, mapped.step, mapped.predict)


# Subspaces.


class Axes(NamedTuple):
  """Principal axes of features.

  Attributes:
    mean: (D,).
    axes: (D, r), orthonormal, the largest variance first; r is the rank.
  """

  mean: np.ndarray
  axes: np.ndarray


def principal_axes(x: np.ndarray) -> Axes:
  """Returns the axes along which features (N, D) vary at all, in float64."""
  x = np.asarray(x, np.float64)
  mean = x.mean(0)
  centred = x - mean
  if len(x) < x.shape[1]:
    _, lengths, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes.T
  else:
    values, axes = np.linalg.eigh(centred.T @ centred)
    lengths, axes = np.sqrt(np.maximum(values[::-1], 0)), axes[:, ::-1]
  # Of features in float32, what is shorter is rounding.
  rank = int((lengths > lengths[0] * max(x.shape) * np.finfo(np.float32).eps).sum())
  return Axes(mean, axes[:, : min(rank, len(x) - 1)])


def subspace_maps(source: Axes, target: Axes, dimension: int) -> tuple[Map, Map]:
  r"""Aligns the subspaces of two domains.

  .. math::
    x_s \mapsto (x_s - \mu_s) P_s M, \quad x_t \mapsto (x_t - \mu_t) P_t, \quad
    M = P_s^\top P_t

  with P the first d principal axes: M is what turns P_s into P_t as nearly as can be,
  the least of |P_s M - P_t|. Here both are followed by the transpose of P_t, which
  turns the subspace back into the space.

  Args:
    source: of the source's features.
    target: of the target's.
    dimension: d.

  Returns:
    (map of the source, map of the target).

  Source: Fernando et al., "Unsupervised Visual Domain Adaptation Using Subspace
  Alignment", ICCV 2013, equation 2 and algorithm 1.
  """
  p_s, p_t = source.axes[:, :dimension], target.axes[:, :dimension]
  back = p_t @ p_t.T
  return Map(source.mean, p_s @ (p_s.T @ back)), Map(target.mean, back)


def align_subspaces(
  *,
  survey: Survey,
  choose_by: str = 'source',
  classifier: str = 'svm',
  folds: int = 2,
) -> Surgery:
  """Aligns the subspaces of source and target, see `subspace_maps`.

  The dimension is the one of 'aligned_subspaces' at which a classifier of its default
  strength is best, the least of equals.

  Args:
    survey: passes with the stage's own network.
    choose_by: 'source': by folds of the source's labelled images, in the aligned
      subspace. 'oracle': by the labels of the target's training images, which a stream
      of the stage must give; an upper bound, and no method.
    classifier: a key of `classifiers.CLASSIFIERS`.
    folds: of the source.

  Raises:
    UserError: an unknown name, a stage that is not wrapped in 'aligned_subspaces', a
      dimension that the data do not support, or labels that are hidden.
  """
  choose = lookup({'source': _by_source, 'oracle': _by_target}, 'choose_by', choose_by)
  kind = lookup(classifiers.CLASSIFIERS, 'classifier', classifier)

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    check_wrapped(fresh, 'subspaces', 'aligned_subspaces')
    survey.outputs(fresh, TARGET)  # there is a target
    room = fresh.memory['subspaces']

    @functools.cache
    def fitted() -> dict[str, Any]:
      x, labels = examples(survey, fresh, 'train')
      seen = survey.collect(fresh, TARGET, features_and_labels)
      axes = [principal_axes(features) for features in (x, seen['features'])]
      dimensions = np.asarray(room['dimensions']).tolist()
      _check_supported(dimensions[-1], axes)
      maps = [subspace_maps(*axes, dimension) for dimension in dimensions]
      accuracy = np.array([choose(pair, kind, x, labels, seen, folds) for pair in maps])
      best = int(np.argmax(accuracy))
      source, target = maps[best]
      return {
        'map/centre': target.centre,
        'map/kernel': target.kernel,
        'map_source/centre': source.centre,
        'map_source/kernel': source.kernel,
        'subspaces/dimension': np.asarray(dimensions[best]),
        'subspaces/accuracy': accuracy,
      }

    return _put_memory(fresh, fitted)

  return surgery


def _put_memory(state: State, fitted: Callable[[], Mapping[str, Any]]) -> State:
  """Returns the State with what `fitted()` has, by path in its memory."""
  paths = [(name, leaf) for name in ('map', 'map_source') for leaf in Map._fields]
  if 'subspaces' in state.memory:
    paths += [('subspaces', 'dimension'), ('subspaces', 'accuracy')]
  measured = {}
  for name, leaf in paths:
    shape = state.memory[name][leaf].shape
    measured[f'memory/{name}/{leaf}'] = (
      shape,
      lambda path=f'{name}/{leaf}': fitted()[path],
    )
  return put_all(state, measured)


def _check_supported(largest: int, axes: Sequence[Axes]) -> None:
  """Refuses a dimension that a domain has not enough independent images for."""
  for name, own in zip(('source', 'target'), axes, strict=True):
    rank = own.axes.shape[1]
    if largest > rank:
      raise UserError(
        f'aligned_subspaces: d = {largest}, but the {name} varies in {rank} directions '
        f'only: set {DIMENSIONS}'
      )


def _by_source(maps, kind, x, labels, seen, folds) -> float:
  """Returns the accuracy on the source, by folds."""
  del seen
  mapped = maps[0](x).astype(np.float32)
  classes, labels = np.unique(labels, return_inverse=True)
  fold, found = classifiers.folds_of(labels, folds), np.zeros(len(labels), np.int64)
  for number in range(folds):
    out, one = fold == number, (kind.default,)
    (fitted,) = kind.fit(
      mapped, labels, len(classes), one, weights=1.0 * (fold != number)
    )
    found[out] = fitted(mapped[out]).argmax(1)
  return classifiers.per_class_accuracy(found, labels)


def _by_target(maps, kind, x, labels, seen, folds) -> float:
  """Returns the accuracy on the target's labelled images."""
  del folds
  if 'label' not in seen:
    raise UserError(
      "align_subspaces: choose_by='oracle' needs the target's labels, which no stream "
      'of the stage gives'
    )
  mapped = maps[0](x).astype(np.float32)
  target = maps[1](seen['features']).astype(np.float32)
  classes = int(max(labels.max(), seen['label'].max())) + 1
  (fitted,) = kind.fit(mapped, labels, classes, (kind.default,))
  return classifiers.per_class_accuracy(fitted(target).argmax(1), seen['label'])


# Covariances.


def coral_maps(source: np.ndarray, target: np.ndarray, ridge: float) -> tuple[Map, Map]:
  r"""Gives the source the covariance of the target.

  .. math:: x_s \mapsto (x_s - \mu_s) C_s^{-1/2} C_t^{1/2}, \quad
    C = \mathrm{cov} + \lambda I

  and of the target only the mean is taken away.

  Args:
    source: features (N, D).
    target: features (M, D).
    ridge: lambda, in units of the mean variance of the features of both domains: on
      standardised features 1 is the constant of the paper's code.

  Returns:
    (map of the source, map of the target).

  Source: Sun et al., "Return of Frustratingly Easy Domain Adaptation", AAAI 2016, arXiv
  1511.05547, algorithm 1, which expects features of mean 0.
  """
  both = [np.asarray(x, np.float64) for x in (source, target)]
  covariances = [np.atleast_2d(np.cov(x, rowvar=False)) for x in both]
  width = len(covariances[0])
  unit = np.mean([np.trace(c) for c in covariances]) / width
  floor = ridge * (unit if unit > 0 else 1) * np.eye(width)

  def power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix + floor)
    return (vectors * np.maximum(values, 0) ** exponent) @ vectors.T

  kernel = power(covariances[0], -0.5) @ power(covariances[1], 0.5)
  return Map(both[0].mean(0), kernel), Map(both[1].mean(0), np.eye(width))


def coral(*, survey: Survey, ridge: float = 1.0) -> Surgery:
  """Gives features of the source the covariance of the target's, see `coral_maps`.

  Args:
    survey: passes with the stage's own network.
    ridge: see `coral_maps`.

  Raises:
    UserError: the stage is not wrapped in 'aligned_features', a ridge that is not
      positive, or features that are not finite.
  """
  if not ridge > 0:
    raise UserError(f'coral: ridge is {ridge!r}; it must be positive')

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    check_wrapped(fresh, 'map', 'aligned_features')
    survey.outputs(fresh, TARGET)

    @functools.cache
    def fitted() -> dict[str, np.ndarray]:
      x, _ = examples(survey, fresh, 'train')
      seen = survey.collect(fresh, TARGET, features_and_labels)
      source, target = coral_maps(x, seen['features'], ridge)
      return {f'map/{name}': value for name, value in target._asdict().items()} | {
        f'map_source/{name}': value for name, value in source._asdict().items()
      }

    return _put_memory(fresh, fitted)

  return surgery


# Statistics of batch normalisation.


def recalibrate(*, survey: Survey, net: Network, split: str = TARGET) -> Surgery:
  r"""Takes the statistics of batch normalisation from a split, in place of training's.

  .. math:: \mu = E_b\, \mu_b, \qquad
    \sigma^2 = E_b (\sigma_b^2 + \mu_b^2) - \mu^2

  over the batches b of evaluation, each normalised by itself as in training. A last
  batch that is not full is left out.

  Args:
    survey: passes with the stage's own network.
    net: the same network, which normalises by the batch in training.
    split: whose images; their labels are not read.

  Raises:
    UserError: a network without batch normalisation or with frozen one, or fewer images
      than a batch.

  Source: Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation"
  (AdaBN), arXiv 1603.04779, algorithm 1, with exact means over the split.
  """

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    survey.outputs(fresh, split)
    own = fresh.stats['net']
    if not jax.tree.leaves(own):
      raise UserError(
        'recalibrate: the network has no batch normalisation: take a trunk that has, '
        'such as --config.model.trunk=digits_cnn'
      )
    paths = [
      jax.tree_util.keystr(path, simple=True, separator='/')
      for path, _ in jax.tree_util.tree_leaves_with_path(own)
    ]

    @functools.cache
    def measured() -> dict[str, np.ndarray]:
      moments, seen = survey.total(fresh, split, _moments, _batch_statistics(net))
      if not seen:
        raise UserError(
          f'recalibrate: {split} has no full batch of eval_batch images: lower that'
        )
      found = jax.tree_util.tree_leaves_with_path(_as_one(moments, seen))
      return {
        jax.tree_util.keystr(path, simple=True, separator='/'): leaf
        for path, leaf in found
      }

    leaves = jax.tree.leaves(own)
    return put_all(
      fresh,
      {
        f'stats/net/{path}': (leaf.shape, lambda path=path: measured()[path])
        for path, leaf in zip(paths, leaves, strict=True)
      },
    )

  return surgery


def _batch_statistics(net: Network):
  """Returns (state, images) -> the mean and variance of the batch in every layer.

  A running average moves towards them by the same share wherever it was: two of them
  tell that share, and what they move towards.
  """

  def apply(state: State, images: jax.Array) -> Outputs:
    params, stats = state.params['net'], state.stats['net']

    def moved(value: float) -> PyTree:
      filled = jax.tree.map(lambda x: jnp.full_like(x, value), stats)
      return forward(net, params, filled, images, train=True)[1]

    def towards(low, high):
      share = 1 - (high - low)
      return jnp.where(share > 0, low / jnp.where(share > 0, share, 1), jnp.nan)

    return {'statistics': jax.tree.map(towards, moved(0.0), moved(1.0))}

  return apply


def _moments(outputs: Outputs, batch: Batch) -> tuple[PyTree, jax.Array]:
  """Returns sums over full batches: of means and mean squares, and their number."""
  full = batch['mask'].all().astype(jnp.float32)

  def sums(node):
    if 'mean' in node and 'var' in node:
      return {
        'mean': full * node['mean'],
        'var': full * (node['var'] + node['mean'] ** 2),
      }
    return {name: sums(inner) for name, inner in node.items()}

  return sums(outputs['statistics']), full


def _as_one(moments: PyTree, count: np.ndarray) -> PyTree:
  """Returns mean and variance of all batches, from the sums of `_moments`."""
  if 'mean' in moments and 'var' in moments:
    mean = moments['mean'] / count
    if not np.isfinite(mean).all():
      raise UserError(
        'recalibrate: statistics of batch normalisation do not move: set '
        "model.batch_norm of the stage to 'global'"
      )
    return {'mean': mean, 'var': np.maximum(moments['var'] / count - mean**2, 0)}
  return {name: _as_one(inner, count) for name, inner in moments.items()}


WRAPPERS = {
  'aligned_features': aligned_features,
  'aligned_subspaces': aligned_subspaces,
}
SURGERIES = {
  'align_subspaces': align_subspaces,
  'coral': coral,
  'recalibrate': recalibrate,
}
