"""Mazes: a grid world in which the label of an image is the next move to the goal.

Use them to try domain adaptation for a network that learns a policy. Mazes of 7x7, 9x9
and 11x11 cells are rendered at 32 pixels in several styles. An image shows a whole
maze, the agent and the goal; its label is the first move of a shortest path.

We made these ourselves: the mazes that Liu et al. report on (Open Compound Domain
Adaptation, arXiv 1909.03403) were never released.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lt_jax.data.arrays import Arrays
from lt_jax.errors import UserError, lookup

SIDE = 32
"""Height and width of an image in pixels."""

PIXELS = 2
"""Side of a cell in pixels; cells begin at even pixels, to align with strides of 2."""

ACTIONS = ('up', 'down', 'left', 'right')
MOVES = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)], np.int32)
"""What each action adds to the agent's row and column."""

ROOMS = (4, 5, 6)
"""Rooms per side of a maze; between two neighbours is a cell, either wall or floor."""

CELLS = 2 * ROOMS[-1] - 1
"""Cells per side of the largest maze."""

LOOPS = 0.4
"""The probability that a wall between two rooms is removed from a loop-free maze."""

SPLITS = {'train': 10_000, 'val': 1_000, 'test': 2_000}
"""Images per domain, unless its name gives the number of training images."""

SEED = 0
"""Seed of all mazes and renderings; it is part of the data set."""


class Mazes(NamedTuple):
  """N mazes, each in the upper left of a grid of 11x11 cells.

  Attributes:
    size: (N,) int32, cells per side.
    walls: (N, 11, 11) bool, also true outside the maze.
    start: (N, 2) int32, row and column where the agent starts.
    goal: (N, 2) int32.
    distance: (N, 11, 11) int32, moves from each cell to the goal; -1 in walls.
  """

  size: np.ndarray
  walls: np.ndarray
  start: np.ndarray
  goal: np.ndarray
  distance: np.ndarray


class Scene(NamedTuple):
  """The images of N mazes, in which the agent can be placed anywhere.

  Attributes:
    background: (N, 32, 32, 3) uint8: walls, floor and goal.
    cell: (N, 32) int32, the row of cells shown by a row of pixels, and likewise for
      columns; -1 outside the maze.
    agent: (N, 1, 1, 3) uint8, its colour.
  """

  background: Any
  cell: Any
  agent: Any

  def images(self, position: Any) -> Any:
    """Returns (N, 32, 32, 3) uint8 with the agents at (N, 2), in NumPy or in JAX."""
    rows = (self.cell == position[:, :1])[:, :, None, None]
    columns = (self.cell == position[:, 1:])[:, None, :, None]
    here = rows & columns
    return self.background * ~here + self.agent * here


class World(NamedTuple):
  """The mazes behind the images of a split.

  Attributes:
    mazes: the mazes.
    scene: their images.
    optimal: (N, 4) bool, the actions that begin a shortest path; the label is one.
  """

  mazes: Mazes
  scene: Scene
  optimal: np.ndarray


def maze_images(argument: str, data_dir: str | None = None) -> dict[str, Any]:
  """Returns a domain of mazes.

  All domains have the same test mazes, so they only differ in the rendering. No two
  domains share training mazes.

  Args:
    argument: DOMAIN or DOMAIN:N, with a key of `RENDERINGS` and N training images.
    data_dir: not used.

  Returns:
    'train', 'val' and 'test' -> images (N, 32, 32, 3) uint8 in memory, with their
    `World`.

  Raises:
    UserError: an unknown domain, or an invalid number.
  """
  domain, _, wanted = argument.partition(':')
  lookup(RENDERINGS, 'domain of mazes', domain)
  if wanted and not (wanted.isdecimal() and int(wanted)):
    raise UserError(f'mazes:{argument}: {wanted!r} is not a number of training images')
  sizes = SPLITS | ({'train': int(wanted)} if wanted else {})
  sources = {}
  for split, size in sizes.items():
    world, labels = make_world(domain, split, size)
    images = world.scene.images(world.mazes.start)
    sources[split] = Arrays(images, labels, ACTIONS, world=world)
  return sources


def make_world(domain: str, split: str, size: int) -> tuple[World, np.ndarray]:
  """Returns (the first mazes of a split, rendered; labels (size,) int32)."""
  purpose = 'test' if split == 'test' else f'{domain}/{split}'
  draws = draw(purpose, size)
  mazes = make_mazes(draws)
  optimal = optimal_actions(mazes.distance, mazes.start)
  scene = render(mazes, draws, RENDERINGS[domain])
  return World(mazes, scene, optimal), chosen(optimal, draws.action).astype(np.int32)


class Draws(NamedTuple):
  """Random numbers in [0, 1), float32, one row per image.

  Each image has its own, so it does not depend on how many there are.
  """

  edges: np.ndarray  # (N, E)
  loops: np.ndarray  # (N, E)
  rooms: np.ndarray  # (N,)
  goal: np.ndarray
  start: np.ndarray
  action: np.ndarray
  look: np.ndarray  # (N, 6)
  grain: np.ndarray  # (N, 32, 32)


