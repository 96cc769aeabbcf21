"""Few bits and few values, in combinations and wherever the bytes live."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from costmodel.model.layout import model_layers
from costmodel.plan.policy import Placement, Policy
from executor.checkpoint.dummy import DummyCheckpoint
from executor.checkpoint.folder import Checkpoint
from executor.model.matrices import CompressedMatrix, decode
from executor.stores.packed_source import PackedSource
from executor.stores.weight_file import WeightFile
from profiles.errors import InputError
from profiles.hardware import HardwareProfile
from profiles.kernels.group_twins import unpack_rows_twin
from tests.covering import covering
from tests.executor.reference import Compression, ReferenceModel
from tests.executor.test_memory import LLAMA, MODELS, check_terms
from tests.executor.tiny_machines import (
    ON_CPU,
    ON_DISK,
    ON_GPU,
    Case,
    change_policy,
    draw_policy,
    make_hardware,
    make_policy,
    on_cuda,
)
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny_model

GEN_LEN = 5
LENGTHS = (9, 1, 12, 5, 12)
PROMPT_LEN = max(LENGTHS)
MACHINES = {"cpu": make_hardware(), "gpu": make_hardware(gpu=True)}
DIRECT = {"cpu": make_hardware(direct=True), "gpu": make_hardware(gpu=True, direct=True)}
BITS = (None, 8, 4)
SPARSITIES = (1.0, 0.25)
MIXED = Placement(gpu=0.3, cpu=0.3, disk=0.4)
PLACES: dict[str, tuple[str, dict[str, Any]]] = {
    "cpu": ("cpu", {}),
    "disk": ("cpu", {"weights": ON_DISK, "cache": ON_DISK, "activations": ON_DISK}),
    "mixed without a GPU": (
        "cpu",
        {"weights": Placement(cpu=0.4, disk=0.6), "cache": Placement(cpu=0.5, disk=0.5)},
    ),
    "gpu": ("gpu", {"weights": ON_GPU, "cache": ON_GPU, "activations": ON_GPU}),
    "gpu, all below, fetched": (
        "gpu",
        {"weights": ON_CPU, "cache": ON_CPU, "activations": ON_GPU, "cpu_attention": 0.0},
    ),
    "gpu, all below, attended there": (
        "gpu",
        {"weights": ON_CPU, "cache": ON_CPU, "activations": ON_GPU},
    ),
    "gpu, all on disk": (
        "gpu",
        {"weights": ON_DISK, "cache": ON_DISK, "activations": ON_GPU, "cpu_attention": 0.5},
    ),
    "mixed, fetched": (
        "gpu",
        {"weights": MIXED, "cache": MIXED, "activations": MIXED, "cpu_attention": 0.0},
    ),
    "mixed, attended below": ("gpu", {"weights": MIXED, "cache": MIXED, "activations": MIXED}),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model whose rows and heads do not divide into whole groups."""
    folder = tmp_path_factory.mktemp("compressed")
    save_tiny_model(
        folder / "model", "llama", seed=3, vocab_size=500, head_dim=40, intermediate_size=112
    )
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
    (folder / "offload").mkdir()
    source = Checkpoint.open(folder / "model")
    return Case(source=source, prompts=prompts, folder=folder / "offload")


@pytest.fixture(scope="module")
def expected(case: Case) -> Callable[[Compression], list[list[int]]]:
    """The plain loop's tokens under a compression, made once."""
    made: dict[Compression, list[list[int]]] = {}

    def make(compression: Compression) -> list[list[int]]:
        if compression not in made:
            model = ReferenceModel(case.source, compression=compression)
            made[compression] = model.generate([list(p) for p in case.prompts], GEN_LEN)
        return made[compression]

    return make


def _policy(case: Case, compression: Compression, **changes: Any) -> Policy:
    base = make_policy(case.source.spec, prompt_len=PROMPT_LEN, gen_len=GEN_LEN)
    full = case.source.spec.full_bits
    return change_policy(
        base,
        weight_bits=compression.weight_bits or full,
        cache_bits=compression.cache_bits or full,
        group_size=compression.group_size,
        attention_sparsity=compression.sparsity,
        **changes,
    )


