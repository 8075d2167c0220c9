"""Runs the command line in a separate process, with a fault injected.

Processes come from a fork server that has imported everything and started nothing, so
that they don't pay for the imports.
"""

import functools
import multiprocessing
import os
import pathlib
import resource
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

ROOT = pathlib.Path(__file__).parents[1]
PRELOAD = [
  'lt_jax.build',
  'lt_jax.doctor',
  'lt_jax.options',
  'lt_jax.trained',
  'lt_jax.report',
  'lt_jax.run',
  'ml_collections.config_flags',
  'sklearn.datasets',
  'tensorboardX',
  'tests.child',
]
FAST = (
  '--config.model.trunk=tiny_cnn',
  '--config.log_every_steps=5',
  '--config.save_every_epochs=5',
  '--config.evaluate_every_epochs=10',
)
"""A run of 71 steps: checkpoints every 20, evaluations every 36."""


def command(workdir, *overrides, config='digits_lt.py:ldam_drw,epochs=20', fast=FAST):
  """Returns the arguments for a run that takes a second or two."""
  return [
    f'--config={ROOT}/configs/{config}',
    f'--workdir={workdir}',
    *fast,
    *overrides,
  ]


def two_domains(recipe: str) -> dict[str, object]:
  """Returns options of `command` for a run of 19 steps on two domains of digits."""
  fast = (
    '--config.model.trunk=tiny_cnn',
    "--config.alignment.align_on=('features',)",
    '--config.log_every_steps=5',
    '--config.save_every_epochs=0.5',
    '--config.evaluate_every_epochs=1',
  )
  return {'config': f'digits_domains.py:{recipe},epochs=1', 'fast': fast}


def run(
  arguments: Sequence[str], output, fault: str = '', module: str = 'lt_jax.main'
) -> int:
  """Runs a command in a child process.

  Args:
    arguments: arguments of the command.
    output: file for what it prints.
    fault: an entry of FAULTS, with its argument after a colon.
    module: the command.

  Returns:
    Its exit code, negative for the signal that killed it.
  """
  return _join([_start(module, arguments, output, fault)], 120)[0]


def run_together(
  arguments: Sequence[str],
  outputs: Sequence,
  faults: Sequence[str],
  devices: int = 2,
) -> list[int]:
  """Runs a command in several processes that form one run, with simulated devices.

  Args:
    arguments: arguments of the command, the same for all.
    outputs: files for what they print.
    faults: one per process.
    devices: number of devices of each process.

  Returns:
    Their exit codes.
  """
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  children = []
  for index, (output, fault) in enumerate(zip(outputs, faults, strict=True)):
    settings = {
      'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
      'JAX_NUM_PROCESSES': str(len(outputs)),
      'JAX_PROCESS_ID': str(index),
    }
    every = [f'devices:{devices}', 'heartbeat:10', *filter(None, [fault])]
    given = ['--distributed', *arguments]
    children.append(_start('lt_jax.main', given, output, '+'.join(every), settings))
  return _join(children, 120)


def _start(
  module: str,
  arguments: Sequence[str],
  output,
  fault: str,
  environment: Mapping[str, str] | None = None,
) -> multiprocessing.Process:
  """Starts a command in a child."""
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(PRELOAD)
  cache = os.environ['LT_JAX_TEST_CACHE']
  given = (module, arguments, str(output), fault, cache, dict(environment or {}))
  child = context.Process(target=_main, args=given)
  child.start()
  return child


def _join(children: Sequence[multiprocessing.Process], seconds: float) -> list[int]:
  """Returns exit codes; kills processes that did not end and says so."""
  until = time.monotonic() + seconds
  for child in children:
    child.join(timeout=max(0, until - time.monotonic()))
  late = [index for index, child in enumerate(children) if child.exitcode is None]
  for index in late:
    children[index].kill()
  if late:
    raise TimeoutError(f'child {late[0]} of {len(children)} did not end')
  return [child.exitcode for child in children]


def environment() -> dict[str, str]:
  """Returns the environment with which processes share compiled programs."""
  return {
    'JAX_COMPILATION_CACHE_DIR': os.environ['LT_JAX_TEST_CACHE'],
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }


def _main(
  module: str,
  arguments: Sequence[str],
  output: str,
  faults: str,
  cache: str,
  environment: Mapping[str, str],
) -> None:
  """In the child: redirects output, injects faults, runs the command."""
  os.environ.update(environment)

  with open(output, 'w') as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
  import jax

  jax.config.update('jax_compilation_cache_dir', cache)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  os.chdir(ROOT)
  sys.argv = [module, *arguments]
  for fault in filter(None, faults.split('+')):
    name, _, argument = fault.partition(':')
    FAULTS[name](argument)
  runpy.run_module(module, run_name='__main__', alter_sys=True)


def die() -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def terminate(number: int = signal.SIGTERM) -> None:
  os.kill(os.getpid(), number)


