"""Machines that ship with the package, each with where its figures come from."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from profiles.errors import InputError
from profiles.hardware import HardwareProfile
from profiles.start import called


def recorded_names() -> list[str]:
    """Names that ``recorded_profile`` knows."""
    names = [file.name for file in resources.files("profiles").joinpath("data").iterdir()]
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def recorded_profile(name: str) -> HardwareProfile:
    """Load a recorded machine by its name."""
    if name not in recorded_names():
        raise InputError("recorded machine", got=repr(name), allowed=", ".join(recorded_names()))
    file = resources.files("profiles").joinpath("data", f"{name}.json")
    with resources.as_file(file) as path:
        return HardwareProfile.load(path)


def find_profile(name_or_path: str) -> HardwareProfile:
    """Load a profile: the name of a recorded machine, or a file."""
    names = recorded_names()
    if name_or_path in names:
        return recorded_profile(name_or_path)
    path = Path(name_or_path)
    if not path.exists():
        raise InputError(
            f"profile {name_or_path}",
            got="no such file",
            allowed=f"a file of {called('profiles.measure')}, or a recorded machine:"
            f" {', '.join(names)}",
        )
    return HardwareProfile.load(path)
