"""The policy file: exact round trip, and every malformed one refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodel.plan.lengths import Sketch
from costmodel.plan.policy import LanePolicy, Placement, Policy
from costmodel.plan.workload import Workload
from costmodel.pricing.price import estimate
from profiles import InputError
from profiles.files import from_json, to_json
from tests.costmodel.machines import make_machine, make_policy


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_round_trip_is_exact(first: float, second: float, attention: float) -> None:
    gpu, cpu = first, (1 - first) * second
    placement = Placement(gpu=gpu, cpu=cpu, disk=max(0.0, 1 - gpu - cpu))
    policy = make_policy(weights=placement, cache=placement, cpu_attention=attention)
    assert from_json(Policy, json.loads(json.dumps(to_json(policy))), "policy") == policy


def test_file_round_trip_with_prediction(tmp_path: Path) -> None:
    machine = make_machine()
    policy = make_policy()
    policy = replace(policy, hardware=machine, predicted=estimate(policy, machine))
    policy.save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == policy
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]


def test_one_placement_in_a_file_stands_for_all_components(tmp_path: Path) -> None:
    policy = make_policy(weights=Placement(cpu=0.25, disk=0.75))
    raw = to_json(policy) | {"weights": {"gpu": 0, "cpu": 0.25, "disk": 0.75}}
    (tmp_path / "policy.json").write_text(json.dumps(raw))
    assert Policy.load(tmp_path / "policy.json") == policy
    (tmp_path / "policy.json").write_text(json.dumps(raw | {"schema_version": 1}))
    with pytest.raises(InputError, match=r"schema_version 1; allowed: 3.*costmodel\.search"):
        Policy.load(tmp_path / "policy.json")


def test_files_of_version_2_are_read(tmp_path: Path) -> None:
    raw = to_json(make_policy()) | {"schema_version": 2}
    del raw["lanes"], raw["workload"]["lengths"]
    (tmp_path / "policy.json").write_text(json.dumps(raw))
    assert Policy.load(tmp_path / "policy.json") == make_policy()


def test_lengths_and_lanes_round_trip(tmp_path: Path) -> None:
    sketch = Sketch(prompts=(16, 3), outputs=(4, 5), limits=(8, 6), weights=(1, 2))
    work = Workload(prompt_len=16, gen_len=8, num_prompts=3, lengths=sketch)
    lanes = LanePolicy(pool_tokens=640, pass_rows=96, chunk_rows=32)
    policy = replace(make_policy(), workload=work, lanes=lanes)
    policy.save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == policy


def _set(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        place: Any = value
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("schema_version", to=1), "schema_version"),
        (_set("surprise", to=1), "surprise"),
        (_set("weights", "mlp", "cpu", to=0.5), "sum to 1"),
        (_set("cache", "cpu", to=-0.1), "cache"),
        (_set("cache", "cpu", to="all"), "cache.cpu"),
        (_set("activations", to=None), "activations"),
        (_set("gpu_batch_size", to=0), "gpu_batch_size"),
        (_set("gpu_batch_size", to=2.5), "whole number"),
        (_set("num_gpu_batches", to=-1), "num_gpu_batches"),
        (_set("prefill_batch_size", to=5), "at most gpu_batch_size 4"),
        (_set("cpu_attention", to=1.5), "cpu_attention"),
        (_set("weight_bits", to=5), "weight_bits"),
        (_set("cache_bits", to=32), "cache_bits"),
        (_set("attention_sparsity", to=2), "attention_sparsity"),
        (_set("workload", "gen_len", to=0), "gen_len"),
        (_set("model", "family", to="bert"), "family"),
        (lambda value: value.pop("weights"), "weights"),
        (_set("weights", to={"cpu": 0.5}), "sum to 1"),
        (lambda value: value["weights"].pop("mlp"), "each of attention, mlp, head"),
        (_set("weights", "experts", to={"cpu": 1.0}), "each of attention, mlp, head"),
        (_set("cpu_experts", to=-0.5), "cpu_experts"),
        (_set("loads_on_demand", to=1), "loads_on_demand"),
        (_set("cpu_experts", to=0.5), "policy.cpu_experts: got 0.5; allowed: 0, because"),
        (_set("loads_on_demand", to=True), "got true; allowed: false, because"),
        (lambda value: value["model"].pop("layer_order"), "layer_order"),
        (_set("model", "layer_order", to=[0, 2]), "layer_order"),
        (_set("model", "layer_kinds", 0, "attention", "num_kv_heads", to=3), "num_kv_heads"),
        (_set("model", "layer_kinds", 0, "mlp", to=None), "layer"),
    ],
)
def test_malformed(change: Callable[[dict[str, Any]], None], said: str, tmp_path: Path) -> None:
    value = to_json(make_policy())
    change(value)
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InputError) as caught:
        Policy.load(path)
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weights": NaN}', '{"weights": 1e999}'])
def test_not_a_policy_at_all(text: str, tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text(text)
    with pytest.raises(InputError, match=r"policy\.json"):
        Policy.load(tmp_path / "policy.json")
