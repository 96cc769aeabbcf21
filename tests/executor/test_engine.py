"""The one loop: order, waits, failures and rates, with tasks that do next to nothing."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from costmodel.schedule.tasks import Task
from executor.engine import channels as engine_module
from executor.engine.channels import QUEUE_LENGTH, Channel, Ending, Engine, Handler, Throttle
from executor.engine.trace import Span, Trace

CHANNELS = ("disk_read", "cpu_compute", "disk_write")
pytestmark = pytest.mark.timeout(30)


def make_task(index: int, channel: str, *waits: int, kind: str = "work", token: int = 0) -> Task:
    """Make a task of which only its place in the order matters."""
    return Task(
        index=index,
        kind=kind,
        channel=channel,
        token=token,
        layer=0,
        batch=0,
        slot=0,
        hidden_slot=0,
        read_slot=0,
        sent_slot=0,
        waits=waits,
    )


def make_engine(work: Handler, trace: Trace | None = None, **others: Handler) -> Engine:
    """Make an engine whose tasks call ``work``, or another handler by their kind."""
    channels = [Channel(name) for name in CHANNELS]
    return Engine(channels, {"work": work, **others}, trace or Trace())


def submit_all(engine: Engine, tasks: Iterable[Task]) -> list[Ending]:
    """Queue tasks in order."""
    return [engine.submit(task) for task in tasks]


def test_one_channel_works_in_order() -> None:
    done: list[int] = []

    def work(task: Task) -> int:
        done.append(task.index)
        return 0

    with make_engine(work) as engine:
        submit_all(engine, (make_task(i, "disk_read") for i in range(5 * QUEUE_LENGTH)))
        engine.drain()
        assert done == list(range(5 * QUEUE_LENGTH))


def test_a_channel_computes_with_its_own_threads() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def work(task: Task) -> int:
        seen.append(torch.get_num_threads())
        return 0

    torch.set_num_threads(4)
    try:
        channels = [Channel("cpu_compute", num_threads=1), Channel("disk_read")]
        with Engine(channels, {"work": work}, Trace()) as engine:
            for index, name in enumerate(("cpu_compute", "disk_read", "cpu_compute", "disk_read")):
                engine.submit(make_task(index, name, *range(index)))
            engine.drain()
        assert seen == [1, 4, 1, 4]
        late = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        late.start()
        late.join()
        assert torch.get_num_threads() == seen[-1] == 4
    finally:
        torch.set_num_threads(before)


def test_channels_that_share_cores_take_turns() -> None:
    threads: list[int] = []
    busy = threading.Lock()

    def work(task: Task) -> int:
        assert busy.acquire(blocking=False)
        threads.append(threading.get_ident())
        time.sleep(0.001)
        busy.release()
        return task.index

    trace = Trace()
    with ThreadPoolExecutor(1) as cores:
        channels = [Channel(name, cores=cores) for name in CHANNELS[:2]]
        with Engine(channels, {"work": work}, trace) as engine:
            submit_all(engine, (make_task(i, CHANNELS[i % 2]) for i in range(20)))
            engine.drain()
    assert len(threads) == 20 and len(set(threads)) == 1
    assert sum(trace.moved_bytes.values()) == sum(range(20))


def test_shared_cores_compute_with_all_threads_whatever_a_link_does() -> None:
    before = torch.get_num_threads()
    seen: dict[str, int] = {}

    def work(task: Task) -> int:
        seen[task.channel] = torch.get_num_threads()
        return 0

    torch.set_num_threads(4)
    try:
        with ThreadPoolExecutor(1) as cores:
            channels = [Channel("cpu_compute", cores=cores), Channel("disk_read", num_threads=1)]
            with Engine(channels, {"work": work}, Trace()) as engine:
                # The shared thread computes for the first time when another has set its own.
                engine.submit(make_task(0, "disk_read"))
                engine.submit(make_task(1, "cpu_compute", 0))
                engine.drain()
        assert seen == {"disk_read": 1, "cpu_compute": 4}
    finally:
        torch.set_num_threads(before)


def test_a_task_waits_for_other_channels() -> None:
    release = threading.Event()
    done: list[str] = []

    def hold(task: Task) -> int:
        release.wait(10)
        done.append("held")
        return 0

    def work(task: Task) -> int:
        done.append(task.channel)
        return 0

    with make_engine(work, hold=hold) as engine:
        engine.submit(make_task(0, "disk_read", kind="hold"))
        engine.submit(make_task(1, "cpu_compute", 0))
        engine.submit(make_task(2, "disk_write", 1))
        free = engine.submit(make_task(3, "disk_read"))
        assert not free.is_done()
        assert done == []
        release.set()
        engine.drain()
    assert done.index("held") < done.index("cpu_compute") < done.index("disk_write")
    assert free.is_done()


def test_channels_work_at_once() -> None:
    """Each task can only end once the other has begun."""
    meeting = threading.Barrier(2, timeout=10)
    with make_engine(lambda task: meeting.wait() * 0) as engine:
        submit_all(engine, [make_task(0, "disk_read"), make_task(1, "disk_write")])
        engine.drain()


def test_random_graphs_keep_every_wait() -> None:
    rng = torch.Generator().manual_seed(0)
    tasks: list[Task] = []
    for index in range(300):
        numbers = torch.randint(0, max(1, index), (3,), generator=rng).tolist()
        waits = sorted({n for n in numbers if index and tasks[n].channel != CHANNELS[index % 3]})
        tasks.append(make_task(index, CHANNELS[index % 3], *waits))
    ended: set[int] = set()
    broken: list[int] = []

    def work(task: Task) -> int:
        if not ended.issuperset(task.waits):
            broken.append(task.index)
        ended.add(task.index)
        return 0

    with make_engine(work) as engine:
        for task in tasks:
            engine.submit(task)
            if task.index % 50 == 0:
                engine.forget_done()
        engine.drain()
    assert not broken
    assert len(ended) == len(tasks)


def boom(task: Task) -> int:
    raise OSError("the disk is gone")


def run_before_failure(call: Callable[[Engine], None]) -> list[int]:
    """Run ``call`` on an engine whose task 1 fails; returns the tasks that ran."""
    ran: list[int] = []

    def work(task: Task) -> int:
        ran.append(task.index)
        return 0

    with make_engine(work, boom=boom) as engine:
        engine.submit(make_task(0, "cpu_compute"))
        engine.submit(make_task(1, "disk_read", 0, kind="boom"))
        with pytest.raises(OSError, match="the disk is gone"):
            call(engine)
    assert not any(thread.is_alive() for thread in engine._threads)
    return ran


def test_drain_raises_what_a_worker_raised() -> None:
    assert run_before_failure(lambda engine: engine.drain()) == [0]


def test_wait_raises_although_its_own_task_never_runs() -> None:
    def call(engine: Engine) -> None:
        engine.wait(engine.submit(make_task(2, "disk_write", 1)))

    assert run_before_failure(call) == [0]


def test_submit_raises_instead_of_blocking_on_a_full_queue() -> None:
    def call(engine: Engine) -> None:
        for index in range(2, 20 * QUEUE_LENGTH):
            engine.submit(make_task(index, "disk_write", 1))

    assert run_before_failure(call) == [0]


def test_the_first_failure_is_told() -> None:
    """A second worker that fails on what the first has left behind must not hide the cause."""
    second = threading.Event()

    def late(task: Task) -> int:
        second.wait(10)
        raise ValueError("a consequence")

    with make_engine(boom, late=late) as engine:
        engine.submit(make_task(0, "cpu_compute", kind="late"))
        first = engine.submit(make_task(1, "disk_read"))
        first.issued.wait(10)
        second.set()
        with pytest.raises(OSError, match="the disk is gone"):
            engine.drain()


def test_leaving_early_drops_what_is_queued_and_joins() -> None:
    begun = threading.Event()
    ran: list[int] = []

    def work(task: Task) -> int:
        ran.append(task.index)
        begun.set()
        time.sleep(0.01)
        return 0

    with pytest.raises(KeyboardInterrupt), make_engine(work) as engine:
        submit_all(engine, (make_task(i, "disk_read") for i in range(QUEUE_LENGTH)))
        submit_all(engine, (make_task(100 + i, "disk_write", 63) for i in range(QUEUE_LENGTH)))
        begun.wait(10)
        raise KeyboardInterrupt
    assert not any(thread.is_alive() for thread in engine._threads)
    assert len(ran) < QUEUE_LENGTH


def test_forgetting_keeps_what_can_still_be_waited_for() -> None:
    release = threading.Event()

    def hold(task: Task) -> int:
        release.wait(10)
        return 0

    with make_engine(lambda task: 0, hold=hold) as engine:
        ended = engine.submit(make_task(0, "disk_read"))
        engine.wait(ended)
        engine.submit(make_task(1, "cpu_compute", kind="hold"))
        engine.forget_done()
        assert list(engine._pending) == [1]
        release.set()
        engine.drain()
        assert not engine._pending


def test_trace_adds_up() -> None:
    seen: list[Span] = []
    trace = Trace([seen.append])
    with make_engine(lambda task: 10 + task.index, trace) as engine:
        submit_all(engine, (make_task(i, CHANNELS[i % 2], token=i // 4) for i in range(8)))
        engine.drain()
    assert dict(trace.moved_bytes) == {"disk_read": 40 + 12, "cpu_compute": 40 + 16}
    assert {span.task.index for span in seen} == set(range(8))
    for phase in ("prefill", "decode"):
        spans = [s for s in seen if s.task.is_prefill == (phase == "prefill")]
        for channel in CHANNELS[:2]:
            seconds = sum(s.end_s - s.start_s for s in spans if s.task.channel == channel)
            assert trace.busy_s[phase][channel] == pytest.approx(seconds)


def test_throttle_sleeps_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 bytes at 100 byte/s take 2 s from their start, however long the copy took itself."""
    slept: list[float] = []

    class Clock:
        now_s = 50.0

        def perf_counter(self) -> float:
            return self.now_s

        def sleep(self, seconds: float) -> None:
            slept.append(seconds)
            self.now_s += seconds

    clock = Clock()
    monkeypatch.setattr(engine_module, "time", clock)
    throttle = Throttle(100.0)
    throttle.hold(200, 49.5)
    throttle.hold(200, 40.0)
    assert slept == [pytest.approx(1.5)]
    assert clock.now_s == pytest.approx(51.5)


