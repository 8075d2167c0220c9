"""Policies in mazes: how often an agent reaches the goal, and how often by chance.

An agent that has not reached it after `PATIENCE` times the shortest path has failed.
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
"""How many times the shortest path an agent may take."""

GAMES = 500
"""Mazes of a domain that are played, the first of its test set."""

Act = Callable[[np.ndarray], np.ndarray]
"""Positions of the agents (N, 2) -> their actions (N,) int."""


def success_rates(
  predict: Callable[[State, jax.Array], Outputs],
  state: State,
  sources: Mapping[str, Any],
) -> dict[str, dict[str, float]]:
  """Lets the greedy policy of a network play unseen mazes, those of a domain at once.

  Args:
    predict: (state, images (N, 32, 32, 3) uint8) -> outputs with 'logits' (N, 4).
    state: of the network.
    sources: domain -> its test images, with a `world` of `lt_jax.data.mazes`.

  Returns:
    domain -> 'success_rate' of the network; 'first_move', how often its first move is
    one that an optimal planner could make; 'random_success_rate', that of random
    moves, in expectation; 'planner_success_rate'. All are in [0, 1].

  Raises:
    UserError: a domain that is no domain of mazes, or whose images were resized.
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

  It need not be played to the end of the time: where it comes to a cell again, as by
  walking into a wall, it will do so for ever.

  Args:
    act: the policy. Agents whose game is over are still asked for.
    mazes: N of them.
    patience: moves it may make, as a multiple of the shortest path.

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
  """Returns how probable it is that uniformly random moves solve each maze in time.

  Exactly, by passing on the distribution of the agent over the cells.

  Args:
    mazes: N of them.
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
  """Returns (N,) int, the moves from start to goal."""
  return mazes.distance[np.arange(len(mazes.size)), *mazes.start.T]


def move(mazes: Mazes, position: np.ndarray, action: np.ndarray) -> np.ndarray:
  """Returns where agents are after an action; who walks into a wall stays.

  Args:
    mazes: N of them.
    position: (N, 2) int32.
    action: (N,) int.
  """
  after = position + MOVES[action]
  walls = np.pad(mazes.walls, ((0, 0), (1, 1), (1, 1)), constant_values=True)
  blocked = walls[np.arange(len(after)), *(after + 1).T]
  return np.where(blocked[:, None], position, after)


def _shifted(there: np.ndarray, walls: np.ndarray, step: np.ndarray) -> np.ndarray:
  """Returns a distribution (N, H, W) after one move that all agents try to make."""
  blocked = _beyond(walls, -step, True)  # of each cell: whether the move ends in a wall
  return np.where(blocked, there, 0) + _beyond(np.where(blocked, 0, there), step, 0)


def _beyond(cells: np.ndarray, step: np.ndarray, fill: Any) -> np.ndarray:
  """Returns cells (N, H, W) moved by a step, `fill` coming in from beyond the edge."""
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
"""Labels are moves; beside their accuracy it is counted how often the agent arrives."""
