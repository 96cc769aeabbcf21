"""The console script: its commands, its completion, and the wheel that brings it."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from profiles.completion import completion_script
from profiles.version import VERSION
from profiles.zigzag import COMMANDS, main
from tests.executor.commands import end_command

ROOT = Path(__file__).parents[1]
PACKAGES = ("profiles", "costmodel", "executor")


def _end_zigzag(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    ended = end_command(main, arguments, monkeypatch, capfd, name="/bin/zigzag")
    return ended.status, ended.out, ended.err


def test_help_lists_every_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = _end_zigzag([], monkeypatch, capfd)
    assert status == 0
    for command in COMMANDS.values():
        assert f"\n  {command.name:<12}{command.summary}\n" in out
    assert out.count("\n  zigzag ") == 3
    assert max(map(len, out.splitlines())) <= 100
    assert _end_zigzag(["--help"], monkeypatch, capfd) == (0, out, "")
    assert _end_zigzag(["--version"], monkeypatch, capfd) == (0, f"zigzag {VERSION}\n", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_have_a_parser_and_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    module = COMMANDS[name].load()
    assert callable(module.main)
    assert module.parser().prog == f"python -m {module.__name__}"
    status, out, err = _end_zigzag([name, "--help"], monkeypatch, capfd)
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: zigzag {name} [-h]")
    assert f"example:\n  zigzag {name} " in out and "python -m" not in out


def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for words, told in {
        ("serch",): "try: zigzag search",
        ("mesure", "--quick"): "try: zigzag measure",
        ("unlike-anything",): "try: zigzag --help",
        ("--serch",): "allowed: the flags in zigzag --help",
        ("search", "--nope"): "allowed: the flags in zigzag search --help",
    }.items():
        status, out, err = _end_zigzag(list(words), monkeypatch, capfd)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.endswith(told + "\n") and words[0] in err
    # The exit status and the hint of the command itself.
    arguments = ["search", "--hardware", "t4-flexgen", "--cpu-memory", "1MiB", "--disk", "0"]
    assert _end_zigzag(arguments, monkeypatch, capfd)[0] == 3


def test_missing_library_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "costmodel.estimate", raising=False)
    monkeypatch.setitem(sys.modules, "costmodel.pricing.price", None)
    status, _, err = _end_zigzag(["estimate"], monkeypatch, capfd)
    assert (status, err.count("\n")) == (1, 1)
    assert "costmodel.pricing.price" in err and err.endswith("try: zigzag doctor\n")


def test_search_starts_without_torch() -> None:
    program = (
        "import sys; from profiles.zigzag import main\n"
        "assert not {'costmodel', 'executor', 'numpy', 'shtab'} & set(sys.modules)\n"
        "try: main(['search', '--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=False)
    assert ended.returncode == 0


def test_bash_completes_commands_flags_and_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.txt").touch()
    script = tmp_path / "completion"
    script.write_text(completion_script("bash"), encoding="utf-8")
    lines = {
        "zigzag sea": "search",
        "zigzag search --hardware cpu-2core --num": "--num-prompts",
        "zigzag generate --prompts fold": "folder folder.txt",
        "zigzag demo --folder fold": "folder",
        "zigzag cluster sea": "search",
        "zigzag cluster generate --prompts fold": "folder folder.txt",
        "zigzag completion z": "zsh",
    }
    tries = "".join(
        f"COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); _shtab_zigzag;"
        ' echo $(printf "%s\\n" "${COMPREPLY[@]}" | sort)\n'
        for line in lines
    )
    done = subprocess.run(
        ["bash", "-c", f"source {script}\n{tries}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == list(lines.values())


def test_wheel_holds_the_packages_whole(tmp_path: Path) -> None:
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    without = shutil.ignore_patterns("__pycache__")
    for package in (*PACKAGES, "tests/fuzz"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=without)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    made = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(tmp_path / "dist" / made.stdout.splitlines()[-1]) as wheel:
        names = set(wheel.namelist())
        (points,) = (name for name in names if name.endswith("/entry_points.txt"))
        entries = wheel.read(points).decode()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        described = wheel.read(metadata).decode()
    files = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == files
    assert {f"{package}/py.typed" for package in PACKAGES} <= files
    assert "zigzag = profiles.zigzag:start" in entries
    assert f"\nVersion: {VERSION}\n" in described


def test_installed_version_is_the_code_s() -> None:
    assert importlib.metadata.version("zigzag-llm") == VERSION
