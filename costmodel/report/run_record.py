"""A run as data: its policy, and what was measured beside what was predicted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from costmodel.optimizer.job_throughput import blocks_of
from costmodel.plan.policy import Policy
from costmodel.pricing.memory import LANE_PHASE, PHASES, phases_of
from costmodel.report.lane_record import LaneRecord
from profiles.errors import InputError
from profiles.hardware import CHANNELS, HardwareProfile
from profiles.rate_curve import require_not_negative, require_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The figures of a run, and those that were predicted of the same blocks.

    Parameters
    ----------
    prompt_len, num_passes
        Of the first block, or of all lanes: tokens of its longest prompt, and passes over the model
        that it made.
    tok_per_s, predicted_tok_per_s
        Over all blocks.
    phase_s, predicted_phase_s
        ``{phase: seconds}``, all blocks.
    busy_s, predicted_busy_s
        ``{phase: {channel: busy seconds}}``, all blocks.
    peak_bytes, predicted_peak_bytes
        By tier; an emulated GPU and the CPU share one entry.
    """

    num_blocks: int
    num_prompts: int
    prompt_len: int
    num_passes: int
    generated_tokens: int
    tok_per_s: float
    predicted_tok_per_s: float
    phase_s: Mapping[str, float]
    predicted_phase_s: Mapping[str, float]
    busy_s: Mapping[str, Mapping[str, float]]
    predicted_busy_s: Mapping[str, Mapping[str, float]]
    peak_bytes: Mapping[str, int]
    predicted_peak_bytes: Mapping[str, int]

    def __post_init__(self) -> None:
        for name in ("num_blocks", "num_prompts", "prompt_len", "num_passes", "tok_per_s"):
            require_positive(f"measured.{name}", getattr(self, name))
        phases = (LANE_PHASE,) if LANE_PHASE in self.phase_s else PHASES
        for name in ("phase_s", "predicted_phase_s", "busy_s", "predicted_busy_s"):
            _require_keys(f"measured.{name}", getattr(self, name), phases)
        for name in ("phase_s", "predicted_phase_s"):
            for phase, seconds in getattr(self, name).items():
                require_not_negative(f"measured.{name}.{phase}", seconds)
        for busy in (*self.busy_s.values(), *self.predicted_busy_s.values()):
            if not set(busy) <= set(CHANNELS):
                raise InputError(
                    "measured.busy_s", got=", ".join(busy), allowed=", ".join(CHANNELS)
                )
            for channel, seconds in busy.items():
                require_not_negative(f"measured.busy_s.{channel}", seconds)
        _require_keys("measured.predicted_peak_bytes", self.predicted_peak_bytes, self.peak_bytes)


def _require_keys(what: str, value: Mapping[str, object], keys: Collection[str]) -> None:
    if set(value) != set(keys):
        raise InputError(what, got=", ".join(value) or "nothing", allowed=", ".join(keys))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What a timeline's file keeps of the run beside its tasks. The policy names the machine.

    ``lanes`` are the passes of a run over lanes.
    """

    policy: Policy
    measured: Measured
    lanes: LaneRecord | None = None

    def __post_init__(self) -> None:
        if self.policy.hardware is None:
            raise InputError("run.policy.hardware", got="nothing", allowed="the machine of the run")
        _require_keys("run.measured.phase_s", self.measured.phase_s, phases_of(self.policy))
        if (self.lanes is None) != (self.policy.lanes is None):
            raise InputError(
                "run.lanes",
                got="nothing" if self.lanes is None else "passes",
                allowed="the passes of a policy with lanes, and of no other",
            )

    @property
    def hardware(self) -> HardwareProfile:
        """The machine of the run."""
        assert self.policy.hardware is not None
        return self.policy.hardware

    @property
    def first_block(self) -> Policy:
        """The policy with the prompts that the first block really held."""
        measured = self.measured
        work = replace(
            self.policy.workload,
            num_prompts=measured.num_prompts,
            prompt_len=measured.prompt_len,
        )
        return next(blocks_of(replace(self.policy, workload=work)))
