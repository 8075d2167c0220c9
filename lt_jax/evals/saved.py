"""Outputs that a stage saves for later stages, and values computed from them.

They use no labels, so a stage can save them for a target too.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.errors import lookup
from lt_jax.evals.collect import Survey
from lt_jax.evals.ordering import distance, entropy_of, top_of_class
from lt_jax.method import Batch, Outputs, State


def prediction(outputs: Outputs) -> jax.Array:
  """Returns the class of the largest logit, (B,) int32: a pseudo-label."""
  return outputs['logits'].argmax(-1).astype(jnp.int32)


def confidence(outputs: Outputs) -> jax.Array:
  """Returns the softmax probability of the prediction, (B,)."""
  return jax.nn.softmax(outputs['logits']).max(-1)


SAVED: dict[str, Callable[[Outputs], jax.Array]] = {
  'prediction': prediction,
  'confidence': confidence,
  'entropy': entropy_of,
}
"""Name -> outputs -> (B, ...). Outputs of the network have their own names."""


def split_and_name(saved: str) -> tuple[str, str]:
  """Splits 'target/train/logits' into split and name; the default split is 'train'."""
  split, _, name = saved.rpartition('/')
  return split or 'train', name


def saved_output(outputs: Outputs, name: str) -> jax.Array:
  """Returns the value to save under a name.

  Raises:
    UserError: the name is neither an output nor a key of `SAVED`.
  """
  if name in SAVED:
    return SAVED[name](outputs)
  return lookup({**outputs, **SAVED, **SURVEYED}, 'output', name)


SURVEYED: dict[str, Callable[..., np.ndarray]] = {
  'distance': distance,
  'top_of_class': top_of_class,
}
"""Name -> (survey, state, split=) -> (N,): values that need more than one batch."""


def saved_shape(survey: Survey, state: State, saved: str) -> jax.ShapeDtypeStruct:
  """Returns shape and type of a batch of saved values; computes nothing.

  Args:
    survey: that of the stage that saves them.
    state: that of the stage, or its shapes.
    saved: as in `save_outputs`.

  Raises:
    UserError: the stage does not have the split, or there is no such output.
  """
  split, name = split_and_name(saved)
  outputs = survey.outputs(state, split)
  if name in SURVEYED:
    return jax.ShapeDtypeStruct(_surveyed(name, outputs), np.float32)
  return jax.eval_shape(lambda outputs: saved_output(outputs, name), outputs)


def _surveyed(name: str, outputs: Mapping[str, jax.ShapeDtypeStruct]) -> tuple:
  """Returns the shape of a value of `SURVEYED` for a batch."""
  shape = outputs['logits'].shape
  return shape[:-1] if name == 'top_of_class' else shape[:1]


def collect_saved(
  survey: Survey, state: State, saved: Sequence[str]
) -> dict[str, np.ndarray]:
  """Returns what a stage saves for every image: name -> (N, ...); one pass per split.

  Args:
    survey: that of the stage.
    state: its final State.
    saved: as in `save_outputs`.
  """
  found = {}
  of_outputs: dict[str, dict[str, str]] = {}
  for one in saved:
    split, name = split_and_name(one)
    if name in SURVEYED:
      found[one] = SURVEYED[name](survey, state, split=split).astype(np.float32)
    else:
      of_outputs.setdefault(split, {})[one] = name
  for split, names in of_outputs.items():
    found |= survey.collect(state, split, functools.partial(_kept, names))
  return found


def _kept(
  names: Mapping[str, str], outputs: Outputs, batch: Batch
) -> dict[str, jax.Array]:
  """Returns the values to save for a batch, computed from its outputs alone."""
  del batch
  return {saved: saved_output(outputs, name) for saved, name in names.items()}
