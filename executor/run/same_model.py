"""Checks that a policy belongs to the model of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from costmodel.model.spec import ModelSpec
from profiles.errors import InputError
from profiles.files import to_json


def check_same_model(wanted: ModelSpec, found: ModelSpec) -> None:
    """Refuse a policy for ``wanted`` in a run of ``found``; their names may differ."""
    namesake = replace(found, name=wanted.name)
    if wanted == namesake:
        return
    name, theirs, ours = "num_layers", wanted.num_layers, found.num_layers
    if theirs == ours:
        name, theirs, ours = next(_differences(to_json(wanted), to_json(namesake), ""))
    raise InputError(
        "policy for another model",
        got=f"{name} {_short(theirs)} for {wanted.name}",
        allowed=f"{name} {_short(ours)} as in {found.name}",
        hint="search again with --model",
    )


def _differences(wanted: Any, found: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the innermost values of two documents that differ, with the path to each."""
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        wanted, found = dict(enumerate(wanted)), dict(enumerate(found))
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in wanted:
            path = f"{name}.{key}" if name else str(key)
            yield from _differences(wanted[key], found[key], path)
    elif wanted != found:
        yield name, wanted, found


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"with {len(value)} entries"
    return "given" if isinstance(value, dict) else "none" if value is None else str(value)
