"""Mazes: they can be solved, their labels solve them, and every image is its own."""

import collections
import functools
import zlib

import jax
import numpy as np
import pytest

from lt_jax.data import mazes
from lt_jax.data.mazes import ACTIONS, MOVES, RENDERINGS, SIDE
from lt_jax.data.sources import load_source
from lt_jax.errors import UserError

N = 60

world = functools.cache(lambda domain, split='test': mazes.make_world(domain, split, N))


def breadth_first(walls, goal):
  """The moves from every cell that can be reached, by a queue."""
  found, queue = {tuple(goal): 0}, collections.deque([tuple(goal)])
  while queue:
    cell = queue.popleft()
    for move in MOVES:
      after = tuple(int(x) for x in np.add(cell, move))
      inside = all(0 <= x < len(walls) for x in after)
      if inside and not walls[after] and after not in found:
        found[after] = found[cell] + 1
        queue.append(after)
  return found


def test_distances_are_those_of_a_search_and_labels_are_optimal():
  shown, labels = world('plain')
  made = shown.mazes
  sizes = set()
  for n in range(N):
    size, start = int(made.size[n]), tuple(made.start[n].tolist())
    sizes.add(size)
    found = breadth_first(made.walls[n], made.goal[n])
    floor = np.argwhere(~made.walls[n])
    assert floor.max() < size
    assert len(found) == len(floor)  # every cell can be reached
    for cell in np.ndindex(made.walls[n].shape):
      assert made.distance[n][cell] == found.get(cell, -1)
    best = [
      found.get((start[0] + row, start[1] + column)) == found[start] - 1
      for row, column in MOVES.tolist()
    ]
    np.testing.assert_array_equal(shown.optimal[n], best)
    assert best[labels[n]]
  assert sizes == {7, 9, 11}


def test_contents_of_the_drawings():
  """Labels are balanced, some have equals, and mazes have loops and long ways."""
  made = mazes.make_mazes(mazes.draw('a test', 2000))
  optimal = mazes.optimal_actions(made.distance, made.start)
  assert (optimal.sum(1) > 1).mean() > 0.02
  first = mazes.chosen(optimal, np.linspace(0, 1, 2000, endpoint=False))
  assert np.bincount(first, minlength=4).min() > 400
  far = made.distance[np.arange(2000), *made.start.T]
  assert far.min() == 1 and np.median(far) >= 7 and far.max() > 25
  doors = (~made.walls).sum((1, 2)) - ((made.size + 1) // 2) ** 2
  assert (doors > ((made.size + 1) // 2) ** 2 - 1).mean() > 0.8  # more than in a tree


def test_ties_are_chosen_equally_often():
  among = np.array([[False, True, False, True]] * 4)
  where = np.array([0.0, 0.49, 0.5, 0.999], np.float32)
  np.testing.assert_array_equal(mazes.chosen(among, where), [1, 1, 3, 3])


def picture(domain):
  shown, _ = world(domain)
  return shown.scene.images(shown.mazes.start)


def kinds(n):
  """What each pixel of maze n shows, cell by cell: a key of `mazes.Look`."""
  made = world('plain')[0].mazes
  size = int(made.size[n])
  first = {7: 8, 9: 6, 11: 4}[size]
  found = np.full((SIDE, SIDE), 'wall', object)
  for row, column in np.argwhere(~made.walls[n]):
    kind = 'floor'
    kind = 'goal' if (row, column) == tuple(made.goal[n]) else kind
    kind = 'agent' if (row, column) == tuple(made.start[n]) else kind
    at = first + 2 * row, first + 2 * column
    found[at[0] : at[0] + 2, at[1] : at[1] + 2] = kind
  return found


def test_a_plain_image_shows_its_maze():
  images = picture('plain')
  assert images.shape == (N, SIDE, SIDE, 3) and images.dtype == np.uint8
  colours = {'wall': 40, 'floor': 225, 'goal': (40, 160, 60), 'agent': (220, 50, 40)}
  for n in range(0, N, 6):
    wanted = np.array([[np.broadcast_to(colours[k], 3) for k in r] for r in kinds(n)])
    np.testing.assert_array_equal(images[n], wanted)


@pytest.mark.parametrize('domain', [name for name in RENDERINGS if name != 'plain'])
def test_a_domain_is_another_rendering_of_the_same_mazes(domain):
  images = picture(domain).astype(int)
  assert (images != picture('plain')).any((1, 2, 3)).all()
  assert len({image.tobytes() for image in images}) == N
  for n in range(0, N, 12):
    shown = kinds(n)
    of = {kind: images[n][shown == kind] for kind in mazes.Look._fields}
    for kind in ('agent', 'goal'):  # one colour, which no other pixel has
      assert (of[kind] == of[kind][0]).all()
      assert (images[n] == of[kind][0]).all(-1).sum() == len(of[kind])
    if domain == 'inverted':
      np.testing.assert_array_equal(images[n], 255 - picture('plain')[n].astype(int))
    elif domain != 'outlined':  # whose walls have the colour of the floor inside
      assert of['wall'].mean() < of['floor'].mean() - 10


def test_splits_share_no_maze_and_all_domains_have_the_same_tests():
  def drawn(domain, split):
    made = world(domain, split)[0].mazes
    return {(*made.walls[n].ravel(), *made.start[n], *made.goal[n]) for n in range(N)}

  apart = [
    drawn('plain', 'train'),
    drawn('plain', 'val'),
    drawn('night', 'train'),
    drawn('plain', 'test'),
  ]
  assert len(set.union(*apart)) == 4 * N
  assert drawn('night', 'test') == apart[-1]


def test_a_source_of_mazes_is_the_same_again_and_does_not_depend_on_its_length():
  made = load_source(f'mazes:tinted:{N}')
  assert {split: len(one) for split, one in made.items()} == {
    'train': N,
    'val': 1000,
    'test': 2000,
  }
  shown, labels = world('tinted')
  np.testing.assert_array_equal(made['test'].images[:N], picture('tinted'))
  np.testing.assert_array_equal(made['test'].labels[:N], labels)
  assert made['train'].class_names == ACTIONS
  np.testing.assert_array_equal(made['test'].world.optimal[:N], shown.optimal)
  # The draw is a part of the data set: it never changes.
  assert labels[:12].tolist() == [2, 3, 2, 3, 0, 2, 3, 3, 3, 1, 1, 1]
  assert zlib.crc32(picture('textured').tobytes()) == 3182973204


def test_an_agent_is_drawn_on_the_device_as_on_the_host():
  scene = world('textured')[0].scene
  position = np.random.default_rng(0).integers(0, 7, (N, 2)).astype(np.int32)
  made = jax.jit(lambda scene, position: scene.images(position))(scene, position)
  np.testing.assert_array_equal(made, scene.images(position))


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('mazes', 'unknown domain of mazes'),
    ('mazes:nihgt', "did you mean 'night'"),
    ('mazes:night:0', "mazes:night:0: '0' is not a number of training images"),
    ('mazes:night:many', "'many' is not a number"),
  ],
)
def test_an_unknown_domain_is_rejected(spec, message):
  with pytest.raises(UserError, match=message) as error:
    load_source(spec)
  assert '\n' not in str(error.value)
