"""JSON in and out: strict when read, whole or not at all when written."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from profiles.errors import InputError
from profiles.whole_file import write_whole

T = TypeVar("T")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object to ``path``, whole or not at all."""
    write_whole(path, partial(dump_json, value))


def dump_json(value: Mapping[str, Any], handle: IO[str]) -> None:
    """Write one JSON object, laid out for people."""
    json.dump(value, handle, indent=2, allow_nan=False)
    handle.write("\n")


def read_json(path: Path, what: str, *, takes_infinity: bool = False) -> dict[str, Any]:
    """Read one JSON object.

    Parameters
    ----------
    what
        The file's role in error messages.
    takes_infinity
        Whether ``NaN`` and infinities are numbers, as in files that Python writes.
    """
    path = Path(path)
    label = f"{what} {path}"
    allowed = "a JSON object in a readable file"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(label, got="no such file", allowed=allowed) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(label, got=error, allowed=allowed) from error
    try:
        value = json.loads(text, parse_constant=None if takes_infinity else refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(label, got=f"text that is not JSON ({error})", allowed=allowed) from error
    if not isinstance(value, dict):
        raise InputError(label, got=f"a JSON {type(value).__name__}", allowed=allowed)
    return value


def refuse_constant(name: str) -> float:
    """Raise ``ValueError`` for ``NaN`` and infinities, which are no JSON: a ``parse_constant``."""
    raise ValueError(f"{name} is not a finite number")


def to_json(value: Any) -> Any:
    """Turn a dataclass (nested, with tuples and mappings) into what ``json`` writes."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return value


def from_json(cls: type[T], value: Any, what: str) -> T:
    """Build dataclass ``cls`` from parsed JSON, refusing unknown keys and wrong types.

    ``what`` is the path of the value inside its file, for messages. Fields with a default may
    be absent. The class's own ``__post_init__`` does the checking of values.
    """
    if not isinstance(value, dict):
        raise InputError(what, got=_show(value), allowed="an object")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]  # T is always a dataclass
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise InputError(what, got=f"unknown key {unknown[0]!r}", allowed=", ".join(known))
    arguments = {
        name: _convert(hints[name], item, f"{what}.{name}") for name, item in value.items()
    }
    try:
        return cls(**arguments)
    except InputError as error:
        raise error.inside(what) from None
    except TypeError:
        missing = [n for n in known if n not in arguments]
        raise InputError(what, got=f"no key {missing[0]!r}", allowed=", ".join(known)) from None


def _convert(hint: Any, value: Any, what: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            if type(None) in arguments:
                return None
            raise InputError(what, got="null", allowed="a value")
        return _convert(next(a for a in arguments if a is not type(None)), value, what)
    if origin is tuple:
        if not isinstance(value, list):
            raise InputError(what, got=_show(value), allowed="a list")
        return tuple(_convert(arguments[0], v, f"{what}[{i}]") for i, v in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise InputError(what, got=_show(value), allowed="an object")
        return {key: _convert(arguments[1], v, f"{what}.{key}") for key, v in value.items()}
    if is_dataclass(hint):
        return from_json(hint, value, what)  # type: ignore[arg-type]  # narrowed to a class above
    return _convert_scalar(hint, value, what)


def _convert_scalar(hint: Any, value: Any, what: str) -> Any:
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(what, got=_show(value), allowed="a number")
        # A whole number of hundreds of digits is finite and still no float.
        if abs(value) > sys.float_info.max or not math.isfinite(value):
            raise InputError(what, got=value, allowed="a finite number")
        return float(value)
    if hint is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise InputError(what, got=_show(value), allowed="a whole number")
    if hint in (str, bool) and not isinstance(value, hint):
        raise InputError(what, got=_show(value), allowed=f"a {hint.__name__}")
    return value


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
