"""The command ``python -m executor.bench``: run random prompts and print the run's figures."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from costmodel.calibration.measured_runs import append_row, check_table, row_of
from costmodel.cli.flags import (
    DEFAULT_GEN_LEN,
    DEFAULT_PROMPT_LEN,
    check_outputs,
    choose_dtype,
    read_permitted,
)
from costmodel.cli.policy_report import format_prediction
from costmodel.cli.work_flags import add_lengths, read_lengths_flag, workload_of
from costmodel.families import preset_names
from costmodel.model.loading import load_model_spec
from costmodel.model.spec import ModelSpec
from costmodel.plan.lengths import Lengths
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from executor.checkpoint.dummy import DummyCheckpoint
from executor.checkpoint.folder import WeightSource
from executor.checkpoint.opening import open_checkpoint
from executor.cli.job_flags import add_job_flags, check_job_flags, choose_hardware, uses_own_profile
from executor.cli.job_options import search_policy
from executor.cli.run_command import Job
from executor.cli.run_report import format_report
from executor.expert_counts import kept_skew
from executor.machine_profile import keep_run
from executor.model.sampling import Sampler
from executor.run.recorder import Recorder
from profiles.command import Parser, run
from profiles.errors import InputError
from profiles.output_checks import output_path


def parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="executor.bench",
        description="Run random prompts, and print the figures as one line of JSON. Each output has"
        " its full length. With a table of lengths, that is max_tokens.",
        example="python -m executor.bench --hardware profile.json --model llama-3.2-3b"
        " --dummy-weights --cpu-memory 4GB",
    )
    add = parser.add_argument
    add(
        "--model",
        help="folder or GGUF file; with --dummy-weights also a preset or a config.json",
    )
    add(
        "--dummy-weights",
        action="store_true",
        help="make random weights, so that no checkpoint is needed",
    )
    add_job_flags(parser)
    add(
        "--prompt-len",
        type=int,
        help=f"tokens of each prompt; not with --policy (default: {DEFAULT_PROMPT_LEN})",
    )
    add(
        "--num-prompts",
        type=int,
        help="number of prompts (default: those of a policy over lanes, or one block)",
    )
    add_lengths(parser)
    add("--seed", type=int, default=0, help="seed of the random prompts (default: 0)")
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="of sampling (default: 0, the likeliest token)",
    )
    add(
        "--runs",
        type=output_path,
        metavar="FILE",
        help="append the run to a table for zigzag calibrate",
    )
    return parser


def main(arguments: list[str]) -> None:
    """Plan, run, print one line; whatever is for people goes to stderr."""
    flags = parser().parse_args(arguments)
    _check_flags(flags)
    with check_outputs(flags, "runs", "trace", "report"):
        if flags.runs is not None:
            check_table(flags.runs)
        job = _plan(flags)
        with job.recording(flags.trace, flags.report) as recorder:
            _run(job, flags, recorder)


def _run(job: Job, flags: argparse.Namespace, recorder: Recorder | None) -> None:
    planned = job.predict()
    text = format_prediction(job.policy, job.hardware, planned)
    print(text, end="\n\n", file=sys.stderr, flush=True)
    report = job.run(flags.offload_dir, planned=planned, recorder=recorder)
    print(format_report(report), file=sys.stderr)
    print(json.dumps(report.as_json()), flush=True)
    if flags.runs is not None:
        append_row(flags.runs, row_of(report.measured_run(), model=_name_of_model(flags.model)))
    if uses_own_profile(flags, job.policy):
        keep_run(report, flags.offload_dir)


def _name_of_model(model: str | None) -> str | None:
    """Return what a table calls the model: found from anywhere where it is a file or a folder."""
    return str(Path(model).resolve()) if model and Path(model).exists() else model


def _check_flags(flags: argparse.Namespace) -> None:
    check_job_flags(flags, "prompt_len")
    if flags.policy and flags.dummy_weights and flags.model is not None:
        raise InputError(
            "--model",
            got="--model together with --policy and --dummy-weights",
            allowed="the model that the policy was made for",
        )
    if flags.model is None and not (flags.policy and flags.dummy_weights):
        raise InputError(
            "--model",
            got="nothing",
            allowed="a checkpoint folder, a GGUF file, or with --dummy-weights a preset",
        )
    if flags.num_prompts is not None and flags.num_prompts < 1:
        raise InputError("--num-prompts", got=flags.num_prompts, allowed="1 or more")


def _plan(flags: argparse.Namespace) -> Job:
    # Also refuses a seed that is out of range.
    sampler = Sampler(temperature=flags.temperature, seed=flags.seed)
    lengths = read_lengths_flag(flags)
    policy = Policy.load(flags.policy) if flags.policy else None
    hardware = choose_hardware(flags, policy)
    if policy is None:
        spec = choose_dtype(_source(flags, None).spec, hardware, flags.dtype)
        workload = workload_of(lengths) if lengths is not None else _equal_lengths(flags)
        workload = replace(workload, expert_skew=kept_skew(_source(flags, spec)))
        policy, hardware = search_policy(hardware, spec, workload, read_permitted(flags))
    work, prompts = policy.workload, flags.num_prompts
    if lengths is None and prompts is None and policy.lanes and work.lengths:
        lengths = work.lengths.lengths()
    if lengths is None:
        # Every prompt has the full length.
        count = prompts or _one_block(policy)
        work = replace(work, num_prompts=count, lengths=None)
        lengths = Lengths([work.prompt_len] * count, [work.gen_len] * count)
    else:
        work = replace(workload_of(lengths), expert_skew=work.expert_skew)
    policy = replace(policy, workload=work)
    return Job(
        policy=policy,
        hardware=hardware,
        source=_source(flags, policy.model),
        prompts=_draw_prompts(policy, lengths, flags.seed),
        sampler=sampler,
        lengths=lengths,
    )


def _equal_lengths(flags: argparse.Namespace) -> Workload:
    return Workload(
        prompt_len=DEFAULT_PROMPT_LEN if flags.prompt_len is None else flags.prompt_len,
        gen_len=DEFAULT_GEN_LEN if flags.gen_len is None else flags.gen_len,
        num_prompts=flags.num_prompts,
    )


def _source(flags: argparse.Namespace, spec: ModelSpec | None) -> WeightSource:
    """Open the weights; ``spec`` is what was planned for, once that is known."""
    if flags.dummy_weights:
        return DummyCheckpoint(spec=spec or load_model_spec(flags.model))
    folder = Path(flags.model)
    if not folder.is_dir() and flags.model.lower() in preset_names():
        raise InputError(
            "--model",
            got=f"{flags.model}, a preset, which has shapes and no weights",
            allowed="a checkpoint folder",
            hint="--dummy-weights",
        )
    return open_checkpoint(folder, dtype=spec.dtype if spec else None)


def _one_block(policy: Policy) -> int:
    """Return the sequences of a block; fewer where the policy was made for fewer."""
    return min(policy.block_size, policy.workload.num_prompts or policy.block_size)


def _draw_prompts(policy: Policy, lengths: Lengths, seed: int) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(policy.model.vocab_size, size=n).tolist() for n in lengths.prompts]


if __name__ == "__main__":
    run(main)
