"""The command ``python -m executor.generate``: run a policy over a file of prompts."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

from costmodel.cli.flags import DEFAULT_GEN_LEN, check_outputs
from costmodel.cli.policy_report import format_prediction
from costmodel.plan.policy import Policy, Prediction
from executor.checkpoint.opening import open_checkpoint
from executor.cli.prompts import Completion, PromptLimits, PromptRecord, read_prompts, write_outputs
from executor.cli.run_command import (
    Job,
    add_job_flags,
    check_job_flags,
    read_job_options,
    uses_own_profile,
)
from executor.cli.run_report import Report, format_report
from executor.cli.sampling_flags import (
    Sampling,
    add_sampling_flags,
    choose_sampling,
    read_sampling_params,
)
from executor.machine_profile import keep_run
from executor.run.recorder import Recorder
from executor.run.results import BlockResult
from executor.text.continuation import decode_continuation
from executor.text.loading import load_generation_config, load_tokenizer
from profiles.command import Parser, run
from profiles.errors import InputError
from profiles.output_checks import output_path
from profiles.outputs import OutputError, OutputFile, is_stream
from profiles.units import format_count

logger = logging.getLogger(__name__)


def parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="executor.generate",
        description="Continue every prompt of a file with a model that may exceed the memory.",
        example="python -m executor.generate --policy policy.json --model DIR"
        " --prompts prompts.jsonl --output outputs.jsonl",
    )
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
        help='JSON lines with "prompt" (text) or "prompt_ids" (tokens)',
    )
    add(
        "--output",
        type=output_path,
        default=Path("outputs.jsonl"),
        help="JSON lines to write (default: outputs.jsonl)",
    )
    add_job_flags(parser)
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
    return parser


class _Outputs:
    """The file of continuations. A context manager, at whose end all that is finished is written.

    A plain file is written whole and in order after every block, so that finished work survives a
    crash. A stream is written once, at the end.
    """

    def __init__(
        self,
        path: Path,
        records: Sequence[PromptRecord],
        decode: Callable[[Sequence[int], Sequence[int]], str] | None,
    ) -> None:
        self.file = OutputFile(path)
        self.records = records
        self.done: list[Completion] = []
        self._decode = decode
        self._num_written = 0

    def __enter__(self) -> _Outputs:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._write()
        except OutputError as late:
            if error is None:
                raise
            # What ended the run is told last, and decides the exit status.
            logger.error("%s", late)

    def add(self, block: BlockResult) -> None:
        """Take what a block generated."""
        self.done.extend(self._completions(block))
        if not is_stream(self.file.path):
            self._write()

    def _write(self) -> None:
        if self._num_written == len(self.done):
            return
        # It is tried once: where that fails, all of it is rescued.
        self._num_written = len(self.done)
        self.file.write(lambda handle: write_outputs(handle, self.done))

    def _completions(self, block: BlockResult) -> Iterator[Completion]:
        for index, ids in block.output_ids.items():
            record = self.records[index]
            yield Completion(
                record=record,
                output_ids=ids,
                text=None if self._decode is None else self._decode(record.prompt_ids, ids),
                finish_reason="stop" if index in block.stopped else "length",
            )


def main(arguments: list[str]) -> None:
    """Plan, run, write, report."""
    flags = parser().parse_args(arguments)
    check_job_flags(flags)
    with check_outputs(flags, "output", "trace", "report"):
        job, outputs, sampling = _plan(flags)
        with job.recording(flags.trace, flags.report) as recorder:
            _generate(job, outputs, sampling, flags, recorder)


def _generate(
    job: Job,
    outputs: _Outputs,
    sampling: Sampling,
    flags: argparse.Namespace,
    recorder: Recorder | None,
) -> None:
    planned = job.predict()
    print(format_prediction(job.policy, job.hardware, planned))
    print(sampling.describe(), end="\n\n", flush=True)
    sampling.warn()
    report = _run(job, planned, outputs, flags, recorder)
    print(format_report(report))
    print(f"\n{format_count(len(outputs.done), 'continuation')} written to {flags.output}")
    if flags.json:
        print(json.dumps(report.as_json() | {"sampling": sampling.as_json()}), flush=True)
    if uses_own_profile(flags, job.policy):
        keep_run(report, flags.offload_dir)


def _plan(flags: argparse.Namespace) -> tuple[Job, _Outputs, Sampling]:
    policy = Policy.load(flags.policy) if flags.policy else None
    source = open_checkpoint(flags.model, dtype=policy.model.dtype if policy else None)
    sampling = choose_sampling(
        read_sampling_params(flags),
        load_generation_config(flags.model),
        vocab_size=source.spec.vocab_size,
        has_length=policy is not None or flags.gen_len is not None,
    )
    gen_len = policy.workload.gen_len if policy else flags.gen_len or DEFAULT_GEN_LEN
    limits = PromptLimits(
        vocab_size=source.spec.vocab_size, max_positions=source.spec.max_positions, gen_len=gen_len
    )
    tokenizer = cache(partial(load_tokenizer, flags.model))
    records = read_prompts(flags.prompts, limits, tokenizer)
    prompts = [record.prompt_ids for record in records]
    options = read_job_options(flags, policy)
    job = Job.plan(options, source, prompts, sampling, gen_len=gen_len)
    has_text = any(record.prompt is not None for record in records)
    decode = partial(decode_continuation, tokenizer()) if has_text else None
    return job, _Outputs(flags.output, records, decode), sampling


def _run(
    job: Job,
    planned: Prediction,
    outputs: _Outputs,
    flags: argparse.Namespace,
    recorder: Recorder | None,
) -> Report:
    try:
        with outputs:
            return job.run(
                flags.offload_dir, planned=planned, recorder=recorder, on_block=outputs.add
            )
    except BaseException as error:
        # Input is refused before any work, when there is nothing to tell.
        if outputs.done or not isinstance(error, InputError):
            kept = f", kept in {outputs.file.kept_in}" if outputs.file.kept_in else ""
            count = f"{len(outputs.done)} of {len(outputs.records)}"
            print(f"{count} prompts were finished{kept}", file=sys.stderr)
        raise


if __name__ == "__main__":
    run(main)