def test_only_channels_with_a_throttle_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    class Recorder(Throttle):
        def hold(self, num_bytes: int, start_s: float) -> None:
            held.append(num_bytes)

    channels = [Channel("h2d", throttle=Recorder(1.0)), Channel("disk_read")]
    with Engine(channels, {"work": lambda task: task.index}, Trace()) as engine:
        submit_all(engine, [make_task(5, "h2d"), make_task(6, "disk_read"), make_task(7, "h2d")])
        engine.drain()
    assert held == [5, 7]


@pytest.mark.gpu
def test_cuda_streams_wait_for_each_other() -> None:
    """A copy that is queued behind a long kernel of another stream sees what it wrote."""
    size = 2**24
    first, second = (torch.zeros(size, device="cuda") for _ in range(2))
    slow = torch.rand(4096, 4096, device="cuda")

    def write(task: Task) -> int:
        for _ in range(20):
            slow @ slow
        first.fill_(task.index)
        return 0

    def copy(task: Task) -> int:
        second.copy_(first)
        return 0

    torch.cuda.synchronize()
    channels = [Channel(name, stream=torch.cuda.Stream()) for name in ("gpu_compute", "d2h")]
    channels.append(Channel("cpu_compute"))
    seen: list[float] = []

    def look(task: Task) -> int:
        seen.append(float(second.cpu().min()))
        return 0

    handlers = {"write": write, "copy": copy, "look": look}
    with Engine(channels, handlers, Trace()) as engine:
        for turn in range(3):
            index = 3 * turn
            after = (index - 1,) if turn else ()
            engine.submit(make_task(index, "gpu_compute", *after, kind="write"))
            engine.submit(make_task(index + 1, "d2h", index, kind="copy"))
            engine.submit(make_task(index + 2, "cpu_compute", index + 1, kind="look"))
        engine.drain()
    assert seen == [0.0, 3.0, 6.0]


