"""Evaluation: one small record per example on the device, plain NumPy on the host.

A task says what to record and what to measure; `lt_jax.evals.collect` runs a pass over
a split and returns all its records. The metrics of `closed_set`, `calibration` and
`open_set` are then exact functions of (N,) arrays, and those of `segmentation` of sums
of confusion matrices, whatever the batch size or the devices.
"""

from lt_jax.evals.classification import CLASSIFICATION
from lt_jax.evals.identification import IDENTIFICATION
from lt_jax.evals.multitask import MULTITASK
from lt_jax.evals.rollouts import MAZES
from lt_jax.evals.segmentation import SEGMENTATION
from lt_jax.evals.tasks import Task
from lt_jax.evals.zero_shot import ZERO_SHOT, ZERO_SHOT_SEGMENTATION

TASKS: dict[str, Task] = {
  'classification': CLASSIFICATION,
  'identification': IDENTIFICATION,
  'mazes': MAZES,
  'multitask': MULTITASK,
  'zero_shot': ZERO_SHOT,
  'segmentation': SEGMENTATION,
  'zero_shot_segmentation': ZERO_SHOT_SEGMENTATION,
}

TITLES = {
  name: task.metrics[name].title
  for only_headlines in (True, False)
  for task in TASKS.values()
  for name in ([task.headline] if only_headlines else task.metrics)
  if task.metrics[name].title
}
"""Name in result.json -> title in tables; headline metrics come first."""
