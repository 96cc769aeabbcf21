"""Tokens do not depend on where the bytes live: every policy against the plainest loop."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from costmodel.plan.policy import Placement, placed_alike
from costmodel.schedule import lookahead
from costmodel.schedule.tasks import Task
from executor.checkpoint.folder import Checkpoint
from executor.engine.channels import Handler
from executor.model.logits_processors import LogitsProcessors
from executor.model.sampling import Sampler
from executor.run.block import Block
from profiles.aligned_io import PAGE_BYTES
from tests.executor.reference import ReferenceModel
from tests.executor.tiny_machines import (
    ON_CPU,
    ON_DISK,
    ON_GPU,
    ExpectedCase,
    change_policy,
    draw_policy,
    make_hardware,
    on_cuda,
)
from tests.executor.tiny_models import MIXTURES, VOCAB_SIZE, save_tiny_model

GEN_LEN = 6
LENGTHS = (9, 1, 12, 5, 2, 7, 7)
PROMPT_LEN = max(LENGTHS)
MACHINES = {"cpu": make_hardware(), "gpu": make_hardware(gpu=True)}
THIRDS = Placement(gpu=0.3, cpu=0.3, disk=0.4)
HALVES = Placement(cpu=0.5, disk=0.5)
# A vocabulary of 900 makes the head larger than a decoder layer, so that it is cut in chunks.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "num_kv_heads": 2},
    "llama-tied": {"family": "llama", "num_kv_heads": 1, "tied": True, "vocab_size": 900},
    "opt": {"family": "opt", "tied": True},
    "opt-untied": {"family": "opt", "vocab_size": 900},
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "num_kv_heads": 4},
    "bfloat16": {"family": "llama", "dtype": "bfloat16"},
    **MIXTURES,
}
IN_FLOAT32 = [name for name in MODELS if name != "bfloat16"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ExpectedCase]:
    """Make each model once."""
    made: dict[str, ExpectedCase] = {}

    def make(name: str) -> ExpectedCase:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = _make_case(folder / "model", folder / "offload", **MODELS[name])
        return made[name]

    return make


def _make_case(model: Path, offload: Path, **options: Any) -> ExpectedCase:
    save_tiny_model(model, seed=3, **options)
    source = Checkpoint.open(model)
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
    tokens = ReferenceModel(source).generate(prompts, GEN_LEN)
    offload.mkdir()
    return ExpectedCase(source=source, prompts=prompts, folder=offload, tokens=tokens)


@pytest.mark.parametrize("name", MODELS)
def test_references_say_something(cases: Callable[[str], ExpectedCase], name: str) -> None:
    tokens = cases(name).tokens
    assert len({tuple(row) for row in tokens}) >= len(tokens) - 1
    assert len({token for row in tokens for token in row}) >= 8


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", IN_FLOAT32)
def test_random_policies(cases: Callable[[str], ExpectedCase], name: str, machine: str) -> None:
    case = cases(name)
    rng = random.Random(f"{name} on {machine}")
    for _ in range(3):
        policy = draw_policy(case.policy(), rng, gpu=machine == "gpu")
        assert case.generate(policy, MACHINES[machine]) == case.tokens, policy


@pytest.mark.parametrize(("name", "weight_bits"), [("llama", 32), ("llama", 4), ("opt-untied", 32)])
def test_rows_that_no_prompt_needs_may_hold_anything(
    cases: Callable[[str], ExpectedCase], name: str, weight_bits: int, tmp_path: Path
) -> None:
    case = cases(name)
    policy = case.policy(weights=HALVES, weight_bits=weight_bits)
    # Token 0, of which padding is made, is in no prompt and never chosen.
    moved = [[token % 170 + 1 for token in row] for row in case.prompts]
    sampler = Sampler(processors=LogitsProcessors(suppress_tokens=(0,)))
    tokens = replace(case, prompts=moved).generate(policy, MACHINES["cpu"], sampler=sampler)
    needed = sorted({token for row in (*moved, *tokens) for token in row})
    assert 0 not in needed
    assert isinstance(case.source, Checkpoint)
    folder = Path(shutil.copytree(case.source.folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    for stored, kept in (
        ("embed_tokens.weight", needed),
        # The first two are never used, and the last pass has the last but one of the tokens.
        ("embed_positions.weight", list(range(2, PROMPT_LEN + GEN_LEN + 1))),
    ):
        for key in filter(lambda key: key.endswith(stored), tensors):
            poisoned = torch.full_like(tensors[key], torch.nan)
            poisoned[::2] = torch.inf
            poisoned[kept] = tensors[key][kept]
            tensors[key] = poisoned
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    poisoned_case = replace(case, source=Checkpoint.open(folder), folder=tmp_path, prompts=moved)
    for machine, changed in (
        ("cpu", change_policy(policy, weights=ON_DISK, cache=ON_DISK)),
        ("gpu", change_policy(policy, weights=THIRDS)),
    ):
        found = poisoned_case.generate(changed, MACHINES[machine], sampler=sampler)
        assert found == tokens, machine


CORNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "all on cpu": ("cpu", {}),
    "all on disk": ("cpu", {"weights": ON_DISK, "cache": ON_DISK, "activations": ON_DISK}),
    "weights on disk": ("cpu", {"weights": ON_DISK}),
    "cache on disk": ("cpu", {"cache": ON_DISK}),
    "activations on disk": ("cpu", {"activations": ON_DISK}),
    "halves on disk": ("cpu", {"weights": HALVES, "cache": HALVES, "activations": HALVES}),
    "gpu: all there": ("gpu", {"weights": ON_GPU, "cache": ON_GPU, "activations": ON_GPU}),
    "gpu: all on cpu": ("gpu", {}),
    "gpu: all on disk": ("gpu", {"weights": ON_DISK, "cache": ON_DISK, "activations": ON_DISK}),
    "gpu: only weights": ("gpu", {"weights": ON_GPU, "cache": ON_DISK}),
    "gpu: only cache": ("gpu", {"cache": ON_GPU, "activations": ON_DISK}),
    "gpu: only activations": ("gpu", {"activations": ON_GPU, "weights": ON_DISK}),
    "thirds": ("gpu", {"weights": THIRDS, "cache": THIRDS, "activations": THIRDS}),
}


@pytest.mark.parametrize("corner", CORNERS)
def test_corners(cases: Callable[[str], ExpectedCase], corner: str) -> None:
    machine, changes = CORNERS[corner]
    case = cases("llama")
    for cpu_attention in (0.0, 0.5, 1.0) if machine == "gpu" else (1.0,):
        policy = case.policy(gpu_batch_size=3, cpu_attention=cpu_attention, **changes)
        assert case.generate(policy, MACHINES[machine]) == case.tokens, cpu_attention


def test_a_share_below_a_row_needs_no_file(
    cases: Callable[[str], ExpectedCase], tmp_path: Path
) -> None:
    case = replace(cases("llama"), folder=tmp_path)
    policy = case.policy(weights=Placement(cpu=1 - 1e-9, disk=1e-9))
    assert case.generate(policy, MACHINES["cpu"]) == case.tokens
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("gpu_batch_size", "num_gpu_batches", "prefill_batch_size"),
    [(1, 1, 1), (7, 1, 7), (4, 2, 3), (3, 2, 2), (1, 7, 1), (5, 4, 1)],
)
def test_block_shapes(
    cases: Callable[[str], ExpectedCase],
    machine: str,
    gpu_batch_size: int,
    num_gpu_batches: int,
    prefill_batch_size: int,
) -> None:
    case = cases("qwen3")
    parts = THIRDS if machine == "gpu" else HALVES
    policy = case.policy(
        gpu_batch_size=gpu_batch_size,
        num_gpu_batches=num_gpu_batches,
        prefill_batch_size=prefill_batch_size,
        weights=parts,
        cache=parts,
        activations=parts,
        cpu_attention=0.5,
    )
    assert case.generate(policy, MACHINES[machine]) == case.tokens


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("gen_len", [1, 2])
def test_short_generation(cases: Callable[[str], ExpectedCase], machine: str, gen_len: int) -> None:
    case = cases("opt")
    policy = draw_policy(case.policy(), random.Random(gen_len), gpu=machine == "gpu")
    policy = replace(policy, workload=replace(policy.workload, gen_len=gen_len), cache=HALVES)
    expected = [row[:gen_len] for row in case.tokens]
    assert case.generate(policy, MACHINES[machine]) == expected


def test_prompts_may_be_shorter_than_planned(cases: Callable[[str], ExpectedCase]) -> None:
    case = cases("opt")
    workload = replace(case.policy().workload, prompt_len=PROMPT_LEN + 5, gen_len=GEN_LEN)
    policy = case.policy(workload=workload, cache=THIRDS, activations=THIRDS, cpu_attention=0.5)
    assert case.generate(policy, MACHINES["gpu"]) == case.tokens


@pytest.mark.parametrize("machine", MACHINES)
def test_bfloat16_takes_a_likeliest_token(
    cases: Callable[[str], ExpectedCase], machine: str
) -> None:
    """Batches round differently, so near ties may fall to either side; nothing else may differ."""
    case = cases("bfloat16")
    model = ReferenceModel(case.source)
    rng = random.Random(1)
    for _ in range(3):
        policy = draw_policy(case.policy(), rng, gpu=machine == "gpu")
        for prompt, ids in zip(case.prompts, case.generate(policy, MACHINES[machine]), strict=True):
            logits = model.logits([*prompt, *ids[:-1]])[len(prompt) - 1 :]
            chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert (logits.amax(-1) - chosen <= 0.03 * logits.std(-1)).all(), policy


@pytest.mark.parametrize("machine", MACHINES)
def test_end_of_sequence(cases: Callable[[str], ExpectedCase], machine: str) -> None:
    case = cases("llama")
    eos_ids = frozenset({case.tokens[0][2], case.tokens[3][0], case.tokens[5][-1]})
    rng = random.Random(8)
    for _ in range(2):
        policy = draw_policy(case.policy(), rng, gpu=machine == "gpu")
        blocks = case.run(policy, MACHINES[machine], eos_ids=eos_ids)
        got = {i: ids for block in blocks for i, ids in block.output_ids.items()}
        stopped = frozenset[int]().union(*(block.stopped for block in blocks))
        for index, row in enumerate(case.tokens):
            ends = [i for i, token in enumerate(row) if token in eos_ids]
            assert list(got[index]) == row[: ends[0] if ends else None]
            assert (index in stopped) == bool(ends)
        assert 0 < len(stopped) < len(case.prompts)


def test_a_block_ends_with_its_last_sequence(cases: Callable[[str], ExpectedCase]) -> None:
    case = cases("llama")
    eos_ids = frozenset(row[2] for row in case.tokens)
    policy = case.policy(gpu_batch_size=4, cache=ON_DISK)
    (block,) = case.run(policy, MACHINES["cpu"], eos_ids=eos_ids)
    assert block.num_tokens == 3
    assert block.stopped == frozenset(range(len(LENGTHS)))
    # The next block starts from a clean slate although this one was left early.
    two = case.policy(gpu_batch_size=2, weights=HALVES)
    assert [b.num_tokens for b in case.run(two, MACHINES["cpu"], eos_ids=eos_ids)] == [3, 3]


def test_sampling_does_not_depend_on_placement(cases: Callable[[str], ExpectedCase]) -> None:
    case = cases("qwen2")
    sampler = Sampler(temperature=0.9, top_k=30, top_p=0.95, seed=11)
    expected = case.generate(case.policy(), MACHINES["cpu"], sampler=sampler)
    assert expected != case.tokens
    rng = random.Random(2)
    for machine in (*MACHINES, *MACHINES):
        policy = draw_policy(case.policy(), rng, gpu=machine == "gpu")
        assert case.generate(policy, MACHINES[machine], sampler=sampler) == expected, policy
    other = replace(sampler, seed=12)
    assert case.generate(case.policy(), MACHINES["cpu"], sampler=other) != expected


RACES: dict[str, tuple[str, dict[str, Any]]] = {
    "cpu": ("cpu", {"weights": ON_DISK, "cache": ON_DISK, "activations": ON_DISK}),
    "cpu halves": ("cpu", {"weights": HALVES, "cache": HALVES, "activations": HALVES}),
    "gpu disk": ("gpu", {"weights": ON_DISK, "cache": ON_DISK, "activations": ON_DISK}),
    "gpu thirds": ("gpu", {"weights": THIRDS, "cache": THIRDS, "activations": THIRDS}),
    "gpu weights": ("gpu", {"weights": ON_DISK, "num_gpu_batches": 4}),
    "gpu one batch": ("gpu", {"weights": THIRDS, "cache": ON_DISK, "num_gpu_batches": 1}),
}
EXPERT_RACES: dict[str, tuple[str, dict[str, Any]]] = {
    "cpu whole": ("cpu", {"weights": HALVES}),
    "cpu on demand": ("cpu", {"weights": HALVES, "loads_on_demand": True}),
    "cpu disk on demand, a batch at a time": (
        "cpu",
        {"weights": ON_DISK, "activations": HALVES, "loads_on_demand": True},
    ),
    "gpu whole, in place": ("gpu", {"weights": THIRDS, "cpu_experts": 0.6}),
    "gpu on demand": (
        "gpu",
        {"weights": THIRDS, "activations": ON_GPU, "loads_on_demand": True},
    ),
    "gpu on demand, in place": (
        "gpu",
        {"weights": THIRDS, "activations": ON_GPU, "loads_on_demand": True, "cpu_experts": 0.6},
    ),
}


@pytest.mark.parametrize("race", RACES)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_delays_and_stale_buffers(
    cases: Callable[[str], ExpectedCase], race: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks that come late or end late, and staging buffers that hold NaN until they are loaded,
    must not change a token."""
    _check_race(cases(name), *RACES[race], monkeypatch)


