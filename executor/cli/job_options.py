"""What a user says of a job beside its prompts, and the machine and policy that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from costmodel.cli.flags import choose_dtype
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import DEFAULT_PERMITTED, Permitted
from costmodel.optimizer.optimum import search
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from executor.checkpoint.opening import OpenedCheckpoint
from executor.expert_counts import kept_skew
from executor.machine.memory_budget import within_free_memory
from executor.machine.offload_folder import check_offload_folder
from executor.machine_profile import machine_profile
from profiles.hardware import HardwareProfile
from profiles.recorded import find_profile

# What a policy was made for, and cannot be told again.
PLANNED = (
    "dtype",
    "gpu_memory",
    "cpu_memory",
    "disk",
    "weight_bits",
    "cache_bits",
    "group_size",
    "sparsity",
    "requantize",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """How a job is planned.

    Parameters
    ----------
    policy
        ``None`` searches for one.
    hardware
        A profile, its file or the name of a recorded machine. ``None`` takes the policy's machine,
        else this one.
    offload_dir
        Folder for whatever the policy puts on disk.
    gpu_memory, cpu_memory, disk
        Budgets in bytes. ``None`` takes what is free.
    dtype
        ``None`` takes the model's.
    permitted
        Approximations that the search may choose.
    shares_prefixes
        Whether what prompts begin with in common is computed once, where a policy has lanes.
    """

    policy: Policy | None = None
    hardware: HardwareProfile | str | None = None
    offload_dir: Path = Path()
    gpu_memory: int | None = None
    cpu_memory: int | None = None
    disk: int | None = None
    dtype: str | None = None
    permitted: Permitted = DEFAULT_PERMITTED
    shares_prefixes: bool = True

    @property
    def runs_here(self) -> bool:
        """Whether this machine runs the job."""
        return True

    @property
    def uses_own_profile(self) -> bool:
        """Whether a policy is priced with the profile that this machine keeps of itself."""
        return self.hardware is None and (self.policy is None or self.policy.hardware is None)

    def choose_hardware(self) -> HardwareProfile:
        """Return the profile asked for, else the policy's, else this machine's own."""
        if isinstance(self.hardware, HardwareProfile):
            hardware = self.hardware
        elif self.hardware is not None:
            hardware = find_profile(self.hardware)
        elif self.policy is not None and self.policy.hardware is not None:
            hardware = self.policy.hardware
        else:
            check_offload_folder(self.offload_dir, 0)
            hardware = machine_profile(self.offload_dir)
        hardware = hardware.with_budget(
            gpu_memory=self.gpu_memory, cpu_memory=self.cpu_memory, disk=self.disk
        )
        if self.policy is not None:
            # It is held against what is there when it runs.
            return hardware
        is_asked_for = self.cpu_memory is not None
        return within_free_memory(hardware, self.offload_dir, is_asked_for=is_asked_for)

    def choose_policy(
        self, source: OpenedCheckpoint, workload: Workload
    ) -> tuple[Policy, HardwareProfile, OpenedCheckpoint]:
        """Return the policy, the machine that it uses, and the weights in its dtype.

        A policy that was given is kept, but for what is asked of each prompt: the number of tokens
        to generate, and log-probabilities; with lanes, the lengths of all prompts.
        """
        hardware = self.choose_hardware()
        if self.policy is not None:
            made_for = self.policy.workload
            if self.policy.lanes is None or workload.lengths is None:
                workload = replace(
                    workload,
                    prompt_len=made_for.prompt_len,
                    num_prompts=made_for.num_prompts,
                    lengths=None,
                )
            workload = replace(workload, expert_skew=made_for.expert_skew)
            policy = replace(self.policy, workload=workload)
            return policy, hardware, source.in_dtype(policy.model.dtype)
        spec = choose_dtype(source.spec, hardware, self.dtype)
        source = source.in_dtype(spec.dtype)
        workload = replace(workload, expert_skew=kept_skew(source))
        policy, hardware = search_policy(hardware, source.spec, workload, self.permitted)
        return policy, hardware, source


def search_policy(
    hardware: HardwareProfile, spec: ModelSpec, workload: Workload, permitted: Permitted
) -> tuple[Policy, HardwareProfile]:
    """Search, and return the policy with the machine that it uses: the GPU may be left out."""
    result = search(hardware, spec, workload, permitted=permitted)
    policy = result.policy
    if policy.lanes is None and policy.workload.lengths is not None:
        # Blocks have one length, and their workloads are cut from this one.
        policy = replace(policy, workload=replace(policy.workload, lengths=None))
    return policy, result.hardware
