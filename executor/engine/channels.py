"""The one loop: run a schedule's tasks on their channels, in order, as soon as they may.

Each channel has one worker thread. On the CPU a task is done when its handler returns. On CUDA a
handler only queues work on the channel's stream, so a task is *issued* when the handler returns
and done when its event has passed; a CUDA channel that waits for a CUDA channel makes its stream
wait, not its thread.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from contextlib import nullcontext, suppress
from functools import partial

import torch

from costmodel.schedule.tasks import Task
from executor.engine.interrupts import HeldSignals
from executor.engine.stream_timer import StreamTimer
from executor.engine.trace import Span, Trace

# A handler does one task and returns the bytes that it moved.
Handler = Callable[[Task], int]
# Tasks that may wait in a channel's queue: enough to look ahead, few enough to stop soon.
QUEUE_LENGTH = 64
# Who submits tasks is busy in Python for milliseconds, while a worker that was just woken waits
# for the interpreter; with Python's default of 5 ms that came before every token.
SWITCH_INTERVAL_S = 0.0002


class Ending:
    """Whether a task has been issued, and the CUDA event that ends it where there is one."""

    __slots__ = ("event", "issued")

    def __init__(self) -> None:
        self.issued = threading.Event()
        self.event: torch.cuda.Event | None = None

    def wait(self, stream: torch.cuda.Stream | None) -> None:
        """Make the caller, or its stream, wait until the task is done."""
        self.issued.wait()
        if self.event is None:
            return
        if stream is None:
            self.event.synchronize()
        else:
            stream.wait_event(self.event)

    def is_done(self) -> bool:
        """Whether the task has ended."""
        return self.issued.is_set() and (self.event is None or self.event.query())


class Throttle:
    """Holds a channel of an emulated device to a stated rate, in bytes/s."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s

    def hold(self, num_bytes: int, start_s: float) -> None:
        """Sleep until ``num_bytes`` would have passed, had they begun at ``start_s``."""
        remaining = start_s + num_bytes / self.bytes_per_s - time.perf_counter()
        if remaining > 0:
            time.sleep(remaining)


class Channel:
    """A queue of tasks and the thread that works through it in order.

    Its tasks compute with ``num_threads``; ``None`` for as many as torch has. Channels that compute
    on the same cores share ``cores``, one thread that does their tasks in turn.
    """

    def __init__(
        self,
        name: str,
        *,
        stream: torch.cuda.Stream | None = None,
        throttle: Throttle | None = None,
        num_threads: int | None = None,
        cores: Executor | None = None,
    ) -> None:
        self.name = name
        self.cores = cores
        self.num_threads = num_threads
        self.stream = stream
        self.throttle = throttle
        self.jobs: queue.Queue[tuple[Task, list[Ending], Ending] | None] = queue.Queue(QUEUE_LENGTH)


