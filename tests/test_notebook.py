"""Training and prediction from Python."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

import lt_jax
from configs import digits_lt
from lt_jax.errors import UserError
from tests import tiny


@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
  """(run, its images, its result): trained by a thread, as some notebooks do."""
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
  stored = np.load(workdir / 'predictions.npz')
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
