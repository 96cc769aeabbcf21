"""The price of one copy of a model, also of a pipeline written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from costmodel.cluster.nodes import Links, Node
from costmodel.cluster.pipeline import ONE_BLOCK, Round, StageSeconds, price_round
from costmodel.cluster.plan import CopyPrediction
from costmodel.cluster.stage_prices import PricedStage, price_stage, segment_passes
from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from costmodel.pricing.price import limits_by_phase

ID_BYTES = 8


def estimate_pipeline(
    policies: Sequence[Policy], nodes: Sequence[Node], links: Links
) -> CopyPrediction:
    """Price one round of a pipeline of two stages or more, which answers a block for each of them.

    Parameters
    ----------
    policies
        Of the stages, in the order of their layers.
    nodes
        The node of each stage.
    """
    first = policies[0]
    stages = [price_stage(p, node.hardware) for p, node in zip(policies, nodes, strict=True)]
    names = [node.name for node in nodes]
    found = round_of(stages, names, links, first.workload)
    tokens = first.block_size * len(policies) * first.workload.mean_output
    return CopyPrediction(
        throughput_tok_per_s=tokens / found.seconds,
        prefill_s=found.prefill_s,
        decode_s=found.decode_s,
        limit=limit_of(found, stages, nodes),
    )


def round_of(
    stages: Sequence[PricedStage], names: Sequence[str], links: Links, workload: Workload
) -> Round:
    """Return the seconds of a round of priced stages on the nodes of these names."""
    policy = stages[0].policy
    seconds = link_seconds(names, links, policy.model, workload, block_size=policy.block_size)
    return price_round([stage.seconds for stage in stages], seconds, segment_passes(workload))


def link_seconds(
    names: Sequence[str], links: Links, model: ModelSpec, workload: Workload, *, block_size: int
) -> list[StageSeconds]:
    """Return the seconds of each link for a block: hidden states to the next stage, and last ids of
    tokens back to the first."""
    num_segments = len(segment_passes(workload))
    row_bytes = block_size * model.hidden_size * model.dtype_bytes
    found = []
    for source, target in pairwise(names):
        link = links.between(source, target)
        found.append(
            StageSeconds(
                prefill=link.seconds(row_bytes * workload.prompt_len),
                decode=(link.seconds(row_bytes),) * num_segments,
            )
        )
    back_s = links.between(names[-1], names[0]).seconds(block_size * ID_BYTES)
    return [*found, StageSeconds(prefill=0.0, decode=(back_s,) * num_segments)]


def limit_of(found: Round, stages: Sequence[PricedStage], nodes: Sequence[Node]) -> str:
    """Name what most of a round waits for."""
    place, names = found.slowest, [node.name for node in nodes]
    if place is None:
        return ONE_BLOCK
    if place >= len(names):
        source = place - len(names)
        return f"the link from {names[source]} to {names[(source + 1) % len(names)]}"
    policy, phase = stages[place].policy, "prefill" if found.in_prefill else "decode"
    hardware = policy.hardware or nodes[place].hardware
    return f"{names[place]}: {limits_by_phase(policy, hardware)[phase]} in {phase}"
