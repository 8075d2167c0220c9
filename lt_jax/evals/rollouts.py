"""Policies in mazes: how often an agent reaches the goal, and how often by chance.

An agent fails if it has not reached the goal after `PATIENCE` times the shortest path.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lt_jax.data.mazes import MOVES, Mazes, World, optimal_actions
from lt_jax.errors import UserError
from lt_jax.evals.classification import CLASSIFICATION
from lt_jax.evals.tasks import Metric
from lt_jax.method import Outputs, State

PATIENCE = 4
"""The limit of an agent's moves, as a multiple of the shortest path."""

GAMES = 500
"""How many mazes per domain are played: the first ones of its test set."""

Act = Callable[[np.ndarray], np.ndarray]
"""Positions of the agents (N, 2) -> their actions (N,) int."""


def success_rates(
  predict: Callable[[State, jax.Array], Outputs],
  state: State,
  sources: Mapping[str, Any],
) -> dict[str, dict[str, float]]:
  """Plays unseen mazes with a network's greedy policy, a domain's mazes in parallel.

  Args:
    predict: (state, images (N, 32, 32, 3) uint8) -> outputs with 'logits' (N, 4).
    state: that of the network.
    sources: domain -> its test images, with a `world` of `lt_jax.data.mazes`.

  Returns:
    domain -> 'success_rate' of the network; 'first_move', how often its first move is
    one that an optimal planner could make; 'random_success_rate', the expected rate of
    random moves; 'planner_success_rate'. All are in [0, 1].

  Raises:
    UserError: a domain without mazes, or whose images were resized.
  """
  for name, source in sources.items():
    if getattr(source, 'world', None) is None:
      raise UserError(f"task 'mazes': the images of {name!r} are not those of mazes")
    if source.images.shape != source.world.scene.background.shape:
      raise UserError(f"task 'mazes': {name!r} was resized: set data.size to 0")

  @jax.jit
  def greedy(state, scene, position):
    outputs = predict(state, scene.images(position))
    return jnp.argmax(outputs['logits'], axis=-1)

  def measure(world: World) -> dict[str, float]:
    mazes, scene, optimal = jax.tree.map(lambda x: x[:GAMES], world)

    def act(position: np.ndarray) -> np.ndarray:
      return np.asarray(greedy(state, scene, position))

    def plan(position: np.ndarray) -> np.ndarray:
      return optimal_actions(mazes.distance, position).argmax(1)

    first = act(mazes.start)
    return {
      'success_rate': float(successes(act, mazes).mean()),
      'first_move': float(optimal[np.arange(len(first)), first].mean()),
      'random_success_rate': float(random_successes(mazes).mean()),
      'planner_success_rate': float(successes(plan, mazes).mean()),
    }

  return {name: measure(source.world) for name, source in sources.items()}


def successes(act: Act, mazes: Mazes, patience: int = PATIENCE) -> np.ndarray:
  """Returns which mazes a deterministic policy solves in time.

  A game can end before time is up: an agent that returns to a cell, for example by
  walking into a wall, is in an endless loop.

  Args:
    act: the policy; also called for agents whose game is over.
    mazes: N mazes.
    patience: the limit of moves, as a multiple of the shortest path.

  Returns:
    (N,) bool.
  """
  every = np.arange(len(mazes.size))
  limit = patience * shortest(mazes)
  position, moves = mazes.start, 0
  seen = np.zeros(mazes.walls.shape, bool)
  playing, solved = np.ones(len(every), bool), np.zeros(len(every), bool)
  while playing.any():
    seen[every, position[:, 0], position[:, 1]] = True
    position = np.where(
      playing[:, None], move(mazes, position, act(position)), position
    )
    moves += 1
    solved |= playing & (position == mazes.goal).all(1)
    again = seen[every, position[:, 0], position[:, 1]]
    playing &= ~solved & ~again & (moves < limit)
  return solved


def random_successes(mazes: Mazes, patience: int = PATIENCE) -> np.ndarray:
  """Returns the probability that uniformly random moves solve each maze in time.

  It is exact: each step updates the distribution of the agent over the cells.

  Args:
    mazes: N mazes.
    patience: as for `successes`.

  Returns:
    (N,) float64.
  """
  every = np.arange(len(mazes.size))
  limit = patience * shortest(mazes)
  at_start = (every, *mazes.start.T)
  at_goal = (every, *mazes.goal.T)
  there = np.zeros(mazes.walls.shape)
  there[at_start] = 1
  solved = np.zeros(len(every))
  for moves in range(limit.max()):
    after = sum(_shifted(there, mazes.walls, step) for step in MOVES) / len(MOVES)
    arrived = after[at_goal]
    solved += np.where(moves < limit, arrived, 0)
    after[at_goal] = 0
    there = after
  return solved


def shortest(mazes: Mazes) -> np.ndarray:
  """Returns (N,) int, the fewest moves from start to goal."""
  return mazes.distance[np.arange(len(mazes.size)), *mazes.start.T]


def move(mazes: Mazes, position: np.ndarray, action: np.ndarray) -> np.ndarray:
  """Returns where agents are after an action; those that walk into a wall stay put.

  Args:
    mazes: N mazes.
    position: (N, 2) int32.
    action: (N,) int.
  """
  after = position + MOVES[action]
  walls = np.pad(mazes.walls, ((0, 0), (1, 1), (1, 1)), constant_values=True)
  blocked = walls[np.arange(len(after)), *(after + 1).T]
  return np.where(blocked[:, None], position, after)


def _shifted(there: np.ndarray, walls: np.ndarray, step: np.ndarray) -> np.ndarray:
  """Returns a distribution (N, H, W) after all agents try the same move."""
  blocked = _beyond(walls, -step, True)  # cells from which the move hits a wall
  return np.where(blocked, there, 0) + _beyond(np.where(blocked, 0, there), step, 0)


def _beyond(cells: np.ndarray, step: np.ndarray, fill: Any) -> np.ndarray:
  """Returns cells (N, H, W) shifted by a step, with `fill` at the edge."""
  height, width = cells.shape[1:]
  padded = np.pad(cells, ((0, 0), (1, 1), (1, 1)), constant_values=fill)
  row, column = 1 - step
  return padded[:, row : row + height, column : column + width]


MAZES = CLASSIFICATION._replace(
  play=success_rates,
  metrics={
    **CLASSIFICATION.metrics,
    'success_rate': Metric('success rate', better=0),
    'first_move': Metric('optimal first move', better=0),
    'random_success_rate': Metric('success rate of random moves', better=0),
    'planner_success_rate': Metric(better=0),
  },
)
"""Labels are moves; metrics are their accuracy and how often the agent arrives."""
