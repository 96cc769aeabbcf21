"""The weight file: what it holds is the checkpoint's, whatever happened to it before."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from costmodel.layout import LayerLayout, model_layers, round_up
from costmodel.policy import Placement
from costmodel.rounding import LayerCut, cut_layer
from executor.checkpoint import Checkpoint
from executor.weight_file import WeightFile, page_floor
from profiles.aligned_io import PAGE_BYTES, DirectFile, aligned_buffer
from profiles.errors import RunError
from tests.executor.tiny_models import save_tiny_model


class Source:
    """A checkpoint that counts the bytes it gives, and can be interrupted after some of them."""

    def __init__(self, folder: Path, *, interrupted_after: int | None = None) -> None:
        self.checkpoint = Checkpoint.open(folder)
        self.interrupted_after = interrupted_after
        self.given_bytes = 0
        self.spec = self.checkpoint.spec
        self.config = self.checkpoint.config
        self.fingerprint = self.checkpoint.fingerprint

    def read_range(self, index: int, layout: LayerLayout, start: int, out: torch.Tensor) -> None:
        """Read and count."""
        if self.interrupted_after is not None and self.given_bytes >= self.interrupted_after:
            raise KeyboardInterrupt
        self.checkpoint.read_range(index, layout, start, out)
        self.given_bytes += len(out)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model", "llama", num_layers=3, vocab_size=900)
    return tmp_path / "model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "offload").mkdir()
    return tmp_path / "offload"


def cuts_of(source: Source, disk: float) -> list[LayerCut]:
    placement = Placement(cpu=1 - disk, disk=disk)
    return [cut_layer(layer, placement) for layer in model_layers(source.spec)]


def build(folder: Path, source: Source, disk: float) -> int:
    """Build what a policy needs and check every byte of it; returns the bytes written."""
    layers, written = model_layers(source.spec), list[int]()
    with WeightFile(folder, source, layers) as file:
        cuts = cuts_of(source, disk)
        missing = file.missing_bytes(cuts)
        file.build(cuts, written.append)
        assert sum(written) == missing
        assert file.missing_bytes(cuts) == 0
        check_bytes(file, source, layers, cuts)
    return missing


def check_bytes(
    file: WeightFile, source: Source, layers: Sequence[LayerLayout], cuts: Sequence[LayerCut]
) -> None:
    for index, (layer, cut) in enumerate(zip(layers, cuts, strict=True)):
        if not cut.disk_bytes:
            continue
        start, end = page_floor(cut.cpu_end), round_up(layer.num_bytes, PAGE_BYTES)
        got = torch.frombuffer(aligned_buffer(end - start), dtype=torch.uint8)
        file.read_into(got, index, start)
        expected = torch.zeros(end, dtype=torch.uint8)
        source.checkpoint.read_range(index, layer, 0, expected[: layer.num_bytes])
        assert torch.equal(got, expected[start:]), f"layer {index}"


def manifest_of(folder: Path) -> Path:
    (path,) = folder.glob("weights-*.json")
    return path


@pytest.mark.parametrize("disk", [0.01, 0.3, 1.0])
def test_holds_the_checkpoint_s_bytes(model: Path, folder: Path, disk: float) -> None:
    source = Source(model)
    written = build(folder, source, disk)
    wanted = sum(cut.disk_bytes for cut in cuts_of(source, disk))
    assert wanted <= written <= wanted + 2 * PAGE_BYTES * len(model_layers(source.spec))


def test_a_second_run_writes_nothing(model: Path, folder: Path) -> None:
    build(folder, Source(model), 0.6)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = Source(model)
    assert build(folder, again, 0.6) == 0
    assert build(folder, again, 0.2) == 0
    assert again.given_bytes == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_coverage_grows_by_what_is_missing(model: Path, folder: Path) -> None:
    first = build(folder, Source(model), 0.3)
    more = build(folder, Source(model), 0.8)
    whole = build(folder, Source(model), 1.0)
    layers = model_layers(Source(model).spec)
    assert first + more + whole == sum(round_up(layer.num_bytes, PAGE_BYTES) for layer in layers)
    assert min(first, more, whole) > 0
    assert build(folder, Source(model), 0.3) == 0


def test_another_checkpoint_gets_its_own_bytes(model: Path, folder: Path) -> None:
    build(folder, Source(model), 1.0)
    save_tiny_model(model, "llama", num_layers=3, vocab_size=900, seed=1)
    assert build(folder, Source(model), 1.0) > 0


@pytest.mark.parametrize("after", [0, 1, 300_000])
def test_an_interrupted_build_leaves_nothing(model: Path, folder: Path, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(folder, Source(model, interrupted_after=after), 1.0)
    assert list(folder.iterdir()) == []
    assert build(folder, Source(model), 1.0) > 0


def test_an_interrupted_extension_is_never_read(model: Path, folder: Path) -> None:
    first = build(folder, Source(model), 0.3)
    with pytest.raises(KeyboardInterrupt):
        build(folder, Source(model, interrupted_after=1), 1.0)
    assert build(folder, Source(model), 0.3) == 0
    layers = model_layers(Source(model).spec)
    whole = sum(round_up(layer.num_bytes, PAGE_BYTES) for layer in layers)
    assert build(folder, Source(model), 1.0) == whole - first


def test_a_killed_build_is_never_read(model: Path, folder: Path) -> None:
    """A build that could not clean up leaves a file of the right size without a manifest."""
    whole = build(folder, Source(model), 1.0)
    (data,) = folder.glob("weights-*.bin")
    data.write_bytes(bytes(data.stat().st_size))
    manifest_of(folder).unlink()
    assert build(folder, Source(model), 1.0) == whole


DAMAGE: dict[str, Callable[[dict[str, Any]], str]] = {
    "empty": lambda manifest: "",
    "cut": lambda manifest: json.dumps(manifest)[:-5],
    "a list": lambda manifest: "[]",
    "unknown key": lambda manifest: json.dumps(manifest | {"more": 1}),
    "no key": lambda manifest: json.dumps({"fingerprint": manifest["fingerprint"]}),
    "other source": lambda manifest: json.dumps(manifest | {"fingerprint": "0" * 64}),
    "too few layers": lambda manifest: json.dumps(manifest | {"first_bytes": [0]}),
    "below zero": lambda manifest: json.dumps(
        manifest | {"first_bytes": [-4096] * len(manifest["first_bytes"])}
    ),
    "inside a page": lambda manifest: json.dumps(
        manifest | {"first_bytes": [100] * len(manifest["first_bytes"])}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_manifest_is_not_believed(model: Path, folder: Path, damage: str) -> None:
    whole = build(folder, Source(model), 1.0)
    path = manifest_of(folder)
    path.write_text(DAMAGE[damage](json.loads(path.read_text())))
    assert build(folder, Source(model), 1.0) == whole


def test_a_file_shorter_than_its_manifest_is_rebuilt(model: Path, folder: Path) -> None:
    whole = build(folder, Source(model), 1.0)
    (data,) = folder.glob("weights-*.bin")
    os.truncate(data, data.stat().st_size - PAGE_BYTES)
    assert build(folder, Source(model), 1.0) == whole


def test_a_full_disk_leaves_nothing(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: DirectFile, buffer: memoryview, offset: int) -> None:
        raise RunError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(DirectFile, "write_from", fail)
        with pytest.raises(RunError, match="the disk is full"):
            build(folder, Source(model), 1.0)
    assert list(folder.iterdir()) == []
    assert build(folder, Source(model), 1.0) > 0