def _before(owner: object, name: str, act: Callable[..., None]) -> None:
  """Makes `owner.name` first call `act` with the same arguments."""
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
  """Dies a number of seconds after the process starts its first save."""
  from lt_jax import checkpoint

  timer = threading.Timer(float(argument), die)
  _at_call(checkpoint.Checkpoints, 'save', timer.start, 1)


def _kill_in_save(argument: str) -> None:
  """Dies inside the n-th save: files are written, the folder is not yet renamed."""
  import orbax.checkpoint as ocp

  handler = ocp.StandardCheckpointHandler
  _at_call(handler, 'finalize', die, int(argument))


def _kill_between_stages(argument: str) -> None:
  """Dies just before the second stage starts."""
  from lt_jax import run

  del argument
  _at_call(run.StageRunner, 'run', die, 2)


def _terminate_twice(argument: str) -> None:
  """Sends SIGTERM at a step, and again while the State is being saved."""
  from lt_jax import checkpoint

  _at_step(argument, lambda: _at_call(checkpoint.Checkpoints, 'save', terminate, 1))
  _at_step(argument, terminate)


def _terminate_in_evaluation(argument: str) -> None:
  from lt_jax.evals import collect

  _at_call(collect.sharding, 'put_batch', terminate, int(argument))


def _terminate_in_surgery(argument: str) -> None:
  """Sends SIGTERM when a surgery starts its first pass."""
  from lt_jax.evals import collect

  del argument
  _at_call(collect, 'total', terminate, 1)


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
  """Puts a NaN into the batch of one step."""
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


def _hurry(argument: str) -> None:
  """Notices a dead peer after a few seconds instead of JAX's hundred."""
  import jax

  jax.distributed.initialize = functools.partial(
    jax.distributed.initialize, heartbeat_timeout_seconds=int(argument)
  )


def _give_up_after(argument: str) -> None:
  from lt_jax import stopping

  stopping.STUCK_AFTER = float(argument)


def _mistake() -> None:
  from lt_jax.errors import UserError

  raise UserError('bad.jpg: the file is empty')


def _see_other_data(argument: str) -> None:
  from lt_jax.data import dataset

  original = dataset.fingerprint
  dataset.fingerprint = lambda *args: original(*args)[::-1]
  del argument


def _work_elsewhere(argument: str) -> None:
  """Gives this process its own folder where all should share one."""
  from lt_jax import files

  del argument
  original = files.make_workdir
  files.make_workdir = lambda path: original(f'{os.fspath(path)}.elsewhere')
  files.SEEN_WITHIN = 2.0


def _list_devices_in_turns(argument: str) -> None:
  """Shows the devices of two processes to the mesh in alternating order.

  The torus of a TPU may have such an order; JAX itself lists them process by process.
  """
  import types

  import jax

  from lt_jax import sharding

  del argument

  def devices():
    return sorted(jax.devices(), key=lambda d: (d.id % 2, d.process_index))

  seen = types.SimpleNamespace(**{name: getattr(jax, name) for name in dir(jax)})
  seen.devices = devices
  seen.make_mesh = lambda *args, **more: jax.make_mesh(*args, **more, devices=devices())
  sharding.jax = seen


def _slow_manifest(argument: str) -> None:
  """Writes each manifest a number of seconds after its checkpoint."""
  from lt_jax import checkpoint

  seconds = float(argument)
  _before(checkpoint.Checkpoints, '_write_manifest', lambda *_: time.sleep(seconds))


def _draw_nothing(argument: str) -> None:
  """Leaves the figures out of pages, which take as long as a short run."""
  from lt_jax import report

  del argument
  report.write = functools.partial(report.write, draw=False)


FAULTS: dict[str, Callable[[str], None]] = {
  'undrawn': _draw_nothing,
  'elsewhere': _work_elsewhere,
  'in_turns': _list_devices_in_turns,
  'slow_manifest': _slow_manifest,
  'kill_at': lambda step: _at_step(step, die),
  'term_at': lambda step: _at_step(step, terminate),
  'hup_at': lambda step: _at_step(step, lambda: terminate(signal.SIGHUP)),
  'usr1_at': lambda step: _at_step(step, lambda: terminate(signal.SIGUSR1)),
  'kill_between': _kill_between,
  'kill_between_stages': _kill_between_stages,
  'kill_after_save': _kill_after_save,
  'kill_in_save': _kill_in_save,
  'term_twice_at': _terminate_twice,
  'term_in_evaluation': _terminate_in_evaluation,
  'term_in_surgery': _terminate_in_surgery,
  'kill_in_evaluation': _kill_in_evaluation,
  'term_while_compiling': _terminate_while_compiling,
  'file_size': _limit_file_size,
  'devices': _simulate_devices,
  'path': lambda folder: sys.path.insert(0, folder),
  'nan_at': _nan_image,
  'heartbeat': _hurry,
  'give_up_after': _give_up_after,
  'hang_at': lambda step: _at_step(step, lambda: time.sleep(1000)),
  'other_data': _see_other_data,
  'mistake_at': lambda step: _at_step(step, _mistake),
}
