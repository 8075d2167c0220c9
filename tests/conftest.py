"""Shared by all tests: eight devices, strict broadcasting, a cache, real data."""

import os
import pathlib
import sys
import tempfile
from importlib import metadata

# All test processes share one folder; the first one creates and removes it.
if 'LT_JAX_TEST_CACHE' not in os.environ:
  CACHE = tempfile.TemporaryDirectory(prefix='lt_jax_compiled_')
  os.environ['LT_JAX_TEST_CACHE'] = CACHE.name

# Without bytecode, every process spends seconds on compiling what it imports. Where
# Python may not write it beside the sources, the processes share it in that folder.
if sys.dont_write_bytecode:
  os.environ.pop('PYTHONDONTWRITEBYTECODE', None)
  sys.pycache_prefix = os.path.join(os.environ['LT_JAX_TEST_CACHE'], 'bytecode')
  os.environ['PYTHONPYCACHEPREFIX'] = sys.pycache_prefix
  sys.dont_write_bytecode = False

# Threads of linear algebra would wait for each other, burning the time of the cores.
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')

# Most of a test's time is compilation, most of which is LLVM optimisation. Much of the
# rest are the newer fusion emitters, which jaxlib 0.10 can do without.
os.environ['XLA_FLAGS'] = (
  f'{os.environ.get("XLA_FLAGS", "")} --xla_backend_optimization_level=0'
)
if metadata.version('jaxlib').startswith('0.10.'):
  os.environ['XLA_FLAGS'] += (
    ' --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
  )

import jax
import numpy as np
import pytest

from lt_jax.data import dataset, generated, sources

jax.config.update('jax_compilation_cache_dir', os.environ['LT_JAX_TEST_CACHE'])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


LONG = (
  'test_processes',
  'test_faults',
  'test_imagenet_lt',
  'test_compound',
  'test_run',
  'test_methods',
  'test_hidden_labels',
  'test_adaptation',
  'test_damage',
  'test_meta',
  'test_sweep',
  'test_reading',
  'test_doctor',
  'test_domains',
)
"""The slowest files: started first, they leave no process idle at the end."""


def pytest_xdist_auto_num_workers() -> int:
  """Uses two processes per core, since many tests wait for child processes.

  Each takes up to 4 GB.
  """
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 0
  cores = cores or os.cpu_count() or 1
  return max(1, min(2 * cores, memory // 5_000_000_000))


def pytest_collection_modifyitems(items):
  """Puts the files of `LONG` first; pytest-xdist hands them out in that order."""
  place = {name: number for number, name in enumerate(LONG)}
  items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture(scope='session')
def cifar10_npz(tmp_path_factory) -> pathlib.Path:
  """The real CIFAR-10 pool as a plain .npz, from the folder LT_JAX_DATA names."""
  folder = os.environ.get('LT_JAX_DATA')
  if not folder:
    pytest.skip('LT_JAX_DATA names no folder with cifar10.npz')
  path = pathlib.Path(folder) / 'cifar10.npz'
  if not path.exists():
    pytest.skip(f'{path} is absent')
  return path


@pytest.fixture
def rng() -> np.random.Generator:
  """A random generator with the same seed in every run."""
  return np.random.default_rng(0)


@pytest.fixture(scope='module')
def one_device():
  """Runs of a module on one device, because programs for eight compile slowly."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'device_count', lambda: 1)
    yield


@pytest.fixture
def no_data(monkeypatch):
  """TFDS sets with the right number of classes and images that take no memory."""
  real = sources.load_source

  def fake(spec, data_dir=None):
    if not spec.startswith(('tfds:', 'list:', 'npz:usps', 'npz:mnistm')):
      return real(spec, data_dir)
    classes = {
      'tfds:cifar100': 100,
      'tfds:imagenet_lt': 1000,
      'tfds:imagenet2012': 1000,
      'list:Places_LT': 365,
      'tfds:i_naturalist2017': 5089,
      'tfds:i_naturalist2018': 8142,
    }.get(spec, 10)

    def split(label):
      names = tuple(str(c) for c in range(classes))
      if classes > 100:  # photographs, all of them
        return generated.Photographs(label, names)
      image = np.broadcast_to(np.zeros(1, np.uint8), (len(label), 32, 32, 3))
      return sources.Arrays(image, label, names)

    test = split(np.arange(max(10000, 20 * classes), dtype=np.int32) % classes)
    if classes <= 100:
      return {'train': split(np.arange(50000, dtype=np.int32) % classes), 'test': test}
    counts = np.where(np.arange(classes) < classes // 2, 150, 15)
    train = np.repeat(np.arange(classes, dtype=np.int32), counts)
    return {'train': split(train), 'val': test, 'test': test}

  monkeypatch.setattr(dataset, 'load_source', fake)
  monkeypatch.setattr(dataset, 'fingerprint', lambda source, rows: 'none')
  monkeypatch.setattr(dataset, '_resident', lambda source, to_device: {})
  # All images are the same here, those of source and target, too.
  monkeypatch.setattr('lt_jax.build.domains.shared', lambda split, others: 0)
