"""Classifiers on features: those with a unique optimum, and a small network.

There are linear support vector machines, softmax and ridge regression, class means and
nearest neighbours; `small_network` has a file of its own. Each is an entry of
`CLASSIFIERS`: a function of features, labels and a list of strengths that returns one
classifier per strength. `chosen` picks the strength by cross-validation on the training
data. Everything works on arrays, without a config.

The convex ones are solved by L-BFGS for all classes at once. A step costs two products
of the features with a (D, C) matrix. The line search needs no more, because scores are
linear in the step length.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lt_jax.errors import UserError, lookup
from lt_jax.surgeries.small_network import small_network

HISTORY = 10
"""Number of (step, gradient change) pairs from which L-BFGS estimates curvature."""

MOST_STEPS = 1000

ROUGH = 1e-2
"""Tolerance of fits that only serve to choose a strength. They took a sixth of the time
of exact ones; the choice is the same, or close by where strengths are nearly level."""

SEARCH_STEPS = 12
"""Largest number of slopes that a line search evaluates."""


class Linear(NamedTuple):
  """A linear classifier.

  Attributes:
    kernel: W, (D, C).
    bias: b, (C,).
  """

  kernel: np.ndarray
  bias: np.ndarray

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """Returns x W + b, (N, C), for features (N, D)."""
    return x @ self.kernel + self.bias

  def after(self, scaling: 'Scaling') -> 'Linear':
    """Returns the equivalent classifier for features before scaling."""
    kernel = self.kernel / scaling.deviation[:, None]
    return Linear(kernel, self.bias - scaling.mean @ kernel)


class Scaling(NamedTuple):
  """Scales every feature to mean 0 and standard deviation 1.

  Attributes:
    mean: (D,).
    deviation: (D,); 1 for a constant feature.
  """

  mean: np.ndarray
  deviation: np.ndarray

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """Returns (x - mean) / deviation for features (N, D)."""
    return (x - self.mean) / self.deviation


def scaling(x: np.ndarray) -> Scaling:
  """Returns the scaling for features (N, D)."""
  deviation = x.std(0)
  return Scaling(x.mean(0), np.where(deviation > 0, deviation, 1).astype(x.dtype))


class Neighbours(NamedTuple):
  """A classifier in which the nearest examples vote.

  Attributes:
    examples: (N, D).
    labels: (N,).
    num_classes: C.
    k: number of votes.
  """

  examples: np.ndarray
  labels: np.ndarray
  num_classes: int
  k: int

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """Returns the scores (M, C) for features (M, D)."""
    votes = functools.partial(neighbour_scores, num_classes=self.num_classes, k=self.k)
    parts = np.array_split(x, max(1, -(-len(x) // 1000)))
    examples, labels = jnp.asarray(self.examples), jnp.asarray(self.labels)
    compiled = jax.jit(votes)
    return np.concatenate([compiled(part, examples, labels) for part in parts])


def neighbour_scores(
  x: jax.Array, examples: jax.Array, labels: jax.Array, *, num_classes: int, k: int = 1
) -> jax.Array:
  r"""Returns the votes of the k nearest examples, with ties broken by distance.

  .. math:: z_c = n_c + \tfrac{1}{2} \frac{d_{\min}}{d_c}

  where n_c is the number of votes for class c, d_c the squared distance to its nearest
  example and d_min the smallest of these. Among classes with equal votes the one with
  the nearest example wins; with k = 1 classes are ordered by their nearest example.

  Args:
    x: (B, D).
    examples: (N, D).
    labels: (N,) int.
    num_classes: C.
    k: number of votes, at most N.

  Returns:
    (B, C).
  """
  product = jnp.matmul(x, examples.T, precision=lax.Precision.HIGHEST)
  squares = (x * x).sum(1)[:, None] + (examples * examples).sum(1)[None] - 2 * product
  squares = jnp.maximum(squares, 0)
  nearest = lax.top_k(-squares, k)[1]
  votes = jax.nn.one_hot(labels[nearest], num_classes).sum(1)
  by_class = jax.ops.segment_min(squares.T, labels, num_classes).T
  tiny = jnp.finfo(x.dtype).tiny
  least = jnp.maximum(by_class.min(1, keepdims=True), tiny)
  return votes + least / jnp.maximum(by_class, tiny) / 2


# Convex problems.


class Loss(NamedTuple):
  """A loss as a function of scores; a problem sums it over examples.

  Attributes:
    slope: (scores (N, C), is_true (N, C) bool) -> its derivative by the scores (N, C).
    axis: axis of (D, C) for sums: 0 if each class is a separate problem, None if all of
      them are one problem.
    bias_decays: whether the bias is penalised too.
  """

  slope: Callable[[jax.Array, jax.Array], jax.Array]
  axis: int | None
  bias_decays: bool


def _squared_hinge(scores: jax.Array, is_true: jax.Array) -> jax.Array:
  """Returns the derivative of max(0, 1 - t z)^2; t is 1 for the true class, else -1."""
  sign = jnp.where(is_true, 1.0, -1.0).astype(scores.dtype)
  return -2 * sign * jnp.maximum(1 - sign * scores, 0)


def _cross_entropy(scores: jax.Array, is_true: jax.Array) -> jax.Array:
  return jax.nn.softmax(scores) - is_true.astype(scores.dtype)


SQUARED_HINGE = Loss(_squared_hinge, axis=0, bias_decays=True)
CROSS_ENTROPY = Loss(_cross_entropy, axis=None, bias_decays=False)


def svm(
  x: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  costs: Sequence[float] = (1.0,),
  *,
  weights: np.ndarray | None = None,
  tolerance: float = 1e-4,
) -> list[Linear]:
  r"""Linear support vector machines, one class against the rest.

  .. math::
    \tfrac{1}{2} (|w_c|^2 + b_c^2) + C \sum_n a_n \max(0, 1 - t_{nc} (x_n w_c + b_c))^2

  with t = 1 for examples of class c and -1 for others. As in liblinear, b is the weight
  of a constant feature and penalised like the others.

  Args:
    x: features (N, D).
    labels: (N,) int.
    num_classes: the number of classes.
    costs: the values of C.
    weights: a (N,), 0 for examples to leave out; 1 by default.
    tolerance: of the norm of a class's gradient, relative to that at w = 0.

  Returns:
    a classifier for each cost, in the same order.

  Fan et al., "LIBLINEAR", JMLR 9, 2008, appendix B: the primal problem with L2 loss,
  scikit-learn's `LinearSVC(dual=False)`.
  """
  return _path(SQUARED_HINGE, x, labels, num_classes, costs, weights, tolerance)


def softmax(
  x: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  costs: Sequence[float] = (1.0,),
  *,
  weights: np.ndarray | None = None,
  tolerance: float = 1e-4,
) -> list[Linear]:
  r"""Multinomial logistic regression with an L2 penalty, except on the bias.

  .. math:: \tfrac{1}{2} |W|^2 + C \sum_n a_n \mathrm{CE}(x_n W + b, y_n)

  as in scikit-learn's `LogisticRegression`. The arguments are those of `svm`.
  """
  return _path(CROSS_ENTROPY, x, labels, num_classes, costs, weights, tolerance)


def _path(
  loss: Loss,
  x: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  costs: Sequence[float],
  weights: np.ndarray | None,
  tolerance: float,
) -> list[Linear]:
  """Solves for rising costs, each starting from the previous solution."""
  ones = np.ones((len(x), 1), x.dtype)
  features = jnp.asarray(np.concatenate([x, ones], axis=1))
  labels = jnp.asarray(labels)
  weights = np.ones(len(x)) if weights is None else weights
  kernel = jnp.zeros((features.shape[1], num_classes), features.dtype)
  found = {}
  for cost in sorted(set(costs)):
    own = jnp.asarray(cost * weights, features.dtype)
    kernel = _solve(features, labels, own, kernel, tolerance, loss=loss)
    solved = np.asarray(kernel)
    found[cost] = Linear(solved[:-1], solved[-1])
  return [found[cost] for cost in costs]


class _Search(NamedTuple):
  """The state of L-BFGS; numbers per problem are (1, C), or (1, 1) for one problem."""

  kernel: jax.Array
  scores: jax.Array
  gradient: jax.Array
  steps: jax.Array  # (m, D, C), the latest last
  changes: jax.Array  # changes of the gradient, likewise
  inverse: jax.Array  # (m, ...), one over their product; 0 if unused
  count: jax.Array


@functools.partial(jax.jit, static_argnames='loss')
def _solve(
  x: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  first: jax.Array,
  tolerance: float,
  *,
  loss: Loss,
) -> jax.Array:
  """Minimises half the squared length of a kernel plus the weighted sum of losses.

  Args:
    x: (N, D), the last feature constant.
    labels: (N,).
    weights: (N,), weights of the examples' losses.
    first: (D, C), the initial kernel.
    tolerance: of the gradient, relative to that at zero.
    loss: the loss of the scores.

  Returns:
    the kernel (D, C).
  """
  is_true = labels[:, None] == jnp.arange(first.shape[1])[None]
  decay = jnp.ones((len(first), 1), x.dtype)
  if not loss.bias_decays:
    decay = decay.at[-1].set(0)
  times = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

  def slope(scores):
    return weights[:, None] * loss.slope(scores, is_true)

  def gradient(kernel, scores):
    return decay * kernel + times(x.T, slope(scores))

  def inner(a, b):
    return (a * b).sum(loss.axis, keepdims=True)

  scores = times(x, first)
  begin = gradient(jnp.zeros_like(first), 0 * scores)
  enough = (tolerance**2) * inner(begin, begin)

  def unfinished(gradient):
    return inner(gradient, gradient) > enough

  def step(now: _Search) -> _Search:
    direction = -_curved(now, inner)
    direction = jnp.where(unfinished(now.gradient), direction, 0)
    along = times(x, direction)
    length = _line_search(now, direction, along, slope, decay, inner)
    kernel, scores = now.kernel + length * direction, now.scores + length * along
    after = gradient(kernel, scores)
    taken, change = length * direction, after - now.gradient
    product = inner(taken, change)
    inverse = jnp.where(product > 0, 1 / jnp.where(product > 0, product, 1), 0)
    return _Search(
      kernel,
      scores,
      after,
      jnp.concatenate([now.steps[1:], taken[None]]),
      jnp.concatenate([now.changes[1:], change[None]]),
      jnp.concatenate([now.inverse[1:], inverse[None]]),
      now.count + 1,
    )

  history = jnp.zeros((HISTORY, *first.shape), x.dtype)
  start = _Search(
    first,
    scores,
    gradient(first, scores),
    history,
    history,
    jnp.zeros((HISTORY, *enough.shape), x.dtype),
    jnp.int32(0),
  )

  def goes_on(now: _Search) -> jax.Array:
    return unfinished(now.gradient).any() & (now.count < MOST_STEPS)

  return lax.while_loop(goes_on, step, start).kernel


def _curved(now: _Search, inner: Callable) -> jax.Array:
  """Returns the gradient times the approximate inverse curvature.

  Nocedal and Wright, "Numerical Optimization", algorithm 7.4.
  """
  pairs = now.steps, now.changes, now.inverse

  def backward(q, pair):
    step, change, inverse = pair
    share = inverse * inner(step, q)
    return q - share * change, share

  q, shares = lax.scan(backward, now.gradient, pairs, reverse=True)
  length = inner(now.changes[-1], now.changes[-1])
  known = (now.inverse[-1] > 0) & (length > 0)
  scale = 1 / jnp.where(known, now.inverse[-1] * length, 1)

  def forward(r, pair):
    (step, change, inverse), share = pair
    return r + step * (share - inverse * inner(change, r)), None

  return lax.scan(forward, scale * q, (pairs, shares))[0]


def _line_search(
  now: _Search,
  direction: jax.Array,
  along: jax.Array,
  slope: Callable[[jax.Array], jax.Array],
  decay: jax.Array,
  inner: Callable,
) -> jax.Array:
  """Returns a step length for each problem that reduces its slope to a tenth or less.

  Uses Newton's method within the bounds given by the signs of earlier slopes.

  Args:
    now: the current state.
    direction: (D, C).
    along: (N, C), what a step of length 1 adds to the scores.
    slope: derivative of the losses by the scores.
    decay: (D, 1), weights of the penalty.
    inner: the inner product per problem.
  """
  penalised = decay * direction
  flat, curve = inner(penalised, now.kernel), inner(penalised, direction)

  def slopes(length):
    value, change = jax.jvp(slope, (now.scores + length * along,), (along,))
    return flat + length * curve + inner(value, along), curve + inner(change, along)

  zero = jnp.zeros_like(flat)
  begin, bend = slopes(zero)
  wanted = 0.1 * jnp.abs(begin)
  moves = bend > 0

  def newton(length, value, bend):
    return length - value / jnp.where(moves, bend, 1)

  def goes_on(carry):
    count, _, _, _, is_near = carry
    return ~is_near.all() & (count < SEARCH_STEPS)

  def search(carry):
    count, length, low, high, is_near = carry
    value, bend = slopes(length)
    near = is_near | (jnp.abs(value) <= wanted)
    low = jnp.where(value < 0, length, low)
    high = jnp.where(value < 0, high, length)
    proposed = newton(length, value, bend)
    inside = (proposed > low) & (proposed < high)
    middle = jnp.where(jnp.isfinite(high), (low + high) / 2, 2 * length)
    proposed = jnp.where(inside, proposed, middle)
    return count + 1, jnp.where(near, length, proposed), low, high, near

  length = jnp.where(moves, newton(zero, begin, bend), 0)
  infinite = jnp.full_like(zero, jnp.inf)
  start = jnp.int32(0), length, zero, infinite, ~moves
  return lax.while_loop(goes_on, search, start)[1]


# Closed forms, in float64.


def ridge(
  x: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  penalties: Sequence[float] = (1.0,),
  *,
  weights: np.ndarray | None = None,
) -> list[Linear]:
  r"""Ridge regression to 1 for the true class and -1 for others.

  .. math:: \sum_n a_n |x_n W + b - t_n|^2 + \lambda |W|^2

  A single decomposition, of the smaller of (D, D) and (N, N), serves every penalty. As
  in scikit-learn's `RidgeClassifier`, b is not penalised.

  Args:
    x: features (N, D).
    labels: (N,) int.
    num_classes: C.
    penalties: the values of lambda, positive.
    weights: a (N,), 0 for examples to leave out; 1 by default.

  Returns:
    a classifier for each penalty, in the same order.

  Hoerl and Kennard, Technometrics 12, 1970.
  """
  weights = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
  used = weights > 0
  x, labels, weights = np.asarray(x[used], np.float64), labels[used], weights[used]
  wanted = np.where(labels[:, None] == np.arange(num_classes), 1.0, -1.0)
  shares = weights / weights.sum()
  mean, centre = shares @ x, shares @ wanted
  root = np.sqrt(weights)[:, None]
  x, wanted = root * (x - mean), root * (wanted - centre)
  is_tall = len(x) >= x.shape[1]
  values, vectors = np.linalg.eigh(x.T @ x if is_tall else x @ x.T)
  values = np.maximum(values, 0)
  inside = vectors.T @ (x.T @ wanted if is_tall else wanted)

  def solved(penalty: float) -> Linear:
    kernel = vectors @ (inside / (values + penalty)[:, None])
    kernel = kernel if is_tall else x.T @ kernel
    return Linear(kernel, centre - mean @ kernel)

  return [solved(penalty) for penalty in penalties]


def class_means(
  x: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  strengths: Sequence[float] = (0.0,),
  *,
  weights: np.ndarray | None = None,
) -> list[Linear]:
  r"""Predicts the class with the nearest mean, as a linear classifier.

  .. math:: z_c = x \cdot m_c - \tfrac{1}{2} |m_c|^2

  It has no strength. The arguments are those of `ridge`; a class without examples is
  never predicted.
  """
  weights = np.ones(len(x)) if weights is None else weights
  belongs = (labels[:, None] == np.arange(num_classes)) * weights[:, None]
  counts = belongs.sum(0)
  means = (belongs.T @ x) / np.maximum(counts, np.finfo(np.float64).tiny)[:, None]
  bias = np.where(counts > 0, -(means**2).sum(1) / 2, -np.inf)
  return [Linear(means.T, bias) for _ in strengths]


def neighbours(
  x: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  strengths: Sequence[float] = (1,),
  *,
  weights: np.ndarray | None = None,
) -> list[Neighbours]:
  """Predicts by the nearest examples; the strengths are how many of them vote.

  The arguments are those of `ridge`; examples with weight 0 are left out, all others
  count equally.
  """
  used = slice(None) if weights is None else weights > 0
  return [Neighbours(x[used], labels[used], num_classes, int(k)) for k in strengths]


class Classifier(NamedTuple):
  """A kind of classifier.

  Attributes:
    fit: (features (N, D), labels (N,), number of classes, strengths, weights=) -> one
      classifier per strength, from features (M, D) to scores (M, C).
    strengths: strengths to try, simplest first.
    default: the strength if the examples do not allow a choice.
    choosing: options of `fit` for choosing the strength.
  """

  fit: Callable[..., list[Any]]
  strengths: tuple[float, ...]
  default: float
  choosing: Mapping[str, Any] = MappingProxyType({})


COSTS = tuple(10.0**power for power in range(-5, 3))
PENALTIES = tuple(10.0**power for power in range(6, -3, -1))
DECAYS = (0.1, 0.01, 0.001)

CLASSIFIERS = {
  'svm': Classifier(svm, COSTS, 0.01, {'tolerance': ROUGH}),
  'softmax': Classifier(softmax, COSTS, 0.01, {'tolerance': ROUGH}),
  'ridge': Classifier(ridge, PENALTIES, 1000.0),
  'class_means': Classifier(class_means, (0.0,), 0.0),
  'neighbours': Classifier(neighbours, (1,), 1),
  'small_network': Classifier(small_network, DECAYS, 0.01),
}


class Chosen(NamedTuple):
  """A classifier with a chosen strength.

  Attributes:
    classifier: fitted to all examples.
    strength: the best of those tried, the simplest if tied.
    accuracy: (S,), cross-validated accuracy of each; NaN if there was no choice.
  """

  classifier: Any
  strength: float
  accuracy: np.ndarray


def chosen(
  name: str,
  x: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  *,
  strengths: Sequence[float] = (),
  folds: int = 3,
  weights: np.ndarray | None = None,
) -> Chosen:
  """Fits a classifier and chooses its strength by cross-validation.

  Every example is predicted by a classifier that was not fitted to it. The criterion is
  the mean accuracy per class.

  Args:
    name: a key of `CLASSIFIERS`.
    x: features (N, D).
    labels: (N,) int.
    num_classes: C.
    strengths: strengths to try, simplest first; by default those of the kind.
    folds: number of folds; if a class has fewer examples, some folds lack it.
    weights: (N,), weights of the examples.

  Raises:
    UserError: an unknown kind, features that are not finite, or a class or fold without
      examples.
  """
  kind = lookup(CLASSIFIERS, 'classifier', name)
  strengths = tuple(strengths) or kind.strengths
  check_examples(x, labels)
  weights = np.ones(len(x)) if weights is None else weights
  accuracy = np.full(len(strengths), np.nan)
  if len(strengths) > 1:
    scores = _held_out(kind, x, labels, num_classes, strengths, folds, weights)
    accuracy = np.array([per_class_accuracy(s, labels) for s in scores])
  best = int(np.argmax(accuracy)) if len(strengths) > 1 else 0
  (fitted,) = kind.fit(x, labels, num_classes, strengths[best:][:1], weights=weights)
  return Chosen(fitted, strengths[best], accuracy)


def _held_out(
  kind: Classifier,
  x: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  strengths: Sequence[float],
  folds: int,
  weights: np.ndarray,
) -> np.ndarray:
  """Returns (S, N), predictions for each example by classifiers not fitted to it.

  Examples left out get the weight 0, so all folds share one shape and one program.
  """
  found = np.zeros((len(strengths), len(x)), np.int64)
  of_fold = folds_of(labels, folds)
  for fold in np.unique(of_fold):
    out = of_fold == fold
    used = weights * ~out
    fitted = kind.fit(x, labels, num_classes, strengths, weights=used, **kind.choosing)
    for place, classifier in enumerate(fitted):
      found[place, out] = np.argmax(classifier(x[out]), axis=1)
  return found


def folds_of(labels: np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
  """Returns the fold (N,) of each example, with every class spread evenly.

  Raises:
    UserError: fewer than two folds, or fewer examples.
  """
  if not 2 <= folds <= len(labels):
    raise UserError(
      f'folds is {folds}; it must be from 2 to the {len(labels)} examples'
    )
  rng, found, first = np.random.default_rng(seed), np.zeros(len(labels), np.int64), 0
  for label in np.unique(labels):
    own = rng.permutation(np.flatnonzero(labels == label))
    found[own] = (first + np.arange(len(own))) % folds
    first += len(own)  # spreads classes with one example over folds
  return found


def per_class_accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
  """Returns the mean accuracy over the classes that occur."""
  classes, place = np.unique(labels, return_inverse=True)
  right = np.bincount(place, predicted == labels, len(classes))
  return float((right / np.bincount(place)).mean())


def balanced(labels: np.ndarray, num_classes: int) -> np.ndarray:
  """Returns weights (N,) with mean 1 that make all classes that occur count equally."""
  counts = np.bincount(labels, minlength=num_classes)
  return len(labels) / ((counts > 0).sum() * counts[labels])


def check_examples(x: np.ndarray, labels: np.ndarray) -> None:
  """Rejects examples from which nothing can be learned.

  Raises:
    UserError: features that are not finite, or only one class.
  """
  wrong = ~np.isfinite(x).all(axis=1)
  if wrong.any():
    raise UserError(
      f'{wrong.sum()} of {len(x)} examples have features that are not finite, the '
      f'first at {int(wrong.argmax())}'
    )
  if len(np.unique(labels)) < 2:
    raise UserError('a classifier needs examples of at least two classes')
