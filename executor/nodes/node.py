"""What the process of a node does when it is asked. Ray makes an actor of it."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from costmodel.plan.workload import Workload
from costmodel.pricing.price import check_fits
from costmodel.schedule.prediction import predict
from executor.checkpoint.opening import open_checkpoint
from executor.cli.job_options import JobOptions
from executor.engine.trace import Span, SpanLog
from executor.machine_profile import machine_profile
from executor.nodes.copy_engine import CopyEngine
from executor.nodes.facts import NodeFacts, check_alike, own_facts
from executor.nodes.share import Handed, NodeJob, NodeNews, NodePlan, StageJob
from executor.nodes.stage_engine import StageLoading
from executor.run.stage_run import StagePass, StageResult
from executor.stores.pass_rows import RowBytes
from profiles.hardware import HardwareProfile

Message = npt.NDArray[np.uint8]


class NodeProcess:
    """The process of one node of a cluster."""

    def __init__(self) -> None:
        self._engine: CopyEngine | None = None
        self._stage: StageLoading | None = None
        self._spans = SpanLog(0)

    def facts(self, model: Path | None) -> NodeFacts:
        """Return what this machine is."""
        return own_facts(model)

    def profile(self, offload_dir: Path) -> HardwareProfile:
        """Return this machine's profile, measured once and kept here."""
        offload_dir.mkdir(parents=True, exist_ok=True)
        return machine_profile(offload_dir)

    def message(self, num_bytes: int) -> Message:
        """Return so many bytes, to measure a link with."""
        return np.zeros(num_bytes, np.uint8)

    def relay(self, message: Message) -> Message:
        """Return a message as long as the one that came."""
        return np.zeros_like(message)

    def clock(self) -> float:
        """Return the seconds of the clock that tasks are noted by."""
        return time.perf_counter()

    def spans(self) -> list[Span]:
        """Return the first tasks of the run, as many as the job asks for."""
        return self._spans.spans

    def plan(self, model: Path, options: JobOptions, workload: Workload) -> NodePlan:
        """Plan the whole job on this node alone; raises ``InfeasibleError`` where it cannot run."""
        options.offload_dir.mkdir(parents=True, exist_ok=True)
        dtype = options.policy.model.dtype if options.policy else options.dtype
        source = open_checkpoint(model, dtype=dtype)
        policy, hardware, _ = options.choose_policy(source, workload)
        predicted = predict(policy, hardware)
        check_fits(predicted, hardware)
        return NodePlan(policy=policy, hardware=hardware, predicted=predicted)

    def start(self, job: NodeJob) -> NodeNews:
        """Begin to load the weights, and then to answer requests."""
        self._spans = SpanLog(job.num_spans)
        self._engine = CopyEngine(job, self._spans.record)
        self._engine.start()
        return NodeNews()

    def start_pipeline(
        self, job: NodeJob, stages: Sequence[Any], stage_jobs: Sequence[StageJob]
    ) -> NodeNews:
        """Begin to direct the stages of a pipeline."""
        from executor.nodes.pipeline_engine import PipelineEngine

        self._engine = PipelineEngine(job, stages, stage_jobs)
        self._engine.start()
        return NodeNews()

    def open_stage(self, job: StageJob) -> None:
        """Begin to load the weights of a stage; raises ``InputError`` where this node has other
        ones."""
        # It may have taken the place of a node that was asked for its facts.
        check_alike(
            [("the command's machine", job.facts), (platform.node(), self.facts(job.model))],
            job.model,
        )
        job.offload_dir.mkdir(parents=True, exist_ok=True)
        self._spans = SpanLog(job.num_spans)
        self._stage = StageLoading(job, self._spans.record)

    def loading_beats(self) -> int | None:
        """Return what ``StageLoading.beats`` does."""
        assert self._stage is not None
        return self._stage.beats()

    def stage_pass(
        self, told: StagePass, rows: RowBytes | None, chosen: Sequence[Handed] = ()
    ) -> RowBytes | StageResult:
        """Run a pass of the stage; ``chosen`` are requests whose tokens it will choose."""
        assert self._stage is not None
        return self._stage.stage().run_pass(told, rows, chosen)

    def close_stage(self) -> None:
        """Give back what the stage holds; its tasks stay noted."""
        assert self._stage is not None
        self._stage.stage().close()
        self._stage = None

    def exchange(self, handed: Sequence[Handed], seconds: float) -> NodeNews:
        """Take requests, and return what has happened since the last call, or after ``seconds``."""
        assert self._engine is not None
        return self._engine.exchange(handed, seconds)
