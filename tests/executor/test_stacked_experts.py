"""Tensors that are stored for all experts at once: read in any pieces, and written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from costmodel.families import family_named, family_names
from costmodel.model.layout import model_layers
from costmodel.model.safetensors_header import open_safetensors
from costmodel.model.stacked import StackedTensor
from executor.checkpoint.dummy import DummyCheckpoint, write_random_checkpoint
from executor.checkpoint.folder import Checkpoint
from executor.checkpoint.tensor_reads import read_strided
from profiles.errors import InputError
from tests.executor.reference import ReferenceModel, read_layer
from tests.executor.tiny_models import save_tiny_model

EXPERTS, ROWS, COLUMNS = 3, 8, 5
TRANSPOSED = StackedTensor(is_transposed=True)
IN_TURN = StackedTensor(is_transposed=True, is_interleaved=True)
FLAT = StackedTensor(is_transposed=True, is_flat=True)
STACKED = [name for name in family_names() if family_named(name).stacked]


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write matrices [experts, columns, rows], which are ours transposed, in two dtypes."""
    folder = tmp_path_factory.mktemp("stacked")
    values = torch.arange(EXPERTS * ROWS * COLUMNS).view(EXPERTS, COLUMNS, ROWS)
    save_file({"wide": values.float(), "narrow": values.bfloat16()}, folder / "a.safetensors")
    return folder / "a.safetensors"


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(["wide", "narrow"]))
def test_any_range_of_a_transposed_matrix_is_read(
    matrices: Path, data: st.DataObject, name: str
) -> None:
    stacked = data.draw(st.sampled_from([TRANSPOSED, IN_TURN, FLAT]))
    entry = open_safetensors(matrices)[name]
    expert = data.draw(st.integers(0, EXPERTS - 1))
    stored = torch.arange(EXPERTS * ROWS * COLUMNS).view(EXPERTS, COLUMNS, ROWS).float()[expert].t()
    wanted = [stored[::2], stored[1::2]] if stacked.is_interleaved else [stored]
    for (strides, rows), matrix in zip(stacked.parts(expert, ROWS, COLUMNS), wanted, strict=True):
        assert rows == len(matrix) and not strides.is_contiguous
        first = data.draw(st.integers(0, matrix.numel() - 1))
        count = data.draw(st.integers(1, matrix.numel() - first))
        target = torch.empty(count)
        read_strided(entry, strides, first, target)
        assert torch.equal(target, matrix.flatten()[first : first + count])


def test_stored_shapes() -> None:
    assert StackedTensor().shape(3, 8, 5) == (3, 8, 5)
    assert TRANSPOSED.shape(3, 8, 5) == (3, 5, 8)
    assert FLAT.shape(3, 8, 5) == (15, 8)
    assert StackedTensor(is_flat=True).shape(3, 8, 5) == (24, 5)
    assert StackedTensor().shape(3, 8, None) == (3, 8)
    with pytest.raises(InputError, match="interleaved rows"):
        list(StackedTensor(is_interleaved=True).parts(0, 8, 5))


@pytest.mark.parametrize("family", STACKED)
def test_random_checkpoints_are_read_by_transformers(family: str, tmp_path: Path) -> None:
    config = save_tiny_model(tmp_path / "tiny", family).config.to_dict()
    config = {key: value for key, value in config.items() if value is not None}
    folder = tmp_path / "random"
    write_random_checkpoint(folder, config, seed=2, shard_bytes=50_000)
    checkpoint = Checkpoint.open(folder)
    dummy = DummyCheckpoint(spec=checkpoint.spec, seed=2)
    for index, layer in enumerate(model_layers(checkpoint.spec)):
        assert torch.equal(read_layer(checkpoint, index, layer), read_layer(dummy, index, layer))
    theirs, found = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    ids = list(range(40))
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    got = ReferenceModel(checkpoint).logits(ids)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.full((1, 2, 2), 1e6)}, tmp_path / "a.safetensors")
    entry = open_safetensors(tmp_path / "a.safetensors")["a"]
    ((strides, _),) = TRANSPOSED.parts(0, 2, 2)
    with pytest.raises(InputError, match="float16 cannot hold"):
        read_strided(entry, strides, 0, torch.empty(4, dtype=torch.float16))
