"""The command ``python -m executor.generate``: run a policy over a file of prompts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from costmodel.cli.flags import check_outputs
from costmodel.cli.policy_report import format_prediction
from costmodel.cli.work_flags import add_expected_len, check_expected_len
from costmodel.plan.policy import Policy
from executor.cli.job_flags import (
    add_job_flags,
    check_job_flags,
    read_job_options,
    uses_own_profile,
)
from executor.cli.run_report import format_report
from executor.cli.sampling_flags import add_sampling_flags, read_sampling_params
from executor.jobs.job_run import JobFlags, JobRun
from executor.machine_profile import keep_run
from executor.run.recorder import Recorder
from profiles.command import Parser, run
from profiles.errors import InfeasibleError, InputError
from profiles.output_checks import output_path
from profiles.outputs import is_stream
from profiles.units import format_count


def parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="executor.generate",
        description="Continue every prompt of a file with a model that may exceed the memory.",
        example="python -m executor.generate --policy policy.json --model DIR"
        " --prompts prompts.jsonl --output outputs.jsonl",
    )
    add_generate_flags(parser)
    return parser


def add_generate_flags(parser: Parser, *, on_nodes: bool = False) -> None:
    """Add the flags of a job from file to file; ``on_nodes`` is one on several machines."""
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        required=True,
        metavar="PATH",
        help="Hugging Face folder, or GGUF file",
    )
    add(
        "--prompts",
        type=Path,
        required=True,
        help='JSON lines with "prompt" (text) or "prompt_ids" (tokens), or a batch file of'
        " OpenAI's API; plain, gzip or zstd",
    )
    add(
        "--output",
        type=output_path,
        default=Path("outputs.jsonl"),
        help="JSON lines to write (default: outputs.jsonl)",
    )
    add(
        "--errors",
        type=output_path,
        metavar="FILE",
        help="lines that cannot be run (default: beside the output, as outputs.errors.jsonl)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with a job that was ended early, by the journal beside its output",
    )
    add("--strict", action="store_true", help="run nothing if any line cannot be run")
    add(
        "--no-shared-prefixes",
        action="store_true",
        help="compute what prompts begin with in common for each of them, to compare",
    )
    add_job_flags(parser, on_nodes=on_nodes)
    add_expected_len(parser, otherwise="as in earlier runs, else as long as it may be")
    add_sampling_flags(parser)
    add(
        "--ignore-eos",
        action="store_true",
        help="ignore end tokens and generate to the full length",
    )
    add(
        "--json",
        action="store_true",
        help="print the figures of the run as one line of JSON at the end",
    )


def check_generate_flags(flags: argparse.Namespace) -> None:
    """Refuse what can be refused before any work, and name the file of errors."""
    check_job_flags(flags)
    check_expected_len(flags.expected_len)
    if flags.errors is None and not is_stream(flags.output):
        flags.errors = flags.output.with_name(f"{flags.output.stem}.errors{flags.output.suffix}")


def read_job_flags(flags: argparse.Namespace) -> JobFlags:
    """Return what the flags say of the job."""
    return JobFlags(
        model=flags.model,
        prompts=flags.prompts,
        output=flags.output,
        errors=flags.errors,
        params=read_sampling_params(flags),
        gen_len=flags.gen_len,
        expected_len=flags.expected_len,
        is_strict=flags.strict,
        resumes=flags.resume,
    )


def main(arguments: list[str]) -> None:
    """Plan, run, write, report."""
    flags = parser().parse_args(arguments)
    check_generate_flags(flags)
    with check_outputs(flags, "output", "errors", "trace", "report"):
        policy = Policy.load(flags.policy) if flags.policy else None
        options = replace(
            read_job_options(flags, policy), shares_prefixes=not flags.no_shared_prefixes
        )
        with JobRun(read_job_flags(flags), options) as job:
            if job.prompts:
                with job.job.recording(flags.trace, flags.report) as recorder:
                    _generate(job, flags, recorder)
            else:
                tell_nothing_left(job, flags)


def tell_nothing_left(job: JobRun, flags: argparse.Namespace) -> None:
    """Finish a job all of whose prompts are answered."""
    tell_lines(job, flags)
    job.complete()
    print(f"nothing was left to do: all answers are in {flags.output}")


def _generate(job: JobRun, flags: argparse.Namespace, recorder: Recorder | None) -> None:
    planned = job.job.predict()
    print(format_prediction(job.job.policy, job.job.hardware, planned))
    print(job.sampling.describe(), end="\n\n", flush=True)
    job.sampling.warn()
    tell_lines(job, flags)
    with early_end_told(job):
        report = job.run(planned, recorder)
    print(format_report(report))
    tell_summary(job, flags)
    if flags.json:
        told = {"sampling": job.sampling.as_json(), "job": job.summary.as_json()}
        print(json.dumps(report.as_json() | told), flush=True)
    if uses_own_profile(flags, job.job.policy):
        keep_run(report, flags.offload_dir)


def tell_lines(job: JobRun, flags: argparse.Namespace) -> None:
    """Tell the lines that cannot be run, and what an earlier run has answered."""
    job.tell_errors()
    if flags.resume:
        print(job.describe_resumed(), file=sys.stderr)


def tell_summary(job: JobRun, flags: argparse.Namespace) -> None:
    """Print what was answered, and where."""
    print(job.summary.describe())
    print(f"\n{format_count(job.answers.num_done, 'continuation')} written to {flags.output}")


@contextmanager
def early_end_told(job: JobRun) -> Iterator[None]:
    """Run the block with the answers open, and tell what is finished where it fails."""
    try:
        with job.answers:
            yield
    except BaseException as error:
        # Input and policies are refused before any work, when there is nothing to tell.
        if job.answers.num_done or not isinstance(error, (InputError, InfeasibleError)):
            print(job.describe_early_end(), file=sys.stderr)
        raise


if __name__ == "__main__":
    run(main)
