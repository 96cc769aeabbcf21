"""How commands end: one line and an exit status, whatever went wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest

from profiles.command import Parser
from profiles.errors import InputError

ENDINGS = {
    "pass": (0, ""),
    "raise InputError('--x', got=1, allowed='2')": (2, "error: --x: got 1; allowed: 2\n"),
    "raise InfeasibleError('cpu short by 3 bytes')": (3, "error: cpu short by 3 bytes\n"),
    "raise RunError('the disk is full')": (1, "error: the disk is full\n"),
    "raise KeyboardInterrupt": (130, "error: interrupted\n"),
    "raise OSError(28, 'No space left', 'a.json')": (
        1,
        "error: [Errno 28] No space left: 'a.json'\n",
    ),
    "os.kill(os.getpid(), signal.SIGTERM)": (143, "error: terminated\n"),
}


@pytest.mark.parametrize("body", ENDINGS)
def test_endings(body: str) -> None:
    program = (
        "import os, signal\n"
        "from profiles.command import run\n"
        "from profiles.errors import InfeasibleError, InputError, RunError\n"
        f"def main(arguments):\n    {body}\n"
        "run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == ENDINGS[body]


def test_broken_pipe_is_quiet() -> None:
    program = (
        "from profiles.command import run\n"
        "def main(arguments):\n"
        "    while True:\n"
        "        print('x' * 1000)\n"
        "run(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_parser_raises_one_line() -> None:
    parser = Parser(prog="profiles.thing", description="d", example="e")
    parser.add_bytes("--cpu-memory")
    parser.add_seconds("--max-latency")
    flags = parser.parse_args(["--cpu-memory", "1GiB", "--max-latency", "10min"])
    assert (flags.cpu_memory, flags.max_latency) == (2**30, 600)
    for arguments in (["--cpu-memory", "much"], ["--nope"], ["--cpu-memory"], ["--max", "1s"]):
        with pytest.raises(InputError) as caught:
            parser.parse_args(arguments)
        assert arguments[0] in str(caught.value) and "\n" not in str(caught.value)


def test_face_imports_without_torch() -> None:
    program = "import sys, profiles; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
