"""The weight file: what it holds is the checkpoint's, whatever happened to it before."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from costmodel.model.layout import ComponentLayout, model_layers, round_up
from costmodel.plan.cuts import PlacedComponent, PlacedLayers, cut_component
from costmodel.plan.policy import Placement
from executor.checkpoint.folder import Checkpoint
from executor.checkpoint.stored_tensors import SINGLE_NAME
from executor.machine.offload_folder import remove_orphans
from executor.stores import page_checksums
from executor.stores.staging import page_floor
from executor.stores.weight_file import WeightFile
from profiles.aligned_io import PAGE_BYTES, DirectFile, aligned_buffer
from profiles.errors import RunError
from tests.executor.tiny_models import save_tiny_model


class Source:
    """A checkpoint that counts the bytes it gives; it can be interrupted after some of them, and
    call something before the first."""

    def __init__(
        self,
        folder: Path,
        *,
        interrupted_after: int | None = None,
        at_first: Callable[[], object] = lambda: None,
    ) -> None:
        self.checkpoint = Checkpoint.open(folder)
        self.interrupted_after = interrupted_after
        self.at_first = at_first
        self.given_bytes = 0
        self.spec = self.checkpoint.spec

    @property
    def fingerprint(self) -> str:
        """The checkpoint's."""
        return self.checkpoint.fingerprint

    def check_unchanged(self) -> None:
        """Check the checkpoint."""
        self.checkpoint.check_unchanged()

    def read_range(
        self, index: int, layout: ComponentLayout, start: int, out: torch.Tensor
    ) -> None:
        """Read and count."""
        if self.interrupted_after is not None and self.given_bytes >= self.interrupted_after:
            raise KeyboardInterrupt
        if self.given_bytes == 0:
            self.at_first()
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


def cuts_of(source: Source, disk: float) -> PlacedLayers:
    placement = Placement(cpu=1 - disk, disk=disk)
    return tuple(
        tuple(
            PlacedComponent(layer=index, layout=layout, cut=cut_component(layout, placement))
            for layout in layer.components
        )
        for index, layer in enumerate(model_layers(source.spec))
    )


def components_of(placed: PlacedLayers) -> list[PlacedComponent]:
    return [component for layer in placed for component in layer]


def file_bytes(source: Source) -> int:
    """Return the bytes of all pages that hold components."""
    components = components_of(cuts_of(source, 1.0))
    return sum(round_up(component.layout.num_bytes, PAGE_BYTES) for component in components)


def build(folder: Path, source: Source, disk: float) -> int:
    """Build what a policy needs and check every byte of it; returns the bytes written."""
    layers, written = model_layers(source.spec), list[int]()
    with WeightFile(folder, source, layers) as file:
        cuts = cuts_of(source, disk)
        missing = file.missing_bytes(cuts)
        file.build(cuts, written.append)
        assert sum(written) == missing
        assert file.missing_bytes(cuts) == 0
        check_bytes(file, source, cuts)
    return missing


def check_bytes(file: WeightFile, source: Source, cuts: PlacedLayers) -> None:
    for component in components_of(cuts):
        layout, cut = component.layout, component.cut
        if not cut.disk_bytes:
            continue
        start, end = page_floor(cut.cpu_end), round_up(layout.num_bytes, PAGE_BYTES)
        got = torch.frombuffer(aligned_buffer(end - start), dtype=torch.uint8)
        file.read(file.requests_of([(component, got, start)]))
        expected = torch.zeros(end, dtype=torch.uint8)
        source.checkpoint.read_range(component.layer, layout, 0, expected[: layout.num_bytes])
        assert torch.equal(got, expected[start:]), f"{layout.name} of layer {component.layer}"


def manifest_of(folder: Path) -> Path:
    (path,) = folder.glob("zigzag-weights-*.json")
    return path


def test_a_checkpoint_that_changes_while_it_is_read_is_told(model: Path, folder: Path) -> None:
    # Only the times of the file change, as they do when its contents change between the samples.
    source = Source(model, at_first=lambda: os.utime(model / SINGLE_NAME, (1, 1)))
    with pytest.raises(RunError, match="changed while it was read; try: run again"):
        build(folder, source, 1.0)
    assert list(folder.iterdir()) == []
    with pytest.raises(RunError, match="changed while it was read"):
        build(folder, source, 1.0)
    assert build(folder, Source(model), 1.0) > 0


@pytest.mark.parametrize("disk", [0.01, 0.3, 1.0])
def test_holds_the_checkpoint_s_bytes(model: Path, folder: Path, disk: float) -> None:
    source = Source(model)
    written = build(folder, source, disk)
    components = components_of(cuts_of(source, disk))
    wanted = sum(component.cut.disk_bytes for component in components)
    assert wanted <= written <= wanted + 2 * PAGE_BYTES * len(components)


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
    assert first + more + whole == file_bytes(Source(model))
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
    assert build(folder, Source(model), 1.0) == file_bytes(Source(model)) - first


def test_a_killed_build_is_never_read(model: Path, folder: Path) -> None:
    """A build that could not clean up leaves a file of the right size without a manifest."""
    whole = build(folder, Source(model), 1.0)
    (data,) = folder.glob("zigzag-weights-*.bin")
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
    "too few components": lambda manifest: json.dumps(manifest | {"first_bytes": [0]}),
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
    (data,) = folder.glob("zigzag-weights-*.bin")
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


