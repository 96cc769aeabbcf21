"""Descriptions of latent attention: what is refused, and by which name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from costmodel.families import preset_config, spec_from_config
from costmodel.model.loading import load_model_spec
from costmodel.model.spec import ModelSpec
from profiles.errors import InputError
from profiles.files import from_json, to_json

V2, V3, K2 = "deepseek-v2", "deepseek-v3", "kimi-k2"


@pytest.mark.parametrize(
    ("preset", "changes", "key"),
    [
        (V3, {"num_key_value_heads": 64}, "num_key_value_heads"),
        (V3, {"head_dim": 128}, "head_dim"),
        (V3, {"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
        (V3, {"q_lora_rank": None, "attention_bias": True}, "attention_bias"),
        (V3, {"rope_scaling": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (V3, {"scoring_func": "softmax"}, "scoring_func"),
        (V3, {"topk_method": "greedy"}, "topk_method"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (V3, {"quantization_config": {"quant_method": "fbgemm_fp8"}}, "quantization_config"),
        (V3, {"n_group": 3}, "router groups"),
        (K2, {"scoring_func": "softmax"}, "scoring_func"),
        (V2, {"topk_method": "noaux_tc"}, "topk_method"),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob"),
        (V2, {"mlp_bias": True}, "mlp_bias"),
        (V2, {"n_group": None}, "n_group"),
    ],
)
def test_what_would_change_the_computation_is_refused(
    preset: str, changes: dict[str, Any], key: str
) -> None:
    config = dict(preset_config(preset))
    assert isinstance(spec_from_config(config, name="whole"), ModelSpec)
    with pytest.raises(InputError, match=key):
        spec_from_config(config | changes, name="changed")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 2},
        {"head_dim": 512},
        {"scale": None},
        {"rotary": None},
        {"window": 8},
        {"soft_cap": 5.0},
        {"has_sinks": True},
        {"clip": 1.0},
        {"qk_norm": "head"},
    ],
)
def test_a_latent_excludes_what_its_arithmetic_has_not(changes: dict[str, Any]) -> None:
    attention = load_model_spec(V3).layer(0).attention
    with pytest.raises(InputError, match="latent attention"):
        replace(attention, **changes)


def test_the_error_names_the_fields_that_are_set() -> None:
    attention = load_model_spec(V3).layer(0).attention
    with pytest.raises(InputError, match="got window 8, has_sinks True; allowed: no"):
        replace(attention, window=8, has_sinks=True)
    with pytest.raises(InputError, match="got a rotation of 0 elements; allowed: one of 64"):
        replace(attention, rotary=None)


def test_a_description_is_the_same_after_a_file() -> None:
    spec = load_model_spec(K2)
    assert from_json(ModelSpec, to_json(spec), "model") == spec


def test_groups_are_ranked_as_in_each_version() -> None:
    routers = [load_model_spec(name).layer(5).experts for name in (V2, V3, K2)]
    found = [
        (e.router.num_groups, e.router.groups_per_token, e.router.scores_per_group)
        for e in routers
        if e is not None
    ]
    assert found == [(8, 3, 1), (8, 4, 2), (1, 1, 2)]
