"""Which kept profile a run uses: the one of its own situation, told with where it was measured."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from costmodel.calibration.measured_runs import MeasuredRun
from executor import machine_profile
from executor.cli.run_report import Report
from profiles.mounts import Mount
from tests.executor.test_memory import LLAMA
from tests.executor.tiny_machines import make_hardware, make_policy


def count_measuring(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let measuring write a profile of a tiny machine; returns the commands, filled as they run."""
    commands = list[str]()

    def measure(name: str, *words: str) -> bool:
        commands.append(name)
        make_hardware().save(Path(words[words.index("--output") + 1]))
        return True

    monkeypatch.setattr(machine_profile, "_run_module", measure)
    return commands


def test_each_situation_has_a_kept_profile_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured and told once for each; the one that is used says where it was measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file_systems = {"a": "ext4 /dev/sda1", "b": "tmpfs tmpfs"}
    monkeypatch.setattr(machine_profile, "_file_system", lambda folder: file_systems[folder.name])
    measured = count_measuring(monkeypatch)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    number = torch.get_num_threads()
    for situation in (
        ("a", number, 2),
        ("b", number, 2),
        ("a", number + 1, 2),
        ("a", number, 1),
    ) * 2:
        folder, threads, cores = situation
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        profile = machine_profile.machine_profile(tmp_path / folder)
        assert f"{threads} threads on {cores} cores" in profile.source
        assert f"offload folder {tmp_path / folder} on {file_systems[folder]}" in profile.source
    assert measured == ["profiles.measure"] * 4
    assert capsys.readouterr().err.count("this machine's profile: ") == 4


def test_a_file_system_with_a_long_name_has_a_profile_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "server:/very/long/" + "x" * 300
    found = Mount(root="/", point="/x", kind="nfs4", source=source, options=())
    monkeypatch.setattr(machine_profile, "mount_of", lambda folder: found)
    assert machine_profile._file_system(tmp_path) == f"nfs4 {source}"
    kept = machine_profile._kept("profile", "json", tmp_path)
    assert kept is not None
    assert len(kept.name) < 255 - len(".part") - 20 and "/" not in kept.name


def test_without_a_folder_to_keep_things_in_a_run_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(machine_profile, "cache_folder", lambda: None)
    measured = count_measuring(monkeypatch)
    profile = machine_profile.machine_profile(tmp_path)
    assert measured == ["profiles.measure"] and str(tmp_path) in profile.source
    assert f"profile: not kept, {profile.source}, " in capsys.readouterr().err
    machine_profile.keep_run(finished_report(), tmp_path)
    assert list(tmp_path.iterdir()) == [] and not caplog.records


@pytest.mark.parametrize("broken", ["_kept", "write_json"])
def test_a_run_whose_figures_cannot_be_kept_is_no_failure(
    broken: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), "gone")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine_profile, broken, fail)
    machine_profile.keep_run(finished_report(), tmp_path)
    assert "figures were not kept: [Errno 2] No such file or directory: 'gone'" in caplog.text


def test_runs_that_score_prompts_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine_profile.keep_run(finished_report(prompt_logprobs=0), tmp_path)
    assert not list(tmp_path.rglob("*.csv"))
    machine_profile.keep_run(finished_report(), tmp_path)
    assert len(list(tmp_path.rglob("*.csv"))) == 1


def finished_report(*, prompt_logprobs: int | None = None) -> Report:
    """Report a run long enough to be kept."""
    policy = make_policy(LLAMA, prompt_len=8, gen_len=2)
    policy = replace(policy, workload=replace(policy.workload, prompt_logprobs=prompt_logprobs))
    run = MeasuredRun(policy=policy, throughput_tok_per_s=0.8, prefill_s=5.0, decode_s=5.0)
    hardware = make_hardware(gpu=torch.cuda.is_available())
    fake = SimpleNamespace(
        policy=policy, hardware=hardware, busy_shares={}, lanes=None, measured_run=lambda: run
    )
    return cast(Report, fake)
