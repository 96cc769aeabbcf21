"""Outputs of every kind: written through or refused, never replaced, and no work lost."""

from __future__ import annotations

import errno
import os
import pty
import resource
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from profiles import output_checks, spool
from profiles.errors import InputError, RunError
from profiles.output_checks import checked_outputs, output_path
from profiles.outputs import RESCUE_PREFIX, OutputError, OutputFile, write_output
from profiles.spool import Spool
from profiles.whole_file import Render, write_whole

TEXT = "first\nsecond\n"
NOBODY = 65534


def content(handle: Any) -> None:
    handle.write(TEXT)


def check_output(flag: str, path: Path) -> None:
    with checked_outputs({flag: path}, {}):
        pass


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def only_rescue(folder: Path) -> Path:
    (rescue,) = folder.glob(f"{RESCUE_PREFIX}*")
    return rescue


@pytest.fixture
def plain_folder() -> Iterator[Path]:
    """A folder that modes hold for: also where tests run as root, to whom they mean nothing."""
    folder = Path(tempfile.mkdtemp())
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        folder.chmod(0o700)
        if os.getuid() == 0:
            os.seteuid(0)
        shutil.rmtree(folder)


def test_links_stay_and_what_they_lead_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "file"
    (tmp_path / "link").symlink_to("there/file")
    (tmp_path / "link-to-link").symlink_to("link")
    for path in (tmp_path / "link", tmp_path / "link-to-link"):
        # It dangles first.
        for _ in range(2):
            check_output("--output", path)
            write_output(path, content)
            assert path.is_symlink() and not target.is_symlink() and target.read_text() == TEXT
        target.unlink()
    (tmp_path / "nowhere").symlink_to("absent/file")
    (tmp_path / "loop").symlink_to("loop")
    for name, words in (("nowhere", "no such folder"), ("loop", "Too many levels")):
        with pytest.raises(InputError, match=words):
            check_output("--output", tmp_path / name)
    assert names_in(tmp_path) == ["link", "link-to-link", "loop", "nowhere", "there"]


