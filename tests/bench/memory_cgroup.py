"""A control group that holds one command to a limit of memory, page cache included."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from profiles.errors import RunError

# A group stays busy for a moment after its last process has ended.
REMOVAL_TRIES = 50
REMOVAL_PAUSE_S = 0.1
# The shell moves itself in first, so that every byte of the command is counted.
ENTER_AND_RUN = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True, slots=True, kw_only=True)
class _Version:
    """What one version of control groups calls its files."""

    root: Path
    limit: str
    swap_limit: str
    peak: str
    events: str


_V1 = _Version(
    root=Path("/sys/fs/cgroup/memory"),
    limit="memory.limit_in_bytes",
    swap_limit="memory.memsw.limit_in_bytes",
    peak="memory.max_usage_in_bytes",
    events="memory.oom_control",
)
_V2 = _Version(
    root=Path("/sys/fs/cgroup"),
    limit="memory.max",
    swap_limit="memory.swap.max",
    peak="memory.peak",
    events="memory.events",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended.

    ``peak_bytes`` is the most that the group held, page cache included; ``None`` on kernels that
    do not tell (version 2 before Linux 5.19).
    """

    status: int | None
    wall_s: float
    peak_bytes: int | None
    was_killed_for_memory: bool
    last_words: str

    @property
    def is_good(self) -> bool:
        """Whether it ran to its end."""
        return self.status == 0


class MemoryCgroup:
    """A group under the root of the memory controller; made and removed by ``with``.

    Needs root and a control group file system that can be written. Swap is denied, so that the
    limit means the same on every machine.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._version = _V1 if (_V1.root / _V1.limit).exists() else _V2
        self._folder = self._version.root / f"zigzag-bench-{os.getpid()}"

    def __enter__(self) -> MemoryCgroup:
        version = self._version
        try:
            if version is _V2:
                _share_memory_controller(version.root)
            self._folder.mkdir()
            (self._folder / version.limit).write_text(str(self.limit_bytes), encoding="ascii")
            swap = self._folder / version.swap_limit
            # Absent where the kernel does not account for swap.
            if swap.exists():
                denied = 0 if version is _V2 else self.limit_bytes
                swap.write_text(str(denied), encoding="ascii")
        except OSError as error:
            if self._folder.exists():
                self._folder.rmdir()
            raise RunError(
                f"a memory cgroup under {version.root} cannot be made ({error.strerror}); try:"
                " as root, on a machine or in a container whose control groups can be written"
            ) from error
        return self

    def __exit__(self, *exception: object) -> None:
        for _ in range(REMOVAL_TRIES):
            try:
                self._folder.rmdir()
                return
            except OSError:
                time.sleep(REMOVAL_PAUSE_S)
        raise RunError(f"the memory cgroup {self._folder} cannot be removed; it is still in use")

    def run(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        folder: Path,
        log: Path,
        timeout_s: float,
        drive: Callable[[subprocess.Popen[bytes]], None] | None = None,
    ) -> Ended:
        """Run one command to its end; ``log`` takes its output, ``log`` + ``.err`` its errors.

        ``drive`` makes use of a command that does not end by itself, from outside the group. The
        command is asked to end when it returns.
        """
        errors = log.with_suffix(log.suffix + ".err")
        words = ["sh", "-c", ENTER_AND_RUN, str(self._folder / "cgroup.procs"), *command]
        start = time.perf_counter()
        status: int | None
        with (
            log.open("wb") as out,
            errors.open("wb") as err,
            subprocess.Popen(words, env=env, cwd=folder, stdout=out, stderr=err) as process,
        ):
            try:
                if drive is not None:
                    drive(process)
                    process.terminate()
                status = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                status = None
            except BaseException:
                process.terminate()
                raise
        return Ended(
            status=status,
            wall_s=time.perf_counter() - start,
            peak_bytes=self._peak_bytes(),
            was_killed_for_memory=self._count_kills() > 0,
            last_words=last_line(errors),
        )

    def _peak_bytes(self) -> int | None:
        path = self._folder / self._version.peak
        return int(path.read_text(encoding="ascii")) if path.exists() else None

    def _count_kills(self) -> int:
        text = (self._folder / self._version.events).read_text(encoding="ascii")
        counts = dict(line.split() for line in text.splitlines())
        return int(counts.get("oom_kill", 0))


def last_line(path: Path) -> str:
    """Return the last line that says something, or that there is none."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no message")


def _share_memory_controller(root: Path) -> None:
    control = root / "cgroup.subtree_control"
    if "memory" not in control.read_text(encoding="ascii").split():
        control.write_text("+memory", encoding="ascii")
