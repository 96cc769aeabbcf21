"""The best pipeline of some nodes in a given order: its cuts, its block size, its policies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from costmodel.cluster.block_passes import BlockPasses
from costmodel.cluster.cuts import MOST_CUTS, Cut, best_cut, even_cut, num_cuts
from costmodel.cluster.estimate import prediction_of, round_of
from costmodel.cluster.nodes import Links, Node
from costmodel.cluster.pipeline import Round
from costmodel.cluster.plan import CopyPlan, StagePlan
from costmodel.cluster.stage_prices import PricedStage, StagePrices
from costmodel.optimizer.choices import Pipeline, batch_sizes
from costmodel.plan.workload import Workload

# Up to so many block sizes are tried with all cuts; of more, those around the best of a grid.
MOST_SIZES = 8
# Sizes of the coarse grid are so many places apart: two places are about twice the size.
COARSE = 4
# Sizes of the cache of lanes (see ``pool_tokens``): for what is expected, and for the longest.
DEVIATIONS = (1.0, math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A pipeline with one cut."""

    pipeline: Pipeline
    cut: Cut
    seconds_per_sequence: float


class PipelineSearch:
    """Searches the pipeline of nodes in the order of their layers.

    Parameters
    ----------
    nodes
        Two or more.
    kinds
        A number for each node: nodes of one kind are machines that are equal.
    workload
        The prompts that the pipeline is to answer.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        kinds: Sequence[int],
        links: Links,
        prices: StagePrices,
        workload: Workload,
    ) -> None:
        self._nodes, self._kinds, self._links, self._prices = nodes, kinds, links, prices
        self._model, self._workload = prices.model, workload

    def estimate(self) -> Option | None:
        """Return the best block size, size of the cache and cut; ``None`` where nothing fits.

        With few block sizes and few cuts, all are tried. Otherwise this is an estimate with a cut
        by the speeds of the nodes, for the best block size of a coarse grid and those around it.
        """
        num_layers, num_stages = self._model.num_layers, len(self._nodes)
        if num_stages > num_layers:
            return None
        sizes = block_sizes(self._workload, num_stages)
        found = []
        for deviations in DEVIATIONS if self._prices.question.only_runnable else (math.inf,):
            pipelines = [
                Pipeline(num_stages=num_stages, block_size=size, deviations=deviations)
                for size in sizes
            ]
            if self._is_small(sizes):
                found += [self._cut(pipeline) for pipeline in pipelines]
            else:
                estimate = self._even if len(set(self._kinds)) > 1 else self._alike
                found.append(min_near(pipelines, estimate))
        best = min(found, key=_seconds)
        return None if math.isinf(best.seconds_per_sequence) else best

    def plan(self, option: Option) -> CopyPlan | None:
        """Return the pipeline of an estimate, also one for similar nodes, with its best cut.

        Its share of the prompts is 1. ``None`` where the block does not fit.
        """
        best = self._cut(option.pipeline)
        return None if math.isinf(best.seconds_per_sequence) else self._plan_of(best)

    def _is_small(self, sizes: Sequence[int]) -> bool:
        cuts = num_cuts(self._model.num_layers, len(self._nodes))
        return len(sizes) <= MOST_SIZES and cuts <= MOST_CUTS

    def _alike(self, pipeline: Pipeline) -> Option:
        """Return the price of equal nodes as if each had a stage in the middle of the model."""
        num_layers, num_stages = self._model.num_layers, len(self._nodes)
        cut = even_cut(num_layers, [1.0] * num_stages)
        count = max(cut)
        first = min((num_layers - count) // 2, num_layers - count - 1)
        stage = self._stage(0, (first, count), pipeline)
        seconds = self._job_seconds(pipeline, [stage] * num_stages if stage else None)
        return Option(pipeline=pipeline, cut=cut, seconds_per_sequence=seconds)

    def _cut(self, pipeline: Pipeline) -> Option:
        start = self._even(pipeline).cut
        return self._option(pipeline, best_cut(start, lambda cut: self._seconds(pipeline, cut)))

    def _even(self, pipeline: Pipeline) -> Option:
        """Return the cut that gives each node layers by its speed in an even cut."""
        num_layers, num_stages = self._model.num_layers, len(self._nodes)
        cut = even_cut(num_layers, [1.0] * num_stages)
        if len(set(self._kinds)) > 1:
            cut = even_cut(num_layers, self._speeds(pipeline, cut))
        return self._option(pipeline, cut)

    def _option(self, pipeline: Pipeline, cut: Cut) -> Option:
        seconds = self._seconds(pipeline, cut)
        return Option(pipeline=pipeline, cut=cut, seconds_per_sequence=seconds)

    def _speeds(self, pipeline: Pipeline, cut: Cut) -> list[float]:
        """Return the layers that each node computes in a second."""
        # Of the middle of the model, so that no node has the embedding or the head.
        first, count = self._model.num_layers // 2 - 1, max(1, min(cut) - 1)
        speeds = []
        for place in range(len(self._nodes)):
            stage = self._stage(place, (first, count), pipeline)
            if stage is None:
                # It has room for few layers, or for none.
                speeds.append(0.0)
                continue
            speeds.append(count / float(stage.seconds @ self._passes(pipeline).counts))
        least = min((speed for speed in speeds if speed), default=1.0)
        return [speed or least / count for speed in speeds]

    def _seconds(self, pipeline: Pipeline, cut: Cut) -> float:
        return self._job_seconds(pipeline, self._stages(pipeline, cut))

    def _job_seconds(self, pipeline: Pipeline, stages: Sequence[PricedStage] | None) -> float:
        """Return the seconds of the job for each of its prompts; infinity where nothing fits."""
        if stages is None:
            return math.inf
        in_round = self._passes(pipeline).num_prompts
        num_prompts = self._workload.num_prompts or in_round
        num_rounds = -(-num_prompts // in_round)
        return self._round(pipeline, stages).seconds * num_rounds / num_prompts

    def _round(self, pipeline: Pipeline, stages: Sequence[PricedStage]) -> Round:
        names = [node.name for node in self._nodes]
        return round_of(stages, names, self._links, self._passes(pipeline))

    def _passes(self, pipeline: Pipeline) -> BlockPasses:
        return self._prices.passes(self._nodes[0].hardware, pipeline, self._workload)

    def _stages(self, pipeline: Pipeline, cut: Cut) -> list[PricedStage] | None:
        stages, first = [], 0
        for place, count in enumerate(cut):
            stage = self._stage(place, (first, count), pipeline)
            if stage is None:
                return None
            stages.append(stage)
            first += count
        return stages

    def _stage(self, place: int, layers: tuple[int, int], pipeline: Pipeline) -> PricedStage | None:
        """Return the best stage of these layers on a node; ``None`` where nothing fits."""
        hardware, kind = self._nodes[place].hardware, self._kinds[place]
        return self._prices.price(hardware, kind, layers, pipeline, self._workload)

    def _plan_of(self, option: Option) -> CopyPlan:
        stages = self._stages(option.pipeline, option.cut)
        assert stages is not None
        found = self._round(option.pipeline, stages)
        tokens = self._workload.mean_output
        layers = zip(accumulate(option.cut, initial=0), option.cut, strict=False)
        return CopyPlan(
            stages=tuple(
                StagePlan(node=node.name, policy=self._prices.policy_of(stage, of_stage))
                for node, stage, of_stage in zip(self._nodes, stages, layers, strict=True)
            ),
            share=1.0,
            predicted=prediction_of(
                found,
                stages,
                self._nodes,
                throughput_tok_per_s=tokens / option.seconds_per_sequence,
            ),
        )


def block_sizes(workload: Workload, num_stages: int) -> list[int]:
    """Return the block sizes to try: those of ``batch_sizes``, no more than the prompts fill."""
    if workload.num_prompts is None:
        return batch_sizes(workload)
    in_block = -(-workload.num_prompts // num_stages)
    return batch_sizes(replace(workload, num_prompts=in_block, lengths=None))


def min_near(pipelines: Sequence[Pipeline], estimate: Callable[[Pipeline], Option]) -> Option:
    """Return the best option of a coarse grid of block sizes, refined around it."""
    found: dict[int, Option] = {}
    tried: Iterable[int] = {0, *range(len(pipelines) - 1, -1, -COARSE)}
    step = COARSE
    while step:
        found |= {place: estimate(pipelines[place]) for place in tried if place not in found}
        best = min(found, key=lambda place: found[place].seconds_per_sequence)
        step //= 2
        tried = range(max(0, best - step), min(len(pipelines), best + step + 1), step or 1)
    return found[best]


def _seconds(option: Option) -> float:
    return option.seconds_per_sequence
