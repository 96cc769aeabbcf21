"""Memory limits read from trees that look like /proc and /sys of real machines."""

from __future__ import annotations

import mmap
import resource
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from profiles.memory_limits import usable_memory_bytes
from profiles.mounts import memory_file_system

V1_MOUNT = "32 31 0:29 {root} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
V1_CPU_MOUNT = "33 31 0:30 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"
V2_MOUNT = "31 23 0:28 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_UNLIMITED = "9223372036854771712"


PLENTY = 10**15
PAGE = mmap.PAGESIZE


@pytest.fixture(autouse=True)
def _large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound what is usable by the trees alone."""
    memory = SimpleNamespace(total=PLENTY, available=PLENTY)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def _usable(root: Path, runtime_bytes: int | None = None) -> int:
    return usable_memory_bytes(runtime_bytes, root)


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
    assert _usable(root) == 2000


def test_a_neighbours_limit_does_not_count(tmp_path: Path) -> None:
    root = _v2(tmp_path, "/a/b", {"/a/b": "9000", "/a/other": "10", "/a/b/child": "20"})
    assert _usable(root) == 9000


def test_v2_max_is_no_limit(tmp_path: Path) -> None:
    assert _usable(_v2(tmp_path, "/a", {"/a": "max"})) == PLENTY


def test_v2_max_below_a_limit(tmp_path: Path) -> None:
    assert _usable(_v2(tmp_path, "/a/b", {"/a": "4096", "/a/b": "max"})) == 4096


def test_v1_huge_number_is_no_limit(tmp_path: Path) -> None:
    root = _v1(tmp_path, "/a", {"": V1_UNLIMITED, "/a": V1_UNLIMITED})
    assert _usable(root) == PLENTY


@pytest.mark.parametrize("make", [_v1, _v2])
def test_container_that_sees_only_its_subtree(make: object, tmp_path: Path) -> None:
    assert callable(make)
    root = make(tmp_path, "/docker/123/job", {"": "7000", "/job": "6000"}, "/docker/123")
    assert _usable(root) == 6000


def test_v2_namespace_outside_the_mount(tmp_path: Path) -> None:
    assert _usable(_v2(tmp_path, "/../../other", {"": "8192"})) == 8192


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
    assert _usable(tmp_path) == 4500


def test_usual_mount_points_without_mountinfo(tmp_path: Path) -> None:
    _v2(tmp_path, "/a", {"/a": "1234"})
    (tmp_path / "proc/self/mountinfo").unlink()
    assert _usable(tmp_path) == 1234


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    assert _usable(tmp_path) == PLENTY


def _used(root: Path, group: str, usage: int, stat: dict[str, int], *, version: int) -> None:
    folder = f"sys/fs/cgroup{'/memory' if version == 1 else ''}{group}"
    name = "memory.usage_in_bytes" if version == 1 else "memory.current"
    lines = "\n".join(f"{key} {number}" for key, number in stat.items())
    _tree(root, {f"{folder}/{name}": str(usage), f"{folder}/memory.stat": lines})


def test_what_others_of_the_group_hold_is_not_there_but_their_page_cache_is(tmp_path: Path) -> None:
    v1, v2 = tmp_path / "v1", tmp_path / "v2"
    _v1(v1, "/a/b", {"/a": "9000", "/a/b": "8500"})
    # What has yet to be written, or lies in a tmpfs, cannot be dropped.
    kept = {"total_inactive_file": 700, "total_active_file": 300, "total_dirty": 60}
    kept |= {"inactive_file": 4000, "total_writeback": 40, "total_shmem": 500}
    _used(v1, "/a", 5000, kept, version=1)
    _used(v1, "/a/b", 3000, {}, version=1)
    assert _usable(v1) == 9000 - (5000 - 900)
    _v2(v2, "/a/b", {"/a": "9000", "/a/b": "max"})
    kept = {"anon": 3500, "inactive_file": 700, "active_file": 300, "file_dirty": 60, "shmem": 500}
    _used(v2, "/a", 5000, kept | {"file_writeback": 40}, version=2)
    assert _usable(v2) == 9000 - (5000 - 900)


def test_a_group_that_holds_more_than_its_limit_leaves_nothing(tmp_path: Path) -> None:
    root = _v2(tmp_path, "/a", {"/a": "4000"})
    _used(root, "/a", 5000, {}, version=2)
    assert _usable(root) == 0


def test_above_memory_high_a_group_is_only_slowed_down_and_that_counts(tmp_path: Path) -> None:
    root = _v2(tmp_path, "/a", {"/a": "4000"})
    assert _usable(_tree(root, {"sys/fs/cgroup/a/memory.high": "max"})) == 4000
    assert _usable(_tree(root, {"sys/fs/cgroup/a/memory.high": "3000"})) == 3000


def test_of_what_this_process_holds_an_empty_ones_share_is_there(tmp_path: Path) -> None:
    root = _v2(tmp_path, "/a", {"/a": str(1000 * PAGE)})
    _used(root, "/a", 400 * PAGE, {}, version=2)
    # Resident 300 pages, 100 of them of files, which the group does not count as in use.
    _tree(root, {"proc/self/statm": "2000 300 100 1 0 500 0"})
    free = 600
    assert _usable(root) == (free + 200) * PAGE
    assert _usable(root, 300 * PAGE) == (free + 200) * PAGE
    # It holds 50 pages more than an empty process, such as prompts: they are not there.
    assert _usable(root, 250 * PAGE) == (free + 150) * PAGE
    assert _usable(root, 0) == free * PAGE


def test_limits_on_addresses_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _tree(tmp_path, {"proc/self/statm": "2000 300 100 1 0 500 0"})
    limits = {resource.RLIMIT_AS: resource.RLIM_INFINITY, resource.RLIMIT_DATA: 900 * PAGE}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], resource.RLIM_INFINITY))
    assert _usable(root) == (900 - 500 + 200) * PAGE
    limits[resource.RLIMIT_AS] = 2100 * PAGE
    assert _usable(root) == (2100 - 2000 + 200) * PAGE


def test_where_nothing_is_overcommitted_the_rest_counts(tmp_path: Path) -> None:
    meminfo = "MemTotal: 900 kB\nCommitLimit:  500 kB\nCommitted_AS: 200 kB\nHugePages_Total: 0"
    root = _tree(tmp_path, {"proc/meminfo": meminfo, "proc/sys/vm/overcommit_memory": "1"})
    assert _usable(root) == PLENTY
    _tree(root, {"proc/sys/vm/overcommit_memory": "2"})
    assert _usable(root) == 300 * 1024


@pytest.mark.parametrize(
    ("system", "kind"),
    [
        ("tmpfs tmpfs rw,size=100k", "tmpfs"),
        ("ramfs none rw", "ramfs"),
        ("ext4 /dev/zram1 rw", "ext4"),
        ("ext4 /dev/vda rw", None),
        ("overlay overlay rw,lowerdir=/l,upperdir={upper},workdir=/w", "tmpfs"),
        ("overlay overlay rw,lowerdir=/l,upperdir=/not/seen/here,workdir=/w", None),
        ("overlay overlay rw,lowerdir=/l\\054upperdir={upper},upperdir=/not/seen/here", None),
    ],
)
def test_folders_that_are_memory(tmp_path: Path, system: str, kind: str | None) -> None:
    def mounted(folder: Path, what: str) -> str:
        # The numbers of a btrfs subvolume's mount are not those of its files.
        return f"40 31 0:999 / {folder} rw shared:1 - {what}"

    folder, upper = tmp_path / "folder", tmp_path / "upper"
    upper.mkdir()
    lines = [
        mounted(folder, "ext4 /dev/hidden rw"),
        mounted(folder, system.format(upper=upper)),
        mounted(upper, "tmpfs tmpfs rw"),
        mounted(tmp_path, "ext4 /dev/vdb rw"),
        mounted(tmp_path / "fold", "ramfs none rw"),
    ]
    root = _tree(tmp_path / "root", {"proc/self/mountinfo": "\n".join(lines)})
    assert memory_file_system(folder / "not" / "yet" / "there", root) == kind
    (tmp_path / "link").symlink_to(folder)
    assert memory_file_system(tmp_path / "link" / "there", root) == kind
    assert memory_file_system(tmp_path / "beside", root) is None
