"""Small copies of models of any size: the same description, with fewer layers and rows, and with
no matrix encoded."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.rotary_spec import RotarySpec
from costmodel.model.spec import ModelSpec, model_of_layers

HIDDEN_SIZE = 64
HEAD_DIM = 16
# By name of a field, wherever it is: the most that a copy has.
MOST = {
    "size": 48,
    "window": 6,
    "num_experts": 8,
    "experts_per_token": 3,
    "num_groups": 4,
    "groups_per_token": 2,
}
LATENT = {"rank": 32, "nope_dim": HEAD_DIM, "rope_dim": 8, "value_dim": HEAD_DIM}


def small_copy(spec: ModelSpec) -> ModelSpec:
    """Return a model of at most two layers of each kind, small enough to run in a moment."""
    numbers = [number for kind in range(len(spec.layer_kinds)) for number in _first(spec, kind, 2)]
    return model_of_layers(
        [_small_layer(spec.layer(number)) for number in sorted(numbers)],
        name="small",
        family=spec.family,
        vocab_size=173,
        hidden_size=HIDDEN_SIZE,
        max_positions=96,
        embedding=replace(spec.embedding, width=spec.embedding.width and HIDDEN_SIZE // 2),
        final_norm=spec.final_norm,
        head=spec.head,
        dtype="float32",
    )


def _first(spec: ModelSpec, kind: int, count: int) -> list[int]:
    return [i for i, of in enumerate(spec.layer_order) if of == kind][:count]


def _small_layer(layer: LayerSpec) -> LayerSpec:
    mlp, experts = layer.mlp, layer.experts
    if experts is not None:
        experts = replace(
            experts,
            **_limits(experts),
            expert=replace(experts.expert, **_limits(experts.expert)),
            router=replace(experts.router, **_limits(experts.router)),
            shared=experts.shared and replace(experts.shared, **_limits(experts.shared)),
        )
    attention = _small_attention(layer.attention)
    mlp = mlp and replace(mlp, **_limits(mlp))
    return replace(layer, attention=attention, mlp=mlp, experts=experts, encoded=())


def _small_attention(attention: AttentionSpec) -> AttentionSpec:
    kv_heads = min(attention.num_kv_heads, 2)
    heads = kv_heads * min(attention.group_size, 3)
    latent, head_dim = attention.latent, HEAD_DIM
    rotary = attention.rotary and _small_rotary(attention.rotary, attention.head_dim)
    if latent is not None:
        latent = replace(latent, **LATENT, query_rank=latent.query_rank and 24)
        head_dim = latent.row_dim
        rotary = rotary and replace(rotary, dim=latent.rope_dim)
    return replace(
        attention,
        **_limits(attention),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rotary=rotary,
        latent=latent,
        alibi_slopes=attention.alibi_slopes[:heads],
    )


def _limits(part: Any) -> dict[str, Any]:
    found = {f.name: getattr(part, f.name) for f in fields(part) if f.name in MOST}
    return {name: min(value, MOST[name]) for name, value in found.items() if value is not None}


def _small_rotary(rotary: RotarySpec, head_dim: int) -> RotarySpec:
    dim = None if rotary.dim is None else max(2, 2 * (rotary.dim * HEAD_DIM // (2 * head_dim)))
    pairs = (dim or HEAD_DIM) // 2
    return replace(
        rotary,
        dim=dim,
        short_factors=rotary.short_factors[:pairs],
        long_factors=rotary.long_factors[:pairs],
    )
