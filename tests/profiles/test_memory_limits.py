"""Memory limits read from trees that look like /proc and /sys of real machines."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from profiles.memory_limits import cgroup_limit_bytes, usable_memory_bytes

V1_MOUNT = "32 31 0:29 {root} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
V1_CPU_MOUNT = "33 31 0:30 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"
V2_MOUNT = "31 23 0:28 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_UNLIMITED = "9223372036854771712"


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def _v1(root: Path, group: str, limits: dict[str, str], mount_root: str = "/") -> Path:
    files = {f"sys/fs/cgroup/memory{k}/memory.limit_in_bytes": v for k, v in limits.items()}
    files["proc/self/cgroup"] = f"5:cpu,cpuacct:/elsewhere\n4:memory:{group}\n0::/unused"
    files["proc/self/mountinfo"] = f"{V1_CPU_MOUNT}\n{V1_MOUNT.format(root=mount_root)}"
    return _tree(root, files)


def _v2(root: Path, group: str, limits: dict[str, str], mount_root: str = "/") -> Path:
    files = {f"sys/fs/cgroup{k}/memory.max": v for k, v in limits.items()}
    files["proc/self/cgroup"] = f"0::{group}"
    files["proc/self/mountinfo"] = V2_MOUNT.format(root=mount_root)
    return _tree(root, files)


@pytest.mark.parametrize("make", [_v1, _v2])
def test_tightest_of_nested_limits(make: object, tmp_path: Path) -> None:
    assert callable(make)
    root = make(tmp_path, "/a/b/c", {"/a": "3000", "/a/b": "2000", "/a/b/c": "5000"})
    assert cgroup_limit_bytes(root) == 2000
    assert usable_memory_bytes(root) == 2000


def test_a_neighbours_limit_does_not_count(tmp_path: Path) -> None:
    root = _v2(tmp_path, "/a/b", {"/a/b": "9000", "/a/other": "10", "/a/b/child": "20"})
    assert cgroup_limit_bytes(root) == 9000


def test_v2_max_is_no_limit(tmp_path: Path) -> None:
    assert cgroup_limit_bytes(_v2(tmp_path, "/a", {"/a": "max"})) is None


def test_v2_max_below_a_limit(tmp_path: Path) -> None:
    assert cgroup_limit_bytes(_v2(tmp_path, "/a/b", {"/a": "4096", "/a/b": "max"})) == 4096


def test_v1_huge_number_is_no_limit(tmp_path: Path) -> None:
    root = _v1(tmp_path, "/a", {"": V1_UNLIMITED, "/a": V1_UNLIMITED})
    assert cgroup_limit_bytes(root) is None
    assert 0 < usable_memory_bytes(root) <= psutil.virtual_memory().total


@pytest.mark.parametrize("make", [_v1, _v2])
def test_container_that_sees_only_its_subtree(make: object, tmp_path: Path) -> None:
    assert callable(make)
    root = make(tmp_path, "/docker/123/job", {"": "7000", "/job": "6000"}, "/docker/123")
    assert cgroup_limit_bytes(root) == 6000


def test_v2_namespace_outside_the_mount(tmp_path: Path) -> None:
    assert cgroup_limit_bytes(_v2(tmp_path, "/../../other", {"": "8192"})) == 8192


def test_v1_and_v2_mounted_together(tmp_path: Path) -> None:
    _v1(tmp_path, "/a", {"/a": "5000"})
    _tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/a\n0::/b",
            "proc/self/mountinfo": V1_MOUNT.format(root="/")
            + "\n40 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
            "sys/fs/cgroup/unified/b/memory.max": "4500",
        },
    )
    assert cgroup_limit_bytes(tmp_path) == 4500


def test_usual_mount_points_without_mountinfo(tmp_path: Path) -> None:
    _v2(tmp_path, "/a", {"/a": "1234"})
    (tmp_path / "proc/self/mountinfo").unlink()
    assert cgroup_limit_bytes(tmp_path) == 1234


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    assert cgroup_limit_bytes(tmp_path) is None
