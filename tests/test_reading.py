"""Reading ahead: the same payloads, from threads and processes, and their failures."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from lt_jax.data import reading
from lt_jax.data.streams import Stream
from lt_jax.errors import UserError


def payload(step):
  return {'x': np.full((2, 300), step, np.int32)}  # large enough for shared memory


def stream(workers, make=payload, every=1):
  return Stream({}, make, lambda arrays, payload, key: payload, every, workers)


def values(workers, first, last, **options):
  """Returns step -> value read."""
  one = stream(workers, **options)
  with reading.reading({'train': one}, first, last) as read:
    steps = [step for step in range(first, last) if step % one.every == 0]
    return {step: int(read('train', step)['x'][0, 0]) for step in steps}


@pytest.mark.parametrize('workers', [None, 0, pytest.param(2, marks=pytest.mark.slow)])
def test_payloads_are_those_of_their_steps(workers):
  assert values(workers, 3, 12) == {step: step for step in range(3, 12)}


@pytest.mark.parametrize('workers', [None, 0])
def test_a_stream_that_is_not_always_there(workers):
  assert values(workers, 5, 21, every=4) == {8: 8, 12: 12, 16: 16, 20: 20}


@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_nothing_is_read_beyond_the_last_step(workers):
  assert values(workers, 0, 1) == {0: 0}
  with reading.reading({'train': stream(workers)}, 7, 7):
    assert not multiprocessing.active_children()


def test_steps_out_of_order_are_a_mistake():
  with reading.reading({'train': stream(0)}, 0, 4) as read:
    read('train', 0)
    with pytest.raises(AssertionError, match='step 2 was asked for, 1 is next'):
      read('train', 2)


@pytest.mark.slow
def test_processes_end_with_the_context():
  with reading.reading({'train': stream(2)}, 0, 100) as read:
    read('train', 0)
    assert len(multiprocessing.active_children()) == 2
  assert not multiprocessing.active_children()


@pytest.mark.parametrize('workers', [0, 1])
def test_errors_in_a_worker_are_raised_here(workers):
  def broken(step):
    if step == 2:
      raise UserError('cat.jpg: the file is empty')
    return payload(step)

  with (
    pytest.raises(UserError, match=r'cat\.jpg: the file is empty'),
    reading.reading({'train': stream(workers, broken)}, 0, 100) as read,
  ):
    for step in range(3):
      read('train', step)
  assert not multiprocessing.active_children()


def test_a_killed_worker_is_reported():
  with (
    pytest.raises(reading.WorkersFailed, match='a data worker was killed'),
    reading.reading({'train': stream(1)}, 0, 1000) as read,
  ):
    read('train', 0)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    for step in range(1, 1000):
      read('train', step)
  assert not multiprocessing.active_children()


@pytest.mark.slow
def test_an_error_that_cannot_be_sent_is_still_reported():
  class Held(Exception):
    def __init__(self, what):
      super().__init__(what)
      self.lock = threading.Lock()

  def broken(step):
    raise Held('no room')

  with (
    pytest.raises(RuntimeError, match='Held: no room'),
    reading.reading({'train': stream(1, broken)}, 0, 4) as read,
  ):
    read('train', 0)


@pytest.mark.skipif(not os.path.isdir('/dev/shm'), reason='no /dev/shm')
def test_workers_keep_no_more_in_shared_memory_than_is_said():
  size = 2**22 + 7 * 4096  # not shared with anyone, in whole pages

  def large(step):
    return {'x': np.full((1, size), step % 128, np.uint8)}

  streams, most = {'train': stream(2, large)}, 0
  with reading.reading(streams, 0, 60) as read:
    for step in range(12):
      read('train', step)
      time.sleep(0.1)
      held = 0
      for file in os.scandir('/dev/shm'):
        with contextlib.suppress(FileNotFoundError):  # it is gone by now
          held += file.stat().st_size == size
      most = max(most, held * size)
  assert 0 < most <= reading.shared_memory(streams.values())


def test_a_worker_without_shared_memory_says_so():
  def full(step):
    os.kill(os.getpid(), signal.SIGBUS)

  with (
    pytest.raises(reading.WorkersFailed, match='enlarge /dev/shm'),
    reading.reading({'train': stream(1, full)}, 0, 4) as read,
  ):
    read('train', 0)


def test_a_reader_that_does_not_close_is_left_and_its_processes_killed(monkeypatch):
  monkeypatch.setattr(reading, 'CLOSING_TAKES', 0.2)
  monkeypatch.setattr(reading, 'LOOKING_EVERY', 0.2)
  let_go = threading.Event()
  with reading.reading({'train': stream(1)}, 0, 1000) as others:
    others('train', 0)
    (other,) = multiprocessing.active_children()
    ahead = reading._Ahead(payload, range(1000), 1, look=lambda: None)
    ahead(0)
    (worker,) = set(multiprocessing.active_children()) - {other}
    close = ahead._batches.close
    monkeypatch.setattr(ahead._batches, 'close', lambda: let_go.wait(30))
    ahead.close(time.monotonic() + 0.2)
    worker.join(10)
    assert worker.exitcode == -signal.SIGKILL
    others('train', 1)
    assert other.is_alive()
    let_go.set()
    close()


@pytest.mark.parametrize('workers', [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stalled_worker_is_given_up(workers, monkeypatch):
  def stalled(step):
    if step == 1:
      time.sleep(3)
    return payload(step)

  looks = []
  one = stream(workers, stalled)
  with reading.reading({'train': one}, 0, 4, lambda: looks.append(1)) as read:
    read('train', 0)
    monkeypatch.setattr(reading, 'LOOKING_EVERY', 0.1)
    monkeypatch.setattr(reading, 'STALLED_AFTER', 0.3)
    with pytest.raises(reading.WorkersFailed, match=r'no batch for step 1 in 0\.3 s'):
      read('train', 1)
  assert looks


def test_waiting_for_a_lock_can_be_interrupted(monkeypatch):
  monkeypatch.setattr(reading, 'LOOKING_EVERY', 0.1)
  let_go = threading.Event()

  def stalled(step):
    let_go.wait(30)
    return payload(step)

  def look():
    let_go.set()
    raise InterruptedError('asked to')

  with (
    pytest.raises(InterruptedError, match='asked to'),
    reading.reading({'train': stream(0, stalled)}, 0, 4, look) as read,
  ):
    read('train', 0)
  assert not reading.is_stuck()


HUNG = """
import sys, threading
from lt_jax import commands
from lt_jax.data import reading
from tests.test_reading import payload, stream

