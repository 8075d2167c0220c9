"""The planning network: with the right parameters it is a planner."""

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.data import mazes
from lt_jax.data.arrays import Arrays
from lt_jax.evals.rollouts import success_rates
from lt_jax.models import make_classifier
from lt_jax.models.planning import STEPS, neighbours, standardised

NET = make_classifier('value_iteration', 'linear', 4, trunk_options={'width': 3})


def planner():
  """Parameters that find walls, goal and agent in plain mazes."""
  shapes = jax.eval_shape(
    lambda key: NET.init(key, jnp.zeros((1, 32, 32, 3)), train=False)['params'],
    jax.random.key(0),
  )
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
  trunk = params['trunk']
  trunk['conv1']['kernel'][1, 1] = np.eye(3)
  trunk['conv2']['kernel'][1, 1] = np.eye(3)
  # Floor is light, walls are dark; the goal is green, the agent red.
  trunk['maps']['kernel'][0, 0] = np.array([(-1, 1, 0), (-1, 0, -1), (1, -1, 0)]).T
  trunk['scale'][:] = 100, 3, 10
  params['head']['kernel'][:] = np.eye(4)
  return params


def test_it_can_be_the_optimal_planner():
  world, _ = mazes.make_world('plain', 'test', 100)
  source = Arrays(world.scene.background, None, (), world=world)

  def predict(params, images):
    return NET.apply({'params': params}, images / jnp.float32(255), train=False)

  rates = success_rates(predict, planner(), {'plain': source})['plain']
  assert rates['success_rate'] == rates['first_move'] == 1.0


def test_values_spread_to_the_four_neighbours():
  value = np.arange(12.0).reshape(1, 3, 4)
  found = np.asarray(neighbours(jnp.asarray(value)))
  for move, (row, column) in enumerate(STEPS):
    for at in np.ndindex(3, 4):
      inside = 0 <= at[0] + row < 3 and 0 <= at[1] + column < 4
      to = (at[0] + row, at[1] + column) if inside else at
      assert found[(move, 0, *at)] == value[(0, *to)]
  assert (tuple(map(tuple, mazes.MOVES.tolist()))) == STEPS


def test_maps_are_standardised_image_by_image_and_constant_ones_are_finite(rng):
  maps = rng.normal(3, 5, (2, 6, 6, 3)).astype(np.float32)
  maps[1, ..., 2] = 7
  found = np.asarray(standardised(jnp.asarray(maps)), np.float64)
  np.testing.assert_allclose(found.mean((1, 2)), 0, atol=1e-6)
  deviation = found.std((1, 2))
  np.testing.assert_allclose(deviation[0], 1, rtol=1e-5)
  np.testing.assert_array_equal(found[1, ..., 2], 0)
