"""The first tasks of each phase of a block: what a page can show and a telephone can draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from costmodel.plan.cuts import policy_layers
from costmodel.plan.policy import Policy
from costmodel.pricing.memory import PHASES
from costmodel.schedule.tasks import Task
from costmodel.schedule.timeline import MAX_LAYER_BATCHES, simulated_tasks
from profiles.hardware import HardwareProfile

# Of each phase.
MOST_TASKS = 4000
# The simulation takes about ten tasks for each, and a page waits for it.
MOST_LAYER_BATCHES = 20_000


class SampledTask(NamedTuple):
    """One task of a timeline, in seconds since the block began.

    ``num_bytes`` and ``blocked_s`` are known of measured tasks only.
    """

    kind: str
    channel: str
    token: int
    layer: int
    batch: int
    start_s: float
    end_s: float
    num_bytes: int = 0
    blocked_s: float = 0.0


class TaskSample:
    """The first tasks of each phase, in the order in which they end."""

    def __init__(self, most: int = MOST_TASKS, *, phases: Sequence[str] = PHASES) -> None:
        self.most = most
        self.phases: dict[str, list[SampledTask]] = {phase: [] for phase in phases}
        self.is_cut = dict.fromkeys(phases, False)
        self._first, self._others = phases[0], phases[-1]

    def add(
        self,
        task: Task,
        start_s: float,
        end_s: float,
        *,
        num_bytes: int = 0,
        blocked_s: float = 0.0,
    ) -> None:
        """Keep a task of the schedule; see ``keep``."""
        self.keep(
            SampledTask(
                kind=task.kind,
                channel=task.channel,
                token=task.token,
                layer=task.layer,
                batch=task.batch,
                start_s=start_s,
                end_s=end_s,
                num_bytes=num_bytes,
                blocked_s=blocked_s,
            )
        )

    def keep(self, task: SampledTask) -> None:
        """Keep a task if there is room for it in its phase."""
        phase = self._others if task.token else self._first
        if len(self.phases[phase]) < self.most:
            self.phases[phase].append(task)
        else:
            self.is_cut[phase] = True

    def counted_from(self, zero_s: float) -> TaskSample:
        """Return the same sample with ``zero_s`` as the beginning of time."""
        moved = TaskSample(self.most, phases=tuple(self.phases))
        moved.is_cut = self.is_cut
        for phase, tasks in self.phases.items():
            moved.phases[phase] = [
                task._replace(start_s=task.start_s - zero_s, end_s=task.end_s - zero_s)
                for task in tasks
            ]
        return moved

    @property
    def is_full(self) -> bool:
        """Whether no phase has room for another task."""
        return all(self.is_cut.values())


def simulate_sample(
    policy: Policy, hardware: HardwareProfile, *, num_passes: int | None = None
) -> TaskSample:
    """Simulate as much of a block as a sample holds; of large blocks, prefill alone,
    and of those whose schedule cannot be held, nothing.

    Parameters
    ----------
    num_passes
        Passes over the model that a run has made; ``None`` means all.
    """
    per_pass = len(policy_layers(policy, has_gpu=hardware.has_gpu)) * policy.num_gpu_batches
    sample = TaskSample()
    if per_pass > MAX_LAYER_BATCHES:
        return sample
    wanted = 1 if per_pass > MOST_LAYER_BATCHES else 2 + (MOST_TASKS - 1) // per_pass
    last = min(num_passes or wanted, wanted)
    # The last pass of a schedule does not prepare for another. Small blocks are shown to their end.
    more = per_pass < MOST_TASKS
    for timed in simulated_tasks(policy, hardware, num_passes=last + more):
        if timed.task.token < last:
            sample.add(timed.task, timed.start_s, timed.end_s)
        if sample.is_full or (wanted == 1 and sample.is_cut["prefill"]):
            break
    return sample
