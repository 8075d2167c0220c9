"""Adaptation recipes: everything they name exists, and their methods make a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax.config import apply, base_config, resolve, stage_config
from lt_jax.errors import construct
from lt_jax.losses import REDUCTIONS, make_loss
from lt_jax.losses.alignment import make_alignment, make_weight
from lt_jax.method import Player
from lt_jax.methods import METHODS
from lt_jax.methods.supervised import make_objective
from lt_jax.models import NETWORKS, make_classifier
from lt_jax.optim import make_optimizer
from lt_jax.recipes import adaptation, compound
from lt_jax.schedules import make_schedule

BATCH = 4
COUNTS = np.ones(3, int)
STEPS = 10
RECIPES = {
  name: recipe
  for name, recipe in (adaptation.RECIPES | compound.RECIPES).items()
  if 'pixels' not in recipe.needs  # see tests/test_pixels.py
}


def made(name):
  """Returns the resolved config of a recipe on a small base config."""
  config = base_config()
  config.domains, config.target = {'other': {}}, ('other',)
  config.update(batch=BATCH, epochs=float(STEPS))
  config.schedule = {'name': 'dann', 'base': 0.01, 'end': config.get_ref('epochs')}
  config.optimizer.weight_decay = (('net/head/bias', 0.0), ('.*', 2e-4))
  apply(config, RECIPES[name].overrides(config))
  return config


def part(table, kind, described, *args):
  options = {key: value for key, value in described.items() if key != 'name'}
  return construct(table, kind, described['name'], *args, options=options)


def optimizer_of(described, schedule):
  rate = make_schedule(**schedule, length=BATCH, batch=BATCH)
  return make_optimizer(learning_rate=rate, **described)


def method_of(config):
  """Builds a config's method from the tables it refers to."""
  alignment = config['alignment']
  players = {
    name: Player(
      part(NETWORKS, 'network', player['network']),
      optimizer_of(player['optimizer'], player['schedule']),
    )
    for name, player in config.get('players', {}).items()
  }

  def progress(step):
    return step / jnp.float32(STEPS)

  parts = {
    'loss': make_loss('cross_entropy', COUNTS),
    'class_weights': lambda step: jnp.ones(len(COUNTS)),
    'reduction': REDUCTIONS[config['reduction']],
    'penalty': None,
  }
  return construct(
    METHODS,
    'method',
    config['method']['name'],
    make_classifier('mnist_dann', 'linear', len(COUNTS)),
    optimizer_of(config['optimizer'], config['schedule']),
    options={key: v for key, v in config['method'].items() if key != 'name'},
    **parts,
    objective=make_objective(**parts),
    streams=tuple(config['streams']),
    alignment=make_alignment(**alignment, counts=COUNTS, progress=progress),
    align_on=alignment['align_on'],
    alignment_weight=make_weight(alignment['weight'], progress),
    players=players,
    counts=COUNTS,
    image_shape=(16, 16, 3),
    pixels=dict.fromkeys(('train', 'target'), ((0.5,), (0.5,))),
  )


def test_every_recipe_asks_for_a_target():
  assert all(recipe.needs == ('target',) for recipe in RECIPES.values())


DOMAINS = {'domain_loss', 'domain_accuracy'}

JUDGES = ('discriminator', 'source_images', 'target_images')

CURRICULUM = ('stage', 'order', 'sampler')

METRICS = {
  'dann': DOMAINS | {'lambda'},
  'cdan': DOMAINS | {'lambda'},
  'adda': DOMAINS | {'moved'},
  'compound': DOMAINS | {'moved', 'borrowed'},
  'centroid_loss': {'centroid_loss'},
  'mcd': {'discrepancy'},
  'aligned': {'alignment'},
  'pseudo_label': {'pseudo_loss', 'labelled'},
  'i2i': {'lambda', 'identity', 'cycle', 'translated'}
  | {f'{name}_{kind}' for name in JUDGES for kind in ('loss', 'accuracy')},
}
"""Method -> its metrics besides those of every method."""


@pytest.mark.parametrize('name', RECIPES)
def test_its_method_makes_a_step(name, rng):
  config = resolve(made(name))
  config = stage_config(config, config['stage_order'][-1])
  streams = config.get('streams', {})
  image = rng.normal(size=(2, BATCH, 16, 16, 3)).astype(np.float32)
  batches = {'train': {'image': image[0], 'label': np.arange(BATCH) % 3}}
  if 'target' in streams:
    row = {key: v for key, v in streams['target'].items() if key not in CURRICULUM}
    assert row == {
      'domain': 'target',
      'split': 'train',
      'labels': False,
      'batch': BATCH,
    }
    batches['target'] = {'image': image[1]}
  elif name in ('target_only', 'sa_oracle'):
    row = {'domain': 'target', 'labels': True, 'split': 'train'}
    assert streams == {'train': row}
  method = method_of(config)
  state = jax.eval_shape(method.init, jax.random.key(0), batches)
  after, metrics = jax.eval_shape(method.step, state, batches)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  expected = {'loss', 'accuracy', 'grad_norm', 'learning_rate'}
  expected |= METRICS.get(config['method']['name'], set())
  if config['alignment']['name'] == 'none':
    expected -= {'alignment'}
  if config['method']['name'] == 'self_supervised':
    kinds = ('loss', 'accuracy')
    expected |= {f'{task}_{kind}' for task in config['players'] for kind in kinds}
  assert set(metrics) - {'class_loss', 'moved'} == expected - {'moved'}
  conditional = config['method']['name'] == 'compound' or name == 'adda_cycada'
  assert ('moved' in metrics) == conditional
  assert set(after.opt) - {'second_head', 'centroids'} == {'net', *config['players']}


def test_the_discriminator_has_the_optimiser_and_the_schedule_of_the_network():
  config = made('dann')
  config.schedule.base = 0.5  # set after the recipe, as on the command line
  player = resolve(config)['players']['discriminator']
  assert player['schedule'] == {'name': 'dann', 'base': 0.5, 'end': STEPS}
  assert player['optimizer'] == {'name': 'sgd', 'momentum': 0.9}


def test_both_players_of_adda_have_one_rate():
  config = made('adda')
  config.stages.adapt.schedule.base = 0.5
  stage = stage_config(resolve(config), 'adapt')
  assert stage['schedule'] == stage['players']['discriminator']['schedule']
  assert stage['schedule']['base'] == 0.5 and config.schedule.base == 0.01