def test_other_names_of_a_file_see_what_is_written(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_text("a longer text that was there before")
    other.hardlink_to(path)
    check_output("--output", path)
    write_output(path, content)
    assert path.read_text() == other.read_text() == TEXT and path.samefile(other)


@pytest.mark.parametrize(
    "name", [b"n" * 255, "\u00fc".encode() * 127, b"not-utf-8-\xff.json", b"two\nlines.json"]
)
def test_any_name_that_the_system_takes(name: bytes, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    for _ in range(2):
        check_output("--output", path)
        write_output(path, content)
        assert path.read_text() == TEXT and list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="name too long"):
        check_output("--output", tmp_path / ("n" * 256))


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "private"
    path.touch()
    for mode in (0o600, 0o664):
        path.chmod(mode)
        write_output(path, content)
        assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has files of any group")
def test_a_written_file_keeps_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shared"
    path.touch(0o640)
    os.chown(path, -1, NOBODY)
    write_output(path, content)
    replaced = path.stat()
    # As for a user who has left the group.
    monkeypatch.setattr(os, "fchown", fail_with(errno.EPERM, times=9))
    check_output("--output", path)
    write_output(path, lambda handle: handle.write("new"))
    in_place = path.stat()
    assert in_place.st_ino == replaced.st_ino and path.read_text() == "new"
    for status in (replaced, in_place):
        assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (NOBODY, 0o640)
    with pytest.raises(RunError, match="its group cannot be kept"):
        write_whole(path, content)
    assert names_in(tmp_path) == ["shared"] and path.read_text() == "new"


def test_devices_and_pipes_are_written_through(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    terminal, pipe = Path(os.ttyname(slave)), tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for path, source in ((terminal, master), (pipe, reader), (tmp_path / "link", reader)):
            with checked_outputs({"--output": path}, {}):
                write_output(path, content)
            assert os.read(source, 100).replace(b"\r", b"").decode() == TEXT
        assert terminal.is_char_device() and pipe.is_fifo()
    finally:
        for descriptor in (master, slave, reader):
            os.close(descriptor)
    assert names_in(tmp_path) == ["link", "pipe"]


def test_own_descriptors_are_written_where_they_are(tmp_path: Path) -> None:
    """As a shell's redirection and process substitution want it: nothing is cut off before."""
    with (tmp_path / "log").open("w") as log:
        log.write("before\n")
        log.flush()
        number = log.fileno()
        (tmp_path / "link").symlink_to(f"/proc/self/fd/{number}")
        for path in (Path(f"/dev/fd/{number}"), tmp_path / "link"):
            check_output("--output", path)
            write_output(path, content)
        log.write("after\n")
    assert (tmp_path / "log").read_text() == f"before\n{TEXT}{TEXT}after\n"
    with (tmp_path / "log").open() as reading, pytest.raises(InputError, match="for reading only"):
        check_output("--output", Path(f"/dev/fd/{reading.fileno()}"))
    with pytest.raises(InputError, match="Bad file descriptor"):
        check_output("--output", Path("/dev/fd/987"))


def test_what_people_read_makes_way_for_output(capfd: pytest.CaptureFixture[str]) -> None:
    path = output_path("-")
    with checked_outputs({"--output": path, "--trace": Path("/dev/null")}, {}):
        print("for people")
        write_output(path, content)
    print("later")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == (f"{TEXT}later\n", "for people\n")


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server, chdir(tmp_path):
        server.bind("socket")
        for name, words in {
            "pipe": "a pipe that nobody reads",
            "socket": "a socket",
            ".": "a folder",
            "file/x": "Not a directory",
            "no/x": "no such folder",
        }.items():
            with pytest.raises(InputError, match=words) as caught:
                check_output("--trace", Path(name))
            assert str(caught.value).startswith(f"--trace {name}: ")
    for text in ("", "folder/", "folder/.", ".."):
        with pytest.raises(InputError, match="names a folder"):
            output_path(text)
    assert names_in(tmp_path) == ["file", "pipe", "socket"]


def test_a_block_device_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_checks, "_kind", lambda path: stat.S_IFBLK)
    with pytest.raises(InputError, match="a block device"):
        check_output("--output", tmp_path / "disk")


def test_no_file_has_two_parts_to_play(tmp_path: Path) -> None:
    read, other = tmp_path / "read", tmp_path / "other"
    read.touch()
    (tmp_path / "link").symlink_to("read")
    (tmp_path / "hard").hardlink_to(read)
    (tmp_path / "later").symlink_to("absent")
    for path in (read, tmp_path / "link", tmp_path / "hard", tmp_path / "." / "read"):
        with (
            pytest.raises(InputError, match="a file of --prompts; allowed: another"),
            checked_outputs({"--output": path}, {"--prompts": [other, read]}),
        ):
            pass
    for pair in ((read, read), (tmp_path / "later", tmp_path / "absent")):
        with (
            pytest.raises(InputError, match=r"--trace .* got the file of --output"),
            checked_outputs(dict(zip(("--output", "--trace"), pair, strict=True)), {}),
        ):
            pass
    null = Path("/dev/null")
    with checked_outputs({"--output": null, "--trace": null}, {"--prompts": [null]}):
        pass


def test_folders_and_files_with_few_permissions(plain_folder: Path) -> None:
    held = plain_folder / "held"
    held.write_text("before")
    # A folder that can be written and not listed.
    plain_folder.chmod(0o300)
    for path in (held, plain_folder / "new"):
        check_output("--output", path)
        write_output(path, content)
        assert path.read_text() == TEXT
    # A folder that takes no new file: what is there is written in place.
    plain_folder.chmod(0o500)
    held.write_text("before, and longer than it will be")
    check_output("--output", held)
    write_output(held, content)
    assert held.read_text() == TEXT
    with pytest.raises(InputError, match="Permission denied"):
        check_output("--output", plain_folder / "another")
    plain_folder.chmod(0o700)
    held.chmod(0o400)
    with pytest.raises(InputError, match="a file that cannot be written"):
        check_output("--output", held)
    assert names_in(plain_folder) == ["held", "new"]


def fail_with(number: int, *, times: int = 1) -> Callable[..., None]:
    """Return a system call that fails so many times and then does nothing."""
    left = [times]

    def call(*_: object) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_what_a_disk_does_not_take_is_kept_elsewhere(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.json"
    monkeypatch.setattr(os, "fsync", fail_with(number))
    with pytest.raises(OutputError) as caught:
        write_output(path, content)
    rescue = only_rescue(tmp_path)
    assert caught.value.rescue == rescue and rescue.suffix == ".json"
    assert str(caught.value) == f"write of {path}: {os.strerror(number)}; all of it is in {rescue}"
    assert rescue.read_text() == TEXT and names_in(tmp_path) == [rescue.name]
    assert stat.S_IMODE(rescue.stat().st_mode) == 0o600


def test_the_next_folder_is_taken_where_one_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output's folder is removed meanwhile, and the current one is full."""
    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setenv("TMPDIR", str(spare))
    monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC))
    with chdir(tmp_path), pytest.raises(OutputError) as caught:
        write_output(tmp_path / "gone" / "out.json", content)
    assert str(caught.value).endswith(
        f"No such file or directory; all of it is in {spare}/{only_rescue(spare).name}"
    )
    assert only_rescue(spare).read_text() == TEXT and names_in(tmp_path) == ["spare"]