def hung(step):
  threading.Event().wait()  # as a read of a file system that is gone

def command():
  with reading.reading({'train': stream(int(sys.argv[1]), hung)}, 0, 4) as read:
    read('train', 0)

if __name__ == '__main__':
  reading.STALLED_AFTER = reading.LOOKING_EVERY = 0.5
  reading.CLOSING_TAKES = 1.0
  commands.exit_code(command)
"""


@pytest.mark.parametrize('workers', ['0', pytest.param('1', marks=pytest.mark.slow)])
def test_a_read_that_never_ends_does_not_keep_the_process(workers, tmp_path):
  done = run_script(tmp_path, HUNG, workers)
  assert done.returncode == 75
  assert done.stderr.count('error:') == 1 and 'stalled' in done.stderr
  assert 'Traceback' not in done.stderr


WHOLE = """
from multiprocessing import resource_tracker
import os, signal
from lt_jax.data import reading
from tests.test_reading import stream

if __name__ == '__main__':
  with reading.reading({'train': stream(1)}, 0, 40) as read:
    read('train', 0)
    os.kill(resource_tracker._resource_tracker._pid, signal.SIGUSR1)
    print(sum(read('train', step)['x'].size for step in range(1, 40)))
"""


def test_a_stream_read_to_its_end_leaves_nothing(tmp_path):
  """No shared memory, even if its tracker was signalled like the rest."""
  done = run_script(tmp_path, WHOLE)
  assert (done.returncode, done.stdout.strip()) == (0, str(39 * 600))
  assert not done.stderr


def run_script(folder, text, *arguments):
  script = folder / 'parent.py'
  script.write_text(text)
  return subprocess.run(
    [sys.executable, script, *arguments],
    env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
    capture_output=True,
    text=True,
    timeout=60,
  )


PARENT = """
import multiprocessing, os, signal, sys, time
from lt_jax.data import reading
from tests.test_reading import stream

if __name__ == '__main__':
  with reading.reading({'train': stream(1)}, 0, 100) as read:
    if sys.argv[1] == 'EARLY':  # while they start, before they ignore anything
      while not multiprocessing.active_children():
        time.sleep(0.01)
      for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
    read('train', 0)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[1] != 'KILL':  # to all, as a scheduler does; only the parent may go
      for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
      print(sum(read('train', step)['x'].size for step in range(1, 50)), flush=True)
    else:
      os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
  'sign',
  ['TERM', *(pytest.param(s, marks=pytest.mark.slow) for s in ('EARLY', 'KILL'))],
)
def test_signals(sign, tmp_path):
  """Workers survive a signal to all processes, but not their parent."""
  done = run_script(tmp_path, PARENT, sign)
  pids, *rest = done.stdout.splitlines()
  if sign != 'KILL':
    assert done.returncode == 0, done.stderr
    assert rest == [str(49 * 600)]
    assert 'leaked' not in done.stderr  # including the batches that were ready
  else:
    assert done.returncode == -signal.SIGKILL
  for _ in range(100):
    alive = [pid for pid in pids.split() if _alive(int(pid))]
    if not alive:
      break
    time.sleep(0.1)
  assert not alive


def _alive(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  with open(f'/proc/{pid}/stat') as file:
    return file.read().split()[2] != 'Z'
