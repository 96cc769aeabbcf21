"""The plan of one cluster: which nodes are teams, and in which order each of them computes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from costmodel.cluster.cuts import MOST_CUTS, num_cuts
from costmodel.cluster.nodes import Cluster, Links, Node
from costmodel.cluster.pipeline_search import MOST_SIZES, Option, block_sizes
from costmodel.cluster.plan import ClusterPlan, ClusterPrediction, CopyPlan
from costmodel.cluster.team_prices import TeamPrices, copy_alone, useful_rate
from costmodel.cluster.teams import Counts, best_teams
from costmodel.plan.workload import Workload
from profiles.errors import InfeasibleError
from profiles.hardware import HardwareProfile

# With so few nodes, and few cuts and block sizes, all plans there are are compared.
MOST_NODES = 4
# Up to so many nodes, the order of a pipeline avoids slow links.
MOST_ORDERED = 6
# Memory of similar machines differs by less than this factor.
SIMILAR_MEMORY = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """Nodes that run one copy, in the order of their layers.

    Parameters
    ----------
    rate
        Tokens a second; 0 where nothing fits.
    option
        Of a pipeline, its shape.
    """

    places: tuple[int, ...]
    rate: float
    option: Option | None = None


class PlanSearch:
    """The search for the plan of one cluster."""

    def __init__(self, prices: TeamPrices, cluster: Cluster) -> None:
        self._prices, self._cluster = prices, cluster
        self._is_small = self._has_few_plans()
        nodes = cluster.nodes
        keys = [self._alike(place, node) for place, node in enumerate(nodes)]
        # The nodes of each kind, by their places in the cluster.
        self._members = [
            [place for place, key in enumerate(keys) if key == wanted]
            for wanted in dict.fromkeys(keys)
        ]
        self._kinds = {place: k for k, places in enumerate(self._members) for place in places}
        self._found: dict[Counts, Team] = {}

    def plan(self) -> ClusterPlan:
        """Return the best plan; raises ``InfeasibleError`` where the model fits nowhere."""
        counts = tuple(len(places) for places in self._members)
        used = [0] * len(counts)
        copies = []
        question = self._prices.question
        largest = 1 if question.only_copies else question.model.num_layers
        for team in best_teams(counts, lambda c: self._best(c).rate, largest=largest):
            copies.append(self._copy_of(self._best(team), used))
            used = [a + b for a, b in zip(used, team, strict=True)]
        if not copies:
            raise self._reason()
        return self._shared(copies)

    def _has_few_plans(self) -> bool:
        num_nodes, question = len(self._cluster.nodes), self._prices.question
        sizes = block_sizes(self._workload(min(2, num_nodes)), min(2, num_nodes))
        cuts = num_cuts(question.model.num_layers, num_nodes)
        return num_nodes <= MOST_NODES and len(sizes) <= MOST_SIZES and cuts <= MOST_CUTS

    def _alike(self, place: int, node: Node) -> Hashable:
        """Return what nodes have in common that may take each other's place in a team."""
        if not self._is_small:
            return similar(node.hardware)
        return place if self._cluster.links.pairs else self._prices.kind_of(node.hardware)

    def _best(self, counts: Counts) -> Team:
        """Return the best team of so many nodes of each kind."""
        if counts not in self._found:
            teams = (self._priced(order) for order in self._orders(counts))
            self._found[counts] = max(teams, key=lambda team: team.rate)
        return self._found[counts]

    def _priced(self, places: tuple[int, ...]) -> Team:
        nodes = [self._cluster.nodes[place] for place in places]
        workload = self._workload(len(nodes))
        if len(nodes) == 1:
            result = self._prices.alone(nodes[0], workload)
            rate = 0.0 if isinstance(result, InfeasibleError) else useful_rate(result)
            return Team(places=places, rate=rate)
        option = self._prices.pipeline(nodes, self._cluster.links, workload).estimate()
        if option is None:
            return Team(places=places, rate=0.0)
        rate = workload.mean_output / option.seconds_per_sequence
        return Team(places=places, rate=rate, option=option)

    def _orders(self, counts: Counts) -> Iterator[tuple[int, ...]]:
        """Yield the orders of a team to compare."""
        members = zip(self._members, counts, strict=True)
        places = tuple(place for of_kind, count in members for place in of_kind[:count])
        if not self._is_small:
            yield self._over_fast_links(places)
            return
        seen = set()
        for order in itertools.permutations(places):
            kinds = tuple(self._kinds[place] for place in order)
            if kinds not in seen:
                seen.add(kinds)
                yield order

    def _over_fast_links(self, places: tuple[int, ...]) -> tuple[int, ...]:
        """Return the order whose slowest link is the fastest."""
        if not self._cluster.links.pairs or len(places) > MOST_ORDERED:
            return places
        orders = itertools.permutations(places)
        names = [node.name for node in self._cluster.nodes]
        return max(orders, key=lambda o: slowest_link([names[i] for i in o], self._cluster.links))

    def _copy_of(self, team: Team, used: Sequence[int]) -> CopyPlan:
        """Return the copy of a team, of the next nodes of each kind that are not in use."""
        places = []
        for place in team.places:
            members = self._members[self._kinds[place]]
            places.append(members[members.index(place) + used[self._kinds[place]]])
        nodes = [self._cluster.nodes[place] for place in places]
        workload = self._workload(len(nodes))
        if team.option is None:
            result = self._prices.alone(nodes[0], workload)
            if isinstance(result, InfeasibleError):
                raise result
            return copy_alone(nodes[0].name, result)
        search = self._prices.pipeline(nodes, self._cluster.links, workload)
        copy = search.plan(team.option)
        if copy is None:
            # Similar nodes have a little less room.
            option = search.estimate()
            copy = search.plan(option) if option else None
        if copy is None:
            raise self._reason()
        return copy

    def _workload(self, num_nodes: int) -> Workload:
        """Return the prompts of a team: as large a part of all as its part of the nodes."""
        workload, of_all = self._prices.question.workload, len(self._cluster.nodes)
        if workload.num_prompts is None or num_nodes == of_all:
            return workload
        count = -(-workload.num_prompts * num_nodes // of_all)
        if (lengths := workload.lengths) is None:
            return replace(workload, num_prompts=count)
        part = lengths.scaled(count)
        return replace(
            workload,
            lengths=part,
            num_prompts=part.num_prompts,
            prompt_len=max(part.prompts),
            gen_len=max(part.limits),
        )

    def _shared(self, copies: Sequence[CopyPlan]) -> ClusterPlan:
        """Return the plan in which each copy has prompts by its throughput."""
        rates = [copy.predicted.throughput_tok_per_s for copy in copies if copy.predicted]
        total, question = sum(rates), self._prices.question
        fastest = copies[rates.index(max(rates))].predicted
        assert fastest is not None
        shared = zip(copies, rates, strict=True)
        return ClusterPlan(
            model=question.model,
            workload=question.workload,
            copies=tuple(replace(copy, share=rate / total) for copy, rate in shared),
            predicted=ClusterPrediction(throughput_tok_per_s=total, limit=fastest.limit),
            links=self._cluster.links,
        )

    def _reason(self) -> InfeasibleError:
        """Make the error for a model that fits nowhere."""
        nodes, model = self._cluster.nodes, self._prices.question.model
        if len(nodes) == 1:
            result = self._prices.alone(nodes[0], self._workload(1))
            assert isinstance(result, InfeasibleError)
            return result
        where = "neither on one of them nor in stages"
        if self._prices.question.only_copies:
            where = "not on one of them, and is not cut into stages"
        return InfeasibleError(
            f"{model.name} does not fit on the {len(nodes)} nodes, {where}; try more nodes, or more"
            " memory or disk on each"
        )


def similar(hardware: HardwareProfile) -> Hashable:
    """Return what two machines have in common that are alike but for noise of measurement."""
    gpu = hardware.gpu
    return (
        (hardware.cpu.name, hardware.cpu.num_cores, _step(hardware.cpu.memory_bytes)),
        (gpu.name, gpu.emulated, _step(gpu.memory_bytes)) if gpu else None,
    )


def _step(num_bytes: int) -> int:
    return round(math.log(max(num_bytes, 1)) / math.log(SIMILAR_MEMORY))


def slowest_link(names: Sequence[str], links: Links) -> float:
    """Return the bytes a second of the slowest link between neighbours."""
    pairs = itertools.pairwise(names)
    return min((links.between(a, b).bytes_per_s for a, b in pairs), default=math.inf)