def draw(purpose: str, size: int) -> Draws:
  """Draws the random numbers of `size` images for one purpose."""
  widths = (len(EDGES), len(EDGES), 1, 1, 1, 1, 6, SIDE**2)
  seed = (SEED, zlib.crc32(purpose.encode()))
  table = np.empty((size, sum(widths)), np.float32)
  for row in range(size):
    np.random.default_rng((*seed, row)).random(out=table[row], dtype=np.float32)
  edges, loops, *single, look, grain = np.split(table, np.cumsum(widths)[:-1], axis=1)
  return Draws(
    edges,
    loops,
    *(column[:, 0] for column in single),
    look,
    grain.reshape(size, SIDE, SIDE),
  )


ROOM = np.stack(np.indices((ROOMS[-1],) * 2), axis=-1).reshape(-1, 2)
"""(36, 2): row and column of each room in the largest maze."""

EDGES = np.argwhere(
  np.triu(np.abs(ROOM[:, None] - ROOM).sum(-1) == 1)  # neighbours, each pair once
)
"""(60, 2): the two rooms on either side of each cell between rooms."""


def make_mazes(draws: Draws) -> Mazes:
  """Returns mazes: minimum spanning trees of random weights, and a few more doors."""
  rooms = np.array(ROOMS)[(draws.rooms * len(ROOMS)).astype(int)]
  there = (ROOM[EDGES] < rooms[:, None, None, None]).all((2, 3))
  doors = spanning_tree(np.where(there, draws.edges, np.inf))
  doors |= there & (draws.loops < LOOPS)
  floor = np.zeros((len(rooms), CELLS, CELLS), bool)
  inside = (rooms[:, None, None] > ROOM).all(-1)
  floor[:, 2 * ROOM[:, 0], 2 * ROOM[:, 1]] = inside
  between = ROOM[EDGES].sum(1)  # two rooms are two cells apart
  floor[:, between[:, 0], between[:, 1]] = doors
  goal = chosen_cell(floor, draws.goal)
  rest = floor.copy()
  rest[np.arange(len(goal)), goal[:, 0], goal[:, 1]] = False
  start = chosen_cell(rest, draws.start)
  size = (2 * rooms - 1).astype(np.int32)
  return Mazes(size, ~floor, start, goal, distances(floor, goal))


def spanning_tree(weights: np.ndarray) -> np.ndarray:
  """Returns which edges are in the minimum spanning tree of each graph, by Prim.

  Args:
    weights: (N, 60) of `EDGES`, infinite for missing ones. Rooms that cannot be reached
      from the first are left out.

  Returns:
    (N, 60) bool.
  """
  every = np.arange(len(weights))
  reached = np.zeros((len(weights), len(ROOM)), bool)
  reached[:, 0] = True
  tree = np.zeros(weights.shape, bool)
  for _ in ROOM[1:]:
    border = reached[:, EDGES[:, 0]] != reached[:, EDGES[:, 1]]
    cost = np.where(border, weights, np.inf)
    best = cost.argmin(1)
    found = np.isfinite(cost[every, best])
    tree[every, best] |= found
    for room in EDGES[best].T:
      reached[every, room] |= found
  return tree


def chosen(among: np.ndarray, where: np.ndarray) -> np.ndarray:
  """Returns (N,) int, a true column of `among` (N, M) by draws (N,) in [0, 1)."""
  place = np.floor(where * among.sum(1)) + 1
  return (among.cumsum(1) >= place[:, None]).argmax(1)


def chosen_cell(among: np.ndarray, where: np.ndarray) -> np.ndarray:
  """Returns (N, 2) int32, row and column of a true cell of `among` (N, 11, 11)."""
  cell = chosen(among.reshape(len(among), -1), where)
  return np.stack(np.divmod(cell, CELLS), axis=-1).astype(np.int32)


def distances(floor: np.ndarray, goal: np.ndarray) -> np.ndarray:
  """Returns the fewest moves to a goal from every cell, by breadth-first search.

  Args:
    floor: (N, H, W) bool.
    goal: (N, 2) int, on the floor.

  Returns:
    (N, H, W) int32, -1 if the goal cannot be reached.
  """
  found = np.full(floor.shape, -1, np.int32)
  front = np.zeros(floor.shape, bool)
  front[np.arange(len(goal)), goal[:, 0], goal[:, 1]] = True
  moves = 0
  while front.any():
    found[front] = moves
    near = np.zeros_like(front)
    near[:, 1:] |= front[:, :-1]
    near[:, :-1] |= front[:, 1:]
    near[:, :, 1:] |= front[:, :, :-1]
    near[:, :, :-1] |= front[:, :, 1:]
    front = near & floor & (found < 0)
    moves += 1
  return found


