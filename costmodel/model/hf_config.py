"""A Hugging Face ``config.json``, read the way transformers 5 reads it.

An absent key has the default of the family's config class in transformers. Null is refused unless
it has a meaning in transformers. Keys that a family does not read are ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from profiles.errors import InputError

# The largest whole number that is accepted: no dimension of a model is larger.
MAX_WHOLE = 2**31 - 1

# Kinds of attention by all of their names, old ones included.
_LAYER_TYPES = {
    "full_attention": "full_attention",
    "attention": "full_attention",
    "sliding_attention": "sliding_attention",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HFConfig:
    """The keys of one ``config.json``.

    Parameters
    ----------
    family
        The ``model_type``.
    name
        The model's name in messages.
    raw
        The parsed file.
    defaults
        Values for absent keys, those of the family's class in transformers.
    aliases
        The family's own names for common keys. A file may have either.
    """

    family: str
    name: str
    raw: Mapping[str, Any]
    defaults: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        """Return the file's value of a key, or else the family's default."""
        own = self.aliases.get(key, key)
        # As in transformers, the common name wins where a file has both.
        return self.raw.get(key, self.raw.get(own, self.defaults.get(own)))

    def whole(self, key: str, *, instead_of_null: int | None = None, least: int = 1) -> int:
        """Return a whole number."""
        value = self.get(key)
        if value is None and instead_of_null is not None:
            return instead_of_null
        if type(value) is not int or not least <= value <= MAX_WHOLE:
            raise self.refusal(key, value, f"a whole number of at least {least}")
        return value

    def wholes(self, key: str) -> list[int]:
        """Return a list of whole numbers of at least zero; it is empty where the value is null."""
        value = [] if self.get(key) is None else self.get(key)
        if not isinstance(value, list) or any(type(v) is not int or v < 0 for v in value):
            raise self.refusal(key, value, "a list of whole numbers of at least 0")
        return value

    def flag(self, key: str) -> bool:
        """Return true or false."""
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.refusal(key, value, "true or false")
        return value

    def number(self, key: str) -> float:
        """Return a number above zero; the file must write it as a float."""
        value = self.positive(key, self.get(key))
        if not isinstance(self.get(key), float):
            raise self.refusal(key, self.get(key), "a number with a decimal point or an exponent")
        return value

    def positive(self, key: str, value: Any) -> float:
        """Check that ``value``, the value of ``key``, is a number above zero, and return it."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value <= sys.float_info.max:
            raise self.refusal(key, value, "a number above 0")
        return float(value)

    def refusal(self, key: str, got: object, allowed: str, hint: str = "") -> InputError:
        """Make the error for a key whose value is not supported."""
        text = "null" if got is None else got if isinstance(got, str) and " " in got else repr(got)
        return InputError(f"{key} in config of {self.name}", got=text, allowed=allowed, hint=hint)

    def renamed(self, names: Mapping[str, str]) -> HFConfig:
        """Return a config with the common names of some of its keys, by the file's own names.

        As in transformers, the file's own name wins where a file has both.
        """
        raw = {key: value for key, value in self.raw.items() if key not in names}
        found = {common: self.raw[own] for own, common in names.items() if own in self.raw}
        return replace(self, raw=raw | found)

    def nested(self, key: str, defaults: Mapping[str, Any]) -> HFConfig:
        """Return the keys of an object inside of the file; one that is null has no keys."""
        found = {} if self.get(key) is None else self.get(key)
        if not isinstance(found, Mapping):
            raise self.refusal(key, found, "null or an object")
        return replace(self, raw=found, defaults=defaults, aliases={})

    @property
    def dtype(self) -> str | None:
        """The file's dtype, if it names one."""
        value = self.raw.get("dtype")
        value = self.raw.get("torch_dtype") if value is None else value
        return None if value is None else str(value)

    def layer_types(self) -> list[str]:
        """Return the kind of attention of each layer; the list is empty where the file has none."""
        found = self.raw.get("layer_types")
        if found is None:
            return []
        count = self.whole("num_hidden_layers")
        if not isinstance(found, list) or len(found) != count:
            raise self.refusal("layer_types", found, f"a list of {count}, one for each layer")
        for kind in found:
            if not isinstance(kind, str) or kind not in _LAYER_TYPES:
                raise self.refusal("layer_types", kind, ", ".join(_LAYER_TYPES))
        return [_LAYER_TYPES[kind] for kind in found]
