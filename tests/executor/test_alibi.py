"""ALiBi: whole runs against transformers, parts by brute force."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from costmodel.families import spec_from_config
from costmodel.families._alibi import alibi_slopes, to_bfloat16
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.loading import load_model_spec
from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Policy
from executor.checkpoint.folder import Checkpoint
from executor.model import prefill_attention as prefill
from profiles.errors import InputError
from profiles.files import from_json, to_json
from tests.covering import covering
from tests.executor.model_cases import make_case
from tests.executor.reference import Compression, ReferenceModel
from tests.executor.test_windows import GEN_LEN, LENGTHS, MACHINES
from tests.executor.tiny_machines import ExpectedCase, draw_policy, make_policy

MODELS: dict[str, dict[str, Any]] = {
    "falcon": {"family": "falcon", "alibi": True, "multi_query": False},
    "mpt": {"family": "mpt"},
    "bloom": {"family": "bloom", "num_attention_heads": 4, "hidden_size": 96},
}
Cases = Callable[[str], ExpectedCase]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Make each model once, with transformers' tokens for each prompt by itself."""
    made: dict[str, ExpectedCase] = {}

    def make(name: str) -> ExpectedCase:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name], _ = make_case(folder, LENGTHS, GEN_LEN, **MODELS[name])
        return made[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_slopes_matter(cases: Cases, name: str) -> None:
    case = cases(name)
    assert isinstance(case.source, Checkpoint)
    flat = replace(case.source, spec=_without_slopes(case.source.spec))
    assert ReferenceModel(flat).generate(list(map(list, case.prompts)), GEN_LEN) != case.tokens


def _without_slopes(spec: ModelSpec) -> ModelSpec:
    kinds = tuple(
        replace(kind, attention=replace(kind.attention, alibi_slopes=()))
        for kind in spec.layer_kinds
    )
    return replace(spec, layer_kinds=kinds)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", MODELS)
def test_random_policies(cases: Cases, name: str, machine: str) -> None:
    case = cases(name)
    assert case.generate(case.policy(), MACHINES[machine]) == case.tokens
    rng = random.Random(f"{name} on {machine}")
    # More of them are among those of all families.
    for _ in range(2):
        policy = draw_policy(case.policy(), rng, gpu=machine == "gpu")
        assert case.generate(policy, MACHINES[machine]) == case.tokens, policy


@covering(
    {
        "name": list(MODELS),
        "machine": list(MACHINES),
        "cache_bits": [None, 4],
        "sparsity": [1.0, 0.4],
    }
)
def test_packed_and_sparse_caches(
    cases: Cases, name: str, machine: str, cache_bits: int | None, sparsity: float
) -> None:
    case = cases(name)
    prompts = list(map(list, case.prompts))
    compression = Compression(cache_bits=cache_bits, group_size=32, sparsity=sparsity)
    expected = ReferenceModel(case.source, compression=compression).generate(prompts, GEN_LEN)
    rng = random.Random(f"{name} on {machine}")
    policy = draw_policy(case.policy(), rng, gpu=machine == "gpu")
    policy = replace(
        policy, cache_bits=cache_bits or 32, group_size=32, attention_sparsity=sparsity
    )
    assert case.generate(policy, MACHINES[machine]) == expected, policy


@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attend", [prefill.prefill_attention, prefill.attend_on_gpu])
def test_prefill_attention_matches_explicit_softmax(
    tokens: int,
    soft_cap: float | None,
    dtype: torch.dtype,
    attend: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefill, "QUERIES_AT_ONCE", 5)
    monkeypatch.setattr(prefill, "KEYS_AT_ONCE", 6)
    q, k, v = (torch.randn(2, tokens, heads, 8).to(dtype) for heads in (6, 2, 2))
    slopes = alibi_slopes(6)
    spec = AttentionSpec(
        num_heads=6, num_kv_heads=2, head_dim=8, soft_cap=soft_cap, alibi_slopes=slopes
    )
    keys, values = (t.double().repeat_interleave(3, dim=2).transpose(1, 2) for t in (k, v))
    scores = q.double().transpose(1, 2) @ keys.transpose(2, 3) / 8**0.5
    if soft_cap is not None:
        scores = soft_cap * (scores / soft_cap).tanh()
    distances = torch.arange(tokens)[:, None] - torch.arange(tokens)
    scores -= torch.tensor(slopes, dtype=torch.float64).view(6, 1, 1) * distances
    scores[..., distances < 0] = -torch.inf
    expected = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    found = attend(q, k, v, spec, None)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_heads", [1, 4, 6, 12, 32, 71, 112])
def test_slopes_are_those_of_transformers(num_heads: int) -> None:
    ours = torch.tensor(alibi_slopes(num_heads))
    torch.testing.assert_close(ours, _get_alibi_slopes(num_heads, torch.device("cpu")))
    # The slopes times -1, 0.
    torch.testing.assert_close(ours, -build_mpt_alibi_tensor(num_heads, 2)[:, 0, 0])


def test_rounding_is_that_of_torch() -> None:
    for value in (1.0, 0.1, 2**-0.25, 2**-8.5, 1.00390625, 1.01171875, 3e-39):
        assert to_bfloat16(value) == torch.tensor(value).bfloat16().item()


@pytest.mark.parametrize(
    "changes",
    [
        {"alibi_slopes": (0.5,)},
        {"alibi_slopes": (0.5, float("nan"))},
        {"alibi_slopes": (0.5, -0.25)},
        {"window": 3},
        {"has_sinks": True},
    ],
)
def test_other_slopes_windows_and_sinks_are_refused(changes: dict[str, Any]) -> None:
    whole: dict[str, Any] = {
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
        "alibi_slopes": (0.5, 0.25),
    }
    with pytest.raises(InputError, match=r"alibi.slope") as caught:
        AttentionSpec(**(whole | changes))
    for name in changes.keys() - {"alibi_slopes"}:
        assert f"got {name} {changes[name]};" in str(caught.value)


def test_falcon_scales_rounded_slopes_with_the_scores() -> None:
    raw = {"model_type": "falcon", "alibi": True, "hidden_size": 2048, "num_attention_heads": 32}
    attention = spec_from_config(raw, name="rw").layer(0).attention
    assert attention.rotary is None
    expected = (torch.tensor(alibi_slopes(32)).bfloat16().float() / 8).tolist()
    assert list(attention.alibi_slopes) == expected


@pytest.mark.parametrize("name", ["bloom-7b1", "mpt-7b", "opt-350m", "stablelm-2-12b"])
def test_a_policy_keeps_slopes_and_norms(name: str) -> None:
    spec = load_model_spec(name)
    policy = make_policy(spec, prompt_len=4, gen_len=2)
    assert from_json(Policy, to_json(policy), "policy") == policy
