"""What a run did, beside what was predicted.

A run in step has blocks, with prefill and decode; a run over lanes is one phase.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from costmodel.calibration.measured_runs import MeasuredRun
from costmodel.optimizer.job_throughput import blocks_of
from costmodel.plan.policy import Policy, Prediction
from costmodel.pricing.memory import phases_of
from costmodel.pricing.price import phase_channels
from costmodel.report.run_record import Measured, RunRecord
from executor.cli.lane_figures import LaneFigures
from executor.machine.memory_peak import gpu_peak_bytes
from executor.run.results import BlockResult
from executor.run.runner import Runner
from profiles.emulate import EmulatedGpu
from profiles.files import to_json
from profiles.hardware import HardwareProfile
from profiles.runtime import peak_resident_bytes
from profiles.units import format_bytes, format_figure, format_seconds


def policies_of_blocks(policy: Policy, prompt_lengths: Sequence[int]) -> list[Policy]:
    """Return the policy of every block of a job, with the prompts that it will really hold.

    Lanes make no blocks.
    """
    lengths = sorted(prompt_lengths, reverse=True)
    policy = replace(policy, workload=replace(policy.workload, num_prompts=len(lengths)))
    if policy.lanes:
        return [policy]
    return [
        replace(block, workload=replace(block.workload, prompt_len=lengths[i * policy.block_size]))
        for i, block in enumerate(blocks_of(policy))
    ]


@dataclass(slots=True, kw_only=True, repr=False)
class Report:
    """A run's figures, gathered block by block."""

    policy: Policy
    hardware: HardwareProfile
    # The policy's own prediction: what memory was set aside for.
    planned: Prediction
    # Of each block that the prompts really fill.
    policies: list[Policy]
    predictions: list[Prediction]
    blocks: list[BlockResult] = field(default_factory=list)
    num_prompts: int = 0
    num_tokens: int = 0
    planned_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    busy_s: dict[str, float] = field(default_factory=dict)
    phase_busy_s: dict[str, dict[str, float]] = field(default_factory=dict)
    # Seconds in which a channel had a task that waited for other channels.
    blocked_s: dict[str, float] = field(default_factory=dict)
    moved_bytes: dict[str, int] = field(default_factory=dict)
    # Of a run over lanes that has ended.
    lanes: LaneFigures | None = None

    def __repr__(self) -> str:
        return format_report(self)

    def add(self, block: BlockResult) -> None:
        """Count one block; nothing is kept of what ends over lanes, which may be a large job."""
        if self.policy.lanes is None:
            self.blocks.append(block)
        self.num_prompts += len(block.output_ids)
        self.num_tokens += sum(len(ids) for ids in block.output_ids.values())

    def finish(self, runner: Runner) -> None:
        """Take the peaks and the channels' seconds from a run that has ended."""
        resident = peak_resident_bytes()
        self.planned_bytes = dict(self.planned.peak_bytes)
        if self.hardware.is_emulated:
            # Both tiers are CPU memory then, and the system sees only their sum.
            self.planned_bytes["cpu + gpu"] = sum(
                self.planned_bytes.pop(tier) for tier in ("cpu", "gpu")
            )
            self.peak_bytes["cpu + gpu"] = resident
        else:
            self.peak_bytes["cpu"] = resident
            if self.hardware.has_gpu:
                self.peak_bytes["gpu"] = gpu_peak_bytes()
        self.peak_bytes["disk"] = runner.disk_bytes
        for phase, channels in runner.trace.busy_s.items():
            self.phase_busy_s[phase] = dict(channels)
            for channel, seconds in channels.items():
                self.busy_s[channel] = self.busy_s.get(channel, 0.0) + seconds
        self.blocked_s = dict(runner.trace.blocked_s)
        self.moved_bytes = dict(runner.trace.moved_bytes)
        if runner.passes.lengths is not None:
            self.lanes = LaneFigures(policy=self.policy, hardware=self.hardware, log=runner.passes)

    @property
    def num_blocks(self) -> int:
        """Blocks that ran; lanes make no blocks and count as one."""
        return 1 if self.lanes else len(self.blocks)

    @property
    def start_s(self) -> float:
        """Start of the first block or pass, on the run's clock."""
        return self.lanes.log.start_s[0] if self.lanes else self.blocks[0].start_s

    @property
    def phase_s(self) -> dict[str, float]:
        """Measured seconds of each phase, all blocks."""
        if self.lanes:
            return {"run": self.lanes.log.run_s}
        return {
            "prefill": sum(block.prefill_s for block in self.blocks),
            "decode": sum(block.decode_s for block in self.blocks),
        }

    @property
    def predicted_phase_s(self) -> dict[str, float]:
        """The same as predicted."""
        if self.lanes:
            return {"run": self.lanes.predicted.total_s}
        return {
            "prefill": sum(p.prefill_s for p in self.predictions),
            "decode": sum(p.decode_s for p in self.predictions),
        }

    @property
    def seconds(self) -> float:
        """Measured seconds of all phases."""
        return sum(self.phase_s.values())

    @property
    def waiting_s(self) -> dict[str, float]:
        """Seconds of the blocks in which each channel had nothing to do, or could not do it."""
        seconds = self.seconds
        return {channel: max(0.0, seconds - busy) for channel, busy in self.busy_s.items()}

    @property
    def lower_bound_s(self) -> float:
        """Seconds below which no run of these blocks can be, by the profile's rates."""
        if self.lanes:
            return self.lanes.price.lower_bound_s
        return sum(prediction.lower_bound_s for prediction in self.predictions)

    @property
    def bottleneck(self) -> str:
        """The predicted limit."""
        return self.lanes.price.bottleneck if self.lanes else self.predictions[0].bottleneck

    @property
    def measured_tok_per_s(self) -> float:
        """Tokens computed over the seconds of all phases.

        Sequences of a block that ended early count in full, as their slots were computed all the
        same. Over lanes, every token was generated.
        """
        if self.lanes:
            return self.lanes.measured_tok_per_s
        computed = sum(len(block.output_ids) * block.num_tokens for block in self.blocks)
        return computed / self.seconds

    @property
    def predicted_tok_per_s(self) -> float:
        """The same figure as predicted; over lanes, for the answers that were really made."""
        if self.lanes:
            return self.lanes.predicted.throughput_tok_per_s
        computed = sum(len(block.output_ids) for block in self.blocks)
        latency_s = sum(prediction.latency_s for prediction in self.predictions)
        return computed * self.policy.workload.gen_len / latency_s

    @property
    def busy_shares(self) -> dict[str, float]:
        """Share of the whole run in which each channel was busy."""
        seconds = self.seconds
        return {channel: busy / seconds for channel, busy in self.busy_s.items()}

    def record(self) -> RunRecord:
        """Return what a page tells of the run, and the trace's file keeps."""
        policy = replace(self.policy, hardware=self.hardware, predicted=self.planned)
        lanes = self.lanes.record() if self.lanes else None
        return RunRecord(policy=policy, measured=self._measured(), lanes=lanes)

    def _predicted_busy_s(self) -> Mapping[str, Mapping[str, float]]:
        if self.lanes:
            return {"run": self.lanes.price.channel_s}
        busy: dict[str, dict[str, float]] = {phase: {} for phase in phases_of(self.policy)}
        for policy in self.policies:
            for phase, channels in phase_channels(policy, self.hardware).items():
                for channel, seconds in channels.items():
                    busy[phase][channel] = busy[phase].get(channel, 0.0) + seconds
        return busy

    def _measured(self) -> Measured:
        return Measured(
            num_blocks=self.num_blocks,
            num_prompts=self.num_prompts,
            prompt_len=self.policies[0].workload.prompt_len,
            num_passes=self.lanes.num_passes if self.lanes else self.blocks[0].num_tokens,
            generated_tokens=self.num_tokens,
            tok_per_s=self.measured_tok_per_s,
            predicted_tok_per_s=self.predicted_tok_per_s,
            phase_s=self.phase_s,
            predicted_phase_s=self.predicted_phase_s,
            busy_s=self.phase_busy_s,
            predicted_busy_s=self._predicted_busy_s(),
            peak_bytes=self.peak_bytes,
            predicted_peak_bytes=self.planned_bytes,
        )

    def measured_run(self) -> MeasuredRun:
        """Return the first block, with as many tokens as it generated, as a measured run; of lanes,
        the whole run."""
        gpu, emulated = self.hardware.gpu, None
        if gpu is not None and gpu.emulated:
            emulated = EmulatedGpu(
                memory_bytes=gpu.memory_bytes, link_bytes_per_s=gpu.h2d.pinned_bytes_per_s
            )
        if self.lanes:
            return self.lanes.measured_run(emulated)
        block, policy = self.blocks[0], self.policies[0]
        work = replace(policy.workload, gen_len=block.num_tokens, num_prompts=None)
        seconds = block.prefill_s + block.decode_s
        return MeasuredRun(
            policy=replace(policy, workload=work),
            throughput_tok_per_s=policy.block_size * block.num_tokens / seconds,
            prefill_s=block.prefill_s,
            decode_s=block.decode_s,
            emulated=emulated,
        )

    def as_json(self) -> dict[str, Any]:
        """Return every figure under its name."""
        policy = self.policy
        return {
            "emulated_gpu": self.hardware.is_emulated,
            "machine": self.hardware.name,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "model": policy.model.name,
            "dtype": policy.model.dtype,
            "prompt_len": policy.workload.prompt_len,
            "gen_len": policy.workload.gen_len,
            "num_prompts": self.num_prompts,
            "num_blocks": self.num_blocks,
            "block_size": policy.block_size,
            "gpu_batch_size": policy.gpu_batch_size,
            "num_gpu_batches": policy.num_gpu_batches,
            "prefill_batch_size": policy.prefill_batch_size,
            "weights": to_json(policy.weights),
            "cache": to_json(policy.cache),
            "activations": to_json(policy.activations),
            "cpu_attention": policy.cpu_attention,
            "weight_bits": policy.weight_bits,
            "cache_bits": policy.cache_bits,
            "group_size": policy.group_size,
            "attention_sparsity": policy.attention_sparsity,
            **({"lanes": self.lanes.as_json()} if self.lanes else {}),
            "generated_tokens": self.num_tokens,
            "predicted_tok_per_s": self.predicted_tok_per_s,
            "measured_tok_per_s": self.measured_tok_per_s,
            **{f"predicted_{phase}_s": s for phase, s in self.predicted_phase_s.items()},
            **{f"{phase}_s": s for phase, s in self.phase_s.items()},
            "lower_bound_s": self.lower_bound_s,
            "attainment": self.lower_bound_s / self.seconds,
            "bottleneck": self.bottleneck,
            "busy_s": self.busy_s,
            "waiting_s": self.waiting_s,
            "blocked_s": self.blocked_s,
            "moved_bytes": self.moved_bytes,
            "predicted_peak_bytes": self.planned_bytes,
            "peak_bytes": self.peak_bytes,
        }


