"""A job from its files to its files: read, planned, run, and gone on with."""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from costmodel.cli.flags import DEFAULT_GEN_LEN
from costmodel.plan.policy import Prediction
from costmodel.plan.prefixes import Prefixes
from executor.checkpoint.opening import OpenedCheckpoint, open_checkpoint
from executor.cli.job_options import JobOptions
from executor.cli.run_command import Job
from executor.cli.run_report import Report
from executor.cli.sampling_flags import Sampling, choose_sampling
from executor.jobs.answers import AnswerFile
from executor.jobs.endings import RowChooser
from executor.jobs.input_file import InputFile
from executor.jobs.journal import Journal, journal_path, refuse_unfinished
from executor.jobs.limits import RequestLimits
from executor.jobs.lines import PromptLines
from executor.jobs.openai import BatchLines
from executor.jobs.params import ParamsMaker
from executor.jobs.planning import (
    check_same_job,
    manifest_of,
)
from executor.jobs.reading import Form, ReadJob, read_job
from executor.jobs.row_plan import RowPlanner
from executor.jobs.summary import JobSummary, KeptLengths
from executor.jobs.writing import AnswerMaker, AnswerStream
from executor.machine.energy import EnergyMeter
from executor.model.sampling_params import SamplingParams
from executor.run.finished import Finished
from executor.run.prefixes import prefixes_of
from executor.run.recorder import Recorder
from executor.text.loading import load_generation_config, load_template, load_tokenizer
from profiles.errors import InputError
from profiles.outputs import is_stream, write_output
from profiles.units import format_count

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFlags:
    """What a user says of a job beside how it is planned.

    Parameters
    ----------
    model, prompts, output
        The files.
    errors
        File of lines that cannot be run; ``None`` tells all of them as messages.
    params
        Settings of lines that leave them open.
    gen_len
        Tokens to generate where a line does not say; ``None`` takes the policy's number, or 32.
    expected_len
        Tokens that outputs are expected to have; ``None`` expects as many as each may have.
    is_strict
        Whether nothing runs where any line cannot.
    resumes
        Whether to go on with a job that was ended early.
    """

    model: Path
    prompts: Path
    output: Path
    errors: Path | None = None
    params: SamplingParams
    gen_len: int | None = None
    expected_len: int | None = None
    is_strict: bool = False
    resumes: bool = False


