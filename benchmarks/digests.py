"""Prints `state_sha256` of every recipe, here and in another checkout.

  python -m benchmarks.digests [--config=FILE.py] [--epochs=10] [--beside=CHECKOUT]

A change that should not change what is trained leaves every digest as it was. Recipes
are trained for a few epochs with one seed, in turn, each in a fresh folder. With
--beside the other checkout does the same in a process of its own, and each row shows
both digests and whether they are equal; the exit code is 1 if any differs.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]

TRAIN = """
import importlib.util, json, sys, tempfile
from lt_jax import run
from lt_jax.recipes import RECIPES
try:
  from lt_jax.config import resolve
except ImportError:  # a checkout from before lt_jax/config.py
  from lt_jax.build import resolve
spec = importlib.util.spec_from_file_location('config', sys.argv[1])
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)
found = {}
recipes = json.loads(sys.argv[3]) or [
  name for name, made in RECIPES.items() if 'target' not in getattr(made, 'needs', ())
]
for recipe in recipes:
  config = resolve(made.get_config(f'{recipe},epochs={sys.argv[2]}'))
  with tempfile.TemporaryDirectory() as folder:
    found[recipe] = run.run(config, folder)['state_sha256']
with open(sys.argv[4], 'w') as file:
  json.dump(found, file)
"""
"""What each checkout runs, in its own root."""


def digests(checkout, config, epochs, recipes):
  """Returns recipe -> state_sha256, as a checkout trains them."""
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder, 'digests.json')
    command = [sys.executable, '-c', TRAIN, config, str(epochs), json.dumps(recipes)]
    subprocess.run(
      [*command, str(out)],
      cwd=checkout,
      env=os.environ | {'PYTHONPATH': str(checkout)},
      stdout=subprocess.DEVNULL,
      check=True,
    )
    return json.loads(out.read_text())


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--config', default='configs/digits_lt.py')
  parser.add_argument('--epochs', type=float, default=10.0)
  parser.add_argument('--recipes', default='', help='comma-separated; all by default')
  parser.add_argument('--beside', type=pathlib.Path)
  options = parser.parse_args()
  recipes = list(filter(None, options.recipes.split(',')))
  given = options.config, options.epochs, recipes
  ours = digests(ROOT, *given)
  theirs = digests(options.beside.resolve(), *given) if options.beside else {}
  width = max(map(len, ours))
  for recipe, digest in ours.items():
    other = theirs.get(recipe, '')
    verdict = ('equal' if other == digest else 'DIFFERENT') if options.beside else ''
    print(f'{recipe:{width}}  {other[:16]:16}  {digest[:16]}  {verdict}'.rstrip())
  sys.exit(bool(theirs) and theirs != ours)


if __name__ == '__main__':
  main()
