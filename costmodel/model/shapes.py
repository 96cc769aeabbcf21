"""The tensors of each component of a model, with their shapes. No torch.

Matrices that multiply the same input are stacked into one (``qkv``, ``gate_up``), because one
large product is faster than several small ones.
"""

from __future__ import annotations

from costmodel.model.feed_forward_spec import MlpSpec
from costmodel.model.layer_spec import AttentionSpec, LayerSpec, NormSpec
from costmodel.model.spec import ModelSpec

Shapes = dict[str, tuple[int, ...]]


def _norm_shapes(spec: ModelSpec, norm: NormSpec, name: str) -> Shapes:
    shapes: Shapes = {}
    if norm.has_weight:
        shapes[f"{name}.weight"] = (spec.hidden_size,)
    if norm.kind == "layer" and norm.has_bias:
        shapes[f"{name}.bias"] = (spec.hidden_size,)
    return shapes


def _half_norm_shapes(spec: ModelSpec, layer: LayerSpec, half: str) -> Shapes:
    """Return the norms before and after one half of a layer."""
    names = {"before": f"{half}_norm", "after": f"{half}_output_norm"}
    shapes: Shapes = {}
    if half == "mlp" and layer.shares_norm:
        return shapes
    for place in layer.norm_places:
        shapes |= _norm_shapes(spec, layer.norm, names[place])
    return shapes


def component_shapes(spec: ModelSpec, layer: LayerSpec) -> dict[str, tuple[Shapes, int]]:
    """Return, for each component of a layer, the tensors of one unit and the number of units."""
    hidden, mlp, experts = spec.hidden_size, layer.mlp, layer.experts
    components = {"attention": (_attention_shapes(spec, layer), 1)}
    if mlp is not None:
        shapes = _half_norm_shapes(spec, layer, "mlp") | _mlp_shapes(hidden, mlp, "")
        return components | {"mlp": (shapes, 1)}
    assert experts is not None
    router = _half_norm_shapes(spec, layer, "mlp")
    if experts.router.has_bias:
        router["router.bias"] = (experts.num_experts,)
    kind = "float32_weight" if experts.router.in_float32 else "weight"
    router[f"router.{kind}"] = (experts.num_experts, hidden)
    if experts.gates_shared:
        router["shared_gate.weight"] = (1, hidden)
    components["router"] = router, 1
    if experts.shared is not None:
        components["shared_expert"] = _mlp_shapes(hidden, experts.shared, "shared_"), 1
    expert = _mlp_shapes(hidden, experts.expert, "expert_")
    return components | {"experts": (expert, experts.num_experts)}


def _attention_shapes(spec: ModelSpec, layer: LayerSpec) -> Shapes:
    attention, hidden = layer.attention, spec.hidden_size
    shapes = _half_norm_shapes(spec, layer, "attention")
    if attention.qkv_bias:
        shapes["qkv.bias"] = (attention.qkv_size,)
    if attention.qk_norm_has_weight:
        shapes |= _qk_norm_shapes(attention)
    if attention.has_sinks:
        shapes["attention.sinks"] = (attention.num_heads,)
    if attention.output_bias:
        shapes["output.bias"] = (hidden,)
    qkv, query = attention.qkv_size, attention.query_size
    if attention.has_output_gate:
        shapes["attention_gate.weight"] = (query, hidden)
    return shapes | {"qkv.weight": (qkv, hidden), "output.weight": (hidden, query)}


def _qk_norm_shapes(attention: AttentionSpec) -> Shapes:
    if attention.qk_norm == "none":
        return {}
    sizes = (attention.head_dim, attention.head_dim)
    if attention.qk_norm == "projection":
        sizes = (attention.query_size, attention.kv_size)
    return {"q_norm.weight": sizes[:1], "k_norm.weight": sizes[1:]}


def _mlp_shapes(hidden: int, mlp: MlpSpec, prefix: str) -> Shapes:
    up = f"{prefix}gate_up" if mlp.is_gated else f"{prefix}up"
    shapes: Shapes = {}
    if mlp.has_bias:
        shapes |= {f"{up}.bias": (mlp.inner_rows,), f"{prefix}down.bias": (hidden,)}
    shapes |= {f"{up}.weight": (mlp.inner_rows, hidden)}
    return shapes | {f"{prefix}down.weight": (hidden, mlp.size)}


def embedding_shapes(spec: ModelSpec) -> Shapes:
    """Return the embedding tables; a tied table of tokens is part of the head instead."""
    shapes: Shapes = {}
    if spec.embedding.has_positions:
        rows = spec.max_positions + spec.embedding.position_offset
        shapes["positions.weight"] = (rows, spec.hidden_size)
    if not spec.head.is_tied:
        shapes["tokens.weight"] = (spec.vocab_size, spec.hidden_size)
    return shapes


def head_shapes(spec: ModelSpec, num_rows: int, *, is_first: bool) -> Shapes:
    """Return the tensors of a chunk of the head; the first chunk has the final norm too."""
    shapes = _norm_shapes(spec, spec.final_norm, "final_norm") if is_first else {}
    if spec.head.has_bias:
        shapes["head.bias"] = (num_rows,)
    return shapes | {"head.weight": (num_rows, spec.hidden_size)}