def format_report(report: Report) -> str:
    """Lay out predicted beside measured."""
    lines = [f"{'':<20}{'predicted':>18}{'measured':>18}"]
    rows = [
        (
            "throughput",
            f"{format_figure(report.predicted_tok_per_s)} token/s",
            f"{format_figure(report.measured_tok_per_s)} token/s",
        ),
    ]
    rows += [
        (phase, format_seconds(said), format_seconds(report.phase_s[phase]))
        for phase, said in report.predicted_phase_s.items()
    ]
    rows += [
        (
            f"peak {tier}",
            format_bytes(report.planned_bytes[tier]),
            format_bytes(report.peak_bytes[tier]),
        )
        for tier in report.peak_bytes
    ]
    lines += [f"{name:<20}{said:>18}{found:>18}" for name, said, found in rows]
    bound = format_seconds(report.lower_bound_s)
    what = "pass" if report.lanes else "phase"
    lines.append(f"lower bound: {bound}, the busiest channel of each {what} without fixed costs")
    busy = sorted(report.busy_s.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{channel} {format_seconds(s)}" for channel, s in busy if s > 0)
    lines.append(f"channels were busy: {shares}")
    if report.lanes:
        lines += report.lanes.lines()
    if report.hardware.is_emulated:
        lines.append("the GPU tier was emulated in CPU memory")
    return "\n".join(lines)
