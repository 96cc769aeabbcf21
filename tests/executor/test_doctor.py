"""The doctor: what it finds on this machine, and on machines that lack something."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from executor import doctor
from executor.machine import checks, findings
from executor.machine.findings import Finding, State
from tests.executor.commands import end_command

PLACED = {
    "proc/self/cgroup": "0::/",
    "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
}


def _by_name(found: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in found}


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in (PLACED | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return root


def test_this_machine_can_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--offload-dir", tmp_path / "made later", "--json"]
    ended = end_command(doctor.main, arguments, monkeypatch, capfd)
    assert (ended.status, ended.err) == (0, "")
    *lines, last = ended.out.splitlines()
    told = json.loads(last)
    assert told["can_run"] is True
    named = {finding["what"]: finding for finding in told["findings"]}
    for line, finding in zip(lines, told["findings"], strict=True):
        assert line.startswith(f"{finding['state']:<6}{finding['what']:<16}{finding['found']}")
        assert finding["follows"] in line
    assert torch.__version__ in named["torch"]["found"]
    assert f"computes with {torch.get_num_threads()} threads" in named["cores"]["found"]
    assert str(tmp_path) in named["offload folder"]["found"]
    assert {"memory", "CUDA device", "direct I/O", "kept profile"} <= named.keys()
    # Nothing was made.
    assert list(tmp_path.iterdir()) == []


def test_without_torch(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    ended = end_command(doctor.main, [], monkeypatch, capfd)
    assert (ended.status, ended.err) == (1, "error: this machine cannot run models yet: torch\n")
    assert ended.out.splitlines()[-1].startswith("fail  torch")


def test_libraries_that_are_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    stated = ["numpy", "torch>=999", "nothing-of-this-name>=2", 'pytest>=999; extra == "test"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: stated)
    found = _by_name(findings.check_libraries())["libraries"]
    assert found.state is State.FAIL
    assert found.found == f"torch {torch.__version__} (wanted: >=999); no nothing-of-this-name"


def test_more_threads_than_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
    enough = _tree(tmp_path / "enough", {"sys/fs/cgroup/cpu.max": "250000 100000"})
    assert checks.check_cores(enough).state is State.OK
    few = _tree(tmp_path / "few", {"sys/fs/cgroup/cpu.max": "150000 100000"})
    found = checks.check_cores(few)
    assert found.state is State.NOTE
    assert "quota of 1.5" in found.found and found.follows.endswith("try: OMP_NUM_THREADS=1")


def test_memory_of_a_control_group(tmp_path: Path) -> None:
    limits = {"sys/fs/cgroup/memory.max": str(2**30), "sys/fs/cgroup/memory.current": str(2**30)}
    (found,) = checks.check_memory(_tree(tmp_path, limits))
    assert found.state is State.NOTE
    assert "of 1.00 GiB (the control group's limit)" in found.found


def test_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    old = tmp_path / "old-c++"
    old.write_text("#!/bin/sh\necho 'error: unknown -std=c++17' >&2\nexit 1\n")
    old.chmod(0o755)
    for name, reason in {
        "": "forbidden by ZIGZAG_COMPILER",
        "no-compiler": "no compiler no-compiler",
        str(old): f"{old}: error: unknown -std=c++17",
        "true": "does not compile C++",
    }.items():
        monkeypatch.setenv("ZIGZAG_COMPILER", name)
        (found,) = checks.check_kernels()
        assert found.state is State.NOTE and reason in found.found
        assert "several times slower" in found.follows


def test_offload_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (found,) = checks.check_offload_dir(tmp_path / "file")
    assert found.state is State.FAIL and "Not a directory" in found.found

    monkeypatch.setattr(checks, "memory_file_system", lambda folder: "tmpfs")
    found = _by_name(checks.check_offload_dir(tmp_path))["offload folder"]
    assert found.state is State.NOTE and "tmpfs" in found.follows

    plain_open = os.open

    def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain_open(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    found = _by_name(checks.check_offload_dir(tmp_path))["direct I/O"]
    assert found.state is State.NOTE and "page cache" in found.follows


def test_kept_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "kept_profile", lambda folder: tmp_path / "profile.json")
    assert checks.check_profile(tmp_path).found == "none yet"
    (tmp_path / "profile.json").write_text("{}")
    assert checks.check_profile(tmp_path).state is State.NOTE


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> bool:
        warnings.warn("the NVIDIA driver is too old", stacklevel=1)
        return False

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    (found,) = checks.check_gpu()
    assert (found.state, found.found) == (State.NOTE, "the NVIDIA driver is too old")

    def busy() -> None:
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    (found,) = checks.check_gpu()
    assert (found.state, found.found) == (State.FAIL, "out of memory more")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**31))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(checks, "gpu_kernels", lambda: None)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: SimpleNamespace())
    named = _by_name(checks.check_gpu())
    assert named["CUDA device"].found.startswith("A GPU, 1.00 GiB free of 2.00 GiB")
    assert named["CUDA device"].follows == "other devices are not used: 1"
    assert named["Triton"].state is State.NOTE
    assert named["pinned memory"].state is State.OK
