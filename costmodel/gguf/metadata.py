"""The metadata of one architecture, read with checks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from costmodel.gguf.model import GgufModel
from costmodel.model.hf_config import MAX_WHOLE
from profiles.errors import InputError

ARCHITECTURE = "general.architecture"
# Blocks behind those of the decoder, which predict further tokens. They are not run.
PREDICTING_LAYERS = "nextn_predict_layers"
# The longest arrays have a number for each layer.
MAX_NUMBERS = 2**14
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchMetadata:
    """Metadata whose keys begin with the name of the file's architecture.

    Parameters
    ----------
    model
        The file, or all files of one model.
    name
        The model's name in messages.
    """

    model: GgufModel
    name: str

    @property
    def arch(self) -> str:
        """The architecture, such as ``llama``."""
        found = self.model.metadata.get(ARCHITECTURE)
        if not isinstance(found, str):
            raise InputError(f"{ARCHITECTURE} of {self.name}", got=found, allowed="a text")
        return found

    def __iter__(self) -> Iterator[str]:
        """Yield the keys, without the prefix."""
        prefix = f"{self.arch}."
        for key in self.model.metadata:
            if key.startswith(prefix):
                yield key.removeprefix(prefix)

    def get(self, key: str) -> Any:
        """Return a plain value, or ``None``.

        An array of equal numbers, one for each layer, is one number. Floats are stored in 32 bits;
        the shortest decimal that they round to is what the model's own config has.

        Raises
        ------
        InputError
            For an array of more than ``MAX_NUMBERS``.
        """
        value = self.model.metadata.get(f"{self.arch}.{key}")
        if isinstance(value, np.ndarray | tuple) and len(value) > MAX_NUMBERS:
            label, got = f"{self.arch}.{key} of {self.name}", f"{len(value)} values"
            raise InputError(label, got=got, allowed=f"at most {MAX_NUMBERS}")
        if isinstance(value, np.ndarray):
            is_one = len(value) > 0 and bool((value == value[0]).all())
            value = value[0].item() if is_one else value.tolist()
        # Beyond the range of 32 bits there is nothing to round to.
        if isinstance(value, float) and abs(value) <= _LARGEST:
            rounded = np.float32(value)
            return float(str(rounded)) if float(rounded) == value else value
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a whole number above 0."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= MAX_WHOLE:
            raise self.refusal(key, "a whole number of at least 1")
        return value

    def number(self, key: str, default: float) -> float:
        """Return a finite number above 0."""
        value = self.get(key)
        if value is None:
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value <= sys.float_info.max:
            raise self.refusal(key, "a number above 0")
        return float(value)

    def num_predicting(self) -> int:
        """Return how many blocks of the file are not layers of the decoder."""
        count = self.get(PREDICTING_LAYERS)
        if count is None:
            return 0
        if type(count) is not int or not 0 <= count < self.whole("block_count"):
            raise self.refusal(PREDICTING_LAYERS, "fewer than block_count")
        return count

    def refusal(self, key: str, allowed: str, hint: str = "") -> InputError:
        """Make the error for a key whose value is not supported."""
        value = self.get(key)
        got = "none" if value is None else value
        if isinstance(got, list):
            got = f"{got[:8]}{', ...' if len(got) > 8 else ''}"
        label = f"{self.arch}.{key} of {self.name}"
        return InputError(label, got=got, allowed=allowed, hint=hint)
