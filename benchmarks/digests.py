"""Prints `state_sha256` of every recipe, here and in another checkout.

  python -m benchmarks.digests [--config=FILE.py] [--epochs=10] [--beside=CHECKOUT]

A change that should not affect training leaves every digest as it was. Each recipe is
trained for a few epochs with one seed, one after the other, each in a fresh folder.
With --beside, the other checkout does the same in its own process. Each row then shows
both digests and whether they are equal; the exit code is 1 if any differs.

A digest includes the paths of arrays, so it changes where `lt_jax/renamed.py` renames
them. In that case the row counts the arrays of all checkpoints in the run's stages, and
how many were renamed. Every array must have the shape, type and bytes that the other
checkout has under the old path, and the other checkout must have no other arrays.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from lt_jax.renamed import old_path

ROOT = pathlib.Path(__file__).parents[1]

TRAIN = """
import hashlib, importlib.util, json, pathlib, sys, tempfile
import numpy as np
import orbax.checkpoint as ocp
from lt_jax import run
from lt_jax.recipes import RECIPES
try:
  from lt_jax.config import resolve
except ImportError:  # a checkout from before lt_jax/config.py
  from lt_jax.build import resolve
spec = importlib.util.spec_from_file_location('config', sys.argv[1])
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)

def arrays(folder):
  found = {}
  with ocp.StandardCheckpointer() as reader:
    for path in sorted(folder.glob('stages/*/checkpoints/**/_CHECKPOINT_METADATA')):
      name = str(path.parent.relative_to(folder / 'stages'))
      found[name] = {}
      for leaf, value in reader.restore(path.parent).items():
        value = np.asarray(value)
        sha256 = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        found[name][leaf] = [list(value.shape), str(value.dtype), sha256]
  return found

found = {}
recipes = json.loads(sys.argv[3]) or [
  name for name, made in RECIPES.items() if 'target' not in getattr(made, 'needs', ())
]
for recipe in recipes:
  config = resolve(made.get_config(f'{recipe},epochs={sys.argv[2]}'))
  with tempfile.TemporaryDirectory() as folder:
    digest = run.run(config, folder)['state_sha256']
    found[recipe] = [digest, arrays(pathlib.Path(folder))]
with open(sys.argv[4], 'w') as file:
  json.dump(found, file)
"""
"""The program that each checkout runs in its own root."""


def digests(checkout, config, epochs, recipes):
  """Trains the recipes in a checkout; returns recipe -> (state_sha256, arrays).

  The arrays are checkpoint -> path -> (shape, type, SHA-256).
  """
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


def compared(ours, theirs):
  """Returns a text that counts the equal arrays of a recipe, '' if some differ.

  Args:
    ours: checkpoint -> path -> (shape, type, SHA-256).
    theirs: the same in the other checkout, possibly with the old paths.
  """
  number = renamed = 0
  if ours.keys() != theirs.keys():
    return ''
  for name, here in ours.items():
    there = theirs[name]
    paths = {path: path if path in there else old_path(path) for path in here}
    if set(paths.values()) != there.keys():
      return ''
    if any(there[paths[path]] != found for path, found in here.items()):
      return ''
    number += len(here)
    renamed += sum(path != before for path, before in paths.items())
  return f'{number} arrays equal, {renamed} renamed'


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
  differs = False
  for recipe, (digest, arrays) in ours.items():
    other, verdict = '', ''
    if options.beside:
      other, others = theirs.get(recipe, ('', {}))
      equal = 'equal' if other == digest else compared(arrays, others)
      differs |= not equal
      verdict = equal or 'DIFFERENT'
    print(f'{recipe:{width}}  {other[:16]:16}  {digest[:16]}  {verdict}'.rstrip())
  sys.exit(differs)


if __name__ == '__main__':
  main()
