"""Closed forms of zero-shot learning compared with plain NumPy, and an epoch of a loss.

  python benchmarks/zero_shot.py [--out=FILE] [--images=23527] [--features=2048]

Uses random features with the size of AwA2's (23,527 x 2,048, and 85 attributes of 40
seen classes). A closed form is timed with its whole grid, as a run searches it, and
compared with the plain formula, which does one solve per set of hyper-parameters. Both
run in this process, alternating; the best of `--rounds` counts. An epoch of `ale` is
the compiled step on features in device memory, reported in images and gigabytes of
features per second.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

from lt_jax.data.attributes import unit_rows
from lt_jax.losses import make_loss
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


def epoch(seen: Seen, rounds: int) -> dict[str, float]:
  """Times an epoch of `ale` by gradient descent; batches are sliced on the device."""
  loss = make_loss('ale', np.ones(CLASSES), margin=1.0)
  x, y = jnp.asarray(seen.x, jnp.float32), jnp.asarray(seen.y, jnp.int32)
  described = jnp.asarray(seen.described, jnp.float32)
  steps = len(x) // BATCH

  def objective(kernel, image, label):
    outputs = {'logits': image @ kernel @ described.T}
    return loss(outputs, {'label': label}).mean()

  @functools.partial(jax.jit, donate_argnums=0)
  def whole(kernel):
    def step(i, kernel):
      image, label = (jax.lax.dynamic_slice_in_dim(v, i * BATCH, BATCH) for v in (x, y))
      return kernel - 1e-4 * jax.grad(objective)(kernel, image, label)

    return jax.lax.fori_loop(0, steps, step, kernel)

  kernel = jnp.zeros((x.shape[1], ATTRIBUTES))
  kernel = whole(kernel).block_until_ready()
  times = []
  for _ in range(rounds):
    begun = time.perf_counter()
    kernel = whole(kernel).block_until_ready()
    times.append(time.perf_counter() - begun)
  seconds = min(times)
  return {
    'seconds': round(seconds, 3),
    'images_per_second': round(steps * BATCH / seconds),
    'gigabytes_per_second': round(x.nbytes / seconds / 1e9, 2),
  }


def main() -> None:
  """Prints a table, and writes it as JSON to `--out`."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', default='')
  parser.add_argument('--images', type=int, default=23527)
  parser.add_argument('--features', type=int, default=2048)
  parser.add_argument('--rounds', type=int, default=3)
  asked = parser.parse_args()
  seen = drawn(asked.images, asked.features)
  found = {
    'images': asked.images,
    'features': asked.features,
    'jax': jax.__version__,
    'device': jax.devices()[0].device_kind,
    'eszsl': closed(seen, 'eszsl', plain_eszsl, asked.rounds),
    'sae': closed(seen, 'sae', plain_sae, asked.rounds),
    'ale': epoch(seen, asked.rounds),
  }
  for name in ('eszsl', 'sae'):
    row = found[name]
    print(
      f'{name}: a grid of {row["sets"]} in {row["ours_seconds"]} s, plain NumPy '
      f'{row["plain_seconds"]} s; largest difference {row["relative_difference"]:.1e}'
    )
  ale = found['ale']
  print(
    f'ale: an epoch of {asked.images:,} images in {ale["seconds"]} s, '
    f'{ale["images_per_second"]:,} images/s, {ale["gigabytes_per_second"]} GB/s'
  )
  if asked.out:
    with open(asked.out, 'w') as file:
      json.dump(found, file, indent=1)


if __name__ == '__main__':
  main()
