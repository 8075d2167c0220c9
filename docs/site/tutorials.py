"""Runs the tutorials, or those named: python docs/site/tutorials.py [NAME ...].

The blocks of a page, ```bash and ```python, run one after the other in one empty
folder; ```python title="FILE" is appended to that file instead. What its line
`<!-- figure: PATH as NAME.svg -->` names is kept as
docs/tutorials/figures/NAME.svg. `make docs` does this first, so that a page that no
longer runs has no site. All pages share one cache of compiled programs.
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


def run(page: pathlib.Path, cache: str) -> None:
  """Runs a page and keeps its figures."""
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
      (PAGES / 'figures').mkdir(exist_ok=True)
      shutil.copy(pathlib.Path(folder, path), PAGES / 'figures' / name)
  if not figures:
    sys.exit(f'{page.name}: a tutorial ends with a figure')
  print(f'{page.name}: {time.monotonic() - began:.0f} s')


if __name__ == '__main__':
  named = [PAGES / f'{name}.md' for name in sys.argv[1:]]
  with tempfile.TemporaryDirectory() as shared:
    for tutorial in named or sorted(PAGES.glob('*.md')):
      run(tutorial, shared)
