"""Counts of experts: kept by checkpoint, and used to keep the most used experts in memory."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from costmodel.families import spec_from_config
from costmodel.model.layout import model_layers
from costmodel.plan.policy import Placement, Policy
from costmodel.pricing.price import policy_peaks
from executor.checkpoint.dummy import DummyCheckpoint
from executor.engine.trace import Span
from executor.expert_counts import counts_path, kept_counts, kept_skew, record_counts
from executor.model.sampling import Sampler
from executor.run.expert_cache import ExpertCache
from executor.run.expert_order import bytes_of_order, shares_to_order
from executor.run.runner import Runner
from tests.executor.tiny_machines import ON_CPU, ON_DISK, ON_GPU, make_hardware, make_policy
from tests.plain_models import plain_config

CONFIG = plain_config(family="qwen3_moe", num_kv_heads=2, hidden_size=128, vocab_size=400) | {
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}
SPEC = spec_from_config(CONFIG, name="qwen3_moe")
PROMPTS = [[1, 2, 3], [9, 8], [5]]
NUM_MIXTURES = sum(layer.kind == "experts" for layer in model_layers(SPEC))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _counts(*first: int) -> list[Any]:
    return [np.array([*first] + [1] * (16 - len(first))) for _ in range(NUM_MIXTURES)]


def test_shares_are_of_the_tokens_of_all_runs() -> None:
    source = DummyCheckpoint(spec=SPEC)
    assert kept_counts(source) is None
    record_counts(source, _counts(1, 5, 3))
    counts = kept_counts(source)
    assert counts is not None
    for shares in counts.shares(SPEC):
        assert shares == pytest.approx(np.array([1, 5, 3] + [1] * 13) * 2 / 22)
    assert kept_counts(DummyCheckpoint(spec=SPEC, seed=1)) is None


def test_a_skew_must_have_shown_in_two_runs() -> None:
    source = DummyCheckpoint(spec=SPEC)
    rare = [0] * 8
    record_counts(source, _counts(*[400] * 8, *rare))
    assert kept_skew(source) == 0
    record_counts(source, _counts(*[380] * 8, *rare))
    assert kept_skew(source) > 0.3
    # Another text uses other experts.
    other = DummyCheckpoint(spec=SPEC, seed=1)
    record_counts(other, _counts(*[400] * 8, *rare))
    record_counts(other, _counts(*rare, *[400] * 8))
    assert kept_skew(other) == 0


def test_a_broken_file_is_told_and_counts_as_none(caplog: pytest.LogCaptureFixture) -> None:
    source = DummyCheckpoint(spec=SPEC)
    record_counts(source, _counts(3))
    path = counts_path(source)
    assert path is not None
    raw = json.loads(path.read_text())
    for halves in ([raw["halves"][0][:1], raw["halves"][1]], [[[-1] * 16]], "none", None):
        path.write_text(json.dumps(raw | {"halves": halves}))
        with caplog.at_level(logging.WARNING):
            assert kept_counts(source) is None
        assert "counts of experts are not used" in caplog.text
        caplog.clear()
    record_counts(source, _counts(3))
    assert kept_counts(source) is not None


def _policy(**changes: Any) -> Policy:
    base = make_policy(SPEC, prompt_len=3, gen_len=6)
    return replace(base, loads_on_demand=True, activations=ON_CPU, **changes)


def test_experts_are_ordered_where_that_gains_and_the_disk_has_room() -> None:
    base = _policy()
    policy = replace(base, weights={**base.weights, "experts": Placement(cpu=0.5, disk=0.5)})
    shares = [each / each.sum() for each in _counts(3)]
    components = [c for layer in model_layers(SPEC) for c in layer.components]
    size = sum(c.num_bytes for c in components if c.is_experts)
    hardware = make_hardware()
    # Where experts change places, the policy itself counts all of them.
    whole = replace(policy, loads_on_demand=False)
    peaks = [policy_peaks(p, hardware)["disk"] for p in (whole, policy)]
    assert peaks[1] - peaks[0] == size // 2 and bytes_of_order(policy, hardware) == 0
    on_gpu = make_hardware(gpu=True)
    assert bytes_of_order(policy, on_gpu) == size
    least = policy_peaks(policy, on_gpu)["disk"] + size
    for given, gpu, room in (
        (shares, True, least),
        (shares, False, peaks[1]),
        (None, False, peaks[1]),
    ):
        hardware = make_hardware(gpu=gpu, disk_bytes=room)
        assert len(shares_to_order(policy, hardware, given)) == NUM_MIXTURES
        hardware = make_hardware(gpu=gpu, disk_bytes=room - 1)
        assert not shares_to_order(policy, hardware, given)
    # Beside a GPU there is no cache, so that nothing tells experts apart.
    assert not shares_to_order(policy, make_hardware(gpu=True), None)
    assert shares_to_order(policy, make_hardware(gpu=True), shares)
    # Experts in memory need no file.
    on_cpu = replace(base, weights={**base.weights, "experts": ON_CPU})
    assert bytes_of_order(on_cpu, hardware) == 0


def _run(
    policy: Policy, folder: Path, shares: Any, *, gpu: bool = False, greedy: bool = False
) -> tuple[dict[int, list[int]], Counter[str], Any]:
    moved = Counter[str]()

    def note(span: Span) -> None:
        moved[span.task.kind] += span.num_bytes

    source = DummyCheckpoint(spec=SPEC, router_skew=1.5)
    sampler = Sampler(temperature=0.0 if greedy else 100.0, seed=3)
    hardware = make_hardware(gpu=gpu)
    with Runner(
        policy, hardware, source, folder, sampler=sampler, on_span=note, expert_shares=shares
    ) as runner:
        blocks = list(runner.run(PROMPTS))
        counts = runner.block.routing_counts.by_layer()
    tokens = {i: list(ids) for block in blocks for i, ids in block.output_ids.items()}
    return tokens, moved, counts


@pytest.mark.parametrize(
    ("experts", "gpu"),
    [
        (Placement(cpu=0.5, disk=0.5), False),
        (ON_DISK, False),
        (ON_CPU, False),
        (Placement(gpu=0.25, cpu=0.5, disk=0.25), True),
        (Placement(gpu=0.5, cpu=0.5), True),
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [16, 4])
def test_no_token_depends_on_the_order_and_fewer_bytes_are_loaded(
    experts: Placement, gpu: bool, bits: int, tmp_path: Path
) -> None:
    policy = _policy(weight_bits=bits if bits == 4 else 8 * SPEC.dtype_bytes)
    policy = replace(
        policy,
        weights={**policy.weights, "experts": experts},
        activations=ON_GPU if gpu else ON_CPU,
        gpu_batch_size=1,
        prefill_batch_size=1,
        num_gpu_batches=3,
    )
    tokens, moved, counts = _run(policy, tmp_path, None, gpu=gpu)
    shares = [each * 2 / each.sum() for each in counts]
    backward = [each.max() - each for each in shares]
    best, fewest, again = _run(policy, tmp_path, shares, gpu=gpu)
    worst, most, _ = _run(policy, tmp_path, backward, gpu=gpu)
    assert best == worst == tokens
    assert all(map(np.array_equal, counts, again))
    kinds = [kind for kind in ("read_experts", "send_experts") if moved[kind]]
    for kind in kinds:
        is_whole = experts.disk == 1 or (experts.cpu == 0 and not gpu)
        assert fewest[kind] == most[kind] if is_whole else fewest[kind] < most[kind]


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("num_batches", [1, 3])
def test_experts_that_are_used_again_are_loaded_once(
    bits: int, num_batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = _policy(weight_bits=bits if bits == 4 else 8 * SPEC.dtype_bytes)
    policy = replace(
        policy,
        workload=replace(policy.workload, gen_len=24),
        weights={**policy.weights, "experts": Placement(cpu=0.5, disk=0.5)},
        gpu_batch_size=1,
        prefill_batch_size=1,
        num_gpu_batches=num_batches,
    )
    tokens, moved, _ = _run(policy, tmp_path, None, greedy=True)
    monkeypatch.setattr(ExpertCache, "keep", lambda *_: None)
    same, more, _ = _run(policy, tmp_path, None, greedy=True)
    assert tokens == same
    assert 2 * moved["read_experts"] < more["read_experts"]
