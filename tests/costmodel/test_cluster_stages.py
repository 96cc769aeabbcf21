"""A stage of a pipeline has the bytes, the work and the memory of its part of the model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from costmodel.cluster.stages import stage_model, stages_of_counts
from costmodel.families import family_named
from costmodel.model.encoded_model import with_encodings
from costmodel.model.encoded_rows import EncodedRows
from costmodel.model.loading import load_model_spec
from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Placement, Policy, placed_alike
from costmodel.plan.workload import Workload
from costmodel.pricing.memory import peak_bytes
from costmodel.pricing.price import peak_buffers, phase_channels
from costmodel.pricing.problem import problem_of
from costmodel.pricing.shares import shares_of
from costmodel.pricing.sizes import sizes_of
from profiles import InputError
from profiles.packing import DEFAULT_GROUP_SIZE
from tests.costmodel.machines import (
    DECODER_BYTES,
    HEAD_BYTES,
    ON_CPU,
    ON_DISK,
    make_compute,
    make_machine,
    make_mixture,
    make_model,
)

UNTIED = make_model(tied=False)
TABLE_BYTES = 2 * 1000 * 256


def _bytes(model: ModelSpec) -> Counter[str]:
    return Counter(sizes_of(model, None, DEFAULT_GROUP_SIZE).component_bytes)


def _policy(model: ModelSpec, weights: Placement, **changes: object) -> Policy:
    fields: dict[str, object] = {
        "model": model,
        "workload": Workload(prompt_len=16, gen_len=5),
        "gpu_batch_size": 4,
        "num_gpu_batches": 2,
        "prefill_batch_size": 4,
        "weights": placed_alike(model, weights),
        "cache": ON_CPU,
        "activations": ON_CPU,
    }
    return Policy(**(fields | changes))  # type: ignore[arg-type]  # plain keyword table


def test_bytes_counted_by_hand() -> None:
    """Tied embeddings: the first stage and the last one have the table."""
    first, middle, last = stages_of_counts(make_model(), [3, 4, 1])
    assert _bytes(middle).total() == 4 * DECODER_BYTES
    assert _bytes(last).total() == DECODER_BYTES + HEAD_BYTES
    assert _bytes(first).total() == 3 * DECODER_BYTES + TABLE_BYTES
    assert first.component_names == ("embedding", "attention", "mlp")
    assert middle.component_names == ("attention", "mlp")
    assert last.component_names == ("attention", "mlp", "head")


@pytest.mark.parametrize(
    ("preset", "counts"),
    [
        ("llama-3.1-405b", [1, 60, 65]),
        ("deepseek-v3", [2, 3, 56]),
        ("opt-30b", [20, 28]),
        ("gemma-2-27b", [23, 23]),
    ],
)
def test_the_stages_have_all_bytes_of_the_model(preset: str, counts: list[int]) -> None:
    model = load_model_spec(preset)
    stages = stages_of_counts(model, counts)
    found = sum((_bytes(stage) for stage in stages), Counter[str]())
    whole = _bytes(model)
    if model.head.is_tied:
        found["embedding"] -= model.vocab_size * model.hidden_size * model.dtype_bytes
    assert {name: count for name, count in found.items() if count} == dict(whole)
    layers = [stage.layer(i) for stage in stages for i in range(stage.num_layers)]
    assert layers == [model.layer(i) for i in range(model.num_layers)]


def test_one_stage_is_the_model() -> None:
    assert stage_model(UNTIED, 0, 8) is UNTIED
    assert stages_of_counts(UNTIED, [8]) == (UNTIED,)


def test_equal_stages_are_equal_but_for_their_place() -> None:
    one, other = stage_model(UNTIED, 2, 3), stage_model(UNTIED, 3, 3)
    assert one != other
    assert replace(one, stage=None) == replace(other, stage=None)


@pytest.mark.parametrize("counts", [[8, 0], [4, 5], [9, -1], []])
def test_other_numbers_of_layers_are_refused(counts: list[int]) -> None:
    with pytest.raises(InputError, match="layers of the stages"):
        stages_of_counts(UNTIED, counts)


def test_a_stage_outside_the_model_is_refused() -> None:
    with pytest.raises(InputError, match="layers 6 to 8"):
        stage_model(UNTIED, 6, 3)
    with pytest.raises(InputError, match="whole model"):
        stage_model(stage_model(UNTIED, 0, 3), 0, 1)


def test_tensors_have_the_names_of_the_whole_model() -> None:
    stage = stage_model(UNTIED, 5, 3)
    family = family_named(stage.family)
    for number in range(3):
        names = family.tensor_names(stage, "qkv.weight", number)
        assert names == family.tensor_names(UNTIED, "qkv.weight", 5 + number)


def test_the_encoded_table_of_a_tied_model_stays_encoded() -> None:
    def rows(number: int, name: str) -> list[EncodedRows]:
        is_table = number < 0 and name == "head.weight"
        return [EncodedRows(tensor=name, rows=1000, encoding="Q8_0")] if is_table else []

    model = with_encodings(make_model(), rows)
    first, last = stages_of_counts(model, [4, 4])
    of_table = 1000 * (256 // 32) * 34
    assert _bytes(first)["embedding"] == of_table
    # The final norm, then the table.
    assert _bytes(last)["head"] == 2 * 256 + of_table


@pytest.mark.parametrize("weights", [ON_CPU, ON_DISK])
@pytest.mark.parametrize("model", [UNTIED, make_mixture(num_hidden_layers=8)])
def test_the_work_of_all_stages_is_the_model_s(model: ModelSpec, weights: Placement) -> None:
    """Without fixed costs: each channel is as busy as with one machine."""
    compute = make_compute(flop=1e12, attention=1e12, decode=1e9)
    machine = make_machine(disk_read=1e9, cpu=compute)
    whole = phase_channels(_policy(model, weights), machine)
    found = {phase: dict.fromkeys(seconds, 0.0) for phase, seconds in whole.items()}
    for stage in stages_of_counts(model, [3, 4, 1]):
        for phase, seconds in phase_channels(_policy(stage, weights), machine).items():
            for name, value in seconds.items():
                found[phase][name] += value
    for phase, seconds in whole.items():
        assert found[phase] == pytest.approx(seconds, rel=1e-9)


def test_memory_holds_the_caches_of_all_blocks_in_flight() -> None:
    machine = make_machine()
    stage = stage_model(UNTIED, 2, 3)
    one, three = (
        peak_buffers(_policy(stage, ON_CPU, blocks_in_flight=n), machine)["cpu"] for n in (1, 3)
    )
    # Eight sequences; 16 + 4 slots; three layers; keys and values of 128 in two bytes.
    assert one["cache"] == 8 * 20 * 3 * 2 * 128 * 2
    assert three["cache"] == 3 * one["cache"]
    # One block arrives and one leaves.
    assert one["hand-over"] == 2 * 8 * 16 * 256 * 2
    assert {name: size for name, size in three.items() if name != "cache"} == {
        name: size for name, size in one.items() if name != "cache"
    }
    policy = _policy(stage, ON_CPU)
    peaks = peak_bytes(problem_of(policy, machine), shares_of(policy))
    assert peaks["cpu"] == pytest.approx(sum(one.values()), abs=1)
    assert not {"logits", "head input"} & {name for name, size in one.items() if size}


def test_several_blocks_need_a_stage() -> None:
    with pytest.raises(InputError, match="blocks_in_flight"):
        _policy(UNTIED, ON_CPU, blocks_in_flight=2)


def test_a_stage_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    policy = _policy(stage_model(UNTIED, 2, 3), ON_CPU, blocks_in_flight=3)
    policy.save(path)
    assert Policy.load(path) == policy
