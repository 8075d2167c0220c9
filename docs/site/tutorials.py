"""Runs the tutorials: python docs/site/tutorials.py [--figures] [NAME ...].

The blocks of a page, ```bash and ```python, run one after the other in one empty
folder; ```python title="FILE" is appended to that file instead. A page has a line
`<!-- figure: PATH as NAME.svg -->`. With --figures, its file PATH becomes
docs/tutorials/figures/NAME.svg; otherwise the one there stays. `make docs` runs all
pages before it builds the site, so that a page that no longer runs has no site. All
pages share one cache of compiled programs.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

PAGES = pathlib.Path(__file__).parents[1] / 'tutorials'
BLOCK = re.compile(r'^```(bash|python)(?: title="(\S+)")?\n(.*?)^```$', re.M | re.S)
FIGURE = re.compile(r'^<!-- figure: (\S+) as (\S+) -->$', re.M)


def run(page: pathlib.Path, cache: str, keep: bool) -> None:
  """Runs a page; keeps its figures if wanted."""
  text, began = page.read_text(), time.monotonic()
  first = os.fspath(pathlib.Path(sys.executable).parent)
  environment = {
    **os.environ,
    'PATH': f'{first}{os.pathsep}{os.environ["PATH"]}',
    'JAX_COMPILATION_CACHE_DIR': cache,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  starts = {
    'bash': ['bash', '-euo', 'pipefail', '-c'],
    'python': [sys.executable, '-c'],
  }
  with tempfile.TemporaryDirectory() as folder:
    for language, file, code in BLOCK.findall(text):
      if file:
        with open(pathlib.Path(folder, file), 'a') as stream:
          stream.write(code)
        continue
      done = subprocess.run(
        [*starts[language], code],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      if done.returncode:
        sys.exit(f'{page.name}: this block failed\n\n{code}\n{done.stdout}')
    figures = FIGURE.findall(text)
    for path, name in figures:
      drawn, kept = pathlib.Path(folder, path), PAGES / 'figures' / name
      if keep:
        shutil.copy(drawn, kept)
      if not drawn.is_file() or not kept.is_file():
        sys.exit(f'{page.name}: no figure {path}, or no {kept}: give --figures')
  if not figures:
    sys.exit(f'{page.name}: a tutorial ends with a figure')
  print(f'{page.name}: {time.monotonic() - began:.0f} s')


if __name__ == '__main__':
  given = sys.argv[1:]
  named = [PAGES / f'{name}.md' for name in given if name != '--figures']
  with tempfile.TemporaryDirectory() as shared:
    for tutorial in named or sorted(PAGES.glob('*.md')):
      run(tutorial, shared, keep='--figures' in given)
