"""Builds the native kernels with the system's compiler, once for each source, compiler and CPU."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp",
    "-fPIC", "-Wno-psabi",
)  # fmt: skip
# omp_pause_soft of OpenMP 5.0: settings are kept.
_PAUSE_SOFT = 1


@cache
def load_library() -> ctypes.CDLL | None:
    """Return the kernels as a library, built now if need be.

    ``None``, with a warning that says why, where there is no compiler or it fails; the plain-torch
    twins serve then, several times slower. ``ZIGZAG_COMPILER`` names another compiler than
    ``c++``; empty, it forbids native kernels.
    """
    compiler = os.environ.get("ZIGZAG_COMPILER", "c++")
    if not compiler:
        return None
    try:
        _share_torch_threads()
        path = _cache_folder() / f"kernels-{_key(compiler)}.so"
        if not path.exists():
            build(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[0])
        logger.warning(
            "no native CPU kernels, attention on the CPU will be many times slower: %s; try: g++ 12"
            " or newer, or name a compiler in ZIGZAG_COMPILER",
            reason,
        )
        return None


def _share_torch_threads() -> None:
    """Make torch's own OpenMP serve the kernels too.

    A second copy of the runtime would keep threads of its own, which spin beside torch's.
    """
    if _torch_openmp() is None:
        raise OSError("torch was built without GNU OpenMP")


@cache
def _torch_openmp() -> ctypes.CDLL | None:
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        path = line.partition("/")[2]
        if Path(path).name.startswith("libgomp"):
            return ctypes.CDLL(f"/{path}", mode=ctypes.RTLD_GLOBAL)
    return None


def end_idle_threads() -> None:
    """End the threads that OpenMP keeps for its next use by the calling thread.

    Every thread that ever computed has a team of its own. While there are more of them than cores,
    GNU OpenMP lets threads that wait for work sleep at once instead of spinning, and every
    operator of every thread begins some ten microseconds later.
    """
    openmp = _torch_openmp()
    if openmp is None or not hasattr(openmp, "omp_pause_resource_all"):
        logger.info("this OpenMP keeps its threads; operators of small models begin later")
    elif openmp.omp_pause_resource_all(_PAUSE_SOFT):
        logger.info("OpenMP did not end its threads")


def _cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "zigzag"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _key(compiler: str) -> str:
    found = shutil.which(compiler)
    if found is None:
        raise OSError(f"no compiler {compiler}")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True)
    texts = [path.read_text(encoding="utf-8") for path in sorted(SOURCE.parent.glob("*.[ch]*"))]
    parts = (texts, FLAGS, version.stdout, _cpu_features())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _cpu_features() -> str:
    """Describe the CPU for which ``-march=native`` compiles."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    wanted = ("model name", "flags", "Features", "CPU part")
    found = {line for line in lines if line.startswith(wanted)}
    return "\n".join([platform.machine(), *sorted(found)])


def build(compiler: str, path: Path, flags: Sequence[str] = FLAGS) -> None:
    """Compile the kernels to ``path``, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="kernels-") as name:
        # Linked apart from compiling: -fopenmp would link the system's OpenMP.
        compiled, linked = Path(name) / "cpu.o", Path(name) / path.name
        compile_it = [*flags, "-c", str(SOURCE), "-o", str(compiled)]
        link_it = ["-shared", str(compiled), "-o", str(linked)]
        for words in (compile_it, link_it):
            subprocess.run([compiler, *words], capture_output=True, text=True, check=True)
        # Whole or not at all, also where two processes build at once.
        linked.replace(path)
