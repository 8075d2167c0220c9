"""Training and prediction from Python."""

import ast
import asyncio
import json
import pathlib
import subprocess
import sys
import threading

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

import lt_jax
from configs import digits_lt
from lt_jax.errors import UserError
from lt_jax.files import read_npz
from tests import tiny


@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
  """Returns (run, its images, its result), trained in a thread as some notebooks do."""
  folder = tmp_path_factory.mktemp('notebook')
  path = tiny.write_npz(folder / 'images.npz')
  config = tiny.unresolved(path, 'ce')
  found = []
  overrides = {'epochs': 4.0, 'optimizer.name': 'adam', 'eval_batch': 6}
  job = threading.Thread(
    target=lambda: found.append(lt_jax.fit(config, folder / 'run', overrides))
  )
  job.start()
  job.join()
  assert config.epochs != 4 and config.optimizer.name == 'sgd', 'it was changed'
  with np.load(path) as arrays:
    return folder / 'run', arrays['x_test'], found[0]


def test_predictions_agree_with_the_metrics_of_the_run(fitted, tmp_path):
  workdir, images, result = fitted
  network = lt_jax.load(workdir)
  found = network.predict(images)
  stored = read_npz(workdir / 'predictions.npz')
  np.testing.assert_array_equal(found.classes, stored['prediction'])
  np.testing.assert_allclose(
    found.probabilities.max(1), stored['confidence'], rtol=1e-5
  )
  assert found.names == [network.class_names[c] for c in found.classes]
  assert (found.classes == stored['label']).mean() == pytest.approx(
    result['test']['accuracy']
  )
  assert found.is_unknown is None and len(found.features) == len(images)
  for place, image in enumerate(images[:2]):
    Image.fromarray(image[..., 0]).save(tmp_path / f'{place}.png')
  from_files = network.predict([str(tmp_path / '0.png'), str(tmp_path / '1.png')])
  np.testing.assert_array_equal(from_files.classes, found.classes[:2])
  assert network.predict(str(tmp_path)).names == from_files.names


def test_mistakes_are_one_line(fitted, tmp_path):
  workdir, images, _ = fitted
  with pytest.raises(UserError, match=r'float64 of shape .* takes uint8'):
    lt_jax.load(workdir).predict(images / 255)
  with pytest.raises(UserError, match='no images are given'):
    lt_jax.load(workdir).predict([])
  with pytest.raises(UserError, match='optimiser|optimizer'):
    lt_jax.fit(digits_lt.get_config('ce'), tmp_path, {'optimiser.name': 'adam'})
  with pytest.raises(UserError, match='digits_lt'):
    lt_jax.fit('digits_tl:ce', tmp_path)
  with pytest.raises(AttributeError, match="no attribute 'train_it'"):
    _ = lt_jax.train_it


def test_importing_the_package_imports_nothing_heavy():
  code = "import sys, lt_jax; print({'jax', 'flax', 'matplotlib'} & set(sys.modules))"
  found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert found.stdout == 'set()\n', found.stderr


QUICKSTART = pathlib.Path(__file__).parents[1] / 'docs' / 'quickstart.ipynb'

SHORT = """
METHODS, EPOCHS = ['ldam_drw'], 2
CHANGES = {'model.trunk': 'tiny_cnn', 'evaluate_every_epochs': 2.0}
"""


def run_cell(source, names):
  """Runs a cell; returns the value of its last line, which a notebook shows."""
  tree = ast.parse(source)
  if isinstance(tree.body[-1], ast.Expr):
    shown = ast.Assign([ast.Name('_', ast.Store())], tree.body[-1].value)
    tree.body[-1] = ast.fix_missing_locations(ast.copy_location(shown, tree.body[-1]))
  exec(compile(tree, str(QUICKSTART), 'exec'), names)
  return names.get('_')


def test_the_quickstart_runs_from_top_to_bottom(tmp_path, monkeypatch, one_device):
  notebook = json.loads(QUICKSTART.read_text())
  cells = {c['id']: c for c in notebook['cells'] if c['cell_type'] == 'code'}
  assert not any(cell['outputs'] for cell in cells.values())
  sources = {name: ''.join(cell['source']) for name, cell in cells.items()}
  assert '%pip' in sources.pop('install')
  sources['parameters'] = SHORT
  monkeypatch.chdir(tmp_path)
  names = {}

  async def kernel():  # cells run inside an event loop, as in Jupyter
    return {name: run_cell(source, names) for name, source in sources.items()}

  shown = asyncio.run(kernel())
  drawn = [axis.get_title() for axis in names['axes'].flat]
  plt.close('all')
  assert set(drawn) <= {'unknown', *map(str, range(8))} and len(drawn) == 16
  assert names['result']['recipe'] == 'ldam_drw'
  frame = shown['report']._repr_html_()
  assert frame.startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;') and 'svg' in frame
  assert shown['report'].path == tmp_path / 'runs' / 'report.html'
