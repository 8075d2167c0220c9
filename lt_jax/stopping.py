"""How a run ends early: on request, or because a peer is stuck.

In a run of several processes all must stop at one step, since each waits for the others
in every all-reduce. So they agree, at the steps at which they wait for the devices
anyway; and where one waits in vain, it ends itself.
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lt_jax.errors import TRY_AGAIN

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

STUCK_AFTER = 1800.0
"""Seconds without a step after which one of several processes ends itself."""


class StopRequest:
  """Whether this process is asked to stop: by SIGTERM, SIGUSR1 or a closed terminal.

  The terminal sends SIGHUP, which `nohup` has us ignore.

  Attributes:
    last_look: when that was last looked at, which is at every step and every batch of
      an evaluation: a sign of life.
  """

  def __init__(self):
    self._asked = False
    self.last_look = time.monotonic()

  def __enter__(self) -> 'StopRequest':
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    heard = [s for s in STOP_SIGNALS if not (nohup and s == signal.SIGHUP)]
    if threading.current_thread() is not threading.main_thread():
      heard = []  # Python lets only the main thread handle signals
    self._before = {s: signal.signal(s, self._ask) for s in heard}
    return self

  def __exit__(self, *exception: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _ask(self, number: int, frame: Any) -> None:
    self._asked = True

  def __call__(self) -> bool:
    """Returns whether it was asked."""
    self.last_look = time.monotonic()
    return self._asked

  def alone(self) -> bool:
    """Returns whether it was asked and may stop without the consent of others."""
    return self() and jax.process_count() == 1


def any_process(flag: bool) -> bool:
  """Returns whether it is true in any process; all must ask."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


def agreed(value: Any) -> Any:
  """Returns what process 0 has of a value that JSON can hold; all must ask.

  Files are read so: another host may for a while see an older one, or none.
  """
  if jax.process_count() == 1:
    return value
  ours = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(ours))))
  padded = np.zeros(-(-size // 1024) * 1024, np.uint8)  # of few sizes: each compiles
  padded[: min(size, len(ours))] = ours[:size]
  return json.loads(multihost_utils.broadcast_one_to_all(padded)[:size].tobytes())


def of_any_process(numbers: Sequence[int]) -> list[int]:
  """Returns the numbers that any process has, of each 64 at most; all must ask."""
  if jax.process_count() == 1:
    return list(numbers)
  ours = np.full(64, -1, np.int32)  # where there is none
  ours[: len(numbers)] = numbers[:64]
  found = np.unique(multihost_utils.process_allgather(ours))
  return [int(number) for number in found if number >= 0]


def wait_for_all(what: str) -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def watched(last_look: Callable[[], float]) -> Iterator[None]:
  """Ends this process, one of several, where nothing moves for `STUCK_AFTER` seconds.

  A peer that hangs, but lives, is not noticed otherwise: the others wait for it in an
  all-reduce for ever. The stacks of all threads go to standard error first.

  Args:
    last_look: when there was a last sign of life, by `time.monotonic`.
  """
  if jax.process_count() == 1:
    yield
    return
  done = threading.Event()

  def watch() -> None:
    while not done.wait(STUCK_AFTER / 10):
      if time.monotonic() - last_look() > STUCK_AFTER:
        faulthandler.dump_traceback(all_threads=True)
        print(
          f'error: process {jax.process_index()} made no step for {STUCK_AFTER:g} s: '
          'another one is stuck; what was saved is whole',
          file=sys.stderr,
          flush=True,
        )
        os._exit(TRY_AGAIN)

  threading.Thread(target=watch, daemon=True, name='watchdog').start()
  try:
    yield
  finally:
    done.set()
