"""The arithmetic of a mixture of experts. Pure tensor maths: no placement.

A router chooses a few experts for each token. Tokens are sorted by expert, so that each expert is
multiplied once with all of its tokens. Outputs are added in the order of the experts' numbers, as
in transformers.

Notes
-----
Temporaries at the peak, in elements per token, with ``E`` experts of ``size``, ``k`` of them a
token, and ``r = rows_at_once(tokens) / tokens`` (see ``ExpertsSpec``):

- ``route``: ``3 E`` in float32. It returns ``k`` int64 and ``k`` factors.
- ``by_expert``: ``3 k`` int64. It returns ``k`` int64 and ``k`` factors.
- ``add_routed``: ``r * (hidden + 2 * size)``. In 16 bits the CPU's products copy
  the inner vectors, ``r * size`` more. A GPU's products take three int64 for each expert and each
  16 rows, which is too little to count. Where the factors are float32 and the model is not, there
  are two float32 copies of ``WEIGHED_AT_ONCE`` rows of ``hidden``.
- ``add_shared``: ``2 * shared size``, then ``shared size + hidden``.
- ``experts_output``: ``hidden`` (its result), and the larger of the last two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from costmodel.model.feed_forward_spec import ExpertsSpec, RouterSpec
from executor.model import mlp as feed_forward
from executor.model.matrices import LayerWeights, linear, multiply_groups, row_parts, vector
from executor.model.routing import Routing, SortedRouting
from profiles import kernels

# Prevents a division by zero where all weights are zero; changes no other sum.
LEAST_SUM = 1e-20

# An expert, and its rows among those sorted by expert.
Group = tuple[int, slice]


def route(x: torch.Tensor, weights: LayerWeights, spec: ExpertsSpec) -> Routing:
    """Choose and weigh the experts of each token of ``x`` [..., hidden]."""
    router = spec.router
    logits = _logits(x.reshape(-1, x.shape[-1]), weights, router)
    if router.jitter is not None:
        experts, found = _one_by_one(logits, spec.experts_per_token, router.jitter)
    else:
        experts, found = _best(logits, weights, spec)
    if router.scale != 1:
        found *= router.scale
    return Routing(experts, found.to(x.dtype) if router.rounds_weights else found)


def _best(
    logits: torch.Tensor, weights: LayerWeights, spec: ExpertsSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts with the best scores, and weigh them by these."""
    router = spec.router
    scores = logits if router.selects_first else _scored(logits, router)
    ranks = scores
    if router.has_bias and not router.bias_in_logits:
        ranks = scores + vector(weights, "router.bias").float()
    if router.num_groups > 1:
        ranks = _in_best_groups(ranks, router)
    experts = ranks.topk(spec.experts_per_token).indices
    found = scores.gather(1, experts)
    if router.selects_first:
        found = _scored(found, router)
    if router.renormalises:
        total = found.sum(dim=-1, keepdim=True) + LEAST_SUM
        found /= total.clamp_(min=router.least_sum)
    return experts, found


