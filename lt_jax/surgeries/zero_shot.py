"""Zero-shot classifiers in stages without steps: a wrapper, and surgeries that fit.

The wrapper 'calibrated_stacking' subtracts gamma from the scores of seen classes. Gamma
and hyper-parameters are chosen on validation classes, which are seen classes that play
the part of unseen ones. What was chosen is in `state.memory['calibrated_stacking']`,
and so in the result.
"""

import functools
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
from lt_jax.method import Batch, Method, Network, Outputs, State
from lt_jax.surgeries.closed_forms import FORMS, ClosedForm, Hyper, Params, Seen
from lt_jax.surgery import Surgery, earlier_stage, put

MEMORY = 'calibrated_stacking'

CHOSEN = ('gamma', 'val_zero_shot', 'val_harmonic_mean')
"""Always in the memory: gamma, T of validation classes, and H at gamma."""


class Classes(NamedTuple):
  """What surgeries know about classes.

  Attributes:
    described: (C, A) descriptions, rows of unit norm; None without any.
    raw: the same without normalising.
    seen: (C,) bool.
    validation: (C,) bool, seen classes that play the part of unseen ones.
  """

  described: np.ndarray | None
  raw: np.ndarray | None
  seen: np.ndarray
  validation: np.ndarray

  @classmethod
  def of(cls, dataset: Dataset) -> 'Classes':
    """Returns what a data set says about its classes."""
    raw, none = dataset.class_vectors, np.zeros(len(dataset.class_names), bool)
    return cls(
      None if raw is None else unit_rows(raw),
      raw,
      ~(none if dataset.unseen is None else dataset.unseen),
      none if dataset.val_classes is None else dataset.val_classes,
    )

  @property
  def fitted(self) -> np.ndarray:
    """The seen classes except the validation classes, (C,) bool."""
    return self.seen & ~self.validation


def calibrated_stacking(
  method: Method, *, unseen: np.ndarray | None, values: Sequence[str] = ()
) -> Method:
  r"""Predicts with gamma subtracted from the scores of seen classes.

  .. math:: s_c - \gamma\, [c \text{ seen}]

  Classes that are added after training count as unseen. Outputs contain 'gamma' (B,),
  so that metrics can show its effect.

  Args:
    method: any method.
    unseen: (C,) bool.
    values: names of numbers that a surgery stores besides gamma.

  Raises:
    UserError: no class is unseen.

  Source: Chao et al., arXiv 1605.04253, equation 3.
  """
  if unseen is None:
    raise UserError("wrapper 'calibrated_stacking': no class is unseen")
  is_seen = (~np.asarray(unseen)).astype(np.float32)

  def init(key, batches):
    state = method.init(key, batches)
    memory = {name: jnp.zeros((), jnp.float32) for name in (*CHOSEN, *values)}
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
  net: Network,
  classes: Classes,
  form: str,
  given: Mapping[str, float] | None = None,
  calibrate: bool = True,
  search: str = '',
  held_out: str = '',
  most: int = 0,
) -> Surgery:
  """Fits a head in closed form, after choosing its hyper-parameters and gamma.

  Both are chosen on validation classes. The method is fitted to the other seen classes.
  Hyper-parameters are chosen by accuracy among the validation classes, gamma by H,
  where validation classes count as unseen and held-out images of the others as seen.
  Then it is fitted to all seen classes.

  Args:
    survey: passes with the stage's own network.
    net: that network, whose head tells how to score.
    classes: the data's classes.
    form: a key of `FORMS`.
    given: fixed hyper-parameters, which are not searched.
    calibrate: choose gamma; otherwise it is 0.
    search: an earlier stage that has not learned from the validation classes, whose
      features are used to choose; empty for the same features, if nothing was trained.
    held_out: the split with images of seen classes to keep out of the fit; empty to set
      aside every fifth training image while choosing.
    most: largest number of images to fit to while choosing; 0 for all.

  Raises:
    UserError: something must be chosen but there are no validation classes, or the head
      belongs to another method.
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
    hyper, chosen = dict(given), dict.fromkeys(CHOSEN, 0.0)
    if open_ or calibrate:
      parts = data, _features(survey, fresh, held_out) if held_out else None
      if search:
        origin = _with_network(fresh, earlier_stage(earlier, search))
        parts = tuple(
          split and _features(survey, origin, split) for split in ('train', held_out)
        )
      options = {name: getattr(net.head, name) for name in method.reads}
      scored = method._replace(scores=functools.partial(method.scores, **options))
      hyper, chosen = choose(scored, classes, *parts, given, calibrate, most)
    seen = _seen(data, classes, classes.seen)
    (params,) = method.fits(seen, [hyper])
    return _placed(fresh, params, chosen | hyper)

  return surgery


def _check_validation(
  classes: Classes, form: str, open_: Sequence[str], calibrate: bool
) -> None:
  """Raises a `UserError` if something must be chosen without validation classes."""
  wanted = [*open_, *(['gamma'] if calibrate else [])]
  if wanted and not classes.validation.any():
    raise UserError(
      f'{form}: {" and ".join(wanted)} are chosen on validation classes: set '
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
  """Chooses hyper-parameters and gamma on validation classes; see `fit_closed_form`.

  Args:
    method: the method.
    classes: the data's classes.
    train: 'features' and 'label' of training images.
    held_out: the same for other images of seen classes; None to set aside every fifth
      training image.
    given: fixed hyper-parameters, which are not searched.
    calibrate: whether to choose gamma.
    most: largest number of images to fit to; 0 for all.

  Returns:
    (hyper-parameters, the values that `CHOSEN` names).
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
  chosen = {'gamma': 0.0, 'val_zero_shot': accuracy, 'val_harmonic_mean': 0.0}
  if calibrate:
    gamma, mean = best_gamma(scores, y, classes)
    chosen |= {'gamma': gamma, 'val_harmonic_mean': mean}
  return best, chosen


