"""Matrices that are stored transposed, and names without the prefix of the base model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from costmodel.model.layout import model_layers
from executor.checkpoint.dummy import DummyCheckpoint, write_random_checkpoint
from executor.checkpoint.folder import Checkpoint, WeightSource
from executor.checkpoint.stored_tensors import SINGLE_NAME
from profiles.errors import InputError
from tests.executor.reference import read_layer, view_layer
from tests.executor.tiny_models import save_tiny_model


def read_all(source: WeightSource) -> list[torch.Tensor]:
    layouts = model_layers(source.spec)
    return [read_layer(source, index, layout) for index, layout in enumerate(layouts)]


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
@pytest.mark.parametrize("piece_bytes", [1000, 1 << 20])
def test_rows_are_the_stored_columns(
    wanted: str, piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("executor.checkpoint.tensor_reads.READ_BYTES", piece_bytes)
    save_tiny_model(tmp_path, "gpt2")
    tensors = load_file(tmp_path / SINGLE_NAME)
    checkpoint = Checkpoint.open(tmp_path, wanted)
    dtype = getattr(torch, wanted)
    weights = view_layer(read_all(checkpoint)[1], model_layers(checkpoint.spec)[1], dtype)
    names = {"qkv": "attn.c_attn", "output": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    for ours, theirs in names.items():
        stored = tensors[f"transformer.h.0.{theirs}.weight"]
        assert torch.equal(weights[f"{ours}.weight"][0], stored.t().to(dtype))
        bias = tensors[f"transformer.h.0.{theirs}.bias"]
        assert torch.equal(weights[f"{ours}.bias"][0], bias.to(dtype))


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_any_range_of_a_layer_is_that_part_of_the_whole(
    wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("executor.checkpoint.tensor_reads.READ_BYTES", 3000)
    monkeypatch.setattr("executor.checkpoint.dummy.NUMBERED_AT_ONCE", 300)
    save_tiny_model(tmp_path, "gpt2")
    checkpoint = Checkpoint.open(tmp_path, wanted)
    generator = torch.Generator().manual_seed(0)
    for source in (checkpoint, DummyCheckpoint(spec=checkpoint.spec)):
        layouts = model_layers(source.spec)[1].components
        wholes = read_all(source)[1].split([layout.num_bytes for layout in layouts])
        for layout, whole in zip(layouts, wholes, strict=True):
            for _ in range(20):
                bounds = torch.randint(0, layout.num_bytes // 4 + 1, (2,), generator=generator) * 4
                start, end = sorted(bounds.tolist())
                out = torch.full((end - start,), 255, dtype=torch.uint8)
                source.read_range(1, layout, start, out)
                assert torch.equal(out, whole[start:end])


def test_random_weights_are_those_of_the_file_that_has_them(tmp_path: Path) -> None:
    config = {
        "model_type": "gpt2",
        "n_embd": 48,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 32,
        "vocab_size": 77,
        "dtype": "float32",
    }
    write_random_checkpoint(tmp_path, config, seed=3)
    checkpoint = Checkpoint.open(tmp_path)
    made = read_all(DummyCheckpoint(spec=checkpoint.spec, seed=3))
    assert all(map(torch.equal, read_all(checkpoint), made))
    spread = view_layer(made[1], model_layers(checkpoint.spec)[1], torch.float32)["qkv.weight"][0]
    assert math.isclose(float(spread.std()), 0.02, rel_tol=0.1)


@pytest.mark.parametrize("family", ["gpt2", "falcon", "gpt_neox"])
def test_names_without_the_prefix_are_found(family: str, tmp_path: Path) -> None:
    """As the files of GPT-2 and BLOOM on the hub have them."""
    save_tiny_model(tmp_path, family, tied=True)
    expected = read_all(Checkpoint.open(tmp_path))
    tensors = load_file(tmp_path / SINGLE_NAME)
    prefix = next(iter(tensors)).partition(".")[0] + "."
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert bare.keys().isdisjoint(tensors)
    save_file(bare, tmp_path / SINGLE_NAME)
    assert all(map(torch.equal, read_all(Checkpoint.open(tmp_path)), expected))


def test_a_matrix_that_is_not_transposed_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "gpt2")
    path = tmp_path / SINGLE_NAME
    tensors = load_file(path)
    name = "transformer.h.1.mlp.c_fc.weight"
    save_file(tensors | {name: tensors[name].t().contiguous()}, path)
    with pytest.raises(InputError, match=r"c_fc\.weight .*got shape \[112, 64\]"):
        Checkpoint.open(tmp_path)


def test_a_value_beyond_float16_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "gpt2")
    path = tmp_path / SINGLE_NAME
    tensors = load_file(path)
    tensors["transformer.h.0.attn.c_proj.weight"][3, 5] = 1e6
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"c_proj\.weight.*float16 cannot hold"):
        read_all(Checkpoint.open(tmp_path, "float16"))


def test_old_masks_are_not_read(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "gpt2")
    path = tmp_path / SINGLE_NAME
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 96, 96)}
    save_file(load_file(path) | mask, path)
    assert json.loads((tmp_path / "config.json").read_text())["n_positions"] == 96
    assert Checkpoint.open(tmp_path).spec.max_positions == 96
