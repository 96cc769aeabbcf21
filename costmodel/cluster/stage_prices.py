"""Stages of pipelines with their best policies, and the seconds of their passes."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import numpy as np

from costmodel.cluster.block_passes import BlockPasses, passes_in_step, passes_of_lanes
from costmodel.cluster.question import ClusterQuestion
from costmodel.cluster.stage_search import admission_policy, stage_policies
from costmodel.cluster.stages import stage_model
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import Pipeline
from costmodel.optimizer.optimum import Search
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from costmodel.pricing.passes import FloatArray
from costmodel.pricing.price import stage_seconds
from costmodel.schedule.job_simulation import JobTimeline, simulate_job
from profiles.hardware import HardwareProfile


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PricedStage:
    """A stage by its policy, with the seconds of its passes.

    Parameters
    ----------
    seconds
        Of each pass over a block, float64 [passes].
    timeline
        Of lanes, the job of the first of ``BlockPasses.jobs`` on this stage.
    """

    policy: Policy
    seconds: FloatArray
    timeline: JobTimeline | None = None


class StagePrices:
    """Remembers the stages that were priced: equal ones on equal machines are searched once."""

    def __init__(self, question: ClusterQuestion) -> None:
        self.question = question
        self.model = question.model
        # In step, each sequence counts as the longest.
        self._in_step = replace(question.workload, num_prompts=None, lengths=None)
        self._found: dict[Hashable, PricedStage | None] = {}
        self._passes: dict[Hashable, BlockPasses] = {}
        self._stages: dict[tuple[int, int], tuple[ModelSpec, int]] = {}
        self._alike: dict[Hashable, int] = {}

    def passes(
        self, hardware: HardwareProfile, pipeline: Pipeline, workload: Workload
    ) -> BlockPasses:
        """Return the passes of a block of a pipeline that answers ``workload``.

        ``hardware`` is any machine of it.
        """
        key = pipeline, workload.num_prompts
        if key not in self._passes:
            if self.question.only_runnable:
                policy = admission_policy(self.model, pipeline, self.question.workload)
                self._passes[key] = passes_of_lanes(policy, hardware, workload)
            else:
                self._passes[key] = passes_in_step(self._in_step, pipeline)
        return self._passes[key]

    def price(
        self,
        hardware: HardwareProfile,
        kind: int,
        layers: tuple[int, int],
        pipeline: Pipeline,
        workload: Workload,
    ) -> PricedStage | None:
        """Return the best policy of a stage; ``None`` where nothing fits.

        Parameters
        ----------
        kind
            A number that stands for the machine.
        layers
            The stage's first layer and the number of its layers.
        workload
            The prompts that the pipeline answers.
        """
        model, number = self._stage(layers)
        # A round in step is the same for any number of prompts.
        answered = workload.num_prompts if self.question.only_runnable else None
        key = (kind, number, pipeline, answered)
        if key not in self._found:
            search = self._search_lanes if self.question.only_runnable else self._search_in_step
            self._found[key] = search(hardware, model, pipeline, workload)
            self.question.on_searched()
        return self._found[key]

    def policy_of(self, found: PricedStage, layers: tuple[int, int]) -> Policy:
        """Return the policy of a stage, which may have been found for an equal one elsewhere."""
        return replace(found.policy, model=self._stage(layers)[0])

    def _stage(self, layers: tuple[int, int]) -> tuple[ModelSpec, int]:
        """Return a stage, and a number that equal stages share.

        The place of a stage does not matter, but for the embedding and the head.
        """
        if layers not in self._stages:
            model = stage_model(self.model, *layers)
            alike = (replace(model, stage=None), model.has_embedding, model.has_head)
            number = self._alike.setdefault(alike, len(self._alike))
            self._stages[layers] = model, number
        return self._stages[layers]

    def _search_in_step(
        self, hardware: HardwareProfile, model: ModelSpec, pipeline: Pipeline, workload: Workload
    ) -> PricedStage | None:
        margin = self.question.margin
        search = Search(hardware, model, self._in_step, margin=margin, pipeline=pipeline)
        result = search.run_in_step(self.question.permitted)
        return None if result is None else price_stage(result.policy, result.hardware)

    def _search_lanes(
        self, hardware: HardwareProfile, model: ModelSpec, pipeline: Pipeline, workload: Workload
    ) -> PricedStage | None:
        passes = self.passes(hardware, pipeline, workload)
        policies = stage_policies(hardware, model, pipeline, self.question)
        priced = [price_lanes(policy, hardware, passes) for policy in policies]
        return min(priced, key=lambda stage: stage.seconds @ passes.counts, default=None)


def price_stage(policy: Policy, hardware: HardwareProfile) -> PricedStage:
    """Return the seconds of the passes of a stage in step, with any policy."""
    seconds = [found / stage.passes for stage, found in stage_seconds(policy, hardware)]
    return PricedStage(policy=policy, seconds=np.array(seconds))


def price_lanes(policy: Policy, hardware: HardwareProfile, passes: BlockPasses) -> PricedStage:
    """Return the seconds of the passes of a stage over lanes, with any policy."""
    timelines = [
        simulate_job(policy, hardware, lengths, trace=trace) for lengths, trace in passes.jobs
    ]
    seconds = np.concatenate([timeline.seconds for timeline in timelines])
    return PricedStage(policy=policy, seconds=seconds, timeline=timelines[0])
