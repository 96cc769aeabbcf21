"""Choose copies, stages, or copies of stages for the nodes of a cluster, with their policies."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace

from costmodel.cluster.nodes import Cluster
from costmodel.cluster.plan import ClusterPlan, OneMore
from costmodel.cluster.plan_search import PlanSearch, similar
from costmodel.cluster.stage_prices import Question
from costmodel.cluster.team_prices import TeamPrices
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import DEFAULT_PERMITTED, Permitted, check_permitted
from costmodel.optimizer.optimum import DEFAULT_MARGIN
from costmodel.plan.workload import Workload
from costmodel.pricing.price import check_work
from profiles.hardware import HardwareProfile


class ClusterSearch:
    """Searches plans of clusters, and remembers what it has priced for the next one.

    All ways to divide few nodes into teams are compared, with all orders, cuts and block sizes
    where these are few. Of many, regular teams are compared, by estimates.

    Parameters
    ----------
    permitted
        Approximations that change outputs.
    margin
        Share of every capacity that is left free.
    only_runnable, only_copies, on_searched
        See ``Question``.
    """

    def __init__(
        self,
        model: ModelSpec,
        workload: Workload,
        *,
        permitted: Permitted = DEFAULT_PERMITTED,
        margin: float = DEFAULT_MARGIN,
        only_runnable: bool = False,
        only_copies: bool = False,
        on_searched: Callable[[], object] = lambda: None,
    ) -> None:
        self._question = Question(
            model=model,
            workload=workload,
            permitted=permitted,
            margin=margin,
            only_runnable=only_runnable,
            only_copies=only_copies,
            on_searched=on_searched,
        )
        self._prices = TeamPrices(self._question)

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


def search_cluster(
    cluster: Cluster,
    model: ModelSpec,
    workload: Workload,
    *,
    permitted: Permitted = DEFAULT_PERMITTED,
    margin: float = DEFAULT_MARGIN,
    asks_one_more: bool = False,
    only_runnable: bool = False,
    only_copies: bool = False,
    on_searched: Callable[[], object] = lambda: None,
) -> ClusterPlan:
    """Search once, see ``ClusterSearch``."""
    search = ClusterSearch(
        model,
        workload,
        permitted=permitted,
        margin=margin,
        only_runnable=only_runnable,
        only_copies=only_copies,
        on_searched=on_searched,
    )
    return search.run(cluster, asks_one_more=asks_one_more)
