"""A policy that the search has found."""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.optimizer.program import Program, Solution
from costmodel.plan.policy import Policy
from costmodel.pricing.price import phase_channels
from costmodel.pricing.problem import Problem


@dataclass(frozen=True, slots=True)
class Found:
    """A policy that fits, with its program and the optimum."""

    tok_per_s: float
    policy: Policy
    program: Program
    solution: Solution
    # How many times as long as its limits it takes, where that was asked for.
    slowdown: float = 1.0

    @property
    def problem(self) -> Problem:
        """The policy's problem."""
        return self.program.problem

    @property
    def seconds(self) -> float:
        """Seconds per sequence of the job."""
        return self.problem.workload.gen_len / self.tok_per_s

    @property
    def predicted_tok_per_s(self) -> float:
        """Throughput of the job with waits."""
        return self.tok_per_s / self.slowdown

    @property
    def busy_s(self) -> float:
        """Busy seconds of all channels together, per sequence of the block."""
        phases = phase_channels(self.policy, self.problem.hardware).values()
        return sum(sum(busy.values()) for busy in phases) / self.policy.block_size