def test_where_no_folder_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    write_output(path, content)
    monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC, times=9))
    with chdir(tmp_path), pytest.raises(OutputError, match="no other folder took it"):
        write_output(path, lambda handle: handle.write("new"))
    # What was there before is there still.
    assert path.read_text() == TEXT and names_in(tmp_path) == ["out.json"]


def test_what_a_pipe_or_a_device_does_not_take_is_kept(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader, end = os.pipe()
    os.close(reader)
    full = Path("/dev/full")
    with chdir(tmp_path):
        for path, reason in (
            (full, "No space left"),
            (Path(f"/dev/fd/{end}"), "Broken pipe"),
            (pipe, "nobody"),
        ):
            with pytest.raises(OutputError, match=reason) as caught:
                write_output(path, content)
            rescue = only_rescue(tmp_path)
            assert str(path) in str(caught.value) and rescue.name in str(caught.value)
            assert rescue.read_text() == TEXT
            rescue.unlink()
    with pytest.raises(InputError, match="a pipe that nobody reads"):
        check_output("--output", Path(f"/dev/fd/{end}"))
    os.close(end)
    assert full.is_char_device() and pipe.is_fifo()


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EPERM, errno.ENOSYS])
def test_a_file_that_has_to_stay_the_same_is_written_in_place(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is a mount of its own, and folders that know no renaming."""
    path = tmp_path / "mounted"
    path.write_text("a longer text that was there before")
    node = path.stat().st_ino
    monkeypatch.setattr(Path, "replace", fail_with(number))
    write_output(path, content)
    assert path.read_text() == TEXT and path.stat().st_ino == node
    assert names_in(tmp_path) == ["mounted"]


def interrupted_once(error: BaseException) -> Render:
    """Return what writes half, then is interrupted, and writes all when called again."""
    calls: list[object] = []

    def render(handle: Any) -> None:
        calls.append(handle)
        handle.write(TEXT[:6])
        handle.flush()
        if len(calls) == 1:
            raise error
        handle.write(TEXT[6:])

    return render


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupt_comes_after_what_was_begun(
    error: BaseException,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = OutputFile(tmp_path / "out")
    with pytest.raises(type(error)):
        file.write(interrupted_once(error))
    assert file.kept_in == file.path and file.path.read_text() == TEXT
    stream = OutputFile(Path("/dev/stdout"))
    with chdir(tmp_path), pytest.raises(type(error)):
        stream.write(interrupted_once(error))
    # Nothing comes twice in a stream.
    assert capfd.readouterr().out == TEXT[:6]
    assert only_rescue(tmp_path).read_text() == TEXT
    assert only_rescue(tmp_path).name in caplog.text


def test_an_interrupted_rescue_leaves_nothing(tmp_path: Path) -> None:
    errors: list[BaseException] = [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()]

    def render(handle: Any) -> None:
        handle.write(TEXT)
        if errors:
            raise errors.pop(0)

    with pytest.raises(KeyboardInterrupt):
        write_output(tmp_path / "out", render)
    assert names_in(tmp_path) == ["out"] and (tmp_path / "out").read_text() == TEXT


def test_a_full_disk_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", fail_with(errno.ENOSPC))
    with pytest.raises(InputError, match="No space left on device"):
        check_output("--output", tmp_path / "out")
    assert names_in(tmp_path) == []


def test_a_spool_takes_the_first_folder_with_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tempfile.TemporaryFile

    def temporary_file(*, dir: Path, **options: Any) -> Any:
        if dir.name == "full":
            return Path("/dev/full").open("r+b", **options)
        return original(dir=dir, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", temporary_file)
    monkeypatch.setattr(spool, "PIECE_CHARS", 10)
    pieces = [f"piece {i} \u00fc\n" for i in range(12)]
    with Spool("it", [tmp_path / "absent", tmp_path / "full", tmp_path]) as collected:
        for piece in pieces:
            collected.write(piece)
        # A file may be written anew.
        for _ in range(2):
            write_output(tmp_path / "out", collected.copy_into)
            assert (tmp_path / "out").read_text() == "".join(pieces)
    assert names_in(tmp_path) == ["out"]
    for folders in ([tmp_path / "absent"], [tmp_path / "full"], []):
        with Spool("it", folders) as nowhere:
            for piece in pieces:
                nowhere.write(piece)
            with pytest.raises(RunError, match="it: no folder has room"):
                write_output(tmp_path / "out", nowhere.copy_into)
    assert names_in(tmp_path) == ["out"]


def test_a_spool_whose_disk_fills_up_tells_it_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "PIECE_CHARS", 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Spool("it", [tmp_path]) as collected:
        collected.write("0123456789")
        resource.setrlimit(resource.RLIMIT_FSIZE, (15, hard))
        try:
            collected.write("0123456789")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        collected.write("0123456789")
        with pytest.raises(RunError, match="it: no folder has room"):
            write_output(tmp_path / "out", collected.copy_into)
    assert names_in(tmp_path) == []
