"""The measurement itself: what it takes, what it keeps, what it leaves behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from profiles import HardwareProfile, compute, compute_plan, disk, measure, recorded_profile
from profiles.cores import num_threads_of
from profiles.disk import DiskPlan, free_disk_bytes, measure_disk
from profiles.encodings import Kind
from profiles.errors import InputError
from profiles.measure import main
from profiles.repeats import QUICK, Effort, Repeater
from profiles.table import format_profile
from profiles.units import MIB

TINY = Effort(num_samples=3, sample_s=1e-4, figure_s=1.0, total_s=0.0)


def test_quick_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of little work, in moments; ``tests/test_demo.py`` runs the command with all of it."""
    monkeypatch.setattr(measure, "QUICK", replace(QUICK, sample_s=1e-4, total_s=0.0, window_s=0.01))
    small = replace(
        compute_plan.QUICK_PLAN,
        rows=(1, 16),
        out_features=256,
        prompt_len=64,
        context_len=64,
        num_cache_rows=8,
        stream_bytes=MIB,
    )
    monkeypatch.setattr(compute_plan, "QUICK_PLAN", small)
    offload_dir = tmp_path / "offload"
    offload_dir.mkdir()
    output = tmp_path / "profile.json"
    main(
        [
            "--quick",
            "--json",
            "--output",
            str(output),
            "--offload-dir",
            str(offload_dir),
            "--cpu-memory",
            "8GB",
            "--disk",
            "100GiB",
            "--name",
            "mine",
        ]
    )
    stdout = capsys.readouterr().out
    profile = HardwareProfile.load(output)
    assert (profile.name, profile.cpu.memory_bytes) == ("mine", 8_000_000_000)
    assert profile.disk.free_bytes == 100 * 2**30
    assert set(profile.cpu.compute.matmul) == {"float32", "bfloat16", "float16"}
    names = {m.name for m in profile.measurements}
    assert set(profile.cpu.compute.encoded_matmul) == set(Kind.__members__)
    assert not profile.cpu.compute.encoded_unpack_bytes_per_s
    assert {
        "cpu.encoded_matmul.Q4_K.rows1",
        "cpu.memory.read",
        "cpu.task_overhead",
        "disk.write.1024KiB.depth4",
    } <= names
    assert all(len(m.samples) >= 3 for m in profile.measurements)
    assert 50 * MIB < profile.cpu.runtime_bytes < 4096 * MIB
    line = json.loads(stdout.splitlines()[-1])
    assert line["profile"]["cpu"]["memory_bytes"] == 8_000_000_000
    assert "encoded, 1 rows" in stdout
    assert "matmul, 1 rows" in stdout and "4.00 MiB requests" in stdout
    assert not list(offload_dir.iterdir())
    assert {p.name for p in tmp_path.iterdir()} == {"offload", "profile.json"}
    # What was printed is what was saved.
    assert format_profile(profile) in stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--offload-dir", "{tmp}/none"], ["offload folder", "none", "mkdir"]),
        (["--offload-dir", "{tmp}/file"], ["offload folder", "file"]),
        (["--output", "{tmp}/none/p.json"], ["output", "none"]),
        (["--cpu-memory", "8G"], ["--cpu-memory", "8G"]),
        (["--emulate-gpu", "2GiB"], ["--emulated-link"]),
        (["--emulated-link", "8GB"], ["--emulate-gpu"]),
        (["--emulate-gpu", "2GiB", "--emulated-link", "0"], ["--emulated-link", "0"]),
        (["--gpu-memory", "16GiB"], ["--gpu-memory", "--emulate-gpu"]),
        (["--fast"], ["--fast"]),
    ],
)
def test_bad_flags_are_told_before_any_work(
    flags: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError) as caught:
        main([flag.format(tmp=tmp_path) for flag in flags])
    for word in words:
        assert word in str(caught.value)


def test_offload_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(InputError, match="Read-only file system"):
        free_disk_bytes(tmp_path)


def test_emulated_gpu_by_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = recorded_profile("cpu-2core")
    monkeypatch.setattr("profiles.measure.measure_profile", lambda **options: machine)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    output = tmp_path / "p.json"
    flags = ["--emulate-gpu", "2GiB", "--emulated-link", "8GB", "--output", str(output)]
    main([*flags, "--cpu-memory", "4GiB"])
    profile = HardwareProfile.load(output)
    assert profile.is_emulated and profile.gpu is not None
    assert profile.gpu.memory_bytes == 2 * 2**30
    assert profile.gpu.d2h.pinned_bytes_per_s == 8e9
    assert profile.cpu.memory_bytes == 4 * 2**30


