"""Builds the native kernels with the system's compiler, once for each source, compiler and CPU."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from profiles.cache_folder import cache_folders, readable_folders, why_not_own
from profiles.mounts import read_lines

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "cpu.cpp", FOLDER / "products.cpp", FOLDER / "prompts.cpp")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fopenmp",
    "-fPIC",
    "-Wno-psabi",
)
# A compiler takes some 15 s; one that waits for a license or a network drive may take forever.
PATIENCE_S = 300
FAILURES = (OSError, subprocess.SubprocessError)
# omp_pause_soft of OpenMP 5.0: settings are kept.
_PAUSE_SOFT = 1


@cache
def load_library() -> ctypes.CDLL | None:
    """Return the kernels as a library, built now if need be.

    A kept library of the same source, flags and CPU serves also where its compiler is gone.
    ``None``, with a warning that says why, where none is kept and none can be built; the
    plain-torch twins serve then, several times slower. ``ZIGZAG_COMPILER`` names another compiler
    than ``c++``; empty, it forbids native kernels.
    """
    compiler = chosen_compiler()
    if not compiler:
        return None
    try:
        _share_torch_threads()
        key = _key()
        try:
            return _load_or_build(compiler, key)
        except FAILURES as error:
            kept = _load_kept(f"{key}-*")
            if kept is None:
                raise
            logger.info("a kept library serves: %s", reason_of(error))
            return kept
    except FAILURES as error:
        logger.warning(
            "no native CPU kernels, attention on the CPU will be many times slower: %s; try: g++ 12"
            " or newer, or name a compiler in ZIGZAG_COMPILER",
            reason_of(error),
        )
        return None


def chosen_compiler() -> str:
    """Return the compiler's name; empty where native kernels are forbidden."""
    return os.environ.get("ZIGZAG_COMPILER", "c++")


def _load_or_build(compiler: str, key: str) -> ctypes.CDLL:
    """Load what this compiler made, or have it make it in the first folder that works."""
    name = f"{key}-{_compiler_key(compiler)}"
    kept = _load_kept(f"{name}-*")
    if kept is not None:
        return kept
    if sys.stderr.isatty():
        print("note: compiling the CPU kernels, once", file=sys.stderr, flush=True)
    failure: Exception = OSError("no folder to build them in")
    for folder in cache_folders():
        try:
            return _load(build(compiler, folder, name))
        except (OSError, subprocess.CalledProcessError) as error:
            # The next may have room, or permit what it holds to be run.
            failure = error
    raise failure


def _load_kept(pattern: str) -> ctypes.CDLL | None:
    """Load a kept library that is whole and was written by nobody else, if there is one."""
    for path in _kept(pattern):
        try:
            return _load(path)
        except OSError as error:
            logger.info("a kept library does not load: %s", error)
    return None


def _kept(pattern: str) -> list[Path]:
    folders = readable_folders()
    return [path for f in folders for path in sorted(f.glob(f"kernels-{pattern}.so"))]


def kept_libraries() -> list[Path]:
    """Return the libraries that were built from this source for this CPU, by any compiler."""
    return _kept(f"{_key()}-*")


def _load(path: Path) -> ctypes.CDLL:
    """Load a library; raises ``OSError`` unless it is whole and no other user can write it.

    The file is opened once, so that the one that was checked is the one that is loaded.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        reason = why_not_own(path, os.fstat(descriptor))
        if reason is not None:
            raise OSError(reason)
        with open(descriptor, "rb", closefd=False) as file:
            if not path.stem.endswith(_digest(file.read())):
                raise OSError(f"{path} is damaged")
        # The descriptor stays open: a name that is free again might be taken for this library.
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except BaseException:
        os.close(descriptor)
        raise


def _share_torch_threads() -> None:
    """Make torch's own OpenMP serve the kernels too.

    A second copy of the runtime would keep threads of its own, which spin beside torch's.
    """
    if _torch_openmp() is None:
        raise OSError("torch was built without GNU OpenMP")


@cache
def _torch_openmp() -> ctypes.CDLL | None:
    for line in read_lines(Path("/proc/self/maps")):
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


def _key() -> str:
    """Name what a library must have been built from to serve here."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.[ch]*"))]
    return _digest(repr((texts, FLAGS, _cpu_features())).encode())


def _compiler_key(compiler: str) -> str:
    found = shutil.which(compiler)
    if found is None:
        raise OSError(f"no compiler {compiler}")
    return _digest(run_compiler(found, "--version").encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def run_compiler(*words: str, folder: Path | None = None) -> str:
    """Run a compiler, whose temporary files go to ``folder``; returns what it prints."""
    environment = os.environ | ({} if folder is None else {"TMPDIR": str(folder)})
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
        timeout=PATIENCE_S,
        env=environment,
    )
    return done.stdout


def reason_of(error: Exception) -> str:
    """Return the line of a compiler's or the system's message that names the error."""
    told = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
    lines = (told or "").strip().splitlines() or [str(error)]
    return next((line for line in lines if "error" in line), lines[0])


def _cpu_features() -> str:
    """Describe the CPU for which ``-march=native`` compiles."""
    lines = read_lines(Path("/proc/cpuinfo"))
    if not lines:
        raise OSError("/proc/cpuinfo cannot be read")
    wanted = ("model name", "flags", "Features", "CPU part")
    found = {line for line in lines if line.startswith(wanted)}
    return "\n".join([platform.machine(), *sorted(found)])


def build(compiler: str, folder: Path, name: str, flags: Sequence[str] = FLAGS) -> Path:
    """Compile the kernels to a file in ``folder``, which appears whole or not at all.

    Behind ``name`` its own name holds a digest of its bytes: a damaged library might end the
    process that loads it.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="kernels-") as temporary:
        # Linked apart from compiling: -fopenmp would link the system's OpenMP.
        own = Path(temporary)
        objects, linked = [str(own / f"{source.stem}.o") for source in SOURCES], own / "cpu.so"

        def compile_one(source: Path, compiled: str) -> None:
            run_compiler(compiler, *flags, "-c", str(source), "-o", compiled, folder=own)

        with ThreadPoolExecutor(len(SOURCES)) as pool:
            list(pool.map(compile_one, SOURCES, objects))
        run_compiler(compiler, "-shared", *objects, "-o", str(linked), folder=own)
        linked.chmod(0o755)
        path = folder / f"kernels-{name}-{_digest(linked.read_bytes())}.so"
        # Whole or not at all, also where two processes build at once.
        linked.replace(path)
    return path