def test_a_page_is_hashed_once(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder, Source(model), 1.0)
    hashed: list[int] = []
    original = page_checksums.page_checksums

    def count(pages: memoryview) -> bytes:
        hashed.append(len(pages) // PAGE_BYTES)
        return original(pages)

    monkeypatch.setattr(page_checksums, "page_checksums", count)
    source = Source(model)
    layers, cuts = model_layers(source.spec), cuts_of(source, 1.0)
    with WeightFile(folder, source, layers) as file:
        file.build(cuts, lambda num_bytes: None)
        check_bytes(file, source, cuts)
        num_pages = file_bytes(source) // PAGE_BYTES
        assert sum(hashed) == num_pages
        check_bytes(file, source, cuts)
        row = bytearray(100)
        file.read_row(memoryview(row), file.position(cuts[1][0], 4000))
        assert sum(hashed) == num_pages


@pytest.mark.parametrize("start", [0, 4000, PAGE_BYTES, 8191])
def test_rows_are_read_from_anywhere(model: Path, folder: Path, start: int) -> None:
    source = Source(model)
    layers, cuts = model_layers(source.spec), cuts_of(source, 1.0)
    (embedding,) = cuts[0]
    expected = torch.zeros(embedding.layout.num_bytes, dtype=torch.uint8)
    source.checkpoint.read_range(0, embedding.layout, 0, expected)
    with WeightFile(folder, source, layers) as file:
        file.build(cuts, lambda num_bytes: None)
        for _ in range(2):
            row = bytearray(5000)
            file.read_row(memoryview(row), file.position(embedding, start))
            assert bytes(row) == bytes(expected[start : start + 5000].tolist())


def test_a_changed_page_is_not_handed_out_as_a_row(model: Path, folder: Path) -> None:
    source = Source(model)
    layers, cuts = model_layers(source.spec), cuts_of(source, 1.0)
    (embedding,) = cuts[0]
    with WeightFile(folder, source, layers) as file:
        file.build(cuts, lambda num_bytes: None)
        with file.path.open("r+b") as raw:
            raw.seek(file.position(embedding, 5000))
            raw.write(b"\1\2\3\4\5\6\7\x08")
        row = bytearray(8)
        with pytest.raises(RunError, match="embedding of layer 0 is not what was written"):
            file.read_row(memoryview(row), file.position(embedding, 6000))
        assert row == bytes(8)
    assert build(folder, Source(model), 1.0) > 0


class Waiting(logging.Handler):
    """Knows whether somebody waits for a file that is being built."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        """Take notice."""
        if "waiting for another process" in record.getMessage():
            self.seen.set()


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    handler = Waiting()
    logger = logging.getLogger("executor.stores.weight_file")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def test_the_second_builder_waits_and_writes_nothing(
    model: Path, folder: Path, waiting: Waiting
) -> None:
    """Locks are between descriptors, so that two of one process stand for two processes."""
    second = Source(model)
    thread = threading.Thread(target=build, args=(folder, second, 0.5))

    def start_second() -> None:
        thread.start()
        assert waiting.seen.wait(20)

    whole = build_only(folder, Source(model, at_first=start_second), 0.7)
    thread.join(20)
    assert whole > 0 and second.given_bytes == 0
    assert build(folder, Source(model), 0.7) == 0


def build_only(folder: Path, source: Source, disk: float) -> int:
    """Build without looking at what else is reported."""
    with WeightFile(folder, source, model_layers(source.spec)) as file:
        file.build(cuts_of(source, disk), lambda num_bytes: None)
    return source.given_bytes


def test_a_builder_takes_over_from_one_that_gave_up(
    model: Path, folder: Path, waiting: Waiting
) -> None:
    """What the first removes must not be what the second then writes."""
    thread = threading.Thread(target=build, args=(folder, Source(model), 1.0))

    def start_second() -> None:
        thread.start()
        assert waiting.seen.wait(20)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_only(folder, Source(model, at_first=start_second), 1.0)
    thread.join(20)
    assert build(folder, Source(model), 1.0) == 0


def test_a_reader_is_not_disturbed_by_one_who_extends(model: Path, folder: Path) -> None:
    build(folder, Source(model), 0.4)
    source = Source(model)
    layers, cuts = model_layers(source.spec), cuts_of(source, 0.4)
    with WeightFile(folder, source, layers) as file:
        file.build(cuts, lambda num_bytes: None)

        def reads() -> None:
            check_bytes(file, source, cuts)

        assert build_only(folder, Source(model, at_first=reads), 1.0) > 0
        reads()


def test_only_orphans_are_removed(model: Path, folder: Path) -> None:
    build(folder, Source(model), 1.0)
    kept = set(folder.iterdir())
    names = (
        "zigzag-weights-0123456789abcdef.bin",
        ".zigzag-scratch-abc",
        ".zigzag-weights-0.json.abc.part",
    )
    orphans = [folder / name for name in names]
    others = [folder / name for name in ("weights.bin", ".notes.part", "zigzag-weights-1.txt")]
    for path in (*orphans, *others):
        path.touch()
    with orphans[0].open() as first, orphans[2].open() as last:
        fcntl.flock(first, fcntl.LOCK_EX)
        fcntl.flock(last, fcntl.LOCK_EX)
        remove_orphans(folder)
        assert set(folder.iterdir()) == {*kept, *others, orphans[0], orphans[2]}
    remove_orphans(folder)
    assert set(folder.iterdir()) == {*kept, *others}
    remove_orphans(folder / "nowhere")


def test_a_file_of_the_form_before_is_built_anew(model: Path, folder: Path) -> None:
    """One without checksums, as long as its layers."""
    whole = build(folder, Source(model), 1.0)
    (data,) = folder.glob("zigzag-weights-*.bin")
    os.truncate(data, whole)
    assert build(folder, Source(model), 1.0) == whole
