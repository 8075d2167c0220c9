"""Times our linear support vector machine and scikit-learn's on the same objective.

  python -m benchmarks.probe --json=benchmarks/results/probe.json

One problem of --images images with --features features and --classes classes. Both
sides run in one process and take turns. Reports the seconds of one fit and of the whole
path of costs, and the objectives, which must agree to --within.
"""

import argparse
import json
import pathlib
import time

import numpy as np

from lt_jax.results import versions
from lt_jax.surgeries import classifiers


def problem(images, features, classes):
  """Returns features (N, D) float32 of overlapping classes, and labels (N,)."""
  rng = np.random.default_rng(0)
  labels = np.arange(images) % classes
  centres = rng.normal(size=(classes, features))
  x = rng.normal(size=(images, features)) + 0.2 * centres[labels]
  return x.astype(np.float32), labels


def objective(found, x, labels, classes, cost):
  """Returns liblinear's objective, summed over classes, in float64."""
  sign = np.where(labels[:, None] == np.arange(classes), 1.0, -1.0)
  kernel, bias = (np.float64(part) for part in found)
  losses = np.maximum(1 - sign * (x @ kernel + bias), 0) ** 2
  return ((kernel**2).sum() + (bias**2).sum()) / 2 + cost * losses.sum()


def ours(x, labels, classes, costs, tolerance):
  begun = time.perf_counter()
  found = classifiers.svm(x, labels, classes, costs, tolerance=tolerance)
  return time.perf_counter() - begun, found


def theirs(x, labels, cost):
  from sklearn.svm import LinearSVC

  begun = time.perf_counter()
  machine = LinearSVC(C=cost, dual=False, tol=1e-4).fit(x, labels)
  seconds = time.perf_counter() - begun
  return seconds, classifiers.Linear(machine.coef_.T, machine.intercept_)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--images', type=int, default=5000)
  parser.add_argument('--features', type=int, default=2048)
  parser.add_argument('--classes', type=int, default=101)
  parser.add_argument('--cost', type=float, default=0.01)
  parser.add_argument('--rounds', type=int, default=2)
  parser.add_argument('--within', type=float, default=1e-6)
  parser.add_argument('--json', type=pathlib.Path, default=None)
  given = parser.parse_args()
  x, labels = problem(given.images, given.features, given.classes)
  rows = {'ours': [], 'path': [], 'sklearn': []}
  for _ in range(given.rounds + 1):  # the first round compiles
    seconds, (own,) = ours(x, labels, given.classes, (given.cost,), 1e-5)
    rows['ours'].append(seconds)
    rows['path'].append(ours(x, labels, given.classes, classifiers.COSTS, 1e-4)[0])
    seconds, other = theirs(x, labels, given.cost)
    rows['sklearn'].append(seconds)
  values = [
    objective(found, x, labels, given.classes, given.cost) for found in (own, other)
  ]
  apart = (values[0] - values[1]) / values[1]
  report = {
    'problem': [given.images, given.features, given.classes, given.cost],
    'seconds': {name: [round(s, 2) for s in times[1:]] for name, times in rows.items()},
    'first': {name: round(times[0], 2) for name, times in rows.items()},
    'objective': values,
    'ours_above_theirs': apart,
    'versions': versions(),
  }
  print(json.dumps(report, indent=1))
  if given.json:
    given.json.write_text(json.dumps(report, indent=1) + '\n')
  if apart > given.within:
    raise SystemExit(f'our objective is {apart:.1e} above theirs')


if __name__ == '__main__':
  main()
