"""What is compiled before a run must be all that the run calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from costmodel.model.encoded_model import with_encodings
from costmodel.model.encoded_rows import EncodedRows
from costmodel.model.layout import model_layers
from costmodel.model.shapes import component_shapes
from costmodel.pricing.problem import Problem
from executor.checkpoint.dummy import DummyCheckpoint
from executor.checkpoint.folder import Checkpoint
from executor.machine.tiers import Machine
from executor.run.warm_up import compile_kernels
from executor.stores import cache_rows
from profiles import kernels
from profiles.packing import Packing
from tests.executor.tiny_machines import Case, make_hardware, make_policy
from tests.executor.tiny_models import save_tiny_model

# Where each kernel that is Triton's on a GPU is called by its name.
PLACES = {
    "decode_attention": [kernels],
    "grouped_linear": [kernels],
    "multiply_rows": [kernels],
    "pack_rows": [kernels, cache_rows],
    "rms_norm": [kernels],
    "rotate": [kernels],
    "unpack_rows": [kernels],
}


@contextmanager
def _noted() -> Iterator[set[tuple[object, ...]]]:
    """Note of each call what would make it another kernel in Triton: the elements of its last
    dimension, its dtype, its packing, whether some prompts are shorter, and where packed weights
    or those of groups begin."""
    calls: set[tuple[object, ...]] = set()

    def noting(name: str) -> Any:
        kernel = getattr(kernels, name)

        def call(first: torch.Tensor, *rest: Any, **named: Any) -> Any:
            arguments = [*rest, named.get("packing")]
            packing = next((x for x in arguments if isinstance(x, Packing)), None)
            # Attention to what is not packed is torch's own.
            if name != "decode_attention" or packing:
                is_padded = named.get("lengths") is not None
                begins = [first] if name == "unpack_rows" else []
                begins = rest[1] if name == "grouped_linear" else begins
                forms: tuple[object, ...] = ()
                if name == "multiply_rows":
                    begins, forms = [rest[0]], (named["adds"], rest[3] is not None)
                is_aligned = not any(tensor.data_ptr() % 16 for tensor in begins)
                key = name, first.shape[-1], first.dtype, packing, is_padded, is_aligned, *forms
                calls.add(key)
            return kernel(first, *rest, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, places in PLACES.items():
            found = noting(name)
            for place in places:
                patch.setattr(place, name, found)
        yield calls


@pytest.mark.parametrize("family", ["opt", "llama", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize(("bits", "is_direct"), [(32, False), (4, False), (4, True)])
@pytest.mark.parametrize("prompts", [[[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4]]])
def test_a_run_calls_what_was_compiled(
    family: str,
    bits: int,
    is_direct: bool,
    prompts: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "groups_packed", lambda x, num_groups: True)  # as a GPU has it
    options: dict[str, Any] = {} if family == "opt" else {"head_dim": 32}
    save_tiny_model(tmp_path / "model", family, **options)
    source = Checkpoint.open(tmp_path / "model")
    policy = make_policy(source.spec, prompt_len=3, gen_len=3)
    policy = replace(policy, weight_bits=bits, cache_bits=bits)
    hardware = make_hardware(direct=is_direct)
    with Machine(hardware) as machine, _noted() as compiled:
        layers = model_layers(policy.model, policy.weight_bits, policy.group_size)
        compile_kernels(policy, layers, machine.compute.device)
    with _noted() as called:
        case = Case(source=source, prompts=prompts, folder=tmp_path / "offload")
        case.generate(policy, hardware)
    assert called <= compiled
    assert bool(called) == (bits == 4 or family != "opt")


@contextmanager
def _noted_encodings() -> Iterator[set[tuple[object, ...]]]:
    """Note of each call what would make it another kernel in Triton: the encoding, the dtype, and
    whether there are biases."""
    calls: set[tuple[object, ...]] = set()
    unpack, multiply = kernels.unpack_encoded, kernels.grouped_encoded

    def unpack_encoded(matrix: kernels.EncodedMatrix, out: torch.Tensor) -> None:
        calls.add(("unpack", matrix.encoding, out.dtype))
        unpack(matrix, out)

    def grouped_encoded(
        x: torch.Tensor, counts: Any, matrices: Any, out: torch.Tensor, biases: Any = None
    ) -> None:
        calls.add(("multiply", matrices[0].encoding, x.dtype, biases is not None))
        multiply(x, counts, matrices, out, biases)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "unpack_encoded", unpack_encoded)
        patch.setattr(kernels, "grouped_encoded", grouped_encoded)
        yield calls


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("is_direct", [False, True])
def test_a_run_of_an_encoded_model_calls_what_was_compiled(
    family: str, is_direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU does: layers are unpacked, and groups with few rows are multiplied directly."""
    monkeypatch.setattr(kernels, "groups_packed", lambda x, num_groups: is_direct)
    monkeypatch.setattr(Problem, "unpacks_layers", True)
    save_tiny_model(tmp_path / "model", family)
    plain = Checkpoint.open(tmp_path / "model").spec

    def rows_of(number: int, name: str) -> list[EncodedRows]:
        shapes = [s for s, _ in component_shapes(plain, plain.layer(max(number, 0))).values()]
        found = {name: shape for part in shapes for name, shape in part.items()}.get(name)
        encoding = ("INT8_G0_F16_Z", "MAP4_G64")[number % 2]
        return [EncodedRows(tensor=name, rows=found[0], encoding=encoding)] if found else []

    spec = with_encodings(plain, rows_of)
    policy = make_policy(spec, prompt_len=3, gen_len=3)
    hardware = make_hardware()
    with Machine(hardware) as machine, _noted_encodings() as compiled:
        compile_kernels(policy, model_layers(spec), machine.compute.device)
    with _noted_encodings() as called:
        source = DummyCheckpoint(spec=spec)
        Case(source=source, prompts=[[1, 2, 3], [4]], folder=tmp_path).generate(policy, hardware)
    assert called and called <= compiled
    kinds = {str(kind) for kind, *_ in called}
    assert kinds == ({"unpack", "multiply"} if family == "gpt_oss" and is_direct else {"unpack"})
