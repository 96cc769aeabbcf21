"""Simulate a schedule: the predicted start and end of every task.

Each channel runs its tasks in order, as in the engine, and every task waits for its ``waits``. The
seconds are the cost model's, divided among the tasks of a kind. So a difference from the program's
prediction is waiting time, which the program does not model.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from costmodel.plan.plan import Plan
from costmodel.plan.policy import Policy
from costmodel.plan.rounding import round_policy
from costmodel.pricing.channels import contentions
from costmodel.pricing.price import check_machine
from costmodel.pricing.problem import problem_of
from costmodel.schedule.task_seconds import TaskSeconds
from costmodel.schedule.tasks import Task
from costmodel.schedule.zigzag import ZigzagSchedule
from profiles.errors import InputError
from profiles.hardware import HardwareProfile

# Seconds of work left when a task counts as done, because the clock rounds.
DONE_S = 1e-12
# A layer of a batch is some ten tasks, which the simulation keeps in memory.
MAX_LAYER_BATCHES = 250_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedTask:
    """A task of the schedule with its start and end in seconds."""

    task: Task
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """All tasks of one block, in the order in which they end."""

    tasks: Sequence[TimedTask]

    @property
    def latency_s(self) -> float:
        """Seconds until the last token is chosen."""
        return max(timed.end_s for timed in self.tasks if "compute" in timed.task.channel)

    @property
    def prefill_s(self) -> float:
        """Seconds until the first token is chosen."""
        return max(
            timed.end_s
            for timed in self.tasks
            if timed.task.is_prefill and "compute" in timed.task.channel
        )

    def busy_s(self) -> Mapping[str, float]:
        """Return the busy seconds of each channel."""
        busy: dict[str, float] = defaultdict(float)
        for timed in self.tasks:
            busy[timed.task.channel] += timed.end_s - timed.start_s
        return busy


def simulate(
    policy: Policy,
    hardware: HardwareProfile,
    *,
    num_passes: int | None = None,
    progress: Callable[[Task], None] = lambda task: None,
) -> Timeline:
    """Run the schedule of one block with predicted seconds.

    Parameters
    ----------
    num_passes
        Passes over the model to simulate, prefill included; ``None`` means all.
    progress
        Called with every task when it has ended.

    Raises
    ------
    InputError
        For a policy that the machine cannot run, or for too many passes.
    """
    tasks = []
    for timed in simulated_tasks(policy, hardware, num_passes=num_passes):
        progress(timed.task)
        tasks.append(timed)
    return Timeline(tasks=tasks)


def simulated_tasks(
    policy: Policy, hardware: HardwareProfile, *, num_passes: int | None = None
) -> Iterator[TimedTask]:
    """Yield the tasks of ``simulate`` as they end, so that a caller may stop early."""
    check_machine(policy, hardware)
    policy = round_policy(policy, has_gpu=hardware.has_gpu)
    problem = problem_of(policy, hardware)
    num_tokens = min(num_passes or policy.workload.gen_len, policy.workload.gen_len)
    per_pass = len(problem.sizes.layers) * policy.num_gpu_batches
    if num_tokens * per_pass > MAX_LAYER_BATCHES:
        raise InputError(
            "--passes",
            got=f"{num_tokens} of {per_pass} layers and batches each",
            allowed=f"at most {max(1, MAX_LAYER_BATCHES // per_pass)} for this policy",
        )
    plan = Plan.of(policy, has_gpu=hardware.has_gpu)
    schedule = ZigzagSchedule(plan, num_batches=policy.num_gpu_batches, num_tokens=num_tokens)
    seconds = TaskSeconds(plan, problem)
    return _run(schedule, seconds, hardware)


class _Speeds:
    """The speed of each channel while a set of channels is busy, cached by that set."""

    def __init__(self, hardware: HardwareProfile) -> None:
        self._pairs = [
            (*names, keeps)
            for pair in contentions(hardware)
            for names, keeps in (
                ((pair.first, pair.second), pair.first_keeps),
                ((pair.second, pair.first), pair.second_keeps),
            )
        ]
        self._known: dict[frozenset[str], dict[str, float]] = {}

    def of(self, busy: frozenset[str]) -> dict[str, float]:
        """Return the share of its own rate that each busy channel keeps."""
        if busy not in self._known:
            speeds = dict.fromkeys(busy, 1.0)
            for channel, other, keeps in self._pairs:
                if channel in busy and other in busy:
                    speeds[channel] *= keeps
            self._known[busy] = speeds
        return self._known[busy]


def _run(
    schedule: ZigzagSchedule, seconds: TaskSeconds, hardware: HardwareProfile
) -> Iterator[TimedTask]:
    """Advance from one task's end to the next; channels with a shared resource slow down."""
    queues: dict[str, deque[Task]] = defaultdict(deque)
    for task in schedule:
        queues[task.channel].append(task)
    speeds, done = _Speeds(hardware), set[int]()
    left_s: dict[str, float] = {}
    begun_s: dict[str, float] = {}
    clock_s = 0.0
    while True:
        for channel, queue in queues.items():
            if channel not in left_s and queue and done.issuperset(queue[0].waits):
                left_s[channel], begun_s[channel] = seconds.of(queue[0]), clock_s
        if not left_s:
            break
        rates = speeds.of(frozenset(left_s))
        step_s = min(left_s[channel] / rates[channel] for channel in left_s)
        clock_s += step_s
        for channel in list(left_s):
            left_s[channel] -= step_s * rates[channel]
            if left_s[channel] <= DONE_S:
                del left_s[channel]
                task = queues[channel].popleft()
                done.add(task.index)
                yield TimedTask(task=task, start_s=begun_s.pop(channel), end_s=clock_s)
    assert not any(queues.values()), "the schedule waits for itself"
