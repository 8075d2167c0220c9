"""Policies in mazes: who arrives, who walks in circles, and who is lucky."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from lt_jax.data import mazes
from lt_jax.data.arrays import Arrays
from lt_jax.data.mazes import MOVES
from lt_jax.errors import UserError
from lt_jax.evals import rollouts

UP, DOWN, LEFT, RIGHT = range(4)


def maze(*rows):
  """Returns one maze drawn in characters: # wall, A agent, G goal."""
  cells = np.array([[*row] for row in rows])
  grid = np.full((11, 11), '#')
  grid[: len(cells), : len(cells[0])] = cells
  goal, start = (np.argwhere(grid == kind).astype(np.int32) for kind in 'GA')
  floor = (grid != '#')[None]
  return mazes.Mazes(
    size=np.array([len(cells)], np.int32),
    walls=~floor,
    start=start,
    goal=goal,
    distance=mazes.distances(floor, goal),
  )


CORRIDOR = maze('A..G', '####')
FORK = maze('.A.', '.#.', '..G')


def the_other_way(at):
  """Five moves in `FORK`, where three are enough."""
  return np.select([at[:, 0] == 2, at[:, 1] == 0], [RIGHT, DOWN], LEFT)


def always(action):
  return lambda position: np.full(len(position), action)


def test_agents_move_and_walls_stop_them():
  made = mazes.make_mazes(mazes.draw('a walk', 200))
  rng, position = np.random.default_rng(0), made.start
  for _ in range(30):
    action = rng.integers(0, 4, 200)
    after = rollouts.move(made, position, action)
    for n in range(200):
      row, column = position[n] + MOVES[action[n]]
      free = 0 <= row < 11 and 0 <= column < 11 and not made.walls[n, row, column]
      wanted = (row, column) if free else tuple(position[n])
      assert tuple(after[n]) == wanted
    position = after


@pytest.mark.parametrize(
  ('made', 'act', 'patience', 'arrives'),
  [
    (CORRIDOR, always(RIGHT), 1, True),
    (CORRIDOR, always(LEFT), 4, False),  # into the wall, for ever
    (FORK, lambda at: np.where(at[:, 1] == 1, RIGHT, DOWN), 1, True),
    (FORK, the_other_way, 2, True),
    (FORK, the_other_way, 1, False),
    (CORRIDOR, lambda at: np.where(at[:, 1] == 2, LEFT, RIGHT), 4, False),  # and back
  ],
)
def test_a_policy_arrives_in_time_or_not(made, act, patience, arrives):
  assert rollouts.successes(act, made, patience).tolist() == [arrives]


def test_games_are_played_side_by_side():
  both = mazes.Mazes(
    *(np.concatenate(pair) for pair in zip(CORRIDOR, FORK, strict=True))
  )
  assert rollouts.successes(always(RIGHT), both).tolist() == [True, False]
  alone = [rollouts.random_successes(made)[0] for made in (CORRIDOR, FORK)]
  np.testing.assert_allclose(rollouts.random_successes(both), alone, rtol=1e-12)


def absorbed(made, moves):
  """The chance to arrive within so many random moves, by powers of a matrix."""
  chain = np.zeros((121, 121))
  for row, column in np.argwhere(~made.walls[0]):
    at = row * 11 + column
    if (row, column) == tuple(made.goal[0]):
      chain[at, at] = 1
      continue
    for step in MOVES:
      after = step + (row, column)
      free = (
        (after >= 0).all() and (after < 11).all() and not made.walls[0][tuple(after)]
      )
      chain[at, after @ (11, 1) if free else at] += 1 / 4
  return np.linalg.matrix_power(chain, moves)[
    made.start[0] @ (11, 1), made.goal[0] @ (11, 1)
  ]


@pytest.mark.parametrize('patience', [1, 4])
@pytest.mark.parametrize('seed', [None, 0, 1])
def test_random_moves_arrive_as_often_as_their_markov_chain(seed, patience):
  made = FORK if seed is None else mazes.make_mazes(mazes.draw(f'chain {seed}', 1))
  wanted = absorbed(made, patience * int(rollouts.shortest(made)[0]))
  np.testing.assert_allclose(
    rollouts.random_successes(made, patience), wanted, rtol=1e-9
  )
  if seed is None and patience == 1:
    np.testing.assert_allclose(wanted, 1 / 4**3, rtol=1e-12)


def test_success_rates_of_a_network():
  """One that always goes right: it solves the mazes where that is enough."""
  worlds = {name: mazes.make_world(name, 'test', 40)[0] for name in ('plain', 'night')}
  sources = {
    name: Arrays(world.scene.background, None, (), world=world)
    for name, world in worlds.items()
  }
  traced = types.SimpleNamespace(times=0)

  def predict(state, images):
    traced.times += 1
    assert images.shape == (40, 32, 32, 3) and images.dtype == jnp.uint8
    return {'logits': jnp.zeros((40, 4)).at[:, state].set(1.0)}

  found = rollouts.success_rates(predict, jnp.int32(RIGHT), sources)
  assert traced.times == 1  # all moves in all domains are one program
  assert found['plain'] == found['night']  # which have the same mazes
  rates = found['plain']
  made = worlds['plain'].mazes
  straight = [  # nothing but floor between an agent and a goal to its right
    start[0] == goal[0]
    and start[1] < goal[1]
    and not walls[start[0], start[1] : goal[1]].any()
    for start, goal, walls in zip(made.start, made.goal, made.walls, strict=True)
  ]
  assert rates['success_rate'] == np.mean(straight)
  assert rates['first_move'] == worlds['plain'].optimal[:, RIGHT].mean()
  assert rates['planner_success_rate'] == 1.0
  assert rates['random_success_rate'] == pytest.approx(
    rollouts.random_successes(made).mean()
  )
  assert 0 < rates['random_success_rate'] < 0.5
  again = rollouts.success_rates(predict, jnp.int32(RIGHT), sources)
  assert again == found


def test_the_planner_needs_the_shortest_path_and_no_more():
  made = mazes.make_mazes(mazes.draw('a plan', 100))

  def act(position):
    return mazes.optimal_actions(made.distance, position).argmax(1)

  assert rollouts.successes(act, made, patience=1).all()


def test_only_mazes_are_played():
  images = np.zeros((2, 32, 32, 3), np.uint8)
  world = mazes.make_world('plain', 'test', 2)[0]
  for source, message in (
    (Arrays(images, None, ()), "the images of 'digits' are not those of mazes"),
    (Arrays(images[:, :16], None, (), world=world), "'digits' was resized"),
  ):
    with pytest.raises(UserError, match=message):
      rollouts.success_rates(None, None, {'digits': source})
