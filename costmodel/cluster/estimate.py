"""The price of a pipeline, also of one that was written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from costmodel.cluster.block_passes import BlockPasses, passes_in_step, passes_of_lanes
from costmodel.cluster.nodes import Links, Node
from costmodel.cluster.pipeline import ONE_BLOCK, Round, price_round
from costmodel.cluster.plan import CopyPrediction
from costmodel.cluster.stage_prices import PricedStage, price_lanes, price_stage
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import Pipeline
from costmodel.plan.policy import Policy
from costmodel.pricing.lane_price import price_timeline
from costmodel.pricing.passes import FloatArray
from costmodel.pricing.price import limits_by_phase

ID_BYTES = 8


def estimate_pipeline(
    policies: Sequence[Policy], nodes: Sequence[Node], links: Links
) -> CopyPrediction:
    """Price a pipeline of two stages or more: the whole job of lanes, or one round in step.

    Parameters
    ----------
    policies
        Of the stages, in the order of their layers. Their workload is what the pipeline answers.
    nodes
        The node of each stage.
    """
    first = policies[0]
    pairs = [(policy, node.hardware) for policy, node in zip(policies, nodes, strict=True)]
    if first.lanes is not None:
        passes = passes_of_lanes(first, nodes[0].hardware, first.workload)
        stages = [price_lanes(policy, hardware, passes) for policy, hardware in pairs]
    else:
        passes = passes_in_step(
            first.workload, Pipeline(num_stages=len(policies), block_size=first.block_size)
        )
        stages = [price_stage(policy, hardware) for policy, hardware in pairs]
    found = round_of(stages, [node.name for node in nodes], links, passes)
    rate = passes.num_prompts * first.workload.mean_output / found.seconds
    return prediction_of(found, stages, nodes, throughput_tok_per_s=rate)


def prediction_of(
    found: Round,
    stages: Sequence[PricedStage],
    nodes: Sequence[Node],
    *,
    throughput_tok_per_s: float,
) -> CopyPrediction:
    """Return what is told of a priced pipeline. Lanes have one phase, which counts as decode."""
    has_lanes = stages[0].policy.lanes is not None
    return CopyPrediction(
        throughput_tok_per_s=throughput_tok_per_s,
        prefill_s=0.0 if has_lanes else found.prefill_s,
        decode_s=found.seconds if has_lanes else found.decode_s,
        limit=limit_of(found, stages, nodes),
    )


def round_of(
    stages: Sequence[PricedStage], names: Sequence[str], links: Links, passes: BlockPasses
) -> Round:
    """Return the seconds of a round of priced stages on the nodes of these names."""
    seconds = link_seconds(names, links, stages[0].policy.model, passes)
    return price_round([stage.seconds for stage in stages], seconds, passes.counts)


def link_seconds(
    names: Sequence[str], links: Links, model: ModelSpec, passes: BlockPasses
) -> list[FloatArray]:
    """Return the seconds of each link in each pass of a block, float64 [passes]: hidden states to
    the next stage. The last link takes the ids of tokens back to the first stage."""
    row_bytes = model.hidden_size * model.dtype_bytes
    found = [links.between(*pair).seconds(passes.rows * row_bytes) for pair in pairwise(names)]
    back = links.between(names[-1], names[0]).seconds(passes.chosen * ID_BYTES)
    # Without ids, there is no message.
    return [*found, np.where(passes.chosen > 0, back, 0.0)]


def limit_of(found: Round, stages: Sequence[PricedStage], nodes: Sequence[Node]) -> str:
    """Name what most of a round waits for."""
    place, names = found.slowest, [node.name for node in nodes]
    if place is None:
        return ONE_BLOCK
    if place >= len(names):
        source = place - len(names)
        return f"the link from {names[source]} to {names[(source + 1) % len(names)]}"
    stage = stages[place]
    policy, hardware = stage.policy, stage.policy.hardware or nodes[place].hardware
    if stage.timeline is not None:
        return f"{names[place]}: {price_timeline(policy, hardware, stage.timeline).bottleneck}"
    phase = "prefill" if found.in_prefill else "decode"
    return f"{names[place]}: {limits_by_phase(policy, hardware)[phase]} in {phase}"
