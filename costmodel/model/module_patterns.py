"""Names of modules, as a ``quantization_config`` lists those that stay plain.

A config comes from others, so that matching is bounded: names are compared as strings, and of
regular expressions only those are taken that end soon.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from profiles.errors import InputError

# Of one config. Some list every plain module of a large model by its name.
MOST_NAMES, MOST_PATTERNS = 8192, 32
LONGEST_NAME = 500
# Of one expression: each repeat and each alternative multiplies the time of a match.
MOST_REPEATS, MOST_ALTERNATIVES = 2, 8
_REPEAT, _REPEATED_GROUP = re.compile(r"[*+?{]"), re.compile(r"\)[*+?{]")
_REGEX, _ANY = "re:", "*"
# What only expressions have. In names, a dot is a dot.
_MARKS = re.compile(r"[\\^$+?{}()\[\]|]")


@dataclass(frozen=True, kw_only=True)
class ModulePatterns:
    """Names of modules, of which each stands for more names.

    Parameters
    ----------
    whole
        Names that stand for themselves alone.
    names
        As in transformers, each stands for what begins with it, up to a dot, and for what ends with
        it. A dot is a dot, however, and no other character.
    wildcards
        The texts around each ``*`` of a name. It stands for what begins so, up to a dot.
    expressions
        Regular expressions, matched from the start of a name.
    """

    whole: frozenset[str] = frozenset()
    names: tuple[str, ...] = ()
    wildcards: tuple[tuple[str, ...], ...] = ()
    expressions: tuple[re.Pattern[str], ...] = ()

    @classmethod
    def read(cls, names: object, label: str, *, are_whole: bool = False) -> ModulePatterns:
        """Read a list of a config.

        Parameters
        ----------
        names
            The list; ``None`` stands for an empty one. An entry is a name, a name with ``*`` for
            any text, or ``re:`` and a regular expression.
        label
            What errors call it.
        are_whole
            Whether names stand for themselves alone, as in compressed-tensors.

        Raises
        ------
        InputError
            For entries of another kind, too many of them, and expressions that might take long.
        """
        found = [] if names is None else names
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise InputError(label, got=found, allowed="a list of names")
        if len(found) > MOST_NAMES:
            raise InputError(label, got=f"{len(found)} names", allowed=f"at most {MOST_NAMES}")
        for name in found:
            if not 0 < len(name) <= LONGEST_NAME:
                allowed = f"1 to {LONGEST_NAME} characters"
                raise InputError(label, got=f"a name of {len(name)} characters", allowed=allowed)
        marked = [name.removeprefix(_REGEX) for name in found if name.startswith(_REGEX)]
        plain = [name for name in found if not name.startswith(_REGEX)]
        starred = [] if are_whole else [name for name in plain if _ANY in name]
        if len(marked) + len(starred) > MOST_PATTERNS:
            got, allowed = f"{len(marked) + len(starred)} patterns", f"at most {MOST_PATTERNS}"
            raise InputError(label, got=got, allowed=allowed)
        if not are_whole:
            _check_names(plain, label)
        expressions = tuple(_compiled(expression, label) for expression in marked)
        if are_whole:
            return cls(whole=frozenset(plain), expressions=expressions)
        return cls(
            names=tuple(name for name in plain if _ANY not in name),
            # A dot before the star is that of regular expressions, as configs of gpt-oss have it.
            wildcards=tuple(tuple(name.replace(".*", _ANY).split(_ANY)) for name in starred),
            expressions=expressions,
        )

    def with_names(self, *names: str) -> ModulePatterns:
        """Return the same and some names more."""
        return replace(self, names=(*self.names, *names))

    def match(self, module: str) -> bool:
        """Whether a module's name is among those that the patterns stand for."""
        return (
            module in self.whole
            or module.endswith(self.names)
            or f"{module}.".startswith(self._starts)
            or any(_has_pieces(module, pieces) for pieces in self.wildcards)
            or any(expression.match(module) for expression in self.expressions)
        )

    @cached_property
    def _starts(self) -> tuple[str, ...]:
        return tuple(name if name.endswith(".") else f"{name}." for name in self.names)


def _has_pieces(module: str, pieces: Iterable[str]) -> bool:
    """Whether a name begins with pieces in this order, the last one up to a dot or to the end."""
    first, *between, last = pieces
    if not module.startswith(first):
        return False
    place = len(first)
    for piece in between:
        place = module.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    # A name ends like one before a dot.
    return last == "" or f"{module}.".find(last if last[-1] == "." else f"{last}.", place) >= 0


def _check_names(names: Iterable[str], label: str) -> None:
    for name in names:
        if _MARKS.search(name):
            allowed = f"names, with {_ANY} for any text, or {_REGEX} and a regular expression"
            raise InputError(label, got=name, allowed=allowed)


def _compiled(expression: str, label: str) -> re.Pattern[str]:
    # The mark of a group that is not counted is no repeat.
    counted = expression.replace("(?:", "(")
    is_slow = (
        len(_REPEAT.findall(counted)) > MOST_REPEATS
        or counted.count("|") >= MOST_ALTERNATIVES
        or counted.count("(") > MOST_REPEATS
        or _REPEATED_GROUP.search(counted)
    )
    if is_slow:
        allowed = (
            f"{MOST_REPEATS} repeats and {MOST_REPEATS} groups, no repeated group, "
            f"and {MOST_ALTERNATIVES} alternatives"
        )
        raise InputError(label, got=expression, allowed=allowed)
    try:
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        got = f"{expression} ({error})"
        raise InputError(label, got=got, allowed="regular expressions") from None
