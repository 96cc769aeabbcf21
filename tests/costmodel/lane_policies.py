"""Policies of lanes for a CPU, and models of every kind for them."""

from __future__ import annotations

import functools

from costmodel.families import spec_from_config
from costmodel.model.loading import load_model_spec
from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import LanePolicy, Placement, Policy
from costmodel.plan.rounding import round_policy
from costmodel.plan.workload import Workload
from profiles.recorded import find_profile
from tests.costmodel.machines import make_mixture, make_model, make_policy

CPU = find_profile("cpu-2core")
MIXED = Placement(cpu=0.4, disk=0.6)
# Three of four layers see 40 tokens.
WINDOWS = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "sliding_window": 40,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "torch_dtype": "bfloat16",
}


@functools.cache
def models() -> dict[str, ModelSpec]:
    """Return models with and without windows and experts, small and large."""
    return {
        "plain": make_model(),
        "windows": spec_from_config(WINDOWS, name="windows"),
        "mixture": make_mixture(),
        "3b": load_model_spec("llama-3.2-3b"),
    }


def lane_policy(model: ModelSpec, *, has_gpu: bool = False, **changes: object) -> Policy:
    """Return a policy of eight lanes in batches of four, most of its weights on the disk."""
    lanes = LanePolicy(pool_tokens=100_000, pass_rows=4096, chunk_rows=64)
    fields: dict[str, object] = {
        "model": model,
        "weights": MIXED,
        "prefill_batch_size": 4,
        "lanes": lanes,
        "workload": Workload(prompt_len=16, gen_len=100),
    }
    return round_policy(make_policy(**(fields | changes)), has_gpu=has_gpu)