def _disk_plan() -> DiskPlan:
    return DiskPlan(
        file_bytes=4 * MIB, chunk_bytes=MIB, request_bytes=(65536, 262144), depths=(1, 2)
    )


def test_disk_keeps_the_best_depth_and_removes_its_file(tmp_path: Path) -> None:
    repeater = Repeater(TINY, lambda name: None)
    disk = measure_disk(tmp_path, _disk_plan(), repeater)
    medians = {m.name: m.median for m in repeater.measurements}
    assert len(medians) == 2 * 2 * 2
    for curve, verb in ((disk.read, "read"), (disk.write, "write")):
        assert curve.sizes == (65536, 262144)
        for size, rate in zip((64, 256), curve.rates, strict=True):
            depths = [medians[f"disk.{verb}.{size}KiB.depth{n}"] for n in (1, 2)]
            assert rate == max(depths)
    assert not list(tmp_path.iterdir())


def test_interrupted_disk_measurement_removes_its_file(tmp_path: Path) -> None:
    def interrupt(name: str) -> None:
        if name.startswith("disk.write"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_disk(tmp_path, _disk_plan(), Repeater(TINY, interrupt))
    assert not list(tmp_path.iterdir())


def test_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiles.disk.free_disk_bytes", lambda folder: 300_000)
    with pytest.raises(InputError, match="293 KiB free"):
        measure_disk(tmp_path, _disk_plan(), Repeater(TINY, lambda name: None))
    assert not list(tmp_path.iterdir())


def test_sampler_repeats_short_work_and_keeps_the_calmest_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempts = iter([[1.0, 2.0, 4.0], [2.0, 2.0, 2.2], [9.0, 9.0, 9.0]])

    def seconds(work: object, *, repeats: int, warmups: int) -> list[float]:
        return [0.5] if repeats == 1 else next(attempts)

    monkeypatch.setattr("profiles.repeats.seconds_of", seconds)
    effort = Effort(num_samples=3, sample_s=1.0, figure_s=8.0, total_s=1e9)
    repeater = Repeater(effort, lambda name: None)
    # Work of 0.5 s is called twice in a sample of 1 s, so 2 s a sample are 1 s a call.
    figure = repeater.measure_rate("x", "bytes_per_s", lambda: None, 100.0)
    assert figure.median == pytest.approx(100.0)
    assert repeater.measurements == (figure,)
    assert next(attempts) == [9.0, 9.0, 9.0]
    assert repeater.affords(2.0) and not repeater.affords(2.1)


def test_beside_a_gpu_the_cpu_is_measured_with_the_cores_that_it_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its memory is measured with all of them: what is copied passes it, too."""
    recorded = recorded_profile("h200-141gb")
    threads: dict[str, int] = {}

    def note(name: str, figure: Any) -> Any:
        def measure(*_: object) -> Any:
            threads[name] = torch.get_num_threads()
            return figure

        return measure

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for place, name, figure in (
        (compute, "measure_memory", recorded.cpu.memory_bytes_per_s),
        (compute, "measure_compute", recorded.cpu.compute),
        (disk, "measure_disk", recorded.disk),
        (measure, "_measure_gpu", recorded.gpu),
        (measure, "measure_contention", recorded.contention),
    ):
        monkeypatch.setattr(place, name, note(name, figure))
    with num_threads_of(4):
        profile = measure.measure_profile(offload_dir=tmp_path, quick=True)
        assert torch.get_num_threads() == 4
    assert profile.gpu == recorded.gpu
    assert threads["measure_memory"] == 4
    assert threads["measure_compute"] == threads["measure_contention"] == 3


@pytest.mark.parametrize(("used", "is_told"), [(5.0, False), (60.0, True)])
def test_a_busy_machine_is_told(
    used: float,
    is_told: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: used)
    monkeypatch.setattr(measure, "measure_profile", lambda **_: recorded_profile("cpu-2core"))
    main(["--output", str(tmp_path / "profile.json"), "--offload-dir", str(tmp_path)])
    assert any("60 % of this machine" in told for told in caplog.messages) == is_told