@pytest.mark.parametrize("race", EXPERT_RACES)
def test_delays_and_stale_buffers_of_experts(
    cases: Callable[[str], ExpectedCase], race: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check_race(cases("qwen2_moe"), *EXPERT_RACES[race], monkeypatch)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_delays_and_stale_buffers_of_a_head_placed_apart(
    cases: Callable[[str], ExpectedCase], name: str, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is loaded beside all layers, here in many pieces, as a large one is."""
    monkeypatch.setattr(lookahead, "LEAST_PIECE_BYTES", PAGE_BYTES)
    home, share = (ON_GPU, THIRDS) if machine == "gpu" else (ON_CPU, HALVES)
    weights = placed_alike(cases(name).source.spec, home) | {"head": share}
    _check_race(cases(name), machine, {"weights": weights}, monkeypatch)


def _check_race(
    case: ExpectedCase, machine: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = case.policy(**({"gpu_batch_size": 2, "cpu_attention": 0.5} | changes))
    _disturb(monkeypatch, 1)
    assert case.generate(policy, MACHINES[machine]) == case.tokens


def _disturb(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    original = Block.handlers

    def handlers(block: Block) -> Mapping[str, Handler]:
        return {
            kind: _late(_poisoned(block, kind, handler), seed)
            for kind, handler in original(block).items()
        }

    monkeypatch.setattr(Block, "handlers", handlers)


def _late(handler: Handler, seed: int) -> Handler:
    def run(task: Task) -> int:
        rng = random.Random(f"{seed} {task.index}")
        if rng.random() < 0.1:
            time.sleep(0.004 * rng.random())
        moved = handler(task)
        if rng.random() < 0.1:
            time.sleep(0.004 * rng.random())
        return moved

    return run


def _poisoned(block: Block, kind: str, handler: Handler) -> Handler:
    """Fill a staging buffer with NaN before it is loaded, or after its last reader."""
    stores = block.stores
    staging = {
        "read_cache": (stores.cache._staging, "cpu"),
        "send_cache": (stores.cache._staging, "gpu"),
        "read_hidden": (stores.hidden._staging, "cpu"),
        "send_hidden": (stores.hidden._staging, "gpu"),
    }

    def run(task: Task) -> int:
        if kind in staging:
            buffers, tier = staging[kind]
            slot = task.hidden_slot if kind.endswith("hidden") else task.slot
            buffers[tier][slot].fill_(255)
        moved = handler(task)
        if block.device.type == "cuda":
            # What was queued reads the buffers later; only then are they poisoned.
            torch.cuda.current_stream().synchronize()
        if kind == "send_weights":
            _poison_sent_piece(block, task)
        if _uses_layer_last(block, task):
            _poison_used_layer(block, task)
        return moved

    return run


def _poison_sent_piece(block: Block, task: Task) -> None:
    store = block.stores.weights
    first, end = store._disk_piece(task)
    if store.buffers.staged[task.layer].cpu_bytes:
        store.buffers.staging_of("cpu", task)[first:end].fill_(255)


def _uses_layer_last(block: Block, task: Task) -> bool:
    plan = block.stores.weights.plan
    last = len(block.batches) - 1
    if block.kinds[task.layer] == "experts" and (block._walks(task) or not task.is_prefill):
        # Several batches are one task; what the CPU made is added without weights.
        return task.kind == "compute" and task.batch + plan.batches_at_once > last
    return task.kind in ("compute", "finish") and task.batch == last


def _poison_used_layer(block: Block, task: Task) -> None:
    store = block.stores.weights
    if task.layer > 0:
        tier = "gpu" if store.machine.has_gpu else "cpu"
        parts = [part.placed for part in store.buffers.staged[task.layer].components]
        if block._walks(task):
            assert store.buffers.slots is not None
            store.buffers.slots.of_layer(task.layer)[0].fill_(255)
        if any(part.cut.off_gpu_bytes if tier == "gpu" else part.cut.disk_bytes for part in parts):
            store.buffers.staging_of(tier, task).fill_(255)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "bits"), [("llama", 32), ("qwen3_moe", 32), ("mixtral", 4)])
def test_cuda_placements_agree(cases: Callable[[str], ExpectedCase], name: str, bits: int) -> None:
    """Kernels differ between devices, so CUDA is compared with itself, all on the GPU."""
    case = cases(name)
    hardware = on_cuda(make_hardware(gpu=True))
    base = case.policy(weight_bits=bits)
    everything = change_policy(base, weights=ON_GPU, cache=ON_GPU, activations=ON_GPU)
    expected = case.generate(everything, hardware)
    rng = random.Random(4)
    for _ in range(10):
        policy = draw_policy(base, rng, gpu=True)
        assert case.generate(policy, hardware) == expected, policy


@pytest.mark.gpu
def test_cuda_survives_delays_and_stale_buffers(
    cases: Callable[[str], ExpectedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases("llama")
    hardware = on_cuda(make_hardware(gpu=True))
    thirds = case.policy(weights=THIRDS, cache=THIRDS, activations=THIRDS, cpu_attention=0.5)
    expected = case.generate(thirds, hardware)
    _disturb(monkeypatch, 1)
    assert case.generate(thirds, hardware) == expected