def optimal_actions(distance: np.ndarray, position: np.ndarray) -> np.ndarray:
  """Returns which actions begin a shortest path to the goal.

  Args:
    distance: (N, H, W), see `distances`.
    position: (N, 2) int, on the floor and not the goal.

  Returns:
    (N, 4) bool, in the order of `ACTIONS`.
  """
  padded = np.pad(distance, ((0, 0), (1, 1), (1, 1)), constant_values=-1)
  every = np.arange(len(position))
  rows, columns = (position[:, None] + MOVES + 1).transpose(2, 0, 1)
  after = padded[every[:, None], rows, columns]
  now = distance[every, position[:, 0], position[:, 1]]
  return (after >= 0) & (after == now[:, None] - 1)


class Look(NamedTuple):
  """Colours, each uint8 and broadcastable to (N, 32, 32, 3)."""

  wall: np.ndarray
  floor: np.ndarray
  goal: np.ndarray
  agent: np.ndarray  # the same for all pixels


def render(
  mazes: Mazes, draws: Draws, rendering: Callable[[np.ndarray, Draws], Look]
) -> Scene:
  """Renders mazes, each in the middle of its image and surrounded by walls.

  Args:
    mazes: the mazes.
    draws: the random numbers of the same images.
    rendering: (which pixels are walls (N, 32, 32), draws) -> colours.
  """
  margin = (SIDE // PIXELS - mazes.size[:, None]) // 2
  cell = np.arange(SIDE) // PIXELS - margin
  cell = np.where((cell < 0) | (cell >= mazes.size[:, None]), -1, cell)
  every = np.arange(len(cell))[:, None, None]
  walls = np.pad(mazes.walls, ((0, 0), (0, 1), (0, 1)), constant_values=True)
  walls = walls[every, cell[:, :, None], cell[:, None]]  # -1 is the padding
  look = rendering(walls, draws)
  agent = np.broadcast_to(look.agent, (len(cell), 1, 1, 3))
  ground = np.where(walls[..., None], look.wall, look.floor)
  background = Scene(ground, cell, look.goal).images(mazes.goal)
  return Scene(background, cell.astype(np.int32), agent)


def _colour(*levels: float) -> np.ndarray:
  """Returns a colour, three levels in [0, 255], for all pixels."""
  return np.array(levels, np.uint8).reshape(1, 1, 1, 3)


def _between(dark: np.ndarray, light: np.ndarray, draws: np.ndarray) -> np.ndarray:
  """Returns colours from `dark` up to `light`, by draws in [0, 1)."""
  return (dark + (light - dark) * draws).astype(np.uint8)


# The renderings: (walls (N, 32, 32) bool, draws) -> colours.

PLAIN = Look(
  wall=_colour(40, 40, 40),
  floor=_colour(225, 225, 225),
  goal=_colour(40, 160, 60),
  agent=_colour(220, 50, 40),
)


def plain(walls: np.ndarray, draws: Draws) -> Look:
  """Returns dark walls, light floor, a green goal and a red agent."""
  return PLAIN


def tinted(walls: np.ndarray, draws: Draws) -> Look:
  """Returns dark walls and a light floor with random colours for each image."""
  look = draws.look[:, None, None]
  return PLAIN._replace(
    wall=_between(0, 120, look[..., :3]), floor=_between(135, 255, look[..., 3:])
  )


def textured(walls: np.ndarray, draws: Draws) -> Look:
  """Returns walls of bricks and a floor of sand."""
  row, column = np.indices((SIDE, SIDE))
  joint = (row % 3 == 2) | ((column + 3 * (row // 3 % 2)) % 6 == 5)
  bricks = np.where(
    joint[None, ..., None], _colour(150, 140, 130), _colour(120, 60, 50)
  )
  sand = np.stack(
    [_between(level, level + 80, draws.grain) for level in (170, 150, 110)], axis=-1
  )
  return PLAIN._replace(wall=bricks, floor=sand)


def outlined(walls: np.ndarray, draws: Draws) -> Look:
  """Returns walls in the colour of the floor, with lines along their sides."""
  padded = np.pad(walls, ((0, 0), (1, 1), (1, 1)), constant_values=True)
  inside = np.ones_like(walls)
  for row in range(3):
    for column in range(3):
      inside &= padded[:, row : row + SIDE, column : column + SIDE]
  wall = np.where(inside[..., None], PLAIN.floor, PLAIN.wall)
  return PLAIN._replace(wall=wall)


def night(walls: np.ndarray, draws: Draws) -> Look:
  """Returns the plain colours in dim moonlight."""
  light = np.array((0.35, 0.4, 0.6))
  return Look(*((colour * light).astype(np.uint8) for colour in PLAIN))


def inverted(walls: np.ndarray, draws: Draws) -> Look:
  """Returns the plain colours, inverted: light walls and a dark floor."""
  return Look(*(255 - colour for colour in PLAIN))


RENDERINGS: dict[str, Callable[[np.ndarray, Draws], Look]] = {
  'plain': plain,
  'tinted': tinted,
  'textured': textured,
  'outlined': outlined,
  'night': night,
  'inverted': inverted,
}
