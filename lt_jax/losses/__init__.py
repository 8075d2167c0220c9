"""Losses and batch penalties by name, and reductions of weighted losses.

A loss is a function (logits (B, C), labels (B,), *, options) -> (B,). A penalty is a
function (features (B, D), labels (B,), *, options) -> (), or the same with logits (B,
C) instead of features. Either has a keyword `counts` if it needs the training counts; a
loss that can use all classes of an image that has several has a keyword `classes`. To
add one, write it and add it to `LOSSES` or `PENALTIES` in its file.

The label -1 is ignored: `make_loss` gives it no loss and no gradient whatever the loss,
and the reductions divide by the number of labels. `make_loss` also applies a loss per
pixel, so a function of `LOSSES` never sees -1 or a label map.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lt_jax.class_weights import check_counts, weights_of
from lt_jax.errors import UserError, check_options, lookup
from lt_jax.losses import classification, margin, metric, ranking

LOSSES = classification.LOSSES | margin.LOSSES | ranking.LOSSES
PENALTIES = {'none': None} | metric.PENALTIES


def make_loss(
  name: str,
  counts: np.ndarray,
  classes: np.ndarray | None = None,
  auxiliary: float = 0.0,
  hardest: float = 1.0,
  **options: Any,
) -> Callable[[Mapping[str, jax.Array], Mapping[str, jax.Array]], jax.Array]:
  """Returns a per-label loss as a function of a network's outputs and a batch.

  Args:
    name: a key of `LOSSES`.
    counts: (C,) training images per class, for losses that use them.
    classes: (C,) bool, the classes to learn; the others are ruled out, see `only`.
    auxiliary: weight of the same loss on outputs['auxiliary_logits'], which is added.
    hardest: share of a batch's labels that have a loss, see `of_hardest`.
    **options: options of the loss, such as `gamma`.

  Returns:
    (outputs, batch) -> (...), computed from outputs['logits'] (..., C) and
    batch['label'] (...), which is (B,) for images and (B, H, W) for pixels. The loss is
    0 where the label is -1. A loss with a keyword `classes` is given batch['classes']
    (B, C), if there is one.

  Raises:
    UserError: an unknown name or option, an empty class if the loss uses counts, or a
      share out of range.

  Examples:
    >>> loss = make_loss('balanced_softmax', counts=np.array([90, 10]))
    >>> losses = loss({'logits': jnp.zeros((2, 2))}, {'label': jnp.array([1, -1])})
    >>> [round(x, 3) for x in losses.tolist()]
    [2.303, 0.0]
  """
  per_example = lookup(LOSSES, 'loss', name)
  what = f'loss {name!r}'
  check_options(what, per_example, options, 'logits', 'labels', 'counts', 'classes')
  asked = inspect.signature(per_example).parameters
  if 'counts' in asked:
    options['counts'] = check_counts(counts, what)
  if not isinstance(hardest, int | float) or not 0 < hardest <= 1:
    raise UserError(f'loss.hardest must be more than 0 and at most 1, got {hardest!r}')

  def loss_of(logits, batch):
    labels = batch['label']
    chex.assert_shape(labels, logits.shape[:-1])
    several = {key: batch[key] for key in ('classes',) if key in asked and key in batch}
    logits, each = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if classes is not None:
      logits = only(logits, classes)
    # Where the label is -1 any class will do: the loss there is discarded below.
    losses = per_example(logits, jnp.maximum(each, 0), **several, **options)
    losses = jnp.where(each >= 0, losses, 0)
    if hardest < 1:
      losses = of_hardest(losses, each >= 0, hardest)
    return losses.reshape(labels.shape)

  def loss(outputs, batch):
    value = loss_of(outputs['logits'], batch)
    if auxiliary:
      other = lookup(outputs, 'layer of this network', 'auxiliary_logits')
      value += auxiliary * loss_of(other, batch)
    return value

  return loss


def of_hardest(losses: jax.Array, valid: jax.Array, share: float) -> jax.Array:
  r"""Returns losses of which only the largest are left: online hard examples.

  .. math::
    \tilde\ell_i = \frac{n}{|H|}\, [i \in H]\, \ell_i, \qquad
    H = \{i : \ell_i \ge \ell_{(k)}\}, \quad k = \lceil s n \rceil

  with n the labels of the batch and the k-th largest of their losses; ties count. The
  mean over the labels is then that over the hardest ones. Where labels are maps, these
  are the pixels on which the network is worst.

  Args:
    losses: (N,), 0 where there is no label.
    valid: (N,) bool, where there is one.
    share: s, in (0, 1].

  Returns:
    (N,).

  Examples:
    >>> losses, valid = jnp.array([4.0, 1.0, 2.0, 3.0]), jnp.array([True] * 4)
    >>> of_hardest(losses, valid, share=0.5).tolist()
    [8.0, 0.0, 0.0, 6.0]

  Shrivastava et al., "Training Region-based Object Detectors with Online Hard Example
  Mining", CVPR 2016, arXiv 1604.03540; for pixels Wu et al., arXiv 1605.06885 ("online
  bootstrapping"), and Pohlen et al. (FRRN), CVPR 2017, arXiv 1611.08323, who keep a
  fixed number.
  """
  known = jnp.where(valid, lax.stop_gradient(losses), -jnp.inf)
  n = valid.sum()
  kept = jnp.ceil(share * n).astype(jnp.int32)
  least = jnp.sort(known, descending=True)[jnp.maximum(kept - 1, 0)]
  hard = valid & (known >= least)
  return jnp.where(hard, losses, 0) * (n / jnp.maximum(hard.sum(), 1))


def only(logits: jax.Array, classes: np.ndarray) -> jax.Array:
  """Returns logits (B, C) with -1e9 for the classes that are ruled out.

  -1e9 is finite, so a loss can multiply it by 0. Losses with smoothed labels cannot be
  used with it: they would become huge.

  Args:
    logits: (B, C).
    classes: (C,) bool, the classes to keep.

  Examples:
    >>> only(jnp.zeros((1, 2)), np.array([True, False])).tolist()
    [[0.0, -1000000000.0]]
  """
  return jnp.where(jnp.asarray(classes)[None], logits, -1e9)


def make_penalty(
  name: str, weight: float, counts: np.ndarray, **options: Any
) -> Callable[[Mapping[str, jax.Array], Mapping[str, jax.Array]], jax.Array] | None:
  """Returns a weighted batch penalty as a function of a network's outputs and a batch.

  Args:
    name: a key of `PENALTIES`.
    weight: factor of the penalty.
    counts: (C,) training images per class, for penalties that use them.
    **options: options of the penalty, such as `margin`.

  Returns:
    (outputs, batch) -> (), computed from batch['label'] and either outputs['features']
    or outputs['logits'], whichever the penalty takes; None for 'none'.

  Raises:
    UserError: an unknown name or option, or an empty class if the penalty uses counts.

  Examples:
    >>> penalty = make_penalty('range', 2.0, counts=np.array([90, 10]))
    >>> features = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> penalty({'features': features}, {'label': jnp.array([0, 1, 1])}).item()
    2.5
  """
  function = lookup(PENALTIES, 'penalty', name)
  what = f'penalty {name!r}'
  given = ('features', 'logits', 'labels', 'counts')
  check_options(what, function or (lambda: None), options, *given)
  if function is None:
    return None
  asked = inspect.signature(function).parameters
  if 'counts' in asked:
    options['counts'] = check_counts(counts, what)
  outputs_key = 'features' if 'features' in asked else 'logits'

  def penalty(outputs, batch):
    if batch['label'].ndim > 2:
      raise UserError(f'{what} compares whole images, but here every pixel has a label')
    return weight * function(outputs[outputs_key], batch['label'], **options)

  return penalty


def mean(class_weights: jax.Array, labels: jax.Array) -> jax.Array:
  """Coefficients w / n: the sum of weighted losses over the number of labels.

  n leaves out the labels -1, so on segmentation masks this is the mean over all
  labelled pixels of the batch. A long-tailed batch has a mean class weight far below
  one (about 0.17 on CIFAR-10-LT with imbalance 100 and beta 0.9999), so steps are
  smaller than those of `weight_normalised` by that factor.

  Args:
    class_weights: (C,).
    labels: (...) int, -1 for ignored ones.

  Returns:
    (...) coefficients: the objective is sum_i coefficients_i loss_i.

  Examples:
    >>> mean(jnp.array([0.5, 1.5]), jnp.array([0, 0, -1, -1])).tolist()
    [0.25, 0.25, 0.0, 0.0]

  The reduction of Cui et al., arXiv 1901.05555 (TensorFlow).
  """
  labelled = jnp.maximum((labels >= 0).sum(), 1)
  # If every label counts, the last factor is exactly one: the usual mean, bit for bit.
  return weights_of(class_weights, labels) / labels.size * (labels.size / labelled)


def weight_normalised(class_weights: jax.Array, labels: jax.Array) -> jax.Array:
  """Coefficients w / sum(w): a weighted mean. All zero if all weights are.

  Args:
    class_weights: (C,).
    labels: (...) int, -1 for ignored ones.

  Returns:
    (...) coefficients: the objective is sum_i coefficients_i loss_i.

  Examples:
    >>> weight_normalised(jnp.array([0.5, 1.5]), jnp.array([0, 0, -1, -1])).tolist()
    [0.5, 0.5, 0.0, 0.0]

  The reduction of PyTorch's weighted cross-entropy, and thus of LDAM-DRW's code.
  """
  weights = weights_of(class_weights, labels)
  total = weights.sum()
  return weights / jnp.where(total == 0, 1, total)


REDUCTIONS = {'mean': mean, 'weight_normalised': weight_normalised}
