"""Commands run in the tests' own process, as a process of their own would end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest

from profiles.command import run


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


def end_command(
    main: Callable[[list[str]], None],
    arguments: Iterable[object],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str = "command",
) -> Ended:
    """Run a command to its end, as a program of that name."""
    capfd.readouterr()
    on_terminate = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
        with pytest.raises(SystemExit) as ended:
            run(main)
    finally:
        signal.signal(signal.SIGTERM, on_terminate)
    captured = capfd.readouterr()
    assert isinstance(ended.value.code, int)
    return Ended(status=ended.value.code, out=captured.out, err=captured.err)
