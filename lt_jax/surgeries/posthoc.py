"""Post-hoc classifiers, which change predictions after training.

Each is a wrapper `Method -> Method`. If it needs a measured value, that is in
`state.memory` under the wrapper's name, and a surgery fills it; a stage without steps
combines the two.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.errors import ClassError, UserError
from lt_jax.evals import openmax
from lt_jax.evals.collect import Survey
from lt_jax.method import Method, State
from lt_jax.surgery import Surgery, class_sums, earlier_stage, put


def adjust_logits(method: Method, *, counts: Any, tau: float = 1.0) -> Method:
  r"""Predicts with post-hoc adjusted logits: z_c - tau * log(n_c / N).

  Source: Menon et al., Long-tail learning via logit adjustment, arXiv 2007.07314,
  equation 9.

  Args:
    method: any method, trained or not; its steps do not change.
    counts: (C,) training images per class, all positive.
    tau: strength; 0 leaves the logits unchanged.
  """
  counts = np.asarray(counts, np.float64)
  if not (counts > 0).all():
    needed = 'logit adjustment needs images of every class; '
    raise ClassError(needed, counts.argmin(), ' has none')
  with np.errstate(over='ignore', invalid='ignore'):
    offset = (tau * np.log(counts / counts.sum())).astype(np.float32)
  if not np.isfinite(offset).all():
    raise UserError(f'logit adjustment: tau is {tau:g}: the logits would not be finite')

  def predict(state, images):
    outputs = method.predict(state, images)
    return {**outputs, 'logits': outputs['logits'] - offset[None]}

  return Method(method.init, method.step, predict)


def average_logits(method: Method, *, weight: float = 0.5) -> Method:
  r"""Predicts with the average of the logits of two networks.

  .. math:: z = (1 - w)\, z_{net} + w\, z_{second}

  The second network is in `state.memory['second']`, where the surgery 'second_network'
  puts that of another stage. All other outputs are those of the first.

  Args:
    method: any method; its steps do not change.
    weight: w, in [0, 1].

  Raises:
    UserError: the weight is out of range.

  Source: Vu et al., ADVENT, CVPR 2019, arXiv 1811.12833, section 4.2 ("AdvEnt +
  MinEnt"), whose code averages the logits of two models alike.
  """
  if not 0 <= weight <= 1:
    raise UserError(f'average_logits: weight must be in [0, 1], got {weight}')

  def init(key, batches):
    state = method.init(key, batches)
    second = {'params': state.params['net'], 'stats': state.stats['net']}
    empty = jax.tree.map(jnp.zeros_like, second)
    return state.replace(memory={**state.memory, 'second': empty})

  def predict(state, images):
    second = state.memory['second']
    other = state.replace(
      params={**state.params, 'net': second['params']},
      stats={**state.stats, 'net': second['stats']},
    )
    outputs = method.predict(state, images)
    of_other = method.predict(other, images)['logits']
    logits = (1 - weight) * outputs['logits'] + weight * of_other
    return {**outputs, 'logits': logits}

  return Method(init, method.step, predict)


def second_network(*, stage: str) -> Surgery:
  """Takes the second network of `average_logits` from an earlier stage.

  Args:
    stage: the stage that has trained it.

  Raises:
    UserError: the stage is not wrapped in 'average_logits', or the networks differ.
  """

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    origin = earlier_stage(earlier, stage)
    taken = {'params': origin.params['net'], 'stats': origin.stats['net']}
    if 'second' not in fresh.memory:
      raise UserError("second_network: the stage has no wrapper 'average_logits'")
    ours, theirs = (
      jax.tree.map(lambda x: x.shape, one) for one in (fresh.memory['second'], taken)
    )
    if ours != theirs:
      raise UserError(f'second_network: stage {stage!r} has another network')
    return fresh.replace(memory={**fresh.memory, 'second': taken})

  return surgery


def tau_norm(method: Method, *, taus: Sequence[float]) -> Method:
  r"""Predicts with class weights divided by a power of their norm, and without bias.

  .. math:: z_c = v \cdot w_c / |w_c|^\tau

  tau is in `state.memory['tau_norm']`, where the surgery 'choose_tau' puts the best of
  `taus` and the accuracy of each.

  Args:
    method: a method with a linear head.
    taus: values to choose from; 0 only leaves out the bias.

  Source: Kang et al., Decoupling Representation and Classifier, arXiv 1910.09217,
  section 4.2; the authors' code leaves out the bias, and tries 0, 0.1, ..., 2.
  """
  if not len(taus) or not np.isfinite(taus).all():
    raise UserError(f'tau_norm: taus must be a list of finite numbers, got {taus!r}')

  def init(key, batches):
    state = method.init(key, batches)
    if set(state.params['net']['head']) != {'kernel', 'bias'}:
      raise UserError(
        "tau_norm scales the weights of a 'linear' head only: set model.head"
      )
    memory = {
      'tau': jnp.zeros((), jnp.float32),
      'taus': jnp.asarray(taus, jnp.float32),
      'accuracy': jnp.zeros(len(taus), jnp.float32),
    }
    return state.replace(memory={**state.memory, 'tau_norm': memory})

  def predict(state, images):
    outputs = method.predict(state, images)
    kernel = state.params['net']['head']['kernel']
    logits = tau_logits(outputs['features'], kernel, state.memory['tau_norm']['tau'])
    return {**outputs, 'logits': logits}

  return Method(init, method.step, predict)


def tau_logits(
  features: jax.Array, kernel: jax.Array, tau: jax.Array | float
) -> jax.Array:
  """Returns features (B, D) times kernel (D, C), its columns over |column|^tau."""
  lengths = jnp.maximum(jnp.linalg.norm(kernel, axis=0, keepdims=True), 1e-12)
  return jnp.dot(features, kernel / lengths**tau, precision=jax.lax.Precision.HIGHEST)


def choose_tau(*, survey: Survey, split: str = 'val') -> Surgery:
  """Chooses the tau of `tau_norm` by accuracy on a split; ties take the smallest.

  Args:
    survey: passes with the stage's own network.
    split: the split to choose on, 'val' or 'meta'.

  Raises:
    UserError: the stage is not wrapped in 'tau_norm', or there is no such split.
  """
  if split not in ('val', 'meta'):
    raise UserError(f"choose_tau: tau is chosen on 'val' or 'meta', not on {split!r}")

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    survey.outputs(fresh, split)  # raises if there is no such split
    if 'tau_norm' not in fresh.memory:
      raise UserError("choose_tau: the stage has no wrapper 'tau_norm'")
    taus = fresh.memory['tau_norm']['taus']

    def accuracies() -> np.ndarray:
      def keep(outputs, batch):
        return {'features': outputs['features'], 'label': batch['label']}

      seen = survey.collect(fresh, split, keep)
      kernel = fresh.params['net']['head']['kernel']

      @jax.jit
      def accuracy(tau, kernel, seen):
        predicted = tau_logits(seen['features'], kernel, tau).argmax(-1)
        return (predicted == seen['label']).mean(dtype=jnp.float32)

      return np.array([accuracy(tau, kernel, seen) for tau in taus])

    measured = put(fresh, 'memory/tau_norm/accuracy', taus.shape, accuracies)

    def best() -> np.ndarray:
      accuracy = np.asarray(measured.memory['tau_norm']['accuracy'])
      return np.asarray(taus)[accuracy == accuracy.max()].min()

    return put(measured, 'memory/tau_norm/tau', (), best)

  return surgery


def with_openmax(method: Method, *, alpha: int = 10) -> Method:
  """Predicts with OpenMax, which moves part of the logits to an 'unknown' class.

  The logits are the first C of `openmax.recalibrate`, and 'known_score' is one minus
  the probability of the unknown class. 'is_unknown' is the paper's rule: the unknown
  class is more probable than any other. The tails are in `state.memory['openmax']`,
  where the surgery 'fit_openmax' puts them; until then no logit changes.

  Args:
    method: any method.
    alpha: number of the largest logits that may shrink.
  """

  def init(key, batches):
    state = method.init(key, batches)
    images = batches['train']['image'][:1]
    logits = jax.eval_shape(lambda: method.predict(state, images)['logits'])
    memory = openmax.unfitted(logits.shape[-1])._asdict()
    return state.replace(memory={**state.memory, 'openmax': memory})

  def predict(state, images):
    outputs = method.predict(state, images)
    tails = openmax.Tails(**state.memory['openmax'])
    logits = openmax.recalibrate(outputs['logits'], tails, alpha)
    # Not 1 - softmax, which rounds to 0 in float32 for many different images.
    log_odds = jax.nn.logsumexp(logits[:, :-1], axis=-1) - logits[:, -1]
    known_score = jax.nn.sigmoid(log_odds)
    return {
      **outputs,
      'logits': logits[:, :-1],
      'known_score': known_score,
      'is_unknown': logits[:, -1] > logits[:, :-1].max(axis=-1),
    }

  return Method(init, method.step, predict)


def fit_openmax(*, survey: Survey, tail: int = 20, split: str = 'train') -> Surgery:
  """Fits the tails of `with_openmax` to correctly classified images.

  Args:
    survey: passes with the stage's own network.
    tail: number of the largest distances of each class to fit.
    split: the split of the images.

  Raises:
    UserError: the stage is not wrapped in 'openmax', or the tail is too short.
  """
  openmax.check_tail(tail)

  def right(outputs, batch):
    return outputs['logits'].argmax(-1) == batch['label']

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    if 'openmax' not in fresh.memory:
      raise UserError("fit_openmax: the stage has no wrapper 'openmax'")
    classes = survey.outputs(fresh, split)['logits'].shape[-1]

    def sums(outputs, batch):
      counted = {**batch, 'mask': batch['mask'] & right(outputs, batch)}
      return class_sums(outputs['logits'], counted, classes)

    @functools.cache
    def fitted() -> dict[str, np.ndarray]:
      total, count = survey.total(fresh, split, sums)
      means = jnp.asarray(total / np.maximum(count, 1)[:, None])

      def keep(outputs, batch):
        apart = openmax.own_distance(outputs['logits'], batch['label'], means)
        return {
          'distance': apart,
          'label': batch['label'],
          'right': right(outputs, batch),
        }

      seen = survey.collect(fresh, split, keep)
      distances, labels = (seen[name][seen['right']] for name in ('distance', 'label'))
      return openmax.fit_tails(distances, labels, np.asarray(means), tail)._asdict()

    state = fresh
    for name, leaf in fresh.memory['openmax'].items():
      state = put(
        state, f'memory/openmax/{name}', leaf.shape, lambda name=name: fitted()[name]
      )
    return state

  return surgery


WRAPPERS: dict[str, Any] = {
  'adjust_logits': adjust_logits,
  'average_logits': average_logits,
  'tau_norm': tau_norm,
  'openmax': with_openmax,
}
SURGERIES: dict[str, Any] = {
  'second_network': second_network,
  'choose_tau': choose_tau,
  'fit_openmax': fit_openmax,
}
