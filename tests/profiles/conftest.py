"""Runs a test of the kernels with each of their implementations."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from profiles.kernels import build, products


@pytest.fixture(scope="session")
def portable(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels for any CPU of this kind, whatever this one could do."""
    return _built_for([], tmp_path_factory)


@pytest.fixture(scope="session")
def avx2(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as a processor with AVX2 has them, where this one has AVX-512 besides."""
    if "avx512f" not in products._features():
        pytest.skip("the native kernels are those of AVX2, or of a processor without it")
    return _built_for(["-march=haswell"], tmp_path_factory)


def _built_for(processor: list[str], tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    build.load_library()
    # The least optimisation builds in a quarter of the time, and computes the same.
    flags = [*(flag for flag in build.FLAGS if flag != "-march=native"), *processor, "-O1"]
    path = build.build("c++", tmp_path_factory.mktemp("kernels"), "others", flags)
    return ctypes.CDLL(str(path))


@pytest.fixture(params=["native", "avx2", "portable", "twin"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test with each of the implementations."""
    kind: str = request.param
    if kind in ("avx2", "portable"):
        found = request.getfixturevalue(kind)
        monkeypatch.setattr("profiles.kernels.call.load_library", lambda: found)
    elif kind == "twin":
        monkeypatch.setattr("profiles.kernels.call.load_library", lambda: None)
    else:
        assert build.load_library() is not None
    yield kind


@pytest.fixture(scope="session")
def quick_interpreter() -> Iterator[None]:
    """Have Triton's interpreter look for its functions in each module once.

    It does so whenever a kernel calls a function of its own, which takes two fifths of its time.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            _find_builtins_once(patch)
        yield


def _find_builtins_once(patch: pytest.MonkeyPatch) -> None:
    from triton.language import core
    from triton.runtime import interpreter

    @cache
    def names(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]

    def patch_builtin(package: Any, *rest: Any) -> None:
        for name in names(package):
            # Those of a function that is being run already are the interpreter's own.
            if core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, *rest)

    patch.setattr(interpreter, "_patch_builtin", patch_builtin)
