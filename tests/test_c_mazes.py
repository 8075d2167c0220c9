"""C-Mazes: adaptation recipes build, and policies are played in all domains."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import c_mazes
from lt_jax import build, results, train
from lt_jax.config import resolve
from lt_jax.errors import UserError
from lt_jax.recipes import RECIPES

ADAPT = [
  pytest.param(name, marks=[pytest.mark.slow] * name.startswith('ocda_'))
  for name, recipe in RECIPES.items()
  if recipe.needs == ('target',)
  if not name.startswith('finetune_target')  # these split the target's images again
]
DOMAINS = ('source', 'tinted', 'night', 'inverted')
N = 16


def config(recipe):
  return resolve(c_mazes.get_config(f'{recipe},target=tinted,train=80'))


def first(dataset):
  """Returns a data set with the first `N` of its test images."""
  split = dataset.tests['test']
  source = dataclasses.replace(
    split.source,
    images=split.source.images[:N],
    labels=split.source.labels[:N],
    world=jax.tree.map(lambda x: x[:N], split.source.world),
  )
  test = split._replace(
    source=source,
    rows=split.rows[:N],
    labels=split.labels[:N],
    arrays={'image': split.arrays['image'][:N]},
  )
  return dataset._replace(tests={'test': test})


@pytest.fixture(scope='module')
def datasets():
  made = build.build(config('source_only'), devices=1).domains
  assert set(made) == set(DOMAINS)
  return {name: first(dataset) for name, dataset in made.items()}


@pytest.mark.parametrize('recipe', ADAPT)
def test_every_recipe_of_adaptation_builds(datasets, recipe):
  experiment = build.build(config(recipe), devices=1, datasets=datasets)
  assert experiment.roles == {
    'source': ('source',),
    'target': ('tinted',),
    'open': ('night', 'inverted'),
  }
  for stage in experiment.stages.values():
    state = train.state_shapes(stage.method, stage.streams)
    assert state.params['net']['trunk'] and state.params['net']['head']


def test_a_policy_is_played_in_every_domain(datasets):
  experiment = build.build(config('source_only'), devices=1, datasets=datasets)
  stage = experiment.last
  key = jax.random.key(0)
  state = train.initial_state(stage.method, stage.streams, key, experiment.mesh)
  found = results.evaluate(experiment, stage, state).metrics
  assert set(found['domains']) == set(DOMAINS)
  for name, metrics in found['domains'].items():
    assert metrics['planner_success_rate'] == 1
    assert 0 <= metrics['success_rate'] <= 1
    logits = stage.method.predict(
      state, (datasets[name].tests['test'].source.images / 255 - 0.313) / 0.298
    )['logits']
    optimal = datasets[name].tests['test'].source.world.optimal
    wanted = optimal[np.arange(N), np.asarray(logits).argmax(-1)].mean()
    assert metrics['first_move'] == pytest.approx(wanted)
    assert metrics['first_move'] >= metrics['accuracy']
  for name in ('success_rate', 'random_success_rate'):
    compound = found['domains']['tinted'][name]
    every = [found['domains'][domain][name] for domain in DOMAINS[1:]]
    assert found['test'][name] == compound
    assert found['domain_means']['compound_open'][name] == pytest.approx(np.mean(every))


def test_a_domain_that_is_open_can_be_a_target():
  made = resolve(c_mazes.get_config('dann,target=night+tinted'))
  assert made['target'] == ['night', 'tinted'] and made['open_domains'] == ['inverted']
  with pytest.raises(UserError, match='unknown domain of mazes'):
    build.build(resolve(c_mazes.get_config('dann,target=nacht,train=8')), devices=1)
