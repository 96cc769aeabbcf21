"""Checks of the values in a description."""

from __future__ import annotations

from profiles.errors import InputError


def check_least(spec: object, least: int, *names: str) -> None:
    """Refuse the named fields of a description where they are below ``least``."""
    for name in names:
        if getattr(spec, name) < least:
            raise InputError(f"model {name}", got=getattr(spec, name), allowed=f"{least} or more")


def check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not in ``allowed``."""
    if value not in allowed:
        raise InputError(what, got=repr(value), allowed=", ".join(allowed))


def check_positive(what: str, value: float) -> None:
    """Refuse a number that is not above zero and finite."""
    if not 0 < value < float("inf"):
        raise InputError(what, got=value, allowed="above 0")
