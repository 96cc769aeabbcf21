"""Choose copies, stages, or copies of stages for the nodes of a cluster, with their policies."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import replace

from costmodel.cluster.nodes import Cluster
from costmodel.cluster.plan import ClusterPlan, OneMore
from costmodel.cluster.plan_search import PlanSearch, similar
from costmodel.cluster.question import ClusterQuestion
from costmodel.cluster.team_prices import TeamPrices
from costmodel.optimizer.choices import check_permitted
from costmodel.pricing.price import check_work
from profiles.hardware import HardwareProfile


class ClusterSearch:
    """Searches plans of clusters, and remembers what it has priced for the next one.

    All ways to divide few nodes into teams are compared, with all orders, cuts and block sizes
    where these are few. Of many, regular teams are compared, by estimates.
    """

    def __init__(self, question: ClusterQuestion) -> None:
        self._question = question
        self._prices = TeamPrices(question)

    def run(self, cluster: Cluster, *, asks_one_more: bool = False) -> ClusterPlan:
        """Return the plan with the highest predicted throughput.

        Parameters
        ----------
        asks_one_more
            Whether to predict what another node of each kind would bring.

        Raises
        ------
        InfeasibleError
            Where no team of the nodes has room for the model.
        InputError
            For a dtype that a node cannot compute, or more tokens than the model has positions.
        """
        question = self._question
        for node in cluster.nodes:
            check_permitted(question.permitted, node.hardware, question.model)
            check_work(question.model, question.workload, node.hardware)
        plan = PlanSearch(self._prices, cluster).plan()
        if not asks_one_more:
            return plan
        assert plan.predicted is not None
        more = tuple(self._one_more(cluster))
        return replace(plan, predicted=replace(plan.predicted, one_more=more))

    def _one_more(self, cluster: Cluster) -> Iterator[OneMore]:
        seen: set[Hashable] = set()
        for node in cluster.nodes:
            if (kind := self._alike(node.hardware)) in seen:
                continue
            seen.add(kind)
            twin = replace(node, name=f"another {node.name}")
            larger = replace(cluster, nodes=(*cluster.nodes, twin))
            predicted = PlanSearch(self._prices, larger).plan().predicted
            assert predicted is not None
            yield OneMore(like=node.name, throughput_tok_per_s=predicted.throughput_tok_per_s)

    def _alike(self, hardware: HardwareProfile) -> Hashable:
        """Return what twins have in common, whose measurements differ by noise."""
        rates = (hardware.compute.matmul[self._question.model.dtype], hardware.disk.read)
        return similar(hardware), *(round(math.log2(rate.peak)) for rate in rates)
