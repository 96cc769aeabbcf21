"""The stages of a pipeline: parts of a model, each with its own layout, memory and price."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

from costmodel.model.spec import ModelSpec
from costmodel.model.stage_spec import StageSpec
from costmodel.plan.policy import Policy
from profiles.errors import InputError


def stage_model(model: ModelSpec, first: int, count: int) -> ModelSpec:
    """Return layers ``first`` to ``first + count - 1`` of a model as a description of their own.

    The first stage has the embedding and the last one the head. Where these share a table, each of
    the two stages has a copy of it. All layers together are the model itself.
    """
    if model.stage is not None:
        raise InputError("model", got="a stage of one", allowed="a whole model")
    stage = StageSpec(first=first, count=count, num_layers=model.num_layers)
    if count == model.num_layers:
        return model
    order = model.layer_order[first : stage.end]
    # Kinds keep their order, so that equal stages are equal descriptions.
    kinds = sorted(set(order))
    encoded = model.encoded
    if stage.has_embedding and model.head.is_tied:
        # The rows that a tied model stores as its head's are those of this stage's table.
        encoded = tuple(
            replace(part, tensor="tokens.weight") if part.tensor == "head.weight" else part
            for part in encoded
        )
    return replace(
        model,
        layer_kinds=tuple(model.layer_kinds[kind] for kind in kinds),
        layer_order=tuple(kinds.index(kind) for kind in order),
        encoded=encoded,
        stage=stage,
    )


def stages_of_counts(model: ModelSpec, counts: Iterable[int]) -> tuple[ModelSpec, ...]:
    """Return the stages of a pipeline, by the number of layers of each.

    Raises
    ------
    InputError
        Unless each stage has a layer, and all together have the model's.
    """
    counts = tuple(counts)
    if sum(counts) != model.num_layers or min(counts, default=0) < 1:
        raise InputError(
            "layers of the stages",
            got=", ".join(map(str, counts)),
            allowed=f"numbers of 1 or more that add up to {model.num_layers}",
        )
    firsts = itertools.accumulate(counts, initial=0)
    return tuple(
        stage_model(model, first, count) for first, count in zip(firsts, counts, strict=False)
    )


def policies_of_stages(policy: Policy, num_stages: int) -> tuple[Policy, ...]:
    """Return a policy of a whole model as policies of the stages of an even cut.

    Each stage has the policy's placements and block; as many blocks are in flight as stages.
    """
    num_layers = policy.model.num_layers
    counts = [num_layers // num_stages + (i < num_layers % num_stages) for i in range(num_stages)]
    # The first stage of a tied model has a table where the model has only a head.
    weights = {"embedding": policy.weights["head"], **policy.weights}
    return tuple(
        replace(
            policy,
            model=stage,
            weights={name: weights[name] for name in stage.component_names},
            blocks_in_flight=num_stages,
            predicted=None,
        )
        for stage in stages_of_counts(policy.model, counts)
    )


def stage_of(model: ModelSpec) -> StageSpec:
    """Return the stage that a description is of; a whole model is its only stage."""
    num_layers = model.num_layers
    return model.stage or StageSpec(first=0, count=num_layers, num_layers=num_layers)