@covering(
    {
        "place": list(PLACES),
        "sparsity": SPARSITIES,
        "weight_bits": BITS,
        "cache_bits": BITS,
    }
)
def test_combinations_give_the_tokens_of_the_plain_loop(
    case: Case,
    expected: Callable[[Compression], list[list[int]]],
    place: str,
    weight_bits: int | None,
    cache_bits: int | None,
    sparsity: float,
) -> None:
    machine, changes = PLACES[place]
    compression = Compression(
        weight_bits=weight_bits, cache_bits=cache_bits, sparsity=sparsity, group_size=32
    )
    policy = _policy(case, compression, **changes)
    for machines in (MACHINES, DIRECT) if weight_bits == 4 else (MACHINES,):
        assert case.generate(policy, machines[machine]) == expected(compression), policy


def test_compressions_differ(expected: Callable[[Compression], list[list[int]]]) -> None:
    """All but the mildest change some token, so that equal tokens say something."""
    plain = expected(Compression(group_size=32))
    for weight_bits, cache_bits, sparsity in itertools.product(BITS, BITS, SPARSITIES):
        if 4 not in (weight_bits, cache_bits) and sparsity == 1:
            continue
        compression = Compression(
            weight_bits=weight_bits, cache_bits=cache_bits, sparsity=sparsity, group_size=32
        )
        assert expected(compression) != plain, compression


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_random_policies(
    case: Case, expected: Callable[[Compression], list[list[int]]], machine: str, group_size: int
) -> None:
    rng = random.Random(f"{machine} {group_size}")
    for _ in range(3):
        compression = Compression(
            weight_bits=rng.choice(BITS),
            cache_bits=rng.choice(BITS),
            group_size=group_size,
            sparsity=rng.choice(SPARSITIES),
        )
        policy = draw_policy(_policy(case, compression), rng, gpu=machine == "gpu")
        assert case.generate(policy, MACHINES[machine]) == expected(compression), policy


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", MODELS)
def test_packed_bytes_stay_inside_every_term(name: str, machine: str, tmp_path: Path) -> None:
    rng = random.Random(f"{name} {machine}")
    base = make_policy(MODELS[name], prompt_len=11, gen_len=5)
    for bits, sparsity in ((4, 1.0), (8, 0.3)):
        packed = replace(base, weight_bits=bits, cache_bits=bits, attention_sparsity=sparsity)
        policy = draw_policy(packed, rng, gpu=machine == "gpu")
        check_terms(policy, MACHINES[machine], tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_range_is_that_part_of_the_whole(bits: int) -> None:
    """Wherever a piece begins and ends, also inside a row."""
    source = PackedSource(source=DummyCheckpoint(spec=LLAMA))
    components = (
        (index, component)
        for index, layer in enumerate(model_layers(LLAMA, bits))
        for component in layer.components
    )
    for index, layout in components:
        whole = torch.empty(layout.num_bytes, dtype=torch.uint8)
        source.read_range(index, layout, 0, whole)
        rng = random.Random(index)
        for _ in range(5):
            start, end = sorted(rng.randrange(layout.num_bytes + 1) for _ in range(2))
            part = torch.full((end - start,), 0xAA, dtype=torch.uint8)
            source.read_range(index, layout, start, part)
            assert torch.equal(part, whole[start:end])


def test_packed_weights_are_within_half_a_step() -> None:
    plain, packed = DummyCheckpoint(spec=LLAMA), None
    packed = PackedSource(source=plain)
    pairs = [
        (index, full, layout)
        for index in (1, len(model_layers(LLAMA)) - 1)
        for full, layout in zip(
            model_layers(LLAMA)[index].components,
            model_layers(LLAMA, 4)[index].components,
            strict=True,
        )
    ]
    for index, full, layout in pairs:
        buffers = [torch.empty(part.num_bytes, dtype=torch.uint8) for part in (full, layout)]
        plain.read_range(index, full, 0, buffers[0])
        packed.read_range(index, layout, 0, buffers[1])
        for before, after in zip(full.tensors, layout.tensors, strict=True):
            wanted, found = (
                buffer[tensor.offset_bytes : tensor.end_bytes]
                for buffer, tensor in zip(buffers, (before, after), strict=True)
            )
            if after.packing is None:
                assert torch.equal(wanted, found)
                continue
            elements = wanted.view(torch.float32).view(before.shape)
            rows = found.view(1, after.num_rows, after.row_bytes)
            out = torch.empty(1, *after.shape)
            unpack_rows_twin(rows, after.packing, out)
            # Weights of 0.02 standard deviation: a group spans less than 0.2, in 15 steps.
            assert float((out[0] - elements).abs().max()) < 0.5 * 0.2 / 15


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_with_its_tensor(tmp_path: Path, value: float) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    model.save_pretrained(tmp_path / "model")
    source = Checkpoint.open(tmp_path / "model")
    policy = make_policy(source.spec, prompt_len=4, gen_len=2, weights=ON_DISK)
    policy = replace(policy, weight_bits=4)
    case = Case(source=source, prompts=[[1, 2]], folder=tmp_path)
    with pytest.raises(InputError, match=r"down\.weight of mlp of layer 2"):
        case.generate(policy, MACHINES["cpu"])


def test_each_precision_has_its_own_file(tmp_path: Path) -> None:
    source = PackedSource(source=DummyCheckpoint(spec=LLAMA))
    layouts = [model_layers(LLAMA, bits, size) for bits in (4, 8) for size in (32, 64)]
    paths = {WeightFile(tmp_path, source, layers).path for layers in layouts}
    assert len(paths) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"family": "opt", "tied": True, "vocab_size": 500},
        {"family": "llama", "tied": True, "num_kv_heads": 1, "vocab_size": 900},
        {"family": "qwen3", "num_kv_heads": 4},
    ],
    ids=lambda options: options["family"],
)
@pytest.mark.parametrize("machine", MACHINES)
def test_families(options: dict[str, Any], machine: str, tmp_path: Path) -> None:
    """Packed tables of positions, tied heads in chunks, biases between packed matrices."""
    save_tiny_model(tmp_path / "model", seed=3, **options)
    source = Checkpoint.open(tmp_path / "model")
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
    case = Case(source=source, prompts=prompts, folder=tmp_path)
    compression = Compression(weight_bits=4, cache_bits=8, group_size=32)
    model = ReferenceModel(source, compression=compression)
    expected = model.generate([list(p) for p in prompts], GEN_LEN)
    for _ in range(3):
        policy = draw_policy(_policy(case, compression), rng, gpu=machine == "gpu")
        assert case.generate(policy, DIRECT[machine]) == expected, policy