def _one_by_one(
    logits: torch.Tensor, count: int, jitter: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose ``count`` experts one after the other (see ``RouterSpec.jitter``)."""
    left, experts, found = logits.clone(), [], []
    for _ in range(count):
        best, chosen = left.max(dim=-1, keepdim=True)
        is_far = (best - logits).div_(logits.abs().maximum(best)) > 2 * jitter
        found.append(left.masked_fill(is_far, -torch.inf).softmax(dim=-1).gather(1, chosen))
        experts.append(chosen)
        left.scatter_(1, chosen, -torch.inf)
    return torch.cat(experts, dim=1), torch.cat(found, dim=1)


def _logits(rows: torch.Tensor, weights: LayerWeights, router: RouterSpec) -> torch.Tensor:
    """Return one logit for each token and expert, float32 [tokens, experts]."""
    if router.in_float32:
        return linear(rows.float(), weights["router.float32_weight"])
    bias = vector(weights, "router.bias").to(rows.dtype) if router.bias_in_logits else None
    return linear(rows, weights["router.weight"], bias).float()


def _scored(logits: torch.Tensor, router: RouterSpec) -> torch.Tensor:
    if router.score == "softmax":
        return logits.softmax(dim=-1)
    scores = logits.clone()
    kernels.activate(scores, "sigmoid")
    return scores


def _in_best_groups(ranks: torch.Tensor, router: RouterSpec) -> torch.Tensor:
    """Mask the experts of all groups but the best, by the sum of each group's best ranks."""
    groups = ranks.unflatten(1, (router.num_groups, -1))
    best = groups.topk(router.scores_per_group, dim=-1).values.sum(dim=-1)
    is_shut = torch.ones_like(best, dtype=torch.bool)
    is_shut.scatter_(1, best.topk(router.groups_per_token).indices, False)
    open_groups: torch.Tensor = groups.masked_fill(is_shut[..., None], -torch.inf)
    return open_groups.flatten(1)


def experts_output(
    x: torch.Tensor, routing: Routing, weights: LayerWeights, spec: ExpertsSpec
) -> torch.Tensor:
    """Return the output of the routed and the shared experts for ``x`` [..., hidden]."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.zeros_like(rows)
    add_routed(out, rows, routing.by_expert(spec.num_experts), weights, spec)
    if spec.shared is not None:
        add_shared(out, rows, weights, spec)
    return out.view(x.shape)


def add_shared(
    out: torch.Tensor, x: torch.Tensor, weights: LayerWeights, spec: ExpertsSpec
) -> None:
    """Add the shared expert's output for ``x`` to ``out``, both [tokens, hidden]."""
    assert spec.shared is not None
    inner = feed_forward.inner(x, weights, spec.shared, "shared_")
    made = feed_forward.output(inner, weights, "shared_")
    if spec.gates_shared:
        gate = linear(x, weights["shared_gate.weight"])
        kernels.activate(gate, "sigmoid")
        made *= gate
    out += made


def add_routed(
    out: torch.Tensor,
    x: torch.Tensor,
    routing: SortedRouting,
    weights: LayerWeights,
    spec: ExpertsSpec,
    experts: range | None = None,
    room: torch.Tensor | None = None,
) -> None:
    """Add the weighted outputs of each token's experts for ``x`` to ``out``, both [tokens, hidden].

    With the native kernels, calls for ranges that follow each other give the same bits as one call.

    Parameters
    ----------
    weights
        Only matrices of experts with tokens are used.
    experts
        The experts to run; ``None`` stands for all.
    room
        What ``room_for`` returned, for the temporaries of several calls: as many rows are
        multiplied at once as it has room for.
    """
    experts = range(spec.num_experts) if experts is None else experts
    low, high = routing.ends[experts.start], routing.ends[experts.stop]
    if low == high:
        return
    if room is None:
        step = spec.rows_at_once(len(x))
    else:
        step = len(room) // (x.shape[1] + spec.expert.inner_rows)
    # Parts begin at the same rows for any range, so that each product has the same rows.
    for first in range(low // step * step, high, step):
        part = slice(max(first, low), min(first + step, high))
        groups = _groups(routing.ends, experts, part)
        tokens, factors = routing.tokens[part], routing.weights[part]
        rows = _make_rows(x, tokens, factors, groups, weights, spec, room)
        kernels.add_routed_rows(out, tokens, rows, _added_factors(factors, spec))
        # Before the next part makes its own.
        del rows


def room_for(x: torch.Tensor, spec: ExpertsSpec) -> torch.Tensor:
    """Return room for the temporaries of ``add_routed`` for ``x`` [tokens, hidden].

    Chunks of experts have few rows or many. A heap that gets rows of all sizes back has gaps, which
    no estimate knows.
    """
    return x.new_empty(spec.rows_at_once(len(x)) * (x.shape[1] + spec.expert.inner_rows))


def _make_rows(
    x: torch.Tensor,
    tokens: torch.Tensor,
    factors: torch.Tensor,
    groups: Sequence[Group],
    weights: LayerWeights,
    spec: ExpertsSpec,
    room: torch.Tensor | None,
) -> torch.Tensor:
    """Return the outputs of experts for the rows ``tokens`` of ``x``, weighted where the router
    scales inputs."""
    mlp, count, hidden = spec.expert, len(tokens), x.shape[1]
    if room is None:
        room = x.new_empty(count * (hidden + mlp.inner_rows))
    sizes = [count * hidden, count * mlp.inner_rows]
    rows: torch.Tensor
    inner: torch.Tensor
    rows, inner = (part.view(count, -1) for part in room[: sum(sizes)].split(sizes))
    torch.index_select(x, 0, tokens, out=rows)
    if spec.router.scales_input:
        kernels.weigh_rows(rows, factors)
    _multiply_experts(rows, "expert_gate_up", weights, groups, inner)
    gate, up = inner.split(mlp.size, dim=1)
    feed_forward.apply_gate(gate, up, mlp)
    # The input is no longer needed: the output takes its place.
    _multiply_experts(gate, "expert_down", weights, groups, rows)
    return rows


def _added_factors(factors: torch.Tensor, spec: ExpertsSpec) -> torch.Tensor | None:
    """Return what outputs are multiplied by; ``None`` where the router has scaled the inputs."""
    return None if spec.router.scales_input else factors


def _multiply_experts(
    x: torch.Tensor,
    name: str,
    weights: LayerWeights,
    groups: Sequence[Group],
    out: torch.Tensor,
) -> None:
    """Fill rows of ``out`` with those of ``x`` times their expert's matrix, its bias added."""
    biases = weights.get(f"{name}.bias")
    for part, matrices in row_parts(weights, f"{name}.weight", out.shape[1]):
        multiply_groups(x, matrices, groups, out[:, part], biases, part)


def routed_ranges(spec: ExpertsSpec, without: range) -> list[range]:
    """Return the experts of a layer as ranges, all but a given range."""
    if not without:
        return [range(spec.num_experts)]
    return [range(without.start), range(without.stop, spec.num_experts)]


def _groups(ends: Sequence[int], experts: range, part: slice) -> list[Group]:
    """Return the experts of a part of the sorted rows, with their rows counted from its start."""
    found = []
    for expert in experts:
        first, last = max(ends[expert], part.start), min(ends[expert + 1], part.stop)
        if first < last:
            found.append((expert, slice(first - part.start, last - part.start)))
    return found
