"""Prefetching: the host makes batches while the devices work on earlier ones.

Grain makes them in threads of this process or in worker processes. Each Grain element
is one step's payload, so resuming at step s starts at element s.
"""

import contextlib
import gc
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from typing import Any

import jax
import numpy as np

from lt_jax.data.streams import Payload, Stream
from lt_jax.errors import UserError
from lt_jax.footprint import size

STALLED_AFTER = 600.0
"""Seconds without a batch after which the workers count as stalled."""

CLOSING_TAKES = 20.0
"""Seconds after which threads that do not end are abandoned, and processes killed."""

LOOKING_EVERY = 1.0
"""Seconds between checks of whether a batch is still wanted, while waiting for one."""

BATCHES_A_WORKER = 4
"""Batches of each worker in shared memory: one to hand over, one handed over, and two
that Grain has taken. Two more, for all workers together, are being copied and freed."""

_READY = 2  # batches ready in this process
_THREAD = 'reading'  # name of the thread that takes batches from Grain

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that a scheduler sends to every process of a run; only the parent reacts."""

Read = Callable[[str, int], Payload]
"""(name of a stream, step) -> payload; call it for a stream's steps in order."""


class WorkersFailed(OSError):
  """Data workers died or stalled; a rerun can help."""


def is_stuck() -> bool:
  """Returns whether a closed reader still waits for a read to end.

  If threads do the reading, Python would wait for them before the process ends.
  """
  return any(thread.name == _THREAD for thread in threading.enumerate())


def shared_memory(streams: Iterable[Stream]) -> int:
  """Returns about how many bytes of this host's shared memory reading them takes."""
  return (
    sum(
      (BATCHES_A_WORKER * stream.workers + 2) * size(stream.payload_shapes())
      for stream in streams
      if stream.workers
    )
    // jax.process_count()
  )


