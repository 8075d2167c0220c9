"""How a run ends early: on request, or because a peer is stuck.

The processes of a run must all stop at the same step, since each waits for the others
in every all-reduce. So they agree when to stop, at steps where they wait for the
devices anyway. A process that waits for the others in vain ends itself.
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
  """Whether this process was asked to stop: by SIGTERM, SIGUSR1 or a closed terminal.

  A closed terminal sends SIGHUP, which is ignored under `nohup`.

  Attributes:
    last_look: when this was last checked. That happens at every step and at every batch
      of an evaluation, so it is a sign of life.
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
    """Returns whether it was asked to stop."""
    self.last_look = time.monotonic()
    return self._asked

  def alone(self) -> bool:
    """Returns whether it was asked to stop and has no other process to agree with."""
    return self() and jax.process_count() == 1


def any_process(flag: bool) -> bool:
  """Returns whether a flag is true in any process; all processes must call this."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


def agreed(value: Any) -> Any:
  """Returns process 0's value, which must fit in JSON; all processes must call this.

  Used for what is read from files: another host may for a while see an older file, or
  none.
  """
  if jax.process_count() == 1:
    return value
  ours = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(ours))))
  padded = np.zeros(-(-size // 1024) * 1024, np.uint8)  # few sizes, as each compiles
  padded[: min(size, len(ours))] = ours[:size]
  return json.loads(multihost_utils.broadcast_one_to_all(padded)[:size].tobytes())


def of_any_process(numbers: Sequence[int]) -> list[int]:
  """Returns the numbers that any process has, at most 64 each; all must call this."""
  if jax.process_count() == 1:
    return list(numbers)
  ours = np.full(64, -1, np.int32)  # -1: no number
  ours[: len(numbers)] = numbers[:64]
  found = np.unique(multihost_utils.process_allgather(ours))
  return [int(number) for number in found if number >= 0]


def wait_for_all(what: str) -> None:
  """Waits until every process has reached this point."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def watched(last_look: Callable[[], float]) -> Iterator[None]:
  """Ends this process, one of several, after `STUCK_AFTER` seconds without progress.

  Otherwise nobody would notice a peer that hangs but lives: the others would wait for
  it in an all-reduce forever. Dumps the stacks of all threads to standard error first.

  Args:
    last_look: returns the time of the last sign of life, by `time.monotonic`.
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
          'another one is stuck; saved files are intact',
          file=sys.stderr,
          flush=True,
        )
        os._exit(TRY_AGAIN)

  threading.Thread(target=watch, daemon=True, name='watchdog').start()
  try:
    yield
  finally:
    done.set()
