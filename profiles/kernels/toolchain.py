"""What the native kernels are built with here, looked at without building them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from profiles.kernels.build import FAILURES, FLAGS, SOURCES, reason_of, run_compiler


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """A compiler and what it makes of the kernels.

    Parameters
    ----------
    version
        The first line of what it says of itself.
    vectors
        The instructions for which it compiles here: ``AVX-512 with bfloat16``, ``AVX-512``,
        ``AVX2`` or ``portable``.
    """

    version: str
    vectors: str


def find_toolchain(compiler: str) -> Toolchain:
    """Return what a compiler makes of the kernels; takes a second or two.

    Raises
    ------
    OSError
        With the reason, where the compiler is missing or cannot compile the kernels.
    """
    found = shutil.which(compiler)
    if found is None:
        raise OSError(f"no compiler {compiler}")
    try:
        version = run_compiler(found, "--version").splitlines()
        macros = run_compiler(found, *FLAGS, "-dM", "-E", "-x", "c++", "/dev/null")
        run_compiler(found, *FLAGS, "-fsyntax-only", *map(str, SOURCES))
    except FAILURES as error:
        raise OSError(f"{found}: {reason_of(error)}") from error
    if " __cplusplus " not in macros:
        raise OSError(f"{found} does not compile C++")
    return Toolchain(version=version[0] if version else found, vectors=_vectors(macros))


def _vectors(macros: str) -> str:
    """Name the instructions by the macros that the kernels ask for."""
    if " __AVX512F__ " not in macros:
        has_avx2 = all(f" __{name}__ " in macros for name in ("AVX2", "FMA", "F16C"))
        return "AVX2" if has_avx2 else "portable"
    return "AVX-512 with bfloat16" if " __AVX512BF16__ " in macros else "AVX-512"
