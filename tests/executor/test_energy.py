"""The energy of a run, from counters like those of the system."""

from __future__ import annotations

from pathlib import Path

from executor.jobs.summary import JobSummary
from executor.machine.energy import EnergyMeter


def write_zone(folder: Path, zone: str, name: str, microjoules: int) -> Path:
    path = folder / zone
    path.mkdir(exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text("5000000\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path


def test_packages_are_counted_and_their_parts_are_not(tmp_path: Path) -> None:
    write_zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    write_zone(tmp_path, "intel-rapl:0:0", "core", 1_000_000)
    write_zone(tmp_path, "intel-rapl:1", "package-1", 4_500_000)
    (tmp_path / "intel-rapl").mkdir()
    with EnergyMeter(folder=tmp_path) as meter:
        write_zone(tmp_path, "intel-rapl:0", "package-0", 1_250_000)
        meter.sample()
        write_zone(tmp_path, "intel-rapl:0", "package-0", 2_000_000)
        # It has begun again.
        write_zone(tmp_path, "intel-rapl:1", "package-1", 500_000)
    assert meter.joules == {"package-0": 1.0, "package-1": 1.0}


def test_a_machine_that_does_not_tell(tmp_path: Path) -> None:
    zone = write_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (zone / "energy_uj").unlink()
    with EnergyMeter(has_gpu=True, folder=tmp_path) as meter:
        meter.sample()
    assert meter.joules == {}


def test_a_summary_is_one_line() -> None:
    summary = JobSummary(answered=2, failed=1, prompt_tokens=7, output_tokens=4)
    assert summary.describe() == "2 lines answered, 1 failed; 7 tokens in, 4 out"
    summary.energy_j = {"package-0": 8.0}
    assert summary.describe().endswith("; energy package-0 8.00 J, 2.00 J a token")
    assert summary.as_json()["energy_j"] == {"package-0": 8.0}
