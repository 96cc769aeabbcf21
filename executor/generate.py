"""The command ``python -m executor.generate``: run a policy over a file of prompts."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from costmodel.flags import DEFAULT_GEN_LEN, choose_dtype
from costmodel.optimum import search
from costmodel.policy import Policy, Prediction
from costmodel.price import check_fits, estimate
from costmodel.report import format_prediction
from costmodel.workload import Workload
from executor.checkpoint import Checkpoint
from executor.machine_profile import machine_profile
from executor.memory_peak import reset_peaks
from executor.offload_folder import check_offload_folder
from executor.progress_bar import ProgressBar
from executor.prompts import Completion, PromptLimits, PromptRecord, read_prompts, write_outputs
from executor.report import Report, format_report, predict_blocks
from executor.runner import BlockResult, Runner, check_runnable
from executor.sampling import Sampler
from executor.text import load_eos_token_ids, load_tokenizer
from profiles.command import Parser, run
from profiles.errors import InputError
from profiles.hardware import HardwareProfile
from profiles.recorded import find_profile


def _parser() -> Parser:
    parser = Parser(
        prog="executor.generate",
        description="Continue every prompt of a file with a model that need not fit the memory.",
        example="python -m executor.generate --policy policy.json --model DIR"
        " --prompts prompts.jsonl --output outputs.jsonl",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint folder")
    add("--prompts", type=Path, required=True, help='lines with "prompt" or "prompt_ids"')
    add("--output", type=Path, default=Path("outputs.jsonl"), help="default: outputs.jsonl")
    add("--policy", type=Path, help="from costmodel.search; without it, one is searched now")
    add("--hardware", help="profile to run under, in place of the policy's or this machine's own")
    add("--offload-dir", type=Path, default=Path(), metavar="DIR", help="default: this folder")
    add("--gen-len", type=int, help=f"tokens to generate, without --policy ({DEFAULT_GEN_LEN})")
    add("--dtype", help="float32, float16 or bfloat16, without --policy; default: the model's")
    parser.add_bytes("--gpu-memory", help="budget, without --policy")
    parser.add_bytes("--cpu-memory", help="budget, without --policy")
    parser.add_bytes("--disk", help="budget, without --policy")
    add("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    add("--top-k", type=int, default=0, help="draw from so many likeliest tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest that make up this much")
    add("--seed", type=int, default=0, help="of the draws (0)")
    add("--ignore-eos", action="store_true", help="go on to the full length always")
    add("--json", action="store_true", help="end with the figures of the run in one line")
    return parser


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that was checked before the first weight is read."""

    policy: Policy
    hardware: HardwareProfile
    source: Checkpoint
    records: Sequence[PromptRecord]
    sampler: Sampler
    eos_ids: frozenset[int]
    decode: Callable[[Sequence[int]], str] | None


def main(arguments: list[str]) -> None:
    """Plan, run, write, report."""
    flags = _parser().parse_args(arguments)
    _check_flags(flags)
    job = _plan(flags)
    predicted = estimate(job.policy, job.hardware)
    check_fits(predicted, job.hardware)
    print(format_prediction(job.policy, job.hardware, predicted), end="\n\n", flush=True)
    report = _run(job, predicted, flags)
    print(format_report(report))
    print(f"\n{len(job.records)} continuations written to {flags.output}")
    if flags.json:
        print(json.dumps(report.as_json()))


def _check_flags(flags: argparse.Namespace) -> None:
    """Refuse what can be refused before any work, and flags that would do nothing."""
    folder = flags.output.parent
    if flags.output.is_dir():
        raise InputError(f"--output {flags.output}", got="a folder", allowed="a file")
    if flags.output.resolve() == flags.prompts.resolve():
        raise InputError(
            f"--output {flags.output}", got="the file of the prompts", allowed="another file"
        )
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(
            f"--output {flags.output}",
            got=f"a folder {folder} that cannot be written",
            allowed="a file in a folder that can",
        )
    if flags.gen_len is not None and flags.gen_len < 1:
        raise InputError("--gen-len", got=flags.gen_len, allowed="1 or more")
    for name in ("gen_len", "dtype", "gpu_memory", "cpu_memory", "disk"):
        if flags.policy and getattr(flags, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                flag,
                got=f"{flag} together with --policy",
                allowed="what the policy was made for",
                hint=f"costmodel.search {flag}",
            )


