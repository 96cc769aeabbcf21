"""What a run needs before torch can be imported, and the form of every finding of the doctor."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from profiles.errors import one_line
from profiles.version import VERSION

DISTRIBUTION = "zigzag-llm"
# As python_requires of setup.cfg.
LEAST_PYTHON = (3, 11)


class State(StrEnum):
    """How a finding bears on a run: no obstacle, slower or more limited, impossible."""

    OK = "ok"
    NOTE = "note"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor.

    Parameters
    ----------
    follows
        The consequence, and what to try; empty where there is none.
    """

    what: str
    state: State = State.OK
    found: str
    follows: str = ""


def check_system() -> Finding:
    """Check the system and its Python."""
    name = platform.system()
    found = f"Python {platform.python_version()} on {name} {platform.release()}"
    if name != "Linux":
        follows = "only Linux is supported"
    elif sys.version_info < LEAST_PYTHON:
        follows = "try: Python {}.{} or newer".format(*LEAST_PYTHON)
    else:
        return Finding(what="system", found=f"{found} {platform.machine()}")
    return Finding(what="system", state=State.FAIL, found=found, follows=follows)


def check_libraries() -> Iterator[Finding]:
    """Check what setup.cfg requires: present and new enough; torch is also imported."""
    try:
        stated = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        follows = "try: pip install --editable . in the checkout"
        yield Finding(what="zigzag", state=State.NOTE, found="not installed", follows=follows)
    else:
        yield Finding(what="zigzag", found=VERSION)
        yield _check_versions(stated)
    yield _check_torch()


def _check_versions(stated: list[str]) -> Finding:
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in stated]
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = []
    for requirement in needed:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"no {requirement.name}")
        else:
            if not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{requirement.name} {version} (wanted: {requirement.specifier})")
    if not wrong:
        return Finding(what="libraries", found=f"all {len(needed)} in supported versions")
    return Finding(
        what="libraries",
        state=State.FAIL,
        found="; ".join(wrong),
        follows=f"try: pip install {DISTRIBUTION}",
    )


def _check_torch() -> Finding:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        follows = "the other checks need torch; try: pip install torch"
        found = one_line(f"cannot be imported: {error}")
        return Finding(what="torch", state=State.FAIL, found=found, follows=follows)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return Finding(what="torch", found=f"{torch.__version__}, built for {build}")
