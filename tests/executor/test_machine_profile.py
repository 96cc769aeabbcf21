"""Which kept profile a run uses: the one of its own situation, told with where it was measured."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from executor import machine_profile
from profiles.mounts import Mount
from tests.executor.tiny_machines import make_hardware


def test_each_situation_has_a_kept_profile_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured once for each; the one that is used says where it was measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file_systems = {"a": "ext4 /dev/sda1", "b": "tmpfs tmpfs"}
    monkeypatch.setattr(machine_profile, "_file_system", lambda folder: file_systems[folder.name])
    measured = []

    def measure(name: str, *words: str) -> bool:
        measured.append(name)
        make_hardware().save(Path(words[words.index("--output") + 1]))
        return True

    monkeypatch.setattr(machine_profile, "_run_module", measure)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    number = torch.get_num_threads()
    for situation in (
        ("a", number, 2), ("b", number, 2), ("a", number + 1, 2), ("a", number, 1),
    ) * 2:  # fmt: skip
        folder, threads, cores = situation
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        profile = machine_profile.machine_profile(tmp_path / folder)
        assert f"{threads} threads on {cores} cores" in profile.source
        assert f"offload folder {tmp_path / folder} on {file_systems[folder]}" in profile.source
    assert measured == ["profiles.measure"] * 4


def test_a_file_system_with_a_long_name_has_a_profile_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "server:/very/long/" + "x" * 300
    found = Mount(root="/", point="/x", kind="nfs4", source=source, options=())
    monkeypatch.setattr(machine_profile, "mount_of", lambda folder: found)
    assert machine_profile._file_system(tmp_path) == f"nfs4 {source}"
    kept = machine_profile._kept("profile", "json", tmp_path)
    assert len(kept.name) < 255 - len(".part") - 20 and "/" not in kept.name
