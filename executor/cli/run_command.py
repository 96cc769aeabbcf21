"""What the commands that run a model share: a job that was checked, its run and report."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from costmodel.plan.lengths import Lengths
from costmodel.plan.policy import Policy, Prediction
from costmodel.plan.prefixes import Prefixes
from costmodel.plan.workload import Workload
from costmodel.pricing.price import check_fits
from costmodel.schedule.prediction import phase_slowdowns, predict
from executor.checkpoint.folder import WeightSource
from executor.checkpoint.opening import OpenedCheckpoint
from executor.cli.job_options import JobOptions
from executor.cli.lane_bar import LaneBar
from executor.cli.progress_bar import BlockBar, ProgressBar
from executor.cli.run_report import Report, policies_of_blocks
from executor.expert_counts import kept_counts, record_counts
from executor.jobs.endings import RowChooser
from executor.machine.memory_peak import reset_peaks
from executor.model.sampling import Chooser
from executor.run.lane_requests import LaneRequests
from executor.run.page_recorder import Recorders, open_page
from executor.run.prefixes import prefixes_of
from executor.run.recorder import Recorder, open_recorder
from executor.run.results import BlockResult
from executor.run.runner import Runner, check_runnable
from profiles.errors import InputError
from profiles.hardware import HardwareProfile
from profiles.start import called


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that was checked before the first weight is read.

    ``lengths`` are those of each prompt and its output, where prompts differ in them: what a policy
    with lanes is run for. Without them, every output has the length of the policy's workload.
    ``finish`` cuts a block's outputs where its requests have ended. What prompts begin with in
    common is computed once with lanes, unless ``shares_prefixes`` is false. Unless ``runs_here``,
    other machines run it.
    """

    policy: Policy
    hardware: HardwareProfile
    source: WeightSource
    prompts: Sequence[Sequence[int]]
    sampler: Chooser
    eos_ids: frozenset[int] = frozenset()
    finish: Callable[[BlockResult], BlockResult] = lambda block: block
    lengths: Lengths | None = None
    shares_prefixes: bool = True
    runs_here: bool = True

    def __post_init__(self) -> None:
        if self.runs_here:
            check_runnable(self.policy, self.hardware, self.source)

    @classmethod
    def plan(
        cls,
        options: JobOptions,
        source: OpenedCheckpoint,
        prompts: Sequence[Sequence[int]],
        chooser: RowChooser,
        lengths: Lengths,
        *,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> Job:
        """Return the job of continuing prompts, given as token ids.

        ``chooser`` knows where each output ends, and ``lengths`` are those of each. ``logprobs``
        and ``prompt_logprobs`` are those of ``Workload``.
        """
        if options.shares_prefixes:
            lengths = lengths.sharing(prefixes_of(prompts, lengths.limits, source.spec))
        workload = Workload(
            prompt_len=int(lengths.prompts.max()),
            gen_len=int(lengths.limits.max()),
            num_prompts=len(prompts),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            lengths=lengths.sketch(),
        )
        if options.policy is not None:
            _check_lengths(options.policy, prompts)
        policy, hardware, source = options.choose_policy(source, workload)
        return cls(
            policy=policy,
            hardware=hardware,
            source=source,
            prompts=prompts,
            sampler=chooser,
            finish=chooser.finish,
            lengths=lengths,
            shares_prefixes=options.shares_prefixes,
        )

    def predict(self) -> Prediction:
        """Price the policy; raises ``InfeasibleError`` where it does not fit."""
        predicted = predict(self.policy, self.hardware)
        check_fits(predicted, self.hardware)
        return predicted

    @contextmanager
    def recording(self, trace: Path | None, page: Path | None = None) -> Iterator[Recorder | None]:
        """Open the timeline of a run, and its report as a page; they are written when the block
        ends, after all other work."""
        with ExitStack() as stack:
            recorders: list[Recorder] = []
            if page is not None:
                recorders.append(stack.enter_context(open_page(page, self.policy)))
            if trace is not None:
                opened = open_recorder(trace, self._policies_of_blocks(), self.hardware)
                recorders.append(stack.enter_context(opened))
            yield Recorders(recorders) if recorders else None

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
        report = self.begin_report(planned)
        with closing(self.blocks(offload_dir, report, recorder=recorder)) as blocks:
            for block in blocks:
                on_block(block)
        return report

    def begin_report(self, planned: Prediction) -> Report:
        """Return the report that ``blocks`` fills; ``planned`` is what ``predict`` returned."""
        policies = self._policies_of_blocks()
        # Blocks are alike, but for the last one.
        slowdowns = phase_slowdowns(self.policy, self.hardware)
        return Report(
            policy=self.policy,
            hardware=self.hardware,
            planned=planned,
            policies=policies,
            predictions=[predict(policy, self.hardware, slowdowns) for policy in policies],
        )

    def blocks(
        self,
        offload_dir: Path,
        report: Report,
        *,
        recorder: Recorder | None = None,
        shows_progress: bool = True,
    ) -> Generator[BlockResult]:
        """Yield each block as it ends; after the last one, ``report`` is complete.

        The run holds its memory until the last block or until the generator is closed.
        """
        lengths = self._run_lengths()
        bar = self._progress(report, lengths, is_shown=shows_progress)
        reset_peaks()
        counts = kept_counts(self.source)
        runner = Runner(
            self.policy,
            self.hardware,
            self.source,
            offload_dir,
            sampler=self.sampler,
            eos_ids=self.eos_ids,
            progress=bar,
            on_span=recorder.record if recorder else None,
            expert_shares=counts.shares(self.source.spec) if counts else None,
        )
        with bar, runner:
            if recorder:
                recorder.start()
            for block in map(self.finish, self._results(runner, lengths)):
                report.add(block)
                if recorder:
                    recorder.end_block()
                yield block
            report.finish(runner)
            record_counts(self.source, runner.block.routing_counts.by_layer())
        # The run has given its memory back by now.
        if recorder:
            recorder.finish(report.blocks, report.record(), report.start_s)

    def _run_lengths(self) -> Lengths | None:
        return None if self.policy.lanes is None else self.run_lengths()

    def run_lengths(self) -> Lengths:
        """Return the lengths of all requests, with what their prompts share."""
        lengths = self.lengths
        if lengths is None:
            counts = [len(ids) for ids in self.prompts]
            lengths = Lengths(counts, [self.policy.workload.gen_len] * len(counts))
        if not self.shares_prefixes or not self.policy.shares_prefixes:
            return lengths.sharing(Prefixes.none(len(lengths)))
        if lengths.prefixes.of_prompts.any():
            return lengths
        return lengths.sharing(prefixes_of(self.prompts, lengths.limits, self.policy.model))

    def _progress(self, report: Report, lengths: Lengths | None, *, is_shown: bool) -> ProgressBar:
        if lengths is None:
            return BlockBar(
                report.predictions,
                self.policy,
                num_prompts=len(self.prompts),
                has_gpu=self.hardware.has_gpu,
                is_shown=is_shown,
            )
        return LaneBar(self.policy, self.hardware, lengths, is_shown=is_shown)

    def _results(self, runner: Runner, lengths: Lengths | None) -> Iterator[BlockResult]:
        if lengths is None:
            return runner.run(self.prompts)
        requests = LaneRequests(self.prompts, lengths)
        return runner.run_requests(requests, prefixes=lengths.prefixes)

    def _policies_of_blocks(self) -> list[Policy]:
        return policies_of_blocks(self.policy, [len(ids) for ids in self.prompts])


def _check_lengths(policy: Policy, prompts: Sequence[Sequence[int]]) -> None:
    index = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    length = len(prompts[index])
    if length > policy.workload.prompt_len:
        raise InputError(
            f"prompt {index + 1}",
            got=f"{length} tokens",
            allowed=f"{policy.workload.prompt_len}, for which the policy was made",
            hint=f"{called('costmodel.search')} --prompt-len {length}",
        )