@pytest.mark.parametrize("raises_in", ["put", "wait"])
def test_a_signal_within_a_lock_leaves_no_lock_behind(
    raises_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C arrives after a lock was taken and before the ``with`` block that frees it began."""
    original = getattr(queue.Queue if raises_in == "put" else threading.Event, raises_in)

    def interrupted(
        self: queue.Queue[object] | threading.Event, *args: object, **kw: object
    ) -> object:
        lock = self.mutex if isinstance(self, queue.Queue) else self._cond  # type: ignore[attr-defined]
        if threading.current_thread() is threading.main_thread():
            lock.acquire()
            signal.raise_signal(signal.SIGINT)
            lock.release()
        return original(self, *args, **kw)

    handler = signal.getsignal(signal.SIGINT)
    owner = queue.Queue if raises_in == "put" else threading.Event
    with make_engine(lambda task: 0) as engine:
        first = engine.submit(make_task(0, "cpu_compute"))
        monkeypatch.setattr(owner, raises_in, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.wait(engine.submit(make_task(1, "cpu_compute")))
        monkeypatch.undo()
        engine.wait(first)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_signal_outside_the_loop_is_answered_at_once() -> None:
    with make_engine(lambda task: 0), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_an_engine_in_another_thread_leaves_signals_alone() -> None:
    def run() -> None:
        with make_engine(lambda task: 0) as engine:
            engine.wait(engine.submit(make_task(0, "cpu_compute")))

    with ThreadPoolExecutor(1) as threads:
        threads.submit(run).result()
