"""Runs a test of the kernels with each of their implementations."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from profiles.kernels import build


@pytest.fixture(scope="session")
def portable(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels for any CPU of this kind, whatever this one could do."""
    build.load_library()
    # The least optimisation builds in a quarter of the time, and computes the same.
    flags = [*(flag for flag in build.FLAGS if flag != "-march=native"), "-O1"]
    path = build.build("c++", tmp_path_factory.mktemp("kernels"), "portable", flags)
    return ctypes.CDLL(str(path))


@pytest.fixture(params=["native", "portable", "twin"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test with each of the implementations."""
    kind: str = request.param
    if kind == "portable":
        found = request.getfixturevalue("portable")
        monkeypatch.setattr("profiles.kernels.call.load_library", lambda: found)
    elif kind == "twin":
        monkeypatch.setattr("profiles.kernels.call.load_library", lambda: None)
    else:
        assert build.load_library() is not None
    yield kind
