"""All plans of a small cluster, each priced, as a reference for the search."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

from costmodel.cluster.block_passes import passes_in_step
from costmodel.cluster.cuts import all_cuts
from costmodel.cluster.estimate import link_seconds
from costmodel.cluster.nodes import Cluster
from costmodel.cluster.pipeline import price_round
from costmodel.cluster.stage_prices import price_stage
from costmodel.cluster.stages import stage_model
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import Pipeline, batch_sizes
from costmodel.optimizer.optimum import Search, search
from costmodel.plan.workload import Workload
from costmodel.pricing.passes import FloatArray
from profiles import InfeasibleError


def best_throughput(cluster: Cluster, model: ModelSpec, workload: Workload) -> float:
    """Return the throughput of the best plan, by pricing every one there is.

    Nodes are divided in all ways into teams or left out; each team is tried in all orders, with all
    cuts and block sizes; each stage has its own best policy.
    """
    nodes = {node.name: node for node in cluster.nodes}
    in_step = replace(workload, num_prompts=None)

    @cache
    def stage(name: str, first: int, count: int, size: int, num_stages: int) -> FloatArray | None:
        pipeline = Pipeline(num_stages=num_stages, block_size=size)
        part, hardware = stage_model(model, first, count), nodes[name].hardware
        found = Search(hardware, part, in_step, pipeline=pipeline).run_in_step()
        return None if found is None else price_stage(found.policy, found.hardware).seconds

    def pipeline_rate(order: Sequence[str], num_prompts: int) -> float:
        best = 0.0
        block = replace(workload, num_prompts=-(-num_prompts // len(order)))
        for cut, size in itertools.product(
            all_cuts(model.num_layers, len(order)), batch_sizes(block)
        ):
            firsts = itertools.accumulate(cut, initial=0)
            parts = zip(order, firsts, cut, strict=False)
            found = (stage(*part, size, len(order)) for part in parts)
            stages = [seconds for seconds in found if seconds is not None]
            if len(stages) < len(order):
                continue
            passes = passes_in_step(workload, Pipeline(num_stages=len(order), block_size=size))
            links = link_seconds(order, cluster.links, model, passes)
            round_s = price_round(stages, links, passes.counts).seconds
            rounds = -(-num_prompts // (size * len(order)))
            best = max(best, num_prompts * workload.gen_len / (rounds * round_s))
        return best

    @cache
    def team_rate(team: frozenset[str]) -> float:
        assert workload.num_prompts is not None
        count = -(-workload.num_prompts * len(team) // len(nodes))
        if len(team) == 1:
            (name,) = team
            try:
                part = replace(workload, num_prompts=count)
                return search(nodes[name].hardware, model, part).job_tok_per_s
            except InfeasibleError:
                return 0.0
        return max(pipeline_rate(order, count) for order in itertools.permutations(team))

    return max(sum(map(team_rate, teams)) for teams in _divisions(tuple(nodes)))


def _divisions(names: tuple[str, ...]) -> Iterator[list[frozenset[str]]]:
    """Yield all ways to divide some of the nodes into teams."""
    if not names:
        yield []
        return
    first, rest = names[0], names[1:]
    yield from _divisions(rest)
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            left = tuple(name for name in rest if name not in others)
            for teams in _divisions(left):
                yield [frozenset((first, *others)), *teams]
