"""Where things are kept: the user's own folder, another, or none; never one that others write."""

from __future__ import annotations

import ctypes
import os
import pwd
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from profiles import cache_folder as cache_folder_module
from profiles.cache_folder import cache_folder, cache_folders, readable_folders, why_untrusted
from profiles.kernels import build

PRIVATE = f"zigzag-{os.geteuid()}"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give each test temporary files of its own and no other place, and warnings anew."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "relative")
    cache_folder_module.warn_once.cache_clear()
    yield folder
    cache_folder_module.warn_once.cache_clear()


def test_the_users_own_folder_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "zigzag"
    for relative in ("", "here"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache_folder() == tmp_path / "home" / ".cache" / "zigzag"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "zigzag"
    assert not caplog.records


@pytest.mark.parametrize("home", ["a file", "relative", "nobody", "foreign", "full", "/proc"])
def test_a_private_folder_serves_where_it_cannot_be_used(
    home: str,
    tmp_path: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "home"
    monkeypatch.setenv("HOME", home if home in ("relative", "/proc") else str(folder))
    if home == "a file":
        folder.touch()
    elif home == "nobody":
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    elif home == "foreign":
        _make_foreign(folder / ".cache" / "zigzag", monkeypatch)
    elif home == "full":
        _fill(folder, monkeypatch)
    assert cache_folder() == temporary / PRIVATE
    assert (temporary / PRIVATE).stat().st_mode & 0o022 == 0
    assert cache_folder() == temporary / PRIVATE
    (record,) = caplog.records
    assert "\n" not in record.getMessage() and str(temporary / PRIVATE) in record.getMessage()


def test_where_nothing_can_be_written_nothing_is_kept(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _make_foreign(temporary / PRIVATE, monkeypatch)
    assert cache_folder() is None
    assert "belongs to another user; try: set XDG_CACHE_HOME" in caplog.text
    monkeypatch.setattr(tempfile, "gettempdir", lambda: os.open("/not/there", os.O_RDONLY))
    assert cache_folder() is None and list(cache_folders()) == []


def test_what_others_can_write_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache" / "zigzag"
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent))
    folder.chmod(0o777)
    assert "can be written by other users" in str(why_untrusted(folder))
    assert folder not in readable_folders()
    # It is ours, and is made safe before anything is kept there.
    assert cache_folder() == folder
    assert readable_folders()[0] == folder
    file = folder / "file"
    file.touch()
    file.chmod(0o664)
    assert why_untrusted(file) is not None
    file.chmod(0o644)
    assert why_untrusted(file) is None
    _make_foreign(folder, monkeypatch)
    assert folder not in readable_folders()


def _make_foreign(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a folder seem to belong to another user than root and this one."""
    folder.mkdir(parents=True, exist_ok=True)
    number, stat = folder.stat().st_ino, Path.stat

    def foreign(self: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        found = stat(self, follow_symlinks=follow_symlinks)
        if found.st_ino != number:
            return found
        return os.stat_result([*found[:4], os.geteuid() + 1, *found[5:]])

    monkeypatch.setattr(Path, "stat", foreign)


def _fill(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let writing fail under a folder as on a full disk."""
    open_file = tempfile.TemporaryFile

    def fail(*, dir: Path, buffering: int) -> object:
        if Path(dir).is_relative_to(disk):
            raise OSError(28, "No space left on device")
        return open_file(dir=dir, buffering=buffering)

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """This machine's own library, found or built before a test looks elsewhere."""
    found = build.load_library()
    assert found is not None
    return found


@pytest.fixture
def kept(library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep a copy of the library where the tests look, and take the compiler away."""
    folder = tmp_path / "cache" / "zigzag"
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent))
    monkeypatch.setenv("ZIGZAG_COMPILER", "no-such-compiler")
    copy = folder / path_of(library).name
    copy.write_bytes(path_of(library).read_bytes())
    return copy


def path_of(library: ctypes.CDLL) -> Path:
    """Return where a library was loaded from; it was opened before."""
    return Path(library._name).readlink()


def test_a_kept_library_is_used_where_the_compiler_is_gone(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for compiler in ("no-such-compiler", "false", "/bin"):
        monkeypatch.setenv("ZIGZAG_COMPILER", compiler)
        loaded = build.load_library.__wrapped__()
        assert loaded is not None and path_of(loaded) == kept


@pytest.mark.parametrize("length", [0, 100, 20_000, -1])
def test_a_kept_library_is_not_used_where_it_was_cut(
    length: int, kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Mapped, the missing pages of such a file would end the process.
    kept.write_bytes(kept.read_bytes()[:length])
    assert build.load_library.__wrapped__() is None
    assert "no compiler no-such-compiler" in caplog.text


def test_a_kept_library_is_not_used_where_others_can_write(kept: Path) -> None:
    kept.chmod(0o666)
    assert build.load_library.__wrapped__() is None
    # A link may be made to point elsewhere after the check.
    kept.chmod(0o644)
    kept.symlink_to(kept.rename(kept.with_name("other")))
    assert build.load_library.__wrapped__() is None


def test_a_kept_library_is_not_used_for_other_sources(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    assert build.load_library.__wrapped__() is None


def test_a_kept_library_that_does_not_load_gives_way_to_the_next_folder(
    kept: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a mount from which nothing may be run.
    other = temporary / PRIVATE / kept.name
    other.parent.mkdir()
    other.write_bytes(kept.read_bytes())
    load = ctypes.CDLL

    def refuse(name: str) -> ctypes.CDLL:
        if Path(name).readlink() == kept:
            raise OSError("failed to map segment from shared object")
        return load(name)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    loaded = build.load_library.__wrapped__()
    assert loaded is not None and path_of(loaded) == other
