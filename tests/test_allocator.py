"""The allocator is told to keep pages in commands that gain by it, and nowhere else."""

import subprocess
import sys

import pytest

from configs import cifar10_lt, digits_lt, imagenet_lt
from lt_jax import allocator
from lt_jax.config import resolve
from tests import child

LARGE = resolve(cifar10_lt.get_config())
SMALL = resolve(digits_lt.get_config())


@pytest.fixture
def settings(monkeypatch):
  """What mallopt was told; nothing reaches the allocator of this process."""
  calls = {}

  def mallopt(parameter, value):
    calls[parameter] = value
    return 1

  monkeypatch.setattr(allocator, '_mallopt', lambda: mallopt)
  monkeypatch.setattr(allocator, '_cpu_is_next', lambda: True)
  monkeypatch.delenv('MALLOC_ARENA_MAX', raising=False)
  return calls


def test_the_pixels_of_a_batch_follow_from_the_config():
  assert allocator.pixels(LARGE) == 128 * 32 * 32
  assert allocator.pixels(SMALL) == 64 * 8 * 8
  assert allocator.pixels(imagenet_lt.get_config('ce')) == 128 * 224 * 224


def test_only_large_steps_on_a_cpu_keep_pages(settings, monkeypatch):
  tiny = {**LARGE, 'model': {**LARGE['model'], 'trunk': 'tiny_cnn'}}
  for small in (SMALL, {**LARGE, 'batch': 63}, tiny):
    assert not allocator.keep_pages(small) and not settings
  assert allocator.keep_pages(LARGE) and settings == allocator.SETTINGS
  settings.clear()
  monkeypatch.setattr(allocator, '_cpu_is_next', lambda: False)
  assert not allocator.keep_pages(LARGE) and not settings


def test_an_arena_max_of_the_user_stands(settings, monkeypatch):
  monkeypatch.setenv('MALLOC_ARENA_MAX', '4')
  assert not allocator.keep_pages(LARGE) and not settings


def test_another_platform_is_left_alone(monkeypatch):
  monkeypatch.setattr(sys, 'platform', 'darwin')
  assert allocator._mallopt() is None and not allocator.keep_pages(LARGE)


def test_a_libc_other_than_glibc_is_left_alone(monkeypatch):
  class Musl:
    def mallopt(self, parameter, value):
      raise AssertionError('it was called')

  monkeypatch.setattr(allocator.ctypes, 'CDLL', lambda name: Musl())
  assert allocator._mallopt() is None and not allocator.keep_pages(LARGE)


@pytest.mark.parametrize(
  ('platforms', 'plugin', 'expected'),
  [
    ('cpu', True, True),
    ('cuda,cpu', False, False),
    ('', False, True),
    ('', True, False),
  ],
)
def test_the_backend_is_predicted_before_it_starts(
  platforms, plugin, expected, monkeypatch
):
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  monkeypatch.setattr(
    allocator.importlib.util, 'find_spec', lambda name: 'a spec' if plugin else None
  )
  assert allocator._cpu_is_next() is expected


COMMANDS = """
import sys
from absl import flags
from lt_jax import allocator, main

class Asked(Exception):
  pass

def keep_pages(config):
  assert config['name'] == 'digits_lt'
  if 'jax' in sys.modules:
    from jax._src import xla_bridge
    raise Asked('started' if xla_bridge.backends_are_initialized() else 'imported')
  raise Asked('nothing')

def ask(command):
  try:
    command.main()
  except Asked as asked:
    print(asked)

allocator.keep_pages = keep_pages
flags.FLAGS(sys.argv[:3])
ask(main)
from lt_jax import doctor, sweep
from lt_jax.doctor import __main__ as examine
flags.FLAGS(sys.argv)
ask(sweep)
ask(examine)
"""


def test_commands_that_train_ask_before_jax_starts(tmp_path):
  options = ['--config=configs/digits_lt.py', f'--workdir={tmp_path}/w', '--methods=ce']
  done = subprocess.run(
    [sys.executable, '-c', COMMANDS, *options],
    cwd=child.ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout.split() == ['nothing', 'imported', 'imported'], done.stderr
