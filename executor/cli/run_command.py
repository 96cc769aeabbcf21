"""What the commands that run share: flags, a job that was checked, its run and report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from costmodel.cli.flags import DEFAULT_GEN_LEN, add_permitted_flags
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import Permitted
from costmodel.optimizer.optimum import search
from costmodel.plan.policy import Policy, Prediction
from costmodel.plan.workload import Workload
from costmodel.pricing.price import check_fits, estimate
from executor.checkpoint.folder import WeightSource
from executor.cli.progress_bar import ProgressBar
from executor.cli.run_report import Report, policies_of_blocks
from executor.machine.memory_budget import within_free_memory
from executor.machine.memory_peak import reset_peaks
from executor.machine.offload_folder import check_offload_folder
from executor.machine_profile import machine_profile
from executor.model.sampling import Chooser
from executor.run.recorder import Recorder, open_recorder
from executor.run.results import BlockResult
from executor.run.runner import Runner, check_runnable
from profiles.command import Parser
from profiles.errors import InputError
from profiles.hardware import HardwareProfile
from profiles.output_checks import output_path
from profiles.recorded import find_profile

# What a policy was made for, and cannot be told again.
PLANNED = (
    "gen_len",
    "dtype",
    "gpu_memory",
    "cpu_memory",
    "disk",
    "weight_bits",
    "cache_bits",
    "group_size",
    "sparsity",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that was checked before the first weight is read."""

    policy: Policy
    hardware: HardwareProfile
    source: WeightSource
    prompts: Sequence[Sequence[int]]
    sampler: Chooser
    eos_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        check_runnable(self.policy, self.hardware, self.source)

    def predict(self) -> Prediction:
        """Price the policy; raises ``InfeasibleError`` where it does not fit."""
        predicted = estimate(self.policy, self.hardware)
        check_fits(predicted, self.hardware)
        return predicted

    def recording(self, path: Path | None) -> AbstractContextManager[Recorder | None]:
        """Open the timeline of a run; it is written when the block ends, after all other work."""
        if path is None:
            return nullcontext()
        return open_recorder(path, self._policies_of_blocks(), self.hardware)

    def run(
        self,
        offload_dir: Path,
        *,
        planned: Prediction,
        recorder: Recorder | None = None,
        on_block: Callable[[BlockResult], None] = lambda block: None,
    ) -> Report:
        """Run every block and report.

        Parameters
        ----------
        planned
            What ``predict`` returned.
        recorder
            From ``recording``: takes the timeline, measured beside simulated.
        on_block
            Called with each block as it ends.
        """
        policies = self._policies_of_blocks()
        predictions = [estimate(policy, self.hardware) for policy in policies]
        report = Report(
            policy=self.policy,
            hardware=self.hardware,
            planned=planned,
            policies=policies,
            predictions=predictions,
        )
        bar = ProgressBar(predictions, self.policy, num_prompts=len(self.prompts))
        reset_peaks()
        runner = Runner(
            self.policy,
            self.hardware,
            self.source,
            offload_dir,
            sampler=self.sampler,
            eos_ids=self.eos_ids,
            progress=bar,
            on_span=recorder.record if recorder else None,
        )
        with bar, runner:
            if recorder:
                recorder.start()
            for block in runner.run(self.prompts):
                on_block(block)
                report.add(block)
                if recorder:
                    recorder.end_block()
            report.finish(runner)
        # The run has given its memory back by now.
        if recorder:
            recorder.add_simulated(report.blocks)
        return report

    def _policies_of_blocks(self) -> list[Policy]:
        return policies_of_blocks(self.policy, [len(ids) for ids in self.prompts])


def add_job_flags(parser: Parser, *, gen_len: str = str(DEFAULT_GEN_LEN)) -> None:
    """Add the flags that the commands share; ``gen_len`` says what it is by default."""
    add = parser.add_argument
    add_offload_flags(parser)
    add("--gen-len", type=int, help=f"tokens to generate, without --policy ({gen_len})")
    add(
        "--trace",
        type=output_path,
        metavar="FILE",
        help="timeline for ui.perfetto.dev, measured beside simulated",
    )


def add_offload_flags(parser: Parser) -> None:
    """Add the flags that say where a model runs, and in what precision."""
    add = parser.add_argument
    add("--policy", type=Path, help="from costmodel.search; without it, one is searched now")
    add("--hardware", help="profile to run under, in place of the policy's or this machine's own")
    add("--offload-dir", type=Path, default=Path(), metavar="DIR", help="default: this folder")
    add("--dtype", help="float32, float16 or bfloat16, without --policy; default: the model's")
    add_permitted_flags(parser)
    parser.add_bytes("--gpu-memory", help="budget, without --policy")
    parser.add_bytes("--cpu-memory", help="budget, without --policy")
    parser.add_bytes("--disk", help="budget, without --policy")


def check_job_flags(flags: argparse.Namespace, *planned: str) -> None:
    """Refuse what can be refused before any work, and flags that would do nothing.

    ``planned`` names further flags that a policy has an answer to.
    """
    gen_len = getattr(flags, "gen_len", None)
    if gen_len is not None and gen_len < 1:
        raise InputError("--gen-len", got=gen_len, allowed="1 or more")
    for name in (*PLANNED, *planned):
        if flags.policy and getattr(flags, name, None) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                flag,
                got=f"{flag} together with --policy",
                allowed="what the policy was made for",
                hint=f"costmodel.search {flag}",
            )


def uses_own_profile(flags: argparse.Namespace, policy: Policy) -> bool:
    """Whether a run's policy was priced with the profile that this machine keeps of itself."""
    return flags.hardware is None and (flags.policy is None or policy.hardware is None)


def choose_hardware(flags: argparse.Namespace, policy: Policy | None) -> HardwareProfile:
    """Return the profile asked for, else the policy's, else this machine's own."""
    if flags.hardware is not None:
        hardware = find_profile(flags.hardware)
    elif policy is not None and policy.hardware is not None:
        hardware = policy.hardware
    else:
        check_offload_folder(flags.offload_dir, 0)
        hardware = machine_profile(flags.offload_dir)
    hardware = hardware.with_budget(
        gpu_memory=flags.gpu_memory, cpu_memory=flags.cpu_memory, disk=flags.disk
    )
    if policy is not None:
        # It is held against what is there when it runs.
        return hardware
    is_asked_for = flags.cpu_memory is not None
    return within_free_memory(hardware, flags.offload_dir, is_asked_for=is_asked_for)


def search_policy(
    hardware: HardwareProfile, spec: ModelSpec, workload: Workload, permitted: Permitted
) -> tuple[Policy, HardwareProfile]:
    """Search, and return the policy with the machine that it uses: the GPU may be left out."""
    result = search(hardware, spec, workload, permitted=permitted)
    return result.policy, result.hardware