def best_gamma(
  scores: np.ndarray, label: np.ndarray, classes: Classes
) -> tuple[float, float]:
  """Returns the gamma with the largest H on validation classes, and that H.

  Args:
    scores: (N, C); those of unseen classes are ignored.
    label: (N,) int, of validation classes and of fitted ones.
    classes: the data's classes.
  """
  scores = np.where(classes.seen[None], scores, -np.inf)
  found = scores_of(scores, label, classes.validation)
  curve = seen_unseen_curve(found, classes.validation)
  if curve is None:
    raise UserError(
      'choosing gamma needs images of validation classes and of other seen classes, '
      'but one of the two is missing'
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
    classes: the data's classes.
    stage: the earlier stage, trained on the group 'fitted'.
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
    chosen = {
      'gamma': gamma,
      'val_zero_shot': class_mean_accuracy(label[novel], among, classes.validation),
      'val_harmonic_mean': mean,
    }
    return _with_chosen(fresh, chosen)

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
  """Returns a State with the network of another State, as far as the parts match.

  If that has a different head, only what comes before the head is taken.
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


def _placed(state: State, params: Params, chosen: Mapping[str, float]) -> State:
  """Returns the State with a fitted head, and with the chosen values in its memory."""
  for name, value in params.items():
    state = put(
      state, f'params/net/head/{name}', np.shape(value), lambda value=value: value
    )
  return _with_chosen(state, chosen)


def _with_chosen(state: State, chosen: Mapping[str, float]) -> State:
  for name, value in _present(state, chosen):
    state = put(
      state, f'memory/{MEMORY}/{name}', (), lambda value=value: np.float32(value)
    )
  return state


def _present(state: State, chosen: Mapping[str, float]) -> Iterator[tuple[str, float]]:
  """Yields the values that the wrapper has a place for."""
  for name, value in chosen.items():
    if name in state.memory[MEMORY]:
      yield name, value


WRAPPERS: dict[str, Any] = {'calibrated_stacking': calibrated_stacking}
SURGERIES: dict[str, Any] = {
  'closed_form': fit_closed_form,
  'choose_gamma': choose_gamma,
}
