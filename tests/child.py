"""Runs the command line in a process of its own, with a fault injected.

Processes come from a fork server that has imported everything and started nothing, so
that each costs what it does and not the imports.
"""

import contextlib
import multiprocessing
import os
import pathlib
import resource
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence

ROOT = pathlib.Path(__file__).parents[1]
PRELOAD = [
  'lt_jax.build',
  'lt_jax.run',
  'ml_collections.config_flags',
  'sklearn.datasets',
  'tensorboardX',
  'tests.child',
]
CACHE = tempfile.TemporaryDirectory(prefix='lt_jax_compiled_')
"""Where children share what they compiled: a program costs its compilation once."""

FAST = (
  '--config.model.trunk=tiny_cnn',
  '--config.log_every_steps=5',
  '--config.save_every_epochs=5',
  '--config.evaluate_every_epochs=10',
)
"""Of a run of 71 steps: checkpoints every 20, evaluations every 36."""


def command(workdir, *overrides, config='digits_lt.py:ldam_drw,epochs=20', fast=FAST):
  """Returns the arguments of a run that takes a second or two."""
  return [
    f'--config={ROOT}/configs/{config}',
    f'--workdir={workdir}',
    *fast,
    *overrides,
  ]


def run(
  arguments: Sequence[str], output, fault: str = '', module: str = 'lt_jax.main'
) -> int:
  """Runs a command in a child process.

  Args:
    arguments: of the command.
    output: a file that takes what it prints.
    fault: an entry of FAULTS, with its argument after a colon.
    module: the command.

  Returns:
    Its exit code, negative for the signal that killed it.
  """
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(PRELOAD)
  given = (module, arguments, str(output), fault, CACHE.name)
  child = context.Process(target=_main, args=given)
  child.start()
  child.join(timeout=120)
  if child.exitcode is None:
    child.kill()
    raise TimeoutError(f'{module} {" ".join(arguments)} did not end')
  return child.exitcode


def environment() -> dict[str, str]:
  """Returns what a process needs to share compiled programs."""
  return {
    'JAX_COMPILATION_CACHE_DIR': CACHE.name,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }


def _main(
  module: str, arguments: Sequence[str], output: str, fault: str, cache: str
) -> None:
  """In the child: redirects what is printed, injects the fault, runs the command."""
  import importlib

  with open(output, 'w') as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
  import jax

  jax.config.update('jax_compilation_cache_dir', cache)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  os.chdir(ROOT)
  sys.argv = [module, *arguments]
  required = ('config', 'workdir') if module == 'lt_jax.main' else ('workdir',)
  commands = importlib.import_module('lt_jax.commands')
  main = importlib.import_module(module).main
  with _injected(fault):
    commands.launch(main, *required)


def die() -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def terminate(number: int = signal.SIGTERM) -> None:
  os.kill(os.getpid(), number)


@contextlib.contextmanager
def _injected(fault: str) -> Iterator[None]:
  """Replaces a function of the package so that it fails when it should."""
  name, _, argument = fault.partition(':')
  if name:
    FAULTS[name](argument)
  yield


def _before(owner: object, name: str, act: Callable[..., None]) -> None:
  """Makes `owner.name` call `act` with its arguments first."""
  original = getattr(owner, name)

  def replaced(*args, **kwargs):
    act(*args, **kwargs)
    return original(*args, **kwargs)

  setattr(owner, name, replaced)


def _at_step(argument: str, act: Callable[[], None]) -> None:
  """Acts when the loop reaches a step."""
  from lt_jax import run

  step = int(argument)
  _before(run.Screen, 'progress', lambda self, s: act() if s == step else None)


def _at_call(owner: object, name: str, act: Callable[[], None], nth: int) -> None:
  """Acts at the n-th call of a function, counting from 1."""
  calls = []

  def count(*args, **kwargs):
    calls.append(1)
    if len(calls) == nth:
      act()

  _before(owner, name, count)


def _kill_between(argument: str) -> None:
  """Dies after Orbax has finished the n-th save and before its manifest."""
  from lt_jax import checkpoint

  _at_call(checkpoint.Checkpoints, '_write_manifest', die, int(argument))


def _kill_after_save(argument: str) -> None:
  """Dies so many seconds after the first save of the process begins."""
  from lt_jax import checkpoint

  timer = threading.Timer(float(argument), die)
  _at_call(checkpoint.Checkpoints, 'save', timer.start, 1)


def _kill_in_save(argument: str) -> None:
  """Dies inside the n-th save: its files are written, its folder not yet renamed."""
  import orbax.checkpoint as ocp

  handler = ocp.StandardCheckpointHandler
  _at_call(handler, 'finalize', die, int(argument))


def _kill_between_stages(argument: str) -> None:
  """Dies when the second stage is about to begin."""
  from lt_jax import run

  del argument
  _at_call(run.StageRunner, 'run', die, 2)


def _terminate_twice(argument: str) -> None:
  """Asks at a step, and again while the answer is being saved."""
  from lt_jax import checkpoint

  _at_step(argument, lambda: _at_call(checkpoint.Checkpoints, 'save', terminate, 1))
  _at_step(argument, terminate)


def _terminate_in_evaluation(argument: str) -> None:
  from lt_jax.evals import collect

  _at_call(collect.sharding, 'put_batch', terminate, int(argument))


def _kill_in_evaluation(argument: str) -> None:
  from lt_jax.evals import collect

  _at_call(collect.sharding, 'put_batch', die, int(argument))


def _terminate_while_compiling(argument: str) -> None:
  from lt_jax import train

  del argument
  _at_call(train, 'make_update', terminate, 1)


def _limit_file_size(argument: str) -> None:
  resource.setrlimit(resource.RLIMIT_FSIZE, (int(argument), int(argument)))


def _nan_image(argument: str) -> None:
  """Puts NaN into the batch of one step."""
  import jax.numpy as jnp

  from lt_jax import train

  original, bad = train.batches_at, int(argument)

  def poisoned(streams, arrays, payloads, key, step):
    batches = original(streams, arrays, payloads, key, step)
    image = batches['train']['image']
    batches['train']['image'] = jnp.where(step == bad, jnp.nan, image)
    return batches

  train.batches_at = poisoned


def _simulate_devices(argument: str) -> None:
  import jax

  jax.config.update('jax_num_cpu_devices', int(argument))


FAULTS: dict[str, Callable[[str], None]] = {
  'kill_at': lambda step: _at_step(step, die),
  'term_at': lambda step: _at_step(step, terminate),
  'usr1_at': lambda step: _at_step(step, lambda: terminate(signal.SIGUSR1)),
  'kill_between': _kill_between,
  'kill_between_stages': _kill_between_stages,
  'kill_after_save': _kill_after_save,
  'kill_in_save': _kill_in_save,
  'term_twice_at': _terminate_twice,
  'term_in_evaluation': _terminate_in_evaluation,
  'kill_in_evaluation': _kill_in_evaluation,
  'term_while_compiling': _terminate_while_compiling,
  'file_size': _limit_file_size,
  'devices': _simulate_devices,
  'nan_at': _nan_image,
}
