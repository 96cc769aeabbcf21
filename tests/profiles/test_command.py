"""How commands end: one line and an exit status, whatever went wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from profiles import command
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
    "os.kill(os.getpid(), signal.SIGHUP)": (
        129,
        "error: the terminal was closed; try: nohup\n",
    ),
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


SHELL_ENDINGS = {
    # Files opened later must not get the numbers of streams that were closed.
    "$RUN files >&- 2>&- <&-": (0, ""),
    "$RUN files >&-": (0, "y\n"),
    "$RUN output >&-": (2, "error: --output /dev/stdout: got a stream that is closed"),
    "$RUN flushed >/dev/full": (1, "error: stdout: No space left on device\n"),
    "$RUN buffered >/dev/full": (1, "error: stdout: No space left on device\n"),
    "$RUN help >/dev/full": (1, "error: stdout: No space left on device\n"),
    "$RUN error >/dev/full 2>/dev/full": (2, ""),
    "PYTHONIOENCODING=ascii $RUN names | grep -qF 'mod\\xe8le \\udce9'": (0, ""),
    "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 $RUN names >/dev/null": (0, ""),
    "trap '' HUP; $RUN hangup": (0, ""),
    "$RUN threads": (1, "error: the system gives this process no more threads; try: raise"),
    "$RUN memory": (1, "error: memory: the system gives this process no more; try: raise"),
    # Nothing but what was printed is written to stdout.
    """out=$($RUN elsewhere) && exit 9; [ "$out" = '{"last": 1}' ]""": (
        0,
        "error: [Errno 28] No space left on device\n",
    ),
    "ulimit -f 0; $RUN grow >/dev/null": (1, "error: [Errno 27] File too large"),
}
PROGRAM = """
import os, signal, sys
from profiles.command import Parser, run
from profiles.errors import InputError
from profiles.output_checks import checked_outputs, output_path

def main(arguments):
    match arguments[0]:
        case "files":
            print("x")
            print("y", file=sys.stderr)
            with open(sys.argv[0]) as file:
                assert file.fileno() > 2
        case "output":
            with checked_outputs({"--output": output_path("-")}, {}):
                print("x")
        case "flushed":
            print("x", flush=True)
        case "buffered":
            print("x")
        case "help":
            Parser(prog="p", description="d" * 9000, example="e").parse_args(["--help"])
        case "error":
            raise InputError("x", got=1, allowed="2")
        case "names":
            print("mod\\xe8le", "\\udce9")
        case "hangup":
            os.kill(os.getpid(), signal.SIGHUP)
        case "threads":
            raise RuntimeError("can't start new thread")
        case "memory":
            bytearray(2**62)
        case "elsewhere":
            print('{"last": 1}', end="")
            with open("/dev/full", "wb", 0) as file:
                file.write(b"x")
        case "grow":
            with open(sys.argv[0] + ".grown", "wb", 0) as file:
                file.write(b"x")

run(main)
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_streams_and_limits(unbuffered: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    packages = Path(command.__file__).parent.parent
    environment = os.environ | {"RUN": f"{sys.executable} {program}", "PYTHONPATH": str(packages)}
    environment["PYTHONUNBUFFERED"] = unbuffered
    started = {
        line: subprocess.Popen(
            ["bash", "-c", line],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in SHELL_ENDINGS
    }
    for line, process in started.items():
        _, err = process.communicate()
        status, told = SHELL_ENDINGS[line]
        assert process.returncode == status, (line, err)
        assert err.startswith(told) and err.count("\n") == bool(told), (line, err)


def test_failed_imports_are_one_line(tmp_path: Path) -> None:
    # As torch does where there is no room for it.
    (tmp_path / "torch.py").write_text("raise MemoryError")
    (tmp_path / "numpy.py").write_text("raise ImportError('no numpy\\nhere')")
    packages = Path(command.__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{packages}"}
    ended = {
        name: subprocess.Popen(
            [sys.executable, "-m", name, "--help"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("executor.generate", "costmodel.frontier")
    }
    errors = {name: process.communicate()[1] for name, process in ended.items()}
    assert {process.returncode for process in ended.values()} == {1}
    assert errors["costmodel.frontier"] == "error: no numpy here\n"
    assert errors["executor.generate"].startswith("error: ")
    assert errors["executor.generate"].count("\n") == 1


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
    for wrong, hint in (("--cpu-memry=1GiB", "--cpu-memory"), ("", ""), ("--zzz", "")):
        with pytest.raises(InputError) as caught:
            parser.parse_args([wrong])
        assert caught.value.hint == hint


def test_face_imports_without_torch() -> None:
    program = "import sys, profiles; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
