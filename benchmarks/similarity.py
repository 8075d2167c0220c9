"""Earth mover's distances at the paper's size: 21 pairs of domains in one run.

  python -m benchmarks.similarity --json=benchmarks/results/similarity.json

Three sources with 1,000, 5,089 and 6,089 classes and seven targets with 100 to 555;
each class is a point of 2,048 features. The features are random, because the paper's
are not published. The authors' demonstration took 2,516 s on square matrices. For
comparison: a direct call of POT on the same distances, and SciPy's linear programme on
pairs of at most 300 by 100 classes. All three must agree.
"""

import json
import time

import numpy as np
from absl import app, flags

from lt_jax.evals import similarity
from lt_jax.evals.similarity import Domain

JSON = flags.DEFINE_string('json', None, 'File for the results.')
SMALL = flags.DEFINE_bool(
  'small', False, 'Use a tenth of the classes, to check that it runs.'
)

SOURCES = (1000, 5089, 6089)
TARGETS = (200, 102, 196, 120, 100, 555, 101)
WIDTH = 2048
LARGEST = (300, 100)


def domain(rng, name, classes):
  means = np.abs(rng.normal(size=(classes, WIDTH))) + rng.normal(size=WIDTH)
  counts = rng.integers(200, 1300, classes)
  return Domain(name, tuple(map(str, range(classes))), means, counts)


def timed(function, *args):
  begin = time.perf_counter()
  found = function(*args)
  return time.perf_counter() - begin, found


def main(_):
  rng = np.random.default_rng(0)
  scale = 10 if SMALL.value else 1
  sources = [domain(rng, f's{n}', n // scale) for n in SOURCES]
  targets = [domain(rng, f't{i}', n // scale) for i, n in enumerate(TARGETS)]
  rows = []
  for source in sources:
    for target in targets:
      sizes = len(source.counts), len(target.counts)
      seconds, found = timed(similarity.similarity, source, target)
      row = {'classes': sizes, 'seconds': seconds, 'emd': found.emd}
      cost = similarity.distances(source, target)
      try:
        import ot
      except ImportError:
        row['pot_seconds'] = None
      else:
        given = source.weights, target.weights, cost
        row['pot_seconds'], value = timed(
          lambda a, b, m: ot.emd2(a, b, m, numItermax=10_000_000), *given
        )
        np.testing.assert_allclose(value, found.emd, rtol=1e-6)
      a, b = (min(n, most) for n, most in zip(sizes, LARGEST, strict=True))
      supply, demand = (
        one.counts[:n] / one.counts[:n].sum() for one, n in ((source, a), (target, b))
      )
      part = supply, demand, np.ascontiguousarray(cost[:a, :b])
      ours, (value, _) = timed(similarity.transport, *part)
      row['part'] = (a, b)
      row['part_seconds'] = ours
      row['part_scipy_seconds'], (other, _) = timed(similarity._linear_programme, *part)
      np.testing.assert_allclose(other, value, rtol=1e-6)
      rows.append(row)
      print(
        f'{sizes[0]:5} x {sizes[1]:3}: {seconds:7.3f} s, POT alone '
        f'{row["pot_seconds"] or float("nan"):7.3f} s; on {a} x {b}: '
        f'{ours:.3f} s, SciPy {row["part_scipy_seconds"]:.3f} s'
      )
  total = sum(row['seconds'] for row in rows)
  print(f'{len(rows)} pairs in {total:.1f} s, with {similarity.solver()}')
  if JSON.value:
    with open(JSON.value, 'w') as file:
      json.dump(
        {'solver': similarity.solver(), 'seconds': total, 'pairs': rows}, file, indent=1
      )


if __name__ == '__main__':
  app.run(main)