def _plan(flags: argparse.Namespace) -> Job:
    sampler = Sampler(
        temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p, seed=flags.seed
    )
    policy = Policy.load(flags.policy) if flags.policy else None
    source = Checkpoint.open(flags.model, dtype=policy.model.dtype if policy else None)
    gen_len = policy.workload.gen_len if policy else flags.gen_len or DEFAULT_GEN_LEN
    limits = PromptLimits(
        vocab_size=source.spec.vocab_size, max_positions=source.spec.max_positions, gen_len=gen_len
    )
    tokenizer = cache(partial(load_tokenizer, flags.model))
    records = read_prompts(flags.prompts, limits, tokenizer)
    hardware = _hardware(flags, policy)
    if policy is None:
        spec = choose_dtype(source.spec, hardware, flags.dtype)
        source = Checkpoint.open(flags.model, dtype=spec.dtype)
        policy = _search(hardware, source, records, gen_len)
        # The search may do without the GPU.
        hardware = policy.hardware or hardware
    check_runnable(policy, hardware, source)
    _check_prompts(policy, records)
    has_text = any(record.prompt is not None for record in records)
    return Job(
        policy=policy,
        hardware=hardware,
        source=source,
        records=records,
        sampler=sampler,
        eos_ids=frozenset() if flags.ignore_eos else load_eos_token_ids(flags.model),
        decode=tokenizer().decode if has_text else None,
    )


def _hardware(flags: argparse.Namespace, policy: Policy | None) -> HardwareProfile:
    if flags.hardware is not None:
        hardware = find_profile(flags.hardware)
    elif policy is not None and policy.hardware is not None:
        hardware = policy.hardware
    else:
        check_offload_folder(flags.offload_dir, 0)
        hardware = machine_profile(flags.offload_dir)
    return hardware.with_budget(
        gpu_memory=flags.gpu_memory, cpu_memory=flags.cpu_memory, disk=flags.disk
    )


def _search(
    hardware: HardwareProfile, source: Checkpoint, records: Sequence[PromptRecord], gen_len: int
) -> Policy:
    workload = Workload(
        prompt_len=max(len(record.prompt_ids) for record in records),
        gen_len=gen_len,
        num_prompts=len(records),
    )
    return search(hardware, source.spec, workload).policy


def _check_prompts(policy: Policy, records: Sequence[PromptRecord]) -> None:
    longest = max(records, key=lambda record: len(record.prompt_ids))
    length = len(longest.prompt_ids)
    if length > policy.workload.prompt_len:
        raise InputError(
            f"prompt {longest.index + 1}",
            got=f"{length} tokens",
            allowed=f"{policy.workload.prompt_len}, for which the policy was made",
            hint=f"costmodel.search --prompt-len {length}",
        )


def _run(job: Job, planned: Prediction, flags: argparse.Namespace) -> Report:
    lengths = [len(record.prompt_ids) for record in job.records]
    report = Report(
        policy=job.policy,
        hardware=job.hardware,
        planned=planned,
        predictions=predict_blocks(job.policy, job.hardware, lengths),
    )
    bar = ProgressBar(report.predictions, job.policy, num_prompts=len(lengths))
    done: list[Completion] = []
    reset_peaks()
    runner = Runner(
        job.policy, job.hardware, job.source, flags.offload_dir,
        sampler=job.sampler, eos_ids=job.eos_ids, progress=bar,
    )  # fmt: skip
    try:
        with bar, runner:
            for block in runner.run([record.prompt_ids for record in job.records]):
                finished = [*done, *_completions(block, job)]
                # Whole and in order after every block, so that finished work survives a crash.
                write_outputs(flags.output, finished)
                done = finished
                report.add(block)
            report.finish(runner)
    except BaseException as error:
        # Input is refused before any work, when there is nothing to tell.
        if done or not isinstance(error, InputError):
            kept = f", kept in {flags.output}" if done else ""
            print(f"{len(done)} of {len(lengths)} prompts were finished{kept}", file=sys.stderr)
        raise
    return report


def _completions(block: BlockResult, job: Job) -> Iterator[Completion]:
    for index, ids in block.output_ids.items():
        yield Completion(
            record=job.records[index],
            output_ids=ids,
            text=None if job.decode is None else job.decode(ids),
            finish_reason="stop" if index in block.stopped else "length",
        )


if __name__ == "__main__":
    run(main)
