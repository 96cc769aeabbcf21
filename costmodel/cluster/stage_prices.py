"""The best policy of each stage of a pipeline, with its seconds; each different stage once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from costmodel.cluster.pipeline import StageSeconds
from costmodel.cluster.stages import stage_model
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import Permitted, Pipeline
from costmodel.optimizer.optimum import Search
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from costmodel.pricing.price import stage_seconds
from costmodel.pricing.stages import decode_segments
from profiles.hardware import HardwareProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedStage:
    """The best policy of a stage at one block size, and the seconds of its passes."""

    policy: Policy
    seconds: StageSeconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What all searches for a cluster share.

    Parameters
    ----------
    permitted
        Approximations that change outputs.
    margin
        Share of every capacity that is left free.
    only_runnable
        Whether to leave out stages that can be priced but not run: those with a GPU, or with cache
        or hidden states on disk.
    """

    model: ModelSpec
    workload: Workload
    permitted: Permitted
    margin: float
    only_runnable: bool = False


class StagePrices:
    """Searches for the policies of stages; equal stages on equal machines are searched once."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.model = question.model
        # Sequences run in step, so that each counts as the longest.
        self.workload = replace(question.workload, num_prompts=None, lengths=None)
        self._found: dict[Hashable, PricedStage | None] = {}
        self._stages: dict[tuple[int, int], tuple[ModelSpec, int]] = {}
        self._alike: dict[Hashable, int] = {}

    def price(
        self, hardware: HardwareProfile, kind: int, layers: tuple[int, int], pipeline: Pipeline
    ) -> PricedStage | None:
        """Return the best policy of a stage; ``None`` where nothing fits.

        Parameters
        ----------
        kind
            A number that stands for the machine.
        layers
            The stage's first layer and the number of its layers.
        """
        model, number = self._stage(layers)
        key = (kind, number, pipeline)
        if key not in self._found:
            self._found[key] = self._search(hardware, model, pipeline)
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

    def _search(
        self, hardware: HardwareProfile, model: ModelSpec, pipeline: Pipeline
    ) -> PricedStage | None:
        question = self.question
        if question.only_runnable:
            hardware = hardware.with_budget(gpu_memory=0)
        search = Search(hardware, model, self.workload, margin=question.margin, pipeline=pipeline)
        result = search.run_in_step(question.permitted)
        if result is None:
            return None
        in_memory = result.policy.cache.cpu == result.policy.activations.cpu == 1
        if question.only_runnable and not in_memory:
            return None
        return price_stage(result.policy, result.hardware)


def price_stage(policy: Policy, hardware: HardwareProfile) -> PricedStage:
    """Return the seconds of the passes of a stage with any policy."""
    prefill, *decode = stage_seconds(policy, hardware)
    seconds = StageSeconds(
        prefill=prefill[1], decode=tuple(seconds / stage.passes for stage, seconds in decode)
    )
    return PricedStage(policy=policy, seconds=seconds)


def segment_passes(workload: Workload) -> tuple[float, ...]:
    """Return the passes of each segment of decode, which are those of every stage."""
    return tuple(float(end - first) for first, end in decode_segments(workload))
