"""Reading ahead: batches are made on the host while the devices work on earlier ones.

Grain makes them, in threads of this process or in processes of their own. One of its
elements is one whole payload and its number tells the step, so that a run which goes on
at a step reads from there and nowhere else.
"""

import contextlib
import gc
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from typing import Any

import numpy as np

from lt_jax.data.streams import Payload, Stream

STALLED_AFTER = 600.0
"""Seconds without a batch after which those who make them are given up."""

CLOSING_TAKES = 20.0
"""Seconds after which threads and processes that do not end are left, or killed."""

_BUFFER = 2  # batches that wait in each worker, and again in this process

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What a scheduler sends to every process of a run, and only the parent hears."""

Read = Callable[[str, int], Payload]
"""(name of a stream, step) -> payload; the steps of a stream in order."""


class WorkersFailed(OSError):
  """Processes that make batches died or stalled: running again may help."""


@contextlib.contextmanager
def reading(streams: Mapping[str, Stream], first: int, last: int) -> Iterator[Read]:
  """Reads the payloads of steps first ... last - 1, those from the host ahead.

  Args:
    streams: name -> stream.
    first: the first step.
    last: the step after the last one.

  Yields:
    A function (name, step) -> payload, to be asked for every step at which a stream is
    due, in order. What goes wrong in a worker is raised there, with its traceback.
  """
  with contextlib.ExitStack() as stack:
    readers = {}
    for name, stream in streams.items():
      steps = range(-(-first // stream.every) * stream.every, last, stream.every)
      if stream.workers is None or not steps:
        readers[name] = stream.payload
      else:
        ahead = _Ahead(stream.payload, steps, stream.workers)
        readers[name] = stack.enter_context(contextlib.closing(ahead))
    yield lambda name, step: readers[name](step)


class _Payloads:
  """A source for Grain: element k is the payload of the k-th step."""

  def __init__(self, payload: Callable[[int], Payload], steps: Sequence[int]):
    self._payload = payload
    self._steps = steps

  def __len__(self) -> int:
    return len(self._steps)

  def __getitem__(self, position: int) -> Payload:
    return self._payload(self._steps[position])


class _Ahead:
  """Payloads of some steps, made ahead.

  A thread takes them from Grain, which waits for a worker as long as it may take; so
  the one who asks can give up.
  """

  def __init__(
    self, payload: Callable[[int], Payload], steps: Sequence[int], workers: int
  ):
    self._steps = iter(steps)
    self._closing = threading.Event()
    self._ready: queue.Queue = queue.Queue(_BUFFER)
    self._copy = workers > 0
    self._batches = iter(_batches(_Payloads(payload, steps), workers))
    self._thread = threading.Thread(target=self._pump, daemon=True, name='reading')
    self._thread.start()

  def __call__(self, step: int) -> Payload:
    expected = next(self._steps)
    if step != expected:
      raise AssertionError(f'step {step} was asked for, {expected} is next')
    try:
      payload, error = self._ready.get(timeout=STALLED_AFTER)
    except queue.Empty:
      raise WorkersFailed(
        f'no batch for step {step} in {STALLED_AFTER:g} s: a data worker stalled'
      ) from None
    if isinstance(error, RuntimeError) and 'terminated unexpectedly' in str(error):
      raise WorkersFailed(
        f'a data worker was killed before step {step}, perhaps for want of memory: '
        f'{str(error).partition(". ")[0]}'
      ) from None
    if error is not None:
      raise error
    return payload

  def _pump(self) -> None:
    """Moves batches from Grain to those that are ready."""
    # Workers inherit that, until they ignore these signals themselves. So does the
    # tracker that Python starts beside them, which takes the mask away here: it comes
    # first, and the mask again.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
      for payload in self._batches:
        if self._copy:
          # Of shared memory there is little, and JAX lets go of what it has read only
          # when garbage is collected.
          payload = {name: np.array(values) for name, values in payload.items()}
        if not self._put((payload, None)):
          return
    except BaseException as error:  # is raised again by the one who asks
      self._put((None, error))
    finally:
      # By the one who takes from it: while another waits in it, Grain leaves what its
      # workers had ready in shared memory.
      self._batches.close()
      self._batches = None

  def _put(self, item: Any) -> bool:
    """Waits for a free place; returns False where nobody will ask any more."""
    while not self._closing.is_set():
      with contextlib.suppress(queue.Full):
        self._ready.put(item, timeout=0.1)
        return True
    return False

  def close(self) -> None:
    """Ends the threads and processes.

    Grain waits without end for a thread of its own, which a worker that died in the
    middle of a message can hold up. A run that could not go on must end all the same.
    """
    self._closing.set()
    self._thread.join(CLOSING_TAKES)
    if self._thread.is_alive():
      for child in multiprocessing.active_children():
        if child.name.startswith('grain-process-prefetch'):  # which ignores SIGTERM
          child.kill()
      self._thread.join(CLOSING_TAKES)
    # Grain leaves batches in cycles; at the end of the process Python would call their
    # shared memory leaked.
    gc.collect()


def _batches(source: _Payloads, workers: int) -> Any:
  """Returns Grain's data set of a source: threads, or so many processes."""
  import grain
  from absl import flags

  if not flags.FLAGS.is_parsed():  # Grain reads its own options there
    flags.FLAGS.mark_as_parsed()
  threads = 0 if workers else usable_cores()
  batches = grain.MapDataset.source(source).to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(1, threads))
  )
  if not workers:
    return batches
  options = grain.MultiprocessingOptions(
    num_workers=min(workers, len(source)), per_worker_buffer_size=_BUFFER
  )
  return batches.mp_prefetch(options, worker_init_fn=_prepare_worker)


def usable_cores() -> int:
  """Returns how many cores this process may use, which a container may have cut."""
  if sys.platform == 'linux':
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _prepare_worker(index: int, count: int) -> None:
  """Makes a worker end with its parent, and not before."""
  del index, count
  # A scheduler signals every process of a job. The parent still wants its batches then,
  # to reach a step at which it can save.
  for number in SIGNALS:
    signal.signal(number, signal.SIG_IGN)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
  threading.Thread(target=_end_with_parent, daemon=True).start()
  import jax

  jax.config.update('jax_platforms', 'cpu')  # the devices are the parent's


def _end_with_parent() -> None:
  """Waits for the end of the parent, who may be killed; then ends this process."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
    os._exit(1)
