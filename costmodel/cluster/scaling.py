"""Clusters of more and more equal nodes: throughput, what limits it, and what tokens cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from costmodel.cluster.nodes import NodeLink, equal_nodes
from costmodel.cluster.plan import ClusterPlan
from costmodel.cluster.search import ClusterSearch
from profiles.errors import InfeasibleError
from profiles.hardware import HardwareProfile
from profiles.rate_curve import require_positive

SECONDS_PER_HOUR = 3600
MILLION = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledCluster:
    """The best plan of a number of equal nodes.

    Parameters
    ----------
    num_nodes
        Nodes of the cluster, those without work included.
    team_sizes
        For each number of nodes that run a copy together, the number of such copies.
    throughput_tok_per_s
        Generated tokens a second; 0 where the model does not fit.
    limit
        What the largest share of the work waits for.
    cost_per_million
        Price of a million generated tokens, in the currency of the nodes' price; ``None`` where
        the model does not fit.
    """

    num_nodes: int
    team_sizes: dict[int, int]
    throughput_tok_per_s: float
    limit: str
    cost_per_million: float | None


def scale(
    search: ClusterSearch,
    hardware: HardwareProfile,
    link: NodeLink,
    *,
    counts: Iterable[int],
    price_per_hour: float,
) -> list[ScaledCluster]:
    """Search the best plan for each number of nodes.

    Parameters
    ----------
    price_per_hour
        Of one node, power included.
    """
    require_positive("price of a node", price_per_hour)
    found = []
    for count in counts:
        try:
            plan = search.run(equal_nodes(hardware, count, link))
        except InfeasibleError:
            none = "no room for the model"
            found.append(
                ScaledCluster(
                    num_nodes=count,
                    team_sizes={},
                    throughput_tok_per_s=0.0,
                    limit=none,
                    cost_per_million=None,
                )
            )
        else:
            found.append(_scaled(plan, count, price_per_hour))
    return found


def _scaled(plan: ClusterPlan, count: int, price_per_hour: float) -> ScaledCluster:
    assert plan.predicted is not None
    rate = plan.predicted.throughput_tok_per_s
    return ScaledCluster(
        num_nodes=count,
        team_sizes=dict(Counter(len(copy.stages) for copy in plan.copies)),
        throughput_tok_per_s=rate,
        limit=plan.predicted.limit,
        cost_per_million=count * price_per_hour / SECONDS_PER_HOUR / rate * MILLION,
    )