class Engine:
    """Runs schedules over a set of channels. A context manager: leaving it ends the workers.

    Parameters
    ----------
    channels
        One for each name that the schedule uses.
    handlers
        What to do for each kind of task.
    trace
        Receives a span for each task.
    """

    def __init__(
        self, channels: Iterable[Channel], handlers: Mapping[str, Handler], trace: Trace
    ) -> None:
        self._channels = {channel.name: channel for channel in channels}
        self._handlers = handlers
        self._trace = trace
        self._failure: BaseException | None = None
        self._failed = threading.Event()
        self._pending: dict[int, Ending] = {}
        self._timers: dict[str, StreamTimer] = {}
        self._signals = HeldSignals()
        self._switch_interval_s = 0.0
        self._num_threads = torch.get_num_threads()
        self._threads = [
            threading.Thread(target=self._work, args=(channel,), name=channel.name, daemon=True)
            for channel in self._channels.values()
        ]

    def __enter__(self) -> Engine:
        self._timers = {
            channel.name: StreamTimer(channel.stream, self._trace.record)
            for channel in self._channels.values()
            if channel.stream is not None
        }
        self._switch_interval_s = sys.getswitchinterval()
        sys.setswitchinterval(min(SWITCH_INTERVAL_S, self._switch_interval_s))
        self._signals.__enter__()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with self._signals.held():
                self._end_workers()
        finally:
            self._signals.__exit__()

    def _end_workers(self) -> None:
        # Whatever is still queued is dropped when the loop was left early.
        self._failed.set()
        for channel in self._channels.values():
            while True:
                try:
                    channel.jobs.put_nowait(None)
                    break
                except queue.Full:
                    self._drop_one(channel)
        for thread in self._threads:
            thread.join()
        for channel in self._channels.values():
            if channel.stream is not None:
                # Copies that were queued before a failure still use the run's memory.
                with suppress(RuntimeError):
                    channel.stream.synchronize()
        sys.setswitchinterval(self._switch_interval_s)
        # What a worker sets for itself is what threads begin with that come after it.
        torch.set_num_threads(self._num_threads)

    def submit(self, task: Task) -> Ending:
        """Queue one task; blocks while its channel's queue is full. Raises what a worker raised."""
        waits = [done for i in task.waits if (done := self._pending.get(i)) is not None]
        completion = Ending()
        self._pending[task.index] = completion
        jobs = self._channels[task.channel].jobs
        while True:
            self.check()
            with self._signals.held(), suppress(queue.Full):
                jobs.put((task, waits, completion), timeout=0.1)
                return completion

    def wait(self, completion: Ending) -> None:
        """Wait until a task is done; raises what a worker raised."""
        issued = False
        while not issued:
            with self._signals.held():
                issued = completion.issued.wait(0.1)
            self.check()
        completion.wait(None)

    def drain(self) -> None:
        """Wait until everything that was submitted is done."""
        for completion in list(self._pending.values()):
            self.wait(completion)
        self._pending.clear()
        # No worker has anything to do now, so this thread may speak for them.
        for timer in self._timers.values():
            timer.emit_done()

    def forget_done(self) -> None:
        """Drop completions that nobody can wait for any more, so that the run's memory is flat."""
        self._pending = {i: done for i, done in self._pending.items() if not done.is_done()}

    def check(self) -> None:
        """Raise the failure of a worker, if there was one."""
        if self._failure is not None:
            raise self._failure

    def _work(self, channel: Channel) -> None:
        context = torch.cuda.stream(channel.stream) if channel.stream else nullcontext()
        with context:
            while (job := channel.jobs.get()) is not None:
                picked_s = time.perf_counter()
                task, waits, completion = job
                try:
                    if not self._failed.is_set():
                        for wait in waits:
                            wait.wait(channel.stream)
                        self._run(channel, task, completion, picked_s)
                except BaseException as error:
                    self._failure = self._failure or error
                    self._failed.set()
                finally:
                    completion.issued.set()

    def _run(self, channel: Channel, task: Task, completion: Ending, picked_s: float) -> None:
        # A wait that a failure ended must not let its task run on half-written buffers.
        if self._failed.is_set():
            return
        timer = self._timers.get(channel.name)
        began = timer.mark() if timer else None
        do = partial(self._do, task, channel.num_threads or self._num_threads)
        start_s, num_bytes = channel.cores.submit(do).result() if channel.cores else do()
        if channel.throttle is not None:
            channel.throttle.hold(num_bytes, start_s)
        if timer and began:
            completion.event = timer.mark()
            timer.add(task, num_bytes, began, completion.event)
            timer.emit_done()
            return
        span = Span(
            task=task,
            start_s=start_s,
            end_s=time.perf_counter(),
            num_bytes=num_bytes,
            blocked_s=start_s - picked_s,
        )
        self._trace.record(span)

    def _do(self, task: Task, num_threads: int) -> tuple[float, int]:
        """Do a task; returns when it began and the bytes that it moved."""
        start_s = time.perf_counter()
        # Each thread has its own number, and begins with what any other has set last.
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        with torch.inference_mode():
            return start_s, self._handlers[task.kind](task)

    @staticmethod
    def _drop_one(channel: Channel) -> None:
        try:
            job = channel.jobs.get_nowait()
        except queue.Empty:
            return
        if job is not None:
            job[2].issued.set()
