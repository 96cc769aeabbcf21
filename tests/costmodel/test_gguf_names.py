"""Which rows of a GGUF file make our tensors, where files store them in several ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from costmodel.families import spec_from_config
from costmodel.gguf.model import GgufModel
from costmodel.gguf.names import check_tensors, stored_rows
from costmodel.model.encoded_model import with_encodings
from costmodel.model.encoded_rows import EncodedRows
from costmodel.model.shapes import component_shapes
from costmodel.model.spec import ModelSpec
from costmodel.model.tensor_entry import TensorEntry
from profiles.errors import InputError

SPEC = spec_from_config(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 48,
        "moe_intermediate_size": 40,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32,
    },
    name="tiny",
)
OUTSIDE = {"token_embd": (96, 64), "output_norm": (64,), "output": (96, 64)}
# Of each layer, whatever the way of the rest.
COMMON = {
    "attn_norm": (64,),
    "ffn_norm": (64,),
    "attn_q_norm": (16,),
    "attn_k_norm": (16,),
    "attn_output": (64, 64),
    "ffn_gate_inp": (6, 64),
    "ffn_down_exps": (6, 64, 40),
}
SEPARATE = {
    "attn_q": (64, 64),
    "attn_k": (32, 64),
    "attn_v": (32, 64),
    "ffn_gate_exps": (6, 40, 64),
    "ffn_up_exps": (6, 40, 64),
}
FUSED = {"attn_qkv": (128, 64), "ffn_gate_up_exps": (6, 80, 64)}

Found = list[tuple[str, int, int]]


def _model(of_layer: Mapping[str, tuple[int, ...]], spec: ModelSpec = SPEC) -> GgufModel:
    shapes = dict(OUTSIDE)
    for layer in range(spec.num_layers):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in of_layer.items()}
    entries = {
        f"{name}.weight": TensorEntry(
            path=Path("tiny.gguf"),
            name=f"{name}.weight",
            dtype="F32",
            shape=shape,
            offset_bytes=0,
            num_bytes=0,
        )
        for name, shape in shapes.items()
    }
    return GgufModel(metadata={"general.architecture": "qwen3moe"}, tensors=entries)


def _rows(model: GgufModel, name: str, *, layer: int = 1, expert: int = 3) -> Found:
    found = stored_rows(model, SPEC, name, layer=layer, expert=expert)
    return [(rows.entry.name, rows.first, rows.count) for rows in found]


def test_projections_are_stacked_of_separate_tensors() -> None:
    model = _model(COMMON | SEPARATE)
    check_tensors(model, SPEC)
    assert _rows(model, "qkv.weight") == [
        ("blk.1.attn_q.weight", 0, 64),
        ("blk.1.attn_k.weight", 0, 32),
        ("blk.1.attn_v.weight", 0, 32),
    ]
    assert _rows(model, "expert_gate_up.weight") == [
        ("blk.1.ffn_gate_exps.weight", 120, 40),
        ("blk.1.ffn_up_exps.weight", 120, 40),
    ]
    assert _rows(model, "expert_down.weight") == [("blk.1.ffn_down_exps.weight", 192, 64)]
    assert _rows(model, "q_norm.weight") == [("blk.1.attn_q_norm.weight", 0, 1)]
    assert _rows(model, "head.weight") == [("output.weight", 0, 96)]


def test_a_converter_may_have_stacked_them() -> None:
    model = _model(COMMON | FUSED)
    check_tensors(model, SPEC)
    assert _rows(model, "qkv.weight") == [("blk.1.attn_qkv.weight", 0, 128)]
    assert _rows(model, "expert_gate_up.weight") == [("blk.1.ffn_gate_up_exps.weight", 240, 80)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_k": (16, 64)}, "[64, 64] and [16, 64] and [32, 64]; allowed: [128, 64] in all"),
        ({"attn_q": (128, 32)}, "got a shape of [128, 32]"),
        ({"ffn_up_exps": (5, 40, 64)}, "[80, 64] in all for expert_gate_up.weight of each of 6"),
        ({"ffn_down_exps": (6, 40, 64)}, "got a shape of [6, 40, 64]"),
        ({"ffn_up": (48, 64)}, "got tensor blk.0.ffn_up.weight (and 1 more)"),
        ({"attn_sinks": (4,)}, "got tensor blk.0.attn_sinks.weight (and 1 more)"),
    ],
)
def test_other_shapes_and_tensors_are_refused(
    changes: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        check_tensors(_model(COMMON | SEPARATE | changes), SPEC)
    assert message in str(caught.value)


@pytest.mark.parametrize("in_float32", [False, True])
def test_encoded_routers_are_decoded_when_they_are_read(in_float32: bool) -> None:
    (kind,) = SPEC.layer_kinds
    assert kind.experts is not None
    experts = replace(kind.experts, router=replace(kind.experts.router, in_float32=in_float32))
    spec = replace(SPEC, layer_kinds=(replace(kind, experts=experts),))

    def rows_of(layer: int, name: str) -> list[EncodedRows]:
        if layer < 0:
            return []
        shapes = [shapes for shapes, _ in component_shapes(spec, spec.layer(0)).values()]
        (rows,) = (found[name][0] for found in shapes if name in found)
        return [EncodedRows(tensor=name, rows=rows, encoding="Q8_0")]

    encoded = {rows.tensor for rows in with_encodings(spec, rows_of).layer(1).encoded}
    assert encoded == {"qkv.weight", "output.weight", "expert_gate_up.weight", "expert_down.weight"}


def test_a_missing_tensor_is_told_with_all_ways() -> None:
    without = {name: shape for name, shape in SEPARATE.items() if name != "attn_v"}
    with pytest.raises(InputError) as caught:
        check_tensors(_model(COMMON | without), SPEC)
    assert "no tensor for qkv.weight of layer 0; allowed: blk.0.attn_qkv.weight or" in str(
        caught.value
    )
