"""Flags of the commands that run a model: where it runs, in what precision, what it writes."""

from __future__ import annotations

import argparse
from pathlib import Path

from costmodel.cli.flags import DEFAULT_GEN_LEN, add_permitted_flags, read_permitted
from costmodel.plan.policy import Policy
from executor.cli.job_options import PLANNED, JobOptions
from profiles.command import Parser
from profiles.errors import InputError
from profiles.hardware import HardwareProfile
from profiles.output_checks import output_path
from profiles.start import called

# What ``--policy`` takes.
POLICY = "policy from zigzag search"


def add_job_flags(
    parser: Parser, *, gen_len: str = str(DEFAULT_GEN_LEN), on_nodes: bool = False
) -> None:
    """Add the flags that the commands share; ``gen_len`` says what it is by default.

    ``on_nodes`` is a job on several machines, which has no report.
    """
    add = parser.add_argument
    policy = "plan from zigzag cluster search, or a policy for every node" if on_nodes else POLICY
    add_offload_flags(parser, policy=policy)
    add("--gen-len", type=int, help=f"tokens to generate; not with --policy (default: {gen_len})")
    add(
        "--trace",
        type=output_path,
        metavar="FILE",
        help="write a timeline for ui.perfetto.dev, "
        + ("with the tasks of all nodes" if on_nodes else "measured beside simulated"),
    )
    if not on_nodes:
        add(
            "--report",
            type=output_path,
            metavar="FILE",
            help="write a report of the run, as .html",
        )


def add_offload_flags(parser: Parser, *, policy: str = POLICY) -> None:
    """Add the flags that say where a model runs, and in what precision."""
    add = parser.add_argument
    add("--policy", type=Path, help=f"{policy} (default: search one now)")
    add(
        "--hardware",
        help="profile file or recorded machine (default: that of the policy, else of this machine)",
    )
    add(
        "--offload-dir",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder for data on disk (default: the current folder)",
    )
    add(
        "--dtype",
        help="float32, float16 or bfloat16; not with --policy (default: that of the model)",
    )
    add_permitted_flags(parser)
    parser.add_bytes(
        "--gpu-memory", help="GPU memory to use; not with --policy (default: what is free)"
    )
    parser.add_bytes(
        "--cpu-memory", help="CPU memory to use; not with --policy (default: what is free)"
    )
    parser.add_bytes("--disk", help="disk space to use; not with --policy (default: what is free)")


def check_job_flags(flags: argparse.Namespace, *planned: str) -> None:
    """Refuse what can be refused before any work, and flags that would do nothing.

    ``planned`` names further flags that a policy has an answer to.
    """
    gen_len = getattr(flags, "gen_len", None)
    if gen_len is not None and gen_len < 1:
        raise InputError("--gen-len", got=gen_len, allowed="1 or more")
    for name in ("gen_len", *PLANNED, *planned):
        if flags.policy and getattr(flags, name, None) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                flag,
                got=f"{flag} together with --policy",
                allowed="what the policy was made for",
                hint=f"{called('costmodel.search')} {flag}",
            )


def read_job_options(flags: argparse.Namespace, policy: Policy | None) -> JobOptions:
    """Return what the flags say; ``policy`` was read from the file that they name."""
    return JobOptions(
        policy=policy,
        hardware=flags.hardware,
        offload_dir=flags.offload_dir,
        gpu_memory=flags.gpu_memory,
        cpu_memory=flags.cpu_memory,
        disk=flags.disk,
        dtype=flags.dtype,
        permitted=read_permitted(flags),
    )


def choose_hardware(flags: argparse.Namespace, policy: Policy | None) -> HardwareProfile:
    """Return the profile asked for, else the policy's, else this machine's own."""
    return read_job_options(flags, policy).choose_hardware()


def uses_own_profile(flags: argparse.Namespace, policy: Policy) -> bool:
    """Whether a run's policy was priced with the profile that this machine keeps of itself."""
    given = policy if flags.policy else None
    return JobOptions(policy=given, hardware=flags.hardware).uses_own_profile
