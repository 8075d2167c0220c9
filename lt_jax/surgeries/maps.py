"""Adaptation in closed form: maps of features, or statistics, that fit the target.

A stage without steps has a map of features for each domain, fitted by a surgery that
sees the features of both domains but no labels. The network is deployed with the
target's map; source images are evaluated with the source's (`pairs.as_source`).

Maps are matrices (D, D) whatever dimension is chosen: a projection to a subspace is
followed by the map back, which preserves distances and the cost of an L2 penalty.
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
  """A map of features: (v - centre) K.

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
  """Maps each domain's features by the domain's own map before the head reads them.

  The maps are in `state.memory['map']` and `['map_source']`, where a surgery such as
  'coral' puts them. Until then they are the identity.

  Args:
    method: a method with a linear head.
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
  """`aligned_features` with a place for the dimension that 'align_subspaces' chooses.

  Args:
    method: a method with a linear head.
    dimensions: dimensions to choose from; by default those of `GRID` up to the number
      of features.

  Raises:
    UserError: a dimension that is not between 1 and the number of features.
  """
  mapped = aligned_features(method)

  def init(key, batches):
    state = mapped.init(key, batches)
    width = len(state.memory['map']['centre'])
    grid = sorted(dimensions) or [d for d in GRID if d <= width] or [width]
    for dimension in grid:
      if not 1 <= dimension <= width:
        raise UserError(
          f'aligned_subspaces: d = {dimension} is not between 1 and {width}, the '
          f'number of features: set {DIMENSIONS}'
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
  """The principal axes of features.

  Attributes:
    mean: (D,).
    axes: (D, r), orthonormal, with the largest variance first; r is the rank.
  """

  mean: np.ndarray
  axes: np.ndarray


def principal_axes(x: np.ndarray) -> Axes:
  """Returns the axes along which features (N, D) vary, in float64."""
  x = np.asarray(x, np.float64)
  mean = x.mean(0)
  centred = x - mean
  if len(x) < x.shape[1]:
    _, lengths, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes.T
  else:
    values, axes = np.linalg.eigh(centred.T @ centred)
    lengths, axes = np.sqrt(np.maximum(values[::-1], 0)), axes[:, ::-1]
  # For float32 features, anything shorter is rounding.
  rank = int((lengths > lengths[0] * max(x.shape) * np.finfo(np.float32).eps).sum())
  return Axes(mean, axes[:, : min(rank, len(x) - 1)])


def subspace_maps(source: Axes, target: Axes, dimension: int) -> tuple[Map, Map]:
  r"""Aligns the subspaces of two domains.

  .. math::
    x_s \mapsto (x_s - \mu_s) P_s M, \quad x_t \mapsto (x_t - \mu_t) P_t, \quad
    M = P_s^\top P_t

  where P are the first d principal axes and M aligns P_s with P_t as well as possible:
  it minimises |P_s M - P_t|. Here both maps are followed by the transpose of P_t, which
  maps the subspace back into the space.

  Args:
    source: axes of the source's features.
    target: axes of the target's features.
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

  Of the dimensions of 'aligned_subspaces' it takes the one for which a classifier of
  default strength is best, the smallest if tied.

  Args:
    survey: passes with the stage's own network.
    choose_by: 'source' for cross-validation on the source's labelled images, in the
      aligned subspace; 'oracle' for the labels of the target's training images, which a
      stream of the stage must provide. The latter is an upper bound, not a method.
    classifier: a key of `classifiers.CLASSIFIERS`.
    folds: number of folds of the source.

  Raises:
    UserError: an unknown name, a stage that is not wrapped in 'aligned_subspaces', a
      dimension that the data do not support, or hidden labels.
  """
  choose = lookup({'source': _by_source, 'oracle': _by_target}, 'choose_by', choose_by)
  kind = lookup(classifiers.CLASSIFIERS, 'classifier', classifier)

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    check_wrapped(fresh, 'subspaces', 'aligned_subspaces')
    survey.outputs(fresh, TARGET)  # raises if there is no target
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
  """Returns the State with the results of `fitted()` in its memory, by path."""
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
  """Rejects a dimension for which a domain has too few independent images."""
  for name, own in zip(('source', 'target'), axes, strict=True):
    rank = own.axes.shape[1]
    if largest > rank:
      raise UserError(
        f'aligned_subspaces: d = {largest}, but the {name} only varies in {rank} '
        f'directions: set {DIMENSIONS}'
      )


def _by_source(maps, kind, x, labels, seen, folds) -> float:
  """Returns the cross-validated accuracy on the source."""
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

  The target is only centred.

  Args:
    source: features (N, D).
    target: features (M, D).
    ridge: lambda, in units of the mean variance of the features of both domains. On
      standardised features, 1 is the constant in the paper's code.

  Returns:
    (map of the source, map of the target).

  Source: Sun et al., "Return of Frustratingly Easy Domain Adaptation", AAAI 2016, arXiv
  1511.05547, algorithm 1, which expects features with mean 0.
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
  """Gives the source's features the target's covariance, see `coral_maps`.

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


# Batch statistics.


def recalibrate(*, survey: Survey, net: Network, split: str = TARGET) -> Surgery:
  r"""Recomputes the statistics of batch normalisation on a split.

  .. math:: \mu = E_b\, \mu_b, \qquad
    \sigma^2 = E_b (\sigma_b^2 + \mu_b^2) - \mu^2

  over the evaluation batches b, each normalised by itself as in training. An incomplete
  last batch is left out.

  Args:
    survey: passes with the stage's own network.
    net: the same network, with batch statistics in training.
    split: the split of the images; no label is read.

  Raises:
    UserError: a network without batch normalisation or with frozen statistics, or fewer
      images than a batch.

  Source: Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation"
  (AdaBN), arXiv 1603.04779, algorithm 1, with exact means over the split.
  """

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    survey.outputs(fresh, split)
    own = fresh.stats['net']
    if not jax.tree.leaves(own):
      raise UserError(
        'recalibrate: the network has no batch normalisation: use a trunk that has it, '
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
        raise UserError(f'recalibrate: {split} has no full batch: lower eval_batch')
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

  A running average moves towards them by the same share wherever it starts, so two
  different starts reveal both the share and the statistics.
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
  """Returns sums of means and of mean squares over full batches, and their number."""
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
  """Returns the mean and variance over all batches, from the sums of `_moments`."""
  if 'mean' in moments and 'var' in moments:
    mean = moments['mean'] / count
    if not np.isfinite(mean).all():
      raise UserError(
        'recalibrate: the statistics of batch normalisation are frozen: set '
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
