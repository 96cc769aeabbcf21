"""Cores that control groups leave, read from trees that look like /proc and /sys."""

from __future__ import annotations

from pathlib import Path

import pytest

from profiles.control_groups import cpu_quota

V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/jobs/one\n4:memory:/elsewhere\n0::/unused",
    "proc/self/mountinfo": "33 31 0:30 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu",
}
V2 = {
    "proc/self/cgroup": "0::/jobs/one",
    "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (V2 | {"sys/fs/cgroup/jobs/one/cpu.max": "150000 100000"}, 1.5),
        # The group above is tighter.
        (
            V2
            | {
                "sys/fs/cgroup/jobs/one/cpu.max": "800000 100000",
                "sys/fs/cgroup/jobs/cpu.max": "200000 100000",
            },
            2.0,
        ),
        (V2 | {"sys/fs/cgroup/jobs/one/cpu.max": "max 100000"}, None),
        (
            V1
            | {
                "sys/fs/cgroup/cpu/jobs/one/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/jobs/one/cpu.cfs_period_us": "100000",
            },
            4.0,
        ),
        (
            V1
            | {
                "sys/fs/cgroup/cpu/jobs/one/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/jobs/one/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        ({}, None),
    ],
)
def test_cpu_quota(files: dict[str, str], expected: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    assert cpu_quota(tmp_path) == expected
