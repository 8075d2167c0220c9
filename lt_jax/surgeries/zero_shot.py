"""Zero-shot classifiers in stages without steps: a wrapper, and surgeries that fit.

The wrapper 'calibrated_stacking' takes gamma from the scores of seen classes. What is
chosen, gamma and hyper-parameters, is chosen by validation classes: seen classes that
play unseen ones. It is in `state.memory['calibrated_stacking']`, and so in the result.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.data.attributes import unit_rows
from lt_jax.data.dataset import Dataset
from lt_jax.errors import UserError, lookup, suggest
from lt_jax.evals.collect import Collected, Survey
from lt_jax.evals.zero_shot import (
  class_mean_accuracy,
  harmonic_mean,
  scores_of,
  seen_unseen_curve,
)
from lt_jax.method import Batch, Method, Outputs, State
from lt_jax.surgeries.closed_forms import FORMS, ClosedForm, Hyper, Params, Seen
from lt_jax.surgery import Surgery, earlier_stage, put

MEMORY = 'calibrated_stacking'

TOLD = ('gamma', 'val_zero_shot', 'val_harmonic_mean')
"""What is always in the memory: gamma, T of validation classes, and H at gamma."""


class Classes(NamedTuple):
  """What surgeries know of classes.

  Attributes:
    described: (C, A) descriptions, rows of unit norm; None without any.
    raw: the same as they are.
    seen: (C,) bool.
    validation: (C,) bool, those of them that play unseen ones.
  """

  described: np.ndarray | None
  raw: np.ndarray | None
  seen: np.ndarray
  validation: np.ndarray

  @classmethod
  def of(cls, dataset: Dataset) -> 'Classes':
    """Returns what a data set says of its classes."""
    raw, none = dataset.class_vectors, np.zeros(len(dataset.class_names), bool)
    return cls(
      None if raw is None else unit_rows(raw),
      raw,
      ~(none if dataset.unseen is None else dataset.unseen),
      none if dataset.val_classes is None else dataset.val_classes,
    )

  @property
  def fitted(self) -> np.ndarray:
    """The seen classes but those of validation, (C,) bool."""
    return self.seen & ~self.validation


def calibrated_stacking(
  method: Method, *, unseen: np.ndarray | None, values: Sequence[str] = ()
) -> Method:
  r"""Predicts with gamma taken from the scores of seen classes.

  .. math:: s_c - \gamma\, [c \text{ seen}]

  Classes that are added when the network is used count as unseen. Outputs say 'gamma'
  (B,), so that metrics can tell what it does.

  Args:
    method: any method.
    unseen: (C,) bool.
    values: names of numbers that a surgery leaves beside gamma.

  Raises:
    UserError: no class is unseen.

  Source: Chao et al., arXiv 1605.04253, equation 3.
  """
  if unseen is None:
    raise UserError("wrapper 'calibrated_stacking': no class is unseen")
  is_seen = (~np.asarray(unseen)).astype(np.float32)

  def init(key, batches):
    state = method.init(key, batches)
    memory = {name: jnp.zeros((), jnp.float32) for name in (*TOLD, *values)}
    return state.replace(memory={**state.memory, MEMORY: memory})

  def predict(state, images):
    outputs = method.predict(state, images)
    gamma, logits = state.memory[MEMORY]['gamma'], outputs['logits']
    taken = np.zeros(logits.shape[-1], np.float32)
    taken[: len(is_seen)] = is_seen
    return {
      **outputs,
      'logits': logits - gamma * taken[None],
      'gamma': jnp.full(logits.shape[:1], gamma),
    }

  return Method(init, method.step, predict)


def fit_closed_form(
  *,
  survey: Survey,
  classes: Classes,
  form: str,
  given: Mapping[str, float] | None = None,
  calibrate: bool = True,
  search: str = '',
  held_out: str = '',
  most: int = 0,
) -> Surgery:
  """Fits a head in closed form, after choosing its hyper-parameters and gamma.

  Both are chosen by validation classes. The method is fitted to the other seen classes;
  hyper-parameters are best by accuracy among the validation classes, gamma by H, where
  those play the unseen ones, and held-out images of the others the seen ones. Then it
  is fitted to all seen classes.

  Args:
    survey: passes with the stage's own network.
    classes: of the data.
    form: a key of `FORMS`.
    given: hyper-parameters that are not searched for.
    calibrate: chooses gamma; else it is 0.
    search: an earlier stage by whose features is chosen, one that has not learned from
      the validation classes; empty: the same features, where nothing has.
    held_out: the split with images of seen classes that are not fitted to; empty: every
      fifth training image is set apart while it is chosen.
    most: images, at most, that are fitted to while it is chosen; 0: all.

  Raises:
    UserError: there are no validation classes although something is to be chosen, or
      the head is of another method.
  """
  method = lookup(FORMS, 'closed form', form)
  given = dict(given or {})
  for name in given:
    if name not in method.grid:
      raise UserError(f'{form} has no {name!r}{suggest(name, method.grid)}')
  if classes.raw is None:
    raise UserError(f'{form} reads descriptions of classes: set data.class_vectors')
  open_ = [name for name in method.grid if name not in given]
  _check_validation(classes, form, open_, calibrate)

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    survey.outputs(fresh, 'train')
    if MEMORY not in fresh.memory:
      raise UserError(f"{form}: the stage has no wrapper 'calibrated_stacking'")
    head = fresh.params['net']['head']
    if set(head) != set(method.fills):
      raise UserError(
        f'{form} fits {", ".join(method.fills)}, but the head has {", ".join(head)}'
      )
    if _is_rehearsal(fresh):
      return fresh
    data = _features(survey, fresh, 'train')
    hyper, told = dict(given), dict.fromkeys(TOLD, 0.0)
    if open_ or calibrate:
      parts = data, _features(survey, fresh, held_out) if held_out else None
      if search:
        origin = _with_network(fresh, earlier_stage(earlier, search))
        parts = tuple(
          split and _features(survey, origin, split) for split in ('train', held_out)
        )
      hyper, told = choose(method, classes, *parts, given, calibrate, most)
    seen = _seen(data, classes, classes.seen)
    (params,) = method.fits(seen, [hyper])
    return _placed(fresh, params, told | hyper)

  return surgery


def _check_validation(
  classes: Classes, form: str, open_: Sequence[str], calibrate: bool
) -> None:
  """Refuses to choose without validation classes."""
  wanted = [*open_, *(['gamma'] if calibrate else [])]
  if wanted and not classes.validation.any():
    raise UserError(
      f'{form}: {" and ".join(wanted)} are chosen by validation classes: set '
      'data.val_classes, or give the values'
    )


def choose(
  method: ClosedForm,
  classes: Classes,
  train: Collected,
  held_out: Collected | None,
  given: Mapping[str, float],
  calibrate: bool,
  most: int = 0,
) -> tuple[Hyper, dict[str, float]]:
  """Chooses hyper-parameters and gamma by validation classes; see `fit_closed_form`.

  Args:
    method: the method.
    classes: of the data.
    train: 'features' and 'label' of training images.
    held_out: of others, of seen classes; None: every fifth of those is one.
    given: hyper-parameters that are not searched for.
    calibrate: whether gamma is chosen.
    most: images that are fitted to; 0: all.

  Returns:
    (hyper-parameters, what `TOLD` names).
  """
  label = train['label']
  of_validation = classes.validation[label]
  apart = np.zeros(len(label), bool)
  if held_out is None:
    places = np.flatnonzero(~of_validation)
    apart[places[::5]] = True
    held_out = {name: values[apart] for name, values in train.items()}
  else:
    mask = classes.fitted[held_out['label']]
    held_out = {name: values[mask] for name, values in held_out.items()}
  rows = np.flatnonzero(~of_validation & ~apart)
  if most and len(rows) > most:
    rows = np.random.default_rng(0).permutation(rows)[:most]
  fit = {name: values[np.sort(rows)] for name, values in train.items()}
  novel = {name: values[of_validation] for name, values in train.items()}
  x = np.concatenate([novel['features'], held_out['features']]).astype(np.float64)
  y = np.concatenate([novel['label'], held_out['label']])
  described, raw = classes.described, classes.raw

  def scored(params: Params) -> tuple[float, np.ndarray]:
    scores = method.scores(params, x, described, raw)
    among = np.where(classes.validation, scores[: len(novel['label'])], -np.inf)
    return (
      class_mean_accuracy(novel['label'], among.argmax(1), classes.validation),
      scores,
    )

  sets = method.sets(given)
  best, accuracy, scores = sets[0], -1.0, None
  fitted = method.fits(_seen(fit, classes, classes.fitted), sets)
  for hyper, params in zip(sets, fitted, strict=True):
    value, found = scored(params)
    if value > accuracy:
      best, accuracy, scores = hyper, value, found
  told = {'gamma': 0.0, 'val_zero_shot': accuracy, 'val_harmonic_mean': 0.0}
  if calibrate:
    gamma, mean = best_gamma(scores, y, classes)
    told |= {'gamma': gamma, 'val_harmonic_mean': mean}
  return best, told


def best_gamma(
  scores: np.ndarray, label: np.ndarray, classes: Classes
) -> tuple[float, float]:
  """Returns the gamma of the largest H on validation classes, and that H.

  Args:
    scores: (N, C); those of unseen classes are not looked at.
    label: (N,) int, of validation classes and of fitted ones.
    classes: of the data.
  """
  scores = np.where(classes.seen[None], scores, -np.inf)
  found = scores_of(scores, label, classes.validation)
  curve = seen_unseen_curve(found, classes.validation)
  if curve is None:
    raise UserError(
      'gamma is chosen by images of validation classes and others of seen classes, but '
      'one of the two is missing'
    )
  place = curve.best
  mean = harmonic_mean(curve.seen[place], curve.unseen[place])
  return curve.between(place), float(mean)


def choose_gamma(
  *, survey: Survey, classes: Classes, stage: str, held_out: str = 'val'
) -> Surgery:
  """Chooses gamma with a network that has not learned from the validation classes.

  Args:
    survey: passes with the stage's own network.
    classes: of the data.
    stage: the earlier stage, which was trained on the group 'fitted'.
    held_out: the split with images of the fitted classes that it was not trained on.

  Raises:
    UserError: there are no validation classes, no such split, or no such stage.
  """
  _check_validation(classes, 'choose_gamma', (), True)

  def surgery(fresh: State, earlier: Mapping[str, State]) -> State:
    survey.outputs(fresh, held_out)
    origin = earlier_stage(earlier, stage)
    if MEMORY not in fresh.memory:
      raise UserError("choose_gamma: the stage has no wrapper 'calibrated_stacking'")
    if _is_rehearsal(fresh):
      return fresh
    network = _with_network(fresh, origin)
    parts = [_outputs(survey, network, split) for split in ('train', held_out)]
    masks = [classes.validation[parts[0]['label']], classes.seen[parts[1]['label']]]
    scores, label = (
      np.concatenate([p[name][m] for p, m in zip(parts, masks, strict=True)])
      for name in ('logits', 'label')
    )
    novel = classes.validation[label]
    among = np.where(classes.validation, scores[novel], -np.inf).argmax(1)
    gamma, mean = best_gamma(scores, label, classes)
    told = {
      'gamma': gamma,
      'val_zero_shot': class_mean_accuracy(label[novel], among, classes.validation),
      'val_harmonic_mean': mean,
    }
    return _told(fresh, told)

  return surgery


def _is_rehearsal(state: State) -> bool:
  return isinstance(jax.tree.leaves(state.params)[0], jax.ShapeDtypeStruct)


def _seen(data: Collected, classes: Classes, fitted: np.ndarray) -> Seen:
  mask = fitted[data['label']]
  return Seen(
    data['features'][mask].astype(np.float64),
    data['label'][mask],
    classes.described,
    classes.raw,
    fitted,
  )


def _with_network(fresh: State, origin: State) -> State:
  """Returns a State whose network, as far as it has the same parts, is another's.

  Of an earlier stage with another head only what comes before the head is taken.
  """
  parts = {}
  for field in ('params', 'stats'):
    ours, theirs = getattr(fresh, field), getattr(origin, field)
    net = dict(ours['net'])
    for name, part in theirs['net'].items():
      same = jax.tree.structure(part) == jax.tree.structure(net.get(name))
      if same and jax.tree.map(jnp.shape, part) == jax.tree.map(jnp.shape, net[name]):
        net[name] = part
    parts[field] = {**ours, 'net': net}
  return fresh.replace(**parts)


def _features(survey: Survey, state: State, split: str) -> Collected:
  return survey.collect(state, split, _keep_features)


def _keep_features(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  return {'features': outputs['features'], 'label': batch['label']}


def _outputs(survey: Survey, state: State, split: str) -> Collected:
  return survey.collect(state, split, _keep_logits)


def _keep_logits(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  return {'logits': outputs['logits'], 'label': batch['label']}


def _placed(state: State, params: Params, told: Mapping[str, float]) -> State:
  """Returns the State with a fitted head, and what was chosen in the memory."""
  for name, value in params.items():
    state = put(
      state, f'params/net/head/{name}', np.shape(value), lambda value=value: value
    )
  return _told(state, told)


def _told(state: State, told: Mapping[str, float]) -> State:
  for name, value in _present(state, told):
    state = put(
      state, f'memory/{MEMORY}/{name}', (), lambda value=value: np.float32(value)
    )
  return state


def _present(state: State, told: Mapping[str, float]) -> Iterator[tuple[str, float]]:
  """Yields what the wrapper has a place for."""
  for name, value in told.items():
    if name in state.memory[MEMORY]:
      yield name, value


WRAPPERS: dict[str, Any] = {'calibrated_stacking': calibrated_stacking}
SURGERIES: dict[str, Any] = {
  'closed_form': fit_closed_form,
  'choose_gamma': choose_gamma,
}
