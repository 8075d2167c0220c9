"""What a network learns does not depend on target labels or on test images.

`tests/test_domains.py` compares what every recipe passes to its steps and surgeries.
Here the digests of States are compared after two steps of every stage.
"""

import functools

import jax
import numpy as np
import pytest

from configs import digits_domains, digits_zero_shot, scenes_zero_shot
from configs import scenes as scenes_config
from lt_jax import build, checkpoint, sharding, train
from lt_jax.config import resolve, stage_config
from lt_jax.data import scenes
from lt_jax.evals.saved import collect_saved
from lt_jax.methods import METHODS
from lt_jax.recipes import RECIPES
from tests import tiny
from tests.test_domains import permuted, replaced

pytestmark = pytest.mark.usefixtures('one_device')

TINY = {'train': 8, 'val': 4, 'test': 4}

RECIPE_OF = {
  'supervised': 'source_only',
  'aligned': 'deep_coral',
  'dann': 'dann',
  'cdan': 'cdan',
  'mcd': 'mcd',
  'adda': 'adda',
  'centroid_loss': 'ocda',
  'compound': 'ocda',
  'domain_factor': 'ocda',
  'self_supervised': 'self_supervised',
  'pseudo_label': 'pseudo_label',
  'saved_label': 'zsda',
  'i2i': 'i2i',
  'advent': 'advent',
  'mean_teacher': 'mean_teacher',
  'label_prior': 'label_prior',
}
"""Method for runs with a target -> a recipe that uses it."""

WITHOUT_TARGET = {
  'meta_weight_net',
  'meta_reweight',
  'oltr',
  'weight_generator',
  'multitask',
  'feature_generator',
}
"""Methods that do not read a target stream."""


def small(recipe):
  """Returns the config of a recipe on a target, with a few hundred parameters."""
  needs = RECIPES[recipe].needs
  if 'pixels' in needs:
    one = scenes_zero_shot if 'class_vectors' in needs else scenes_config
    made = one.get_config(f'{recipe},target=real,train=8,steps=2')
  elif 'class_vectors' in needs:
    made = digits_zero_shot.get_config(f'{recipe},target=blended,epochs=1')
    made.model.trunk = 'tiny_cnn'
  else:
    made = digits_domains.get_config(f'{recipe},epochs=1')
    made.model.trunk = 'tiny_cnn'
  made.update(batch=8, eval_batch=100)
  made.model.trunk_options = {'width': 4}
  for stage in (made, *made.stages.values()):
    if 'align_on' in stage.get('alignment', {}):
      named = [name for name in stage.alignment.align_on if name == 'logits']
      stage.alignment.align_on = tuple(named) or ('features',)
    if 'inner_steps' in stage.get('method', {}):
      stage.method.inner_steps = 1
  tiny.shrink_players(made)
  return resolve(made)


def first_state(stage):
  """Returns an initial State drawn by NumPy, because `init` is slow to compile."""
  shapes = train.state_shapes(stage.method, stage.streams)
  rng = np.random.default_rng(0)

  def drawn(leaf):
    return rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype)

  rest = {
    name: jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), tree)
    for name, tree in vars(shapes).items()
    if name not in ('step', 'key', 'params')
  }
  params = jax.tree.map(drawn, shapes.params)
  return shapes.replace(step=np.int32(0), key=jax.random.key(0), params=params, **rest)


def step_of(stage):
  """Returns the compiled step of a stage, for any images and labels."""

  @jax.jit
  def step(state, arrays, payloads):
    key, number = state.key, state.step
    batches = train.batches_at(stage.streams, arrays, payloads, key, number)
    return stage.method.step(state, batches)[0]

  return step


def learned(experiment, begun, steps):
  """Returns the digest of the last State, after two steps of every stage."""
  put = functools.partial(sharding.put_replicated, experiment.mesh)
  earlier, saved = {}, {}
  for name, stage in experiment.stages.items():
    streams = dict(stage.streams)
    for stream, left in stage.reads.items():
      streams[stream] = left.into(streams[stream], saved[left.stage], put)
    arrays = {name: stream.arrays for name, stream in streams.items()}
    state = begun[name]
    for surgery in stage.surgeries:
      state = surgery(state, earlier)
    state = put(state)  # so that both steps are one program
    for number in range(min(2, stage.plan.steps)):
      payloads = train.payloads_at(streams, number)
      state = steps[name](state, arrays, payloads)
    if stage.save_outputs:
      saved[name] = collect_saved(stage.survey, state, stage.save_outputs)
    earlier[name] = state
  for leaf in jax.tree.leaves(state.params):
    assert np.isfinite(leaf).all()  # otherwise any two would be the same
  return checkpoint.digest(state)


def assert_hidden(recipe):
  """Trains on the data, and again with everything changed that must not matter."""
  made = small(recipe)
  experiment = build.build(made, devices=1)
  stages = experiment.stages
  begun = {name: first_state(stage) for name, stage in stages.items()}
  steps = {name: step_of(stage) for name, stage in stages.items()}

  def again(datasets):
    other = build.build(made, devices=1, datasets=datasets)
    return learned(other, begun, steps)

  before = learned(experiment, begun, steps)
  labels = experiment._replace(domains=permuted(experiment))
  if not experiment.last.uses_target_labels:
    assert again(replaced(labels)) == before
    return
  assert again(replaced(experiment)) == before
  assert again(permuted(experiment)) != before


def test_every_method_is_here():
  for method, recipe in RECIPE_OF.items():
    made = small(recipe)
    stages = (stage_config(made, name) for name in made['stage_order'])
    assert method in {stage['method']['name'] for stage in stages}
  assert {*RECIPE_OF, *WITHOUT_TARGET} == {*METHODS}


@pytest.fixture
def few_scenes(monkeypatch):
  monkeypatch.setattr(scenes, 'SPLITS', TINY)


LONGER = ('zsda', 'mean_teacher')
"""Recipes whose steps are slow to compile."""

TRAINED = ('source_bbse', 'dann_bbse')
"""BBSE refuses networks as weak as these; `dann_em` covers the rest."""

PLAIN = {*RECIPE_OF.values(), 'target_only'} - {*LONGER}


@pytest.mark.parametrize(
  'recipe',
  [
    pytest.param(name, marks=() if name in PLAIN else pytest.mark.slow)
    for name, recipe in RECIPES.items()
    if 'target' in recipe.needs and name not in TRAINED
  ],
)
def test_training_does_not_depend_on_hidden_labels(recipe, few_scenes):
  assert_hidden(recipe)