class JobRun:
    """A job that was read and planned, with its open files. A context manager.

    Attributes
    ----------
    read
        Its lines.
    prompts
        The requests that are left.
    job
        Their run.
    sampling
        What holds where lines leave it open.
    summary
        Figures of ``run``.

    Raises
    ------
    InputError
        For anything that cannot be run, or that is no longer the job to go on with.
    """

    def __init__(self, flags: JobFlags, options: JobOptions) -> None:
        self.flags = flags
        self._options = options
        with ExitStack() as stack:
            journal = self._old_journal()
            old = journal.manifest if journal else None
            self._file = stack.enter_context(InputFile(flags.prompts, options.offload_dir))
            self.answers: AnswerFile | AnswerStream
            dtype = options.policy.model.dtype if options.policy else None
            source = open_checkpoint(flags.model, dtype=dtype)
            created = int(old["created"]) if old else int(time.time())
            self.read, self.sampling = self._read(source, created)
            if is_stream(flags.output):
                self.answers = AnswerStream(flags.output, keeps_order=self.read.form.keeps_order)
            else:
                self.answers = AnswerFile(flags.output, journal)
            stack.enter_context(self.answers)
            self.job = self._plan(source, old)
            self.manifest = manifest_of(
                self.read,
                self.job.policy,
                model=self.job.source.fingerprint,
                sampling=self._told_sampling(),
                created=created,
            )
            if old is not None:
                check_same_job(self.read, self.manifest, old, str(journal_path(flags.output)))
            self.summary = JobSummary(failed=len(self.read.table.errors))
            self._stack = stack.pop_all()

    def __enter__(self) -> JobRun:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def num_lines(self) -> int:
        """Lines that can be run."""
        return self.read.table.num_lines - len(self.read.table.errors)

    def run(self, planned: Prediction, recorder: Recorder | None = None) -> Report:
        """Run what is left, and write each answer as its requests end."""
        with self.answering() as take, EnergyMeter(has_gpu=self.job.hardware.uses_cuda) as meter:
            report = self.job.run(
                self._options.offload_dir,
                planned=planned,
                recorder=recorder,
                on_block=lambda block: take(block.finished),
            )
        self.summary.energy_j = meter.joules
        return report

    @contextmanager
    def answering(self) -> Iterator[Callable[[Sequence[Finished]], None]]:
        """Write the answers of requests that have ended; yields what takes them.

        At the end of the block, the outputs are finished. After an error they are kept as they are.
        """
        maker = AnswerMaker(self.read, self._file, self.prompts, self.answers)
        self.answers.begin(self.manifest)
        before = self.answers.num_done

        kept = KeptLengths()

        def take(finished: Sequence[Finished]) -> None:
            maker.take(finished)
            for done in finished:
                row = self.prompts.rows[done.request]
                if self.read.table.params(row).may_end_early:
                    kept.add(self.read.table.prompt_len(row), done)
                self.summary.prompt_tokens += len(self.prompts[done.request])
                self.summary.output_tokens += done.num_generated

        yield take
        if self._options.uses_own_profile:
            kept.keep(self.job.policy.model)
        self.complete()
        self.summary.answered = self.answers.num_done - before

    def complete(self) -> None:
        """Finish the outputs of a job of which nothing is left."""
        self.answers.begin(self.manifest)
        self.answers.complete(keeps_order=self.read.form.keeps_order)

    def tell_errors(self) -> None:
        """Write the lines that cannot be run to their file, and tell of the first."""
        errors, path = self.read.table.errors, self.flags.errors
        if path is None:
            for error in errors:
                logger.warning("%s", error.message)
            return
        if not errors:
            # An earlier job's would be taken for this one's.
            if path.is_file():
                path.unlink()
            return
        lines = [self.read.form.refusal(error) + "\n" for error in errors]
        write_output(path, lambda handle: handle.writelines(lines))
        count = format_count(self.read.table.num_lines, "line")
        first = errors[0].message
        logger.warning("%d of %s cannot be run, see %s; first: %s", len(errors), count, path, first)

    def describe_resumed(self) -> str:
        """Say what is there already, and what was there before and is not now."""
        told = f"{self.answers.num_done} of {self.num_lines} prompts are answered already"
        if self.answers.num_dropped:
            told += f"; {self.answers.num_dropped} more were, and are gone from {self.flags.output}"
        return told

    def describe_early_end(self) -> str:
        """Say what is finished of a run that was ended early."""
        count = self.answers.num_done
        told = f"{count} of {self.num_lines} prompts were finished"
        kept = self.answers.kept_in if count else None
        told += f", kept in {kept}" if kept else ""
        return told + ("; --resume goes on" if count and self.answers.can_go_on else "")

    def _old_journal(self) -> Journal | None:
        output = self.flags.output
        if is_stream(output):
            if self.flags.resumes:
                raise InputError("--resume", got="a pipe or a device", allowed="a plain file")
            return None
        if self.flags.resumes:
            return Journal.read(output) if may_resume(output) else None
        refuse_unfinished(output)
        return None

    def _read(self, source: OpenedCheckpoint, created: int) -> tuple[ReadJob, Sampling]:
        flags, policy = self.flags, self._options.policy
        config, spec = load_generation_config(flags.model), source.spec
        gen_len = policy.workload.gen_len if policy else flags.gen_len or DEFAULT_GEN_LEN
        self._gen_len = gen_len
        sampling = choose_sampling(
            flags.params,
            config,
            vocab_size=spec.vocab_size,
            has_length=policy is not None or flags.gen_len is not None,
        )
        limits = RequestLimits(
            vocab_size=spec.vocab_size,
            max_positions=spec.max_positions,
            prompt_len=policy.workload.prompt_len if policy else None,
            gen_len=policy.workload.gen_len if policy else None,
        )
        maker = ParamsMaker(flags.params, config, vocab_size=spec.vocab_size, gen_len=gen_len)
        tokenizer = self._tokenizer = cache(partial(load_tokenizer, flags.model))
        plain = PromptLines(limits, maker, tokenizer)
        batch = BatchLines(
            limits,
            maker,
            tokenizer,
            cache(partial(load_template, flags.model)),
            model=flags.model.name,
            created=created,
        )
        forms: list[Form] = [plain, batch]
        read = read_job(self._file, forms, is_strict=flags.is_strict)
        return read, sampling

    def _rows_left(self) -> Iterable[int]:
        done = set(self.answers.lines)
        table = self.read.table
        return (
            row
            for line in range(table.num_lines)
            if line not in done
            for row in table.rows_of(line)
        )

    def _plan(self, source: OpenedCheckpoint, old: dict[str, Any] | None) -> Job:
        table = self.read.table
        planner = RowPlanner(
            read=self.read,
            file=self._file,
            options=self._options,
            source=source,
            old=old,
            expected_len=self.flags.expected_len,
            is_strict=self.flags.is_strict,
            prefixes=self._prefixes(source),
        )
        planned = planner.plan(array("Q", self._rows_left()))
        self.prompts, rows = planned.prompts, planned.prompts.rows
        chooser = RowChooser(
            lambda request: table.params(rows[request]),
            lambda request: table.identities[rows[request]],
            lambda ids: self._tokenizer().decode(ids),
        )
        return Job(
            policy=planned.policy,
            hardware=planned.hardware,
            source=planned.source,
            prompts=self.prompts,
            sampler=chooser,
            finish=chooser.finish,
            lengths=planned.lengths,
            shares_prefixes=self._options.shares_prefixes,
            runs_here=self._options.runs_here,
        )

    def _prefixes(self, source: OpenedCheckpoint) -> Prefixes | None:
        """Return what all requests of the job share."""
        table = self.read.table
        if not self._options.shares_prefixes or not table.num_rows:
            return None
        rows = range(table.num_rows)
        limits = [table.params(row).max_tokens for row in rows]
        return prefixes_of(map(table.prompt_ids, rows), limits, source.spec)

    def _told_sampling(self) -> dict[str, Any]:
        told = self.sampling.as_json() | {"gen_len": self._gen_len}
        # Where the settings were read does not matter.
        return {key: value for key, value in told.items() if key != "generation_config"}


def may_resume(output: Path) -> bool:
    """Whether there is anything to go on with: a first run may ask for it, too, and so may the next
    one where the first has left no answer."""
    has_answers = output.exists() and output.stat().st_size > 0
    return has_answers or journal_path(output).exists()