def test_a_matrix_is_unpacked_once_for_all_batches(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked: list[int] = []

    def count(matrix: CompressedMatrix, out: torch.Tensor) -> None:
        unpacked.append(len(out))
        decode(matrix, out)

    monkeypatch.setattr("executor.stores.unpacked.decode", count)
    policy = _policy(
        case, Compression(weight_bits=4), gpu_batch_size=1, prefill_batch_size=1, num_gpu_batches=5
    )
    case.generate(policy, MACHINES["cpu"])
    staged = [
        component
        for layer in model_layers(case.source.spec, 4)
        for component in layer.components
        if layer.kind != "embed"
    ]
    rows = sum(t.num_rows for component in staged for t in component.tensors if t.packing)
    assert sum(unpacked) == GEN_LEN * rows
    unpacked.clear()
    case.generate(policy, DIRECT["cpu"])
    # In prefill; decode multiplies what is packed.
    assert sum(unpacked) == rows


@pytest.mark.gpu
@pytest.mark.parametrize("machines", [MACHINES, DIRECT], ids=["unpacked", "direct"])
def test_cuda_placements_agree(case: Case, machines: dict[str, HardwareProfile]) -> None:
    """Kernels differ between devices, so CUDA is compared with itself, all on the GPU."""
    hardware = on_cuda(machines["gpu"])
    rng = random.Random(4)
    for weight_bits, cache_bits, sparsity in itertools.product(
        (None, 4), (None, 8, 4), (1.0, 0.25)
    ):
        compression = Compression(
            weight_bits=weight_bits, cache_bits=cache_bits, sparsity=sparsity, group_size=32
        )
        base = _policy(case, compression)
        everything = change_policy(base, weights=ON_GPU, cache=ON_GPU, activations=ON_GPU)
        expected = case.generate(everything, hardware)
        for _ in range(3):
            policy = draw_policy(base, rng, gpu=True)
            assert case.generate(policy, hardware) == expected, policy
