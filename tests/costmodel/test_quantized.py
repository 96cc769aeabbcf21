"""``quantization_config`` as repositories have it: encodings, what is skipped, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from costmodel.model.module_patterns import ModulePatterns
from costmodel.model.quantized import read_quantized
from profiles.errors import InputError

GPTQ = {
    "bits": 4,
    "damp_percent": 0.01,
    "dataset": None,
    "desc_act": False,
    "exllama_config": {"version": 1},
    "group_size": 128,
    "modules_in_block_to_quantize": None,
    "quant_method": "gptq",
    "sym": True,
}
AWQ = {
    "bits": 4,
    "group_size": 128,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}
INTEGERS = {
    "actorder": "weight",
    "block_structure": None,
    "dynamic": False,
    "group_size": 128,
    "num_bits": 4,
    "observer": "minmax",
    "strategy": "group",
    "symmetric": True,
    "type": "int",
}
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
MXFP4 = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
NF4 = {
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_skip_modules": None,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}


def _compressed(layout: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    group = {"input_activations": None, "targets": ["Linear"], "weights": INTEGERS | weights}
    return {
        "config_groups": {"group_0": group},
        "format": layout,
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


@pytest.mark.parametrize(
    ("raw", "layout", "encoding"),
    [
        (GPTQ, "gptq", "INT4_G128_F16_Z"),
        (GPTQ | {"bits": 8, "group_size": -1}, "gptq", "INT8_G0_F16_Z"),
        (GPTQ | {"checkpoint_format": "gptq_v2", "desc_act": True}, "gptq_v2", "INT4_G128_F16_Z"),
        (AWQ | {"version": "GEMM", "group_size": 64}, "awq", "INT4_G64_F16_Z"),
        (_compressed(), "pack-quantized", "INT4_G128_BF16"),
        (_compressed(symmetric=False), "pack-quantized", "INT4_G128_BF16_Z"),
        (
            _compressed("int-quantized", num_bits=8, strategy="channel", group_size=None),
            "int-quantized",
            "INT8_G0_BF16",
        ),
        (
            _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
            "float-quantized",
            "E4M3_1X0",
        ),
        (
            _compressed(
                "float-quantized",
                num_bits=8,
                type="float",
                strategy="block",
                block_structure=[128, 128],
            ),
            "float-quantized",
            "E4M3_128X128",
        ),
        (FP8, "fp8", "E4M3_128X128"),
        (FP8 | {"weight_block_size": None}, "fp8", "E4M3_1X0"),
        ({"quant_method": "fp8"}, "fp8", "E4M3_128X128"),
        # As MiniMax-M2 has it.
        (FP8 | {"fmt": "float8_e4m3fn"}, "fp8", "E4M3_128X128"),
        (MXFP4, "mxfp4", "MXFP4"),
        (NF4, "bnb4", "MAP4_G64_NESTED"),
        (NF4 | {"bnb_4bit_use_double_quant": False}, "bnb4", "MAP4_G64"),
        (NF4 | {"load_in_4bit": False, "load_in_8bit": True}, "bnb8", "BNB8"),
    ],
)
def test_configs_are_read(raw: dict[str, Any], layout: str, encoding: str) -> None:
    found = read_quantized({"quantization_config": raw}, "bfloat16")
    assert found is not None
    assert (found.layout, found.encoding.name) == (layout, encoding)
    assert found.skips("lm_head") and not found.skips("model.layers.0.mlp.up_proj")


def test_a_plain_checkpoint_has_none() -> None:
    assert read_quantized({}, "bfloat16") is None
    assert read_quantized({"quantization_config": None}, "bfloat16") is None


@pytest.mark.parametrize(
    "module",
    [
        "lm_head",
        "model.embed_tokens",
        "model.layers.11.self_attn.q_proj",
        "model.layers.1.mlp.router",
        "model.layers.1.mlp.router_bias",
        "model.layers.1.mlp.experts",
        "model.embed_tokens_2",
    ],
)
def test_patterns_skip_what_transformers_skips(module: str) -> None:
    found = read_quantized({"quantization_config": MXFP4}, "bfloat16")
    assert found is not None
    patterns: Any = MXFP4["modules_to_not_convert"]
    assert found.skips(module) is not should_convert_module(module, patterns)


@pytest.mark.parametrize(
    "pattern",
    [
        "lm_head",
        "gate",
        "mlp.gate",
        "model.layers.1",
        "model.layers.*",
        "model.layers.*.self_attn",
        "model.layers.1.*gate",
        "model.layers.1*.mlp",
        ".*mlp.gate",
        ".*.gate",
        "model.*.mlp.*.gate",
        "model.*gate.*",
        "*.mlp",
    ],
)
def test_names_and_stars_are_those_of_transformers(pattern: str) -> None:
    found = ModulePatterns.read([pattern], "names")
    for module in (
        "lm_head",
        "model.lm_head",
        "model.layers.1.mlp.gate",
        "model.layers.1.mlp.gate_proj",
        "model.layers.11.mlp.experts.3.gate",
        "model.layers.11.self_attn.q_proj",
        "model.layers.1.self_attn",
        "model.layers.2.mlp",
        "mlp.gate.mlp.gates",
    ):
        # A star at the start is no expression: transformers ends with an error.
        theirs = f".{pattern}" if pattern.startswith("*") else pattern
        assert found.match(module) is not should_convert_module(module, [theirs]), module


def test_the_slowest_patterns_end_soon() -> None:
    """The number of steps is bounded, so that a name of 60 characters takes no second."""
    slow = [f"re:.*.*{'(a|a|a|a)(a|a|a|a)'}Z{n}" for n in range(32)]
    found = ModulePatterns.read(slow, "names")
    assert not found.match("a" * 60)


def test_compressed_tensors_skips_whole_names() -> None:
    found = read_quantized({"quantization_config": _compressed()}, "bfloat16")
    assert found is not None
    assert found.skips("lm_head") and found.skips("model.layers.3.mlp.gate")
    assert not found.skips("model.lm_head") and not found.skips("model.layers.3.mlp.gate_proj")


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        ([], "quantization_config"),
        ({}, "quant_method"),
        ({"quant_method": "aqlm"}, "aqlm"),
        (GPTQ | {"bits": 3}, "bits"),
        (GPTQ | {"bits": True}, "bits"),
        (GPTQ | {"group_size": 48}, "group_size"),
        (GPTQ | {"dynamic": {"-:.*": {}}}, "dynamic"),
        (GPTQ | {"checkpoint_format": "marlin"}, "marlin"),
        (AWQ | {"version": "gemv"}, "gemv"),
        (AWQ | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        (FP8 | {"fmt": "e5m2"}, "e5m2"),
        (FP8 | {"weight_block_size": [128, 100]}, "weight_block_size"),
        (FP8 | {"modules_to_not_convert": ["("]}, "modules_to_not_convert"),
        (FP8 | {"modules_to_not_convert": ["re:("]}, "modules_to_not_convert"),
        (FP8 | {"modules_to_not_convert": ["re:(a+)+b"]}, "repeats"),
        (FP8 | {"modules_to_not_convert": ["re:" + ".*" * 3]}, "repeats"),
        (FP8 | {"modules_to_not_convert": ["re:" + "a?" * 30]}, "repeats"),
        (FP8 | {"modules_to_not_convert": ["re:" + "(.|.)" * 30]}, "alternatives"),
        (FP8 | {"modules_to_not_convert": ["re:(?:a|b){9}"]}, "repeats"),
        (FP8 | {"modules_to_not_convert": ["re:.*a"] * 33}, "33 patterns"),
        (FP8 | {"modules_to_not_convert": ["a.*b"] * 33}, "33 patterns"),
        (FP8 | {"modules_to_not_convert": ["a"] * 10000}, "10000 names"),
        (FP8 | {"modules_to_not_convert": [""]}, "characters"),
        (NF4 | {"bnb_4bit_quant_type": "int4"}, "int4"),
        (NF4 | {"load_in_4bit": False}, "load_in_4bit"),
        (_compressed() | {"config_groups": {}}, "config_groups"),
        (_compressed() | {"format": "marlin-24"}, "marlin-24"),
        (_compressed() | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (_compressed(strategy="token"), "strategy"),
        (_compressed("int-quantized", num_bits=8), "weights"),
    ],
)
def test_what_is_not_read_is_told(raw: Any, word: str) -> None:
    with pytest.raises(InputError) as caught:
        read_quantized({"quantization_config": raw}, "bfloat16")
    assert word in str(caught.value) and "\n" not in str(caught.value)
    assert "quantization_config" in str(caught.value)
