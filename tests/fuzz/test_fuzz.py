"""Broken files: one line each, no hang, and nothing senseless accepted.

``corpus`` holds inputs that once went wrong; they are read first. A long search for more:
``FUZZ_EXAMPLES=20000 python -m pytest tests/fuzz``.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from profiles.errors import ZigzagError
from tests.fuzz.mutations import byte_strings, json_documents
from tests.fuzz.targets import Target, targets

CORPUS = Path(__file__).with_name("corpus")
NUM_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
HANG_S = 20.0
NAMES = (
    "config",
    "shard",
    "header",
    "index",
    "gguf",
    "gguf_model",
    "quantized",
    "tokenizer",
    "tokenizer_config",
    "prompts",
    "profile",
    "policy",
    "runs",
    "trace",
)


@contextmanager
def _no_hang() -> Iterator[None]:
    def stop(signum: int, frame: types.FrameType | None) -> None:
        faulthandler.dump_traceback()
        raise AssertionError(f"not read within {HANG_S:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_corpus_is_there() -> None:
    assert {path.parent.name for path in CORPUS.glob("*/*")} == set(NAMES)


def _read(target: Target, data: bytes, folder: Path) -> None:
    """Read an input; fails on whatever a user would not see as one line."""
    with _no_hang():
        try:
            target.read(data, folder)
        except ZigzagError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000


def _mutants(target: Target) -> st.SearchStrategy[bytes]:
    kinds = [byte_strings(target.seeds)]
    if target.documents:
        kinds.insert(0, json_documents(target.documents))
    return st.one_of(kinds)


@pytest.mark.parametrize("name", NAMES)
def test_sound_files_are_read(name: str, tmp_path: Path) -> None:
    for data in targets()[name].seeds:
        try:
            targets()[name].read(data, tmp_path)
        except ZigzagError as error:
            # The configs of other families do not fit the weights, and say so.
            assert name == "config"
            assert "no tensor" in str(error) or "not quantized" in str(error)


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: path.name)
def test_what_once_went_wrong_is_told(path: Path, tmp_path: Path) -> None:
    _read(targets()[path.parent.name], path.read_bytes(), tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_broken_files_are_told(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp(name)
    target = targets()[name]

    @seed(0)
    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(_mutants(target))
    def each(data: bytes) -> None:
        _read(target, data, folder)

    each()
