"""What every test shares: eight simulated devices, strict broadcasting, real data."""

import os
import pathlib

import jax
import numpy as np
import pytest

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


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
  """Random numbers, the same in every run of a test."""
  return np.random.default_rng(0)