@contextlib.contextmanager
def reading(
  streams: Mapping[str, Stream],
  first: int,
  last: int,
  look: Callable[[], None] = lambda: None,
) -> Iterator[Read]:
  """Reads the payloads of steps first ... last - 1; reads host streams ahead.

  Args:
    streams: name -> stream.
    first: the first step.
    last: the step after the last one.
    look: called while waiting for a batch; it can raise to stop waiting.

  Yields:
    A function (name, step) -> payload. Call it in order for every step that has the
    stream. It raises errors of workers with their traceback.
  """
  readers: dict[str, Callable[[int], Payload]] = {}
  ahead: list[_Ahead] = []
  try:
    for name, stream in streams.items():
      steps = range(-(-first // stream.every) * stream.every, last, stream.every)
      readers[name] = stream.payload
      if stream.workers is not None and steps:
        readers[name] = _Ahead(stream.payload, steps, stream.workers, look)
        ahead.append(readers[name])
    yield lambda name, step: readers[name](step)
  finally:
    # Time already spent waiting in vain is deducted: a scheduler that asks a process to
    # stop kills it half a minute later.
    waited = max((one.stop() for one in ahead), default=0)
    until = time.monotonic() + max(LOOKING_EVERY, CLOSING_TAKES - waited)
    for one in reversed(ahead):
      one.close(until)


class _Payloads:
  """A source for Grain: element k is the payload of the k-th step."""

  def __init__(self, payload: Callable[[int], Payload], steps: Sequence[int]):
    self._payload = payload
    self._steps = steps

  def __len__(self) -> int:
    return len(self._steps)

  def __getitem__(self, position: int) -> Payload:
    try:
      return self._payload(self._steps[position])
    except (UserError, OSError):
      raise
    except Exception as error:  # errors that cannot be pickled would be lost
      text = f'{type(error).__name__}: {error}'
      raise RuntimeError(text).with_traceback(error.__traceback__) from None


class _Ahead:
  """Payloads of some steps, made ahead.

  A thread takes them from Grain, which waits for a worker without a timeout. So the
  caller can give up.
  """

  def __init__(
    self,
    payload: Callable[[int], Payload],
    steps: Sequence[int],
    workers: int,
    look: Callable[[], None],
  ):
    self._steps = iter(steps)
    self._look = look
    self._closing = threading.Event()
    self._ready: queue.Queue = queue.Queue(_READY)
    self._processes = workers > 0
    self._waiting_since: float | None = None
    # Readers nest: earlier ones are closed later.
    self._others = multiprocessing.active_children()
    self._batches = iter(_batches(_Payloads(payload, steps), workers))
    self._thread = threading.Thread(target=self._pump, daemon=True, name=_THREAD)
    self._thread.start()

  def __call__(self, step: int) -> Payload:
    expected = next(self._steps)
    if step != expected:
      raise AssertionError(f'step {step} was asked for, {expected} is next')
    payload, error = self._next(step)
    if isinstance(error, RuntimeError) and 'terminated unexpectedly' in str(error):
      raise WorkersFailed(_of_death(str(error), step)) from None
    if error is not None:
      raise error
    return payload

  def _next(self, step: int) -> tuple[Payload | None, BaseException | None]:
    """Waits for the next payload; checks now and then whether to keep waiting."""
    self._waiting_since = time.monotonic()
    while True:
      with contextlib.suppress(queue.Empty):
        made = self._ready.get(timeout=LOOKING_EVERY)
        self._waiting_since = None
        return made
      self._look()
      if time.monotonic() - self._waiting_since > STALLED_AFTER:
        raise WorkersFailed(
          f'no batch for step {step} in {STALLED_AFTER:g} s: a data worker stalled'
        )

  def _pump(self) -> None:
    """Moves batches from Grain to the queue of ready ones."""
    try:
      # Workers inherit this mask until they ignore these signals themselves. So does
      # Python's resource tracker, but starting it removes the mask here. So start it
      # first, and set the mask again.
      signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
      resource_tracker.ensure_running()
      signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
      for payload in self._batches:
        if self._processes:
          # Shared memory is scarce, and JAX only releases what it has read at garbage
          # collection.
          payload = {name: np.array(values) for name, values in payload.items()}
          _let_go()
        if not self._put((payload, None)):
          return
    except BaseException as error:  # raised again in the caller
      self._put((None, error))
    finally:
      # Must be closed in the thread that reads from it: otherwise Grain leaves its
      # workers' ready batches in shared memory.
      self._batches.close()
      self._batches = None

  def _put(self, item: Any) -> bool:
    """Waits for a free slot; returns False once the reader is closing."""
    while not self._closing.is_set():
      with contextlib.suppress(queue.Full):
        self._ready.put(item, timeout=0.1)
        return True
    return False

  def stop(self) -> float:
    """Begins to close; returns how many seconds a batch was awaited in vain."""
    self._closing.set()
    return time.monotonic() - (self._waiting_since or time.monotonic())

  def close(self, until: float) -> None:
    """Ends the threads and processes.

    Grain waits forever for one of its threads, which a worker that died while sending
    can block. The run must be able to end anyway.

    Args:
      until: the `time.monotonic` at which processes are killed and threads abandoned.
    """
    self.stop()
    self._thread.join(max(0, until - time.monotonic()))
    if not self._processes:
      return
    if self._thread.is_alive():
      for child in multiprocessing.active_children():
        grain = child.name.startswith('grain-process-prefetch')  # it ignores SIGTERM
        if grain and child not in self._others:
          child.kill()
      self._thread.join(CLOSING_TAKES)
    gc.collect()  # Grain leaves batches in reference cycles
    _let_go()


def _let_go() -> None:
  """Waits until Grain's thread has released shared memory.

  Otherwise Python reports leaked memory at the end of the process.
  """
  from grain.multiprocessing import SharedMemoryArray

  thread = getattr(SharedMemoryArray, '_del_thread_pool', None)
  if thread is not None:  # a single thread, which works in order
    thread.apply(int)


def _of_death(message: str, step: int) -> str:
  """Returns our message for a killed worker, from Grain's message."""
  text = f'a data worker was killed before step {step}'
  if f'code -{signal.SIGBUS.value}.' in message:
    return (
      f'{text}, since shared memory is full: enlarge /dev/shm (docker run '
      '--shm-size), or lower data.workers, to 0 if need be'
    )
  return f'{text}, possibly for lack of memory: {message.partition(". ")[0]}'


def _batches(source: _Payloads, workers: int) -> Any:
  """Returns Grain's data set of a source, read by threads or by `workers` processes."""
  import grain
  from absl import flags

  if not flags.FLAGS.is_parsed():  # Grain reads its own flags
    flags.FLAGS.mark_as_parsed()
  threads = 0 if workers else usable_cores()
  batches = grain.MapDataset.source(source).to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(1, threads))
  )
  if not workers:
    return batches
  options = grain.MultiprocessingOptions(
    num_workers=min(workers, len(source)), per_worker_buffer_size=1
  )
  return batches.mp_prefetch(options, worker_init_fn=_prepare_worker)


def usable_cores() -> int:
  """Returns how many cores this process can use, which a container can limit."""
  if sys.platform == 'linux':
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _prepare_worker(index: int, count: int) -> None:
  """Makes a worker end with its parent, and not before."""
  del index, count
  # A scheduler signals every process of a job. The parent still needs batches then, to
  # reach a step where it can save.
  for number in SIGNALS:
    signal.signal(number, signal.SIG_IGN)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
  threading.Thread(target=_end_with_parent, daemon=True).start()
  import jax

  jax.config.update('jax_platforms', 'cpu')  # the parent uses the devices


def _end_with_parent() -> None:
  """Waits for the parent to end, even by a kill; then ends this process."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
    os._exit(1)
