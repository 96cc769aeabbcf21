"""What single nodes and pipelines of a cluster can do; remembered for similar clusters."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from costmodel.cluster.nodes import Links, Node
from costmodel.cluster.pipeline_search import PipelineSearch
from costmodel.cluster.plan import CopyPlan, CopyPrediction, StagePlan
from costmodel.cluster.question import ClusterQuestion
from costmodel.cluster.stage_prices import StagePrices
from costmodel.optimizer.optimum import Search, SearchResult
from costmodel.plan.workload import Workload
from profiles.errors import InfeasibleError
from profiles.hardware import HardwareProfile


class TeamPrices:
    """Searches for the policies of teams. A team of nodes runs one copy of the model together."""

    def __init__(self, question: ClusterQuestion) -> None:
        self.question = question
        self._stages = StagePrices(question)
        # Machines that are equal are of one kind, by the place in this list.
        self._machines: list[HardwareProfile] = []
        self._alone: dict[Hashable, SearchResult | InfeasibleError] = {}

    def kind_of(self, hardware: HardwareProfile) -> int:
        """Return the number of a kind of machines; names and samples do not matter."""
        plain = replace(hardware, measurements=(), name="", source="", date="", versions={})
        if plain not in self._machines:
            self._machines.append(plain)
        return self._machines.index(plain)

    def pipeline(self, nodes: Sequence[Node], links: Links, workload: Workload) -> PipelineSearch:
        """Return the search for a pipeline of some nodes in this order."""
        kinds = [self.kind_of(node.hardware) for node in nodes]
        return PipelineSearch(nodes, kinds, links, self._stages, workload)

    def alone(self, node: Node, workload: Workload) -> SearchResult | InfeasibleError:
        """Return the best policy of one node for some prompts, or why there is none."""
        question = self.question
        key = (self.kind_of(node.hardware), workload.num_prompts)
        if key not in self._alone:
            search = Search(node.hardware, question.model, workload, margin=question.margin)
            try:
                self._alone[key] = search.run(question.permitted)
            except InfeasibleError as error:
                self._alone[key] = error
            question.on_searched()
        return self._alone[key]


def useful_rate(result: SearchResult) -> float:
    """Return the tokens a second that a node's answers are expected to have."""
    policy = result.policy
    if policy.lanes is not None or policy.workload.lengths is None:
        return result.job_tok_per_s
    return result.job_tok_per_s * policy.workload.mean_output / policy.workload.gen_len


def copy_alone(node: str, result: SearchResult) -> CopyPlan:
    """Return the copy of a node that runs the whole model."""
    predicted = result.predicted
    return CopyPlan(
        stages=(StagePlan(node=node, policy=result.policy),),
        share=1.0,
        predicted=CopyPrediction(
            throughput_tok_per_s=useful_rate(result),
            prefill_s=predicted.prefill_s,
            decode_s=predicted.decode_s,
            limit=f"{node}: {predicted.bottleneck}",
        ),
    )
