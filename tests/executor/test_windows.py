"""Sliding windows, sinks and soft caps, by brute force and whole runs beside those of families."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Placement
from executor.checkpoint.folder import Checkpoint
from executor.model import prefill_attention as prefill
from executor.stores.cache_layout import CacheLayout
from tests.covering import covering
from tests.executor.model_cases import make_case
from tests.executor.reference import Compression, ReferenceModel
from tests.executor.tiny_machines import (
    ON_DISK,
    ExpectedCase,
    draw_policy,
    make_hardware,
)

# Prompts longer than each window, shorter ones, and tokens generated beyond it.
LENGTHS = (17, 2, 9, 1, 5, 12, 12)
GEN_LEN = 9
MACHINES = {"cpu": make_hardware(), "gpu": make_hardware(gpu=True)}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"family": "mistral", "sliding_window": 7},
    "qwen3": {
        "family": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": MIXED,
    },
    "mixtral": {"family": "mixtral", "sliding_window": 20},
    "gemma2": {"family": "gemma2", "sliding_window": 11},
    "gemma3": {"family": "gemma3_text", "sliding_window": 4, "layer_types": MIXED},
    "cohere2": {"family": "cohere2", "sliding_window": 1, "layer_types": MIXED},
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ExpectedCase]:
    """Make each model once, with transformers' tokens for each prompt by itself."""
    made: dict[str, ExpectedCase] = {}

    def make(name: str) -> ExpectedCase:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name], _ = make_case(folder, LENGTHS, GEN_LEN, **MODELS[name])
        return made[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_a_window_matters(cases: Callable[[str], ExpectedCase], name: str) -> None:
    case = cases(name)
    spec = case.source.spec
    assert any(kind.attention.window for kind in spec.layer_kinds)
    assert isinstance(case.source, Checkpoint)
    whole = replace(case.source, spec=without_windows(spec))
    assert ReferenceModel(whole).generate(list(map(list, case.prompts)), GEN_LEN) != case.tokens


def without_windows(spec: ModelSpec) -> ModelSpec:
    kinds = tuple(
        replace(kind, attention=replace(kind.attention, window=None)) for kind in spec.layer_kinds
    )
    return replace(spec, layer_kinds=kinds)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_prompts_may_be_shorter_than_planned(
    cases: Callable[[str], ExpectedCase], name: str, machine: str
) -> None:
    """The slots are those of the plan, and a shorter prompt fills fewer."""
    case = cases(name)
    few = replace(
        case,
        prompts=[p for p in case.prompts if len(p) <= 9],
        tokens=[t for p, t in zip(case.prompts, case.tokens, strict=True) if len(p) <= 9],
    )
    thirds = Placement(gpu=0.3, cpu=0.3, disk=0.4) if machine == "gpu" else ON_DISK
    policy = case.policy(cache=thirds, gpu_batch_size=4, cpu_attention=0.5)
    assert few.generate(policy, MACHINES[machine]) == few.tokens


@covering(
    {
        "name": ["qwen3", "gemma2"],
        "machine": list(MACHINES),
        "cache_bits": [None, 4],
        "sparsity": [1.0, 0.4],
    }
)
def test_packed_and_sparse_rings(
    cases: Callable[[str], ExpectedCase],
    name: str,
    machine: str,
    cache_bits: int | None,
    sparsity: float,
) -> None:
    case = cases(name)
    prompts = list(map(list, case.prompts))
    compression = Compression(cache_bits=cache_bits, group_size=32, sparsity=sparsity)
    expected = ReferenceModel(case.source, compression=compression).generate(prompts, GEN_LEN)
    rng = random.Random(f"{name} on {machine}")
    for _ in range(2):
        policy = draw_policy(case.policy(), rng, gpu=machine == "gpu")
        policy = replace(
            policy, cache_bits=cache_bits or 32, group_size=32, attention_sparsity=sparsity
        )
        assert case.generate(policy, MACHINES[machine]) == expected, policy


@covering(
    {
        "window": [None, 1, 3, 8, 40],
        "soft_cap, has_sinks": [(None, False), (2.0, False), (None, True), (2.0, True)],
        "tokens": [1, 7, 33],
        "dtype": [torch.float32, torch.bfloat16],
        "attend": [prefill.prefill_attention, prefill.attend_on_gpu],
    }
)
def test_prefill_attention_matches_explicit_softmax(
    window: int | None,
    soft_cap: float | None,
    has_sinks: bool,
    tokens: int,
    dtype: torch.dtype,
    attend: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefill, "QUERIES_AT_ONCE", 5)
    monkeypatch.setattr(prefill, "KEYS_AT_ONCE", 6)
    q, k, v = (torch.randn(2, tokens, heads, 8).to(dtype) for heads in (6, 2, 2))
    sinks = torch.randn(6) if has_sinks else None
    spec = AttentionSpec(
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        window=window,
        soft_cap=soft_cap,
        has_sinks=has_sinks,
    )
    keys, values = (t.double().repeat_interleave(3, dim=2).transpose(1, 2) for t in (k, v))
    scores = q.double().transpose(1, 2) @ keys.transpose(2, 3) / 8**0.5
    if soft_cap is not None:
        scores = soft_cap * (scores / soft_cap).tanh()
    distances = torch.arange(tokens)[:, None] - torch.arange(tokens)
    scores[..., (distances < 0) | (distances >= (window or tokens))] = -torch.inf
    if sinks is not None:
        column = sinks.double().view(6, 1, 1).expand(2, 6, tokens, 1)
        scores = torch.cat([scores, column], dim=-1)
    shares = scores.softmax(-1)[..., :tokens]
    expected = (shares @ values).transpose(1, 2).flatten(2)
    found = attend(q, k, v, spec, sinks)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("prompt_len", [1, 3, 6, 9])
def test_a_ring_holds_the_last_tokens(prompt_len: int) -> None:
    """Each slot's token, followed step by step."""
    layout = CacheLayout(
        rows_per_sequence=1,
        head_dim=8,
        num_slots=6,
        prompt_slots=6,
        is_ring=True,
        segments=(),
        packing=None,
        dtype=torch.float32,
    )
    lengths = torch.arange(1, prompt_len + 1, dtype=torch.int32)
    kept = layout.kept(prompt_len)
    held: list[dict[int, int]] = [
        {kept - back: length - back for back in range(1, min(kept, length) + 1)}
        for length in lengths.tolist()
    ]
    for token in range(1, 20):
        slot, used = layout.new_slot(prompt_len, token), layout.used_slots(prompt_len, token)
        void_slots = layout.void_slots(lengths, prompt_len, token).tolist()
        is_void = [[first <= s < end for s in range(used)] for first, end in void_slots]
        for length, slots, void in zip(lengths.tolist(), held, is_void, strict=True):
            newest = length + token - 1
            slots[slot] = newest
            assert sorted(slots.values()) == list(range(max(0, newest - 5), newest + 1))
            assert [s for s in range(used) if not void[s]] == sorted(slots)
        assert layout.has_void_slots(1, prompt_len, token) == any(map(any, is_void))
