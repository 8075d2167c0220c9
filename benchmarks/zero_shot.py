"""Closed forms of zero-shot learning compared with plain NumPy, and epochs of training.

  python -m benchmarks.zero_shot [--json=FILE] [--images=23527] [--features=2048]

Uses random features with the size of AwA2's (23,527 x 2,048, and 85 attributes of 40
seen classes). A closed form is timed with its whole grid, as a run searches it, and
compared with the plain formula, which does one solve per set of hyper-parameters. Both
run in this process, alternating; the best of `--rounds` counts. An epoch of `ale` or
`two_tower` is a compiled loop over batches of features in device memory, with the
recipe's head and loss and plain gradient steps. It is reported in images and gigabytes
of features per second, beside those of a sum over all features, which only reads them.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

from benchmarks import timing
from lt_jax.data.attributes import unit_rows
from lt_jax.losses import make_loss
from lt_jax.models import make_classifier
from lt_jax.surgeries.closed_forms import FORMS, Seen

ATTRIBUTES, CLASSES, BATCH = 85, 40, 64


def drawn(images: int, features: int) -> Seen:
  """Returns random features that depend on their class's attributes, in float64."""
  rng = np.random.default_rng(0)
  raw = rng.uniform(size=(CLASSES, ATTRIBUTES))
  label = rng.integers(0, CLASSES, images)
  mixing = rng.normal(size=(ATTRIBUTES, features))
  x = (raw - raw.mean(0))[label] @ mixing
  x += rng.normal(size=x.shape)
  return Seen(x, label, unit_rows(raw), raw, np.ones(CLASSES, bool))


def plain_eszsl(seen: Seen, sets: list[dict[str, float]]) -> list[np.ndarray]:
  """Returns W for every pair of g and l by the formula, with one solve each."""
  x, s = seen.x, seen.described
  y = np.where(seen.y[:, None] == np.arange(CLASSES)[None], 1.0, -1.0)
  gram, right, inner = x.T @ x, x.T @ y @ s, s.T @ s
  return [
    linalg.solve(
      inner + one['l'] * np.eye(len(inner)),
      linalg.solve(gram + one['g'] * np.eye(len(gram)), right, assume_a='pos').T,
      assume_a='pos',
    ).T
    for one in sets
  ]


def plain_sae(seen: Seen, sets: list[dict[str, float]]) -> list[np.ndarray]:
  """Returns W for every weight by SciPy's solver for Sylvester equations."""
  codes = seen.described[seen.y].T
  a, b, c = codes @ codes.T, seen.x.T @ seen.x, codes @ seen.x
  return [
    linalg.solve_sylvester(a, one['weight'] * b, (1 + one['weight']) * c).T
    for one in sets
  ]


def timed(function, rounds: int) -> float:
  """Returns the shortest time over the rounds, in seconds."""
  times = []
  for _ in range(rounds):
    begun = time.perf_counter()
    function()
    times.append(time.perf_counter() - begun)
  return min(times)


def closed(seen: Seen, name: str, plain, rounds: int) -> dict[str, float]:
  """Times a closed form and its plain version, and compares their results."""
  sets = FORMS[name].sets({})
  ours, theirs = [], []
  seconds = {'ours': [], 'plain': []}
  for _ in range(rounds):
    seconds['ours'].append(timed(lambda: ours.extend(FORMS[name].fits(seen, sets)), 1))
    seconds['plain'].append(timed(lambda: theirs.extend(plain(seen, sets)), 1))
  pairs = zip(ours[: len(sets)], theirs[: len(sets)], strict=True)
  apart = max(np.abs(a['kernel'] - b).max() / np.abs(b).max() for a, b in pairs)
  return {
    'sets': len(sets),
    **{f'{who}_seconds': round(min(times), 2) for who, times in seconds.items()},
    'relative_difference': float(apart),
  }


HEADS = {
  'ale': ('compatibility', {'name': 'ale', 'margin': 1.0}),
  'two_tower': ('two_tower', {'name': 'cross_entropy'}),
}
"""Recipe -> (head, loss)."""


def epoch(seen: Seen, recipe: str, rounds: int) -> dict[str, float]:
  """Times an epoch by gradient descent; batches are sliced on the device."""
  head, options = HEADS[recipe]
  loss = make_loss(counts=np.ones(CLASSES), **options)
  net = make_classifier('identity', head, CLASSES, class_vectors=seen.raw)
  x, y = jnp.asarray(seen.x, jnp.float32), jnp.asarray(seen.y, jnp.int32)
  variables = net.init(jax.random.key(0), x[:1, None, None], train=False)
  stats = {'batch_stats': variables['batch_stats']}
  steps = len(x) // BATCH

  def objective(params, image, label):
    outputs = net.apply({'params': params, **stats}, image[:, None, None], train=False)
    return loss(outputs, {'label': label}).mean()

  @functools.partial(jax.jit, donate_argnums=0)
  def whole(params, x, y):
    def step(i, params):
      image, label = (jax.lax.dynamic_slice_in_dim(v, i * BATCH, BATCH) for v in (x, y))
      grads = jax.grad(objective)(params, image, label)
      return jax.tree.map(lambda p, g: p - 1e-4 * g, params, grads)

    return jax.lax.fori_loop(0, steps, step, params)

  @jax.jit
  def read(x):
    return x.sum()

  params = jax.block_until_ready(whole(variables['params'], x, y))
  read(x).block_until_ready()
  times = {'seconds': [], 'reading_seconds': []}
  for _ in range(rounds):
    begun = time.perf_counter()
    params = jax.block_until_ready(whole(params, x, y))
    ended = time.perf_counter()
    read(x).block_until_ready()
    times['seconds'].append(ended - begun)
    times['reading_seconds'].append(time.perf_counter() - ended)
  best = {name: min(each) for name, each in times.items()}
  size = x.nbytes / 1e9
  return {
    **{name: round(value, 4) for name, value in best.items()},
    'images_per_second': round(steps * BATCH / best['seconds']),
    'gigabytes_per_second': round(size / best['seconds'], 2),
    'reading_gigabytes_per_second': round(size / best['reading_seconds'], 2),
  }


def main() -> None:
  """Prints a table, and writes it as JSON to `--json`."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--json', default=None)
  parser.add_argument('--images', type=int, default=23527)
  parser.add_argument('--features', type=int, default=2048)
  parser.add_argument('--rounds', type=int, default=3)
  asked = parser.parse_args()
  seen = drawn(asked.images, asked.features)
  found = {
    'images': asked.images,
    'features': asked.features,
    **timing.facts(),
    'eszsl': closed(seen, 'eszsl', plain_eszsl, asked.rounds),
    'sae': closed(seen, 'sae', plain_sae, asked.rounds),
    **{recipe: epoch(seen, recipe, asked.rounds) for recipe in HEADS},
  }
  for name in ('eszsl', 'sae'):
    row = found[name]
    print(
      f'{name}: a grid of {row["sets"]} in {row["ours_seconds"]} s, plain NumPy '
      f'{row["plain_seconds"]} s; largest difference {row["relative_difference"]:.1e}'
    )
  for recipe in HEADS:
    row = found[recipe]
    print(
      f'{recipe}: an epoch of {asked.images:,} images in {row["seconds"]} s, '
      f'{row["images_per_second"]:,} images/s, {row["gigabytes_per_second"]} GB/s; '
      f'reading alone {row["reading_gigabytes_per_second"]} GB/s'
    )
  timing.write_report(asked.json, found)


if __name__ == '__main__':
  main()
