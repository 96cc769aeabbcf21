"""The tensors of each component of a model, with their shapes. No torch.

Matrices that multiply the same input are stacked into one (``qkv``, ``gate_up``), because one
large product is faster than several small ones. With latent attention ``qkv`` makes the vectors
that ``q_b`` and ``kv_b`` make queries, keys and values of.
"""

from __future__ import annotations

from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.feed_forward_spec import MlpSpec
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.norm_spec import NormSpec
from costmodel.model.spec import ModelSpec

Shapes = dict[str, tuple[int, ...]]


def _norm_shapes(size: int, norm: NormSpec, name: str) -> Shapes:
    shapes: Shapes = {}
    if norm.kind == "none":
        return shapes
    if norm.has_weight:
        shapes[f"{name}.weight"] = (size,)
    if norm.kind == "layer" and norm.has_bias:
        shapes[f"{name}.bias"] = (size,)
    return shapes


def _half_norm_shapes(spec: ModelSpec, layer: LayerSpec, half: str) -> Shapes:
    """Return the norms before and after one half of a layer."""
    names = {
        "before": f"{half}_norm",
        "after": f"{half}_output_norm",
        "sum": f"{half}_sum_norm",
    }
    shapes: Shapes = {}
    if half == "mlp" and layer.shares_norm:
        return shapes
    for place in layer.norm_places:
        shapes |= _norm_shapes(spec.hidden_size, layer.norm, names[place])
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
    if attention.qk_norm != "none":
        shapes |= _query_norm_shapes(layer)
    if attention.has_sinks:
        shapes["attention.sinks"] = (attention.num_heads,)
    if attention.output_bias:
        shapes["output.bias"] = (hidden,)
    if attention.has_output_gate:
        shapes["attention_gate.weight"] = (attention.query_size, hidden)
    shapes |= _latent_shapes(attention)
    qkv, output = attention.qkv_size, attention.output_size
    return shapes | {"qkv.weight": (qkv, hidden), "output.weight": (hidden, output)}


def _latent_shapes(attention: AttentionSpec) -> Shapes:
    """Return what makes queries, and keys and values, of the latents of ``qkv``."""
    heads, latent = attention.num_heads, attention.latent
    if latent is None:
        return {}
    shapes: Shapes = {"kv_a_norm.weight": (latent.rank,)}
    if latent.query_rank is not None:
        shapes |= {
            "q_a_norm.weight": (latent.query_rank,),
            "q_b.weight": (heads * latent.key_dim, latent.query_rank),
        }
    return shapes | {"kv_b.weight": (heads * (latent.nope_dim + latent.value_dim), latent.rank)}


def _query_norm_shapes(layer: LayerSpec) -> Shapes:
    attention, norm = layer.attention, layer.query_norm
    sizes = attention.query_size, attention.kv_size
    if attention.qk_norm == "head":
        sizes = attention.head_dim, attention.head_dim
    shapes: Shapes = {}
    for name, size in zip(("q_norm", "k_norm"), sizes, strict=True):
        shapes |= _norm_shapes(size, norm, name)
    return shapes


def _mlp_shapes(hidden: int, mlp: MlpSpec, prefix: str) -> Shapes:
    up = f"{prefix}gate_up" if mlp.is_gated else f"{prefix}up"
    shapes: Shapes = {}
    if mlp.has_bias:
        shapes |= {f"{up}.bias": (mlp.inner_rows,), f"{prefix}down.bias": (hidden,)}
    if mlp.activation == "xielu":
        shapes |= {f"{prefix}xielu.positive": (1,), f"{prefix}xielu.negative": (1,)}
    shapes |= {f"{up}.weight": (mlp.inner_rows, hidden)}
    return shapes | {f"{prefix}down.weight": (hidden, mlp.size)}


def embedding_shapes(spec: ModelSpec) -> Shapes:
    """Return the tensors of the embedding; a tied table of tokens is part of the head instead.

    A stage of a pipeline without the embedding has none; one without the head has the table.
    """
    norm = spec.embedding.norm
    if not spec.has_embedding:
        return {}
    shapes: Shapes = _norm_shapes(spec.hidden_size, norm, "embedding_norm") if norm else {}
    if spec.embedding.has_positions:
        rows = spec.max_positions + spec.embedding.position_offset
        shapes["positions.weight"] = (rows, spec.hidden_size)
    if not spec.shares_table:
        shapes["tokens.weight"] = (spec.vocab_size, spec.head_width)
    if spec.embedding.width is not None:
        shapes["input_projection.weight"] = (spec.hidden_size, spec.embedding.width)
    return shapes


def head_shapes(spec: ModelSpec, num_rows: int, *, is_first: bool) -> Shapes:
    """Return the tensors of a chunk of the head; the first one makes the input of all."""
    shapes = _norm_shapes(spec.hidden_size, spec.final_norm, "final_norm") if is_first else {}
    if spec.head.has_bias:
        shapes["head.bias"] = (num_rows,)
    if is_first and spec.embedding.width is not None:
        shapes["output_projection.weight"] = (spec.embedding.width, spec.hidden_size)
    # The last tensor, which the rows of a chunk are those of.
    return shapes | {"head.weight": (num_rows, spec.head_width)}
